"""``--mode=plan``: whether a run fits a pod and how fast it would be, without the pod.

The experiment's real train step is compiled by the real TPU compiler for a topology that is not there.  Nothing that
the compiler knows is guessed: memory is its own account, time is its estimate of every instruction, played along its
own schedule (:mod:`vlpjax.planning.schedule`).  What it does not know is priced by published figures
(:mod:`vlpjax.hardware`): links, and attention kernels by the bundles of their loops
(:mod:`vlpjax.planning.kernels`), or at an efficiency that the config states where these are not known.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vlpjax import config as configs
from vlpjax.config import Config
from vlpjax.errors import UserError
from vlpjax.hardware import Chip, chip_of
from vlpjax.planning import flops, topology
from vlpjax.planning.hlo import read_program
from vlpjax.planning.kernels import CORES
from vlpjax.planning.prices import ChipPrices, Links
from vlpjax.planning.report import Memory, Plan
from vlpjax.planning.schedule import Timeline, play
from vlpjax.rules import map_with_names
from vlpjax.run import Run, apply_mesh_rules
from vlpjax.state import TrainState
from vlpjax.step import batch_loss, make_loss_step, make_train_step


def load_for_topology(experiment: str, overrides: Sequence[tuple[str, str]]) -> Config:
    """An experiment's config as a run on ``config.plan.topology`` has it: mesh rules of that hardware, then overrides.

    Raises:
      UserError: an unknown experiment, leaf or topology.
    """
    config = configs.load(experiment)
    given = [(path, text) for path, text in overrides if path == "plan.topology"]
    configs.apply_overrides(config, given)
    check(config)
    apply_mesh_rules(config, topology.devices_of(config.plan.topology))
    return configs.apply_overrides(config, overrides)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a step, and says about it: all that a plan takes minutes for.

    Attributes:
      text: of the optimised program.
      peak: bytes of a device's memory; ``host`` of the host's.
      seconds: that compiling took.
      evaluation, evaluation_peak: the same of the forward pass on a batch, empty if it was not asked for.
    """

    text: str
    peak: float
    host: float
    seconds: float
    evaluation: str = ""
    evaluation_peak: float = 0.0


def plan(config: ConfigDict, hlo: str | Path | None = None) -> Plan:
    """Plans a run on ``config.plan.topology``; see :func:`vlpjax.planning.topology.prepare` for what comes first.

    Args:
      hlo: file for the text of the optimised program of the train step.

    Raises:
      UserError: an unknown topology, no compiler, a mesh or shapes that do not fit.
    """
    run, chip = run_on_topology(config)
    compiled = compile_plan(run)
    if hlo:
        Path(hlo).write_text(compiled.text, encoding="utf-8")
    return price(run, chip, compiled)


def run_on_topology(config: ConfigDict) -> tuple[Run, Chip]:
    """The run of a config on the chips of ``config.plan.topology``.

    Raises:
      UserError: an unknown topology, a mesh or shapes that do not fit.
    """
    check(config)
    devices = topology.devices_of(config.plan.topology)
    chip = chip_of(devices[0].device_kind)
    if chip is None or chip.clock_hz is None:
        raise UserError(
            f"No figures are known of {devices[0].device_kind!r}, so nothing can be planned for it."
        )
    return Run.from_config(config, data="example" not in config.data, devices=devices), chip


def compile_plan(run: Run) -> Compiled:
    """The slow part of :func:`plan`.

    Raises:
      UserError: the compiler refuses the program.
    """
    begin = time.monotonic()
    program = compile_step(run, make_train_step)
    took = time.monotonic() - begin
    memory = program.memory_analysis()
    evaluation, evaluation_peak = "", 0.0
    if run.config.plan.evaluation:
        forward = compile_step(run, make_loss_step)
        evaluation = forward.as_text()
        evaluation_peak = float(forward.memory_analysis().peak_memory_in_bytes)
    return Compiled(
        text=program.as_text(),
        peak=float(memory.peak_memory_in_bytes),
        host=float(memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes),
        seconds=took,
        evaluation=evaluation,
        evaluation_peak=evaluation_peak,
    )


def price(run: Run, chip: Chip, compiled: Compiled) -> Plan:
    """The other part of :func:`plan`: what the program takes on the run's chips."""
    config, prices = run.config, prices_of(run, chip)
    timeline = play(read_program(compiled.text), prices)
    evaluation = play(read_program(compiled.evaluation), prices) if compiled.evaluation else None
    counted = model_flops(run)
    kernel_flops = sum(total.amount for total in timeline.kernels.values())
    devices = run.layout.mesh.size
    return Plan(
        name=config.name or "experiment",
        topology=config.plan.topology,
        chip=chip.name,
        chips=devices // chip.devices,
        devices=devices,
        mesh={axis: size for axis, size in run.layout.mesh.shape.items() if size > 1},
        batch=run.experiment.durations.batch_size,
        tokens=max(one.tokens(run.batch_shapes) for _, one in run.experiment.objectives.values()),
        steps=run.total_steps,
        accumulate=run.experiment.accumulate,
        memory=memory_of(run, compiled, chip),
        model_flops=counted.total(config.plan.attention_share),
        compiled_flops=(timeline.flops + kernel_flops) * devices,
        timeline=timeline,
        peak_flops=chip.bf16_flops / chip.devices,
        attention_efficiency=config.plan.attention_efficiency,
        attention_share=config.plan.attention_share,
        compile_seconds=compiled.seconds,
        notes=_notes(timeline, counted),
        evaluation=evaluation,
        evaluation_peak=compiled.evaluation_peak,
    )


def check(config: ConfigDict) -> None:
    """Raises ``UserError`` for settings of ``config.plan`` that make no sense."""
    if not config.plan.topology:
        raise UserError(
            f"config.plan.topology is not set; name one, such as --config.plan.topology=v5p:4x4x8 ({topology.FORMS})."
        )
    for name in ("attention_efficiency", "attention_share"):
        if not 0 < config.plan[name] <= 1:
            raise UserError(
                f"config.plan.{name} is {config.plan[name]}; it is a share, above 0 and at most 1."
            )


def compile_step(run: Run, make: Any) -> Any:
    """The compiled program of a step; nothing is allocated.

    Raises:
      UserError: the compiler refuses the program; its first sentence is passed on.
    """
    abstract, shardings = run.abstract
    step = make(run.experiment, run.layout, shardings, run.batch_shardings)
    lowered = step.lower(abstract, run.batch_shapes)
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        raise refusal(str(error)) from error


class TooLarge(UserError):
    """The compiler found no way to keep the step in a chip's memory."""


def refusal(message: str) -> UserError:
    """What the compiler says, as an error for the user."""
    reason = " ".join(message.split())
    needs = re.search(r"Used ([\d.]+\w*) of ([\d.]+\w*) hbm", reason)
    if needs or "RESOURCE_EXHAUSTED" in reason:
        held = (
            f"needs {needs[1]} of {needs[2]}"
            if needs
            else f"exceeds a chip's memory ({reason[:200].rstrip('.')})"
        )
        return TooLarge(
            f"This step does not fit: it {held}; rematerialise more, raise config.accumulate, lower the batch, or take "
            "more chips."
        )
    return UserError(f"The TPU compiler refuses this step: {reason[:500].rstrip('.')}.")


def prices_of(run: Run, chip: Chip) -> ChipPrices:
    """What a device of the run's mesh takes for what the compiler does not time."""
    assert chip.clock_hz is not None
    mesh, settings = run.layout.mesh, run.config.plan
    return ChipPrices(
        clock=chip.clock_hz,
        peak=chip.bf16_flops / chip.devices,
        memory_bandwidth=chip.hbm_bandwidth / chip.devices,
        host_bandwidth=chip.host_bandwidth / chip.devices,
        links=Links.of(mesh, chip.ici_bandwidth, chip.dcn_bandwidth / chip.devices, chip.rings),
        efficiency=settings.attention_efficiency,
        attention_share=settings.attention_share,
        core=CORES.get(chip.name),
    )


def memory_of(run: Run, compiled: Compiled, chip: Chip) -> Memory:
    """The compiler's account, and the state's parts by their shardings."""
    abstract, shardings = run.abstract
    parts = {
        name: _local_bytes(getattr(abstract, name), getattr(shardings, name))
        for name in ("params", "optimizer", "teachers", "objectives", "statistics")
    }
    held = _local_bytes(run.batch_shapes, run.batch_shardings)
    return Memory(
        peak=compiled.peak,
        capacity=chip.hbm_bytes / chip.devices,
        parameters=parts["params"],
        optimizer=parts["optimizer"],
        teachers=parts["teachers"],
        other=parts["objectives"] + parts["statistics"],
        batch=held,
        temporaries=compiled.peak - sum(parts.values()) - held,
        host=compiled.host,
    )


def model_flops(run: Run) -> flops.Flops:
    """Useful FLOPs of a step of all devices."""
    abstract, _ = run.abstract
    factors = run.experiment.optimizer.factors(abstract.params)
    learns = map_with_names(lambda name, leaf: factors[name][0] is not None, abstract.params)
    still = jax.tree.map(lambda leaf: False, abstract)
    marks = still.replace(params=learns)

    def loss(state: TrainState, batch: Any) -> jax.Array:
        return batch_loss(run.experiment, state, batch)

    batch = dict(run.batch_shapes)
    return flops.count(loss, (abstract, batch), (marks, dict.fromkeys(batch, False)))


def _local_bytes(abstract: Any, shardings: Any) -> float:
    """What a device holds of a tree of arrays; one sharding stands for all of them."""
    leaves, places = jax.tree.leaves(abstract), jax.tree.leaves(shardings)
    if len(places) == 1:
        places *= len(leaves)
    pairs = zip(leaves, places, strict=True)
    return float(sum(math.prod(where.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, where in pairs))


def _notes(timeline: Timeline, counted: flops.Flops) -> tuple[str, ...]:
    """What the figures leave out, in sentences."""
    notes = []
    if timeline.endless:
        notes.append(
            f"{timeline.endless} loops run for a number of turns that only data tells; each counts as one turn."
        )
    if counted.endless:
        notes.append(f"{counted.endless} such loops hold model FLOPs, which count for one turn.")
    return tuple(notes)

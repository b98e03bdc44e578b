"""``Experiment``: the pure parts of a config, built: towers, objectives, teachers, optimizer and precision.

It holds no array.  The step, the planner, ``describe``, the evaluators and the tests all start from it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from ml_collections import ConfigDict

from vlpjax.config import TYPE, Config, build, resolve
from vlpjax.durations import Durations
from vlpjax.errors import UserError
from vlpjax.flags import compiler_options
from vlpjax.models.towers import Towers
from vlpjax.objectives.base import Context, Loss, Objective, fold_name, head_name
from vlpjax.optim.optimizer import Optimizer
from vlpjax.teachers import Teacher


@dataclass(frozen=True)
class Experiment:
    """What a step computes.

    Attributes:
      towers: backbones and heads.
      objectives: per name, (weight, objective).
      teachers: per name, how the teacher starts and follows.
      optimizer: of all parameters.
      durations: resolves durations; knows the run's total steps.
      seed: of all randomness in the model.
      accumulate: micro-batches per step.
      compute_dtype: ``"float32"`` or ``"bfloat16"``, and ``precision_reason`` says why.
      compiler_options: what the step is compiled with.
    """

    towers: Towers
    objectives: Mapping[str, tuple[float, Objective]]
    teachers: Mapping[str, Teacher]
    optimizer: Optimizer
    durations: Durations
    seed: int
    accumulate: int
    compute_dtype: str
    precision_reason: str
    compiler_options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_config(
        cls, config: ConfigDict, durations: Durations, devices: Sequence[Any] | None = None
    ) -> Experiment:
        """Builds the pure parts of ``config``.

        Args:
          devices: that it is for; this machine's by default.

        Raises:
          UserError: no objective, a head whose name collides with a tower, a batch that ``accumulate`` does
            not divide, or whatever a part says about its own fields.
        """
        dtype, reason = choose_precision(config.precision, devices)
        modules, objectives = build_modules(config, dtype)
        if not objectives:
            raise UserError("config.objectives is empty; name at least one objective.")
        if durations.batch_size % config.accumulate:
            raise UserError(
                f"config.accumulate={config.accumulate} does not divide the batch of {durations.batch_size}."
            )
        return cls(
            towers=Towers.of(modules),
            objectives=objectives,
            teachers=build(config.teachers),
            optimizer=build(config.optimizer),
            durations=durations,
            seed=config.seed,
            accumulate=config.accumulate,
            compute_dtype=dtype,
            precision_reason=reason,
            compiler_options=compiler_options(
                (jax.devices() if devices is None else devices)[0], config.compiler_options
            ),
        )

    def make_optimizer(self, params: Any) -> optax.GradientTransformation:
        """The gradient transformation for these parameters (shapes are enough)."""
        return self.optimizer.make(params, self.durations)

    def constraints(self) -> dict[str, Callable[[Any], Any]]:
        """Per tower name, what its parameters pass through after every update."""
        return {
            head_name(name, head): constraint
            for name, (_, objective) in self.objectives.items()
            for head, constraint in objective.constraints().items()
        }

    def batch_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Per field of the batch, the logical axes that objectives want it to lie along, beside the batch's."""
        wanted = (objective.batch_axes() for _, objective in self.objectives.values())
        return {name: axes for fields in wanted for name, axes in fields.items()}

    def run_objectives(
        self,
        towers: Towers,
        batch: Mapping[str, jax.Array],
        rng: jax.Array,
        teachers: Any,
        states: Any,
        step: Any,
        row_rng: jax.Array | None = None,
    ) -> dict[str, Loss]:
        """All losses of a batch on bound towers.  Initialisation runs this very code, with no teachers yet."""
        context = Context(
            student=towers, batch=batch, rng=rng, step=step, teachers=teachers, durations=self.durations,
            row_rng=row_rng, seed=self.seed,
        )  # fmt: skip
        return {
            name: objective(context.of(name, states[name]))
            for name, (_, objective) in self.objectives.items()
        }

    def initial_states(self) -> dict[str, Any]:
        """What the objectives remember before the first step."""
        key = jax.random.key(self.seed)
        return {
            name: objective.initial_state(fold_name(key, f"{name}/state"))
            for name, (_, objective) in self.objectives.items()
        }

    def initial_variables(self, batch: Mapping[str, Any]) -> Any:
        """Parameters (with their axis names) and statistics, initialised through the objectives.

        Args:
          batch: arrays of the shapes that training sees; the batch size does not matter.
        """
        key = jax.random.key(self.seed)

        def run(towers: Towers) -> dict[str, Loss]:
            # While a teacher has no parameters, the student stands in for it: the shapes are the same.
            teachers = dict.fromkeys(self.teachers, towers)
            return self.run_objectives(
                towers, batch, key, teachers, self.initial_states(), jnp.zeros((), jnp.int32)
            )

        rngs = {"params": fold_name(key, "params"), "dropout": fold_name(key, "dropout")}
        return self.towers.init(rngs, method=run)


def build_modules(
    config: ConfigDict, dtype: str
) -> tuple[dict[str, nn.Module], dict[str, tuple[float, Objective]]]:
    """The modules of an experiment (backbones and objectives' heads) and its objectives with their weights.

    Args:
      dtype: compute type of the backbones and heads that do not set one.  (What losses compare is float32: objectives
        see to that.)

    Raises:
      UserError: a head whose name collides with a tower.
    """
    modules: dict[str, nn.Module] = {
        name: _build_module(config.towers[name], dtype) for name in config.towers
    }
    objectives: dict[str, tuple[float, Objective]] = {}
    for name in config.objectives:
        objective = build(config.objectives[name].loss)
        objectives[name] = (float(config.objectives[name].weight), objective)
        for head, module in objective.heads().items():
            full = head_name(name, head)
            if full in modules:
                raise UserError(f"objectives.{name} adds a head {full!r}, but a tower already has that name.")
            unset = hasattr(module, "dtype") and module.dtype is None
            modules[full] = module.clone(dtype=dtype) if unset else module
    return modules, objectives


def base_config() -> Config:
    """What every experiment has, with the settings that most of them keep.

    An experiment adds ``towers``, ``objectives``, ``data.train``, ``optimizer`` and ``duration``.
    """
    return Config(
        name="",
        seed=0,
        duration="",  # of the run: steps, epochs or examples
        precision="auto",  # or "float32", "bfloat16"
        accumulate=1,  # micro-batches per step
        towers={},
        objectives={},  # name -> {weight, loss}
        teachers={},
        data={},
        optimizer=None,
        evaluators={},
        mesh=dict(replica=1, fsdp=-1, ring=1, ulysses=1, tensor=1, expert=1),
        mesh_rules=(),  # (expression on "platform-kind-count", {dotted leaf: value}), first match wins
        sharding_rules={},  # logical axis -> mesh axes, over the default table
        initialize={},  # tower -> spec(Pretrained, path=...): parameters from files of other libraries
        start=dict(run="", rules=((".*", True),)),  # parameters from another run's newest checkpoint
        checkpoint=dict(every="10%", keep=2),
        log=dict(every="10 steps"),
        profile="",  # steps to trace, such as "10:15"
        compiler_options=(),  # "name=value", over those of vlpjax/flags.py
        plan=dict(
            topology="",  # such as "v5p:4x4x8", for --mode=plan
            attention_efficiency=0.5,  # share of the peak of attention kernels whose schedule is not known
            attention_share=1.0,  # of query-key pairs that masks let through: 0.5 where attention is causal
            evaluation=True,  # whether the forward pass on a batch is planned too
        ),
    )


def choose_precision(setting: str, devices: Sequence[Any] | None = None) -> tuple[str, str]:
    """The compute type and why: parameters, optimizer, norms' statistics, softmax and losses stay float32.

    Args:
      setting: ``"auto"``, ``"float32"`` or ``"bfloat16"``.
      devices: that the experiment is for; this machine's by default.
    """
    if setting in ("float32", "bfloat16"):
        return setting, "config.precision asks for it"
    if setting != "auto":
        raise UserError(f"config.precision is {setting!r}; there are 'auto', 'float32' and 'bfloat16'.")
    device = (jax.devices() if devices is None else devices)[0]
    if device.platform == "cpu":
        return "float32", "the CPU has no fast bfloat16 arithmetic"
    return "bfloat16", f"the matrix units of {device.device_kind} are built for it"


def _build_module(node: ConfigDict, dtype: str) -> nn.Module:
    """Builds a tower; the compute type goes to every module that has a ``dtype`` and does not set it."""

    def with_dtype(item: Any) -> Any:
        if isinstance(item, (tuple, list)):
            return tuple(with_dtype(one) for one in item)
        if not isinstance(item, ConfigDict):
            return item
        filled = {key: with_dtype(item[key]) for key in item}
        if TYPE in item and "dtype" in inspect.signature(resolve(item[TYPE])).parameters:
            filled["dtype"] = filled.get("dtype") or dtype
        return ConfigDict(filled)

    module = build(with_dtype(node))
    if not isinstance(module, nn.Module):
        raise UserError(f"{node[TYPE]} is no Flax module and cannot be a tower.")
    return module

"""A plan: its figures, what they say about the run, as a table and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlpjax.planning.schedule import Timeline, Totals

DAY = 86_400.0


@dataclass(frozen=True)
class Memory:
    """Bytes per device.

    Attributes:
      peak: the compiler's account of the most that is held at a time, and ``capacity`` what there is.
      parameters, optimizer, teachers, other: parts of the state that a step begins with; ``other`` are the states of
        objectives and statistics.
      batch: the step's input.
      temporaries: what the peak holds beside them: activations, gradients, buffers of communication.
      host: held in the host's memory.
    """

    peak: float
    capacity: float
    parameters: float
    optimizer: float
    teachers: float
    other: float
    batch: float
    temporaries: float
    host: float


@dataclass(frozen=True)
class Plan:
    """What a run would be on a topology.  All times are in seconds, all figures per device where not said otherwise.

    Attributes:
      name: of the experiment; ``topology`` as it was asked for.
      chip, chips, devices: kind and number; a chip may show as two devices.
      mesh: axis -> size, those above 1.
      batch: examples per step of all devices, and ``tokens`` that are predicted per example (0 where none are).
      steps: of the configured run.
      memory: in bytes.
      model_flops: of a step of all devices, useful work only; ``compiled_flops`` what all devices really compute, with
        what is computed again.
      timeline: of a train step; ``evaluation`` of a forward pass on a batch, if it was asked for.
      evaluation_peak: bytes.
      peak_flops: of a device.
      attention_efficiency, attention_share: as the config states them.
      compile_seconds: of this planning.
      notes: what the figures leave out.
    """

    name: str
    topology: str
    chip: str
    chips: int
    devices: int
    mesh: dict[str, int]
    batch: int
    tokens: int
    steps: int
    accumulate: int
    memory: Memory
    model_flops: float
    compiled_flops: float
    timeline: Timeline
    peak_flops: float
    attention_efficiency: float
    attention_share: float
    compile_seconds: float
    notes: tuple[str, ...] = ()
    evaluation: Timeline | None = None
    evaluation_peak: float = 0.0

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.memory.capacity

    @property
    def mfu(self) -> float:
        """Useful FLOPs as a share of what all devices could do in the time of a step."""
        return self.model_flops / (self.timeline.seconds * self.devices * self.peak_flops)

    @property
    def examples_per_second(self) -> float:
        """Per chip."""
        return self.batch / self.timeline.seconds / self.chips

    @property
    def days(self) -> float:
        """Of the configured run, without evaluations, checkpoints and interruptions."""
        return self.steps * self.timeline.seconds / DAY


def as_json(found: Plan) -> dict[str, Any]:
    """A plan as plain values."""

    def line(timeline: Timeline) -> dict[str, Any]:
        groups = {
            name: [
                {"kind": key[0], **({"axes": key[1]} if key[1] else {}), **dataclasses.asdict(total)}
                for key, total in sorted(getattr(timeline, name).items())
            ]
            for name in ("collectives", "kernels", "host", "untimed")
        }
        return {
            "seconds": timeline.seconds,
            "cycles": timeline.cycles,
            "compute_seconds": timeline.compute,
            "kernel_seconds": timeline.kernel_seconds,
            "untimed_seconds": timeline.untimed_seconds,
            "transfer_seconds": timeline.transfer_seconds,
            "exposed_seconds": timeline.exposed,
            "hidden_seconds": max(0.0, timeline.transfer_seconds - timeline.exposed),
            **groups,
        }

    plain = {
        field.name: getattr(found, field.name)
        for field in dataclasses.fields(found)
        if field.name not in ("timeline", "evaluation", "memory")
    }
    return {
        **plain,
        "memory": dataclasses.asdict(found.memory),
        "fits": found.fits,
        "mfu": found.mfu,
        "examples_per_second_and_chip": found.examples_per_second,
        "tokens_per_second_and_chip": found.examples_per_second * found.tokens,
        "days": found.days,
        "step": line(found.timeline),
        "evaluation": None if found.evaluation is None else line(found.evaluation),
    }


def as_text(found: Plan) -> str:
    """A plan as a table to read."""
    return "\n\n".join(
        [_head(found), _memory(found), _time(found), _traffic(found), "\n".join(_advice(found))]
    )


def _head(found: Plan) -> str:
    mesh = ", ".join(f"{axis}={size}" for axis, size in found.mesh.items()) or "one device"
    shown = f" ({found.devices:,} devices)" if found.devices != found.chips else ""
    tokens = f" of {found.tokens:,} tokens" if found.tokens else ""
    return "\n".join(
        [
            f"{found.name} on {found.topology}: {found.chips:,} chips{shown}",
            f"mesh: {mesh}; {found.batch:,} examples{tokens} a step"
            f"{f' in {found.accumulate} parts' if found.accumulate > 1 else ''}, {found.steps:,} steps",
            "all figures are per device: a chip shows as two" if shown else "all figures are per chip",
        ]
    )


def _memory(found: Plan) -> str:
    memory = found.memory
    rows = [
        (name, gigabytes(getattr(memory, name)))
        for name in ("parameters", "optimizer", "teachers", "other", "batch", "temporaries", "host")
        if getattr(memory, name)
    ]
    share = memory.peak / memory.capacity
    rows.append(("peak", f"{gigabytes(memory.peak)} of {gigabytes(memory.capacity)} ({share:.0%})"))
    if found.evaluation is not None:
        rows.append(("peak of an evaluation step", gigabytes(found.evaluation_peak)))
    return table(("memory", ""), rows)


def _time(found: Plan) -> str:
    line = found.timeline
    hidden = max(0.0, line.transfer_seconds - line.exposed)
    work = found.compiled_flops / max(found.model_flops, 1.0)
    rows = [
        ("compute, by the compiler's cycles", milliseconds(line.compute)),
        (
            f"attention kernels, at {kernel_share(found):.0%} of the peak",
            milliseconds(line.kernel_seconds),
        ),
        ("instructions without an estimate, at the memory's bandwidth", milliseconds(line.untimed_seconds)),
        ("communication, hidden behind them", milliseconds(hidden)),
        ("communication, exposed", milliseconds(line.exposed)),
        ("step", milliseconds(line.seconds)),
        ("model FLOPs of all devices", f"{found.model_flops:.4g}"),
        ("compiled FLOPs of all devices", f"{found.compiled_flops:.4g} ({work:.2f} x)"),
        ("MFU", f"{found.mfu:.1%}"),
        ("examples per second and chip", f"{found.examples_per_second:,.4g}"),
    ]
    if found.tokens:
        rows.append(("tokens per second and chip", f"{found.examples_per_second * found.tokens:,.0f}"))
    rows.append(("days for the configured run", f"{found.days:,.2f}"))
    if found.evaluation is not None:
        rows.append(("evaluation step", milliseconds(found.evaluation.seconds)))
    return table(("time", ""), [row for row in rows if row[1] != milliseconds(0)])


def kernel_share(found: Plan) -> float:
    """The share of the peak that kernels reach in useful FLOPs."""
    flops = sum(total.amount for total in found.timeline.kernels.values())
    return flops / max(found.timeline.kernel_seconds * found.peak_flops, 1.0)


def _traffic(found: Plan) -> str:
    line = found.timeline
    rows = [
        (
            " ".join(part for part in key if part),
            f"{total.count:,}",
            gigabytes(total.amount),
            milliseconds(total.seconds),
        )
        for group in (line.collectives, line.host)
        for key, total in _largest(group)
    ]
    text = (
        table(("moved per step", "times", "bytes", "seconds at the links' bandwidth"), rows)
        if rows
        else "nothing moves"
    )
    kernels = [
        (key[0], f"{total.count:,}", f"{total.amount:.3g}", milliseconds(total.seconds))
        for key, total in _largest(line.kernels)
    ]
    return text + ("\n\n" + table(("kernel", "times", "FLOPs", "seconds"), kernels) if kernels else "")


def _largest(group: Totals) -> list[tuple[tuple[str, str], Any]]:
    return sorted(group.items(), key=lambda item: -item[1].seconds)


def bound(found: Plan) -> str:
    """What takes most of the step: "communication", "attention" or "compute"; "memory" where it does not fit."""
    line = found.timeline
    if not found.fits:
        return "memory"
    compute = line.compute + line.untimed_seconds
    parts = {"communication": line.exposed, "attention": line.kernel_seconds, "compute": compute}
    return max(parts, key=lambda name: parts[name])


def _advice(found: Plan) -> list[str]:
    """What bounds the run, and what to try."""
    line, memory = found.timeline, found.memory
    lines = [f"bound by: {bound(found)}"]
    if not found.fits:
        state = memory.parameters + memory.optimizer + memory.teachers
        lines.append(
            f"It does not fit: {gigabytes(memory.peak)} of {gigabytes(memory.capacity)}.  "
            + (
                "Most of it is temporaries: rematerialise more, raise config.accumulate, or lower the batch."
                if memory.temporaries > state
                else "Most of it is the state: shard it over more devices, or take an optimizer that keeps less."
            )
        )
    if line.exposed > 0.1 * line.seconds and line.collectives:
        (kind, axes), total = _largest(line.collectives)[0]
        lines.append(
            f"{line.exposed / line.seconds:.0%} of the step waits for data, most of it for {kind} over {axes} "
            f"({gigabytes(total.amount)}, {milliseconds(total.seconds)}): "
            f"try more examples per chip, or a smaller {axes}."
        )
    work = found.compiled_flops / max(found.model_flops, 1.0)
    if found.fits and work > 1.2 and memory.peak < 0.7 * memory.capacity:
        free = gigabytes(memory.capacity - memory.peak)
        lines.append(
            f"The program computes {work:.2f} times the model's FLOPs, and {free} are free: rematerialise less."
        )
    ideal = line.flops / found.peak_flops
    if ideal < 0.6 * line.compute:
        lines.append(
            f"Matrix products at the chip's peak would be {ideal / line.compute:.0%} of the compute time; the rest is "
            "element-wise work, copies, and products too small to fill the matrix units."
        )
    return lines + [f"note: {note}" for note in found.notes]


def comparison(plans: Sequence[tuple[str, Plan]]) -> str:
    """Several plans side by side, one a line."""
    header = ("setting", "mesh", "batch", "peak GB", "fits", "compute ms", "kernels ms", "exposed ms", "step ms", "MFU",
              "per s and chip", "moved GB", "bound by")  # fmt: skip
    rows = []
    for name, found in plans:
        line = found.timeline
        rate = found.examples_per_second * (found.tokens or 1)
        moved = sum(total.amount for total in line.collectives.values())
        rows.append(
            (
                name or "as configured",
                " ".join(f"{axis}={size}" for axis, size in found.mesh.items()),
                f"{found.batch:,}" + (f"/{found.accumulate}" if found.accumulate > 1 else ""),
                f"{found.memory.peak / 1e9:.2f}",
                "yes" if found.fits else "no",
                f"{line.compute * 1e3:,.1f}",
                f"{line.kernel_seconds * 1e3:,.1f}",
                f"{line.exposed * 1e3:,.1f}",
                f"{line.seconds * 1e3:,.1f}",
                f"{found.mfu:.1%}",
                f"{rate:,.0f}" if rate >= 100 else f"{rate:.2f}",
                f"{moved / 1e9:.2f}",
                bound(found),
            )
        )
    return table(header, rows)


def gigabytes(size: float) -> str:
    """Bytes as GB, with three digits."""
    return f"{size / 1e9:,.3g} GB" if size >= 1e6 else f"{size / 1e3:,.1f} kB"


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first to the left and the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])

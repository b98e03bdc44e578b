"""Holds the planner against step times that others measured and published: the same model, batch and chips, planned.

    python tools/validate_plan.py --folder=plans
    python tools/validate_plan.py --folder=plans --only=llama3.1-8b-v6e-8

A case is a public training run with its source; its model is described as settings of our decoder, and its step is
compiled for the chips that it ran on.  What is compared is therefore our program on their hardware: what both compute
again in the backward pass is the same as far as our names for it go, kernels and the order of collectives are ours.
The recipes for v6e and for 405B give products more fast memory (``xla_tpu_scoped_vmem_limit_kib=98304``), with which
compiling takes far longer; here all cases have the compiler's default.
Compiled programs are kept in the folder, and only their prices are worked out again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from vlpjax.errors import UserError, tells_mistakes
from vlpjax.planning import topology
from vlpjax.planning.report import Plan, milliseconds, table

EXPERIMENT = "experiments/decoders/llama2_7b.py:paper"
RECIPES = "https://github.com/AI-Hypercomputer/tpu-recipes/blob/main/training"
MAXTEXT = "https://github.com/AI-Hypercomputer/maxtext/blob/main"

LLAMA_8B = "kv_heads=8 mlp_dim=14336 vocabulary=128256"
LLAMA_70B = "width=8192 depth=80 heads=64 kv_heads=8 mlp_dim=28672"
LLAMA_405B = "width=16384 depth=126 heads=128 kv_heads=8 mlp_dim=53248 vocabulary=128256"
# MaxText's sizes with no model's name: base.yml, scaled by get_individual_scales(16 or 32).
SCALE_16 = "width=4096 depth=32 heads=64 head_dim=128 mlp_dim=28672"
SCALE_32 = "width=8192 depth=32 heads=64 head_dim=128 mlp_dim=28672"
# Between the recipe's names and ours: its layer input, which it offloads too, is what our scan keeps on the chip.
OFFLOAD_QKV_OUT = "offload:query,key,value,residual"
OFFLOAD_QKV = "offload:query,key,value"


@dataclass(frozen=True)
class Case:
    """A step that somebody measured.

    Attributes:
      name: of the case.
      source: where the time is published, with the settings.
      seconds: of a step.
      topology: the chips, as the planner names them.
      decoder: fields of our decoder, as ``field=value`` with spaces between them.
      length: tokens of a row.
      rows: of a chip's batch.
      remat: of our decoder.
      changes: other settings, ``(path, value)``.
    """

    name: str
    source: str
    seconds: float
    topology: str
    decoder: str
    length: int
    rows: int
    remat: str
    changes: tuple[tuple[str, str], ...] = ()

    def overrides(self, chips: int) -> list[tuple[str, str]]:
        """Everything that differs from :data:`EXPERIMENT`."""
        fields = [field.partition("=") for field in self.decoder.split()]
        return [
            ("plan.topology", self.topology),
            ("plan.evaluation", "False"),
            *[(f"towers.decoder.{name}", value) for name, _, value in fields],
            ("towers.decoder.length", str(self.length)),
            ("towers.decoder.remat", self.remat),
            ("data.example.tokens", f"int32[{self.length + 1}]"),
            ("data.train.batch_size", str(self.rows * chips)),
            ("compiler_options", "()"),
            *self.changes,
        ]


CASES = (
    Case(
        "llama3.1-8b-v6e-8", f"{RECIPES}/trillium/Llama3.1-8B-MaxText/v6e-8", 3.443,
        "v6e:2x4", LLAMA_8B, 8192, 3, OFFLOAD_QKV_OUT,
    ),
    Case(
        "llama3.1-8b-v6e-256", f"{RECIPES}/trillium/Llama3.1-8B-MaxText/v6e-256", 4.546,
        "v6e:16x16", LLAMA_8B, 8192, 4, OFFLOAD_QKV_OUT,
    ),
    Case(
        "llama3.1-70b-v6e-256", f"{RECIPES}/trillium/Llama3.1-70B-MaxText/v6e-256", 42.656,
        "v6e:16x16", f"{LLAMA_70B} vocabulary=128256", 8192, 5, OFFLOAD_QKV,
    ),
    Case(  # 120 TFLOP/s per chip, of 1,237 TFLOP by MaxText's count, in which attention is not halved
        "16b-v5e-256", f"{MAXTEXT}/src/maxtext/configs/tpu/v5e", 1237 / 120,
        "v5e:16x16", SCALE_16, 2048, 6, "full",
    ),
    Case(  # 132 TFLOP/s per chip, of 1,596 TFLOP
        "32b-v5e-256", f"{MAXTEXT}/src/maxtext/configs/tpu/v5e", 1596 / 132,
        "v5e:16x16", SCALE_32, 2048, 4, "full",
    ),
    Case(  # 692 tokens per second and chip
        "llama2-70b-v5p-512", f"{MAXTEXT}/docs/reference/models/tiering.md", 4 * 4096 / 692,
        "v5p:8x8x8", LLAMA_70B, 4096, 4, "save:query,key,value,residual",
    ),
    Case(
        "fuji-7b-v5e-1024", "https://github.com/apple/axlearn/blob/main/axlearn/experiments/text/gpt/fuji.py", 2.21,
        "v5e:16x16*4", "vocabulary=32768 tied=True", 4096, 1, "dots", (("mesh.replica", "4"),),
    ),
    Case(
        "llama3.1-405b-v5p-512", f"{RECIPES}/v5p/Llama3.1-405B-MaxText", 131.474,
        "v5p:8x8x8", LLAMA_405B, 8192, 2, "offload:attention_out",
    ),
)  # fmt: skip


@tells_mistakes
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--folder", type=Path, required=True, help="for compiled programs")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="CASE", help=", ".join(case.name for case in CASES)
    )
    parser.add_argument("--compiled", action="store_true", help="leave out what the folder does not hold yet")
    given = parser.parse_args(arguments)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    unknown = sorted(set(given.only) - {case.name for case in CASES})
    if unknown:
        raise UserError(
            f"There is no case {unknown[0]!r}; there are {', '.join(case.name for case in CASES)}."
        )
    topology.prepare()
    chosen = [case for case in CASES if not given.only or case.name in given.only]
    if given.compiled:
        chosen = [case for case in chosen if program_file(given.folder, case).exists()]
    given.folder.mkdir(parents=True, exist_ok=True)
    planned = [(case, plan_of(case, given.folder)) for case in chosen]
    print(comparison(planned))
    return 0


def program_file(folder: Path, case: Case) -> Path:
    """Where the compiled program of a case is kept."""
    return folder / f"{case.name}.json.gz"


def plan_of(case: Case, folder: Path) -> Plan:
    """The plan of a case, from its compiled program if the folder holds it.

    Raises:
      UserError: it cannot be planned.
    """
    from vlpjax.plan import Compiled, compile_plan, load_for_topology, price, run_on_topology

    overrides = case.overrides(len(topology.devices_of(case.topology)))
    run, chip = run_on_topology(load_for_topology(EXPERIMENT, overrides))
    file = program_file(folder, case)
    if file.exists():
        kept = json.loads(gzip.decompress(file.read_bytes()))
        if kept.pop("overrides") == [list(change) for change in overrides]:
            return price(run, chip, Compiled(**kept))
    print(f"compiling {case.name} ...", flush=True)
    compiled = compile_plan(run)
    text = json.dumps({"overrides": overrides, **vars(compiled)})
    file.write_bytes(gzip.compress(text.encode()))
    return price(run, chip, compiled)


def comparison(planned: Sequence[tuple[Case, Plan]]) -> str:
    """Published and planned step times side by side, and the median of the errors' sizes."""
    header = (
        "case",
        "published",
        "planned",
        "error",
        "compute",
        "attention",
        "exposed",
        "peak GB",
        "moved GB",
    )
    rows: list[tuple[str, ...]] = []
    errors: list[float] = []
    for case, plan in planned:
        line = plan.timeline
        errors.append(line.seconds / case.seconds - 1)
        moved = sum(total.amount for total in line.collectives.values())
        rows.append(
            (
                case.name,
                milliseconds(case.seconds),
                milliseconds(line.seconds),
                f"{errors[-1]:+.1%}",
                milliseconds(line.compute + line.untimed_seconds),
                milliseconds(line.kernel_seconds),
                milliseconds(line.exposed),
                f"{plan.memory.peak / 1e9:.1f}",
                f"{moved / 1e9:.1f}",
            )
        )
    if not rows:
        return "No case was planned."
    sources = "\n".join(f"{case.name}: {case.source}" for case, _ in planned)
    median = statistics.median(map(abs, errors))
    return f"{table(header, rows)}\n\nmedian absolute error of {len(rows)}: {median:.1%}\n\n{sources}"


if __name__ == "__main__":
    sys.exit(main())

"""Compares two experiments over several seeds at equal steps: runs both, pair by pair, and tables the scores.

    python tools/compare.py experiments/contrastive/slip.py
    python tools/compare.py --a=experiments/quickstart.py --b=experiments/quickstart.py \\
        --set_b objectives.clip.loss=vlpjax.objectives.contrastive:Sigmoid --metric=style/text_to_image/recall@1

In the first form the experiment file says in a constant ``PROOF`` what it is to be compared with, by which metrics
and with which settings.  ``--set`` changes both sides, ``--set_a`` and ``--set_b`` one of them.  The seed of a pair
is that of parameters, data order and augmentation on both sides.  A run that is finished is not run again, and one
that was cut off continues, so the command is safe to repeat.  Scores are those of the last evaluation;
``EVALUATOR/METRIC`` names one.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works from a checkout that is not installed

from vlpjax.errors import UserError  # noqa: E402


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
      config: the experiment, as ``--config`` takes it.
      settings: ``path=value`` changes of its config.
    """

    config: str
    settings: tuple[str, ...] = ()

    def command(self, workdir: Path, seed: int) -> list[str]:
        """The command of the run with this seed."""
        changed = [f"--config.{setting}" for setting in self.settings]
        seeds = [f"--config.seed={seed}", f"--config.data.train.seed={seed}"]
        return [
            sys.executable, "-m", "vlpjax.main", f"--config={self.config}", f"--workdir={workdir}", *changed, *seeds,
        ]  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One metric over all seeds.

    Attributes:
      metric: ``EVALUATOR/METRIC``.
      a, b: a score per seed and side.
    """

    metric: str
    a: tuple[float, ...]
    b: tuple[float, ...]

    @property
    def differences(self) -> tuple[float, ...]:
        return tuple(a - b for a, b in zip(self.a, self.b, strict=True))

    def text(self) -> str:
        """Mean and standard deviation over seeds of both sides and of their differences."""
        wins = sum(difference > 0 for difference in self.differences)
        return (
            f"{self.metric}: {_spread(self.a)} against {_spread(self.b)}; difference {_spread(self.differences, '+')}; "
            f"higher in {wins} of {len(self.a)} seeds"
        )


def read_proof(path: Path) -> dict[str, Any]:
    """The constant ``PROOF`` of an experiment file, read without running it.

    Raises:
      UserError: the file has none, or it lacks a field.
    """
    if not path.is_file():
        raise UserError(f"There is no experiment file {str(path)!r}.")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PROOF":
            assert isinstance(node.value, ast.Call), "PROOF = dict(...)"
            proof = {word.arg: ast.literal_eval(word.value) for word in node.value.keywords if word.arg}
            missing = [name for name in ("against", "metrics") if name not in proof]
            unknown = [
                name for name in proof if name not in ("against", "metrics", "settings", "set_a", "set_b")
            ]
            if missing or unknown:
                raise UserError(
                    f"PROOF of {path} {f'lacks {missing[0]!r}' if missing else f'has {unknown[0]!r}'}."
                )
            return proof
    raise UserError(
        f"{path} has no constant PROOF, which says what to compare it with; give --a, --b and --metric."
    )


def run_pairs(arms: dict[str, Arm], seeds: Sequence[int], runs: Path) -> None:
    """Makes all runs, the two sides of a seed one after the other.

    Raises:
      UserError: a run that fails.
    """
    for seed in seeds:
        for name, arm in arms.items():
            workdir = runs / f"{name}-{seed}"
            print(f"{name}, seed {seed}: {arm.config} {' '.join(arm.settings)}", flush=True)
            done = subprocess.run(
                arm.command(workdir, seed), cwd=ROOT, capture_output=True, text=True, check=False
            )
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise UserError(f"The run in {workdir} failed: {last}")


def score(workdir: Path, metric: str) -> float:
    """The last value of ``EVALUATOR/METRIC`` in a run.

    Raises:
      UserError: the run has no such score.
    """
    evaluator, _, name = metric.partition("/")
    path = workdir / "evaluations" / f"{evaluator}.json"
    if not path.is_file():
        known = sorted(file.stem for file in path.parent.glob("*.json"))
        raise UserError(f"{workdir} has no evaluation {evaluator!r}; it has {', '.join(known) or 'none'}.")
    metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
    if name not in metrics:
        raise UserError(f"The evaluation {evaluator!r} has no metric {name!r}; it has {', '.join(metrics)}.")
    return float(metrics[name])


def collect(metrics: Sequence[str], seeds: Sequence[int], runs: Path) -> list[Row]:
    """The scores of finished runs."""
    return [
        Row(metric, *(tuple(score(runs / f"{name}-{seed}", metric) for seed in seeds) for name in ("a", "b")))
        for metric in metrics
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("experiment", nargs="?", help="an experiment file with a constant PROOF")
    parser.add_argument("--a", help="one side: FILE[:ARGUMENT]")
    parser.add_argument("--b", help="the other side")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="for both sides")
    parser.add_argument("--set_a", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--set_b", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--metric", action="append", default=[], metavar="EVALUATOR/METRIC")
    parser.add_argument("--seeds", type=int, default=3, help="number of pairs")
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: runs/compare/<experiment>)")
    given = parser.parse_args(arguments)
    try:
        proof: dict[str, Any] = {} if given.experiment is None else read_proof(Path(given.experiment))
        a, b = given.a or given.experiment, given.b or proof.get("against")
        metrics = given.metric or proof.get("metrics", ())
        if not (a and b and metrics) or given.seeds < 1:
            raise UserError("Name an experiment with PROOF, or --a, --b and --metric; --seeds is 1 or more.")
        both = (*proof.get("settings", ()), *given.set)
        arms = {
            "a": Arm(a, (*both, *proof.get("set_a", ()), *given.set_a)),
            "b": Arm(b, (*both, *proof.get("set_b", ()), *given.set_b)),
        }
        runs = given.runs or ROOT / "runs" / "compare" / Path(a.partition(":")[0]).stem
        seeds = range(given.seeds)
        run_pairs(arms, seeds, runs)
        for row in collect(metrics, seeds, runs):
            print(row.text())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _spread(values: Sequence[float], sign: str = "") -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{100 * statistics.fmean(values):{sign}.1f} ± {100 * deviation:.1f} %"


if __name__ == "__main__":
    sys.exit(main())

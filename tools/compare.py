"""Scores experiments over several seeds: one alone, or two against each other at the same seeds.

    python tools/compare.py experiments/quickstart.py
    python tools/compare.py experiments/contrastive/slip.py
    python tools/compare.py --a=experiments/quickstart.py --b=experiments/quickstart.py \\
        --set_b objectives.clip.loss=vlpjax.objectives.contrastive:Sigmoid --metric=style/text_to_image/recall@1

The first form, or ``--a`` without ``--b``, prints mean and standard deviation of every score of one experiment.  In the
second the experiment file says in a constant ``PROOF`` what it is to be compared with, by which metrics and with which
settings.  ``--set`` changes both sides, ``--set_a`` and ``--set_b`` one of them.  The seed of a run is that of
parameters, data order and augmentation, the same on both sides.  What will be trained, and for how many steps, is said
before it begins; ``--dry_run`` stops there.

A run that is finished is not trained again, one that was cut off continues, and one that was finished with other
evaluators is evaluated anew, so the command is safe to repeat.  Scores are those of the last evaluation;
``EVALUATOR/METRIC`` names one.  Those for which an evaluation knows a chance level are shares, and printed as percent.
"""

from __future__ import annotations

import argparse
import ast
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works from a checkout that is not installed

from vlpjax.config import apply_overrides, build, complete, differences, load, suggest  # noqa: E402
from vlpjax.durations import Durations  # noqa: E402
from vlpjax.errors import UserError, tells_mistakes  # noqa: E402
from vlpjax.workdir import read_config  # noqa: E402

PROOF_FIELDS = {"against": str, "metrics": tuple, "settings": tuple, "set_a": tuple, "set_b": tuple}
NEEDED = ("against", "metrics")  # of them


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Attributes:
      config: the experiment, as ``--config`` takes it.
      settings: ``path=value`` changes of its config.
    """

    config: str
    settings: tuple[str, ...] = ()

    def loaded(self) -> Any:
        """Its config, whatever the seed.

        Raises:
          UserError: no such experiment, or a setting that it does not take.
        """
        for setting in self.settings:
            if "=" not in setting:
                raise UserError(f"The setting {setting!r} has no value; write {setting}=VALUE.")
        return apply_overrides(load(self.config), [item.partition("=")[::2] for item in self.settings])

    def command(self, workdir: Path, seed: int, mode: str = "train") -> list[str]:
        """The command of the run with this seed."""
        changed = [f"--config.{setting}" for setting in self.settings]
        seeds = [f"--config.seed={seed}", f"--config.data.train.seed={seed}"]
        return [
            sys.executable, "-m", "vlpjax.main", f"--config={self.config}", f"--workdir={workdir}", f"--mode={mode}",
            *changed, *seeds,
        ]  # fmt: skip

    def __str__(self) -> str:
        return " ".join((self.config, *self.settings))


@dataclass(frozen=True)
class Row:
    """One metric over all seeds.

    Attributes:
      metric: ``EVALUATOR/METRIC``.
      scores: per arm, a score per seed.
      is_share: whether scores lie between 0 and 1, and are printed as percent.
    """

    metric: str
    scores: tuple[tuple[float, ...], ...]
    is_share: bool

    def text(self) -> str:
        """Mean and standard deviation over seeds, of both sides and of their differences if there are two."""
        spreads = " against ".join(spread(values, "%" if self.is_share else "") for values in self.scores)
        if len(self.scores) == 1:
            return f"{self.metric}: {spreads}"
        gains = [a - b for a, b in zip(*self.scores, strict=True)]
        return (
            f"{self.metric}: {spreads}; difference {spread(gains, 'points' if self.is_share else '', '+')}; higher in "
            f"{sum(gain > 0 for gain in gains)} of {len(gains)} seeds"
        )


def spread(values: Sequence[float], unit: str = "", sign: str = "") -> str:
    """``mean ± standard deviation``; one value alone has no deviation.

    Args:
      unit: if there is one, values are shares and are multiplied by 100.
      sign: of the mean, as in a format string.
    """
    factor, digits = (100, ".1f") if unit else (1, ".4g")
    text = f"{factor * statistics.fmean(values):{sign}{digits}}"
    if len(values) > 1:
        text += f" ± {factor * statistics.stdev(values):{digits if unit else '.2g'}}"
    return f"{text} {unit}".rstrip()


def read_proof(path: Path) -> dict[str, Any]:
    """The constant ``PROOF`` of an experiment file, read without running it; empty if there is none.

    Raises:
      UserError: no such file, or a ``PROOF`` that is no ``dict(...)`` of the right plain values.
    """
    if not path.is_file():
        raise UserError(f"There is no experiment file {str(path)!r}.")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PROOF":
            return _checked_proof(node.value, path)
    return {}


def _checked_proof(value: ast.expr, path: Path) -> dict[str, Any]:
    """The fields of a proof."""
    if not (isinstance(value, ast.Call) and ast.unparse(value.func) == "dict" and not value.args):
        raise UserError(
            f"PROOF of {path} is {ast.unparse(value)}; write it as dict(against=..., metrics=...)."
        )
    try:
        proof = {str(word.arg): ast.literal_eval(word.value) for word in value.keywords}
    except ValueError as error:
        raise UserError(f"PROOF of {path} is read without running the file; write plain values.") from error
    for name in NEEDED:
        if name not in proof:
            raise UserError(f"PROOF of {path} lacks {name!r}.")
    for name, field in proof.items():
        if name not in PROOF_FIELDS:
            raise UserError(f"PROOF of {path} has {name!r}; it takes {', '.join(PROOF_FIELDS)}.")
        if not isinstance(field, PROOF_FIELDS[name]):
            raise UserError(
                f"PROOF of {path} has {name}={field!r}, which should be a {PROOF_FIELDS[name].__name__}."
            )
    return proof


def total_steps(config: Any) -> int:
    """The length of a run."""
    pipeline = build(config.data.train)
    return Durations(pipeline.batch_size, pipeline.num_examples).steps(config.duration, "config.duration")


def is_finished(workdir: Path, steps: int) -> bool:
    """Whether a run has been trained to its end."""
    return (workdir / "checkpoints" / str(steps)).is_dir()


def make_runs(arms: Mapping[str, Arm], seeds: Sequence[int], runs: Path, dry_run: bool = False) -> None:
    """Says what there is to train, and makes all runs, those of a seed one after the other.

    Raises:
      UserError: a wrong setting, before anything runs, or a run that fails.
    """
    configs = {name: arm.loaded() for name, arm in arms.items()}
    steps = {name: total_steps(config) for name, config in configs.items()}
    for name, arm in arms.items():
        left = [seed for seed in seeds if not is_finished(runs / f"{name}-{seed}", steps[name])]
        print(f"{name}: {arm}")
        print(
            f"  {steps[name]:,} steps for each of {len(seeds)} seeds, of which {len(left)} are not finished"
        )
    print(f"runs are in {runs}", flush=True)
    if dry_run:
        return
    for seed in seeds:
        for name, arm in arms.items():
            workdir = runs / f"{name}-{seed}"
            print(f"{name}, seed {seed}", flush=True)
            if is_finished(workdir, steps[name]) and differences(
                complete(configs[name]).evaluators, read_config(workdir).evaluators
            ):
                _run(arm.command(workdir, seed, "eval"), workdir)
            _run(arm.command(workdir, seed), workdir)


def _run(command: Sequence[str], workdir: Path) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"The run in {workdir} failed: {last}")


def evaluation(workdir: Path, name: str) -> dict[str, Any]:
    """What a run's evaluator found last.

    Raises:
      UserError: there is no such evaluation, or it failed.
    """
    path = workdir / "evaluations" / f"{name}.json"
    if not path.is_file():
        known = sorted(file.stem for file in path.parent.glob("*.json"))
        raise UserError(f"{workdir} has no evaluation {name!r}; it has {', '.join(known) or 'none'}.")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if "error" in found:
        raise UserError(f"The evaluation {name!r} of {workdir} failed: {found['error']}")
    return found


def collect(metrics: Sequence[str], arms: Sequence[str], seeds: Sequence[int], runs: Path) -> list[Row]:
    """The scores of finished runs; of all metrics if none is named."""
    if not metrics:
        folder = runs / f"{arms[0]}-{seeds[0]}"
        names = sorted(path.stem for path in (folder / "evaluations").glob("*.json"))
        metrics = [f"{name}/{metric}" for name in names for metric in evaluation(folder, name)["metrics"]]
    rows = []
    for full in metrics:
        name, _, metric = full.partition("/")
        found = [[evaluation(runs / f"{arm}-{seed}", name) for seed in seeds] for arm in arms]
        known = set.intersection(*(set(one["metrics"]) for arm in found for one in arm))
        if metric not in known:
            raise UserError(f"The evaluation {name!r} has no metric {metric!r}{suggest(metric, known)}.")
        scores = tuple(tuple(float(one["metrics"][metric]) for one in arm) for arm in found)
        rows.append(Row(full, scores, metric in found[0][0]["chance"]))
    return rows


@tells_mistakes
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "experiment", nargs="?", help="FILE[:ARGUMENT], compared as its PROOF says if it has one"
    )
    parser.add_argument("--a", help="instead: one side, whatever its PROOF says")
    parser.add_argument("--b", help="the other side")
    parser.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="for both sides")
    parser.add_argument("--set_a", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--set_b", action="append", default=[], metavar="PATH=VALUE")
    parser.add_argument("--metric", action="append", default=[], metavar="EVALUATOR/METRIC")
    parser.add_argument("--seeds", default="0,1,2", help="numbers with commas between them (default: 0,1,2)")
    parser.add_argument("--runs", type=Path, help="folder of the runs (default: runs/compare/<experiment>)")
    parser.add_argument("--dry_run", action="store_true", help="only say what would be trained")
    given = parser.parse_args(arguments)
    arms, metrics = _sides(given)
    seeds = _seeds(given.seeds)
    experiment = Path(next(iter(arms.values())).config).name.replace(".py:", "-").removesuffix(".py")
    runs = (given.runs or ROOT / "runs" / "compare" / experiment).resolve()
    make_runs(arms, seeds, runs, given.dry_run)
    for row in [] if given.dry_run else collect(metrics, list(arms), seeds, runs):
        print(row.text())
    return 0


def _sides(given: argparse.Namespace) -> tuple[dict[str, Arm], Sequence[str]]:
    """The arms by name, and the metrics that they are scored by."""
    if (given.experiment is None) == (given.a is None):
        raise UserError("Name one experiment, or one side with --a and the other one with --b.")
    proof = {} if given.experiment is None else read_proof(Path(given.experiment.partition(":")[0]))
    a, b = given.a or given.experiment, given.b or proof.get("against")
    metrics = given.metric or proof.get("metrics", ())
    both = (*proof.get("settings", ()), *given.set)
    first = Arm(a, (*both, *proof.get("set_a", ()), *given.set_a))
    if b is None:
        if given.set_b:
            raise UserError("--set_b changes the other side, which --b names.")
        return {"alone": first}, metrics
    return {"a": first, "b": Arm(b, (*both, *proof.get("set_b", ()), *given.set_b))}, metrics


def _seeds(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise UserError(
            f"--seeds is {text!r}; give different numbers with commas between them, such as 0,1,2."
        )
    return [int(part) for part in parts]


if __name__ == "__main__":
    sys.exit(main())

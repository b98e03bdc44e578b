"""Scoring experiments over seeds: what is run, what is read, and what is said."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import pytest

from tests.tiny import STEPS
from tools import compare
from tools.compare import Row
from vlpjax import main
from vlpjax.errors import UserError

TINY = "from tests.tiny import run_config\n\n\ndef get_config(size='small'):\n    return run_config()\n"


def evaluated(runs: Path, name: str, seed: int, **metrics: float) -> None:
    """What a run leaves behind of an evaluation; recall is a share."""
    folder = runs / f"{name}-{seed}" / "evaluations"
    folder.mkdir(parents=True, exist_ok=True)
    chance = {name: 0.1 for name in metrics if name.startswith("recall")}
    (folder / "style.json").write_text(json.dumps({"metrics": metrics, "chance": chance}))


@pytest.fixture
def experiment(tmp_path: Path) -> str:
    """A file of twelve steps."""
    (tmp_path / "tiny.py").write_text(TINY)
    return str(tmp_path / "tiny.py")


class Programs:
    """Stands for ``subprocess.run``: every command leaves its seed and mode as scores of the evaluation ``style``."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.commands: list[Sequence[str]] = []
        monkeypatch.setattr(compare.subprocess, "run", self.run)

    def run(self, command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
        del options
        self.commands.append(command)
        workdir = Path(next(word for word in command if word.startswith("--workdir=")).partition("=")[2])
        name, seed = workdir.name.split("-")
        evaluated(workdir.parent, name, int(seed), **{"recall@1": int(seed) / 4}, rank=float(seed))
        return subprocess.CompletedProcess(command, 0, "", "")


def test_rows_hold_the_paired_differences(tmp_path: Path) -> None:
    for seed, (a, b) in enumerate([(0.3, 0.2), (0.5, 0.45), (0.2, 0.3)]):
        evaluated(tmp_path, "a", seed, **{"recall@1": a})
        evaluated(tmp_path, "b", seed, **{"recall@1": b})
    (row,) = compare.collect(["style/recall@1"], ["a", "b"], range(3), tmp_path)
    # means 0.3333 and 0.3167, differences 0.1, 0.05 and -0.1; deviations over n - 1
    assert row.text() == (
        "style/recall@1: 33.3 ± 15.3 % against 31.7 ± 12.6 %; difference +1.7 ± 10.4 points; higher in 2 of 3 seeds"
    )


def test_only_shares_are_percent_and_one_seed_has_no_deviation() -> None:
    assert Row("x/rank", ((12.0, 15.5),), False).text() == "x/rank: 13.75 ± 2.5"
    assert Row("x/rank", ((12.0,), (10.0,)), False).text() == (
        "x/rank: 12 against 10; difference +2; higher in 1 of 1 seeds"
    )
    assert Row("x/top1", ((0.125,),), True).text() == "x/top1: 12.5 %"


def test_one_experiment_alone_is_scored_by_all_that_it_evaluates(
    experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = Programs(monkeypatch)
    assert compare.main([experiment, "--seeds=1,3", f"--runs={tmp_path}"]) == 0
    assert [word for command in programs.commands for word in command if ".seed=" in word] == [
        "--config.seed=1", "--config.data.train.seed=1", "--config.seed=3", "--config.data.train.seed=3",
    ]  # fmt: skip
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "style/recall@1: 50.0 ± 35.4 %",
        "style/rank: 2 ± 1.4",
    ]


def test_both_sides_of_a_pair_have_the_same_seed_and_only_their_own_settings(
    experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = Programs(monkeypatch)
    sides = [f"--a={experiment}:small", f"--b={experiment}", "--metric=style/recall@1", "--seeds=0,1"]
    changes = ["--set=duration=3 steps", "--set_b=accumulate=2"]
    assert compare.main([*sides, *changes, f"--runs={tmp_path}"]) == 0
    assert len(programs.commands) == 4
    for place, command in enumerate(programs.commands):
        assert f"--config.seed={place // 2}" in command
        assert f"--config.data.train.seed={place // 2}" in command
        assert "--config.duration=3 steps" in command
        assert ("--config.accumulate=2" in command) == bool(place % 2)


def test_what_is_going_to_be_trained_is_said_before(
    experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    programs = Programs(monkeypatch)
    (tmp_path / "b-1" / "checkpoints" / "3").mkdir(parents=True)
    sides = [f"--a={experiment}", f"--b={experiment}", "--set_b=duration=3 steps", f"--runs={tmp_path}"]
    assert compare.main([*sides, "--dry_run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"a: {experiment}",
        f"  {STEPS} steps for each of 3 seeds, of which 3 are not finished",
        f"b: {experiment} duration=3 steps",
        "  3 steps for each of 3 seeds, of which 2 are not finished",
        f"runs are in {tmp_path}",
    ]
    assert not programs.commands


def test_a_finished_run_is_evaluated_anew_by_other_evaluators_and_is_not_trained_again(
    experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    modes: list[str] = []

    def run(command: Sequence[str], workdir: Path) -> None:
        """In this process, which has compiled the step before."""
        assert f"--workdir={workdir}" in command
        modes.append(next(word for word in command if word.startswith("--mode=")))
        cache = f"--compilation_cache={jax.config.jax_compilation_cache_dir or ''}"
        assert main.main([cache, *command[3:]]) == 0

    monkeypatch.setattr(compare, "_run", run)
    alone = [experiment, "--seeds=0", f"--runs={tmp_path}"]
    assert compare.main(alone) == 0
    written = (tmp_path / "alone-0" / "metrics.jsonl").read_text()
    assert "style/image_to_text/recall@3" not in capsys.readouterr().out
    for _ in range(2):
        assert compare.main([*alone, "--set=evaluators.style.ks=(3,)"]) == 0
        assert "style/image_to_text/recall@3" in capsys.readouterr().out
    assert modes == ["--mode=train", "--mode=eval", "--mode=train", "--mode=train"]
    assert (tmp_path / "alone-0" / "metrics.jsonl").read_text() == written


def test_the_proof_of_an_experiment_is_read_without_running_it(tmp_path: Path) -> None:
    path = tmp_path / "slip.py"
    path.write_text(
        'raise SystemExit\nPROOF = dict(against="clip.py", metrics=("knn/top1",), settings=("seed=1",))\n'
    )
    assert compare.read_proof(path) == {
        "against": "clip.py",
        "metrics": ("knn/top1",),
        "settings": ("seed=1",),
    }
    path.write_text("SIZES = ()\n")
    assert compare.read_proof(path) == {}


@pytest.mark.parametrize(
    ("proof", "message"),
    [
        ('dict(against="clip.py")', "lacks 'metrics'"),
        ('dict(against="clip.py", metrics=(), steps=3)', "has 'steps'"),
        ('dict(against="clip.py", metrics="knn/top1")', "metrics='knn/top1', which should be a tuple"),
        ('dict(against="clip.py", metrics=METRICS)', "write plain values"),
        ('["clip.py"]', r"write it as dict\("),
        ('{"against": "clip.py", "metrics": ()}', r"write it as dict\("),
    ],
)
def test_a_proof_that_is_none_is_said(proof: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "slip.py"
    path.write_text(f"PROOF = {proof}\n")
    with pytest.raises(UserError, match=message):
        compare.read_proof(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name one experiment, or one side"),
        (["missing.py"], "no experiment file 'missing.py'"),
        (["--a=missing.py"], "no experiment file 'missing.py'"),
        (["experiments/quickstart.py", "--set_b=seed=1"], "--b names"),
        (["experiments/quickstart.py", "--seeds=0,x"], "--seeds is '0,x'"),
        (["experiments/quickstart.py", "--seeds=1,1"], "different numbers"),
        (["experiments/quickstart.py", "--set=seed"], "'seed' has no value"),
        (["experiments/quickstart.py", "--set=sede=1"], "did you mean 'seed'"),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_fails_and_a_score_that_is_not_there_are_said(
    experiment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        compare.subprocess,
        "run",
        lambda command, **_: subprocess.CompletedProcess(command, 2, "", "first\nerror: no room\n"),
    )
    assert compare.main([experiment, f"--runs={tmp_path}"]) == 2
    assert capsys.readouterr().err.endswith("alone-0 failed: error: no room\n")
    evaluated(tmp_path, "a", 0, **{"recall@1": 0.5})
    with pytest.raises(UserError, match="no evaluation 'knn'; it has style"):
        compare.collect(["knn/top1"], ["a"], [0], tmp_path)
    with pytest.raises(UserError, match="no metric 'recall@9'; did you mean 'recall@1'"):
        compare.collect(["style/recall@9"], ["a"], [0], tmp_path)
    path = tmp_path / "a-0" / "evaluations" / "style.json"
    path.write_text(json.dumps({"metrics": {"failed": 1.0}, "chance": {}, "error": "KeyError: 'x'"}))
    with pytest.raises(UserError, match="failed: KeyError"):
        compare.collect(["style/recall@1"], ["a"], [0], tmp_path)

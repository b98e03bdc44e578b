"""Comparing two experiments over seeds: what is run, what is read, and what is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tools import compare
from vlpjax.errors import UserError


def finished(runs: Path, name: str, seed: int, value: float) -> None:
    folder = runs / f"{name}-{seed}" / "evaluations"
    folder.mkdir(parents=True)
    (folder / "style.json").write_text(json.dumps({"metrics": {"recall@1": value}}))


def test_rows_hold_the_paired_differences(tmp_path):
    for seed, (a, b) in enumerate([(0.3, 0.2), (0.5, 0.45), (0.2, 0.3)]):
        finished(tmp_path, "a", seed, a)
        finished(tmp_path, "b", seed, b)
    (row,) = compare.collect(["style/recall@1"], range(3), tmp_path)
    assert row.differences == pytest.approx((0.1, 0.05, -0.1))
    # means 0.3333 and 0.3167; deviations over n - 1
    assert row.text() == (
        "style/recall@1: 33.3 ± 15.3 % against 31.7 ± 12.6 %; difference +1.7 ± 10.4 %; higher in 2 of 3 seeds"
    )


def test_both_sides_of_a_pair_have_the_same_seed_and_only_their_own_settings(monkeypatch, tmp_path):
    commands = []

    def run(command, **options):
        commands.append(command)
        workdir = Path(next(word for word in command if word.startswith("--workdir=")).partition("=")[2])
        name, seed = workdir.name.split("-")
        finished(workdir.parent, name, int(seed), 0.5)
        return compare.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(compare.subprocess, "run", run)
    sides = ["--a=x.py:small", "--b=y.py", "--metric=style/recall@1", "--seeds=2", f"--runs={tmp_path}"]
    assert compare.main([*sides, "--set=duration=3 steps", "--set_b=accumulate=2"]) == 0
    assert len(commands) == 4
    for place, command in enumerate(commands):
        assert f"--config.seed={place // 2}" in command
        assert f"--config.data.train.seed={place // 2}" in command
        assert "--config.duration=3 steps" in command
        assert ("--config.accumulate=2" in command) == bool(place % 2)


def test_the_proof_of_an_experiment_is_read_without_running_it(tmp_path):
    path = tmp_path / "slip.py"
    path.write_text(
        'raise SystemExit\nPROOF = dict(against="clip.py", metrics=("knn/top1",), settings=("seed=1",))\n'
    )
    assert compare.read_proof(path) == {
        "against": "clip.py",
        "metrics": ("knn/top1",),
        "settings": ("seed=1",),
    }
    path.write_text('PROOF = dict(against="clip.py")\n')
    with pytest.raises(UserError, match="lacks 'metrics'"):
        compare.read_proof(path)
    path.write_text('PROOF = dict(against="clip.py", metrics=(), steps=3)\n')
    with pytest.raises(UserError, match="has 'steps'"):
        compare.read_proof(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Name an experiment with PROOF"),
        (["missing.py"], "no experiment file 'missing.py'"),
        (["experiments/quickstart.py"], "has no constant PROOF"),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(arguments, message, capsys):
    assert compare.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_fails_and_a_score_that_is_not_there_are_said(tmp_path):
    with pytest.raises(UserError, match="no experiment file 'nowhere.py'"):
        compare.run_pairs({"a": compare.Arm("nowhere.py")}, [0], tmp_path)
    finished(tmp_path, "a", 0, 0.5)
    with pytest.raises(UserError, match="no evaluation 'knn'; it has style"):
        compare.score(tmp_path / "a-0", "knn/top1")
    with pytest.raises(UserError, match=r"no metric 'recall@9'; it has recall@1"):
        compare.score(tmp_path / "a-0", "style/recall@9")

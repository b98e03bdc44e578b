"""A run that is killed and run again ends as if nothing had happened, on any mesh and any number of processes."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.tiny import ROOT, assert_trees_equal, command, run_command, run_config
from vlpjax import main, trainer
from vlpjax.checkpoint import Checkpoints, load_params
from vlpjax.data.feed import Feed
from vlpjax.observe.clock import Clock
from vlpjax.observe.metrics import read_jsonl
from vlpjax.run import Run
from vlpjax.workdir import claim

CONFIG = f"--config={ROOT / 'tests' / 'experiments_tiny.py'}"
LIMIT = 240.0  # seconds that anything here may take


def run_here(*arguments: str) -> int:
    """The program in this process, with this process's cache of compiled programs."""
    return main.main([f"--compilation_cache={jax.config.jax_compilation_cache_dir or ''}", *arguments])


@dataclass(frozen=True)
class Watched:
    """A run and what it did, in order.

    Attributes:
      workdir: of the run.
      events: ``("draw" | "evaluate" | "save", step)``.
      records: per saved step, what was saved beside the state, and the clock's pauses at that time.
    """

    workdir: Path
    events: list[tuple[str, int]] = field(default_factory=list)
    records: dict[int, tuple[dict[str, Any], dict[str, float]]] = field(default_factory=dict)

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        """Notes what the trainer calls from here on."""
        start, evaluate, save = Clock.start, trainer.evaluate, Checkpoints.save
        clocks: list[Clock] = []

        def started(clock: Clock) -> None:
            clocks.append(clock)
            start(clock)

        class Drawn(Feed):
            def __next__(feed) -> Any:
                found = super().__next__()
                self.events.append(("draw", found[0] + 1))
                return found

        def evaluated(run: Any, evaluators: Any, names: Any, state: Any, step: int, *rest: Any) -> Any:
            self.events.append(("evaluate", step))
            return evaluate(run, evaluators, names, state, step, *rest)

        def saved(checkpoints: Checkpoints, step: int, state: Any, record: dict[str, Any]) -> None:
            assert int(state.step) == step
            self.events.append(("save", step))
            self.records[step] = record, clocks[-1].pauses
            save(checkpoints, step, state, record)

        patch.setattr(Clock, "start", started)
        patch.setattr(trainer, "feed", Drawn)
        patch.setattr(trainer, "evaluate", evaluated)
        patch.setattr(Checkpoints, "save", saved)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """An undisturbed run on eight devices."""
    watched = Watched(tmp_path_factory.mktemp("finished") / "run")
    with pytest.MonkeyPatch.context() as patch:
        watched.watch(patch)
        assert run_here(CONFIG, f"--workdir={watched.workdir}") == 0
    return watched


@pytest.fixture(scope="module")
def finished(watched: Watched) -> Path:
    """Its work directory."""
    return watched.workdir


def kill_when(workdir: Path, moment: Callable[[], bool], **environment: str) -> None:
    """Starts or continues the run in ``workdir``, and kills it at ``moment``."""
    line, options = command(CONFIG, f"--workdir={workdir}", devices=8, **environment)
    process = subprocess.Popen(line, **options)
    begin = time.monotonic()
    while not moment():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - begin < LIMIT
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def kill_while_it_writes(workdir: Path, step: int, part: str) -> None:
    """Kills the run two steps after ``step``, whose checkpoint is still without one of its parts."""
    saved = workdir / "checkpoints"

    def moment() -> bool:
        return any(saved.glob(f"{step}.*/{part}.*")) and last_step(workdir) >= step + 2

    kill_when(workdir, moment, TINY_HOLD=f"{step}:{part}")
    assert any(saved.glob(f"{step}.*/{part}.*"))
    assert not (saved / str(step)).exists()


def last_step(workdir: Path) -> int:
    lines = read_jsonl(workdir / "metrics.jsonl")
    return lines[-1]["step"] if lines else 0


def test_a_run_writes_a_line_per_step_and_per_evaluation(finished: Path) -> None:
    lines = read_jsonl(finished / "metrics.jsonl")
    assert [line["step"] for line in lines if "train/loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval/style/image_to_text/recall@1" in line] == [6, 12]
    assert [line["step"] for line in lines if "eval/zeroshot/top1" in line] == [12]
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert lines[0]["train/loss"] > lines[11]["train/loss"]
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["12", "8"]
    assert (finished / "report.html").stat().st_size > 1000


def test_a_batch_is_drawn_after_the_step_before_it_was_evaluated_and_saved(watched: Watched) -> None:
    expected = []
    for step in range(1, 13):
        expected += (
            [("draw", step)] + [("evaluate", step)] * (step % 6 == 0) + [("save", step)] * (step % 4 == 0)
        )
    assert watched.events == expected


def test_a_checkpoint_records_the_data_that_comes_next_and_the_clock_as_it_stands(watched: Watched) -> None:
    pipeline = Run.from_config(run_config()).pipeline
    before = 0.0
    for step, (record, pauses) in watched.records.items():
        assert record["data"] == pipeline.data_state(step)
        assert record["clock"]["training_seconds"] > before  # training went on
        before = record["clock"]["training_seconds"]
        # Evaluation came first and is in it.
        assert record["clock"]["pauses"].get("evaluate", 0.0) == pauses.get("evaluate", 0.0)
        assert ("evaluate" in record["clock"]["pauses"]) == (step >= 6)


def test_a_run_that_goes_on_goes_on_with_its_clock(watched: Watched) -> None:
    checkpoints, clock, run = (
        Checkpoints(watched.workdir, read_only=True),
        Clock(),
        Run.from_config(run_config()),
    )
    _, start = trainer.restore_or_initialize(run, checkpoints, clock)
    checkpoints.close()
    assert start == 12
    stored = watched.records[12][0]["clock"]
    assert clock.training_seconds == pytest.approx(stored["training_seconds"])
    assert clock.pauses["evaluate"] == pytest.approx(stored["pauses"]["evaluate"])


def test_a_run_killed_at_four_moments_ends_with_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    kill_while_it_writes(workdir, 4, "record")  # the first checkpoint: nothing is there to continue from
    kill_when(workdir, lambda: (workdir / "checkpoints" / "4").exists())  # right after a save
    kill_while_it_writes(workdir, 8, "state")  # the one before is complete
    kill_when(workdir, lambda: last_step(workdir) >= 10)  # between saves
    assert not (workdir / "checkpoints" / "12").exists()
    done = run_command(CONFIG, f"--workdir={workdir}", devices=8)
    assert done.returncode == 0, done.stderr
    assert (workdir / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert_trees_equal(load_params(str(workdir)), load_params(str(finished)))
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["12", "8"]
    for name in ("style", "zeroshot"):
        ours, theirs = (
            json.loads((path / "evaluations" / f"{name}.json").read_text()) for path in (workdir, finished)
        )
        assert ours == theirs


def test_a_complete_run_says_so_and_changes_nothing(
    finished: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    metrics, params = (finished / "metrics.jsonl").read_bytes(), load_params(str(finished))
    assert run_here(CONFIG, f"--workdir={finished}") == 0
    assert "is complete (12 steps)" in "".join(capfd.readouterr())
    assert (finished / "metrics.jsonl").read_bytes() == metrics
    assert_trees_equal(load_params(str(finished)), params)


def test_a_checkpoint_continues_on_another_mesh(finished: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "checkpoints" / "12")  # so the newest is step 8
    done = run_command(
        CONFIG, f"--workdir={workdir}", "--config.mesh.replica=2", "--config.mesh.fsdp=1", devices=2
    )
    assert done.returncode == 0, done.stderr
    assert "continuing after step 8 of 12" in done.stdout + done.stderr
    assert_same_values(workdir, finished)
    assert (workdir / "metrics.jsonl").read_bytes() != (finished / "metrics.jsonl").read_bytes()


def assert_same_values(ours: Path, theirs: Path) -> None:
    """All metrics of two runs agree to five digits, except norms, which add up what rounding leaves."""
    left, right = (read_jsonl(path / "metrics.jsonl") for path in (ours, theirs))
    assert [list(line) for line in left] == [list(line) for line in right]
    for mine, other in zip(left, right, strict=True):
        for name, value in mine.items():
            tolerance = 1e-3 if name.endswith("_norm") else 1e-5
            np.testing.assert_allclose(
                value, other[name], rtol=tolerance, err_msg=f"{name} at step {mine['step']}"
            )


def two_processes(workdir: Path) -> list[tuple[int, str]]:
    """Runs the program in two processes with two devices each; returns how each ended and what it said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for index in range(2):
        line, options = command(
            CONFIG,
            f"--workdir={workdir}",
            f"--coordinator=127.0.0.1:{port}",
            "--num_processes=2",
            f"--process_id={index}",
            devices=2,
        )
        processes.append(subprocess.Popen(line, **options))
    try:
        told = ["".join(process.communicate(timeout=LIMIT)) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, told, strict=True)]


def test_two_processes_train_and_evaluate_as_one(finished: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    for code, told in two_processes(workdir):
        assert code == 0, told
    assert_same_values(workdir, finished)
    assert json.loads((workdir / "environment.json").read_text())["mesh"]["fsdp"] == 4
    evaluation: dict[str, Any] = json.loads((workdir / "evaluations" / "style.json").read_text())
    assert evaluation["step"] == 12
    assert evaluation["examples"]


def test_two_processes_end_together_when_the_first_cannot_have_the_directory(tmp_path: Path) -> None:
    with claim(tmp_path / "run", run_config()):
        ended = two_processes(tmp_path / "run")
    for code, told in ended:
        assert code == 2, told
        assert f"error: Another process is training in {tmp_path / 'run'};" in told
        assert "Traceback" not in told
    assert "said by process 0 of 2" in ended[1][1]


def test_an_evaluator_that_fails_is_a_metric_and_the_run_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from tests.tiny import Failing
    from vlpjax import config as configs
    from vlpjax.config import spec

    config = run_config()
    config.evaluators = dict(broken=spec(Failing, every="6 steps"))
    monkeypatch.setattr(configs, "load", lambda _: config)
    assert run_here(CONFIG, f"--workdir={tmp_path / 'run'}") == 0
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [(line["step"], line["eval/broken/failed"]) for line in lines if "eval/broken/failed" in line] == [
        (6, 1),
        (12, 1),
    ]
    theirs = [line for line in read_jsonl(finished / "metrics.jsonl") if "train/loss" in line]
    assert [line for line in lines if "train/loss" in line] == theirs
    assert "nothing to see" in "".join(capfd.readouterr())


def test_evaluating_a_finished_run_finds_what_the_run_found(finished: Path) -> None:
    path = finished / "evaluations" / "style.json"
    before = json.loads(path.read_text())
    path.unlink()
    assert run_here(CONFIG, f"--workdir={finished}", "--mode=eval") == 0
    assert json.loads(path.read_text())["metrics"] == pytest.approx(before["metrics"], rel=1e-6)

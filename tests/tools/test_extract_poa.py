"""Cutting a small network out of a run: it computes what the shared weights did, and can be started from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta

from tools import extract_poa
from vlpjax.checkpoint import Checkpoints, load_variables
from vlpjax.config import Config, spec, to_json
from vlpjax.experiment import build_modules
from vlpjax.models.elastic import ElasticViT, Size
from vlpjax.models.vit import ViT
from vlpjax.state import TrainState
from vlpjax.workdir import read_config

TOWER: dict[str, Any] = dict(image_size=8, patch=4, width=16, depth=3, heads=4, mlp_ratio=2.0, pre_norm=False)
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A work directory with an elastic tower, and the parameters of the tower's teacher."""
    workdir = tmp_path_factory.mktemp("runs") / "poa"
    first = meta.unbox(jax.jit(ElasticViT(ViT(**TOWER)).init)(jax.random.key(0), IMAGES)["params"])
    teacher = jax.tree.map(lambda x: x + 0.1, first)
    towers = dict(image=spec(ElasticViT, tower=spec(ViT, **TOWER)), other=spec(ViT, **TOWER))
    workdir.mkdir()
    (workdir / "config.json").write_text(to_json(Config(towers=towers, objectives={})))
    state = TrainState(
        step=jnp.int32(7), params={"image": first, "other": first}, optimizer={},
        teachers={"ema": {"image": teacher}}, objectives={}, statistics={},
    )  # fmt: skip
    checkpoints = Checkpoints(workdir)
    checkpoints.save(7, state, {})
    checkpoints.wait()
    checkpoints.close()
    return workdir, teacher


def cut(workdir: Path, out: Path, *more: str) -> int:
    return extract_poa.main([f"--workdir={workdir}", f"--out={out}", "--width=8", "--depth=2", *more])


def test_what_is_written_is_a_vit_that_computes_what_the_teachers_sub_network_does(
    run: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir, teacher = run
    assert cut(workdir, tmp_path / "small") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'small'}: image of width 8 and depth 2\n"
    modules, _ = build_modules(read_config(tmp_path / "small"), "float32")
    small, variables = modules["image"], load_variables(str(tmp_path / "small"))
    assert isinstance(small, ViT) and set(variables["params"]) == {"image"}
    ours = jax.jit(small.apply)({"params": variables["params"]["image"]}, IMAGES)["tokens"]
    elastic = ElasticViT(ViT(**TOWER))
    shared = jax.jit(lambda: elastic.apply({"params": teacher}, IMAGES, size=Size(8, 2)))()["tokens"]
    np.testing.assert_allclose(ours, shared[..., :8], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_cut_is_told_and_leaves_nothing(
    run: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workdir, _ = run
    for argument, message in (
        ("--width=6", "widths are multiples of 4"),
        ("--depth=4", "depth 4 cannot be cut out"),
        ("--tower=other", "has no elastic tower 'other' (known: image)"),
        ("--params=slow", "no parameters of 'slow'; there are 'student', 'ema'"),
    ):
        assert cut(workdir, tmp_path / "small", argument) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "small").exists()

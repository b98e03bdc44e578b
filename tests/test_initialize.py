"""``config.initialize``: named towers of a new run start from files, and their teachers with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests import tiny
from vlpjax.checkpoint import Checkpoints
from vlpjax.config import Config, spec
from vlpjax.errors import UserError
from vlpjax.models.locked import Locked
from vlpjax.models.text import TextTransformer
from vlpjax.observe.clock import Clock
from vlpjax.run import Run
from vlpjax.step import make_train_step
from vlpjax.teachers import Teacher
from vlpjax.trainer import restore_or_initialize
from vlpjax.weights import save_pretrained
from vlpjax.weights.families import family_named
from vlpjax.weights.family import initial_variables
from vlpjax.weights.starting import Pretrained

FIELDS: dict[str, Any] = dict(
    vocabulary=4096, length=16, width=8, depth=1, heads=2, mlp_dim=12, causal=False, mask_padding=True, order="post",
    types=2, embedding_norm=True, final_norm=False, epsilon=1e-12,
)  # fmt: skip


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder with a small BERT, and its parameters."""
    model = TextTransformer(**FIELDS, pool="cls", pooler=True)
    variables = initial_variables(family_named("bert"), model, seed=3)
    folder = tmp_path_factory.mktemp("weights") / "bert"
    save_pretrained(model, variables, folder)
    return folder, variables["params"]


def config_of(folder: Path) -> Config:
    config = tiny.run_config()
    config.towers.text = spec(Locked, tower=spec(TextTransformer, **FIELDS, pool="mean"), embedding=16)
    config.initialize = dict(text=spec(Pretrained, path=str(folder)))
    config.teachers = dict(first=spec(Teacher))
    config.optimizer.rate_rules = ((r"text/tower/.*", None), (r".*", 1.0))
    return config


def assert_tower(found: Any, theirs: Any) -> None:
    for name, tree in found.items():
        jax.tree.map(np.testing.assert_array_equal, tree, theirs[name])


def test_a_run_starts_from_the_file_and_leaves_a_locked_tower_as_it_is(bert, tmp_path: Path) -> None:
    run = Run.from_config(config_of(bert[0]))
    state, step = restore_or_initialize(run, Checkpoints(str(tmp_path)), Clock())
    assert step == 0
    assert_tower(state.params["text"]["tower"], bert[1])
    assert_tower(state.teachers["first"]["text"]["tower"], bert[1])
    sharding = run.layout.sharding("batch")
    train_step = make_train_step(run.experiment, run.layout, run.abstract[1], sharding)
    before = tiny.on_host(state.params["text"]["projection"])
    state, _ = train_step(state, jax.device_put(run.pipeline.batch(0), sharding))
    assert_tower(state.params["text"]["tower"], bert[1])
    assert np.all(before["kernel"]["kernel"] != state.params["text"]["projection"]["kernel"]["kernel"])


def test_a_tower_that_there_is_not_is_told(bert, tmp_path: Path) -> None:
    config = config_of(bert[0])
    config.initialize = dict(txt=spec(Pretrained, path=str(bert[0])))
    with pytest.raises(UserError, match="config.initialize names the tower 'txt'; did you mean 'text'"):
        restore_or_initialize(Run.from_config(config), Checkpoints(str(tmp_path)), Clock())


def test_a_folder_that_there_is_not_is_told(bert, tmp_path: Path) -> None:
    config = config_of(tmp_path / "nowhere")
    with pytest.raises(UserError, match="There is no folder or file .*nowhere"):
        restore_or_initialize(Run.from_config(config), Checkpoints(str(tmp_path)), Clock())

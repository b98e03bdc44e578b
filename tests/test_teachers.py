"""Teachers follow the student as their formula says, several at a time, whatever unit their age is given in."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import assert_trees_close, assert_trees_equal, layout_of, model_config, take_steps
from vlpjax.config import spec
from vlpjax.durations import Durations
from vlpjax.errors import UserError
from vlpjax.teachers import EMA, Teacher

RUN = Durations(batch_size=16, examples_per_epoch=64, total_steps=100)


def test_several_teachers_follow_one_student_each_in_its_own_way() -> None:
    config = model_config()
    config.teachers = dict(
        still=spec(EMA, decay=1.0),
        newest=spec(EMA, decay=0.0),
        half=spec(EMA, decay=0.5, towers=("image",)),
        frozen=spec(Teacher, towers=("text",)),
    )
    before, after = take_steps(config, layout_of(1), steps=1).history
    assert_trees_equal(after.teachers["still"], before.params)
    assert_trees_equal(after.teachers["newest"], after.params)
    assert_trees_equal(after.teachers["frozen"]["text"], before.params["text"])
    middle = {"image": (before.params["image"], after.params["image"])}
    expected = {name: _mean(*pair) for name, pair in middle.items()}
    assert_trees_close(after.teachers["half"], expected, rtol=1e-6, atol=1e-8)


def _mean(old: Any, new: Any) -> Any:
    return jax.tree.map(lambda x, y: (x + y) / 2, old, new)


def test_parameters_that_stand_still_stay_in_the_teacher_bit_by_bit() -> None:
    x = {"image": np.random.default_rng(0).normal(size=1000).astype(np.float32)}
    for decay in (0.3, 0.9, 0.99937):
        assert_trees_equal(EMA(decay=decay).update(x, x, jnp.float32(0.3), RUN), x)


@pytest.mark.parametrize(
    ("half_life", "batch_size", "decay"),
    [("160 examples", 16, 0.5 ** (1 / 10)), ("160 examples", 32, 0.5 ** (1 / 5)), ("8 examples", 16, 0.25),
     ("2 epochs", 16, 0.5 ** (1 / 8)), ("20%", 16, 0.5 ** (1 / 20)), ("1 step", 16, 0.5)],
)  # fmt: skip
def test_a_half_life_is_the_time_after_which_half_is_replaced(
    half_life: str, batch_size: int, decay: float
) -> None:
    old, new = {"image": np.float32(1.0)}, {"image": np.float32(0.0)}
    durations = Durations(batch_size, 64, 100)
    mixed = EMA(half_life=half_life).update(old, new, jnp.float32(0.5), durations)
    np.testing.assert_allclose(mixed["image"], decay, rtol=1e-6)


def test_the_decay_rises_along_half_a_cosine() -> None:
    old, new = {"image": np.float32(1.0)}, {"image": np.float32(0.0)}
    for progress in (0.0, 0.25, 0.5, 1.0):
        decay = 1 - (1 - 0.9) * (np.cos(np.pi * progress) + 1) / 2
        mixed = EMA(decay=0.9, final_decay=1.0).update(old, new, jnp.float32(progress), RUN)
        np.testing.assert_allclose(mixed["image"], decay, rtol=1e-6)


def test_a_half_life_and_a_decay_are_one_too_many() -> None:
    with pytest.raises(UserError, match=r"half_life is '1 epoch'.*leave decay"):
        EMA(decay=0.9, half_life="1 epoch")

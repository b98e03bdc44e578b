"""All modules of an experiment under one roof, each under its name."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.heads import Scalar
from vlpjax.models.towers import Towers


class Doubled(nn.Module):
    """Says by its output whether it was told to train."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        return nn.Dense(2, name="map")(x) * (2.0 if train else 1.0)


TOWERS = Towers.of({"first": Doubled(), "second": nn.Dense(3), "third_scale": Scalar(0.5)})
X = np.ones((2, 4), np.float32)


def call_all(towers: Towers) -> list[jax.Array]:
    return [towers.call("first", X), towers.call("second", X), towers.call("third_scale")]


@pytest.fixture(scope="module")
def variables() -> object:
    return TOWERS.init(jax.random.key(0), method=call_all)


def test_parameters_live_under_the_names_of_the_towers(variables: dict) -> None:
    assert set(variables["params"]) == {"first", "second", "third_scale"}
    assert float(nn.meta.unbox(variables)["params"]["third_scale"]["value"]) == 0.5


def test_only_towers_that_ask_are_told_whether_they_train(variables: dict) -> None:
    train = TOWERS.apply(variables, method=lambda towers: towers.call("first", X, train=True))
    evaluate = TOWERS.apply(variables, method=lambda towers: towers.call("first", X))
    np.testing.assert_allclose(train, 2 * evaluate)
    plain = TOWERS.apply(variables, method=lambda towers: towers.call("second", X, train=True))
    assert plain.shape == (2, 3)


def test_a_tower_that_is_called_twice_has_one_set_of_parameters() -> None:
    towers = Towers.of({"only": nn.Dense(3)})
    variables = towers.init(
        jax.random.key(0), method=lambda towers: towers.call("only", X) + towers.call("only", 2 * X)
    )
    assert jnp.shape(variables["params"]["only"]["kernel"]) == (4, 3)


def test_names_are_listed_and_unknown_ones_told() -> None:
    assert list(TOWERS) == ["first", "second", "third_scale"]
    assert "second" in TOWERS
    assert "fourth" not in TOWERS
    with pytest.raises(UserError, match=r"no tower 'secnd'; did you mean 'second'"):
        TOWERS["secnd"]


@pytest.mark.parametrize("name", ["my tower", "name", "apply", "makers", "setup", "call"])
def test_a_name_that_cannot_be_an_attribute_is_told(name: str) -> None:
    with pytest.raises(UserError, match=f"{name!r} cannot name a tower"):
        Towers.of({name: nn.Dense(3)})

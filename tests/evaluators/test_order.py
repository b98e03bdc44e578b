"""Multiple choice against NumPy: wins over all wrong captions, means over groups, ties that do not count."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from tests.tiny import experiment_of, layout_of, model_config, rows_of, unit
from vlpjax.config import spec
from vlpjax.data.pipeline import Pipeline
from vlpjax.errors import UserError
from vlpjax.evaluators.base import Result
from vlpjax.evaluators.order import MultipleChoice
from vlpjax.models.heads import Scalar

COUNT, E = 37, 4
RNG = np.random.default_rng(0)
FIELDS = {
    name: RNG.normal(size=(COUNT, E)).astype(np.float32) for name in ("image", "right", "wrong1", "wrong2")
}
FIELDS["wrong2"][:3] = FIELDS["right"][:3]  # ties
GROUPS = ["left of"] * 20 + ["right of"] * 14 + ["under"] * 3


class Seen(nn.Module):
    """Passes its input on."""

    @nn.compact
    def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
        return {"embedding": x * Scalar(1.0, name="scale")()}


def evaluate(devices: int, **fields: Any) -> Result:
    rows = rows_of(**{name: list(x) for name, x in FIELDS.items()}, relation=GROUPS)
    data = Pipeline(rows, {}, batch_size=8, shuffle=False, repeat=False)
    config = model_config()
    config.towers = dict(image=spec(Seen), text=spec(Seen))
    evaluator = MultipleChoice(data=data, choices=("right", "wrong1", "wrong2"), **fields)
    variables = {"params": {name: {"scale": {"value": np.float32(1)}} for name in ("image", "text")}}
    return evaluator.make(experiment_of(config), layout_of(devices))(variables)


def hits() -> np.ndarray:
    z = {name: unit(x) for name, x in FIELDS.items()}
    scores = {name: np.sum(z["image"] * z[name], axis=1) for name in ("right", "wrong1", "wrong2")}
    found = scores["right"] > np.maximum(scores["wrong1"], scores["wrong2"])
    found[:3] = False
    return found


@pytest.mark.parametrize("devices", [1, 8])
def test_accuracy_and_macro_accuracy(devices: int) -> None:
    result = evaluate(devices, group="relation", least=5)
    assert result.metrics["accuracy"] == pytest.approx(np.mean(hits()))
    expected = np.mean([np.mean(hits()[:20]), np.mean(hits()[20:34])])
    assert result.metrics["macro_accuracy"] == pytest.approx(expected)
    assert result.chance == {"accuracy": pytest.approx(1 / 3), "macro_accuracy": pytest.approx(1 / 3)}


def test_what_cannot_be_chosen_from_is_refused() -> None:
    with pytest.raises(UserError, match="two or more"):
        MultipleChoice(choices=("text",))
    with pytest.raises(UserError, match="group is 'realtion'; did you mean 'relation'"):
        evaluate(1, group="realtion")
    with pytest.raises(UserError, match="no relation reaches"):
        evaluate(1, group="relation", least=21)
    with pytest.raises(UserError, match="data is not set"):
        MultipleChoice().make(experiment_of(model_config()), layout_of(1))

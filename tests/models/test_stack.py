"""What the backward pass of a stack finds saved: by policy, by name, on the device or on the host."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlpjax.errors import UserError
from vlpjax.models.decoder import Decoder
from vlpjax.models.stack import NAMED, REMAT, remat_policy

DEPTH, B, T, WIDTH, HIDDEN = 3, 2, 5, 8, 12
DECODER = Decoder(16, width=WIDTH, depth=DEPTH, heads=2, mlp_dim=HIDDEN, scan=True)
IDS = np.arange(B * T).reshape(B, T)
PARAMS = jax.eval_shape(lambda: DECODER.init(jax.random.key(0), jnp.asarray(IDS)))


def saved(remat: str) -> Counter[tuple[int, ...]]:
    """How many arrays of each shape the backward pass is given, one entry per layer first."""

    def backward(params: Any) -> Any:
        tower = DECODER.clone(remat=remat)
        return jax.vjp(lambda params: tower.apply(params, IDS)["tokens"], params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(backward, PARAMS))
    return Counter(leaf.shape for leaf in leaves if leaf.shape[:1] == (DEPTH,))


PROJECTED, ENTERED, BETWEEN = (DEPTH, B, T, 2, 4), (DEPTH, B, T, HIDDEN), (DEPTH, B, T, WIDTH)


def test_names_are_saved_beside_the_blocks_inputs() -> None:
    full = saved("full")
    assert full[PROJECTED] == full[ENTERED] == 0 and full[BETWEEN] == 1
    assert saved("save:query,key") - full == Counter({PROJECTED: 2})
    assert saved("save:mlp_up") - full == Counter({ENTERED: 1})
    assert saved("save:residual") - full == Counter({BETWEEN: 1})
    assert saved("tensors") - full == Counter({PROJECTED: 3, ENTERED: 2, BETWEEN: 1})


def test_names_can_wait_on_the_host() -> None:
    text = str(
        jax.make_jaxpr(
            jax.grad(
                lambda params: jnp.sum(DECODER.clone(remat="offload:mlp_up").apply(params, IDS)["tokens"])
            )
        )(PARAMS)
    )
    assert "pinned_host" in text or "Host" in text


@pytest.mark.parametrize("remat", [*REMAT, "save:kernel,value", "save:query;offload:key"])
def test_every_policy_is_known(remat: str) -> None:
    assert remat == "none" or callable(remat_policy(remat))


@pytest.mark.parametrize(
    ("remat", "parts"),
    [
        ("some", ["'some'", "'full'", "'save:'"]),
        ("keep:query", ["'keep:query'", "'offload:'"]),
        ("save:queries", ["'queries'", *NAMED]),
    ],
)
def test_what_is_no_policy_is_told(remat: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        remat_policy(remat)
    assert all(part in str(caught.value) for part in parts), caught.value

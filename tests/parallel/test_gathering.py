"""Gathering of parameters: the stages that a torus takes, and what a step compiled for devices moves."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.tiny import layout_of
from vlpjax.mesh import _shortest_side_last
from vlpjax.parallel.gathering import _ring, gathered, rings, stages


class Chip:
    """Stands for a TPU of an absent machine: all that is asked of it is its place."""

    def __init__(self, coords: tuple[int, ...]) -> None:
        self.coords = coords


def chips(*sides: int) -> list[Any]:
    return [Chip(place) for place in np.ndindex(*sides)]


def test_neighbours_in_a_line_are_neighbours_along_the_shortest_side() -> None:
    line = _shortest_side_last(chips(4, 2, 8))
    assert [chip.coords for chip in line[:4]] == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]
    assert _ring(line) == 2
    flat = _shortest_side_last(chips(4, 8, 1))
    assert [chip.coords[0] for chip in flat[:5]] == [0, 1, 2, 3, 0]


def test_two_dimensions_are_gathered_at_once_and_three_in_two_stages() -> None:
    assert _ring(np.array(chips(4, 8, 1), dtype=object)) is None
    assert _ring(np.array(jax.devices())) is None
    assert _ring(_shortest_side_last(chips(4, 4, 8))) == 4


@pytest.mark.parametrize(
    ("sizes", "names", "groups"),
    [
        ({"fsdp": 8}, ("fsdp_outer", "fsdp_ring"), (("fsdp_outer",), ("fsdp_ring",))),
        ({"fsdp": 4, "ring": 2}, ("fsdp", "ring"), (("fsdp",), ("ring",))),
        ({"fsdp": 2, "ring": 4}, ("ring_outer", "ring_ring"), (("fsdp", "ring_outer"), ("ring_ring",))),
    ],
    ids=str,
)
def test_a_stage_ends_where_the_ring_does(
    monkeypatch: pytest.MonkeyPatch, sizes: dict[str, int], names: tuple[str, ...], groups: Any
) -> None:
    # Meshes are of real devices only, which have no torus here.
    monkeypatch.setattr("vlpjax.parallel.gathering._ring", lambda line: 2)
    rings.cache_clear()
    mesh, found = rings(layout_of(8, **sizes).mesh, tuple(sizes))
    rings.cache_clear()
    assert found == groups
    assert set(names) <= set(mesh.axis_names)
    assert mesh.devices.ravel().tolist() == jax.devices()[:8]


def test_the_first_stage_is_along_fsdp_and_the_second_over_the_sequence_ranks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vlpjax.parallel.gathering._ring", lambda line: 2)
    rings.cache_clear()
    found = stages(layout_of(8, fsdp=2, ring=2, ulysses=2), ("embed", "mlp"))
    rings.cache_clear()
    assert [place.spec[0] for place in found] == [("ring", "ulysses", "fsdp"), ("ring", "ulysses"), None]


def staged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlpjax.parallel.gathering._ring", lambda line: 2 if len(line) == 8 else None)
    rings.cache_clear()


@pytest.mark.parametrize("axes", [("embed", "mlp"), ("mlp", "embed")], ids=str)
@pytest.mark.parametrize("two", [False, True])
def test_value_and_gradient_are_those_of_the_plain_product(
    monkeypatch: pytest.MonkeyPatch, axes: tuple[str, ...], two: bool
) -> None:
    if two:
        staged(monkeypatch)
    layout = layout_of(8)
    random = np.random.default_rng(0)
    tokens = random.normal(size=(16, 8)).astype(np.float32)
    kernel = random.normal(size=(8, 16) if axes[0] == "embed" else (16, 8)).astype(np.float32)

    def loss(kernel: jax.Array, tokens: jax.Array, use: Any) -> jax.Array:
        whole = use(kernel)
        return jnp.sum(jnp.square(tokens @ (whole if axes[0] == "embed" else whole.T)))

    expected = jax.value_and_grad(loss)(kernel, tokens, lambda x: x)
    lies = layout.sharding(*axes)
    assert len(stages(layout, axes)) == (3 if two else 2)
    with layout.activate():
        step = jax.jit(
            jax.value_and_grad(lambda kernel, tokens: loss(kernel, tokens, lambda x: gathered(x, axes))),
            in_shardings=(lies, layout.sharding("batch")),
            out_shardings=(layout.replicated, lies),
        )
        found = step(kernel, tokens)
    rings.cache_clear()
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-5, atol=1e-5)


def test_kernels_are_gathered_in_the_type_that_they_are_used_in() -> None:
    layout = layout_of(8)
    tokens = jax.ShapeDtypeStruct((16, 8), jnp.bfloat16, sharding=layout.sharding("batch"))
    kernel = jax.ShapeDtypeStruct((8, 24), jnp.float32, sharding=layout.sharding("embed", "mlp"))
    with layout.activate():
        lowered = jax.jit(lambda x, w: x @ gathered(w.astype(x.dtype), ("embed", "mlp"))).lower(
            tokens, kernel
        )
    text = lowered.as_text()
    constraint = re.findall(r"sharding_constraint.*tensor<8x24x(\w+)>", text)
    assert constraint and set(constraint) == {"bf16"}


def test_nothing_happens_outside_a_layout_or_without_an_embedding_axis() -> None:
    kernel = np.arange(15.0).reshape(3, 5)
    np.testing.assert_array_equal(gathered(jnp.asarray(kernel), ("embed", "mlp")), kernel)
    with layout_of(8).activate():
        np.testing.assert_array_equal(gathered(jnp.asarray(kernel), ("position", "mlp")), kernel)


def test_a_layout_of_tensor_ranks_keeps_their_pieces() -> None:
    layout = layout_of(8, fsdp=4, tensor=2)
    assert [place.spec for place in stages(layout, ("embed", "mlp"))] == [
        PartitionSpec(("fsdp",), ("tensor",)),
        PartitionSpec(None, ("tensor",)),
    ]

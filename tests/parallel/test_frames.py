"""Visual tokens find their placeholders over sequence ranks: values and gradients are those on one device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlpjax.errors import UserError
from vlpjax.mesh import make_layout
from vlpjax.models.vision_language import insert_images
from vlpjax.parallel.frames import place_tokens
from vlpjax.parallel.order import TokenOrder
from vlpjax.parallel.sequence import lay_out, sequence_ranks
from vlpjax.planning.hlo import COLLECTIVES, read_program

B, T, K, D = 4, 64, 48, 8
MESHES: list[tuple[dict[str, int], str, int]] = [
    ({"ring": 8}, "block_striped", 4),
    ({"ring": 8}, "contiguous", 4),
    ({"fsdp": 2, "ring": 2, "ulysses": 2}, "block_striped", 2),
    ({"fsdp": 2, "ulysses": 4}, "zigzag", 4),
    ({"replica": 2, "ring": 2, "tensor": 2}, "block_striped", 8),
]
RANDOM = np.random.default_rng(0)
EMBEDDINGS = RANDOM.normal(size=(B, T, D)).astype(np.float32)
VISUAL = RANDOM.normal(size=(B, K, D)).astype(np.float32)
WEIGHTS = RANDOM.normal(size=(B, T, D)).astype(np.float32)


def marked(*rows: Any) -> np.ndarray:
    """Which tokens are placeholders: those of these numbers."""
    marks = np.zeros((B, T), bool)
    for row, places in enumerate(rows):
        marks[row, places] = True
    return marks


ROWS = {
    # Anywhere; none at all; all of them in one run; as many as there are tokens, among words.
    "mixed": marked(RANDOM.permutation(T)[:30], [], slice(9, 9 + K), np.sort(RANDOM.permutation(T)[:K])),
    # All in a single row of the batch; the others have no frames.
    "one row": marked([], [], slice(0, K), []),
}


def expected(marks: np.ndarray, count: int = K) -> np.ndarray:
    """A loop over rows."""
    rows = EMBEDDINGS.copy()
    for row in range(B):
        places = np.flatnonzero(marks[row])
        rows[row, places[:count]] = VISUAL[row, : min(len(places), count)]
        rows[row, places[count:]] = np.nan
    return rows


def expected_gradient(marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of sum(WEIGHTS * rows), by embeddings and by visual tokens."""
    by_visual = np.zeros_like(VISUAL)
    for row in range(B):
        places = np.flatnonzero(marks[row])
        by_visual[row, : len(places)] = WEIGHTS[row, places]
    return WEIGHTS * ~marks[..., None], by_visual


def on_mesh(sizes: dict[str, int], kind: str, tile: int, marks: np.ndarray, count: int = K) -> Any:
    """Rows in their own order, and the gradients, of what is placed on a mesh."""
    layout = make_layout(sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])
    order = TokenOrder(kind, sequence_ranks(layout), tile)

    def run(embeddings: jax.Array, visual: jax.Array) -> tuple[jax.Array, jax.Array]:
        with layout.activate():
            (placed,) = lay_out(order, jnp.asarray(marks))
            rows = insert_images(order.permute(embeddings, 1), placed, visual, order=order, count=count)
        rows = order.unpermute(rows, 1)
        return jnp.sum(rows * WEIGHTS), rows

    places = layout.sharding("batch"), layout.sharding("batch", "sequence")
    step = jax.jit(jax.value_and_grad(run, argnums=(0, 1), has_aux=True), in_shardings=places)
    (_, rows), gradients = step(EMBEDDINGS, VISUAL)
    return np.asarray(rows), gradients


@pytest.mark.parametrize("marks", list(ROWS))
@pytest.mark.parametrize(("sizes", "kind", "tile"), MESHES, ids=str)
def test_every_placeholder_gets_its_token_and_gives_back_its_gradient(
    sizes: dict[str, int], kind: str, tile: int, marks: str
) -> None:
    rows, gradients = on_mesh(sizes, kind, tile, ROWS[marks])
    np.testing.assert_array_equal(rows, expected(ROWS[marks]))
    for ours, theirs in zip(gradients, expected_gradient(ROWS[marks]), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_one_device_does_the_same() -> None:
    # In the row's own order, and in another that no mesh asks for.
    order, marks = TokenOrder("zigzag", 4), ROWS["mixed"]
    own = insert_images(EMBEDDINGS, marks, VISUAL)
    np.testing.assert_array_equal(own, expected(marks))
    placed = insert_images(
        order.permute(EMBEDDINGS, 1), order.permute(marks, 1), jnp.asarray(VISUAL), order=order
    )
    np.testing.assert_array_equal(order.unpermute(placed, 1), own)


def test_a_placeholder_without_a_token_becomes_nan_and_no_other() -> None:
    marks = marked(slice(0, 50), slice(0, 40), [3], [])
    rows, gradients = on_mesh({"fsdp": 2, "ring": 2, "ulysses": 2}, "block_striped", 4, marks, count=40)
    np.testing.assert_array_equal(rows, expected(marks, 40))
    assert np.isnan(rows).any(axis=2).sum() == 10
    by_visual = np.zeros_like(VISUAL)
    for row, size in enumerate((40, 40)):
        by_visual[row, :size] = WEIGHTS[row, :size]
    by_visual[2, 0] = WEIGHTS[2, 3]
    np.testing.assert_array_equal(gradients[1], by_visual)


def test_rows_may_be_full_of_placeholders_wherever_frames_lie() -> None:
    # Neither exchange has a size that such a row could overflow, though a tile's tokens come from one rank.
    marks = marked(slice(0, K), slice(16, T), [], [])
    rows, _ = on_mesh({"ring": 8}, "block_striped", 8, marks)
    np.testing.assert_array_equal(rows, expected(marks))


def test_each_token_moves_twice_and_nothing_is_gathered_but_how_many_each_tile_asks_for() -> None:
    length, width, tile, ranks = 4096, 64, 64, 8
    layout = make_layout({"ring": 4, "ulysses": 2})
    order = TokenOrder("block_striped", ranks, tile)

    def run(visual: jax.Array, marks: jax.Array) -> jax.Array:
        with layout.activate():
            return jnp.sum(jnp.square(place_tokens(visual, marks, order)))

    lies = layout.sharding("batch", "sequence")
    shapes = jax.ShapeDtypeStruct((1, length, width), jnp.float32), jax.ShapeDtypeStruct((1, length), bool)
    step = jax.jit(
        jax.value_and_grad(run), in_shardings=(lies, lies), out_shardings=(layout.replicated, lies)
    )
    program = read_program(step.lower(*shapes).compile().as_text())
    moved: dict[str, list[int]] = {}
    for computation in program.computations.values():
        for item in computation.instructions.values():
            if item.opcode in COLLECTIVES:
                moved.setdefault(item.opcode, []).append(item.bytes)
    own = length // ranks * width * 4
    assert moved["all-to-all"] == [own] * 4  # two forward, two backward
    assert max(moved["all-gather"]) == length // tile * 4
    assert max(moved["all-reduce"]) == 4  # the loss
    assert len(moved) == 3


def test_an_order_of_other_ranks_is_refused() -> None:
    with (
        make_layout({"fsdp": 2, "ring": 4}).activate(),
        pytest.raises(UserError, match="is for 8 sequence ranks"),
    ):
        place_tokens(jnp.asarray(VISUAL), jnp.asarray(ROWS["mixed"]), TokenOrder("contiguous", 8))
    with (
        make_layout({"ring": 8}).activate(),
        pytest.raises(UserError, match="nearest sizes that work are 40 or 48"),
    ):
        place_tokens(jnp.asarray(VISUAL[:, :44]), jnp.asarray(ROWS["mixed"]), TokenOrder("contiguous", 8))

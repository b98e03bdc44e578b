"""The chunked vocabulary loss against the plain one: value, gradient, and what it never holds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlpjax.errors import UserError
from vlpjax.models.decoder import Decoder
from vlpjax.models.vocabulary_loss import vocabulary_loss

B, T, D, V = 2, 11, 6, 19
RNG = np.random.default_rng(0)
TOKENS = RNG.normal(size=(B, T, D)).astype(np.float32)
KERNEL = RNG.normal(size=(D, V)).astype(np.float32)
LABELS = RNG.integers(0, V, (B, T))
WEIGHTS = RNG.choice([0.0, 1.0, 0.5], (B, T)).astype(np.float32)


def plain(tokens: Any, kernel: Any, weights: Any, z_loss: float, soft_cap: float | None) -> Any:
    logits = tokens @ kernel
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    partition = jax.nn.logsumexp(logits, axis=-1)
    nats = -jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(LABELS, V), axis=-1)
    return jnp.sum(weights * (nats + z_loss * partition**2)) / jnp.sum(weights), nats


@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
@pytest.mark.parametrize(("z_loss", "soft_cap"), [(0.0, None), (0.1, 2.0)])
def test_value_and_gradient_are_those_of_the_plain_loss(
    chunk: int, z_loss: float, soft_cap: float | None
) -> None:
    def ours(tokens: Any, kernel: Any, weights: Any) -> Any:
        return vocabulary_loss(tokens, kernel, LABELS, weights, z_loss=z_loss, soft_cap=soft_cap, chunk=chunk)

    def theirs(tokens: Any, kernel: Any, weights: Any) -> Any:
        return plain(tokens, kernel, weights, z_loss, soft_cap)

    both = jax.jit(
        lambda *x: [jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True)(*x) for f in (ours, theirs)]
    )
    ((value, each), grads), ((expected, nats), expected_grads) = both(TOKENS, KERNEL, WEIGHTS)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(each.nats, nats, rtol=1e-5, atol=1e-6)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-6)


def test_no_array_holds_the_logits_of_all_tokens() -> None:
    def sizes(jaxpr: Any) -> list[int]:
        found = [int(np.prod(var.aval.shape)) for eqn in jaxpr.eqns for var in eqn.outvars]
        for eqn in jaxpr.eqns:
            for inner in jax.tree.leaves(
                eqn.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
            ):
                if hasattr(inner, "jaxpr"):
                    found += sizes(inner.jaxpr)
                elif hasattr(inner, "eqns"):
                    found += sizes(inner)
        return found

    tokens, kernel = jnp.zeros((2, 64, 4)), jnp.zeros((4, 1000))

    def largest(chunk: int) -> int:
        labels = jnp.zeros((2, 64), jnp.int32)
        grad = jax.grad(lambda *x: vocabulary_loss(*x, labels, chunk=chunk)[0], argnums=(0, 1))
        return max(sizes(jax.make_jaxpr(grad)(tokens, kernel).jaxpr))

    assert largest(64) == 2 * 64 * 1000  # the check sees logits when they are there
    assert largest(8) == 2 * 8 * 1000


def test_labels_without_weight_may_be_anything() -> None:
    labels = np.where(WEIGHTS == 0, -100, LABELS)
    first, _ = vocabulary_loss(TOKENS, KERNEL, jnp.asarray(labels), WEIGHTS, chunk=4)
    second, _ = vocabulary_loss(TOKENS, KERNEL, LABELS, WEIGHTS, chunk=4)
    assert first == second
    nothing, _ = vocabulary_loss(TOKENS, KERNEL, LABELS, np.zeros_like(WEIGHTS))
    assert nothing == 0


def test_correct_counts_the_right_predictions() -> None:
    best = np.argmax(TOKENS @ KERNEL, axis=-1)
    labels = best.copy()
    labels[0, :3] = (labels[0, :3] + 1) % V
    _, each = vocabulary_loss(TOKENS, KERNEL, labels, chunk=4)
    np.testing.assert_array_equal(each.correct, labels == best)


def test_bfloat16_tokens_are_summed_in_float32() -> None:
    _, each = vocabulary_loss(TOKENS.astype(jnp.bfloat16), KERNEL, LABELS, chunk=4)
    exact = plain(TOKENS, KERNEL, WEIGHTS, 0.0, None)[1]
    assert each.nats.dtype == jnp.float32
    np.testing.assert_allclose(each.nats, exact, atol=0.06)


def test_gradients_of_the_kernel_are_summed_over_chunks_in_float32() -> None:
    """A thousand equal parts: in bfloat16 a sum stands still where it is 256 times as large as what is added."""
    count = 1024
    tokens = jnp.ones((1, count, 2), jnp.bfloat16)
    labels = jnp.zeros((1, count), jnp.int32)

    def total(kernel: jax.Array) -> jax.Array:
        return count * vocabulary_loss(tokens, kernel, labels, chunk=1)[0]

    found = jax.jit(jax.grad(total))(jnp.zeros((2, 4), jnp.float32))
    np.testing.assert_allclose(found, count * np.tile([-0.75, 0.25, 0.25, 0.25], (2, 1)), rtol=0.01)


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_the_loss_of_a_decoders_logits(tied: bool) -> None:
    decoder = Decoder(V, 8, 1, 2, tied=tied, final_soft_cap=3.0)
    variables = decoder.init(jax.random.key(0), LABELS)
    outputs = decoder.apply(variables, LABELS)
    without = decoder.apply(variables, LABELS, logits=False)
    kernel = decoder.apply(variables, method="output_kernel")
    assert without["logits"] is None
    _, each = vocabulary_loss(without["tokens"], kernel, LABELS, soft_cap=3.0, chunk=4)
    expected = -jnp.sum(jax.nn.log_softmax(outputs["logits"]) * jax.nn.one_hot(LABELS, V), axis=-1)
    np.testing.assert_allclose(each.nats, expected, rtol=1e-5, atol=1e-6)


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match=r"one entry per token, \(2, 11\), not \(2, 10\)"):
        vocabulary_loss(TOKENS, KERNEL, LABELS[:, 1:])
    with pytest.raises(UserError, match="at least 1 token, not 0"):
        vocabulary_loss(TOKENS, KERNEL, LABELS, chunk=0)

"""Linear probes against Newton's method, a full sweep, and the invariances that their protocols promise."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tests.evaluators.given import dataset, evaluate
from vlpjax.errors import UserError
from vlpjax.evaluators.linear_probe import SWEEP, LinearProbe, TrainedProbe, folded
from vlpjax.evaluators.probing import (
    DIRECTIONS,
    Classifier,
    Standard,
    fit_logistic,
    held_out,
    search,
    shuffled_batches,
    train_classifier,
)

RNG = np.random.default_rng(0)
CLASSES = 3
CENTERS = np.array([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]])


def clouds(count: int, seed: int, spread: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    return (CENTERS[labels] + spread * rng.normal(size=(count, 2))).astype(np.float32), labels


X, Y = clouds(60, 0)
TEST_X, TEST_Y = clouds(45, 1)
SOLVE = jax.jit(fit_logistic, static_argnames="classes")


def newton(
    x: np.ndarray, y: np.ndarray, regularization: float, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """The optimum by Newton's method in float64: kernel [E, C] and bias [C]."""
    design = np.concatenate([x.astype(np.float64), np.ones((len(x), 1))], axis=1)  # [N, E + 1]
    penalty = np.diag([regularization] * x.shape[1] + [0.0])
    theta = np.zeros((design.shape[1], classes))
    for _ in range(50):
        logits = design @ theta
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        grad = design.T @ (p - np.eye(classes)[y]) + penalty @ theta
        curvature = np.einsum("nc,cd->ncd", p, np.eye(classes)) - np.einsum("nc,nd->ncd", p, p)
        hessian = np.einsum("ne,ncd,nf->ecfd", design, curvature, design)
        hessian += np.einsum("ef,cd->ecfd", penalty, np.eye(classes))
        size = theta.size
        # Adding the same number to all biases changes nothing: the pseudo-inverse takes the shortest step.
        theta -= (np.linalg.pinv(hessian.reshape(size, size)) @ grad.reshape(size)).reshape(theta.shape)
    return theta[:-1], theta[-1]


def centered(x: Any) -> np.ndarray:
    """Without what all classes share, which no probability depends on."""
    x = np.asarray(x)
    return x - x.mean(axis=-1, keepdims=True)


@pytest.mark.parametrize("regularization", [0.1, 10.0])
def test_logistic_regression_finds_the_optimum_that_newton_finds(regularization: float) -> None:
    padded, labels = np.concatenate([X, 100 + X[:4]]), np.concatenate([Y, Y[:4]])
    weights = np.array([1.0] * len(X) + [0.0] * 4, np.float32)
    model = SOLVE(padded, labels, weights, regularization, classes=CLASSES)
    kernel, bias = newton(X, Y, regularization, CLASSES)
    np.testing.assert_allclose(centered(model.kernel), centered(kernel), atol=1e-4)
    np.testing.assert_allclose(centered(model.bias), centered(bias), atol=1e-4)


@pytest.mark.parametrize("peak", [0, 5, 16, 43, 90, 96])
def test_the_search_finds_the_peak_of_a_hill_in_few_steps(peak: int) -> None:
    tried = []

    def score(value: float) -> float:
        tried.append(value)
        return -abs(int(np.argmin(np.abs(SWEEP - value))) - peak)

    assert search(score, SWEEP) == SWEEP[peak]
    assert len(tried) == len(set(tried)) <= 7 + 2 * 4


def test_of_equal_scores_the_strongest_regularisation_wins() -> None:
    assert search(lambda value: 1.0, SWEEP) == SWEEP[-1]


def test_a_share_of_every_class_is_held_out() -> None:
    labels = np.array([0] * 10 + [1] * 5 + [2] * 2 + [3] + [0] * 2)
    real = np.arange(20) < 18
    chosen = held_out(labels, real, 0.2)
    assert [int(chosen[labels == label].sum()) for label in range(4)] == [2, 1, 1, 0]
    assert not chosen[~real].any()


@pytest.mark.parametrize("devices", [1, 8])
def test_the_probe_is_that_of_newton_with_the_regularisation_found_on_what_was_held_out(devices: int) -> None:
    result = evaluate(
        LinearProbe(train=dataset(image=X / 2, label=Y), test=dataset(image=TEST_X / 2, label=TEST_Y)),
        devices,
    )
    chosen = held_out(Y, np.ones(len(Y), bool), 0.2)

    def score(value: float) -> float:
        kernel, bias = newton(X[~chosen], Y[~chosen], value, CLASSES)
        return float(np.mean(np.argmax(X[chosen] @ kernel + bias, axis=1) == Y[chosen]))

    expected = search(score, SWEEP)
    assert result.metrics["regularization"] == pytest.approx(expected)
    kernel, bias = newton(X, Y, expected, CLASSES)
    right = np.argmax(TEST_X @ kernel + bias, axis=1) == TEST_Y
    assert result.metrics["top1"] == pytest.approx(right.mean())
    assert result.chance["top1"] == pytest.approx(1 / 3)


# --- the protocol of BatchNorm and LARS ---------------------------------------------------------------------------


def trained(x: np.ndarray, *, batch_norm: bool = True) -> np.ndarray:
    """Logits of the test features after a short training."""
    rates = np.linspace(1.0, 0.1, 30).astype(np.float32).reshape(10, 3)
    model = jax.jit(
        lambda x, y: train_classifier(
            x, y, np.arange(len(x)), rates, batch_size=20, classes=CLASSES,
            direction=DIRECTIONS["lars"](0.9, 0.0), batch_norm=batch_norm, seed=0,
        )
    )(x, Y)  # fmt: skip
    scale = x[0] / X[0]
    test = TEST_X * scale
    standard = Standard.of(x, np.ones(len(x), np.float32))
    return np.asarray(model(standard(test) if batch_norm else test))


def test_batch_norm_takes_the_scale_of_every_feature_away() -> None:
    scaled = X * np.array([100.0, 0.25], np.float32)
    np.testing.assert_allclose(trained(scaled), trained(X), rtol=1e-3, atol=1e-4)
    assert np.abs(trained(scaled, batch_norm=False) - trained(X, batch_norm=False)).max() > 0.1


def test_a_folded_classifier_says_of_raw_features_what_it_said_of_standardised_ones() -> None:
    model = Classifier(RNG.normal(size=(2, CLASSES)), RNG.normal(size=CLASSES))
    x = X * np.array([100.0, 0.25]) + np.array([50.0, -3.0])
    standard = Standard.of(x, np.ones(len(x)))
    np.testing.assert_allclose(folded(model, standard)(x), model(standard(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_trained_probe_scores_alike_however_its_features_are_shifted_and_scaled(devices: int) -> None:
    """Of 60 examples 40 are in an epoch's batches; what is tested is standardised by the statistics of all.

    LARS would not do here: its steps are as long as the kernel, so that rounding alone leads it elsewhere.
    """

    def score(x: np.ndarray, test: np.ndarray) -> dict[str, float]:
        train = dataset(image=x, label=Y, batch_size=16)  # the last batch is padded
        probe = TrainedProbe(
            train=train, test=dataset(image=test, label=TEST_Y), batch_size=40, optimizer="sgd", learning_rate=1.0,
            epochs=100, warmup_epochs=10,
        )  # fmt: skip
        return evaluate(probe, devices).metrics

    shift, scale = np.array([50.0, -3.0], np.float32), np.array([100.0, 0.25], np.float32)
    plain = score(X, TEST_X)
    assert score(X * scale + shift, TEST_X * scale + shift) == plain
    assert plain["top1"] > 0.6


@pytest.mark.parametrize(("optimizer", "devices"), [("sgd", 1), ("lars", 1), ("lars", 8)])
def test_a_trained_probe_comes_near_the_optimum(optimizer: str, devices: int) -> None:
    train, test = dataset(image=X, label=Y), dataset(image=TEST_X, label=TEST_Y)
    rate = {"lars": 300.0, "sgd": 4.0}[optimizer]
    probe = TrainedProbe(
        train=train,
        test=test,
        optimizer=optimizer,
        batch_size=20,
        learning_rate=rate,
        epochs=100,
        warmup_epochs=10,
    )
    kernel, bias = newton(X, Y, 0.1, CLASSES)
    best = np.mean(np.argmax(TEST_X @ kernel + bias, axis=1) == TEST_Y)
    assert evaluate(probe, devices).metrics["top1"] == pytest.approx(best, abs=0.07)


def test_the_rate_rises_and_falls_as_published() -> None:
    rates = TrainedProbe(epochs=90, warmup_epochs=10).rates(10, 1024)
    assert rates.shape == (90, 10)
    rates = rates.ravel()
    assert rates[0] == pytest.approx(0.4 / 100)
    assert rates[99] == pytest.approx(0.4)
    assert rates[100 + 400] == pytest.approx(0.2, rel=1e-3)
    assert rates[-1] < 1e-5


def test_every_epoch_sees_other_batches_of_the_same_examples() -> None:
    first, second = (
        np.asarray(shuffled_batches(jax.random.key(epoch), np.arange(3, 13), 4)) for epoch in (0, 1)
    )
    for order in (first, second):
        assert order.shape == (2, 4)
        assert len(set(order.ravel().tolist())) == 8 and set(order.ravel().tolist()) <= set(range(3, 13))
    assert first.tolist() != second.tolist()


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: evaluate(LinearProbe()), ["LinearProbe", "'train' and 'test'"]),
        (lambda: LinearProbe(held_out=0.0), ["0.0", "between 0 and 1"]),
        (
            lambda: evaluate(
                LinearProbe(train=dataset(image=X[:3], label=Y[:3]), test=dataset(image=X[:3], label=Y[:3]))
            ),
            ["no class has two", "regularization"],
        ),
        (lambda: TrainedProbe(optimizer="adam"), ["'adam'", "lars, sgd"]),
        (lambda: TrainedProbe(epochs=5), ["epochs=5", "warmup_epochs=10"]),
    ],
    ids=range(5),
)
def test_what_does_not_work_is_told(make: Any, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert all(part in str(caught.value) for part in parts), caught.value

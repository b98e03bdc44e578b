"""What an objective sees of a step: towers' outputs that are shared, several views at once, schedules, mistakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.objectives.rig import experiment_of, run_config, views
from vlpjax.config import TYPE, Config, spec
from vlpjax.durations import Durations
from vlpjax.errors import UserError
from vlpjax.models.towers import Towers
from vlpjax.objectives.base import Context, fold_name, normalize
from vlpjax.objectives.byol import BYOL
from vlpjax.objectives.ibot import IBOT
from vlpjax.objectives.look import LOOK
from vlpjax.objectives.moco import MoCoV2, MoCoV3
from vlpjax.objectives.ntxent import NTXent
from vlpjax.objectives.swav import SwAV
from vlpjax.objectives.vicreg import VICReg
from vlpjax.step import gradients, initial_state
from vlpjax.teachers import EMA

B = 3
RNG = np.random.default_rng(0)
VIEWS = {name: RNG.normal(size=(B, 4, 4, 3)).astype(np.float32) for name in ("one", "two", "three")}
SMALL = RNG.normal(size=(B, 2, 2, 3)).astype(np.float32)


class Tower(nn.Module):
    """Per pixel a projection, and their mean; ``shift`` is added, ``scale`` multiplied."""

    @nn.compact
    def __call__(
        self, images: jax.Array, *, shift: jax.Array | None = None, scale: float = 1.0, train: bool = False
    ) -> dict[str, jax.Array]:
        tokens = scale * nn.Dense(5)(images.reshape(images.shape[0], -1, 3)) + (2.0 if train else 0.0)
        tokens = tokens if shift is None else tokens + shift[:, None]
        return {"tokens": tokens, "embedding": tokens.mean(axis=1)}


TOWERS = Towers.of({"image": Tower(), "obj_head": nn.Dense(2)})
PARAMS = {
    "image": {"Dense_0": {"kernel": RNG.normal(size=(3, 5)), "bias": RNG.normal(size=5)}},
    "obj_head": {"kernel": RNG.normal(size=(5, 2)), "bias": np.zeros(2)},
}
OTHER = jax.tree.map(lambda leaf: 2 * leaf + 1, PARAMS)


def within(function: Callable[[Context], Any], params: Any = PARAMS, **fields: Any) -> Any:
    """The result of a function of a context with a student, the teacher ``slow`` and the views."""
    teachers = {"slow": TOWERS.bind({"params": OTHER})}

    def run(towers: Towers) -> Any:
        given = dict(batch={**VIEWS, "small": SMALL}, teachers=teachers, objective="obj") | fields
        return function(Context(towers, given.pop("batch"), jax.random.key(0), jnp.int32(0), **given))

    return TOWERS.apply({"params": params}, method=run)


@pytest.mark.parametrize("teacher", [None, "slow"])
def test_views_in_one_pass_are_what_they_are_alone(teacher: str | None) -> None:
    names = ("two", "three", "one")
    together = within(lambda context: context.encode_views("image", names, teacher=teacher))
    alone = [within(lambda c, name=name: c.encode("image", name, teacher=teacher)) for name in names]
    assert together["tokens"].shape == (B, 3, 16, 5) and together["embedding"].shape == (B, 3, 5)
    for output in ("tokens", "embedding"):
        expected = np.stack([found[output] for found in alone], axis=1)
        np.testing.assert_allclose(together[output], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray])
def test_options_of_views_are_arrays_per_view_or_the_same_for_all(kind: Callable[[Any], Any]) -> None:
    shift = kind(RNG.normal(size=(B, 2, 5)).astype(np.float32))
    found = within(
        lambda context: context.encode_views("image", ("one", "two"), variant="moved", shift=shift, scale=3.0)
    )
    for view, name in enumerate(("one", "two")):
        alone = within(
            lambda c, name=name, view=view: c.encode(
                "image", name, variant="x", shift=shift[:, view], scale=3.0
            )
        )
        np.testing.assert_allclose(found["tokens"][:, view], alone["tokens"], rtol=1e-5, atol=1e-6)


def test_passes_are_shared_by_tower_field_teacher_and_variant_and_by_nothing_else() -> None:
    def run(context: Context) -> None:
        other = context.of("other")
        first = context.encode("image", "one")
        assert other.encode("image", "one") is first
        moved = context.encode("image", "one", variant="moved", scale=2.0)
        assert other.encode("image", "one", variant="moved", scale=2.0) is moved
        context.encode_views("image", ("one", "two")), other.encode_views("image", ("one", "two"))
        context.encode_views("image", ("two", "one"))
        context.encode("image", "one", teacher="slow")
        assert len(context.outputs) == 5
        assert np.abs(moved["tokens"] - first["tokens"]).max() > 0.1

    within(run)


def test_a_teacher_has_its_own_parameters_runs_without_training_and_gets_no_gradient() -> None:
    def loss(params: Any) -> jax.Array:
        def run(context: Context) -> jax.Array:
            features = context.encode("image", "one", teacher="slow")["embedding"]
            both = context.encode_views("image", ("one", "two"), teacher="slow")["embedding"]
            return jnp.sum(context.head("head", features, teacher="slow")) + jnp.sum(both)

        return within(run, params)

    gradient = jax.grad(loss)(jax.tree.map(jnp.asarray, PARAMS))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))
    found = within(lambda context: context.encode("image", "one", teacher="slow")["tokens"])
    kernel = OTHER["image"]["Dense_0"]
    expected = VIEWS["one"].reshape(B, -1, 3) @ kernel["kernel"] + kernel["bias"]  # without training's 2
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


class Normed(nn.Module):
    """Pixels under BatchNorm; in training a third of them is dropped."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        pixels = nn.BatchNorm(use_running_average=not train, name="norm")(images)
        return {"tokens": pixels, "dropped": nn.Dropout(1 / 3, deterministic=not train)(pixels)}


@pytest.mark.parametrize("train", [True, False])
def test_a_teacher_with_batch_norm_takes_the_statistics_of_its_batch_in_training(train: bool) -> None:
    towers = Towers.of({"image": Normed()})
    params = {"image": {"norm": {"scale": np.full(3, 2.0), "bias": np.full(3, 1.0)}}}
    students = {"image": {"norm": {"mean": np.full(3, 5.0), "var": np.full(3, 9.0)}}}
    variables = {"params": params, "batch_stats": students}
    teacher = towers.bind(variables, rngs={"dropout": jax.random.key(1)}, mutable=["batch_stats"])

    def run(towers: Towers) -> Any:
        context = Context(
            towers, VIEWS, jax.random.key(0), jnp.int32(0), teachers={"slow": teacher}, train=train
        )
        return context.encode("image", "one", teacher="slow")

    found, updated = towers.apply(variables, method=run, mutable=["batch_stats"])
    pixels = VIEWS["one"].reshape(-1, 3)
    mean, deviation = (pixels.mean(axis=0), pixels.std(axis=0)) if train else (5.0, 3.0)
    expected = 2 * (VIEWS["one"] - mean) / deviation + 1
    np.testing.assert_allclose(found["tokens"], expected, rtol=1e-4, atol=1e-4)
    assert bool(jnp.any(found["dropped"] == 0)) == train
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], students)  # it leaves none


OBJECTIVES = (
    spec(NTXent, projector=(8, 4)),
    spec(VICReg, projector=(8, 4)),
    spec(BYOL, projector=(8, 4), predictor=(8, 4)),
    spec(MoCoV2, queue=16, projector=(8, 4)),
    spec(MoCoV3, projector=(8, 4), predictor=(8, 4)),
    spec(LOOK, queue=16, projector=(8, 4), neighbours=3),
    spec(SwAV, global_views=("view1", "view2"), queue=16, projector=(8, 4), prototypes=6),
    spec(IBOT, global_views=("view1", "view2"), prototypes=6, hidden=(8,), bottleneck=4, koleo=0.1),
)


@pytest.mark.parametrize("loss", OBJECTIVES, ids=lambda loss: loss[TYPE].rpartition(":")[2])
def test_heads_compute_in_the_type_of_the_run_and_what_they_are_compared_by_is_float32(loss: Config) -> None:
    config = run_config(loss, dict(ema=spec(EMA)))
    config.precision = "bfloat16"
    experiment, batch = experiment_of(config), views()
    heads = [make() for name, make in experiment.towers.makers.items() if name != "image"]
    assert heads and all(head.dtype == "bfloat16" for head in heads)
    state = jax.eval_shape(lambda: initial_state(experiment, batch))
    losses, _, grads = jax.eval_shape(lambda state: gradients(experiment, state, batch), state)
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves((losses, grads))}
    assert kinds <= {"float32", "int32"}, kinds


def test_draws_per_row_are_a_function_of_the_name_and_the_row() -> None:
    base = jax.random.key(7)

    def keys(name: str = "mask", **fields: Any) -> np.ndarray:
        return np.asarray(jax.random.key_data(within(lambda context: context.row_keys(name, 4), **fields)))

    whole = keys(row_rng=base)
    expected = [jax.random.fold_in(fold_name(base, "obj/mask"), row) for row in range(4)]
    np.testing.assert_array_equal(whole, jax.random.key_data(jnp.stack(expected)))
    part = keys(row_rng=base, rows=jnp.array([3, 1, 0, 2]))
    np.testing.assert_array_equal(part, whole[[3, 1, 0, 2]])
    assert len({tuple(key) for key in [*whole, *keys("crop", row_rng=base)]}) == 8
    assert np.any(keys() != whole)  # without a key for rows they start from the step's


@pytest.mark.parametrize(("start", "end"), [(0.2, 1.0), (1.0, 0.2)])
def test_a_ramp_goes_straight_from_one_value_to_the_other_and_stays_there(start: float, end: float) -> None:
    def at(step: int, duration: str = "50%") -> float:
        durations = Durations(batch_size=4, examples_per_epoch=40, total_steps=20)
        return float(
            within(
                lambda context: Context.ramp(
                    context_at(context, step, durations), start, end, duration, "weight"
                )
            )
        )

    assert [at(step) for step in (0, 5, 10, 15)] == pytest.approx([start, (start + end) / 2, end, end])
    assert at(0, "") == pytest.approx(end)  # no time at all
    assert at(5, "1 epoch") == pytest.approx((start + end) / 2)


def context_at(context: Context, step: int, durations: Durations | None) -> Context:
    context.step, context.durations = jnp.int32(step), durations
    return context


def test_mistakes_are_told() -> None:
    short = Durations(batch_size=4, examples_per_epoch=None, total_steps=20)
    mistakes: dict[str, Callable[[Context], Any]] = {
        r"objectives.obj reads 'on' from the batch.*'one'": lambda c: c.encode("image", "on"),
        r"views of different shapes together: .*'small': \(3, 2, 2, 3\)": lambda c: c.encode_views(
            "image", ("one", "small")
        ),
        r"objectives.obj asks for the teacher 'fast'": lambda c: c.encode("image", "one", teacher="fast"),
        r"objectives.obj.weight is '3 epochs', but the run's length is unknown": lambda c: c.ramp(
            0.0, 1.0, "3 epochs", "weight"
        ),
        r"objectives.obj.weight.*3 weeks": lambda c: context_at(c, 0, short).ramp(
            0.0, 1.0, "3 weeks", "weight"
        ),
    }
    for message, function in mistakes.items():
        with pytest.raises(UserError, match=message):
            within(function)
    with pytest.raises(TypeError, match=r"encode\('image', ...\) with scale needs a variant"):
        within(lambda context: context.encode("image", "one", scale=2.0))
    # Where nothing changes, no length is needed.
    assert float(within(lambda context: context.ramp(0.5, 0.5, "3 epochs", "weight"))) == 0.5


def test_rows_of_length_one_and_rows_of_zeros() -> None:
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(normalize(x), [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(normalize(x) * jnp.array([1.0, 2.0])))(x)
    assert np.isfinite(gradient).all()

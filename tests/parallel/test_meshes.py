"""Loss and gradients of training steps do not depend on the mesh, and no mesh makes XLA gather what it need not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.tiny import (
    abstract_of,
    experiment_of,
    layout_of,
    model_config,
    on_host,
    random_batch,
)
from vlpjax.config import spec
from vlpjax.experiment import Experiment
from vlpjax.mesh import AXES, Layout
from vlpjax.objectives.masked_image import MaskedAutoencoding
from vlpjax.objectives.masking import RandomPatches
from vlpjax.objectives.targets import Pixels
from vlpjax.rules import tree_names
from vlpjax.state import TrainState
from vlpjax.step import gradients, initial_state

DEVICES = 8
REMATERIALIZATION = "nvoluntary full rematerialization"


# Every two of the five axes together in one of these.
MESHES: tuple[dict[str, int], ...] = tuple(
    dict.fromkeys(axes, 2) for axes in (AXES[:3], (AXES[0], *AXES[3:5]), (AXES[1], *AXES[3:5]), AXES[2:5])
)


def two_kinds() -> Experiment:
    """CLIP and a masked autoencoder in one step, with widths, heads and a batch that eight divides."""
    config = model_config()
    for tower in (config.towers.image, config.towers.text):
        tower.update(width=16, heads=8)
    masked = dict(mask=spec(RandomPatches, ratio=0.75), target=spec(Pixels), patch=8)
    decoder = dict(decoder_width=16, decoder_depth=1, decoder_heads=8)
    config.objectives.mae = dict(weight=1.0, loss=spec(MaskedAutoencoding, **masked, **decoder))
    return experiment_of(config)


EXPERIMENT, BATCH = two_kinds(), random_batch()


@pytest.fixture(scope="module")
def state() -> TrainState:
    return on_host(jax.jit(lambda: initial_state(EXPERIMENT, BATCH))())


def differentiated(state: TrainState, layout: Layout) -> tuple[dict[str, float], Any]:
    """Losses and gradients on a mesh, on the host."""
    _, shardings = abstract_of(EXPERIMENT, BATCH, layout)

    def inside(state: TrainState, batch: Any) -> Any:
        with layout.activate():
            losses, _, grads = gradients(EXPERIMENT, state, batch, shardings.params)
            return {name: loss.value for name, loss in losses.items()}, grads

    places = (shardings, layout.sharding("batch"))
    run = jax.jit(inside, in_shardings=places)
    return on_host(run(*jax.device_put((state, dict(BATCH)), places)))


@pytest.fixture(scope="module")
def alone(state: TrainState) -> tuple[dict[str, float], Any]:
    """On one device."""
    return differentiated(state, layout_of(1))


@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "-".join(f"{a}{n}" for a, n in sizes.items()))
@pytest.mark.usefixtures("compiled_anew")
def test_loss_and_all_gradients_are_those_of_one_device(
    state: TrainState,
    alone: tuple[dict[str, float], Any],
    sizes: dict[str, int],
    capfd: pytest.CaptureFixture[str],
) -> None:
    capfd.readouterr()
    losses, grads = differentiated(state, layout_of(DEVICES, **sizes))
    assert REMATERIALIZATION not in capfd.readouterr().err
    for name, value in losses.items():
        np.testing.assert_allclose(value, alone[0][name], rtol=1e-5, err_msg=name)
    for name, ours, theirs in zip(
        tree_names(grads), jax.tree.leaves(grads), jax.tree.leaves(alone[1]), strict=True
    ):
        # What is added to all keys of a head has no gradient: what is there is rounding.
        rounding = 1e-6 if name.endswith("key/bias") else 1e-7
        assert np.max(np.abs(ours - theirs)) <= 1e-5 * np.max(np.abs(theirs)) + rounding, name


@pytest.mark.usefixtures("compiled_anew")
def test_the_compiler_says_when_it_gathers_what_it_need_not(capfd: pytest.CaptureFixture[str]) -> None:
    mesh = layout_of(DEVICES, fsdp=2, ring=4).mesh
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    table = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=place(None, ("fsdp", "ring")))
    tokens = jax.ShapeDtypeStruct((4, 8), jnp.int32, sharding=place("fsdp", "ring"))
    capfd.readouterr()
    jax.jit(lambda t, i: t[i] * 2, out_shardings=place("fsdp", "ring", None)).lower(table, tokens).compile()
    assert REMATERIALIZATION in capfd.readouterr().err

"""What tests of masked and predictive pretraining share: a micro tower, textured images, an objective called alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from tests.tiny import experiment_of, random_batch
from vlpjax.config import Config, spec
from vlpjax.experiment import base_config
from vlpjax.models.patches import cut
from vlpjax.models.towers import Towers
from vlpjax.models.vit import ViT
from vlpjax.objectives.base import Context, Loss, Objective, head_name
from vlpjax.objectives.targets import Target
from vlpjax.optim.optimizer import Optimizer, Schedule
from vlpjax.rules import map_with_names
from vlpjax.state import TrainState
from vlpjax.step import initial_state

SIZE, PATCH = 16, 4
GRID, N = (4, 4), 16
TOWER = dict(
    image_size=SIZE, patch=PATCH, width=32, depth=2, heads=2, mlp_ratio=2.0, positions="sincos", sincos_form="mae",
    pool="none", pre_norm=False, patch_bias=True,
)  # fmt: skip


def drawn(abstract: Any) -> Any:
    """Parameters of these shapes: matrices by their fan-in, scales 1, the rest 0.  Compiles nothing."""
    random = np.random.default_rng(0)

    def draw(name: str, leaf: Any) -> np.ndarray:
        if leaf.ndim < 2 or name.endswith("bias"):
            return np.full(leaf.shape, name.endswith("scale"), leaf.dtype)
        # [width, heads, head_dim] in, [heads, head_dim, width] out, [..., width] tokens: about the same for all.
        fan_in = max(leaf.shape) if leaf.ndim > 2 else leaf.shape[0]
        return np.asarray(random.normal(size=leaf.shape) * fan_in**-0.5, leaf.dtype)

    return map_with_names(draw, abstract)


@dataclass(frozen=True)
class Given(Target):
    """A target whose error per patch is the batch's field ``errors`` and what is predicted, one number."""

    def features(self, patch: tuple[int, int], channels: int) -> int:
        return 1

    def truth(self, context: Context, images: jax.Array, patch: tuple[int, int]) -> jax.Array:
        return context.read("errors")

    def error(self, predicted: jax.Array, truth: jax.Array) -> jax.Array:
        return predicted[..., 0] + truth


class Bound:
    """An objective with its towers and parameters, to be evaluated and trained.

    Attributes:
      params: of the towers.
    """

    def __init__(
        self,
        objective: Objective,
        batch: dict[str, Any],
        *,
        teacher: str = "",
        towers: dict[str, nn.Module] | None = None,
        **fields: Any,
    ):
        """``fields`` change the micro tower; ``towers`` replace it; ``teacher`` names a copy of the student."""
        self.objective, self.teacher = objective, teacher
        backbones = {"image": ViT(**{**TOWER, **fields})} if towers is None else towers
        heads = {head_name("masked", name): head for name, head in objective.heads().items()}
        self.towers = Towers.of({**backbones, **heads})
        method = self._method(objective, batch, jax.random.key(0))
        self._loss = jax.jit(lambda params, batch, key: self._apply(objective, params, batch, key))
        made = jax.eval_shape(lambda: self.towers.init(jax.random.key(0), method=method))
        made = nn.meta.unbox(made)
        self.params, self.statistics = drawn(made["params"]), drawn(made.get("batch_stats", {}))

    def evaluate(self, function: Callable[[Context], Any], params: Any, batch: Any, key: Any = None) -> Any:
        """``function`` of a context; masks are a function of ``key``.  One program: single operations take minutes."""
        run = jax.jit(lambda params, batch, key: self._apply(function, params, batch, key))
        return run(params, batch, jax.random.key(0) if key is None else key)

    def loss(self, params: Any, batch: Any, key: jax.Array | None = None) -> Loss:
        """The loss of a batch."""
        return self._loss(params, batch, jax.random.key(0) if key is None else key)

    def _apply(self, function: Callable[[Context], Any], params: Any, batch: Any, key: Any) -> Any:
        variables = {"params": params, "batch_stats": self.statistics}
        method = self._method(function, batch, key)
        return self.towers.apply(variables, method=method, mutable=["batch_stats"])[0]

    def _method(
        self, function: Callable[[Context], Any], batch: Any, key: jax.Array
    ) -> Callable[[Towers], Any]:
        def run(towers: Towers) -> Any:
            context = Context(
                towers, batch, key, jnp.int32(0), teachers={self.teacher: towers} if self.teacher else {},
                objective="masked", state=self.objective.initial_state(jax.random.key(0)),
            )  # fmt: skip
            return function(context)

        return run

    def train(self, batches: Callable[[jax.Array], Any], steps: int, rate: float = 2e-3) -> np.ndarray:
        """The losses of so many steps of Adam on ``batches(key)``; leaves its result in ``params``."""
        optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

        def step(carry: Any, number: jax.Array) -> Any:
            params, state = carry
            data, masks = jax.random.split(jax.random.fold_in(jax.random.key(1), number))
            batch = batches(data)
            loss, grads = jax.value_and_grad(lambda params: self.loss(params, batch, masks).value)(params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), loss

        run = jax.jit(lambda params, state: jax.lax.scan(step, (params, state), jnp.arange(steps)))
        (self.params, _), losses = run(self.params, optimizer.init(self.params))
        return np.asarray(losses)


def weights_and_seen(bound: Bound, images: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """With the target :class:`Given`: how much each patch's error counts in the loss, and which patches are seen."""
    batch = {"image": images, "errors": jnp.zeros((len(images), N))}
    grads = jax.grad(lambda batch: bound.loss(bound.params, batch).value)(batch)
    seen = np.any(cut(grads["image"], (PATCH, PATCH)) != 0, axis=-1)
    return np.asarray(grads["errors"]), seen


def outputs_of(params: Any, images: jax.Array, fields: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What the micro tower with these fields makes of images; ``options`` of its call may be arrays."""
    arrays = {name: value for name, value in options.items() if isinstance(value, jax.Array)}
    rest = {name: value for name, value in options.items() if name not in arrays}
    tower = ViT(**{**TOWER, **fields})
    run = jax.jit(lambda params, images, arrays: tower.apply({"params": params}, images, **arrays, **rest))
    outputs: dict[str, Any] = run(params, images, arrays)
    return outputs


@functools.partial(jax.jit, static_argnames=("count", "size"))
def textures(key: jax.Array, count: int = 64, size: int = SIZE) -> jax.Array:
    """Smooth images [B, size, size, 3]: a wave of random direction, length, phase and colour on a random ground."""
    angle, length, phase, ground, colour = jax.random.split(key, 5)
    turn = jax.random.uniform(angle, (count, 1, 1)) * jnp.pi
    waves = 1 + 2 * jax.random.uniform(length, (count, 1, 1))
    row, column = jnp.meshgrid(jnp.arange(size) / size, jnp.arange(size) / size, indexing="ij")
    along = row * jnp.sin(turn) + column * jnp.cos(turn)
    wave = jnp.sin(2 * jnp.pi * (waves * along + jax.random.uniform(phase, (count, 1, 1))))
    paint = 0.5 + jax.random.uniform(colour, (count, 1, 1, 3))
    return jax.random.normal(ground, (count, 1, 1, 3)) + paint * wave[..., None]


def start_of(config: Config, batch: Any = None) -> TrainState:
    """A state before the first step, on the host."""
    experiment = experiment_of(config)
    abstract = jax.eval_shape(lambda: initial_state(experiment, random_batch() if batch is None else batch))
    params = drawn(abstract.params)
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)
    teachers = {name: {tower: params[tower] for tower in held} for name, held in abstract.teachers.items()}
    started: TrainState = zeros.replace(params=params, teachers=teachers)
    return started


def step_config(objective: Config, **changes: Any) -> Config:
    """The training step of one objective on a micro tower, for :func:`tests.tiny.take_steps`."""
    config = base_config()
    config.duration = "12 steps"
    config.towers = dict(image=spec(ViT, **TOWER))
    config.objectives = dict(masked=dict(weight=1.0, loss=objective))
    config.optimizer = spec(
        Optimizer,
        direction=spec(optax.scale_by_adam),
        learning_rate=1e-3,
        schedule=spec(Schedule, warmup="2 steps"),
    )
    for name, value in changes.items():
        config[name] = value
    return config

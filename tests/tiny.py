"""A training run small enough for tests: its config, its pure parts, a batch of it, and odd parts to put into it."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from vlpjax.config import Config, spec
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.sources import TFDS
from vlpjax.data.tokenizers import SentencePieceTokenizer
from vlpjax.data.transforms import Decode, DrawCaption, FixedCaption, Normalize, RandomFlip, Resize, Tokenize
from vlpjax.durations import Durations
from vlpjax.evaluators.base import Evaluator, Result
from vlpjax.evaluators.retrieval import Retrieval
from vlpjax.evaluators.zeroshot import ZeroShot
from vlpjax.experiment import Experiment, base_config
from vlpjax.mesh import Layout, make_layout
from vlpjax.models.heads import MLPHead
from vlpjax.models.text import TextTransformer
from vlpjax.models.vit import ViT
from vlpjax.objectives.base import BatchCoupled, Context, Loss, Objective
from vlpjax.objectives.contrastive import InfoNCE
from vlpjax.optim.optimizer import Optimizer, Schedule
from vlpjax.state import TrainState
from vlpjax.step import abstract_state, abstract_variables, initial_state, make_train_step

ROOT = Path(__file__).parents[1]
SIZE, LENGTH, BATCH, STEPS = 16, 8, 16, 12
DATA = "bundled:emoji1594/1.0.0"
VOCABULARY = 32  # of random batches; runs on real captions take the tokenizer's


@contextlib.contextmanager
def optimised() -> Iterator[None]:
    """Compiles as outside of tests: for programs that take longer to run than to compile."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def model_config(dropout: float = 0.0, patch_dropout: float = 0.0, **changes: Any) -> Config:
    """The towers, the objective and the optimizer, without data; ``changes`` replace top-level fields."""
    config = base_config()
    config.duration = f"{STEPS} steps"
    config.towers = dict(
        image=spec(
            ViT, image_size=SIZE, patch=8, width=16, depth=1, heads=2, mlp_ratio=2.0, embedding=16,
            dropout=dropout, patch_dropout=patch_dropout,
        ),
        text=spec(
            TextTransformer, vocabulary=VOCABULARY, length=LENGTH, width=16, depth=1, heads=2, mlp_ratio=2.0,
            embedding=16, dropout=dropout,
        ),
    )  # fmt: skip
    config.objectives = dict(clip=dict(weight=1.0, loss=spec(InfoNCE)))
    config.optimizer = spec(
        Optimizer,
        direction=spec(optax.scale_by_adam),
        learning_rate=1e-2,
        schedule=spec(Schedule, warmup="2 steps"),
        weight_decay=0.1,
        clip_norm=1.0,
    )
    for name, value in changes.items():
        config[name] = value
    return config


def run_config() -> Config:
    """A whole run: twelve steps on 64 drawings, a checkpoint every four, two evaluators."""
    config = model_config(dropout=0.1)
    config.name = "tiny"
    config.towers.text.vocabulary = 4096
    tokenize = spec(
        Tokenize, tokenizer=spec(SentencePieceTokenizer, path="bundled:emoji1594.spm.model"), length=LENGTH
    )
    last = dict(tokenize=tokenize, normalize=spec(Normalize, range="-1..1"))
    first = dict(decode=spec(Decode), resize=spec(Resize, size=SIZE))
    config.data.train = spec(
        Pipeline,
        source=spec(TFDS, directory=DATA, split="noto[:64]"),
        transforms={
            "slow": spec(Slow),
            **first,
            "flip": spec(RandomFlip),
            "caption": spec(DrawCaption),
            **last,
        },
        batch_size=BATCH,
        keep=("image", "text", "label"),
        threads=1,
        prefetch=1,
    )
    test = spec(
        Pipeline,
        source=spec(TFDS, directory=DATA, split="openmoji[:40]"),
        transforms={**first, "caption": spec(FixedCaption), **last},
        batch_size=BATCH,
        shuffle=False,
        repeat=False,
        keep=("image", "text"),
    )
    config.evaluators = dict(
        style=spec(Retrieval, data=test, every="6 steps"),
        zeroshot=spec(ZeroShot, data=test, tokenize=tokenize, templates=("{}", "a {}")),
    )
    config.checkpoint = dict(every="4 steps", keep=2)
    config.log = dict(every="1 step")
    return config


def experiment_of(config: Config, batch_size: int = BATCH) -> Experiment:
    """The pure parts of a config, for a run of :data:`STEPS` steps."""
    return Experiment.from_config(config, Durations(batch_size, 4 * batch_size, STEPS))


def random_batch(seed: int = 0, size: int = BATCH) -> dict[str, np.ndarray]:
    """Images of noise, and texts of random words that end in id 1 and are padded with 0."""
    rng = np.random.default_rng(seed)
    text = rng.integers(2, VOCABULARY, (size, LENGTH)).astype(np.int32)
    for row, length in enumerate(rng.integers(2, LENGTH + 1, size)):
        text[row, length - 1] = 1
        text[row, length:] = 0
    image = rng.normal(size=(size, SIZE, SIZE, 3)).astype(np.float32)
    return {"image": image, "text": text, "label": rng.integers(0, size // 2, size).astype(np.int32)}


def layout_of(devices: int = 1, **sizes: int) -> Layout:
    """A mesh of the first ``devices`` devices; without sizes all of them are on fsdp."""
    return make_layout(sizes or {"fsdp": devices}, devices=jax.devices()[:devices])


def abstract_of(experiment: Experiment, batch: Any, layout: Layout) -> tuple[TrainState, TrainState]:
    """Shapes and shardings of the train state, without a run."""
    return abstract_state(experiment, abstract_variables(experiment, batch), layout)


@dataclass
class Trained:
    """A few steps on one mesh."""

    losses: list[float]
    metrics: list[dict[str, jax.Array]]
    history: list[TrainState]  # on the host, before the first step and after every step
    state: TrainState  # on the devices, after the last step
    shardings: TrainState


def take_steps(
    config: Config, layout: Layout, steps: int = 1, batch_size: int = BATCH, start: TrainState | None = None
) -> Trained:
    """Trains on random batches, without a work directory; ``start`` saves compiling the initialisation."""
    experiment = experiment_of(config, batch_size)
    batches = [random_batch(seed, batch_size) for seed in range(max(steps, 1))]
    _, shardings = abstract_of(experiment, batches[0], layout)
    if start is None:
        state = jax.jit(lambda batch: initial_state(experiment, batch), out_shardings=shardings)(batches[0])
    else:
        state = jax.device_put(start, shardings)
    history = [on_host(state)]
    step = make_train_step(experiment, layout, shardings, layout.sharding("batch"))
    metrics = []
    for batch in batches[:steps]:
        state, values = step(state, jax.device_put(batch, layout.sharding("batch")))
        metrics.append(values)
        history.append(on_host(state))
    return Trained([float(values["loss"]) for values in metrics], metrics, history, state, shardings)


def assert_trees_close(ours: Any, theirs: Any, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    """All leaves of two trees are close; the failing leaf's path is told."""

    def check(path: Any, left: Any, right: Any) -> None:
        np.testing.assert_allclose(left, right, rtol, atol, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, ours, theirs)


def assert_trees_equal(ours: Any, theirs: Any) -> None:
    """All leaves of two trees are equal, bit by bit."""

    def check(path: Any, left: Any, right: Any) -> None:
        np.testing.assert_array_equal(left, right, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, ours, theirs)


def simulating(devices: int) -> dict[str, str]:
    """The environment of a program with that many CPU devices, compiled as quickly as the tests' own."""
    flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}


def command(*arguments: str, devices: int = 1, **environment: str) -> tuple[list[str], dict[str, Any]]:
    """What ``subprocess.Popen`` takes to run the program on ``devices`` CPU devices."""
    cache = f"--compilation_cache={jax.config.jax_compilation_cache_dir or ''}"
    return [sys.executable, "-m", "vlpjax.main", cache, *arguments], {
        "cwd": ROOT,
        "env": simulating(devices) | environment,
        "text": True,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    }


def run_command(*arguments: str, devices: int = 1) -> subprocess.CompletedProcess[str]:
    """Runs the program to its end."""
    line, options = command(*arguments, devices=devices)
    options.pop("stdout"), options.pop("stderr")
    return subprocess.run(line, capture_output=True, timeout=240, check=False, **options)


class NormTower(nn.Module):
    """A tower with running statistics: flatten, BatchNorm, one projection."""

    features: int = 16

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> dict[str, jax.Array]:
        flat = images.reshape(images.shape[0], -1)
        flat = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(flat)
        return {"embedding": nn.Dense(self.features, name="projection")(flat)}


@dataclass(frozen=True)
class Agreement(BatchCoupled):
    """Pulls what a projector makes of images, with noise per example, to what the teacher ``slow`` makes of them."""

    noise: float = 0.5

    def heads(self) -> dict[str, nn.Module]:
        return {"projector": MLPHead((16, 6), last_norm="plain")}

    def encode(self, context: Context) -> dict[str, jax.Array]:
        image = context.encode("image", "image")["embedding"]
        return {
            "student": image + self.noise * row_noise(context, *image.shape),
            "teacher": context.encode("image", "image", teacher="slow")["embedding"],
        }

    def compare(self, features: dict[str, jax.Array], context: Context) -> Loss:
        ours = context.head("projector", features["student"])
        theirs = context.head("projector", features["teacher"], teacher="slow")
        value = jnp.mean(jnp.sum(jnp.square(ours - theirs), axis=-1))
        return Loss(value, {"noise": jnp.mean(jnp.abs(row_noise(context, *ours.shape)))})


@dataclass(frozen=True)
class Noisy(Objective):
    """A mean over examples, of embeddings times noise per example."""

    def __call__(self, context: Context) -> Loss:
        image = context.encode("image", "image")["embedding"]
        return Loss(jnp.mean(jnp.sum(image * row_noise(context, *image.shape), axis=-1)))


def row_noise(context: Context, batch: int, features: int) -> jax.Array:
    """Noise [batch, features], each example's from its own key."""
    return jax.vmap(lambda key: jax.random.normal(key, (features,)))(context.row_keys("noise", batch))


@dataclass(frozen=True)
class Slow(grain.transforms.Map):
    """Takes its time over every example, so that a test can act between two steps."""

    seconds: float = 0.015

    def map(self, element: dict[str, Any]) -> dict[str, Any]:
        time.sleep(self.seconds)
        return element


@dataclass(frozen=True)
class Failing(Evaluator):
    """An evaluator that always fails."""

    def make(self, experiment: Experiment, layout: Layout) -> Callable[[Mapping[str, Any]], Result]:
        del experiment, layout

        def evaluate(variables: Mapping[str, Any]) -> Result:
            raise KeyError("nothing to see")

        return evaluate


@dataclass(frozen=True)
class Rows:
    """A source of given examples."""

    rows: tuple[Mapping[str, Any], ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return dict(self.rows[index])

    def describe(self, index: int) -> str:
        return f"row {index}"

    def fingerprint(self) -> str:
        return str(len(self.rows))


def rows_of(**columns: Sequence[Any]) -> Rows:
    """Examples from columns of equal length."""
    return Rows(
        tuple(dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    )


def unit(x: Any) -> np.ndarray:
    """Rows of length one, in NumPy."""
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def on_host(tree: Any) -> Any:
    """All leaves as NumPy arrays of their own, which outlive a donated state."""
    return jax.tree.map(np.array, jax.device_get(tree))

"""One of several processes that train: says what it is, what it read, and the losses that it saw.

python -m tests.processes_tiny --coordinator=... --num_processes=... --process_id=... [--workdir=...]
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from tests.objectives.rig import SIZE, experiment_of, run_config
from tests.tiny import Rows, abstract_of, layout_of
from vlpjax.checkpoint import Checkpoints
from vlpjax.config import spec
from vlpjax.data.feed import feed
from vlpjax.data.pipeline import Pipeline
from vlpjax.errors import UserError
from vlpjax.flags import simulate_devices
from vlpjax.main import PROCESSES, parse
from vlpjax.objectives.ntxent import NTXent
from vlpjax.processes import join
from vlpjax.step import initial_state, make_train_step

BATCH, STEPS = 16, 2
SHAPE = (SIZE, SIZE, 3)


@dataclass(frozen=True)
class Watched(Rows):
    """A source that remembers what it was asked for."""

    asked: list[int] = field(default_factory=list)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.asked.append(index)
        return super().__getitem__(index)


def source() -> Watched:
    """Two views of noise per example."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(BATCH * STEPS, 2, *SHAPE)).astype(np.float32)
    return Watched(tuple({"view1": first, "view2": second} for first, second in noise))


def train(workdir: str, rows: Watched) -> list[float]:
    """Losses of steps on all devices there are; each step goes on from the checkpoint of the one before."""
    layout, experiment = (
        layout_of(jax.device_count()),
        experiment_of(run_config(spec(NTXent, projector=(16, 8)))),
    )
    shapes = {name: jax.ShapeDtypeStruct((BATCH, *SHAPE), np.float32) for name in ("view1", "view2")}
    abstract, shardings = abstract_of(experiment, shapes, layout)
    state = jax.jit(lambda: initial_state(experiment, shapes), out_shardings=shardings)()
    step = make_train_step(experiment, layout, shardings, layout.sharding("batch"))
    checkpoints, losses = Checkpoints(workdir), []
    pipeline = Pipeline(rows, {}, BATCH, shuffle=False, keep=tuple(shapes), threads=1, prefetch=1)
    with feed(pipeline, layout.sharding("batch"), 0, STEPS) as batches:
        for number, batch, _ in batches:
            state, metrics = step(state, {name: batch[name] for name in shapes})
            losses.append(float(metrics["loss"]))
            checkpoints.save(number + 1, state, {"data": {}})
            checkpoints.wait()
            state, _ = checkpoints.restore(number + 1, abstract, shardings)
    checkpoints.close()
    return losses


def main() -> None:
    flags, _ = parse(sys.argv[1:])
    simulate_devices()
    try:
        join(*(flags.get(name, "") for name in PROCESSES))
    except UserError as error:
        sys.exit(f"error: {error}")
    rows = source()
    losses = train(flags["workdir"], rows) if "workdir" in flags else []
    said = dict(process=jax.process_index(), processes=jax.process_count(), devices=jax.device_count())
    print(json.dumps(said | dict(asked=rows.asked, losses=losses)), flush=True)


if __name__ == "__main__":
    main()

"""One of several processes that feed a mesh: says what it is, what it read, and what all of them add up.

python -m tests.processes_tiny --coordinator=... --num_processes=... --process_id=...
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from tests.tiny import Rows, layout_of
from vlpjax.data.feed import feed
from vlpjax.data.pipeline import Pipeline
from vlpjax.errors import UserError
from vlpjax.main import PROCESSES, parse
from vlpjax.processes import join

BATCH, STEPS = 16, 2


@dataclass(frozen=True)
class Watched(Rows):
    """A source that remembers what it was asked for."""

    asked: list[int] = field(default_factory=list)

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.asked.append(index)
        return super().__getitem__(index)


def main() -> None:
    flags, _ = parse(sys.argv[1:])
    try:
        join(*(flags.get(name, "") for name in PROCESSES))
    except UserError as error:
        sys.exit(f"error: {error}")
    source = Watched(tuple({"value": float(index)} for index in range(BATCH * STEPS)))
    pipeline = Pipeline(source, {}, BATCH, shuffle=False, keep=("value",), threads=1, prefetch=1)
    layout, sums = layout_of(jax.device_count()), []
    with feed(pipeline, layout.sharding("batch"), 0, STEPS) as batches:
        for _, batch, _ in batches:
            sums.append(float(jax.jit(jnp.sum, out_shardings=layout.replicated)(batch["value"])))
    said = dict(
        process=jax.process_index(), processes=jax.process_count(), devices=jax.device_count(), asked=source.asked,
        sums=sums,
    )  # fmt: skip
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()

"""Lists for every record of a data set the others whose images are most alike, as an image tower sees them.

    python tools/import_torch.py --model=weights/clip-vit-base-patch32 --out=runs/clip-b32
    python tools/find_neighbors.py --workdir=runs/clip-b32 --config=experiments/contrastive/negclip.py:paper \\
        --out=coco/neighbors.npy

The tower is that of a run, trained or imported.  The records are those that the experiment trains on, before
``WithNeighbors`` (:class:`vlpjax.data.sources.WithNeighbors`) is put around them, which reads what is written here:
int32 [records, k], the nearest first.  Images are made ready as one of the experiment's evaluators does it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works from a checkout that is not installed

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from vlpjax.checkpoint import load_variables  # noqa: E402
from vlpjax.config import TYPE, build, load, resolve, suggest  # noqa: E402
from vlpjax.data.pipeline import Pipeline  # noqa: E402
from vlpjax.data.sources import WithNeighbors  # noqa: E402
from vlpjax.errors import UserError, tells_mistakes  # noqa: E402
from vlpjax.evaluators.base import finite_batches, to_host  # noqa: E402
from vlpjax.evaluators.neighbors import make_nearest  # noqa: E402
from vlpjax.experiment import build_modules  # noqa: E402
from vlpjax.mesh import Layout, make_layout  # noqa: E402
from vlpjax.models.towers import Towers  # noqa: E402
from vlpjax.workdir import read_config  # noqa: E402


def images_of(config: Any, evaluator: str, batch_size: int) -> Pipeline:
    """The records that the experiment trains on, once and in order, with images made ready as for this evaluator.

    Raises:
      UserError: no such evaluator, or one without images to be made ready.
    """
    known = [name for name in config.evaluators if "transforms" in config.evaluators[name].get("data", {})]
    if not known or (evaluator and evaluator not in known):
        raise UserError(
            f"--evaluator names {evaluator!r}, which makes no images ready{suggest(evaluator, known)}."
            if known
            else "The experiment has no evaluator that makes images ready."
        )
    source = config.data.train.source
    if resolve(source[TYPE]) is WithNeighbors:
        source = source.source
    return Pipeline(
        build(source),
        build(config.evaluators[evaluator or known[0]].data.transforms),
        batch_size=batch_size,
        shuffle=False,
        repeat=False,
        keep=("image",),
    )


def find(pipeline: Pipeline, tower: str, workdir: str, params: str, k: int, layout: Layout) -> np.ndarray:
    """The ``k`` nearest other records of every record by the cosine of the tower's embeddings, int32 [records, k].

    A record whose image cannot be read is nobody's neighbour.

    Raises:
      UserError: a run, tower or teacher that there is not, or fewer than ``k`` other records.
    """
    modules, _ = build_modules(read_config(workdir), "float32")
    if tower not in modules:
        raise UserError(f"The run in {workdir!r} has no tower {tower!r}{suggest(tower, modules)}.")
    size = pipeline.num_examples
    if not 0 < k < size:
        raise UserError(f"--k is {k}; each of {size} records has from 1 to {size - 1} others.")
    towers = Towers.of({tower: modules[tower]})
    loaded = load_variables(workdir, params)
    kept = {kind: {tower: tree[tower]} for kind, tree in loaded.items() if tower in tree}
    variables = jax.device_put(kept, layout.replicated)

    def encode(variables: Any, images: jax.Array) -> jax.Array:
        with layout.activate():
            outputs: Any = towers.apply(variables, method=lambda towers: towers.call(tower, images))
        embedding: jax.Array = outputs["embedding"]
        return embedding.astype(jnp.float32)

    run = jax.jit(encode, out_shardings=layout.sharding("frames"))
    features, valid = [], []
    for batch in finite_batches(pipeline, layout):
        features.append(run(variables, batch["image"]))
        valid.append(to_host(batch["valid"], layout))  # others could not be read, or fill the last batch
    everything, real = jnp.concatenate(features), np.concatenate(valid)
    _, places = jax.jit(make_nearest(layout, k + 1), out_shardings=layout.replicated)(
        everything, everything, real
    )
    return without_self(np.asarray(places)[:size])


def without_self(places: np.ndarray) -> np.ndarray:
    """Of k + 1 nearest records of each record the k nearest that are not itself, int32 [records, k]."""
    other = places != np.arange(len(places))[:, None]
    first = np.argsort(~other, axis=1, kind="stable")[:, :-1]  # where it is not among them, the farthest goes
    return np.take_along_axis(places, first, axis=1).astype(np.int32)


@tells_mistakes
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, help="the experiment that names the records")
    parser.add_argument("--workdir", required=True, help="of the run that the tower is taken from")
    parser.add_argument("--out", required=True, help="the .npy file to be written")
    parser.add_argument("--tower", default="image", help="its name (default: image)")
    parser.add_argument("--params", default="student", help="'student' (the default), or a teacher's name")
    parser.add_argument("--k", type=int, default=3, help="neighbours of each record (default: 3)")
    parser.add_argument(
        "--evaluator", default="", help="whose transforms make images ready (default: the first)"
    )
    parser.add_argument("--batch_size", type=int, default=256, help="images that are encoded at once")
    given = parser.parse_args(arguments)
    out = Path(given.out)
    if out.suffix != ".npy":
        raise UserError(f"--out is {given.out!r}; it ends in .npy.")
    layout = make_layout({"fsdp": -1})
    pipeline = images_of(load(given.config), given.evaluator, given.batch_size)
    table = find(pipeline, given.tower, given.workdir, given.params, given.k, layout)
    out.parent.mkdir(parents=True, exist_ok=True)
    np.save(out, table)
    print(f"{out}: {table.shape[1]} neighbours of each of {table.shape[0]:,} records")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compares an experiment's losses and gradients on every mesh of simulated devices with those on one device.

    python tools/check_meshes.py --config=experiments/contrastive/clip.py:small
    python tools/check_meshes.py --config=experiments/decoders/llama3.py:small --devices=4 --axes=fsdp,ring,ulysses

For each mesh whose axes multiply to ``--devices``: the loss's relative difference, and of all parameters' gradients the
largest difference as a share of that gradient's largest entry, in float32, on the first batch of the training data.
A mesh that the experiment's sizes do not allow is named with the reason.  The exit status is 1 if a difference is
above ``--tolerance``.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from vlpjax.errors import UserError, tells_mistakes
from vlpjax.flags import simulate_devices

AXES = "replica,fsdp,ring,ulysses,tensor"


@tells_mistakes
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, help="FILE[:ARGUMENT], as for vlpjax.main")
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="changes of the config"
    )
    parser.add_argument("--devices", type=int, default=8, help="simulated devices (default: 8)")
    parser.add_argument("--axes", default=AXES, help=f"axes of the meshes (default: {AXES})")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest difference (default: 1e-5)")
    given = parser.parse_args(arguments)
    if given.devices < 2:
        raise UserError(f"--devices={given.devices} leaves nothing to compare; it must be at least 2.")
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # each program runs once
    simulate_devices(given.devices)
    return _compare(given)


def meshes(axes: Sequence[str], devices: int) -> Iterator[dict[str, int]]:
    """Sizes above 1 per axis, for every way to write ``devices`` as a product over the axes."""
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    for shape in itertools.product(sizes, repeat=len(axes)):
        if math.prod(shape) == devices:
            yield {axis: size for axis, size in zip(axes, shape, strict=True) if size > 1}


def _compare(given: argparse.Namespace) -> int:
    import jax

    from vlpjax.config import apply_overrides, load

    changes = [tuple(change.partition("=")[::2]) for change in given.set]
    config = apply_overrides(load(given.config), [*changes, ("precision", "float32")])
    alone = _Gradients(config, {}, jax.devices()[:1])
    start = alone.initial()
    expected = alone.of(start)
    worst = 0.0
    for sizes in meshes(given.axes.split(","), given.devices):
        name = " ".join(f"{axis}={size}" for axis, size in sizes.items())
        try:
            found = _Gradients(config, sizes, jax.devices()[: given.devices]).of(start)
        except UserError as error:
            print(f"{name:<32} not possible: {error}", flush=True)
            continue
        loss, gradient, parameter = _differences(found, expected)
        worst = max(worst, loss, gradient)
        print(f"{name:<32} loss {loss:.1e}  gradients {gradient:.1e} ({parameter})", flush=True)
    print(f"largest difference {worst:.1e}, allowed {given.tolerance:.0e}")
    return int(not worst <= given.tolerance)


class _Gradients:
    """Losses and gradients of an experiment's first batch on one mesh."""

    def __init__(self, config: Any, sizes: dict[str, int], devices: Sequence[Any]) -> None:
        import jax

        from vlpjax.run import Run
        from vlpjax.step import gradients

        config = config.copy_and_resolve_references()
        config.mesh = sizes or {"fsdp": 1}
        self.run = Run.from_config(config, devices=devices)
        self.shardings = self.run.abstract[1]

        def inside(state: Any, batch: Any) -> Any:
            with self.run.layout.activate():
                losses, _, grads = gradients(self.run.experiment, state, batch, self.shardings.params)
                return {name: loss.value for name, loss in losses.items()}, grads

        self.function = jax.jit(inside, in_shardings=(self.shardings, self.run.batch_shardings))

    def initial(self) -> Any:
        """The state before the first step, on the host."""
        import jax

        from vlpjax.step import initial_state

        batch = self.run.pipeline.batch(0)
        return jax.device_get(jax.jit(lambda: initial_state(self.run.experiment, batch))())

    def of(self, state: Any) -> Any:
        """Losses by objective and the tree of gradients, on the host."""
        import jax

        places = (self.shardings, self.run.batch_shardings)
        return jax.device_get(self.function(*jax.device_put((state, self.run.pipeline.batch(0)), places)))


def _differences(found: Any, expected: Any) -> tuple[float, float, str]:
    """Of the losses, of the gradients, and the parameter where gradients differ most."""
    import jax
    import numpy as np

    from vlpjax.rules import tree_names

    (losses, grads), (losses_expected, grads_expected) = found, expected
    loss = max(abs(losses[name] - value) / abs(value) for name, value in losses_expected.items())
    shares = {
        name: float(np.max(np.abs(ours - theirs)) / max(np.max(np.abs(theirs)), 1e-20))
        for name, ours, theirs in zip(
            tree_names(grads), jax.tree.leaves(grads), jax.tree.leaves(grads_expected), strict=True
        )
        # What is added to all keys of a head has no gradient: what is there is rounding.
        if not name.endswith("key/bias") and np.any(theirs)
    }
    parameter = max(shares, key=shares.__getitem__)
    return float(loss), shares[parameter], parameter


if __name__ == "__main__":
    sys.exit(main())

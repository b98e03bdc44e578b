"""Memory of losses and attention per device, by the number of devices: what the compiler says, without running them.

    python tools/bench_parallel.py
    python tools/bench_parallel.py --forms=softmax,sigmoid_ring --batch=8192 --features=512 --devices=1,2,4,8
    python tools/bench_parallel.py --topologies=v5e:2x2,v5e:2x4,v5e:4x4,v5e:16x16 --batch=32768     # needs libtpu

A program is the value and the gradient by its inputs, which are spread over the devices.  A column is how many bytes
one device needs beside these (the compiler's temporary memory); the last tells how many times less the most devices
need than the fewest.  Simulated devices of the CPU stand for real ones; ``--topologies`` compiles for TPUs that are
not there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST = 8  # simulated devices
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # works from a checkout that is not installed

from vlpjax.flags import simulate_devices  # noqa: E402
from vlpjax.planning import topology  # noqa: E402

simulate_devices(MOST)  # before JAX is imported
topology.ignore_absent_chips()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from vlpjax.errors import UserError, tells_mistakes  # noqa: E402
from vlpjax.mesh import Layout, make_layout  # noqa: E402
from vlpjax.models.towers import Towers  # noqa: E402
from vlpjax.objectives.base import BatchCoupled, Context, head_name  # noqa: E402
from vlpjax.objectives.contrastive import InfoNCE, Sigmoid  # noqa: E402
from vlpjax.parallel.attention import attention, causal  # noqa: E402

HEADS, HEAD_DIM = 8, 64  # of attention
Lowered = Callable[[Layout, int, int], Any]


@dataclass(frozen=True)
class Form:
    """A program whose memory is asked for.

    Attributes:
      title: for the table.
      axis: of the mesh, that has all the devices.
      lower: makes the program from a layout, a number of examples or tokens, and a number of features.
    """

    title: str
    axis: str
    lower: Lowered


def loss(objective: BatchCoupled) -> Lowered:
    """The comparison of an objective, in value and gradient by both sides' features."""
    heads = {head_name("loss", name): head for name, head in objective.heads().items()}
    towers = Towers.of(heads)

    def lower(layout: Layout, batch: int, features: int) -> Any:
        def compare(towers: Towers, sides: Any) -> jax.Array:
            context = Context(towers, {}, jax.random.key(0), jnp.int32(0), objective="loss")
            return objective.compare(sides, context).value

        def value(params: Any, sides: Any) -> jax.Array:
            with layout.activate():
                result: jax.Array = towers.apply({"params": params}, sides, method=compare)
            return result

        side = jax.ShapeDtypeStruct((batch, features), jnp.float32, sharding=layout.sharding("frames", None))
        few = jnp.zeros((2, features))
        params = jax.eval_shape(
            lambda: towers.init(jax.random.key(0), dict(image=few, text=few), method=compare)["params"]
        )
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout.replicated), params
        )
        return jax.jit(jax.grad(value, argnums=(0, 1))).lower(params, dict(image=side, text=side))

    return lower


def dense_attention(*names: str | None) -> Lowered:
    """Causal attention among tokens of an example, with these logical axes for [examples, tokens, heads, head_dim]."""

    def lower(layout: Layout, batch: int, features: int) -> Any:
        del features
        tokens = jax.ShapeDtypeStruct(
            (MOST, batch, HEADS, HEAD_DIM), jnp.float32, sharding=layout.sharding(*names)
        )

        def value(query: jax.Array, key: jax.Array, others: jax.Array) -> jax.Array:
            return jnp.sum(jnp.square(attention(query, key, others, causal(batch))))

        return jax.jit(jax.grad(value, argnums=(0, 1, 2))).lower(tokens, tokens, tokens)

    return lower


FORMS = {
    "softmax": Form("softmax, rows against gathered keys", "fsdp", loss(InfoNCE())),
    "softmax_groups": Form(f"softmax in {MOST} groups", "fsdp", loss(InfoNCE(groups=MOST))),
    "sigmoid": Form("sigmoid, rows against gathered keys", "fsdp", loss(Sigmoid())),
    "sigmoid_ring": Form(f"sigmoid, around the ring, {MOST} chunks", "fsdp", loss(Sigmoid(chunks=MOST))),
    "attention_examples": Form(
        f"dense attention, {MOST} examples shared", "fsdp", dense_attention("batch", None, None, None)
    ),
    "attention_heads": Form(
        f"dense attention, {HEADS} heads shared", "tensor", dense_attention("batch", None, "heads", None)
    ),
}


def temporary_bytes(form: Form, devices: Sequence[Any], batch: int, features: int) -> int:
    """What one of the devices needs beside the program's inputs and outputs."""
    layout = make_layout({form.axis: len(devices)}, devices=devices)
    memory = form.lower(layout, batch, features).compile().memory_analysis()
    return int(memory.temp_size_in_bytes)


def columns(options: argparse.Namespace) -> dict[str, Sequence[Any]]:
    """Devices per column: the first of the simulated ones, or all of a topology.

    Raises:
      UserError: more devices than there are, a topology that the compiler does not know, or no compiler.
    """
    if options.topologies:
        topology.prepare()
        return {name: topology.devices_of(name) for name in options.topologies.split(",")}
    there = jax.devices()
    for count in options.devices.split(","):
        if not count.isdecimal() or not 0 < int(count) <= len(there):
            raise UserError(f"--devices names {count!r}; there are 1 to {len(there)}.")
    return {count: there[: int(count)] for count in options.devices.split(",")}


@tells_mistakes
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--forms", default=",".join(FORMS), help="names, separated by commas")
    parser.add_argument("--batch", type=int, default=2048, help="examples of a loss, or tokens of attention")
    parser.add_argument("--features", type=int, default=512, help="of an example")
    parser.add_argument("--devices", default="1,2,4,8", help=f"numbers of simulated devices, up to {MOST}")
    parser.add_argument("--topologies", default="", help="of TPUs, in place of simulated devices")
    options = parser.parse_args(arguments)
    names = options.forms.split(",")
    if unknown := [name for name in names if name not in FORMS]:
        parser.error(f"there is no {unknown[0]!r} among the forms; there are {', '.join(FORMS)}.")
    report([FORMS[name] for name in names], columns(options), options.batch, options.features)
    return 0


def report(forms: Sequence[Form], places: dict[str, Sequence[Any]], batch: int, features: int) -> None:
    """Prints a row per form, with a column per place."""
    print(f"{'MB per device':44}" + "".join(f"{name:>12}" for name in places) + "   least of most")
    for form in forms:
        sizes = [temporary_bytes(form, devices, batch, features) for devices in places.values()]
        cells = "".join(f"{size / 1e6:12,.2f}" for size in sizes)
        print(f"{form.title:44}{cells}   {sizes[0] / max(sizes[-1], 1):12.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

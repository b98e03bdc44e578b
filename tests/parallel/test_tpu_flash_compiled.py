"""The TPU kernels through the TPU compiler, for chips that are not there: every generation takes them.

The compiler needs its environment before JAX starts, so that all of it happens in one process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
}
TOKENS = 2**21

PROGRAM = """
import functools, json
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec as P
from vlpjax.mesh import make_layout
from vlpjax.parallel import tpu_flash
from vlpjax.parallel.attention import Interval, causal
from vlpjax.parallel.backends import attend
from vlpjax.parallel.flash import NAMES
from vlpjax.parallel.tpu_tiles import Tiles

def array(sharding, *shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

def report(**facts):
    print(json.dumps(facts), flush=True)

def bytes_of(compiled):
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes

topology = {name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices for name in TOPOLOGIES}
for name, devices in topology.items():
    layout = make_layout({}, devices=devices[:1])
    here = functools.partial(array, layout.replicated)
    query, key, numbers = here(1, TOKENS, 2, 128), here(1, TOKENS, 1, 128), here(1, TOKENS, dtype=jnp.int32)
    inputs = (query, key, key, Interval(numbers, numbers))
    options = dict(scale=0.1, tiles=Tiles(256, 256))
    forward = jax.jit(functools.partial(tpu_flash.forward, **options)).lower(*inputs).compile()
    backward = functools.partial(tpu_flash.backward, **options)
    backward = jax.jit(backward).lower(*inputs, query, here(1, 2, TOKENS, dtype=jnp.float32), query).compile()
    image = here(2, 256, 16, 72)
    def short(query, key, value):
        return jnp.sum(attend(query, key, value, backend="tpu_short").mixed.astype(jnp.float32))
    with layout.activate():
        text = jax.jit(jax.grad(short, argnums=(0, 1, 2))).lower(image, image, image).compile().as_text()
    report(name=name, forward=bytes_of(forward), backward=bytes_of(backward), short=text.count("tpu_custom_call"))

# The entry on a mesh of four chips, with the tiles that it has there, and heads that are no multiple of 128 lanes.
layout = make_layout({"fsdp": 2, "tensor": 2}, devices=next(iter(topology.values())))
def loss(query, key, value):
    with layout.activate():
        mixed = attend(query, key, value, causal(query.shape[1])).mixed
    return jnp.sum(mixed.astype(jnp.float32) ** 2)
placed = functools.partial(array, NamedSharding(layout.mesh, P("fsdp", None, "tensor")))
inputs = (placed(4, 1500, 4, 72), *[placed(4, 1500, 2, 72)] * 2)
saved = jax.checkpoint_policies.save_only_these_names(*NAMES)
for name, policy in dict(nothing=jax.checkpoint_policies.nothing_saveable, names=saved).items():
    step = jax.value_and_grad(jax.checkpoint(loss, policy=policy), argnums=(0, 1, 2))
    text = jax.jit(step).lower(*inputs).compile().as_text()
    report(name=name, kernels=text.count('custom_call_target="tpu_custom_call"'),
           moved=[word for word in ("all-gather", "all-to-all", "collective-permute") if word in text])
"""

TOPOLOGIES = {"v5e:2x2": 16, "v5p:2x2x1": 95, "v6e:2x2": 32, "TPU7x:2x2x1": 96}  # and GB per device


@pytest.fixture(scope="module")
def facts() -> dict[str, dict[str, Any]]:
    """What the compiler says, by topology."""
    program = f"TOKENS, TOPOLOGIES = {TOKENS}, {list(TOPOLOGIES)}\n{PROGRAM}"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {line.pop("name"): line for line in lines}


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_two_million_tokens_compile_forward_and_backward(facts: dict[str, dict[str, Any]], name: str) -> None:
    """No array grows with the square of the tokens: each is counted in multiples of the queries."""
    queries = TOKENS * 2 * 128 * 2  # bytes
    assert facts[name]["forward"] < 5 * queries
    assert facts[name]["backward"] < 14 * queries
    assert facts[name]["backward"] < TOPOLOGIES[name] * 10**9


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_attention_of_images_compiles_to_two_kernels(facts: dict[str, dict[str, Any]], name: str) -> None:
    assert facts[name]["short"] == 2


def test_on_a_mesh_each_device_runs_the_kernels_on_its_own_examples_and_heads(
    facts: dict[str, dict[str, Any]],
) -> None:
    """Forward, its repetition, and two of the backward pass; only the loss is summed over devices."""
    assert facts["nothing"] == {"kernels": 4, "moved": []}


def test_rematerialisation_that_saves_the_names_runs_attention_once(facts: dict[str, dict[str, Any]]) -> None:
    assert facts["names"] == {"kernels": 3, "moved": []}

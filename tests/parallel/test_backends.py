"""The entry to attention: which form is chosen and why, that forms agree, and that none does what it cannot mask."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import layout_of
from vlpjax.errors import UserError
from vlpjax.mesh import Layout, active_platform
from vlpjax.parallel import attention, backends, chunked, tpu_flash
from vlpjax.parallel.attention import causal, intersect, segments
from vlpjax.parallel.backends import (
    Backend,
    Choice,
    Chunked,
    Cudnn,
    Dense,
    Kind,
    Request,
    Splash,
    TpuFlash,
    attend,
    choose,
    on_device,
)
from vlpjax.parallel.flash import NAMES
from vlpjax.parallel.tpu_tiles import Tiles

LENGTH = 128
INTERPRETED = TpuFlash(Tiles(128, 128), interpret=True)


LONG = Request("tpu", ("bfloat16",), 8192, 8192, heads=8, kv_heads=2, head_dim=128)
CHOICES: dict[str, tuple[dict[str, Any], str, dict[str, str]]] = {
    # what differs from a long row on a TPU, which form is chosen, and some of the reasons
    "long on a TPU": ({}, "tpu_flash", {"cudnn": "it needs a GPU"}),
    "short on a TPU": (dict(queries=256, keys=256), "dense", {"tpu_short": "here 8 share 2"}),
    "images on a TPU": (dict(queries=256, keys=256, kv_heads=8), "tpu_short", {"cudnn": "it needs a GPU"}),
    "texts on a TPU": (dict(queries=64, keys=64, kv_heads=8), "dense", {"tpu_short": "16384 logits per head"}),
    "one new token of a long row": (dict(queries=1), "dense", {}),
    "half precision on a TPU": (dict(dtypes=("float16",)), "chunked", {"tpu_flash": "takes bfloat16 or float32"}),
    "mixed types on a TPU": (dict(dtypes=("float32", "bfloat16")), "chunked", {"tpu_flash": "float32 and bfloat16"}),
    "very wide heads": (dict(head_dim=512), "chunked", {"tpu_flash": "up to 256, and these have 512"}),
    "tables too large": (dict(rows=4096), "chunked", {"tpu_flash": "tables take 1310720 bytes"}),
    "a bias": (dict(bias=True), "dense", {"tpu_flash": "a bias is asked for", "chunked": "a bias is asked for"}),
    "a mask in booleans": (dict(mask=True), "dense", {"tpu_flash": "mask in booleans"}),
    "weights": (dict(weights=True), "dense", {"tpu_flash": "the weights is asked for"}),
    "short on a CPU": (dict(platform="cpu", queries=1024, keys=1024), "dense", {}),
    "long on a CPU": (dict(platform="cpu"), "chunked", {"dense": "8192 x 8192 logits", "splash": "it needs a TPU"}),
    "causal on a GPU": (dict(platform="gpu", kind="causal"), "cudnn", {}),
    "everything, on a GPU": (dict(platform="gpu", kind="full", queries=100), "cudnn", {}),
    "packed on a GPU": (dict(platform="gpu"), "chunked", {"cudnn": "the interval may be anything"}),
    "float32 on a GPU": (dict(platform="gpu", kind="full", dtypes=("float32",)), "chunked", {"cudnn": "float16"}),
    "wide heads on a GPU": (dict(platform="gpu", kind="full", head_dim=256), "chunked", {"cudnn": "up to 128"}),
    "odd heads on a GPU": (dict(platform="gpu", kind="full", head_dim=36), "chunked", {"cudnn": "multiple of 8"}),
    "a soft cap on a GPU": (dict(platform="gpu", kind="full", soft_cap=5.0), "chunked", {"cudnn": "no soft cap"}),
    "causal at the end": (dict(platform="gpu", kind="causal", queries=4096), "chunked", {"cudnn": "4096 and 8192"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CHOICES)
def test_the_form_that_is_chosen(case: str) -> None:
    changes, name, reasons = CHOICES[case]
    choice = choose(dataclasses.replace(LONG, **changes))
    assert choice.backend.name == name
    for skipped, reason in reasons.items():
        assert reason in choice.skipped[skipped]


def test_the_choice_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    request = dataclasses.replace(LONG, queries=8191)
    with caplog.at_level(logging.INFO, "vlpjax"):
        choose(request)
        choose(request)
        choose(dataclasses.replace(request, bias=True))
    chosen, dense = caplog.records
    assert "8191 x 8192 tokens" in chosen.getMessage()
    assert "tpu_flash; not cudnn: it needs a GPU, and this is a tpu" in chosen.getMessage()
    assert (chosen.levelname, dense.levelname) == ("INFO", "WARNING")


def test_a_form_that_is_named_does_it_or_says_why_not() -> None:
    assert choose(dataclasses.replace(LONG, kind="full"), "splash").backend == Splash()
    assert choose(LONG, "dense").backend == Dense()
    with pytest.raises(
        UserError, match=r"no attention backend 'flesh'; there are cudnn, tpu_short, dense, tpu_flash, splash"
    ):
        choose(LONG, "flesh")
    with pytest.raises(UserError, match=r"'cudnn' cannot do this: it needs a GPU, and this is a tpu\."):
        choose(LONG, "cudnn")
    uneven = dataclasses.replace(LONG, kind="full", head_dim=64)
    with pytest.raises(UserError, match=r"multiples of 128, and these are 8192 x 8192 x 64"):
        choose(uneven, "splash")


def arrays(
    dtype: Any = jnp.float32, batch: int = 2, groups: int = 2, width: int = 128
) -> tuple[jax.Array, ...]:
    """Queries, keys, values, and a gradient of the mixed values."""
    rng = np.random.default_rng(0)
    return tuple(
        jnp.asarray(rng.normal(size=(batch, LENGTH, heads, width)), dtype) for heads in (4, groups, groups, 4)
    )


def gradients(attend: Any, query: jax.Array, key: jax.Array, value: jax.Array, gradient: jax.Array) -> Any:
    """Values and gradients."""

    @jax.jit
    def run(*arrays: jax.Array) -> Any:
        mixed, pull = jax.vjp(lambda *qkv: attend(*qkv).mixed, *arrays[:3])
        return (mixed, *pull(arrays[3]))

    return run(query, key, value, gradient)


FORMS: dict[str, tuple[Backend, Any, float]] = {
    "chunked": (Chunked(chunk=48), jnp.float32, 1e-5),
    "tpu_flash": (INTERPRETED, jnp.float32, 1e-5),
    "splash": (Splash(interpret=True), jnp.float32, 1e-4),
    "cudnn's arguments": (Cudnn("xla"), jnp.bfloat16, 0.05),
}


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", ["full", "causal"])
def test_forms_agree(name: str, kind: Kind) -> None:
    form, dtype, tolerance = FORMS[name]
    interval = causal(LENGTH) if kind == "causal" else None
    oracle = gradients(functools.partial(attention.attend, interval=interval, scale=0.1), *arrays())
    run = functools.partial(attend, interval=interval, kind=kind, scale=0.1, backend=form)
    for got, expected in zip(gradients(run, *arrays(dtype)), oracle, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["splash", "cudnn's arguments"])
def test_what_masks_only_the_future_refuses_packed_documents(name: str) -> None:
    form, dtype, _ = FORMS[name]
    packed = intersect(causal(LENGTH), segments(jnp.arange(LENGTH)[None] // 50 + 1))
    with pytest.raises(UserError, match=r"masks nothing but the future, and the interval may be anything"):
        attend(*arrays(dtype)[:3], packed, backend=form)


def test_short_attention_on_a_cpu_is_the_dense_program_and_no_other() -> None:
    inputs = (*arrays()[:3], causal(LENGTH))
    options = dict(soft_cap=3.0, weights=True)
    ours, dense = (
        str(jax.make_jaxpr(functools.partial(f, **options))(*inputs)) for f in (attend, attention.attend)
    )
    assert ours == dense


def test_long_attention_on_a_cpu_is_chunked() -> None:
    shapes = [jax.ShapeDtypeStruct((1, 2048, 1, 8), jnp.float32)] * 3
    assert "2048,2048" in str(jax.make_jaxpr(attention.attend)(*shapes))
    assert "2048,2048" not in str(jax.make_jaxpr(attend)(*shapes))


@pytest.mark.parametrize(
    ("sizes", "groups"),
    [
        (dict(fsdp=2, ring=2, tensor=2), 2),
        (dict(fsdp=2, tensor=4), 2),
        (dict(replica=8), 4),
        (dict(tensor=8), 4),
    ],
)
def test_a_mesh_gives_what_one_device_gives(sizes: dict[str, int], groups: int) -> None:
    """Examples and heads are dealt out as far as they go; here 8 of one and 4 of the other."""
    inputs = arrays(batch=8, groups=groups, width=16)
    packed = intersect(
        causal(LENGTH), segments(jnp.arange(8)[:, None] * 3 + jnp.arange(LENGTH)[None] // 50 + 1)
    )

    def run(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
        return attend(query, key, value, packed, backend=INTERPRETED)

    expected = gradients(functools.partial(attention.attend, interval=packed), *inputs)
    with layout_of(8, **sizes).activate():
        got = gradients(run, *inputs)
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_tables_are_counted_per_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Request] = []
    monkeypatch.setattr(backends, "choose", lambda request, _: asked.append(request) or Choice(Dense(), {}))
    query, key, value, _ = arrays(batch=8, width=16)
    for interval in (causal(LENGTH), segments(jnp.ones((8, LENGTH), jnp.int32))):
        with layout_of(8, fsdp=4, tensor=2).activate():
            jax.eval_shape(lambda *qkv, seen=interval: attend(*qkv, seen).mixed, query, key, value)
    assert [request.rows for request in asked] == [1, 2]


def absent_tpu() -> Layout:
    """Stands for a mesh of a machine that is not there."""
    chip = type("Chip", (), dict(platform="tpu"))()
    mesh = type("Mesh", (), dict(devices=np.array([chip]), size=1))
    return dataclasses.replace(layout_of(), mesh=mesh)


def test_the_platform_is_that_of_the_mesh() -> None:
    assert active_platform() == "cpu"
    with absent_tpu().activate():
        assert active_platform() == "tpu"


def test_between_collectives_a_device_runs_the_form_of_the_meshs_platform(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def chosen(dtype: Any = jnp.bfloat16, rows: int = 1) -> Any:
        query, key = (jax.ShapeDtypeStruct((8, 65536, heads, 128), dtype) for heads in (8, 2))
        return on_device(query, key, queries=8192, keys=65536, rows=rows).forward.func

    assert chosen() is chunked.forward
    with absent_tpu().activate(), caplog.at_level(logging.INFO, "vlpjax"):
        assert chosen() is tpu_flash.forward
        assert chosen(jnp.float16) is chunked.forward
        assert chosen(rows=1025) is chunked.forward
    reasons = [record.getMessage() for record in caplog.records]
    assert "8192 x 65536 tokens" in reasons[0]
    assert "not tpu_flash: it takes bfloat16 or float32, and these are float16" in reasons[1]
    assert "not tpu_flash: its tables take 787200 bytes" in reasons[2]


def test_rematerialisation_that_saves_the_names_runs_attention_once() -> None:
    """For the TPU kernels, which JAX leaves for the compiler to remove, see test_tpu_flash_compiled."""
    form, inputs = Chunked(chunk=64), arrays(width=16)[:3]

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.sum(attend(query, key, value, causal(LENGTH), backend=form).mixed ** 2)

    def products(policy: Any) -> int:
        step = jax.value_and_grad(jax.checkpoint(loss, policy=policy), argnums=(0, 1, 2))
        return _products(jax.make_jaxpr(step)(*inputs).jaxpr)

    forward = _products(jax.make_jaxpr(loss)(*inputs).jaxpr)
    saved = jax.checkpoint_policies.save_only_these_names(*NAMES)
    assert forward > 0
    assert products(None) == products(saved) + forward


def _products(jaxpr: Any) -> int:
    """Matrix products in a program and all programs in it."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "dot_general"
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            count += _products(inner) if hasattr(inner, "eqns") else 0
    return count

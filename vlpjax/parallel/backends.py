"""One entry to attention, and the forms behind it: which is used is decided by what is asked for, and said once.

Each form answers ``supports(request)`` with nothing, or with the reason why it does not do what is asked.  A form
refuses what it cannot mask; none degrades in silence.  They stand in the order in which they are tried:

1. ``cudnn`` on GPUs, for plain causal or full attention;
2. ``tpu_short``, our kernels for short sequences on TPUs (:mod:`vlpjax.parallel.tpu_short`), under any interval;
3. ``dense`` where logits are few: no other form is as fast there;
4. ``tpu_flash``, our kernels for TPUs (:mod:`vlpjax.parallel.tpu_flash`), under any interval;
5. ``splash``, JAX's own kernel for TPUs, for plain causal or full attention;
6. ``chunked``, plain JAX (:mod:`vlpjax.parallel.chunked`), under any interval, on any platform;
7. ``dense``, which does everything and holds all logits: the oracle.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Bool, Float

from vlpjax.errors import UserError
from vlpjax.mesh import active_layout, active_platform
from vlpjax.parallel import attention, chunked, tpu_flash, tpu_short
from vlpjax.parallel.attention import Attended, Interval
from vlpjax.parallel.flash import Flash, Places, batch_axes, flash, repeat_heads
from vlpjax.parallel.tpu_kernels import LANES
from vlpjax.parallel.tpu_tiles import Tiles

Kind = Literal["full", "causal"]

# Logits of one head (queries x keys) up to which the dense form is the fastest one.
SHORT = {"cpu": 1024 * 1024, "gpu": 512 * 512, "tpu": 512 * 512}
PADDING = 1.75  # logits with padding, over logits, from which on the kernels for short sequences lose
SCALAR_MEMORY = 2**20 * 3 // 4  # bytes of a TPU core's scalar memory that tables may take

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What is asked of attention; known when a program is traced.

    Attributes:
      platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
      dtypes: of queries, keys and values; equal ones once.
      queries, keys, heads, kv_heads, head_dim: sizes.
      rows: different intervals, on each device: one, or one per example.
      kind: what the interval is, if the caller said so; None is an interval that is known by its numbers only.
      mask, bias, weights: whether they are given or asked for.
      soft_cap: of the logits.
    """

    platform: str
    dtypes: tuple[str, ...]
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    rows: int = 1
    kind: Kind | None = None
    mask: bool = False
    bias: bool = False
    weights: bool = False
    soft_cap: float | None = None


class Backend(Protocol):
    """A form of attention."""

    @property
    def name(self) -> str: ...

    def supports(self, request: Request) -> str | None:
        """None, or why not."""

    def run(
        self, query: jax.Array, key: jax.Array, value: jax.Array, interval: Interval | None, options: Options
    ) -> Attended:
        """Attends."""


class Options(NamedTuple):
    """The rest of what :func:`attend` takes."""

    kind: Kind | None = None
    mask: jax.Array | None = None
    bias: jax.Array | None = None
    scale: float | None = None
    soft_cap: float | None = None
    weights: bool = False


@dataclass(frozen=True)
class Dense:
    """:func:`vlpjax.parallel.attention.attend`.

    Attributes:
      short: take only what is short.
    """

    short: bool = False
    name: str = "dense"

    def supports(self, request: Request) -> str | None:
        """Everything, or everything that is short."""
        most = SHORT.get(request.platform, SHORT["cpu"])
        if self.short and request.queries * request.keys > most:
            return f"it would hold {request.queries} x {request.keys} logits per head, and more than {most} are slow"
        return None

    def run(
        self, query: jax.Array, key: jax.Array, value: jax.Array, interval: Interval | None, options: Options
    ) -> Attended:
        """Attends."""
        return attention.attend(
            query, key, value, interval,
            mask=options.mask, bias=options.bias, scale=options.scale, soft_cap=options.soft_cap,
            weights=options.weights,
        )  # fmt: skip


class _TwoPasses:
    """A backend with passes of its own forward and backward: define ``form``."""

    @property
    def form(self) -> Flash:
        """Its two passes."""
        raise TypeError(f"{type(self).__name__} must define form.")

    def run(
        self, query: jax.Array, key: jax.Array, value: jax.Array, interval: Interval | None, options: Options
    ) -> Attended:
        """Attends; what the compiler cannot divide, each device does for its own examples and heads."""
        return _flash(self.form, query, key, value, interval, options)


@dataclass(frozen=True)
class Chunked(_TwoPasses):
    """:mod:`vlpjax.parallel.chunked`, any interval.

    Attributes:
      chunk: queries and keys of one product.
    """

    chunk: int = chunked.CHUNK
    name: str = "chunked"

    def supports(self, request: Request) -> str | None:
        """Intervals only."""
        return _interval_only(request)

    @property
    def form(self) -> Flash:
        """Its two passes."""
        run = functools.partial
        return Flash(run(chunked.forward, chunk=self.chunk), run(chunked.backward, chunk=self.chunk))


@dataclass(frozen=True)
class TpuShort(_TwoPasses):
    """:mod:`vlpjax.parallel.tpu_short`, any interval.

    Attributes:
      interpret: run the kernels' bodies as plain JAX, on any platform.
    """

    interpret: bool = False
    name: str = "tpu_short"

    def supports(self, request: Request) -> str | None:
        """Few logits on TPUs, whose heads share no keys."""
        if (reason := _no_kernel(request, self.interpret)) is not None:
            return reason
        if request.soft_cap is not None:
            return "it has no soft cap"
        if request.heads != request.kv_heads:
            return f"its heads have keys of their own, and here {request.heads} share {request.kv_heads}"
        logits, most = request.queries * request.keys, SHORT["tpu"]
        if logits > most:
            return f"it holds all logits of a head, at most {most}, and these are {logits}"
        padded = math.prod(-(-size // LANES) * LANES for size in (request.queries, request.keys))
        if padded > PADDING * logits:
            return f"it computes {padded} logits per head where {logits} are asked for"
        if 4 * request.rows > SCALAR_MEMORY:
            return f"its table takes {4 * request.rows} bytes, and scalar memory holds {SCALAR_MEMORY}"
        return None

    @property
    def form(self) -> Flash:
        """Its two passes."""
        run = functools.partial
        settings: dict[str, Any] = dict(interpret=self.interpret)
        return Flash(run(tpu_short.forward, **settings), run(tpu_short.backward, **settings), by_device=True)


@dataclass(frozen=True)
class TpuFlash(_TwoPasses):
    """:mod:`vlpjax.parallel.tpu_flash`, any interval.

    Attributes:
      tiles: of the kernels.
      interpret: run the kernels' bodies as plain JAX, on any platform.
    """

    tiles: Tiles = tpu_flash.TILES
    interpret: bool = False
    name: str = "tpu_flash"

    def supports(self, request: Request) -> str | None:
        """Intervals on TPUs, in the types that its products have."""
        if (reason := _no_kernel(request, self.interpret)) is not None:
            return reason
        tiles = self.tiles.within(request.queries, request.keys)
        size = request.rows * (16 * -(-request.queries // tiles.query) + 8 * -(-request.keys // tiles.key))
        if size > SCALAR_MEMORY:
            return f"its tables take {size} bytes, and scalar memory holds {SCALAR_MEMORY}"
        return None

    @property
    def form(self) -> Flash:
        """Its two passes."""
        run = functools.partial
        settings: dict[str, Any] = dict(tiles=self.tiles, interpret=self.interpret)
        return Flash(run(tpu_flash.forward, **settings), run(tpu_flash.backward, **settings), by_device=True)


@dataclass(frozen=True)
class Splash:
    """JAX's own kernel for TPUs, ``jax.experimental.pallas.ops.tpu.splash_attention``: plain causal and full attention.

    Attributes:
      interpret: run the kernel's body as plain JAX, on any platform.
    """

    interpret: bool = False
    name: str = "splash"

    def supports(self, request: Request) -> str | None:
        """Whole tiles, and masks that the caller has a word for."""
        if request.platform != "tpu" and not self.interpret:
            return f"it needs a TPU, and this is a {request.platform}"
        if (reason := _plain_only(request)) is not None:
            return reason
        if request.queries % 128 or request.keys % 128 or request.head_dim % 128:
            shape = f"{request.queries} x {request.keys} x {request.head_dim}"
            return f"queries, keys and head_dim must be multiples of 128, and these are {shape}"
        return None

    def run(
        self, query: jax.Array, key: jax.Array, value: jax.Array, interval: Interval | None, options: Options
    ) -> Attended:
        """Attends, each device to its own examples and heads."""

        def own(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
            shape = (query.shape[1], key.shape[1])
            mask = splash_mask.CausalMask(shape) if options.kind == "causal" else splash_mask.FullMask(shape)
            kernel = splash.make_splash_mha_single_device(
                splash_mask.MultiHeadMask([mask] * query.shape[2]),
                attn_logits_soft_cap=options.soft_cap,
                interpret=self.interpret,
            )
            arrays = (jnp.swapaxes(x, 1, 2) for x in (query * _scale(query, options), key, value))
            return jnp.swapaxes(jax.vmap(kernel)(*arrays), 1, 2)

        layout = active_layout()
        if layout is None:
            return Attended(own(query, key, value), None)
        key, value = (repeat_heads(layout, x, query.shape[2]) for x in (key, value))
        at = Places.of(layout, query, key, _everything(query, key))
        return Attended(at.map(own, (at.tokens,) * 3, at.tokens)(query, key, value), None)


@dataclass(frozen=True)
class Cudnn:
    """``jax.nn.dot_product_attention`` on GPUs: plain causal and full attention.

    It has no argument for packed documents, so nothing is given to it whose mask has no name.

    Attributes:
      implementation: of that function; ``"xla"`` runs anywhere.
    """

    implementation: Literal["cudnn", "xla"] = "cudnn"
    name: str = "cudnn"

    def supports(self, request: Request) -> str | None:
        """The types and sizes of cuDNN's flash attention, and masks that the caller has a word for."""
        if request.platform != "gpu" and self.implementation == "cudnn":
            return f"it needs a GPU, and this is a {request.platform}"
        if (reason := _plain_only(request)) is not None:
            return reason
        if request.soft_cap is not None:
            return "it has no soft cap"
        if request.dtypes not in (("bfloat16",), ("float16",)):
            return f"it takes bfloat16 or float16, and these are {' and '.join(request.dtypes)}"
        if request.head_dim > 128 or request.head_dim % 8:
            return f"head_dim must be a multiple of 8 up to 128, and it is {request.head_dim}"
        return None

    def run(
        self, query: jax.Array, key: jax.Array, value: jax.Array, interval: Interval | None, options: Options
    ) -> Attended:
        """Attends."""
        mixed: jax.Array = jax.nn.dot_product_attention(
            query, key, value,
            scale=options.scale, is_causal=options.kind == "causal", implementation=self.implementation,
        )  # fmt: skip
        return Attended(mixed, None)


BACKENDS: tuple[Backend, ...] = (
    Cudnn(), TpuShort(), Dense(short=True), TpuFlash(), Splash(), Chunked(), Dense(),
)  # fmt: skip
# Those that give the log of the softmax's sum too, by which parts of the keys are put together.
WITH_SUMS: tuple[Backend, ...] = (TpuFlash(), Chunked())


class Choice(NamedTuple):
    """What :func:`choose` decided: the form, and why those before it were passed over."""

    backend: Backend
    skipped: dict[str, str]


def choose(request: Request, backend: str | Backend | None = None) -> Choice:
    """The first of :data:`BACKENDS` that does what is asked, or the one that is named.

    The choice is logged, once per request; that attention over many tokens falls back to a form that holds all logits
    is a warning.

    Raises:
      UserError: an unknown name, or one that does not do what is asked.
    """
    if isinstance(backend, str):
        named = {form.name: form for form in BACKENDS}
        if backend not in named:
            raise UserError(f"There is no attention backend {backend!r}; there are {', '.join(named)}.")
        backend = named[backend]
    if backend is not None:
        if (reason := backend.supports(request)) is not None:
            raise UserError(f"The attention backend {backend.name!r} cannot do this: {reason}.")
        return Choice(backend, {})
    return _first(request, BACKENDS)


@functools.cache
def _first(request: Request, forms: tuple[Backend, ...]) -> Choice:
    """The first that does what is asked; logged, and therefore remembered."""
    reasons = [(form, form.supports(request)) for form in forms]
    chosen = next(form for form, reason in reasons if reason is None)
    before = reasons[: [form for form, _ in reasons].index(chosen)]
    skipped = {form.name: reason for form, reason in before if reason is not None}
    level = logging.WARNING if chosen == Dense() else logging.INFO
    why = "".join(f"; not {name}: {reason}" for name, reason in skipped.items())
    sizes = f"{request.queries} x {request.keys} tokens, {request.heads} heads of {request.head_dim}"
    logger.log(level, "attention of %s on %s: %s%s", sizes, request.platform, chosen.name, why)
    return Choice(chosen, skipped)


def attend(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    interval: Interval | None = None,
    *,
    kind: Kind | None = None,
    mask: Bool[Array, "#batch queries keys"] | None = None,
    bias: Float[Array, "#batch heads queries keys"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    weights: bool = False,
    backend: str | Backend | None = None,
) -> Attended:
    """Attention by the form that fits best.

    Args:
      query, key, value, interval, mask, bias, scale, soft_cap, weights: as in
        :func:`vlpjax.parallel.attention.attend`.
      kind: what ``interval`` is, where there is a word for it: some forms can do nothing else.  Without an interval it
        is ``"full"``; it says nothing that the interval does not say.
      backend: a form, or its name, instead of the one that fits best.

    Raises:
      UserError: a named form that cannot do what is asked.
    """
    kind = "full" if interval is None else kind
    layout = active_layout()
    rows = 1 if interval is None else max(edge.shape[0] for edge in interval)
    if layout is not None and rows > 1:
        rows //= math.prod(layout.mesh.shape[axis] for axis in batch_axes(layout, query.shape[0]))
    request = Request(
        platform=active_platform(),
        dtypes=tuple(dict.fromkeys(str(x.dtype) for x in (query, key, value))),
        queries=query.shape[1],
        keys=key.shape[1],
        heads=query.shape[2],
        kv_heads=key.shape[2],
        head_dim=query.shape[3],
        rows=rows,
        kind=kind,
        mask=mask is not None,
        bias=bias is not None,
        weights=weights,
        soft_cap=soft_cap,
    )
    options = Options(kind, mask, bias, scale, soft_cap, weights)
    return choose(request, backend).backend.run(query, key, value, interval, options)


def on_device(query: jax.Array, key: jax.Array, *, queries: int, keys: int, rows: int) -> Flash:
    """The form for what each device does of attention whose collectives are written out, under any interval.

    Args:
      query, key: of all devices.
      queries, keys: tokens of a row that a device has at a time.
      rows: different intervals on a device.
    """
    request = Request(
        platform=active_platform(),
        dtypes=tuple(dict.fromkeys(str(x.dtype) for x in (query, key))),
        queries=queries,
        keys=keys,
        heads=query.shape[2],
        kv_heads=key.shape[2],
        head_dim=query.shape[3],
        rows=rows,
    )
    form = _first(request, WITH_SUMS).backend
    assert isinstance(form, TpuFlash | Chunked)
    return form.form


def _interval_only(request: Request) -> str | None:
    """Why a form that masks by intervals refuses."""
    asked = [name for name in ("mask", "bias", "weights") if getattr(request, name)]
    words = {"mask": "a mask in booleans", "bias": "a bias", "weights": "the weights"}
    return f"it knows intervals, and {words[asked[0]]} is asked for" if asked else None


def _no_kernel(request: Request, interpret: bool) -> str | None:
    """Why our kernels for TPUs refuse, whatever the sizes."""
    if request.platform != "tpu" and not interpret:
        return f"it needs a TPU, and this is a {request.platform}"
    if (reason := _interval_only(request)) is not None:
        return reason
    if request.dtypes not in (("bfloat16",), ("float32",)):
        return f"it takes bfloat16 or float32, and these are {' and '.join(request.dtypes)}"
    if request.head_dim > 256:
        return f"its tiles hold heads of up to 256, and these have {request.head_dim}"
    return None


def _plain_only(request: Request) -> str | None:
    """Why a form that masks nothing but the future refuses."""
    if request.kind is None:
        return "it masks nothing but the future, and the interval may be anything"
    if request.kind == "causal" and request.queries != request.keys:
        return f"causal means as many queries as keys, and these are {request.queries} and {request.keys}"
    return _interval_only(request)


def _everything(query: jax.Array, key: jax.Array) -> Interval:
    """Every query sees every key."""
    start = jnp.zeros((1, query.shape[1]), jnp.int32)
    return Interval(start, jnp.full_like(start, key.shape[1]))


def _scale(query: jax.Array, options: Options) -> float:
    return query.shape[-1] ** -0.5 if options.scale is None else options.scale


def _flash(
    form: Flash,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    interval: Interval | None,
    options: Options,
) -> Attended:
    interval = _everything(query, key) if interval is None else interval
    scale = _scale(query, options)
    return Attended(flash(form, query, key, value, interval, scale=scale, soft_cap=options.soft_cap), None)

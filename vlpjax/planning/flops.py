"""FLOPs of a model's own arithmetic, counted from its trace: matrix products and convolutions, nothing else.

A product of [m, k] with [k, n] is 2 m k n FLOPs.  In training it counts once for the forward pass and once more for
each of its two operands that a gradient flows to: three times for a layer that learns, twice for the first layer (its
input is data) or for a frozen layer that gradients pass through, once for a teacher.  What is computed again to save
memory never counts, so that a utilisation is one of useful work.  Products over two or more batch dimensions are those
of queries with keys and of weights with values: of them only the share of pairs that masks let through counts, which
the experiment states.  (The rule for layers is that of "PaLM", arXiv 2204.02311, appendix B, taken product by product.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

BATCH_DIMENSIONS_OF_ATTENTION = 2  # a batch of examples and its heads


@dataclass(frozen=True)
class Flops:
    """FLOPs of one step, by what they are.

    Attributes:
      products: of layers.
      attention: of queries with keys and of weights with values, all pairs counted.
      forward: both of the above in the forward pass alone.
      endless: loops with a number of turns that depends on data; they are counted as one turn.
    """

    products: float = 0.0
    attention: float = 0.0
    forward: float = 0.0
    endless: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(
            self.products + other.products,
            self.attention + other.attention,
            self.forward + other.forward,
            self.endless + other.endless,
        )

    def __mul__(self, times: int) -> Flops:
        return Flops(self.products * times, self.attention * times, self.forward * times, self.endless)

    def total(self, attention_share: float) -> float:
        """All FLOPs, with the share of query-key pairs that masks let through."""
        return self.products + attention_share * self.attention


def count(function: Callable[..., Any], arguments: Sequence[Any], trained: Sequence[Any]) -> Flops:
    """FLOPs of a training step whose loss is ``function(*arguments)``.

    Args:
      function: pure, of trees of arrays; returns the loss alone.
      arguments: shapes are enough.
      trained: trees like ``arguments`` of booleans: which arrays learn, so that gradients flow to them.
    """
    traced = jax.make_jaxpr(function)(*arguments)
    learns = [bool(mark) for mark in jax.tree.leaves(tuple(trained))]
    return _count(traced.jaxpr, learns, [True] * len(traced.jaxpr.outvars))[0]


def _count(jaxpr: Any, learns: Sequence[bool], wanted: Sequence[bool]) -> tuple[Flops, list[bool]]:
    """FLOPs of a program, and to which inputs a gradient flows.

    Args:
      learns: which inputs depend on what is trained.
      wanted: to which results a gradient comes.
    """
    depends = _depends(jaxpr, learns)
    reached = {
        variable
        for variable, mark in zip(jaxpr.outvars, wanted, strict=True)
        if mark and not _literal(variable)
    }
    total = Flops()
    for equation in reversed(jaxpr.eqns):
        inputs = [
            depends.get(variable, False) if not _literal(variable) else False for variable in equation.invars
        ]
        outputs = [variable in reached and depends.get(variable, False) for variable in equation.outvars]
        flops, flowing = _equation(equation, inputs, outputs)
        total = total + flops
        reached |= {variable for variable, mark in zip(equation.invars, flowing, strict=True) if mark}
    return total, [variable in reached for variable in jaxpr.invars]


def _depends(jaxpr: Any, learns: Sequence[bool]) -> dict[Any, bool]:
    """Which variables of a program depend on what is trained, in a way that has a derivative."""
    depends: dict[Any, bool] = dict(zip(jaxpr.invars, learns, strict=True))
    for equation in jaxpr.eqns:
        inputs = [not _literal(variable) and depends.get(variable, False) for variable in equation.invars]
        for variable, mark in zip(equation.outvars, _outputs(equation, inputs), strict=True):
            depends[variable] = mark and jnp.issubdtype(variable.aval.dtype, jnp.inexact)
    return depends


def _outputs(equation: Any, inputs: list[bool]) -> list[bool]:
    """Which results of an instruction depend on what is trained."""
    results, params = len(equation.outvars), equation.params
    if equation.primitive.name == "stop_gradient" or not any(inputs):
        return [False] * results
    inner = _inner(equation)
    if equation.primitive.name == "scan":
        marks = list(inputs)
        carry = slice(params["num_consts"], params["num_consts"] + params["num_carry"])
        while True:
            found = _results(inner, marks)
            grown = [a or b for a, b in zip(marks[carry], found[: params["num_carry"]], strict=True)]
            if grown == marks[carry]:
                return found
            marks[carry] = grown
    if inner is None or len(inner.outvars) != results:
        return [any(inputs)] * results
    return _results(inner, inputs)


def _results(jaxpr: Any, learns: Sequence[bool]) -> list[bool]:
    depends = _depends(jaxpr, learns)
    return [not _literal(variable) and depends.get(variable, False) for variable in jaxpr.outvars]


def _inner(equation: Any) -> Any | None:
    """The program inside an instruction, if it takes the same inputs."""
    if equation.primitive.name == "pallas_call":
        return None
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    inside = next((equation.params[name] for name in names if name in equation.params), None)
    inner = getattr(inside, "jaxpr", inside)
    return inner if inner is not None and len(inner.invars) == len(equation.invars) else None


def _equation(equation: Any, inputs: list[bool], outputs: list[bool]) -> tuple[Flops, list[bool]]:
    """FLOPs of an instruction, and to which of its inputs a gradient flows, from those of its results."""
    name, params = equation.primitive.name, equation.params
    flowing = [mark and any(outputs) for mark in inputs]
    if name == "stop_gradient":
        return Flops(), [False] * len(inputs)
    if name in ("dot_general", "conv_general_dilated"):
        return _product(equation, 1 + sum(flowing[:2])), flowing
    if name == "cond":
        branches = [_count(branch.jaxpr, inputs[1:], outputs) for branch in params["branches"]]
        longest = max((flops for flops, _ in branches), key=lambda flops: flops.total(1.0))
        return longest, [
            False,
            *(any(marks) for marks in zip(*(marks for _, marks in branches), strict=True)),
        ]
    if name == "while":
        body, skipped = params["body_jaxpr"].jaxpr, params["cond_nconsts"]
        flops, _ = _count(body, inputs[skipped:], outputs)
        return flops + Flops(endless=1 if flops.forward else 0), flowing
    inner = _inner(equation)
    if inner is None:
        return Flops(), flowing
    if name == "scan":
        return _scan(params, inner, inputs, outputs)
    if len(inner.outvars) != len(outputs):
        outputs = [any(outputs)] * len(inner.outvars)
    flops, marks = _count(inner, inputs, outputs)
    return flops * (
        params["mesh"].size if name == "shard_map" else 1
    ), marks  # inside stands one device's part


def _scan(params: Any, body: Any, inputs: list[bool], outputs: list[bool]) -> tuple[Flops, list[bool]]:
    """A loop of known length.  What one turn adds to the carry, forward or backward, is there in the next."""
    fixed, carried = params["num_consts"], params["num_carry"]
    carry = slice(fixed, fixed + carried)
    learns, wanted = list(inputs), list(outputs)
    while True:
        flops, flowing = _count(body, learns, wanted)
        results = _results(body, learns)[:carried]
        grown = [a or b for a, b in zip(learns[carry], results, strict=True)]
        needed = [a or b for a, b in zip(wanted[:carried], flowing[carry], strict=True)]
        if grown == learns[carry] and needed == wanted[:carried]:
            return flops * params["length"], flowing
        learns[carry], wanted[:carried] = grown, needed


def _product(equation: Any, times: int) -> Flops:
    """FLOPs of a matrix product or convolution that is done ``times``, once of them in the forward pass."""
    left, right = (variable.aval.shape for variable in equation.invars[:2])
    result = math.prod(equation.outvars[0].aval.shape)
    if equation.primitive.name == "dot_general":
        (contracted, _), (batch, _) = equation.params["dimension_numbers"]
        forward = 2.0 * result * math.prod(left[axis] for axis in contracted)
        if len(batch) >= BATCH_DIMENSIONS_OF_ATTENTION:
            return Flops(attention=forward * times, forward=forward)
        return Flops(products=forward * times, forward=forward)
    kernel = equation.params["dimension_numbers"].rhs_spec  # output features, input features, space
    forward = 2.0 * result * math.prod(right) / right[kernel[0]]
    return Flops(products=forward * times, forward=forward)


def _literal(variable: Any) -> bool:
    return isinstance(variable, core.Literal)

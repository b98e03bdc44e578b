"""FLOPs of matrix products and convolutions in a compiled program; the TPU compiler writes all as convolutions.

What falls on padding or on the holes of a dilated operand is not counted: a batched matrix product becomes a
convolution in which nearly everything else would be.
"""

from __future__ import annotations

import functools
import math
import re

import numpy as np

from vlpjax.planning.hlo import Computation, Instruction, Program, Shape


def product_flops(program: Program, computation: Computation, item: Instruction) -> float:
    """FLOPs of one execution of an instruction: a product, or a fusion that holds some."""
    if item.opcode == "fusion" and item.called:
        inside = program[item.called[0]]
        return sum(product_flops(program, inside, one) for one in inside.instructions.values())
    if item.opcode not in ("dot", "convolution"):
        return 0.0
    shapes = [shape for name in item.operands for shape in computation.instructions[name].shapes[:1]]
    if item.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", item.attributes)
        axes = [int(axis) for axis in (contracted[1] if contracted else "").split(",") if axis]
        return 2.0 * math.prod(item.shapes[0].sizes) * math.prod(shapes[0].sizes[axis] for axis in axes)
    return _convolution(item, shapes[0], shapes[1])


def _convolution(item: Instruction, left: Shape, right: Shape) -> float:
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", item.attributes)
    assert labels is not None, "every convolution says which dimension is what"
    lhs, rhs, out = labels[1], labels[2], labels[3]
    result = item.shapes[0].sizes
    groups = int(item.attribute("batch_group_count") or 1)
    positions = 1.0
    for place, symbol in enumerate(sorted(set(lhs) - {"b", "f"})):
        window = {
            name: _window(item, name, place) for name in ("size", "stride", "pad", "lhs_dilate", "rhs_dilate")
        }
        positions *= _valid(
            left.sizes[lhs.index(symbol)],
            right.sizes[rhs.index(symbol)],
            result[out.index(symbol)],
            window["stride"] or 1,
            window["pad"] or 0,
            window["lhs_dilate"] or 1,
            window["rhs_dilate"] or 1,
            "rhs_reversal" in item.attributes and bool(_window(item, "rhs_reversal", place)),
        )
    batch = left.sizes[lhs.index("b")] / groups
    return 2.0 * batch * result[out.index("f")] * right.sizes[rhs.index("i")] * positions


def _window(item: Instruction, name: str, place: int) -> int | None:
    """A number of the window, of one dimension; of the two paddings the lower one."""
    window = re.search(r"window=\{([^}]*)\}", item.attributes)
    found = re.search(rf"\b{name}=(\S+)", window[1]) if window else None
    return int(found[1].split("x")[place].split("_")[0]) if found else None


@functools.cache
def _valid(
    size: int, window: int, result: int, stride: int, pad: int, dilate: int, window_dilate: int, reverse: bool
) -> int:
    """Pairs of a result's place and a window's place that meet an element of the input."""
    places = np.arange(result, dtype=np.int64)[:, None] * stride - pad
    steps = np.arange(window, dtype=np.int64)[None] * window_dilate
    index = places + (steps[:, ::-1] if reverse else steps)
    return int(np.sum((index >= 0) & (index <= (size - 1) * dilate) & (index % dilate == 0)))

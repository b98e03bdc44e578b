"""What attention over sequence ranks costs on paper, by scheme and length of the rows: memory, bytes, time.

    python tools/sequence_schemes.py --config=experiments/decoders/long_video.py:paper --chip=v5p --chips=256

Every chip has ``--tokens`` tokens of one row, so longer rows lie over more chips and there are fewer of them.  Up to
``--ulysses`` neighbours trade tokens for heads in the schemes that do so within a group (``ulysses_gather``,
``ulysses_ring``); in ``ulysses`` all ranks of a row do.  A layer's figures are those of :mod:`vlpjax.parallel.cost`,
forward and backward, per chip.  A step's time is that of all layers, and of the products with the decoder's weights at
``--products`` of the peak, each done four times: forward, again in the backward pass, and by both operands.  Memory is
the state (parameters, two moments and gradients in float32, a piece on each chip), what the layers keep (their input,
attention's output, keys and values in bfloat16), and the buffers of one layer's attention.  The scheme that
:func:`vlpjax.parallel.cost.choose` picks is marked, with how much slower it is than the fastest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works from a checkout that is not installed

from vlpjax.config import build, load
from vlpjax.errors import UserError, tells_mistakes
from vlpjax.hardware import Chip, chip_named
from vlpjax.models.decoder import Decoder
from vlpjax.parallel.cost import EFFICIENCY, Estimate, Problem, choose, estimate
from vlpjax.parallel.sequence import SCHEMES

LENGTHS = tuple(2**power for power in range(16, 22))


class Cell(NamedTuple):
    """A scheme at a length.

    Attributes:
      length: tokens of a row; ``ranks`` chips share it.
      layer: what attention costs in a layer.
      memory: bytes per chip, in all.
      step: seconds.
      picked: whether the cost model takes this scheme.
    """

    length: int
    ranks: int
    layer: Estimate
    memory: float
    step: float
    picked: bool


def weights_of(decoder: Decoder) -> float:
    """Elements of the matrices that tokens are multiplied with, those of all layers and the vocabulary's."""
    head_dim = decoder.head_dim or decoder.width // decoder.heads
    heads = 2 * (decoder.heads + (decoder.kv_heads or decoder.heads)) * head_dim
    hidden = (2 + decoder.gated) * (decoder.mlp_dim or 4 * decoder.width)
    return decoder.width * (decoder.depth * (heads + hidden) + decoder.vocabulary)


def problem_of(decoder: Decoder, length: int, tokens: int, ulysses: int) -> Problem:
    """Causal attention of a layer, on as many chips as have ``tokens`` tokens each.

    Raises:
      UserError: a length that is no multiple of the tokens.
    """
    if length % tokens:
        raise UserError(f"A row of {length} tokens does not divide into {tokens} tokens per chip.")
    inner = min(ulysses, length // tokens)
    return Problem(
        1, length, decoder.heads, decoder.kv_heads or decoder.heads, decoder.head_dim or decoder.width // decoder.heads,
        length // tokens // inner, inner,
    )  # fmt: skip


def cells(decoder: Decoder, length: int, chip: Chip, options: argparse.Namespace) -> list[Cell]:
    """All schemes at a length."""
    tokens = options.tokens
    problem = problem_of(decoder, length, tokens, options.ulysses)
    picked = choose(problem, chip, efficiency=options.efficiency).scheme
    head_dim = decoder.head_dim or decoder.width // decoder.heads
    kept = decoder.width + (problem.heads + 2 * problem.kv_heads) * head_dim
    embedding = 0 if decoder.tied else decoder.width * decoder.vocabulary
    state = 16 * (weights_of(decoder) + embedding) / options.chips
    held = state + decoder.depth * tokens * kept * problem.item
    rest = 8 * weights_of(decoder) * tokens / (chip.bf16_flops * options.products)
    found = []
    for scheme in SCHEMES:
        layer = estimate(problem, scheme, chip, options.efficiency)
        step = decoder.depth * layer.time + rest
        found.append(Cell(length, length // tokens, layer, held + layer.memory, step, scheme == picked))
    return found


def table(decoder: Decoder, chip: Chip, options: argparse.Namespace) -> str:
    """The table in lines."""
    lines = [
        f"{'tokens':>10} {'chips':>6} {'rows':>5}   {'scheme':<15}{'moved GB':>10}{'links ms':>10}{'exposed ms':>12}"
        f"{'layer ms':>10}{'buffers GB':>12}{'memory GB':>11}{'step s':>9}",
    ]
    for length in options.lengths:
        row = cells(decoder, length, chip, options)
        best = min(cell.layer.time for cell in row if cell.layer.refused is None)
        for cell in row:
            layer = cell.layer
            head = (
                f"{length:>10,} {cell.ranks:>6} {options.chips // cell.ranks:>5} "
                f"{'*' if cell.picked else ' '} {layer.scheme:<15}"
            )
            if layer.refused is not None:
                lines.append(head + layer.refused)
                continue
            slower = f"   {layer.time / best - 1:.1%} slower than the fastest" if cell.picked else ""
            lines.append(
                f"{head}{layer.moved / 1e9:>10.2f}{layer.links * 1e3:>10.1f}{layer.exposed * 1e3:>12.1f}"
                f"{layer.time * 1e3:>10.1f}{layer.memory / 1e9:>12.2f}{cell.memory / 1e9:>11.1f}{cell.step:>9.2f}"
                f"{slower}"
            )
    return "\n".join(lines)


@tells_mistakes
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", required=True, help="FILE[:ARGUMENT] of an experiment with a decoder")
    parser.add_argument("--tower", default="decoder", help="its name among config.towers")
    parser.add_argument("--chip", default="v5p", help="kind of chip")
    parser.add_argument("--chips", type=int, default=256, help="number of chips")
    parser.add_argument("--tokens", type=int, default=8192, help="of each chip")
    parser.add_argument("--ulysses", type=int, default=8, help="neighbours that trade tokens for heads")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)), help="tokens of a row")
    parser.add_argument("--efficiency", type=float, default=EFFICIENCY, help="of attention kernels")
    parser.add_argument("--products", type=float, default=0.9, help="efficiency of products with weights")
    options = parser.parse_args(arguments)
    options.lengths = [int(length) for length in options.lengths.split(",")]
    towers = load(options.config).towers
    if options.tower not in towers:
        raise UserError(f"The experiment has no tower {options.tower!r}; there are {', '.join(towers)}.")
    decoder = build(towers[options.tower])
    if not isinstance(decoder, Decoder):
        raise UserError(f"The tower {options.tower!r} is no decoder; name one with --tower.")
    print(table(decoder, chip_named(options.chip), options))
    return 0


if __name__ == "__main__":
    sys.exit(main())

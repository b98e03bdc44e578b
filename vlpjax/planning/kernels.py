"""What our attention kernels take, by the compiler's own schedule of their inner loops.

The compiler estimates cycles for its own instructions and none for kernels.  But a kernel's program is a list of
instruction bundles, one a cycle, that the compiler has packed for the units of the chip; the loop over heads, which
computes one tile of logits per turn, is nearly all of it.  ``tools/kernel_cycles.py`` compiles the kernels and counts;
its result is the table here.  Where the matrix units need longer than the bundles, they decide: heads of 128 features
fill half of a unit of 256 x 256, which is why attention runs at half of a v6e's peak at best.

Left out are what is done once per grid step, and waiting for memory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

LANES = 128


@dataclass(frozen=True)
class Tile:
    """A turn of a kernel's loop: a tile of logits of one head.

    Attributes:
      queries, keys: of the tile.
      whole, masked: cycles on one core for a tile of which nothing is hidden, and for another.
      skips: tiles that are hidden altogether cost nothing.
    """

    queries: int
    keys: int
    whole: int
    masked: int
    skips: bool = True

    def cycles(self, pairs: float, keys: int, share: float) -> float:
        """Of ``pairs`` logits in rows over ``keys``, of which masks let a share through.

        With a share below 1, tiles on the edge of what is seen are taken to be as many as under a causal mask: one per
        row of tiles.
        """
        edge = min(1.0, self.keys / keys) if share < 1 else 0.0
        live = min(1.0, share + edge / 2) if self.skips else 1.0
        masked = min(live, edge) if self.skips else float(share < 1)
        return pairs / (self.queries * self.keys) * (live * self.whole + masked * (self.masked - self.whole))


@dataclass(frozen=True)
class Core:
    """What kernels run on.

    Attributes:
      cores: that share the grid steps of a kernel, of one device.
      side: of the matrix units.
      tiles: expression of a kernel's name -> what a turn of its loop takes, for heads of up to 128 features.
    """

    cores: int
    side: int
    tiles: Mapping[str, Tile]

    def cycles(
        self, name: str, products: int, pairs: float, keys: int, head_dim: int, share: float, rate: float
    ) -> float | None:
        """Cycles of a device for a kernel, or None where its loop is not known.

        Args:
          products: per pair of query and key.
          pairs: of queries and keys, in all heads, hidden ones too.
          share: of them that masks let through.
          rate: FLOPs of the device per cycle.
        """
        tile = next((tile for pattern, tile in self.tiles.items() if re.search(pattern, name)), None)
        if tile is None or head_dim > LANES:
            return None
        width = -(-head_dim // self.side) * self.side
        bundles = tile.cycles(pairs, keys, share)
        live = min(bundles / tile.whole * tile.queries * tile.keys, pairs)  # logits, masked ones dearer
        return max(bundles / self.cores, 2.0 * products * width * live / rate)


def _flash(forward: tuple[int, int], query: tuple[int, int], key_value: tuple[int, int]) -> dict[str, Tile]:
    """The (whole, masked) cycles of the kernels for long rows."""
    return {
        "interval_flash_forward": Tile(512, 1024, *forward),
        "interval_flash_query_gradient": Tile(512, 1024, *query),
        "interval_flash_key_value_gradient": Tile(512, 1024, *key_value),
    }


def _short(forward: tuple[int, int], backward: tuple[int, int]) -> dict[str, Tile]:
    """Those of the kernels for short sequences, which hold all logits."""
    return {
        "short_attention_forward": Tile(256, 256, *forward, skips=False),
        "short_attention_backward": Tile(256, 256, *backward, skips=False),
    }


# Counted by ``python tools/kernel_cycles.py``; what is not here has the efficiency that the config states.
CORES = {
    "v5e": Core(
        1,
        128,
        _flash((2268, 2522), (2644, 2761), (3774, 4065)) | _short((539, 846), (786, 833)),
    ),
    "v5p": Core(2, 128, _flash((2275, 2502), (2718, 2735), (3808, 4042))),
    "v6e": Core(
        1,
        256,
        _flash((1623, 2001), (1688, 2144), (2189, 2709)) | _short((531, 668), (707, 726)),
    ),
}

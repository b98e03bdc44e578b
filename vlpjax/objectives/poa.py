"""POA: self-distillation of a network and, at every step, of one of its sub-networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from vlpjax.errors import UserError
from vlpjax.models.elastic import ElasticViT, Size
from vlpjax.objectives.base import Context, Loss
from vlpjax.objectives.crops import entropies
from vlpjax.objectives.ibot import IBOT
from vlpjax.objectives.koleo import koleo


@dataclass(frozen=True)
class POA(IBOT):
    """iBOT with three branches: the teacher, the whole student, and a sub-network of the student of the step's size.

    L = s [DINO(S, T) + iBOT(S, T)] + (1 - s) [DINO(E, T) + iBOT(E, T)] + (1 - s) CE(S, E) + koleo (K(S) + K(E)) / 2,
    with s = ``share``.  The last cross-entropy teaches the sub-network what the whole student says of the very same
    crop; both at ``student_temperature``, without gradient to the whole student.  All terms are means over several
    heads with different numbers of prototypes, which class tokens and patches share.

    The sizes of an experiment are walked through without repetition in an order that changes with every round, each
    as often as :func:`multiplicities` says.  The tower is a :class:`vlpjax.models.elastic.ElasticViT`.

    Attributes:
      head_prototypes: prototypes of each head; ``prototypes`` and ``patch_prototypes`` are not used.
      widths: smallest and largest, and their steps, the width of a head.
      depths: smallest and largest.
      share: weight of the whole student.

    Source: "POA: Pre-training Once for Models of All Sizes", arXiv 2408.01031, sections 3.2 and 3.3.
    """

    head_prototypes: tuple[int, ...] = (8192, 16384, 32768, 65536)
    widths: tuple[int, int, int] = (384, 1024, 64)
    depths: tuple[int, int] = (12, 24)
    share: float = 0.8
    centring: str = "sinkhorn"
    koleo: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.centring == "mean":
            raise UserError("POA.centring is 'mean', but its several heads keep no centres; take 'sinkhorn'.")
        if self.patch_prototypes is not None or not self.head_prototypes:
            raise UserError("POA's heads are head_prototypes, for class tokens and patches alike; name them.")

    def heads(self) -> dict[str, nn.Module]:
        return {f"head_{at}": self._head(count) for at, count in enumerate(self.head_prototypes)}

    def encode(self, context: Context) -> dict[str, jax.Array]:
        self._check_tower(context.student[self.tower])
        whole = super().encode(context)
        seen = context.encode_views(self.tower, self.global_views, teacher=self.teacher)  # remembered
        hidden, places, _ = self.masked_places(context, seen["tokens"].shape[2])  # the same draw
        masked, elastic = self.crops(
            context, f"{context.objective}/elastic", dict(masked=hidden), size=self.size(context)
        )
        patches = jnp.take_along_axis(masked["tokens"], places[..., None], axis=2)
        return {**whole, "elastic": elastic, "elastic_patches": patches}

    def compare(self, features: dict[str, jax.Array], context: Context) -> Loss:
        terms = [self._terms(features, f"head_{at}", context) for at in range(len(self.head_prototypes))]
        metrics = {name: jnp.mean(jnp.stack([term[name] for term in terms])) for name in terms[0]}
        weight = self.patch_weight_now(context)
        whole = metrics["class"] + weight * metrics["patches"]
        elastic = metrics["elastic_class"] + weight * metrics["elastic_patches"] + metrics["elastic_student"]
        large = range(len(self.global_views))
        spread = sum(
            (koleo(features[name][:, view]) for name in ("student", "elastic") for view in large),
            jnp.zeros(()),
        )
        value = self.share * whole + (1 - self.share) * elastic + self.koleo * spread / 2
        size = self.size(context)
        drawn = {"width": jnp.float32(size.width), "depth": jnp.float32(size.depth)}
        return Loss(value, {**metrics, **drawn}, context.state)

    def size(self, context: Context) -> Size:
        """The sub-network of this step."""
        sizes = jnp.asarray(size_list(self.widths, self.depths), jnp.int32)  # [S, 2]
        cycle, place = context.step // len(sizes), context.step % len(sizes)
        order = jax.random.permutation(jax.random.fold_in(context.run_key("sizes"), cycle), len(sizes))
        width, depth = sizes[order[place]]
        return Size(width, depth)

    def _check_tower(self, tower: Any) -> None:
        whole = self.widths[1], self.depths[1]
        if not isinstance(tower, ElasticViT) or (tower.tower.width, tower.tower.depth) != whole:
            raise UserError(
                f"POA's tower {self.tower!r} must be an ElasticViT of width {whole[0]} and depth {whole[1]}, the "
                "largest of its widths and depths."
            )

    def _terms(
        self, features: dict[str, jax.Array], head: str, context: Context
    ) -> dict[str, Float[Array, ""]]:
        """All cross-entropies under one head."""
        # A sub-network's features are 0 beyond its width; the head's first layer makes up for that.
        whole = self.widths[1] / self.size(context).width
        elastic = features["elastic"] * whole
        targets, _ = self.class_targets(features["teacher"], context, head)
        student = context.head(head, features["student"], self.frozen(context)) / self.student_temperature
        smaller = context.head(head, elastic, self.frozen(context)) / self.student_temperature  # [B, V, K]
        said = jax.nn.softmax(jax.lax.stop_gradient(student), axis=-1)
        real = jax.lax.stop_gradient(features["real"]) > 0.5
        patch_targets, _ = self.patch_targets(features["teacher_patches"], real, context, {}, head)
        return {
            "class": self.pairs_loss(student, targets),
            "elastic_class": self.pairs_loss(smaller, targets),
            "elastic_student": jnp.mean(
                jax.nn.logsumexp(smaller, axis=-1) - jnp.sum(said * smaller, axis=-1)
            ),
            "patches": self.patch_loss(features["student_patches"], patch_targets, real, context, head),
            "elastic_patches": self.patch_loss(
                features["elastic_patches"] * whole, patch_targets, real, context, head
            ),
            **entropies(targets),
        }


def multiplicities(widths: tuple[int, int, int], depths: tuple[int, int]) -> dict[tuple[int, int], int]:
    """How often each sub-network, by (width, depth), is trained in one round; the whole network is none.

    The rounded product of two weights that fall linearly from 3 for the smallest to 1 for the largest width and depth.

    Source: arXiv 2408.01031, section 3.3.
    """
    sides = [range(widths[0], widths[1] + 1, widths[2]), range(depths[0], depths[1] + 1)]
    if any(len(side) < 2 for side in sides) or (widths[1] - widths[0]) % widths[2]:
        raise UserError(
            f"POA has widths={widths} and depths={depths}; both go from a smaller to a larger size, widths in "
            "steps that reach the largest."
        )
    falling = [dict(zip(side, np.linspace(3, 1, len(side)), strict=True)) for side in sides]
    counts = {
        (width, depth): int(np.floor(by_width * by_depth + 0.5))
        for width, by_width in falling[0].items()
        for depth, by_depth in falling[1].items()
    }
    del counts[widths[1], depths[1]]
    return counts


def size_list(widths: tuple[int, int, int], depths: tuple[int, int]) -> np.ndarray:
    """One round: every size as often as it is trained, in a fixed order; [sizes, 2]."""
    counted = multiplicities(widths, depths)
    return np.asarray([size for size, count in counted.items() for _ in range(count)], np.int32)

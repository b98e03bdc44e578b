"""``Locked``: a pretrained tower that only computes features, and what is trained on top of them.

"LiT: Zero-Shot Transfer with Locked-image Text Tuning", arXiv 2111.07991: locking the pretrained tower keeps what it
knows, and saves its backward pass.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from vlpjax.errors import UserError
from vlpjax.models.heads import Projection
from vlpjax.models.layers import norm

STANDARDIZE = ("batch", "layer", None)


class Locked(nn.Module):
    """A tower in evaluation mode and without gradient, and a projection of its features into the joint space.

    The tower's parameters lie under ``tower/`` and keep their values if the optimizer freezes them too, by a rule such
    as ``("image/tower/.*", None)``; without it weight decay would still shrink them.

    Attributes:
      tower: called with ``train=False`` (BatchNorm keeps its running statistics); nothing is differentiated through it.
      embedding: width of the joint space; None projects nothing.
      standardize: how features are made comparable before the projection: ``"batch"``, each feature to mean 0 and
        deviation 1 over the training data (BatchNorm without scale and bias); ``"layer"``, over the features of one
        example; None not at all.
      dropout: in training, share of the features that is zeroed before the projection.
      dtype: compute type of what is trained; None is float32.
    """

    tower: nn.Module
    embedding: int | None = None
    standardize: str | None = "batch"
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, inputs: Array, *args: Any, train: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Calls the tower, whose outputs it returns; ``"embedding"`` [B, E] is then made of ``"pooled"`` [B, D].

        Raises:
          UserError: an unknown ``standardize``.
        """
        if self.standardize not in STANDARDIZE:
            raise UserError(
                f"Locked.standardize is {self.standardize!r}; there are {', '.join(map(repr, STANDARDIZE))}."
            )
        if "train" in inspect.signature(type(self.tower).__call__).parameters:
            kwargs["train"] = False
        outputs = jax.tree.map(jax.lax.stop_gradient, self.tower(inputs, *args, **kwargs))
        features: Float[Array, "batch features"] = outputs["pooled"]
        if self.standardize == "batch":
            features = nn.BatchNorm(
                use_running_average=not train,
                momentum=0.9,
                use_scale=False,
                use_bias=False,
                dtype=self.dtype,
                name="standard",
            )(features)
        elif self.standardize == "layer":
            features = norm("standard", "layer", self.dtype)(features)
        features = nn.Dropout(self.dropout, deterministic=not train)(features)
        if self.embedding is not None:
            features = Projection(self.embedding, self.dtype, name="projection")(features)
        return {**outputs, "embedding": features}

"""``Pretrained``: where a tower of a new run takes its first values from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from flax import linen as nn

from vlpjax.data.paths import resolve_path
from vlpjax.errors import UserError
from vlpjax.models.locked import Locked
from vlpjax.models.towers import Towers
from vlpjax.models.vision_language import VisionLanguageModel
from vlpjax.weights.encoders import hold
from vlpjax.weights.family import boxed_shapes
from vlpjax.weights.importing import family_for, fill_variables
from vlpjax.weights.opening import open_weights

# What a tower may have otherwise than its file: how features are read from it and what stands on top of it.
READOUT = ("embedding", "projection_bias", "pool", "pooler", "classes")


@dataclass(frozen=True)
class Pretrained:
    """Weights for one tower, as :func:`vlpjax.weights.from_pretrained` reads them.

    Of a :class:`~vlpjax.models.locked.Locked` tower they are the tower inside.  A file of several towers (CLIP), or of
    a language model with images (PaliGemma: ``image``, ``connector``, ``decoder``), gives the one of the same name.

    Attributes:
      path: a folder or file of weights.
      family: name of the weights' family, for a file without a config that says it; empty reads the config.
      new: regular expressions of the tower's parameters that the file has no tensor for; they start anew.
      unused: regular expressions of tensors that the tower has no parameter for, such as a classifier's.
    """

    path: str
    family: str = ""
    new: tuple[str, ...] = (r"projection/.*",)
    unused: tuple[str, ...] = ()

    def fill(self, name: str, tower: nn.Module, params: Any, statistics: Any) -> tuple[Any, Any]:
        """The tower's parameters and running statistics with the file's values, lying where they lie.

        Args:
          name: of the tower.
          tower: the module.
          params, statistics: of the tower, as arrays.

        Raises:
          UserError: weights that cannot be read, or that do not fit the tower.
        """
        if isinstance(tower, Locked):
            inner = self.fill(name, tower.tower, params["tower"], statistics.get("tower", {}))
            kept = {**statistics, "tower": inner[1]} if inner[1] else statistics
            return {**params, "tower": inner[0]}, kept
        opened = open_weights(resolve_path(self.path))
        family = family_for(opened, self.family or None)
        built, beside = family.build(opened.config), None
        variables = {"params": params} | ({"batch_stats": statistics} if statistics else {})
        parts, fixed = _parts(built), family.fixed(built)
        several = bool(parts)
        if several:
            if name not in parts:
                raise UserError(f"{self.path} holds the towers {', '.join(parts)}, and none named {name!r}.")
            shapes = boxed_shapes(family, built)
            beside = {
                collection: {other: tree for other, tree in trees.items() if other != name}
                for collection, trees in shapes.items()
            }
            built = parts[name]
            variables = {collection: {name: tree} for collection, tree in variables.items()}
        self._check(name, tower, built)
        family = dataclasses.replace(family, ignored=(*family.ignored, *self.unused))
        new = [f"{name}/{expression}" for expression in self.new] if several else self.new
        filled = fill_variables(family, variables, opened, new, beside, fixed)
        found = {collection: tree[name] if several else tree for collection, tree in filled.items()}
        return found["params"], found.get("batch_stats", statistics)

    def _check(self, name: str, tower: nn.Module, built: nn.Module) -> None:
        """Shapes do not tell a tower with another activation, or with its heads cut otherwise."""
        if type(tower) is not type(built):
            raise UserError(
                f"{self.path} is a {type(built).__name__}, but the tower {name!r} is a {type(tower).__name__}."
            )
        readout = {field: getattr(tower, field) for field in READOUT if hasattr(tower, field)}
        hold(self.path, tower, built.clone(**readout))


def _parts(built: nn.Module) -> dict[str, nn.Module]:
    """The towers of a module of several; none, if it is one."""
    if isinstance(built, Towers):
        return {name: make() for name, make in built.makers.items()}
    if isinstance(built, VisionLanguageModel):
        return {"image": built.image, "connector": built.connector, "decoder": built.decoder}
    return {}

"""``Towers``: all modules of an experiment, the backbones and the heads of objectives, under one roof.

Parameters live under ``<tower>/...``.  Because heads are towers like any other, freezing, learning rates,
sharding, teachers, import and export treat them alike.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flax import linen as nn

from vlpjax.config import suggest
from vlpjax.errors import UserError


class Towers(nn.Module):
    """Named modules, reached as ``towers["image"]``.  Make it with :meth:`of`.

    Attributes:
      makers: per name, a function that makes the module inside this one.  (Modules themselves would be
        adopted by Flax under names of its own.)
    """

    makers: Mapping[str, Callable[[], nn.Module]]

    @classmethod
    def of(cls, modules: Mapping[str, nn.Module]) -> Towers:
        """Towers of these modules.

        Raises:
          UserError: a name that is no identifier or that a Linen module already uses for something else.
        """
        for name in modules:
            if not name.isidentifier() or hasattr(cls, name) or name in ("makers", "name", "parent", "scope"):
                raise UserError(
                    f"{name!r} cannot name a tower; take another identifier, such as 'image' or 'text'."
                )
        return cls({name: module.clone for name, module in modules.items()})

    def setup(self) -> None:
        for name, make in self.makers.items():
            setattr(self, name, make())

    def __contains__(self, name: str) -> bool:
        return name in self.makers

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __getitem__(self, name: str) -> Any:
        if name not in self.makers:
            raise UserError(f"There is no tower {name!r}{suggest(name, self.makers)}.")
        return getattr(self, name)

    def call(self, name: str, *args: Any, train: bool = False, **kwargs: Any) -> Any:
        """Calls a tower, telling it whether it trains if it asks."""
        tower = self[name]
        if "train" in inspect.signature(type(tower).__call__).parameters:
            kwargs["train"] = train
        return tower(*args, **kwargs)

"""Weights in and out: folders of other libraries become modules with variables, and the other way round.

>>> model, variables = from_pretrained("openai/clip-vit-base-patch32")  # a folder on the disk
>>> save_pretrained(model, variables, "my-clip")

What an architecture's tensors are called is data (:mod:`vlpjax.weights.families`), read in both directions.
"""

from __future__ import annotations

from vlpjax.weights.exporting import save_pretrained
from vlpjax.weights.importing import from_pretrained
from vlpjax.weights.preprocessing import Preprocessing

__all__ = ["Preprocessing", "from_pretrained", "save_pretrained"]

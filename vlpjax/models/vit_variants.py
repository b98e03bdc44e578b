"""Published sizes of Vision Transformers, as fields of :class:`vlpjax.models.vit.ViT`."""

from __future__ import annotations

from typing import Any

from vlpjax.errors import UserError

# MLPs are four times as wide as the tower unless a row says otherwise.
_SIZES: dict[str, dict[str, Any]] = {
    # "Scaling Vision Transformers", arXiv 2106.04560, table 2.
    "Ti": dict(width=192, depth=12, heads=3),
    "S": dict(width=384, depth=12, heads=6),
    # "An Image is Worth 16x16 Words", arXiv 2010.11929, table 1.
    "B": dict(width=768, depth=12, heads=12),
    "L": dict(width=1024, depth=24, heads=16),
    "H": dict(width=1280, depth=32, heads=16),
    # "Getting ViT in Shape: Scaling Laws for Compute-Optimal Model Design", arXiv 2305.13035.
    "So400m": dict(width=1152, depth=27, heads=16, mlp_dim=4304),
    # "Scaling Vision Transformers", arXiv 2106.04560, table 2.
    "g": dict(width=1408, depth=40, heads=16, mlp_dim=6144),
    "G": dict(width=1664, depth=48, heads=16, mlp_dim=8192),
    # "SigLIP 2", arXiv 2502.14786: its largest image tower.
    "g-opt": dict(width=1536, depth=40, heads=16, mlp_dim=6144),
    # "DINOv2", arXiv 2304.07193: a gated MLP of two thirds of the usual width.
    "g-swiglu": dict(width=1536, depth=40, heads=24, mlp_dim=4096, activation="silu", gated=True),
}


def variant(name: str) -> dict[str, Any]:
    """The fields of a published size, such as ``variant("S/16")``, to be spread into ``spec(ViT, ...)``.

    Raises:
      UserError: an unknown size, or a patch that is no number.
    """
    size, _, patch = name.partition("/")
    if size not in _SIZES or not patch.isdigit():
        raise UserError(
            f"There is no ViT variant {name!r}; write a size of {', '.join(_SIZES)} and a patch: 'S/16'."
        )
    return {**_SIZES[size], "patch": int(patch)}

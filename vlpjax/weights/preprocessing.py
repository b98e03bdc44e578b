"""``Preprocessing``: how images are made ready for a tower, as it is exchanged beside the weights.

Scores that others cannot reproduce are most often scores of another preprocessing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlpjax.errors import UserError

# Interpolation -> the number that PIL gives it, which is what is written.
RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


@dataclass(frozen=True)
class Preprocessing:
    """From an 8-bit RGB image to the tower's input: resize, crop, scale, subtract the mean, divide.

    Attributes:
      size: height and width that the tower sees, in pixels.
      shortest_edge: length that the shorter side is resized to before the central crop of ``size``; None resizes
        straight to ``size``, whatever the aspect.
      interpolation: a key of :data:`RESAMPLE`.
      value_range: what pixel values 0 and 255 are scaled to.
      mean, std: per channel, of values in ``value_range``.
      resolutions: heights and widths that images of any size are shown in, cut into tiles of ``size``
        (:class:`vlpjax.data.transforms.Tiles`); none: an image is one input.
    """

    size: tuple[int, int]
    shortest_edge: int | None = None
    interpolation: str = "bicubic"
    value_range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)
    resolutions: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.interpolation not in RESAMPLE:
            raise UserError(
                f"Preprocessing.interpolation is {self.interpolation!r}; there are {', '.join(RESAMPLE)}."
            )
        if self.resolutions and (self.size[0] != self.size[1] or self.shortest_edge is not None):
            raise UserError(
                f"Preprocessing.resolutions cuts images into square tiles, but size is {self.size} and "
                f"shortest_edge is {self.shortest_edge}; set a square size and no shortest_edge."
            )

    def to_json(self) -> dict[str, Any]:
        """The fields of ``preprocessor_config.json``.

        That format scales by a factor without an offset; another lower end of ``value_range`` goes into mean and std.
        """
        low, high = self.value_range
        offset, factor = (low, 1 / 255) if low else (0.0, high / 255)
        span = high - low if low else 1.0
        height, width = self.size
        exact = {"height": height, "width": width}
        # Tiles are resized to the size that they have, and cropped to it, which changes nothing.
        shortest = height if self.resolutions else self.shortest_edge
        cropped, kind = (
            shortest is not None,
            "ViTImageProcessor" if shortest is None else "CLIPImageProcessor",
        )
        tiled = {"do_pad": True, "image_grid_pinpoints": [list(size) for size in self.resolutions]}
        return {
            "image_processor_type": "LlavaNextImageProcessor" if self.resolutions else kind,
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": shortest} if cropped else exact,
            "resample": RESAMPLE[self.interpolation],
            **({"do_center_crop": True, "crop_size": exact} if cropped else {}),
            **(tiled if self.resolutions else {}),
            "do_rescale": True,
            "rescale_factor": factor,
            "do_normalize": True,
            "image_mean": [(mean - offset) / span for mean in self.mean],
            "image_std": [std / span for std in self.std],
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Preprocessing:
        """Out of the fields of ``preprocessor_config.json``.

        Raises:
          UserError: fields that say something this class cannot.
        """
        size, crop = fields.get("size", 224), fields.get("crop_size")
        names = {number: name for name, number in RESAMPLE.items()}
        resample = fields.get("resample", RESAMPLE["bicubic"])
        if resample not in names:
            raise UserError(f"resample is {resample!r}; PIL's numbers are {', '.join(map(str, names))}.")
        if not fields.get("do_resize", True):
            raise UserError("do_resize is false: images of any size; set a size that the tower takes.")
        shortest = size.get("shortest_edge") if isinstance(size, Mapping) else None
        if fields.get("do_center_crop"):
            if isinstance(size, int):
                shortest = size
            size = crop if crop is not None else size
        elif shortest is not None:
            size = crop if crop is not None else shortest
        normalize = fields.get("do_normalize", True)
        resolutions = tuple((height, width) for height, width in fields.get("image_grid_pinpoints") or ())
        factor = fields.get("rescale_factor", 1 / 255) if fields.get("do_rescale", True) else 1.0
        return cls(
            size=_pair(size),
            shortest_edge=None if resolutions else shortest,
            interpolation=names[resample],
            value_range=(0.0, 255 * factor),
            mean=tuple(fields["image_mean"]) if normalize and "image_mean" in fields else (0.0, 0.0, 0.0),
            std=tuple(fields["image_std"]) if normalize and "image_std" in fields else (1.0, 1.0, 1.0),
            resolutions=resolutions,
        )


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and {"height", "width"} <= set(size):
        return size["height"], size["width"]
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return size["shortest_edge"], size["shortest_edge"]
    raise UserError(f"The image size {size!r} is neither a number nor {{height, width}}.")

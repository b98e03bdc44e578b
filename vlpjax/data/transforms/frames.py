"""The frames of a video, or the pictures of a text, as one array, checked against the placeholders for them."""

from __future__ import annotations

import dataclasses

import numpy as np
from grain import transforms as grain_transforms
from PIL import Image, ImageOps

from vlpjax.data.bad import BadExample
from vlpjax.data.transforms.fields import Example, require
from vlpjax.data.transforms.images import RESAMPLING, WHITE, Decode, Fill, to_rgb
from vlpjax.errors import UserError

MODES = ("stretch", "pad", "crop")


@dataclasses.dataclass(frozen=True)
class Frames(grain_transforms.Map):
    """A list of pictures, encoded or not -> uint8 [frames, size, size, 3]; rows with fewer are filled up with black.

    A row has one placeholder per visual token of its frames.  One that has another number is left out of training, as
    any broken example is: in the model, which cannot raise, a placeholder without a visual token becomes NaN.

    Attributes:
      frames: that a row has room for.
      size: height and width that every frame is brought to: stretched, by ``mode`` ``"stretch"``; whole, on a square
        of ``fill``, by ``"pad"``; or without what lies outside of its middle square, by ``"crop"``.
      tokens_per_frame: visual tokens that the connector makes of a frame.
      placeholder: the id that stands for one.
      field: of the pictures; ``tokens_field`` of the row's ids.
      resample: how frames are resized.
    """

    frames: int
    size: int
    tokens_per_frame: int
    placeholder: int
    field: str = "video"
    tokens_field: str = "tokens"
    resample: str = "bicubic"
    mode: str = "stretch"
    fill: Fill = WHITE

    def __post_init__(self) -> None:
        if self.resample not in RESAMPLING:
            raise UserError(f"Frames.resample is {self.resample!r}; it is one of {', '.join(RESAMPLING)}")
        if self.mode not in MODES:
            raise UserError(f"Frames.mode is {self.mode!r}; it is one of {', '.join(MODES)}")

    def map(self, element: Example) -> Example:
        encoded = require(element, self.field, (list, tuple))
        tokens = np.asarray(require(element, self.tokens_field, (list, np.ndarray)), np.int32)
        check_frames(len(encoded), tokens, self.frames, self.tokens_per_frame, self.placeholder)
        video = np.zeros((self.frames, self.size, self.size, 3), np.uint8)
        decode = Decode()
        for place, frame in enumerate(encoded):
            image = to_rgb(frame) if isinstance(frame, Image.Image) else decode.decode(frame)
            video[place] = np.asarray(self._square(image))
        return {**element, self.field: video, self.tokens_field: tokens}

    def _square(self, image: Image.Image) -> Image.Image:
        size, resample = (self.size, self.size), RESAMPLING[self.resample]
        if self.mode == "pad":
            return ImageOps.pad(image, size, resample, color=self.fill)
        return ImageOps.fit(image, size, resample) if self.mode == "crop" else image.resize(size, resample)


def check_frames(
    shown: int, tokens: np.ndarray, frames: int, tokens_per_frame: int, placeholder: int
) -> None:
    """Whether a row's placeholders are as many as its frames have visual tokens.

    Args:
      shown: frames of the row; ``frames`` is how many it has room for.
      tokens: ids of the row.

    Raises:
      BadExample: more frames than there is room for, or another number of placeholders.
    """
    found, wanted = int(np.sum(tokens == placeholder)), shown * tokens_per_frame
    if shown > frames:
        raise BadExample(f"a row of {shown} frames, but there is room for {frames}")
    if found != wanted:
        raise BadExample(
            f"the placeholder {placeholder} stands {found} times in a row whose {shown} frames have {wanted} visual "
            "tokens"
        )

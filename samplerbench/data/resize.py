"""Resize and crop images to one size by a stated rule."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from samplerbench.data.image_set import DataSource
from samplerbench.errors import UserError
from samplerbench.options import option, show_value


@dataclass(frozen=True)
class ResizedSource(DataSource):
    """Base class of data sets whose images can be resized when they are loaded.

    With `resize=S` and `crop=center`, the largest square at the centre of an image is scaled to S×S. With `crop=none`
    the whole image is scaled to S×S, whatever its aspect ratio. Pillow scales
    with an antialiasing filter whose support grows with the scale (Parmar et al. 2022 recommend `bicubic`).
    """

    resize: int = option(0, "side S of the square images, in pixels; 0 keeps the size", ge=0, le=16_384)
    crop: Literal["center", "none"] = option("center", "the largest square at the centre, or the whole image")
    filter: Literal["bicubic", "lanczos", "bilinear", "box"] = option("bicubic", "Pillow's resampling filter")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.resize and (changed := [f.name for f in RULE if getattr(self, f.name) != f.default]):
            name = changed[0]
            raise UserError(f"{name}={show_value(getattr(self, name))} applies to resize=SIDE; add resize=SIDE.")

    @property
    def rule(self) -> str:
        """The rule in the protocol: `resize=64,crop=center,filter=bicubic`; empty if images are not resized."""
        return ",".join(f"{f.name}={show_value(getattr(self, f.name))}" for f in RULE) if self.resize else ""

    def resized(self, image: Any) -> Any:
        """Resize a PIL image by the rule."""
        if not self.resize:
            return image
        from PIL import Image

        method = Image.Resampling[self.filter.upper()]
        side, (width, height) = self.resize, image.size
        if self.crop == "none":
            return image.resize((side, side), method)
        short = min(width, height)
        left, top = (width - short) // 2, (height - short) // 2
        return image.resize((side, side), method, box=(left, top, left + short, top + short))


RULE = fields(ResizedSource)
"""The fields of the rule."""

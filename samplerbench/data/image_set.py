"""A data set in memory: uint8 images and labels, with a name and a content hash."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.limits import MAX_CLASSES
from samplerbench.options import Configurable
from samplerbench.text import is_unicode


@dataclass(frozen=True)
class ImageSet:
    """A data set in memory.

    Attributes:
        name: name in the protocol.
        split: split in the protocol.
        images: (n, C, H, W) uint8, C = 1 or 3.
        labels: (n,) int64 in 0 … classes-1, or None.
        classes: number of classes, or None.
        licence: licence of the images.
        source: argument of `load_data` that loads the same data set.
        resized: rule by which the images were resized; empty if they have their own size.
        class_names: name of each class, "" for a class without a name; several names of one class are separated by
            commas. Empty if unknown.
        grey_levels: number L of grey levels of a channel: the pixels are round(255 k/(L-1)), k = 0 … L-1. None if
            unknown. Likelihoods of images depend on it.

    Raises:
        UserError: no images, or images, labels, names or pixels of another type, shape or range.
    """

    name: str
    split: str
    images: Tensor
    labels: Tensor | None
    classes: int | None
    licence: str = ""
    source: str = ""
    resized: str = ""
    class_names: tuple[str, ...] = ()
    grey_levels: int | None = 256

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if self.images.dtype != torch.uint8 or len(shape) != 4 or shape[1] not in (1, 3) or not self.images.numel():
            raise UserError(
                f"the data set {self.name}: the images are {self.images.dtype} of shape {shape}; they must be uint8 "
                "(n, C, H, W) with C = 1 or 3, and not empty."
            )
        if self.grey_levels != 256 and self.grey_levels is not None:
            self._check_grey_levels(self.grey_levels)
        if self.class_names and not self._names_are_valid():
            raise UserError(
                f"the data set {self.name}: class_names must be a tuple with one text for each class; the number of "
                f"classes is {self.classes}."
            )
        if self.labels is None:
            return
        if self.labels.dtype != torch.int64 or self.labels.shape != shape[:1]:
            raise UserError(
                f"the data set {self.name}: the labels are {self.labels.dtype} of shape {tuple(self.labels.shape)}; "
                f"they must be int64 ({shape[0]},), one per image."
            )
        low, high = int(self.labels.min()), int(self.labels.max())
        if self.classes is None or not 0 <= low <= high < self.classes <= MAX_CLASSES:
            raise UserError(
                f"the data set {self.name}: the labels are {low} to {high} of {self.classes} classes; they must be 0 "
                f"to classes-1, and there can be at most {MAX_CLASSES:,} classes."
            )

    def __len__(self) -> int:
        return len(self.images)

    def _names_are_valid(self) -> bool:
        names: Any = self.class_names
        if not isinstance(names, tuple) or len(names) != self.classes:
            return False
        return all(isinstance(name, str) and is_unicode(name) for name in names)

    def _check_grey_levels(self, levels: int) -> None:
        if isinstance(levels, bool) or not isinstance(levels, int) or not 2 <= levels <= 256:
            raise UserError(f"the data set {self.name}: grey_levels is {levels!r}; it must be None or from 2 to 256.")
        known = (torch.arange(levels, dtype=torch.float64) * (255 / (levels - 1))).round().to(torch.uint8)
        if not bool(torch.isin(self.images, known).all()):
            raise UserError(
                f"the data set {self.name}: its pixels are not the {levels} grey levels round(255 k/{levels - 1}); set "
                "grey_levels to the right number, or to None."
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        channels, height, width = self.images.shape[1:]
        return (channels, height, width)

    @cached_property
    def shape_as_seen(self) -> tuple[int, int, int]:
        """(C, H, W), with C = 1 if the three channels of every image are equal. Extractors treat both alike."""
        images = self.images
        grey = images.shape[1] == 3 and all(bool((part[:, :1] == part).all()) for part in images.split(4096))
        return (1, *self.shape[1:]) if grey else self.shape

    @cached_property
    def sha256(self) -> str:
        """Hash of the shape, pixels and labels, which identifies the data set in a protocol."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().tobytes())
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().tobytes())
        return digest.hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        """The data set in a protocol: name, split, number of images, hash, and the rule by which they were resized."""
        fields = {"name": self.name, "split": self.split, "n": len(self), "sha256": self.sha256}
        return fields | ({"resized": self.resized} if self.resized else {})

    def class_counts(self) -> list[int]:
        """The number of images of each class. Raises UserError for a data set without labels."""
        if self.labels is None or self.classes is None:
            raise UserError(f"the data set {self.name} has no labels.")
        return torch.bincount(self.labels, minlength=self.classes).tolist()

    def subset(self, index: Tensor, split: str) -> ImageSet:
        """The data set of the images at `index` (m,) int64."""
        labels = None if self.labels is None else self.labels[index]
        return replace(self, split=split, images=self.images[index], labels=labels, source="")


@dataclass(frozen=True)
class DataSource(Configurable, ABC):
    """Base class of data plugins, which load an `ImageSet`. The fields of a subclass are its parameters."""

    kind: ClassVar[str] = "data set"

    @abstractmethod
    def load(self) -> ImageSet:
        """Load the data set. Raises UserError if it is not available, with instructions."""

    def available(self) -> bool:
        """Whether `load` can succeed. It is used for data sets whose statistics are included with samplerbench."""
        return True

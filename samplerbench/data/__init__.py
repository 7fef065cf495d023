"""Data sets as uint8 images and labels, under a name and a content hash."""

from samplerbench.data.images import ImageSet, load_data

__all__ = ["ImageSet", "load_data"]

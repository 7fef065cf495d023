"""Data sets: uint8 images and labels, with a name and a content hash."""

from samplerbench.data.image_set import DataSource, ImageSet
from samplerbench.data.load import load_data

__all__ = ["DataSource", "ImageSet", "load_data"]

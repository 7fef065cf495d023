"""Models: checkpoints, by name, path or hub id, as denoisers."""

from samplerbench.models.model import Model, ModelSource

__all__ = ["Model", "ModelSource"]

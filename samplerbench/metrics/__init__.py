"""Metrics: what is measured on generated images, against a reference."""

from samplerbench.metrics.metric import Accumulator, Batch, Metric
from samplerbench.metrics.moments import Moments
from samplerbench.metrics.reference import Reference

__all__ = ["Accumulator", "Batch", "Metric", "Moments", "Reference"]

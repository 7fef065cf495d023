"""Metrics of generated images, measured against a reference of real images."""

from samplerbench.metrics.metric import (
    Accumulator,
    Batch,
    Context,
    FeatureMetric,
    FeatureStore,
    LabelledStore,
    Layer,
    Metric,
    check_requirements,
)
from samplerbench.metrics.moments import Moments
from samplerbench.metrics.reference import Reference

__all__ = [
    "Accumulator",
    "Batch",
    "Context",
    "FeatureMetric",
    "FeatureStore",
    "LabelledStore",
    "Layer",
    "Metric",
    "Moments",
    "Reference",
    "check_requirements",
]

"""Metrics of generated images, measured against a reference of real images."""

from samplerbench.metrics.metric import (
    Accumulator,
    Batch,
    Context,
    EvaluatedImages,
    FeatureMetric,
    FeatureStore,
    LabelledStore,
    Layer,
    Metric,
    PromptEncoder,
    check_requirements,
)
from samplerbench.metrics.moments import Moments
from samplerbench.metrics.reference import Reference

__all__ = [
    "Accumulator",
    "Batch",
    "Context",
    "EvaluatedImages",
    "FeatureMetric",
    "FeatureStore",
    "LabelledStore",
    "Layer",
    "Metric",
    "Moments",
    "PromptEncoder",
    "Reference",
    "check_requirements",
]

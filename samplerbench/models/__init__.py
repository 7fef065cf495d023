"""Models: load checkpoints as denoisers, by name, path or hub id. Also classifiers and estimates for plugins."""

from samplerbench.models.classifier import LoadedClassifier
from samplerbench.models.guiding import classifier_of, image_classifier_of, second_model_of
from samplerbench.models.model import Condition, Model, ModelSource
from samplerbench.models.posterior import ExactPosterior, Moments, exact_posterior
from samplerbench.models.posterior_variance import posterior_variances
from samplerbench.models.preconditioning import (
    DENOISED,
    EPSILON,
    FLOW,
    SAMPLE,
    SCORE,
    VELOCITY,
    Preconditioning,
)

__all__ = [
    "DENOISED",
    "EPSILON",
    "FLOW",
    "SAMPLE",
    "SCORE",
    "VELOCITY",
    "Condition",
    "ExactPosterior",
    "LoadedClassifier",
    "Model",
    "ModelSource",
    "Moments",
    "Preconditioning",
    "classifier_of",
    "exact_posterior",
    "image_classifier_of",
    "posterior_variances",
    "second_model_of",
]

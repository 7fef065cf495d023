"""The classifier that a guidance is bound with: one in a folder, or the one that comes with the model."""

from __future__ import annotations

from samplerbench.errors import UserError
from samplerbench.models.classifier import LoadedClassifier
from samplerbench.models.model import Model
from samplerbench.sampling.view import ModelView


def classifier_of(model: ModelView, weights: str, conditional: bool = False) -> LoadedClassifier:
    """The noise-conditional classifier p(y | x, σ) to guide a model with.

    Args:
        model: the model that will be guided.
        weights: the classifier's folder; empty is the one that comes with the model.
        conditional: whether the class-conditional prediction is guided.

    Raises:
        UserError: there is no classifier, it does not fit the model, or the model has no unconditional prediction.
    """
    from samplerbench.models.classifier_guide import load_classifier

    model = _check(model, conditional)
    found = load_classifier(weights, model) if weights else model.own_classifier()
    if found is None:
        raise UserError("the model comes without a classifier; name one with weights=FOLDER in the guidance's spec.")
    return found


def image_classifier_of(model: ModelView, weights: str, conditional: bool = False) -> LoadedClassifier:
    """The classifier of clean images p(y | image) to guide a model with. The arguments are those of `classifier_of`.

    Raises:
        UserError: there is no classifier, it does not fit the model, or the model has no unconditional prediction.
    """
    model = _check(model, conditional)
    if weights:
        from samplerbench.models.image_classifier import load_image_classifier

        return load_image_classifier(weights, model)
    found = model.own_image_classifier()
    if found is None:
        raise UserError("guidance by an image classifier needs its folder: name it with weights=FOLDER.")
    return found


def _check(model: ModelView, conditional: bool) -> Model:
    if not isinstance(model, Model):
        raise TypeError(f"{type(model).__name__} is no samplerbench.models.Model")
    if model.classes is not None and not model.null and not conditional:
        raise UserError(
            "guidance by a classifier guides the model without labels, and this model has no unconditional prediction; "
            "use conditional=true."
        )
    return model

"""Select the classifier for a guidance: from a folder, or the classifier included with the model."""

from __future__ import annotations

from samplerbench.errors import UserError
from samplerbench.models.classifier import LoadedClassifier
from samplerbench.models.model import Model
from samplerbench.sampling.view import ModelView


def classifier_of(model: ModelView, weights: str, conditional: bool = False) -> LoadedClassifier:
    """Load the noise-conditional classifier p(y | x, σ) for a model.

    Args:
        model: model to guide.
        weights: folder of the classifier. If empty, the classifier included with the model is used.
        conditional: whether to guide the class-conditional prediction instead of the unconditional one.

    Raises:
        UserError: if there is no classifier, it does not match the model, or the model has no unconditional prediction.
    """
    from samplerbench.models.classifier_guide import load_classifier

    model = _check(model, conditional)
    found = load_classifier(weights, model) if weights else model.own_classifier()
    if found is None:
        raise UserError(
            "the model includes no classifier; give its folder with weights=FOLDER in the spec of the guidance."
        )
    return found


def image_classifier_of(model: ModelView, weights: str, conditional: bool = False) -> LoadedClassifier:
    """Load the classifier of clean images p(y | image) for a model. The arguments are those of `classifier_of`.

    Raises:
        UserError: if there is no classifier, it does not match the model, or the model has no unconditional prediction.
    """
    model = _check(model, conditional)
    if weights:
        from samplerbench.models.image_classifier import load_image_classifier

        return load_image_classifier(weights, model)
    found = model.own_image_classifier()
    if found is None:
        raise UserError(
            "guidance image-classifier requires the folder of a classifier: image-classifier:weights=FOLDER."
        )
    return found


def _check(model: ModelView, conditional: bool) -> Model:
    if not isinstance(model, Model):
        raise TypeError(f"{type(model).__name__} is not a samplerbench.models.Model")
    if model.classes is not None and not model.null and not conditional:
        raise UserError(
            "classifier guidance requires an unconditional prediction, which this model does not have; "
            "use conditional=true."
        )
    return model

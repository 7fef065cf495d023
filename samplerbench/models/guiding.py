"""Select the classifier or the second model for a guidance."""

from __future__ import annotations

from samplerbench import registry
from samplerbench.boundary import plugin_call
from samplerbench.errors import UserError
from samplerbench.models.classifier import LoadedClassifier
from samplerbench.models.model import Model
from samplerbench.models.runner import Runner
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


def second_model_of(model: ModelView, source: str) -> Model:
    """Load a second model that predicts the same states, for guidance by two models. It does not clip x₀.

    Args:
        model: model to guide.
        source: registered name with parameters, checkpoint folder, or hub id of the second model.

    Raises:
        UserError: if it cannot be loaded, has other states, another process or other classes, or takes prompts.
    """
    if not isinstance(model, Model):
        raise TypeError(f"{type(model).__name__} is not a samplerbench.models.Model")
    if any(entry.name == registry.split(source)[0] for entry in registry.entries("model")):
        named = registry.parse("model", source)
        with plugin_call(named, "in load"):
            second: Model = named.load(model.device, model.dtype)
    else:
        from samplerbench.models.pipelines import load_pipeline

        second = load_pipeline(source, model.device, model.dtype)
    for what, own, other in (
        ("state", tuple(model.shape), tuple(second.shape)),
        ("forward process", model.process.name, second.process.name),
        ("number of classes", model.classes, second.classes),
    ):
        if own != other:
            raise UserError(f"the second model {source} has the {what} {other}, but the model has {own}.")
    if second.text:
        raise UserError(f"the second model {source} takes prompts; guidance by two models supports class labels only.")
    second.clip = False
    if any(True for _ in second.network.parameters()):
        second.network = Runner(second.network, model.device)
    return second


def _check(model: ModelView, conditional: bool) -> Model:
    if not isinstance(model, Model):
        raise TypeError(f"{type(model).__name__} is not a samplerbench.models.Model")
    if model.classes is not None and not model.null and not conditional:
        raise UserError(
            "classifier guidance requires an unconditional prediction, which this model does not have; "
            "use conditional=true."
        )
    return model

"""Requests: the validated description of a run, created by the command line, a suite file or Python."""

from __future__ import annotations

import json
from collections.abc import Sequence
from numbers import Integral
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StrictBool, ValidationError, model_validator

from samplerbench import plugin_file, registry
from samplerbench.errors import Argument, ArgumentTypeError, Message, UserError, argument, message_of
from samplerbench.limits import MAX_BATCH, MAX_CLASSES, MAX_IMAGES, MAX_SEED, MAX_SIDE, MAX_STEPS
from samplerbench.metrics.metric import Metric
from samplerbench.models.files import MEMORY, LoadOptions
from samplerbench.models.runner import check_dtype
from samplerbench.options import Configurable, did_you_mean, explain, show_value
from samplerbench.sampling import Generator, Guidance, Sampler, Spacing, Task
from samplerbench.untrusted import shorten

DEFAULT_STEPS = 50
"""Number of steps if neither steps nor budgets are given."""


class RequestError(UserError):
    """An invalid field of a request.

    Args:
        message: The message.
        place: Path of the field.

    Attributes:
        place: Path of the field, such as ("n",), or ("samplers", 1) in a grid.
    """

    def __init__(self, message: object, place: tuple[int | str, ...] = ()) -> None:
        super().__init__(message)
        self.place = place


class RequestTypeError(RequestError, ArgumentTypeError):
    """A field of a request with a value of the wrong type."""


class Checked(BaseModel):
    """Base class of the parts of a request. They are immutable and validated on creation.

    Raises:
        RequestError: If a field does not exist or its value is invalid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            reason = first.get("ctx", {}).get("error")
            inside = reason.place if isinstance(reason, RequestError) else ()
            wrong_type = isinstance(reason, TypeError) or first["type"].endswith("_type")
            kind = RequestTypeError if wrong_type else RequestError
            raise kind(_explain(type(self), first), (*first["loc"], *inside)) from reason

    def replace(self, **changes: Any) -> Self:
        """Return a validated copy with some fields replaced.

        Args:
            **changes: New values by field name.
        """
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)


def _explain(cls: type[BaseModel], error: Any) -> Message | str:
    """Create the message for an error reported by pydantic."""
    if isinstance(reason := error.get("ctx", {}).get("error"), UserError):
        return message_of(reason)
    name = next((part for part in reversed(error["loc"]) if isinstance(part, str)), cls.__name__)
    if error["type"] == "extra_forbidden":
        return f'there is no field "{shorten(name)}".{did_you_mean(name, cls.model_fields)}'
    if error["type"] in ("missing", "too_short"):
        what = "missing" if error["type"] == "missing" else "empty"
        return f"{argument(name)} is {what}; give at least one."
    value = error["input"]
    if error["type"] == "tuple_type":
        example = f": [{json.dumps(value)}]" if isinstance(value, str | int | float) else ""
        return f"{_given(name, value)}: give a list{example}."
    return f"{_given(name, value)}: {explain(error)}."


def _given(name: str, value: Any) -> Argument:
    """Create an argument, with its value if it can be printed."""
    if isinstance(value, bool) or (isinstance(value, int) and value.bit_length() < 128):
        return argument(name, value)
    if isinstance(value, str | int | float):
        return argument(name, shorten(show_value(value)) if not isinstance(value, float) else value)
    return argument(name)


def check_whole(name: str, value: Any, least: int, most: int) -> int:
    """Check that a value is a whole number within bounds.

    Args:
        name: Name of the argument, for the message.
        value: The value.
        least: Smallest valid value.
        most: Largest valid value.

    Returns:
        The value.

    Raises:
        ArgumentTypeError: If the value is not a whole number.
        UserError: If the value is out of bounds.
    """
    given = _given(name, value)
    wrong_type = isinstance(value, bool) or not isinstance(value, int)
    if name == "seed":
        if wrong_type or not least <= value <= most:
            kind = ArgumentTypeError if wrong_type else UserError
            raise kind(f"{given}: give a whole number from {least} to {most}.")
        return int(value)
    if isinstance(value, Integral) and not isinstance(value, bool):
        value = int(value)  # also of NumPy
    unit = {"steps": "step", "nfe": "evaluation"}.get(name, "image" if name in ("n", "batch_size") else "block")
    if wrong_type:
        choice = ', or "auto"' if name == "batch_size" else ""
        raise ArgumentTypeError(f"{given}: give a whole number of at least {least}{choice}.")
    if value < least:
        raise UserError(f"{given}: at least {least} {unit} is needed.")
    if value > most:
        raise UserError(f"{given}: at most {most:,}{' images' if unit == 'image' else ''} are possible.")
    return int(value)


def _whole(name: str, least: int, most: int) -> PlainValidator:
    return PlainValidator(lambda value: check_whole(name, value, least, most))


def _plugin(kind: str, absent: tuple[str | None, ...] = ()) -> PlainValidator:
    """Create a validator that parses specs and accepts instances. Values in `absent` become None."""

    def parse(value: Any) -> Any:
        if any(value is word or (isinstance(value, str) and value == word) for word in absent):
            return None
        if not isinstance(value, str | Configurable):
            raise ArgumentTypeError(_no_plugin(kind, value))
        if isinstance(value, str) and not value.strip():
            raise UserError(f"{argument(kind)} is empty; name a {kind}, or leave it out.")
        if kind == "sampler":
            return registry.parse(_kind_of_method(value), value)
        return registry.parse(kind, value)

    return PlainValidator(parse)


def _no_plugin(kind: str, value: Any) -> str:
    """Create the message for a value that is neither a spec nor an instance of a plugin."""
    if isinstance(value, type) and issubclass(value, Configurable):
        return f"{argument(kind)} is the class {value.__name__}; give an instance of it, as in {value.__name__}()."
    shown = isinstance(value, int | float)
    given = f"{_given(kind, value)}" if shown else f"{argument(kind)} is of type {type(value).__name__}"
    return f"{given}: give a name, with parameters if need be: name:parameter=value."


def _kind_of_method(value: str | Configurable) -> str:
    """Return "sampler" or "generator" for a value of the field `samplers`."""
    if isinstance(value, Configurable):
        return "generator" if isinstance(value, Generator) else "sampler"
    name = registry.split(value)[0]
    if plugin_file.split(name) is not None:
        return registry.kind_of(name, ("sampler", "generator"))
    return "generator" if any(e.name == name for e in registry.entries("generator")) else "sampler"


def _labels(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ArgumentTypeError(f'{_given("labels", value)}: give "balanced", "none" or one label.')
    if isinstance(value, int) and value > MAX_CLASSES:
        raise UserError(f"{_given('labels', value)}: at most {MAX_CLASSES:,} labels are possible.")
    if isinstance(value, str) and not value.strip():
        raise UserError(f'{_given("labels", value)}: give "balanced", "none" or one label.')
    return str(value)  # the name of a class is resolved with the model


def _prompts(value: Any) -> str | tuple[str, ...] | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not value or not all(isinstance(prompt, str) for prompt in value):
        raise ArgumentTypeError(f"{_given('prompts', value)}: give the name of a text file, or a list of prompts.")
    return tuple(value)


def _image_size(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    sides = value
    if isinstance(value, str):
        words = [word.strip() for word in value.lower().split("x")]
        sides = [int(word) if word.isascii() and word.isdigit() and len(word) < 9 else 0 for word in words]
    whole = isinstance(sides, list | tuple) and len(sides) == 2 and all(type(side) is int for side in sides)
    if not whole or not all(1 <= side <= MAX_SIDE for side in sides):
        raise UserError(
            f"{_given('image_size', value)}: give the height and the width in pixels, from 1 to {MAX_SIDE:,}, as in "
            "768x1024."
        )
    return sides[0], sides[1]


def _lora(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    files = (value,) if isinstance(value, str) else value
    if not isinstance(files, list | tuple) or not all(isinstance(file, str) and file.strip() for file in files):
        raise ArgumentTypeError(f"{_given('lora', value)}: give the name of a file, FILE or FILE:scale, or a list.")
    return tuple(files)


def _embedded_guidance(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1000:
        raise UserError(f"{_given('embedded_guidance', value)}: give a number from 0 to 1000.")
    return float(value)


def _memory(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, list | tuple):
        raise ArgumentTypeError(f"{_given('memory', value)}: give a list of {', '.join(MEMORY)}.")
    for word in value:
        if word not in MEMORY:
            raise UserError(f"{_given('memory', word)}: choose from {', '.join(MEMORY)}.")
    return tuple(word for word in MEMORY if word in value)


def _batch_size(value: Any) -> int | Literal["auto"]:
    return "auto" if isinstance(value, str) and value == "auto" else check_whole("batch_size", value, 1, MAX_BATCH)


def _dtype(value: Any) -> str:
    if not isinstance(value, str):
        raise ArgumentTypeError(f"{_given('dtype', value)}: give text.")
    check_dtype(value)
    return value


OneSampler = Annotated[Sampler | Generator, _plugin("sampler")]
OneGuidance = Annotated[Guidance | None, _plugin("guidance", (None, "none"))]
OneSpacing = Annotated[Spacing | None, _plugin("spacing", (None,))]
OneTask = Annotated[Task, _plugin("task")]
OneMetric = Annotated[Metric, _plugin("metric")]
Steps = Annotated[int, _whole("steps", 1, MAX_STEPS)]
Budget = Annotated[int, _whole("nfe", 1, MAX_STEPS)]
Seed = Annotated[int, _whole("seed", 0, MAX_SEED)]
Blocks = Annotated[int, _whole("blocks", 1, MAX_IMAGES)]
Count = Annotated[int | None, PlainValidator(lambda n: None if n is None else check_whole("n", n, 1, MAX_IMAGES))]


class Published(Checked):
    """A value published in a paper.

    Attributes:
        sampler: Sampler of the row.
        guidance: Guidance of the row, or None.
        column: Number of steps or budget of the column.
        metric: Name of the metric.
        value: Published value of the metric.
        source: The paper and the table.
    """

    sampler: OneSampler
    guidance: OneGuidance
    column: int
    metric: str
    value: float
    source: str


class Grid(Checked):
    """All combinations of samplers, guidances, spacings, and numbers of steps or budgets.

    Specs are parsed to instances. Exactly one of `steps` and `nfe` must be given.

    Attributes:
        samplers: Samplers and generators.
        steps: Numbers of steps.
        nfe: Budgets, in network evaluations per image.
        guidances: Guidances. None or "none" is the unguided model.
        spacings: Spacings. None is the default spacing of the sampler.
        published: Published values for these cells.
    """

    samplers: Annotated[tuple[OneSampler, ...], Field(min_length=1)]
    steps: tuple[Steps, ...] = ()
    nfe: tuple[Budget, ...] = ()
    guidances: Annotated[tuple[OneGuidance, ...], Field(min_length=1)] = (None,)
    spacings: Annotated[tuple[OneSpacing, ...], Field(min_length=1)] = (None,)
    published: tuple[Published, ...] = ()

    def __init__(
        self,
        samplers: Sequence[str | Sampler],
        steps: Sequence[int] = (),
        nfe: Sequence[int] = (),
        guidances: Sequence[str | Guidance | None] = (None,),
        spacings: Sequence[str | Spacing | None] = (None,),
        published: Sequence[Published] = (),
    ) -> None:
        super().__init__(
            samplers=samplers, steps=steps, nfe=nfe, guidances=guidances, spacings=spacings, published=published
        )

    @model_validator(mode="after")
    def _has_one_length(self) -> Self:
        if self.steps and self.nfe:
            raise UserError(f"{argument('steps')} and {argument('nfe')} cannot both be given; give one of them.")
        if not self.steps and not self.nfe:
            raise UserError(f"neither {argument('steps')} nor {argument('nfe')} is given; give one of them.")
        return self


class Request(Checked):
    """The description of a run.

    Attributes:
        grids: The combinations to run.
        model: A registered name with parameters, a checkpoint folder, or a hub id.
        labels: "balanced", "none", a single label, or the name of a class. If None, "balanced" for models with
            classes, else "none".
        n: Images per block. If None, the number of real images, at most 50,000.
        blocks: Number of disjoint blocks of n images.
        seeds: Seeds of all noise. All cells are run for each seed.
        batch_size: Images per batch. "auto" measures which size is fastest.
        dtype: Precision of the network: "fp32", "tf32", "bf16", "fp16" or "fp64".
        metrics: The metrics. Specs are parsed to instances.
        tasks: Inverse problems. All cells are run for each of them. Specs are parsed to instances. If empty, images are
            generated without observations.
        features: Feature space of the metrics. If None, the one that belongs to the model.
        features_weights: File with the weights of the feature space, or None.
        data: Real images or their statistics. If None, the training data of the model.
        revision: Branch, tag or commit of a model on the hub, or None.
        variant: Variant of the weights, such as "fp16", or None.
        prompts: Text file with one prompt per line, a list of prompts, or None.
        negative_prompt: Negative prompt for classifier-free guidance, or None.
        image_size: Height and width of the images of a text-to-image model, or None for the model's own size.
        embedded_guidance: Guidance scale that a guidance-distilled network takes as an input, or None.
        memory: Ways to save memory with a text-to-image model: "offload", "sequential-offload", "vae-tiling",
            "vae-slicing" and "attention-slicing".
        lora: LoRA files to merge into the network, each `FILE` or `FILE:scale`.
        scheduler: scheduler_config.json, or its folder, in place of that of the pipeline, or None.
        config: Pipeline with the parts that a single file or the folder of a network lacks, or None.
        offline: Whether to use only the local cache of the hub.
        compile: Whether to compile the network with `torch.compile`.
        graphs: Whether to replay batches as CUDA graphs.
    """

    grids: tuple[Grid, ...]
    model: str = "digits"
    labels: Annotated[str | None, PlainValidator(_labels)] = None
    n: Count = None
    blocks: Blocks = 1
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    batch_size: Annotated[int | Literal["auto"], PlainValidator(_batch_size)] = 256
    dtype: Annotated[str, PlainValidator(_dtype)] = "fp32"
    metrics: tuple[OneMetric, ...] = Field(default_factory=lambda: (registry.parse("metric", "fid"),))
    tasks: tuple[OneTask, ...] = ()
    features: str | None = None
    features_weights: str | None = None
    data: str | None = None
    revision: str | None = None
    variant: str | None = None
    prompts: Annotated[str | tuple[str, ...] | None, PlainValidator(_prompts)] = None
    negative_prompt: str | None = None
    image_size: Annotated[tuple[int, int] | None, PlainValidator(_image_size)] = None
    embedded_guidance: Annotated[float | None, PlainValidator(_embedded_guidance)] = None
    memory: Annotated[tuple[str, ...], PlainValidator(_memory)] = ()
    lora: Annotated[tuple[str, ...], PlainValidator(_lora)] = ()
    scheduler: str | None = None
    config: str | None = None
    offline: StrictBool = False
    compile: StrictBool = False
    graphs: StrictBool = False

    def __init__(self, grids: Sequence[Grid], **fields: Any) -> None:
        super().__init__(grids=grids, **fields)

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        n = self.n or 1
        if n * self.blocks > MAX_IMAGES:
            sizes = f"{argument('n', n)} and {argument('blocks', self.blocks)}"
            raise UserError(f"{sizes}: these are {n * self.blocks:,} images; at most {MAX_IMAGES:,} are possible.")
        return self

    @property
    def load(self) -> LoadOptions:
        """The options for loading the model."""
        return LoadOptions(
            self.revision,
            self.variant,
            self.prompts,
            self.negative_prompt,
            self.offline,
            compile=self.compile,
            graphs=self.graphs,
            image_size=self.image_size,
            embedded_guidance=self.embedded_guidance,
            memory=self.memory,
            lora=self.lora,
            scheduler=self.scheduler,
            config=self.config,
        )


def one_grid(
    samplers: Sequence[str | Sampler],
    steps: Sequence[int] = (),
    nfe: Sequence[int] = (),
    guidances: Sequence[str | Guidance | None] = (None,),
    spacing: str | Spacing | None = None,
) -> Grid:
    """Create a grid with a single spacing. If neither steps nor budgets are given, 50 steps are used.

    Args:
        samplers: Specs or instances.
        steps: Numbers of steps.
        nfe: Budgets, in network evaluations per image.
        guidances: Specs or instances. None or "none" is the unguided model.
        spacing: A spec or an instance. If None, the default spacing of each sampler.

    Returns:
        The grid.

    Raises:
        RequestError: If an argument is invalid.
    """
    if not samplers:
        raise RequestError("name a sampler; `samplerbench list samplers` shows them.", ("samplers",))
    lengths = steps if steps or nfe else (DEFAULT_STEPS,)
    return Grid(samplers, lengths, nfe, guidances or (None,), [spacing])


__all__ = ["Grid", "Published", "Request", "RequestError", "check_whole", "one_grid"]

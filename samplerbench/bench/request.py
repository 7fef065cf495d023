"""What a user asks for: one `Request`, filled by the command line, a suite file or Python, and checked in one place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, StrictBool, ValidationError, model_validator

from samplerbench import plugin_file, registry
from samplerbench.bench.labels import parse_label
from samplerbench.errors import Argument, Message, UserError, argument, message_of
from samplerbench.limits import MAX_BATCH, MAX_CLASSES, MAX_IMAGES, MAX_SEED, MAX_STEPS
from samplerbench.metrics.metric import Metric
from samplerbench.models.files import LoadOptions
from samplerbench.models.runner import check_dtype
from samplerbench.options import Configurable, did_you_mean, show_value
from samplerbench.sampling import Generator, Guidance, Sampler, Spacing
from samplerbench.untrusted import shorten

DEFAULT_STEPS = 50
"""Steps of a run that names neither steps nor budgets."""


class RequestError(UserError):
    """A field of a request that cannot be.

    Attributes:
        place: where it is: ("n",), or ("samplers", 1) of a grid.
    """

    def __init__(self, message: object, place: tuple[int | str, ...] = ()) -> None:
        super().__init__(message)
        self.place = place


class Checked(BaseModel):
    """Base of the parts of a request: immutable, and checked when they are made.

    Raises:
        RequestError: a field that there is not, or a value that cannot be.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            reason = first.get("ctx", {}).get("error")
            inside = reason.place if isinstance(reason, RequestError) else ()
            raise RequestError(_explain(type(self), first), (*first["loc"], *inside)) from reason

    def replace(self, **changes: Any) -> Self:
        """A copy with other values of some fields, checked like a new one."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)


def _explain(cls: type[BaseModel], error: Any) -> Message | str:
    """A message for what pydantic found."""
    if isinstance(reason := error.get("ctx", {}).get("error"), UserError):
        return message_of(reason)
    name = next((part for part in reversed(error["loc"]) if isinstance(part, str)), cls.__name__)
    if error["type"] == "extra_forbidden":
        return f'there is no field "{shorten(name)}".{did_you_mean(name, cls.model_fields)}'
    if error["type"] in ("missing", "too_short"):
        return f"{argument(name)} is missing; give at least one."
    wanted = {"string_type": "give text", "bool_type": "give true or false", "tuple_type": "give a list"}
    reason = wanted.get(error["type"], error["msg"][0].lower() + error["msg"][1:])
    return f"{_given(name, error['input'])}: {reason}."


def _given(name: str, value: Any) -> Argument:
    """An argument with its value, as far as that can be shown."""
    if isinstance(value, bool) or (isinstance(value, int) and value.bit_length() < 128):
        return argument(name, value)
    if isinstance(value, str | int | float):
        return argument(name, shorten(show_value(value)) if not isinstance(value, float) else value)
    return argument(name)


def check_whole(name: str, value: Any, least: int, most: int) -> int:
    """A whole number within bounds.

    Args:
        name: of the argument, for the error.

    Raises:
        UserError: another number, or no whole number.
    """
    given = _given(name, value)
    if name == "seed":
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise UserError(f"{given}: give a whole number from {least} to {most}.")
        return value
    unit = {"steps": "step", "nfe": "evaluation"}.get(name, "image" if name in ("n", "batch_size") else "block")
    if isinstance(value, bool) or not isinstance(value, int):
        choice = ', or "auto"' if name == "batch_size" else ""
        raise UserError(f"{given}: give a whole number of at least {least}{choice}.")
    if value < least:
        raise UserError(f"{given}: at least {least} {unit} is needed.")
    if value > most:
        raise UserError(f"{given}: at most {most:,}{' images' if unit == 'image' else ''} are possible.")
    return value


def _whole(name: str, least: int, most: int) -> PlainValidator:
    return PlainValidator(lambda value: check_whole(name, value, least, most))


def _plugin(kind: str, absent: tuple[str | None, ...] = ()) -> PlainValidator:
    """A spec is parsed, an instance of the kind taken as it is; what is `absent` becomes None."""

    def parse(value: Any) -> Any:
        if any(value is word or (isinstance(value, str) and value == word) for word in absent):
            return None
        if not isinstance(value, str | Configurable):
            raise UserError(f"{_given(kind, value)}: give a name, with parameters if need be: name:parameter=value.")
        if isinstance(value, str) and not value.strip():
            raise UserError(f"{argument(kind)} is empty; name a {kind}, or leave it out.")
        if kind == "sampler":
            return registry.parse(_kind_of_method(value), value)
        return registry.parse(kind, value)

    return PlainValidator(parse)


def _kind_of_method(value: str | Configurable) -> str:
    """Whether what stands in the place of a sampler is a sampler or a generator."""
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
        raise UserError(f'{_given("labels", value)}: give "balanced", "none" or one label.')
    if isinstance(value, int) and value > MAX_CLASSES:
        raise UserError(f"{_given('labels', value)}: at most {MAX_CLASSES:,} labels are possible.")
    parse_label(str(value))
    return str(value)


def _batch_size(value: Any) -> int | Literal["auto"]:
    return "auto" if isinstance(value, str) and value == "auto" else check_whole("batch_size", value, 1, MAX_BATCH)


def _dtype(value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{_given('dtype', value)}: give text.")
    check_dtype(value)
    return value


OneSampler = Annotated[Sampler | Generator, _plugin("sampler")]
OneGuidance = Annotated[Guidance | None, _plugin("guidance", (None, "none"))]
OneSpacing = Annotated[Spacing | None, _plugin("spacing", (None,))]
OneMetric = Annotated[Metric, _plugin("metric")]
Steps = Annotated[int, _whole("steps", 1, MAX_STEPS)]
Budget = Annotated[int, _whole("nfe", 1, MAX_STEPS)]
Seed = Annotated[int, _whole("seed", 0, MAX_SEED)]
Blocks = Annotated[int, _whole("blocks", 1, MAX_IMAGES)]
Count = Annotated[int | None, PlainValidator(lambda n: None if n is None else check_whole("n", n, 1, MAX_IMAGES))]


class Published(Checked):
    """A value that a paper reports.

    Attributes:
        sampler, guidance: of which row.
        column: the number of steps, or the budget.
        metric, value: what is reported.
        source: the paper and its table.
    """

    sampler: OneSampler
    guidance: OneGuidance
    column: int
    metric: str
    value: float
    source: str


class Grid(Checked):
    """Every sampler with every guidance and spacing, at every number of steps or budget of evaluations.

    Attributes:
        samplers, guidances, spacings: instances; a spec that is given is parsed. A guidance of None (or "none") is no
            guidance, a spacing of None the sampler's own.
        steps, nfe: numbers of steps, or budgets of network evaluations per image; one of the two.
        published: what a paper reports for these cells.
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
            raise UserError(f"{argument('steps')} and {argument('nfe')} both say how long a run is; give one of them.")
        if not self.steps and not self.nfe:
            raise UserError(
                f"neither {argument('steps')} nor {argument('nfe')} says how long a run is; give one of them."
            )
        return self


class Request(Checked):
    """A run as asked for.

    Attributes:
        grids: the cells.
        model: a registered name with parameters, a folder, or a hub id.
        labels: "balanced", "none" or one label; None is balanced, if there are classes.
        n: images per block; None is as many as there are real ones, at most 50,000.
        blocks: disjoint sets of n images.
        seeds: of all noise; each is a run of its own.
        batch_size: images at a time; "auto" tries which is fastest.
        dtype: of the network: fp32, tf32, bf16, fp16 or fp64.
        metrics: what is measured; a spec that is given is parsed.
        features, features_weights: the feature space of the metrics and its weights; None is the model's.
        data: the real images or their statistics; None is what the model was trained on.
        revision, variant, prompts, negative_prompt, offline, compile, graphs: how the model is loaded (`LoadOptions`).
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
    features: str | None = None
    features_weights: str | None = None
    data: str | None = None
    revision: str | None = None
    variant: str | None = None
    prompts: str | None = None
    negative_prompt: str | None = None
    offline: StrictBool = False
    compile: StrictBool = False
    graphs: StrictBool = False

    def __init__(self, grids: Sequence[Grid], **fields: Any) -> None:
        super().__init__(grids=grids, **fields)

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        n = self.n or 1
        if n * self.blocks > MAX_IMAGES:
            raise UserError(f"{n} x {self.blocks} images: at most {MAX_IMAGES:,} are possible.")
        return self

    @property
    def load(self) -> LoadOptions:
        """How the model is loaded."""
        return LoadOptions(
            self.revision,
            self.variant,
            self.prompts,
            self.negative_prompt,
            self.offline,
            compile=self.compile,
            graphs=self.graphs,
        )


def one_grid(
    samplers: Sequence[str | Sampler],
    steps: Sequence[int] = (),
    nfe: Sequence[int] = (),
    guidances: Sequence[str | Guidance | None] = (None,),
    spacing: str | Spacing | None = None,
) -> Grid:
    """The grid of a command or a call, which has one spacing; 50 steps where it names neither steps nor budgets.

    Args:
        samplers, guidances: specs or instances. spacing: a spec, an instance, or None.
        steps, nfe: numbers of steps, or budgets of evaluations.

    Raises:
        RequestError: see `Grid`.
    """
    if not samplers:
        raise RequestError("name a sampler; `samplerbench list samplers` shows them.", ("samplers",))
    lengths = steps if steps or nfe else (DEFAULT_STEPS,)
    return Grid(samplers, lengths, nfe, guidances or (None,), [spacing])


__all__ = ["Grid", "Published", "Request", "RequestError", "check_whole", "one_grid"]

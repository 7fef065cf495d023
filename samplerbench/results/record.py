"""The schema of a result file, as a pydantic model and as JSON Schema."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator

from samplerbench.limits import MAX_RECORDED, MAX_RECORDED_TEXT
from samplerbench.text import is_unicode

Record = dict[str, Any]
"""A result as plain data, the content of its file."""

DEEPEST = 12
"""Maximum nesting depth of a record."""

NOT_STORED = frozenset({"error", "unmet", "pending", "key"})
"""Fields that mark table rows without a result. A stored record does not contain them."""


Count = Annotated[int, Field(ge=0, le=10**15)]
Positive = Annotated[int, Field(ge=1, le=10**12)]
Amount = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=MAX_RECORDED_TEXT)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Scalar = StrictBool | int | float | str | None


def _optional(**options: Any) -> Any:
    """A field that may be missing, but must not be null."""
    return Field(default=None, **options)


class _Strict(BaseModel):
    """Strict types: true and "3" are not numbers, and 3.5 is not an integer."""

    model_config = ConfigDict(extra="allow", strict=True)


class MetricEntry(_Strict):
    """One metric of a cell. What a metric says beside its value is a number, a text, true, false or null."""

    __pydantic_extra__: dict[str, Scalar]

    value: float = Field(description="the metric; over several blocks their mean; may be NaN or infinite")
    sd: float = _optional(description="standard deviation over blocks")
    blocks: list[float] = _optional(description="the value of each block", min_length=1)
    features: Text = Field(description="feature space")
    reference: Text = Field(description="the real images: name (split, number)")
    better: Literal["lower", "higher"] = Field(description="lower or higher")
    unit: Text = _optional(description="unit of the value, like bits/dim")
    of: Literal["samples", "data"] = _optional(description="data: computed from real images, not from samples")
    data: Text = _optional(description="of a metric of the data: the images, if they are not those of the run")
    images: Positive = _optional(description="of a metric of the data: images in a block")
    nfe: Amount = _optional(description="of a metric of the data: its network evaluations per image, not in nfe")
    network_backward: Amount = _optional(description="of a metric of the data: its backward passes per image")


class Timing(_Strict):
    """The time a cell took, and what it was measured under."""

    batch_size: Positive = _optional(description="images at a time")
    processes: Positive = _optional(description="processes that shared the images")
    device: Text = _optional(description="like cpu or cuda:0")
    device_name: Text = _optional(description="name of the GPU; empty on a CPU")
    threads: Positive = _optional(description="threads of torch")
    graphs: bool = _optional(description="whether batches were replayed as CUDA graphs")
    memory: Text = _optional(description="how memory was saved: offload, vae-slicing, …; empty if it was not")
    seconds: Amount = Field(description="sampling and quantising, on one process")
    decoder_seconds: Amount = Field(0, description="from latents to images, on one process; not in seconds")
    metric_seconds: Amount = Field(description="features and metrics")
    images_per_second: Amount
    finished: Text = _optional(description="when it was measured: date and time in UTC")


class Shown(_Strict):
    """The images of the sample grid: the first ones of the first block. Not part of the protocol."""

    images: Annotated[int, Field(ge=1, le=10_000)] = Field(description="number of samples in the grid")
    rows: list[Literal["truth", "observation", "restored"]] = _optional(
        description="images of each sample, in rows below each other, in a run with a task; else the sample alone"
    )
    labels: list[Count] = _optional(description="label, or index of the prompt, of each image")
    texts: list[Text] = _optional(description="prompt, or name of the class, of each image; may be shortened")
    ids: list[Text] = _optional(description="id of the prompt of each image")

    @model_validator(mode="after")
    def _one_for_each_image(self) -> Shown:
        if self.rows is not None and len(set(self.rows)) != 3:
            raise ValueError("rows must be truth, observation and restored")
        for name in ("labels", "texts", "ids"):
            given = getattr(self, name)
            if given is not None and len(given) != self.images:
                raise ValueError(f"there are {len(given)} {name} of {self.images} images")
        return self


class Plugin(_Strict):
    """A sampler, guidance or spacing in a protocol."""

    name: Text
    parameters: dict[str, Any] = Field(default_factory=dict)


class Features(_Strict):
    """A feature space in a protocol."""

    name: Text


class ReferenceData(_Strict):
    """The real images in a protocol."""

    name: Text
    sha256: Text
    resized: Text = _optional()


class Protocol(_Strict):
    """Everything that must be equal for two results to be one experiment. Fields of other versions are allowed."""

    sampler: Plugin = _optional()
    guidance: Plugin | None = None
    spacing: Plugin | None = None
    sigmas: list[float] = _optional()
    versions: dict[str, Text] = _optional()
    model: dict[str, Any] = _optional()
    labels: dict[str, Any] = _optional()
    n: Positive = _optional()
    blocks: Positive = _optional()
    seed: int = _optional(ge=0, lt=2**64)
    dtype: Text = _optional()
    compile: bool = _optional()
    metrics: list[Text] = _optional()
    metric_sources: dict[str, Text] = _optional(alias="metric sources")
    classifier: Text | None = None
    features: Features | None = None
    reference: ReferenceData | None = None


class ResultRecord(Timing):
    """One cell's result: the content of <first 20 digits of the protocol hash>.json.

    The fields of a timing at the top are those of the first of `timings`; a record of an older version has only them.
    """

    model_config = ConfigDict(title="samplerbench result")

    sampler: Text = Field(description="spec of the sampler: its name and what differs from the defaults", min_length=1)
    parameters: dict[str, Any] = Field(description="every parameter of the sampler")
    guidance: Text | None = Field(description="spec of the guidance, or null")
    spacing: Text | None = Field(description="spec of the spacing, or null where the sampler has its own")
    steps: Positive | None = Field(description="intervals of the σ grid, or null where the sampler chooses")
    budget: Positive | None = Field(description="network evaluations the steps were chosen to fit into, or null")
    nfe: Amount = Field(description="network rows evaluated per image, counted")
    network_backward: Amount = Field(0, description="network rows differentiated per image, counted")
    classifier_forward: Amount = Field(description="classifier rows evaluated per image, counted")
    classifier_backward: Amount = Field(description="classifier rows differentiated per image, counted")
    decoder_passes: Amount = Field(0, description="autoencoder rows decoded per image, counted; not in nfe")
    bound_evaluations: Count = _optional(
        description="network rows of the estimates that a plugin was bound with; not in nfe"
    )
    n: Positive = Field(description="images per block")
    blocks: Positive = Field(description="disjoint blocks of images")
    seed: int = Field(ge=0, lt=2**64)
    model: Text
    labels: Text
    task: Text = _optional(description="the inverse problem; missing without one")
    metrics: dict[Annotated[str, Field(min_length=1, max_length=MAX_RECORDED_TEXT)], MetricEntry]
    inapplicable: dict[Annotated[str, Field(min_length=1, max_length=MAX_RECORDED_TEXT)], Text] = _optional(
        description="metrics without a value for this sampler: the reason"
    )
    timings: list[Timing] = _optional(
        description="a time for each set of conditions; empty where none is of one set alone"
    )
    resumed: Count = _optional(description="how often the cell was resumed from a checkpoint")
    shown: Shown = _optional(description="what the images of the sample grid are")
    protocol: Sha256 = Field(description="sha256 of protocol_fields in canonical JSON")
    protocol_fields: Protocol = Field(description="everything that must be equal for two results to be one experiment")
    versions: dict[str, Text]
    seal: Sha256 = Field(description="sha256 of everything else: tells an edited file")

    @model_validator(mode="after")
    def _consistent(self) -> ResultRecord:
        for name, entry in self.metrics.items():
            if entry.blocks is not None and len(entry.blocks) != self.blocks:
                raise ValueError(f"{name} has {len(entry.blocks)} blocks, not {self.blocks}")
        found = self.protocol_fields
        for name in ("n", "blocks", "seed"):
            if getattr(found, name) not in (None, getattr(self, name)):
                raise ValueError(f"{name} is not the protocol's")
        if "guidance" in found.model_fields_set and (found.guidance is None) != (self.guidance is None):
            raise ValueError("guidance is not the protocol's")
        if marks := NOT_STORED & (self.__pydantic_extra__ or {}).keys():
            raise ValueError(f"a result has no {min(marks)}")
        return self


def schema_errors(record: Any) -> list[str]:
    """The errors of a record against the schema, one line each; [] for a valid record."""
    if not isinstance(record, dict):
        return ["it is not a JSON object"]
    if problem := _unfit(record):
        return [f"{_whose(record)}{problem}"]
    try:
        ResultRecord.model_validate(record)
    except ValidationError as error:
        return [_line(e["loc"], e["msg"]) for e in error.errors(include_url=False, include_input=False)]
    return []


def _line(place: tuple[int | str, ...], message: str) -> str:
    where = ".".join(str(part) for part in place)
    return f"{where[:100]}: {message[:200]}" if where else message[:200]


def _unfit(record: Record) -> str | None:
    """The first invalid value: nested too deeply, too long, too large, or text that is not valid Unicode."""
    level: list[Any] = [record]
    for _ in range(DEEPEST):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str):
                if len(value) > MAX_RECORDED_TEXT:
                    return f"a text is longer than {MAX_RECORDED_TEXT} characters"
                if not is_unicode(value):
                    return "a text is not valid Unicode"
            elif isinstance(value, int) and abs(value) >= 2**64:
                return "a whole number is out of range"
            elif isinstance(value, float) and MAX_RECORDED < abs(value) < math.inf:
                return f"a number is larger than {MAX_RECORDED:.0e}"
        if not inner:
            return None
        level = inner
    return f"it is nested more than {DEEPEST} levels deep"


def _whose(record: Record) -> str:
    """`metrics.fid: ` if the invalid value is in the entry of this metric; else ""."""
    metrics = record.get("metrics")
    for name, entry in metrics.items() if isinstance(metrics, dict) else ():
        if isinstance(name, str) and isinstance(entry, dict) and _unfit(entry):
            return f"metrics.{name[:100]}: "
    return ""


def json_schema() -> dict[str, Any]:
    """The published JSON Schema."""
    return _without_null_defaults(ResultRecord.model_json_schema())


def _without_null_defaults(schema: Any) -> Any:
    """The schema without `"default": null` where null is not allowed."""
    if isinstance(schema, list):
        return [_without_null_defaults(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    missing = "default" in schema and schema["default"] is None and "anyOf" not in schema
    return {k: _without_null_defaults(v) for k, v in schema.items() if not (missing and k == "default")}

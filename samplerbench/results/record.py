"""The schema of a result file: what a record has, as a pydantic model and as published JSON Schema."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Record = dict[str, Any]
"""A result as plain data: the content of its file."""


def row_name(record: Record) -> str:
    """The row of a result in a table: the sampler, and its guidance if it has one."""
    return record["sampler"] + (f" + {record['guidance']}" if record["guidance"] else "")


class MetricEntry(BaseModel):
    """One metric of a cell."""

    model_config = ConfigDict(extra="allow")

    value: float = Field(description="the metric; over several blocks their mean")
    sd: float | None = Field(None, description="standard deviation over blocks")
    blocks: list[float] | None = Field(None, description="the value of each block")
    features: str = Field(description="feature space")
    reference: str = Field(description="the real images: name (split, number)")
    better: str = Field(description="lower or higher", pattern="^(lower|higher)$")


class ResultRecord(BaseModel):
    """One cell's result: the content of <first 20 digits of the protocol hash>.json."""

    model_config = ConfigDict(extra="allow", title="samplerbench result")

    sampler: str = Field(description="spec of the sampler: its name and what differs from the defaults")
    parameters: dict[str, Any] = Field(description="every parameter of the sampler")
    guidance: str | None = Field(description="spec of the guidance, or null")
    spacing: str | None = Field(description="spec of the spacing, or null where the sampler has its own")
    steps: int | None = Field(description="intervals of the σ grid, or null where the sampler chooses", ge=1)
    budget: int | None = Field(description="network evaluations the steps were chosen to fit into, or null")
    nfe: float = Field(description="network rows evaluated per image, counted", ge=0)
    network_backward: float = Field(0, description="network rows differentiated per image, counted", ge=0)
    classifier_forward: float = Field(description="classifier rows evaluated per image, counted", ge=0)
    classifier_backward: float = Field(description="classifier rows differentiated per image, counted", ge=0)
    decoder_passes: float = Field(0, description="autoencoder rows decoded per image, counted; not in nfe", ge=0)
    n: int = Field(description="images per block", ge=1)
    blocks: int = Field(description="disjoint blocks of images", ge=1)
    seed: int = Field(ge=0)
    model: str
    labels: str
    metrics: dict[str, MetricEntry]
    seconds: float = Field(description="sampling and quantising, on one process", ge=0)
    decoder_seconds: float = Field(0, description="from latents to images, on one process; not in seconds", ge=0)
    metric_seconds: float = Field(description="features and metrics", ge=0)
    images_per_second: float = Field(ge=0)
    protocol: str = Field(description="sha256 of protocol_fields in canonical JSON", pattern="^[0-9a-f]{64}$")
    protocol_fields: dict[str, Any] = Field(
        description="everything that must be equal for two results to be one experiment"
    )
    versions: dict[str, str]
    seal: str = Field(description="sha256 of everything else: tells an edited file", pattern="^[0-9a-f]{64}$")


def schema_errors(record: dict[str, Any]) -> list[str]:
    """What in a record does not fit the schema, one line each."""
    try:
        ResultRecord.model_validate(record)
    except ValidationError as error:
        return [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    return []


def json_schema() -> dict[str, Any]:
    """The published JSON Schema."""
    return ResultRecord.model_json_schema()

"""A session: what the cells of a run are measured with, and how they are executed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from samplerbench.bench.cell import Cell, metric_sources, protocol_of
from samplerbench.bench.team import Team
from samplerbench.boundary import plugin_call
from samplerbench.metrics.extractors import Extractor
from samplerbench.metrics.guarded import min_images_of
from samplerbench.metrics.memorisation import as_points
from samplerbench.metrics.metric import Layer, Metric, check_requirements
from samplerbench.metrics.neighbours import Neighbours
from samplerbench.metrics.reference import Reference
from samplerbench.models.model import Model
from samplerbench.models.runner import how_run
from samplerbench.results.store import Store
from samplerbench.sampling import Generator, Guidance, Inputs
from samplerbench.sampling.driver import OnStep
from samplerbench.sampling.generator import bind_generator
from samplerbench.text import note


@dataclass(frozen=True)
class FeatureSpace:
    """A feature space, and the real images in it.

    Attributes:
        extractor: of the features.
        reference: statistics of the real images; None where no metric needs them.
        real: gives the features of the real images in a layer, (N, d); None where no metric needs them.
    """

    extractor: Extractor
    reference: Reference | None = None
    real: Callable[[Layer], Tensor] | None = None


@dataclass(frozen=True)
class RealData:
    """The real images themselves, for metrics of the data.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64; None without labels.
        identity: what the protocol records of them.
    """

    images: Tensor
    labels: Tensor | None
    identity: dict[str, Any]


class NamedData:
    """A data set that a metric names itself, and its nearest neighbours, computed once per feature space and layer.

    Args:
        images: (N, C, H, W) uint8.
        identity: what the protocol records of it.
    """

    def __init__(self, images: Tensor, identity: dict[str, Any]) -> None:
        self.images, self.identity = images, identity
        self.label = f"{identity['name']} ({identity['split']}, {len(images)})"
        self._known: dict[Any, Neighbours] = {}

    def neighbours(self, extractor: Extractor | None, layer: Layer | None) -> Neighbours:
        """Nearest neighbours in a layer of an extractor, or in pixels if layer is None."""
        key = None if layer is None or extractor is None else (extractor.sha256, layer)
        if key not in self._known:
            self._known[key] = Neighbours(self._points(extractor, layer))
        return self._known[key]

    def _points(self, extractor: Extractor | None, layer: Layer | None) -> Tensor:
        if layer is None or extractor is None:
            return as_points(self.images)
        return torch.cat([extractor.all(part)[layer].cpu() for part in self.images.split(extractor.chunk)])


@dataclass(frozen=True)
class MetricData:
    """The data set of a metric in the metric's own feature space (`samplerbench.metrics.metric.RealSet`)."""

    data: NamedData
    extractor: Extractor | None

    def neighbours(self, layer: Layer | None) -> Neighbours:
        """See `RealSet.neighbours`."""
        return self.data.neighbours(self.extractor, layer)


@dataclass
class Measurement:
    """What is measured: everything here is part of the protocol.

    Attributes:
        model: the checkpoint.
        reference: statistics of the real images; None where no metric needs them.
        extractor: the feature space; None where no metric needs features.
        metrics: what is computed.
        inputs: the labels or prompts of the samples of a block, n rows.
        mode: how the labels were requested ("balanced", "none", a number).
        n: images per block.
        seed: of all noise.
        blocks: disjoint sets of samples; block b holds the samples b·n … (b+1)·n - 1.
        real: the features of the real images in a layer, (N, d), for the metrics that need them.
        real_labels: the labels of the real images, (N,) int64, or None where they have none.
        spaces: the feature spaces that metrics name themselves (`Metric.feature_space`), by name.
        data: the real images, for metrics of the data; None where there is no such metric.
        named: the data sets that metrics name themselves (`Metric.data_source`), by name.
    """

    model: Model
    reference: Reference | None
    extractor: Extractor | None
    metrics: Sequence[Metric]
    inputs: Inputs
    mode: str
    n: int
    seed: int
    blocks: int = 1
    real: Callable[[Layer], Tensor] | None = None
    real_labels: Callable[[], Tensor | None] = lambda: None
    spaces: Mapping[str, FeatureSpace] = field(default_factory=dict)
    data: RealData | None = None
    named: Mapping[str, NamedData] = field(default_factory=dict)
    shared: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        reference = self.reference
        check_metrics(
            self.model,
            self.metrics,
            self.inputs,
            self.mode,
            self.n,
            dimension=None if reference is None else len(reference.moments.mean),
            has_real_images=None if reference is None else self.real is not None,
            real_images=None if reference is None else reference.data.get("n"),
        )
        chosen, how = self.inputs.chosen, how_run(self.model.network)
        counts = None if chosen is None else torch.bincount(chosen).tolist()
        self.shared = {
            "model": self.model.identity,
            "labels": {"mode": self.mode, "counts": counts},
            "n": self.n,
            "blocks": self.blocks,
            "seed": self.seed,
            "dtype": "tf32" if how.precision == "tf32" else str(self.model.dtype).removeprefix("torch."),
            **({"compile": True} if how.compiled else {}),
            "metrics": [m.spec for m in self.metrics],
            **metric_sources(self.metrics, self.stratified),
            "features": None if self.extractor is None else self.extractor.identity,
            "reference": None if self.reference is None else self.reference.data,
            **self._own_spaces(),
        }

    @cached_property
    def names(self) -> list[str]:
        """What each metric is called in a record: its label, or its spec where several metrics have that label."""
        labels = [metric.label() for metric in self.metrics]
        return [m.spec if labels.count(m.label()) > 1 else m.label() for m in self.metrics]

    def space(self, metric: Metric) -> FeatureSpace | None:
        """The feature space of a metric; None where it takes no features."""
        if not metric.needs_features:
            return None
        if metric.feature_space:
            return self.spaces[metric.feature_space]
        return None if self.extractor is None else FeatureSpace(self.extractor, self.reference, self.real)

    def real_set(self, metric: Metric) -> MetricData | None:
        """The data set that a metric names itself, in its feature space; None without one."""
        if metric.data_source is None:
            return None
        space = self.space(metric)
        return MetricData(self.named[metric.data_source], None if space is None else space.extractor)

    def _own_spaces(self) -> dict[str, Any]:
        """The protocol's fields for named feature spaces and for the data; {} without them."""
        fields: dict[str, Any] = {}
        if self.spaces:
            fields["feature spaces"] = {
                name: {
                    "features": space.extractor.identity,
                    "reference": None if space.reference is None else space.reference.data,
                }
                for name, space in self.spaces.items()
            }
        if self.data is not None:
            fields["data"] = self.data.identity
        if self.named:
            fields["metric data"] = {name or "training data": found.identity for name, found in self.named.items()}
        return fields

    @property
    def stratified(self) -> bool:
        """Whether the number of images of each label is fixed, so that the images are not independent draws."""
        return is_stratified(self.model, self.inputs, self.mode)

    def strata(self) -> Tensor | None:
        """The labels of the real images, (N,) int64, where the generated ones have the same proportions; else None."""
        labels = self.real_labels() if self.stratified else None
        if labels is None:
            return None
        counts = torch.bincount(labels).double()
        wanted = self.model.class_counts
        intended = (counts > 0).double() if wanted is None else torch.tensor(wanted, dtype=torch.float64)
        if len(counts) != len(intended):
            return None
        same = torch.allclose(counts / counts.sum(), intended / intended.sum(), rtol=1e-9, atol=0)
        return labels if same else None

    def protocol(self, cell: Cell) -> dict[str, Any]:
        """The protocol of a cell, with the identity of its guidance or generator: the weights of a classifier.

        Raises:
            UserError: a generator that cannot stand beside the model. RunError: a plugin failed.
        """
        fields = protocol_of(cell, self.shared)
        bound: Guidance | Generator | None = cell.guidance
        if isinstance(cell.method, Generator):
            bound = bind_generator(cell.method, self.model)
        if bound is not None:
            with plugin_call(bound, "in identity"):
                fields |= bound.identity
        return fields


def is_stratified(model: Model, inputs: Inputs, mode: str) -> bool:
    """Whether the number of images of each label (n,) is fixed, so that the images are not independent draws.

    It is under balanced labels. Prompts that are used once each are a sample of prompts, not strata.
    """
    if inputs.chosen is None or mode != "balanced":
        return False
    return not model.text or len(inputs) > (model.classes or 0)


def check_metrics(
    model: Model,
    metrics: Sequence[Metric],
    inputs: Inputs,
    mode: str,
    n: int,
    *,
    dimension: int | None,
    has_real_images: bool | None,
    real_images: int | None,
) -> None:
    """Check that each metric has what it needs (`check_requirements`), for a run and for its dry run alike.

    Args:
        model: the checkpoint.
        metrics: what is to be computed.
        inputs: the labels or prompts of the samples of a block, n rows.
        mode: how the labels were requested.
        n: images per block.
        dimension: d, the number of features; None where it is not known.
        has_real_images: whether the real images are at hand; None where there is no reference.
        real_images: how many there are; None where it is not known.

    Raises:
        UserError: what a metric lacks. RunError: a plugin failed.
    """
    stratified = is_stratified(model, inputs, mode)
    first = torch.arange(min(1, len(inputs)))
    with plugin_call(f"model {model.identity.get('source')}", "in inputs"):
        complete = model.inputs(first.to(model.device), inputs.rows(first).to(model.device))
    for metric in metrics:
        min_images_of(metric)
        features = metric.needs_features
        with plugin_call(metric, "in what it needs"):
            check_requirements(
                metric,
                n=n,
                dimension=dimension if features and not metric.feature_space else None,
                has_labels=inputs.labels is not None,
                has_prompts=inputs.prompts is not None,
                has_truth="truth" in complete.tensors,
                labels=inputs.chosen if stratified else None,
                has_real_images=has_real_images if features else None,
                real_images=real_images if features else None,
            )


@dataclass
class Execution:
    """How the cells are executed: none of it changes a number.

    Attributes:
        store: the folder of results.
        batch_size: images at a time.
        rerun: run cells again whose results are in the store.
        keep: how many images the sample grid shows.
        team: the processes that share the work.
        checkpoint: images between two checkpoints of a cell; None is a tenth of a block.
        stop: asked after each checkpoint, after each step of a converged solution, and while waiting for another run;
            true ends the run there.
        solving: entered with two numbers while a converged solution is computed: of the images that are solved now, and
            of all images that the run needs solved; gives what is called after each of the solver's steps, or None.
        say: takes a line about what the run waits for.
    """

    store: Store
    batch_size: int = 256
    rerun: bool = False
    keep: int = 100
    team: Team = field(default_factory=Team)
    checkpoint: int | None = None
    stop: Callable[[], bool] = lambda: False
    solving: Callable[[int, int], AbstractContextManager[OnStep | None]] = lambda images, total: nullcontext()
    say: Callable[[str], None] = note


@dataclass
class Session:
    """What is measured and how it is executed.

    solutions: converged solutions that metrics of the discretisation error have asked for, shared by all cells.
    """

    measurement: Measurement
    execution: Execution
    solutions: dict[Any, Tensor] = field(init=False, default_factory=dict)

    @property
    def conditions(self) -> dict[str, Any]:
        """What the times of this session's cells are measured under (`samplerbench.results.timings.CONDITIONS`)."""
        model = self.measurement.model
        return {
            "batch_size": self.execution.batch_size,
            "processes": self.execution.team.size,
            "device": str(model.device),
            "device_name": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "",
            "threads": torch.get_num_threads(),
            "graphs": how_run(model.network).graphs,
        }

    @property
    def chunk(self) -> int:
        """Images between two checkpoints: whole batches, so that a resumed run cuts the stream as the first did."""
        wanted = self.execution.checkpoint or -(-self.measurement.n // 10)
        whole = self.execution.batch_size * self.execution.team.size
        return max(whole, -(-wanted // whole) * whole)

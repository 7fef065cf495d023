"""Sessions: what is measured for the cells of a run, and how the cells are executed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from samplerbench.bench.cell import Cell, describe_plugin, metric_sources, protocol_of
from samplerbench.bench.team import Team
from samplerbench.boundary import plugin_call, shown
from samplerbench.errors import RunError
from samplerbench.metrics.extractors import Extractor
from samplerbench.metrics.guarded import min_images_of
from samplerbench.metrics.memorisation import as_points
from samplerbench.metrics.metric import EvaluatedImages, Layer, Metric, check_requirements, names_of
from samplerbench.metrics.neighbours import Neighbours
from samplerbench.metrics.reference import Reference
from samplerbench.models.model import Model
from samplerbench.models.runner import how_run
from samplerbench.results.store import Store
from samplerbench.sampling import Generator, Inputs, Task
from samplerbench.sampling.driver import OnStep
from samplerbench.sampling.generator import bind_generator
from samplerbench.sampling.guidance import bind_guidance
from samplerbench.text import note


@dataclass(frozen=True)
class FeatureSpace:
    """A feature space and the real images in it.

    Attributes:
        extractor: The feature extractor.
        reference: Statistics of the real images. None if no metric needs them.
        real: Function that returns the features of the real images in a layer (N, d). None if no metric needs them.
    """

    extractor: Extractor
    reference: Reference | None = None
    real: Callable[[Layer], Tensor] | None = None


@dataclass(frozen=True)
class RealData:
    """The real images, for metrics that measure the data.

    Attributes:
        images: Images (N, C, H, W), uint8.
        labels: Labels (N,), int64, or None.
        identity: Identity of the images, as recorded in the protocol.
    """

    images: Tensor
    labels: Tensor | None
    identity: dict[str, Any]


class NamedData:
    """A data set that a metric selects itself. Nearest neighbours are computed once per feature space and layer.

    Args:
        images: Images (N, C, H, W), uint8.
        identity: Identity of the data set, as recorded in the protocol.
    """

    def __init__(self, images: Tensor, identity: dict[str, Any]) -> None:
        self.images, self.identity = images, identity
        self.label = f"{identity['name']} ({identity['split']}, {len(images)})"
        self._known: dict[Any, Neighbours] = {}

    def neighbours(self, extractor: Extractor | None, layer: Layer | None) -> Neighbours:
        """Return the nearest-neighbour search over the data set.

        Args:
            extractor: The feature extractor, or None.
            layer: Layer of the extractor. If None, distances are computed between pixels.
        """
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
    """The data set of a metric in the feature space of the metric (`samplerbench.metrics.metric.RealSet`).

    Attributes:
        data: The data set.
        extractor: The feature extractor of the metric, or None.
    """

    data: NamedData
    extractor: Extractor | None

    def neighbours(self, layer: Layer | None) -> Neighbours:
        """See `RealSet.neighbours`."""
        return self.data.neighbours(self.extractor, layer)


@dataclass
class Measurement:
    """What is measured. All of it is part of the protocol.

    Attributes:
        model: The model.
        reference: Statistics of the real images. None if no metric needs them.
        extractor: The feature extractor. None if no metric needs features.
        metrics: The metrics.
        inputs: Labels or prompts of the samples of a block, n rows.
        mode: The label mode: "balanced", "none" or a single label.
        n: Images per block.
        seed: Seed of all noise.
        blocks: Number of blocks. Block b contains the samples b·n … (b+1)·n - 1.
        real: Function that returns the features of the real images in a layer (N, d), or None.
        real_labels: Function that returns the labels of the real images (N,), int64, or None without labels.
        spaces: Feature spaces that metrics select themselves (`Metric.feature_space`), by name.
        data: The real images. None if no metric measures the data.
        named: Data sets that metrics select themselves (`Metric.data_source`), by name.
        evaluated: Images that metrics of the data evaluate in place of the real images, by the spec of the metric.
        truth: Identity of the real images that the task of the model observes. None without a task.
        shared: Protocol fields that all cells have in common.
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
    evaluated: Mapping[str, EvaluatedImages] = field(default_factory=dict)
    truth: dict[str, Any] | None = None
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
            "dtype": dtype_name(self.model),
            **({"compile": True} if how.compiled else {}),
            "metrics": [m.spec for m in self.metrics],
            **self._metric_sources(self.stratified),
            "features": None if self.extractor is None else self.extractor.identity,
            "reference": None if self.reference is None else self.reference.data,
            **self._own_spaces(),
            **({} if self.task is None else {"task": describe_plugin(self.task) | {"images": self.truth}}),
        }

    @property
    def task(self) -> Task | None:
        """The task of the model, or None."""
        return None if self.model.observation is None else self.model.observation.task

    @cached_property
    def names(self) -> list[str]:
        """Names of the metrics in a record (`names_of`)."""
        return names_of(self.metrics)

    def space(self, metric: Metric) -> FeatureSpace | None:
        """Return the feature space of a metric, or None if it needs no features.

        Args:
            metric: The metric.
        """
        if not metric.needs_features:
            return None
        if metric.feature_space:
            return self.spaces[metric.feature_space]
        return None if self.extractor is None else FeatureSpace(self.extractor, self.reference, self.real)

    def real_set(self, metric: Metric) -> MetricData | None:
        """Return the data set that a metric selects itself, or None.

        Args:
            metric: The metric.
        """
        if metric.data_source is None:
            return None
        space = self.space(metric)
        return MetricData(self.named[metric.data_source], None if space is None else space.extractor)

    def _own_spaces(self) -> dict[str, Any]:
        """Return the protocol fields of the feature spaces and data sets that metrics select themselves."""
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

    def _metric_sources(self, stratified: bool) -> dict[str, dict[str, str]]:
        """Return the protocol field of `metric_sources`, with the identity of the images that metrics evaluate."""
        sources = metric_sources(self.metrics, stratified).get("metric sources", {})
        for spec, images in self.evaluated.items():
            sources[spec] = f"{sources.get(spec, '')} {images.identity}".strip()
        return {"metric sources": sources} if sources else {}

    def reason(self, metric: Metric, cell: Cell) -> str | None:
        """Return why a metric has no value for a cell, in one sentence without a full stop, or None if it has one.

        Args:
            metric: The metric.
            cell: The cell.

        Raises:
            RunError: If a plugin fails.
        """
        return why_not(metric, cell, self.model)

    @property
    def stratified(self) -> bool:
        """Whether the number of images of each label is fixed, so that the images are not independent draws."""
        return is_stratified(self.model, self.inputs, self.mode)

    def stratified_in(self, cell: Cell) -> bool:
        """Return whether the number of images of each label is fixed in a cell."""
        return self.stratified and not has_own_labels(cell)

    def strata(self) -> Tensor | None:
        """Return the labels of the real images if the generated images have the same class proportions.

        Returns:
            Labels (N,), int64. None if the proportions differ or are random.
        """
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
        """Return the protocol of a cell, with the identity of its guidance or generator.

        The identity contains, for example, the hash of a classifier. A cell that could not be planned has none.

        Args:
            cell: The cell.

        Returns:
            The protocol as a dictionary that can be written as JSON.

        Raises:
            UserError: If a guidance or a generator does not support the model.
            RunError: If a plugin fails.
        """
        fields = protocol_of(cell, self.shared)
        if cell.error is not None:
            return fields
        if isinstance(cell.method, Generator):
            fields |= dict(bind_generator(cell.method, self.model).bound_identity)
            fields.pop("metric sources", None)  # the estimators depend on whether the labels are the requested ones
            return fields | self._metric_sources(self.stratified_in(cell))
        guidance = bind_guidance(cell.guidance, self.model)
        return fields if guidance is None else fields | dict(guidance.bound_identity)


def why_not(metric: Metric, cell: Cell, model: Model) -> str | None:
    """Return why a metric has no value for a cell (`Metric.inapplicable`), or None if it has one or the cell failed.

    Args:
        metric: The metric.
        cell: The cell.
        model: The model.

    Raises:
        RunError: If a plugin fails.
    """
    if type(metric).inapplicable is Metric.inapplicable or cell.error is not None:
        return None
    if isinstance(cell.method, Generator):
        return f"{cell.method.spec} is a generator and has no noise levels"
    with plugin_call(metric, "in inapplicable"):
        reason = metric.inapplicable(cell.method, cell.guidance, model)
    if not isinstance(reason, str | None):
        raise RunError(f"metric {metric.label()}: inapplicable returned {shown(reason)}; it must be a text or None.")
    return reason


def dtype_name(model: Model) -> str:
    """Return the precision of the network as recorded in a protocol: "tf32", or the dtype of the weights.

    Args:
        model: The model.
    """
    return "tf32" if how_run(model.network).precision == "tf32" else str(model.dtype).removeprefix("torch.")


def has_own_labels(cell: Cell) -> bool:
    """Return whether the images of a cell have labels of their own, so that the requested labels have no effect."""
    return isinstance(cell.method, Generator) and cell.method.own_labels


def is_stratified(model: Model, inputs: Inputs, mode: str) -> bool:
    """Return whether the number of images of each label is fixed, so that images are not independent draws.

    This is the case for balanced labels. If every prompt is used once, the prompts are a sample and not strata.

    Args:
        model: The model.
        inputs: Labels or prompts of the samples of a block, n rows.
        mode: The label mode.
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
    """Check the requirements of all metrics (`check_requirements`). Runs and dry runs use the same checks.

    Args:
        model: The model.
        metrics: The metrics.
        inputs: Labels or prompts of the samples of a block, n rows.
        mode: The label mode.
        n: Images per block.
        dimension: Number of features d, or None if it is not known.
        has_real_images: Whether the real images are available. None without a reference.
        real_images: Number of real images, or None if it is not known.

    Raises:
        UserError: If a metric lacks something that it needs.
        RunError: If a plugin fails.
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
    """How the cells are executed. None of it affects the results.

    Attributes:
        store: The folder of results.
        batch_size: Images per batch.
        rerun: Whether to run cells again that have a result in the store.
        keep: Number of images in the sample grid.
        team: The processes that share the work.
        checkpoint: Images between two checkpoints of a cell. If None, a tenth of a block.
        stop: Function that returns whether to stop the run. It is called after each checkpoint, after each step of a
            converged solution, and while waiting for another run.
        solving: Function of the number of images that are solved now and of all images that the run needs solved. It
            returns a context manager that is active while a converged solution is computed. The value of the context
            manager is called after each step of the solver, unless it is None.
        say: Function that prints a line about what the run waits for.
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
    """A measurement and its execution.

    Attributes:
        measurement: What is measured.
        execution: How the cells are executed.
        solutions: Converged solutions for metrics of the discretisation error. All cells share them.
    """

    measurement: Measurement
    execution: Execution
    solutions: dict[Any, Tensor] = field(init=False, default_factory=dict)

    @property
    def conditions(self) -> dict[str, Any]:
        """Conditions under which times are measured (`samplerbench.results.timings.CONDITIONS`)."""
        model = self.measurement.model
        return {
            "batch_size": self.execution.batch_size,
            "processes": self.execution.team.size,
            "device": str(model.device),
            "device_name": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "",
            "threads": torch.get_num_threads(),
            "graphs": how_run(model.network).graphs,
            "memory": how_run(model.network).memory,
        }

    @property
    def chunk(self) -> int:
        """Images between two checkpoints. Always whole batches, so that a resumed run has the same batches."""
        wanted = self.execution.checkpoint or -(-self.measurement.n // 10)
        whole = self.execution.batch_size * self.execution.team.size
        return max(whole, -(-wanted // whole) * whole)

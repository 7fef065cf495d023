"""Preparation of a run: loads the model, plans the cells, and checks everything before sampling starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from samplerbench.bench import setup
from samplerbench.bench.cell import Cell, metric_sources
from samplerbench.bench.labels import make_labels, parse_label
from samplerbench.bench.plan import Unmet, plan
from samplerbench.bench.request import Published, Request
from samplerbench.bench.schedules import levels_of_run
from samplerbench.bench.session import (
    Execution,
    FeatureSpace,
    Measurement,
    NamedData,
    RealData,
    Session,
    check_metrics,
    is_stratified,
    why_not,
)
from samplerbench.bench.team import Team
from samplerbench.bench.truth import Truth, load_truth
from samplerbench.boundary import plugin_call
from samplerbench.errors import RunError, UserError, argument
from samplerbench.metrics.extractors import Extractor
from samplerbench.metrics.metric import EvaluatedImages, Metric, check_requirements
from samplerbench.metrics.reference import Reference
from samplerbench.models.legacy import check_legacy
from samplerbench.models.model import Model, check_guidance
from samplerbench.models.runner import how_run
from samplerbench.results.names import RowNames
from samplerbench.results.seal import canonical
from samplerbench.results.store import Store
from samplerbench.sampling import Generator, Guidance, Inputs, Sampler, Spacing, Task
from samplerbench.sampling.guidance import bind_guidance, evaluations_of
from samplerbench.sampling.sampler import check_sampler_task


@dataclass
class Prepared:
    """A request with its objects loaded and its cells planned.

    Attributes:
        request: The request.
        model: The model.
        guidances: The guidances that could be bound to the model. None is the unguided model.
        cells: The planned cells.
        unmet: The budgets that are smaller than the cost of one step.
        mode: The label mode: "balanced", "none" or a single label.
        classes: Number of classes or prompts, or None.
        batch_size: Images per batch.
        metrics: The metrics.
        published: The published values, each with its cell.
        tasks: The inverse problems. With tasks, the model has an observation of the first one, of a blank image.
    """

    request: Request
    model: Model
    guidances: list[Guidance | None]
    cells: list[Cell]
    unmet: list[Unmet]
    mode: str
    classes: int | None
    batch_size: int
    metrics: list[Metric] = field(default_factory=list)
    published: list[tuple[Cell, Published]] = field(default_factory=list)
    tasks: list[Task] = field(default_factory=list)

    @cached_property
    def runs(self) -> list[list[Cell]]:
        """The cells, grouped by everything except their budget. Each group is sampled once."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(_identity(cell, budget=False), []).append(cell)
        return list(found.values())

    @cached_property
    def names(self) -> RowNames:
        """Row names of the cells, which are known before any cell has a result."""
        return RowNames([*(cell.pending for cell in self.cells), *(gap.record for gap in self.unmet)])

    def title(self, cell: Cell) -> str:
        """Return the title of a cell with its row name in the table: `ddim:eta=0.5 + cfg:scale=2, 50 steps`.

        Args:
            cell: The cell.
        """
        return f"{self.names.row(cell.pending)}{cell.length}"

    def inputs(self, n: int) -> Inputs:
        """Create the labels or prompts of n samples.

        Args:
            n: Number of samples.

        Returns:
            The inputs, n rows.

        Raises:
            UserError: If the model, a guidance or a generator does not support them.
        """
        return self.inputs_of(n, make_labels(self.mode, n, self.classes, self.model.class_counts))

    def inputs_of(self, n: int, chosen: Tensor | None) -> Inputs:
        """Create the inputs of n samples with given labels.

        Args:
            n: Number of samples.
            chosen: Labels, or indices of prompts for a text-to-image model, (n,) int64. None for no labels.

        Returns:
            The inputs, n rows.

        Raises:
            UserError: If the model, a guidance or a generator does not support them.
        """
        inputs = Inputs(n, prompts=chosen) if self.model.text else Inputs(n, labels=chosen)
        self.model.check_inputs(inputs)
        for guidance in self.guidances:
            check_guidance(self.model, guidance, inputs)
        for cell in self.cells:
            if isinstance(cell.method, Generator) and cell.method.needs_labels and inputs.labels is None:
                raise UserError(
                    f"generator {cell.method.label()} needs labels: use {argument('labels', 'balanced')} or a label."
                )
        return inputs


def prepare(request: Request, device: str, model: Model | None = None, team: Team | None = None) -> Prepared:
    """Load the model, plan the cells, and check them.

    Args:
        request: The request.
        device: Name of the device, or "auto".
        model: A model that is already loaded. If None, the model of the request is loaded.
        team: The processes that share the work. If None, this process alone.

    Returns:
        The prepared request.

    Raises:
        UserError: If the request is invalid or cannot be run.
    """
    grids = [(grid, list(dict.fromkeys(grid.samplers))) for grid in request.grids]
    for grid, samplers in grids:
        for spacing in grid.spacings:
            for method in samplers:
                if isinstance(method, Sampler):
                    setup.pick_spacing(method, spacing)
    if model is None:
        model = setup.load_model(request.model, setup.pick_device(device), request.dtype, request.load)
    tasks = list(dict.fromkeys(request.tasks))
    observed = [model.observed(task, torch.zeros(1, *model.shape)) for task in tasks]
    model = observed[0] if observed else model
    # The protocol has the number of a class, also where the request has its name.
    requested = None if request.labels is None else str(parse_label(request.labels, model.class_names))
    levels_of = levels_of_run(model, requested, team or Team())
    cells: dict[str, Cell] = {}
    unmet: list[Unmet] = []
    bound: dict[Guidance | None, Guidance | None] = {}
    published: list[tuple[Cell, Published]] = []
    for grid, samplers in grids:
        for method in samplers:
            if isinstance(method, Sampler):
                check_legacy(method, model)
                for one in observed or [model]:
                    check_sampler_task(method, one.observation)
        for spacing in grid.spacings:

            def spacing_of(sampler: Sampler, given: Spacing | None = spacing) -> Spacing:
                return setup.pick_spacing(sampler, given, model.spacing)

            guided = [bound.get(guidance, guidance) for guidance in grid.guidances]
            found, gaps = plan(model, samplers, grid.steps, guided, spacing_of, grid.nfe, levels_of)
            used = [cell.guidance for cell in found]
            bound |= {g: g for g in used if g is None or g.bound_to is model}
            # A cell that occurs in two grids is run once.
            cells |= {_identity(cell): cell for cell in found if _identity(cell) not in cells}
            unmet += [gap for gap in gaps if gap not in unmet]
            for p in grid.published:
                reported = (p.sampler, p.guidance, p.column)
                published += [
                    (cells[_identity(c)], p) for c in found if (c.method, c.guidance, c.budget or c.steps) == reported
                ]
    guidances = list(bound)
    for other in observed[1:]:
        for guidance in guidances:
            with suppress(RunError):  # the cells with this guidance will fail
                bind_guidance(guidance, other)
    classes = setup.label_classes(model, guidances)
    # The label of an observed image is not known.
    mode = requested or ("none" if classes is None or tasks else "balanced")
    batch_size = (team or Team()).tell(_batch_size(request, model, guidances))
    prepared = Prepared(
        request,
        model,
        guidances,
        list(cells.values()),
        unmet,
        mode,
        classes,
        batch_size,
        list(request.metrics),
        published,
        tasks,
    )
    prepared.inputs(1)
    return prepared


def _batch_size(request: Request, model: Model, guidances: Sequence[Guidance | None]) -> int:
    if request.batch_size != "auto":
        return request.batch_size
    from samplerbench.bench.batch_size import fastest_batch_size

    evaluations = max(map(_rows_of, guidances), default=1)
    return fastest_batch_size(model, request.n or 50_000, evaluations)


def _rows_of(guidance: Guidance | None) -> int:
    try:
        return evaluations_of(guidance)
    except RunError:  # the cells with this guidance will fail
        return 1


def _identity(cell: Cell, budget: bool = True) -> str:
    guidance = None if cell.guidance is None else cell.guidance.spec
    spacing = None if cell.spacing is None else cell.spacing.spec
    grid = cell.sigmas.tolist() if cell.error is None else cell.steps
    return canonical([cell.method.spec, guidance, spacing, grid, cell.budget if budget else None])


@dataclass
class Measured:
    """The real images of a run and their statistics.

    Attributes:
        extractor: The feature extractor. None if no metric needs features.
        reference: Statistics of the real images. None if no metric needs them.
        n: Images per block.
        real: Features of the real images in a layer (N, d). None if no metric needs them.
        spaces: Feature spaces that metrics select themselves, by name.
        data: The real images. None if no metric measures the data.
        named: Data sets that metrics select themselves, by name.
        evaluated: Images that metrics of the data evaluate in place of the real images, by the spec of the metric.
        truth: The real images that tasks observe. None without tasks.
    """

    extractor: Extractor | None
    reference: Reference | None
    n: int
    real: setup.RealImages | None
    spaces: dict[str, FeatureSpace] = field(default_factory=dict)
    data: RealData | None = None
    named: dict[str, NamedData] = field(default_factory=dict)
    evaluated: dict[str, EvaluatedImages] = field(default_factory=dict)
    truth: Truth | None = None


def measure_reference(prepared: Prepared) -> Measured:
    """Load the extractor and the reference that the metrics need, and determine the number of images per block.

    Args:
        prepared: The prepared request.

    Returns:
        The real images and their statistics.

    Raises:
        UserError: If a metric needs real images or their statistics and they are not available.
    """
    request, model = prepared.request, prepared.model
    using = [m for m in prepared.metrics if m.needs_features and not m.feature_space]
    images = _check_needs(prepared)
    measured = Measured(None, None, 0, None)
    if using:
        measured.extractor = setup.pick_extractor(
            model, request.features, request.features_weights, model.device, using
        )
        if images is not None:
            measured.reference = setup.pick_reference(model, request.data, measured.extractor)
            measured.real = setup.RealImages(model, request.data, measured.extractor) if images else None
    measured.spaces = _own_spaces(prepared)
    measured.named = {s: setup.named_data(model, s) for s in _sources(prepared)}
    measured.evaluated = evaluated_images(prepared)
    reference = measured.reference
    measured.n = (
        _n(prepared, measured.evaluated)
        if reference is None or request.n is not None
        else setup.default_n(model, reference.data["n"])
    )
    whole = [m for m in prepared.metrics if m.of == "data" and m.spec not in measured.evaluated]
    if of_data := [f"the metric {metric.label()}" for metric in whole]:
        measured.data = setup.real_data(model, request.data, measured.n * request.blocks, of_data[0])
    if prepared.tasks:
        measured.truth = load_truth(model, request.data, measured.n * request.blocks, prepared.tasks)
    return measured


def evaluated_images(prepared: Prepared) -> dict[str, EvaluatedImages]:
    """Load the images that metrics of the data evaluate in place of the real images, by the spec of the metric.

    Args:
        prepared: The prepared request.

    Raises:
        UserError: If a metric has no value for the model, or its images are not available.
        RunError: If a plugin fails.
    """
    request, found = prepared.request, {}
    for metric in prepared.metrics:
        if metric.of != "data":
            continue
        with _naming(metric), plugin_call(metric, "in evaluated"):
            images = metric.evaluated(prepared.model, request.n, request.blocks)
            if images is not None:
                found[metric.spec] = images
    return found


def _check_applicable(prepared: Prepared) -> None:
    """Check that each metric has a value for a cell.

    Raises:
        UserError: If a metric has no value for any cell.
    """
    cells = [cell for cell in prepared.cells if cell.error is None]
    for metric in prepared.metrics:
        reasons = [why_not(metric, cell, prepared.model) for cell in cells]
        if reasons and all(reason is not None for reason in reasons):
            raise UserError(
                f"the metric {metric.label()} has no value for any sampler of this run: "
                f"{'; '.join(dict.fromkeys(map(str, reasons)))}."
            )


def _sources(prepared: Prepared) -> list[str]:
    """Return the names of the data sets that metrics select themselves. "" is the training data of the model."""
    return list(dict.fromkeys(m.data_source for m in prepared.metrics if m.data_source is not None))


def _own_spaces(prepared: Prepared) -> dict[str, FeatureSpace]:
    """Load the feature spaces that metrics select themselves, with real images where metrics need them."""
    request, model = prepared.request, prepared.model
    by_name: dict[str, list[Metric]] = {}
    for metric in prepared.metrics:
        if metric.needs_features and metric.feature_space:
            by_name.setdefault(metric.feature_space, []).append(metric)
    spaces = {}
    for name, metrics in by_name.items():
        with _naming(metrics[0]):
            extractor = setup.pick_extractor(model, name, None, model.device, metrics)
        needed = any(m.needs_reference or m.needs_real_images for m in metrics)
        reference = setup.pick_reference(model, request.data, extractor) if needed else None
        images = any(m.needs_real_images for m in metrics)
        spaces[name] = FeatureSpace(
            extractor, reference, setup.RealImages(model, request.data, extractor) if images else None
        )
    return spaces


def check_measurement(prepared: Prepared) -> int:
    """Perform the checks of a run that do not need the weights of a feature space.

    Args:
        prepared: The prepared request.

    Returns:
        The number of images per block.

    Raises:
        UserError: If `measure_reference` or `make_session` would reject the request.
        RunError: If a plugin fails.
    """
    request, model = prepared.request, prepared.model
    images = _check_needs(prepared)
    real, n = setup.RealSizes(None, None), request.n
    if images is not None:
        real = setup.look_at_reference(model, request.data, request.features, request.features_weights)
        n = setup.default_n(model, real.n) if n is None else n
    elif any(m.needs_features for m in prepared.metrics):
        setup.known_dimension(setup.features_name(model, request.features), request.features_weights)
    n = _n(prepared, evaluated_images(prepared)) if n is None else n
    inputs = prepared.inputs(n)
    sizes: dict[str, int | None] = {"dimension": real.dimension, "real_images": real.n}
    check_metrics(model, prepared.metrics, inputs, prepared.mode, n, has_real_images=images, **sizes)
    metric_sources(prepared.metrics, is_stratified(model, inputs, prepared.mode))  # a metric may read its own weights
    return n


def _check_needs(prepared: Prepared) -> bool | None:
    """Perform the checks that need neither weights nor images.

    Returns:
        Whether the real images are available. False if only their statistics are. None without a reference.

    Raises:
        UserError: If a metric lacks something that it needs.
    """
    request, model = prepared.request, prepared.model
    using = [m for m in prepared.metrics if m.needs_features]
    conditional = prepared.mode != "none"
    _check_applicable(prepared)
    for metric in prepared.metrics:
        labels, prompts = conditional and not model.text, conditional and model.text
        _check(metric, n=request.n, has_labels=labels, has_prompts=prompts, has_classes=prepared.classes is not None)
        if model.by_own_call:
            with plugin_call(metric, "in solution"):
                solution = metric.solution(1)
            if solution is not None:
                raise UserError(
                    f"the metric {metric.label()} needs the denoiser of the model, but a pipeline that is run by its "
                    "own call gives only images; use other metrics."
                )
        if metric.data_source is not None:
            setup.check_named_data(model, metric.data_source, metric.label())
        if metric.needs_features and metric.feature_space:
            with _naming(metric):
                setup.known_dimension(metric.feature_space, None)
    needed = any(m.needs_reference or m.needs_real_images for m in using)
    if not using or (not needed and not _has_reference(model, request.data)):
        return None
    setup.check_reference(model, request.data, request.features)
    images = setup.has_real_images(model, request.data)
    for metric in using:
        if metric.needs_real_images:
            setup.require_real_images(model, request.data, f"the metric {metric.label()}")
        _check(metric, has_real_images=images)
    return images


@contextmanager
def _naming(metric: Metric) -> Iterator[None]:
    """Add the name of a metric to the errors of the features that it selects itself."""
    try:
        yield
    except UserError as error:
        raise UserError(f"the metric {metric.label()}: {error}") from None


def _check(metric: Metric, **known: Any) -> None:
    with plugin_call(metric, "in what it needs"):
        check_requirements(metric, **known)


def _has_reference(model: Model, data: str | None) -> bool:
    return bool(data or model.data or model.draws)


def _n(prepared: Prepared, evaluated: Mapping[str, EvaluatedImages]) -> int:
    """Return the number of images per block for a run without a reference."""
    request, model = prepared.request, prepared.model
    if request.n is not None:
        return request.n
    if evaluated and all(metric.spec in evaluated for metric in prepared.metrics):
        return max(images.n for images in evaluated.values())
    count = setup.count_images(model, request.data) if model.default_n is None else None
    if count is None and model.default_n is None:
        raise UserError(f"there are no real images to take the number of images from; set it with {argument('n')}.")
    return setup.default_n(model, count)


def even_batches(n: int, batch_size: int, processes: int = 1) -> int:
    """Return the smallest batch size that needs no more batches than `batch_size`.

    Compiled networks and CUDA graphs pad every batch to the same size. Even batches minimise the padding.

    Args:
        n: Number of images.
        batch_size: Maximum number of images per batch.
        processes: Number of processes that share the images.

    Returns:
        The batch size.
    """
    rounds = -(-n // (batch_size * processes))
    return -(-n // (rounds * processes))


def make_session(
    prepared: Prepared,
    measured: Measured,
    seed: int,
    store: Store,
    rerun: bool = False,
    team: Team | None = None,
    task: Task | None = None,
) -> Session:
    """Create the session for one seed and one task.

    Args:
        prepared: The prepared request.
        measured: The real images and their statistics.
        seed: Seed of all noise.
        store: The folder of results.
        rerun: Whether to run cells again that have a result in the store.
        team: The processes that share the work. If None, this process alone.
        task: The inverse problem. None without tasks.

    Returns:
        The session.

    Raises:
        UserError: If a metric needs more images.
        RunError: If a plugin fails.
    """
    request, size = prepared.request, prepared.batch_size
    team = team or Team()
    how = how_run(prepared.model.network)
    if how.compiled or how.graphs:
        size = even_batches(measured.n, size, team.size)
    model, truth = prepared.model, measured.truth
    if task is not None and truth is not None:
        model = truth.observed(model, task, seed)
    measurement = Measurement(
        model,
        measured.reference,
        measured.extractor,
        prepared.metrics,
        prepared.inputs(measured.n),
        prepared.mode,
        measured.n,
        seed,
        request.blocks,
        measured.real,
        spaces=measured.spaces,
        data=measured.data,
        named=measured.named,
        evaluated=measured.evaluated,
        truth=None if truth is None else truth.identity,
    )
    if measured.real is not None:
        measurement.real_labels = measured.real.labels
    return Session(measurement, Execution(store, size, rerun, team=team))

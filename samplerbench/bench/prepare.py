"""From a request to the cells of a run: the model loaded, the cells planned, everything checked before a run begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from samplerbench.bench import setup
from samplerbench.bench.cell import Cell
from samplerbench.bench.labels import make_labels
from samplerbench.bench.plan import Unmet, plan
from samplerbench.bench.request import Published, Request
from samplerbench.bench.session import (
    Execution,
    FeatureSpace,
    Measurement,
    NamedData,
    RealData,
    Session,
    check_metrics,
)
from samplerbench.bench.team import Team
from samplerbench.boundary import plugin_call
from samplerbench.errors import RunError, UserError, argument
from samplerbench.metrics.extractors import Extractor
from samplerbench.metrics.metric import Metric, check_requirements
from samplerbench.metrics.reference import Reference
from samplerbench.models.legacy import check_legacy
from samplerbench.models.model import Model, check_guidance
from samplerbench.models.runner import how_run
from samplerbench.results.names import RowNames
from samplerbench.results.seal import canonical
from samplerbench.results.store import Store
from samplerbench.sampling import Generator, Guidance, Inputs, Sampler, Spacing
from samplerbench.sampling.generator import bind_generator
from samplerbench.sampling.guidance import evaluations_of


@dataclass
class Prepared:
    """The objects that a request names. batch_size: images at a time."""

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

    @cached_property
    def runs(self) -> list[list[Cell]]:
        """The cells, those together that differ in their budget of evaluations alone: they are sampled once."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            found.setdefault(_identity(cell, budget=False), []).append(cell)
        return list(found.values())

    @cached_property
    def names(self) -> RowNames:
        """What the cells are called beside one another, before any of them has a result."""
        return RowNames([*(cell.pending for cell in self.cells), *(gap.record for gap in self.unmet)])

    def title(self, cell: Cell) -> str:
        """`ddim:eta=0.5 + cfg:scale=2, 50 steps`, with the names of the table."""
        own = "its own steps" if cell.error is None else f"a budget of {cell.budget}"
        return f"{self.names.row(cell.pending)}, " + (f"{cell.steps} steps" if cell.steps else own)

    def inputs(self, n: int) -> Inputs:
        """The labels or prompts of n samples, checked against the model, guidances and generators. Raises UserError."""
        chosen = make_labels(self.mode, n, self.classes, self.model.class_counts)
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
    """Load the model, plan the cells and check both; `model` is one that is loaded already. Raises UserError."""
    grids = [(grid, list(dict.fromkeys(grid.samplers))) for grid in request.grids]
    for grid, samplers in grids:
        for spacing in grid.spacings:
            for method in samplers:
                if isinstance(method, Sampler):
                    setup.pick_spacing(method, spacing)
    if model is None:
        model = setup.load_model(request.model, setup.pick_device(device), request.dtype, request.load)
    cells: dict[str, Cell] = {}
    unmet: list[Unmet] = []
    guidances: list[Guidance | None] = []
    published: list[tuple[Cell, Published]] = []
    for grid, samplers in grids:
        for method in samplers:
            if isinstance(method, Generator):
                bind_generator(method, model)
            else:
                check_legacy(method, model)
        for guidance in grid.guidances:
            if guidance not in guidances:
                guidances.append(setup.try_to_bind(guidance, model))
        guided = [guidances[guidances.index(guidance)] for guidance in grid.guidances]
        for spacing in grid.spacings:

            def spacing_of(sampler: Sampler, asked: Spacing | None = spacing) -> Spacing:
                return setup.pick_spacing(sampler, asked)

            found, gaps = plan(model, samplers, grid.steps, guided, spacing_of, grid.nfe)
            # The same cell may stand in two grids; it is run once.
            cells |= {_identity(cell): cell for cell in found if _identity(cell) not in cells}
            unmet += [gap for gap in gaps if gap not in unmet]
            for p in grid.published:
                reported = (p.sampler, p.guidance, p.column)
                published += [
                    (cells[_identity(c)], p) for c in found if (c.method, c.guidance, c.budget or c.steps) == reported
                ]
    classes = setup.label_classes(model, guidances)
    mode = request.labels or ("none" if classes is None else "balanced")
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
    except RunError:  # its cells will fail
        return 1


def _identity(cell: Cell, budget: bool = True) -> str:
    guidance = None if cell.guidance is None else cell.guidance.spec
    spacing = None if cell.spacing is None else cell.spacing.spec
    grid = cell.sigmas.tolist() if cell.error is None else cell.steps
    return canonical([cell.method.spec, guidance, spacing, grid, cell.budget if budget else None])


@dataclass
class Measured:
    """The real side of a run.

    Attributes:
        extractor: the feature space; None where no metric needs features.
        reference: statistics of the real images; None where no metric needs them.
        n: images per block.
        real: the features of the real images in a layer, (N, d).
        spaces: the feature spaces that metrics name themselves, by name.
        data: the real images, where a metric is of the data.
        named: the data sets that metrics name themselves, by name.
    """

    extractor: Extractor | None
    reference: Reference | None
    n: int
    real: setup.RealImages | None
    spaces: dict[str, FeatureSpace] = field(default_factory=dict)
    data: RealData | None = None
    named: dict[str, NamedData] = field(default_factory=dict)


def measure_reference(prepared: Prepared) -> Measured:
    """The extractor, the reference, and the number of images per block, as far as the metrics need them.

    Raises:
        UserError: a metric needs real images, or statistics of them, and there are none.
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
    reference = measured.reference
    measured.n = _n(prepared) if reference is None or request.n is not None else setup.default_n(reference.data["n"])
    if any(metric.of == "data" for metric in prepared.metrics):
        measured.data = setup.real_data(model, request.data, measured.n * request.blocks)
    return measured


def _sources(prepared: Prepared) -> list[str]:
    """The data sets that metrics name themselves; "" is the training data of the model."""
    return list(dict.fromkeys(m.data_source for m in prepared.metrics if m.data_source is not None))


def _own_spaces(prepared: Prepared) -> dict[str, FeatureSpace]:
    """The feature spaces that metrics name themselves, each with the real images in it as far as they are needed."""
    request, model = prepared.request, prepared.model
    by_name: dict[str, list[Metric]] = {}
    for metric in prepared.metrics:
        if metric.needs_features and metric.feature_space:
            by_name.setdefault(metric.feature_space, []).append(metric)
    spaces = {}
    for name, metrics in by_name.items():
        extractor = setup.pick_extractor(model, name, None, model.device, metrics)
        needed = any(m.needs_reference or m.needs_real_images for m in metrics)
        reference = setup.pick_reference(model, request.data, extractor) if needed else None
        images = any(m.needs_real_images for m in metrics)
        spaces[name] = FeatureSpace(
            extractor, reference, setup.RealImages(model, request.data, extractor) if images else None
        )
    return spaces


def check_measurement(prepared: Prepared) -> int:
    """Check all that a run checks before it samples, as far as no weights of a feature space are needed for it.

    Returns:
        The number of images per block.

    Raises:
        UserError: what `measure_reference` and `make_session` refuse. RunError: a plugin failed.
    """
    request, model = prepared.request, prepared.model
    images = _check_needs(prepared)
    real, n = setup.RealSizes(None, None), request.n
    if images is not None:
        real = setup.look_at_reference(model, request.data, request.features, request.features_weights)
        n = setup.default_n(real.n) if n is None else n
    elif any(m.needs_features for m in prepared.metrics):
        setup.known_dimension(setup.features_name(model, request.features), request.features_weights)
    n = _n(prepared) if n is None else n
    inputs = prepared.inputs(n)
    sizes: dict[str, int | None] = {"dimension": real.dimension, "real_images": real.n}
    check_metrics(model, prepared.metrics, inputs, prepared.mode, n, has_real_images=images, **sizes)
    return n


def _check_needs(prepared: Prepared) -> bool | None:
    """Check what can be checked before any weights are fetched or any image is read.

    Returns:
        Whether the real images are available, and not only their statistics; None where there is no reference.

    Raises:
        UserError: what a metric lacks.
    """
    request, model = prepared.request, prepared.model
    using = [m for m in prepared.metrics if m.needs_features]
    conditional = prepared.mode != "none"
    for metric in prepared.metrics:
        labels, prompts = conditional and not model.text, conditional and model.text
        _check(metric, n=request.n, has_labels=labels, has_prompts=prompts)
    for source in _sources(prepared):
        setup.check_named_data(model, source)
    needed = any(m.needs_reference or m.needs_real_images for m in using)
    if not using or (not needed and not _has_reference(model, request.data)):
        return None
    setup.check_reference(model, request.data)
    images = setup.has_real_images(model, request.data)
    for metric in using:
        _check(metric, has_real_images=images)
    return images


def _check(metric: Metric, **known: Any) -> None:
    with plugin_call(metric, "in what it needs"):
        check_requirements(metric, **known)


def _has_reference(model: Model, data: str | None) -> bool:
    return bool(data or model.data or model.draws)


def _n(prepared: Prepared) -> int:
    """Images per block of a run without a reference."""
    request, model = prepared.request, prepared.model
    if request.n is not None:
        return request.n
    found = setup.count_images(model, request.data)
    if found is None:
        raise UserError(f"there are no real images to take the number of images from; give it with {argument('n')}.")
    return setup.default_n(found)


def even_batches(n: int, batch_size: int, processes: int = 1) -> int:
    """The least batch size that needs no more batches than `batch_size`, for n images on so many processes.

    Where every batch is filled to one size, as for a compiled network, hardly a row is then computed for nothing.
    """
    rounds = -(-n // (batch_size * processes))
    return -(-n // (rounds * processes))


def make_session(
    prepared: Prepared, measured: Measured, seed: int, store: Store, rerun: bool = False, team: Team | None = None
) -> Session:
    """The session of one seed. Raises UserError where a metric needs more images, RunError where a plugin fails."""
    request, size = prepared.request, prepared.batch_size
    team = team or Team()
    how = how_run(prepared.model.network)
    if how.compiled or how.graphs:
        size = even_batches(measured.n, size, team.size)
    measurement = Measurement(
        prepared.model,
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
    )
    if measured.real is not None:
        measurement.real_labels = measured.real.labels
    return Session(measurement, Execution(store, size, rerun, team=team))

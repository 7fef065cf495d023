"""From a request to the cells of a run: the model loaded, the cells planned, everything checked before a run begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from samplerbench.bench import setup
from samplerbench.bench.cell import Cell
from samplerbench.bench.labels import make_labels
from samplerbench.bench.plan import Unmet, plan
from samplerbench.bench.request import Published, Request
from samplerbench.bench.session import Execution, Measurement, Session, check_metrics
from samplerbench.bench.team import Team
from samplerbench.boundary import plugin_call
from samplerbench.errors import RunError, UserError, argument
from samplerbench.metrics.extractors import Extractor
from samplerbench.metrics.metric import Metric, check_requirements
from samplerbench.metrics.reference import Reference
from samplerbench.models.model import Model, check_guidance, check_sampler
from samplerbench.results.names import RowNames
from samplerbench.results.seal import canonical
from samplerbench.results.store import Store
from samplerbench.sampling import Guidance, Sampler, Spacing
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

    def labels(self, n: int) -> Tensor | None:
        """The labels of n samples, checked against the model and the guidances. Raises UserError."""
        found = make_labels(self.mode, n, self.classes, self.model.class_counts)
        self.model.check_labels(found)
        for guidance in self.guidances:
            check_guidance(self.model, guidance, found)
        return found


def prepare(request: Request, device: str, model: Model | None = None, team: Team | None = None) -> Prepared:
    """Load the model, plan the cells and check both; `model` is one that is loaded already. Raises UserError."""
    grids = [(grid, list(dict.fromkeys(grid.samplers))) for grid in request.grids]
    for grid, samplers in grids:
        for spacing in grid.spacings:
            for sampler in samplers:
                setup.pick_spacing(sampler, spacing)
    if model is None:
        model = setup.load_model(request.model, setup.pick_device(device), request.dtype, request.load)
    cells: dict[str, Cell] = {}
    unmet: list[Unmet] = []
    guidances: list[Guidance | None] = []
    published: list[tuple[Cell, Published]] = []
    for grid, samplers in grids:
        for sampler in samplers:
            check_sampler(model, sampler)
        guidances += [g for g in grid.guidances if g not in guidances]
        for spacing in grid.spacings:

            def spacing_of(sampler: Sampler, asked: Spacing | None = spacing) -> Spacing:
                return setup.pick_spacing(sampler, asked)

            found, gaps = plan(model, samplers, grid.steps, grid.guidances, spacing_of, grid.nfe)
            # The same cell may stand in two grids; it is run once.
            cells |= {_identity(cell): cell for cell in found if _identity(cell) not in cells}
            unmet += [gap for gap in gaps if gap not in unmet]
            for p in grid.published:
                reported = (p.sampler, p.guidance, p.column)
                published += [
                    (cells[_identity(c)], p) for c in found if (c.sampler, c.guidance, c.budget or c.steps) == reported
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
    prepared.labels(1)
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
    return canonical([cell.sampler.spec, guidance, spacing, grid, cell.budget if budget else None])


@dataclass
class Measured:
    """The real side of a run.

    Attributes:
        extractor: the feature space; None where no metric needs features.
        reference: statistics of the real images; None where no metric needs them.
        n: images per block.
        real: the features of the real images in a layer, (N, d).
    """

    extractor: Extractor | None
    reference: Reference | None
    n: int
    real: setup.RealImages | None


def measure_reference(prepared: Prepared) -> Measured:
    """The extractor, the reference, and the number of images per block, as far as the metrics need them.

    Raises:
        UserError: a metric needs real images, or statistics of them, and there are none.
    """
    request, model = prepared.request, prepared.model
    using = [m for m in prepared.metrics if m.needs_features]
    images = _check_needs(prepared)
    if not using:
        return Measured(None, None, _n(prepared), None)
    extractor = setup.pick_extractor(model, request.features, request.features_weights, model.device, using)
    if images is None:
        return Measured(extractor, None, _n(prepared), None)
    reference = setup.pick_reference(model, request.data, extractor)
    real = setup.RealImages(model, request.data, extractor) if images else None
    n = setup.default_n(reference.data["n"]) if request.n is None else request.n
    return Measured(extractor, reference, n, real)


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
    labels = prepared.labels(n)
    sizes: dict[str, int | None] = {"dimension": real.dimension, "real_images": real.n}
    check_metrics(model, prepared.metrics, labels, prepared.mode, n, has_real_images=images, **sizes)
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
    for metric in prepared.metrics:
        _check(metric, n=request.n, has_labels=prepared.mode != "none")
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
    if prepared.model.compiled or prepared.model.graphs:
        size = even_batches(measured.n, size, team.size)
    measurement = Measurement(
        prepared.model,
        measured.reference,
        measured.extractor,
        prepared.metrics,
        prepared.labels(measured.n),
        prepared.mode,
        measured.n,
        seed,
        request.blocks,
        measured.real,
        *([measured.real.labels] if measured.real is not None else []),
    )
    return Session(measurement, Execution(store, size, rerun, team=team))

"""Learning of schedules in a run: by one process, for its guidance and its labels or prompts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from samplerbench.bench import setup
from samplerbench.bench.cell import describe_plugin
from samplerbench.bench.labels import make_labels
from samplerbench.bench.plan import LevelsOf, bind_levels
from samplerbench.bench.team import Team
from samplerbench.errors import SamplerbenchError, UserError, message_of
from samplerbench.models.model import Model
from samplerbench.models.run_view import ModelRun
from samplerbench.options import Configurable
from samplerbench.results.seal import canonical
from samplerbench.sampling import Guidance, Inputs, Sampler, Spacing
from samplerbench.sampling.spacing import bind_spacing


def levels_of_run(model: Model, requested: str | None, team: Team) -> LevelsOf:
    """Return the function that `plan` computes noise levels with.

    A learned spacing is bound to the model with the guidance of the cell and the labels or prompts of the run. One
    process learns it, and the others receive the levels.

    Args:
        model: The model.
        requested: The label mode of the request. None: the default.
        team: The processes that share the work.
    """

    def levels(spacing: Spacing, sampler: Sampler, guidance: Guidance | None, steps: int) -> tuple[Spacing, Tensor]:
        if spacing.learned and model.by_own_call:
            raise UserError(
                f"spacing {spacing.spec}: a pipeline that is run by its own call has no denoiser to learn from; learn "
                "the levels with the model itself, and use them as list:levels=…."
            )
        if spacing.learned and model.observation is not None:
            raise UserError(
                f"spacing {spacing.spec} is learned for the model alone, not for the observations of a task; use "
                "another spacing."
            )
        classes = setup.label_classes(model, [guidance])
        mode = requested or ("none" if classes is None else "balanced")

        def inputs(n: int) -> Inputs:
            chosen = make_labels(mode, n, classes, model.class_counts)
            return Inputs(n, prompts=chosen) if model.text else Inputs(n, labels=chosen)

        identity = {"labels": mode, "counts": model.class_counts, "spacing source": describe_plugin(spacing)["source"]}
        view = ModelRun(model, guidance, inputs, identity, _describe)
        if not spacing.learned or team.size == 1:
            return bind_levels(spacing, view, sampler, steps)
        numbers, evaluations = _once(team, lambda: _learned(spacing, view, sampler, steps))
        bound = bind_spacing(spacing, view, sampler).with_state(bound_evaluations=evaluations)
        return bound, torch.tensor(numbers, dtype=torch.float64)

    return levels


def _learned(spacing: Spacing, view: ModelRun, sampler: Sampler, steps: int) -> tuple[list[float], int]:
    bound, grid = bind_levels(spacing, view, sampler, steps)
    return grid.tolist(), bound.bound_evaluations


def _once(team: Team, learn: Callable[[], tuple[list[float], int]]) -> tuple[list[float], int]:
    """Call a function on the main process. Return its result, or raise its error, on all processes."""
    result: tuple[list[float], int] | None = None
    failure: SamplerbenchError | None = None
    if team.main:
        try:
            result = learn()
        except SamplerbenchError as error:
            failure = error
    reported = None if failure is None else (type(failure), message_of(failure))
    told = team.tell((result, reported))
    if told[1] is not None:
        kind, text = told[1]
        raise failure or kind(text)
    levels: tuple[list[float], int] = told[0]
    return levels


def _describe(plugin: Configurable) -> str:
    return canonical(describe_plugin(plugin))

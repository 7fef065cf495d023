"""`samplerbench.tune` and `samplerbench.recommend`: the search and the recommendation from Python."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from samplerbench.bench.request import Request, check_whole, one_grid
from samplerbench.errors import ArgumentTypeError, UserError, argument
from samplerbench.limits import MAX_BATCH, MAX_EVALUATIONS, MAX_REPEATS, MAX_SEED, MAX_STEPS
from samplerbench.models.model import Model
from samplerbench.results.store import Store
from samplerbench.tuning.arena import Arena
from samplerbench.tuning.recommend import Budget, Recommendation, Source
from samplerbench.tuning.recommend import recommend as _recommend
from samplerbench.tuning.search import FRESH_OFFSET, Limit, Tuned
from samplerbench.tuning.search import tune as _tune
from samplerbench.tuning.space import Space, all_specs
from samplerbench.untrusted import user_path

DEFAULT_SECONDS = 600.0
"""Time of a search without a limit."""


def tune(
    nfe: int | Sequence[int],
    *,
    samplers: Sequence[str] = (),
    guidances: Sequence[str] = (),
    spacings: Sequence[str] = (),
    metric: str = "fid",
    model: str | Path | Model = "digits",
    seconds: float | None = None,
    evaluations: int | None = None,
    n: int = 200,
    labels: str | int | None = None,
    features: str | None = None,
    features_weights: str | None = None,
    data: str | None = None,
    seed: int = 0,
    batch_size: int = 256,
    dtype: str = "fp32",
    device: str | torch.device = "auto",
    out: str | Path = "tuned",
) -> list[Tuned]:
    """Search the best sampler, parameters, spacing and guidance scale for a model, as `samplerbench tune`.

    Args:
        nfe: Budgets of network evaluations per image.
        samplers: Specs to try. Empty for all that can be used without parameters.
        guidances: Specs to try. "none" is no guidance. Empty for no guidance.
        spacings: Specs to try besides the default one. Empty for all except learned ones.
        metric: Spec of the metric.
        model: The source of a model (see `load_model`), or a loaded model.
        seconds: Time of the search, for all budgets together. If None, 600, unless `evaluations` is set.
        evaluations: Network evaluations of the search, summed over images and budgets, in place of a time.
        n: Images per seed.
        labels: As for `evaluate`.
        features: Feature space of the metric. If None, the one that belongs to the model.
        features_weights: File with the weights of the feature space.
        data: Real images or their statistics. If None, the training data of the model.
        seed: First seed of the search.
        batch_size: Images per batch.
        dtype: Precision of the network. Ignored for a loaded model.
        device: Device of the model. Ignored for a loaded model.
        out: Folder of results. A search with the same folder continues.

    Returns:
        One `Tuned` per budget.

    Raises:
        UserError: If an argument is invalid, no sampler can be run at a budget, or Optuna is not installed.
        RunError: If a candidate fails in the last measurement.
    """
    budgets = [nfe] if isinstance(nfe, int) else list(nfe)
    space, limit = _space(samplers, guidances, spacings), _limit(seconds, evaluations, max(1, len(budgets)))
    request = _request(space, budgets, model, metric, labels, n, batch_size, dtype, features, features_weights, data)
    loaded = model if isinstance(model, Model) else None
    _check_seed(seed)
    arena = Arena(request, str(device), Store(user_path(out)), loaded=loaded)
    return [_tune(arena, space, budget, seed, limit) for budget in budgets]


def recommend(
    *,
    nfe: int | None = None,
    milliseconds: float | None = None,
    batch_size: int = 1,
    samplers: Sequence[str] = (),
    guidances: Sequence[str] = (),
    spacings: Sequence[str] = (),
    metric: str = "fid",
    model: str | Path | Model = "digits",
    source: Source = "auto",
    seconds: float | None = None,
    evaluations: int | None = None,
    n: int | None = None,
    labels: str | int | None = None,
    features: str | None = None,
    features_weights: str | None = None,
    data: str | None = None,
    seed: int = 0,
    repeats: int = 20,
    sampling_batch_size: int = 256,
    dtype: str = "fp32",
    device: str | torch.device = "auto",
    out: str | Path = "results",
) -> Recommendation:
    """Recommend settings for a model within a number of evaluations or a time per image, as `samplerbench recommend`.

    Give either `nfe` or `milliseconds`.

    Args:
        nfe: Network evaluations per image.
        milliseconds: Time per image: the median time of a batch divided by its images.
        batch_size: Images per batch in production, for `milliseconds`.
        samplers: Specs to try. Empty for all that can be used without parameters.
        guidances: Specs to try. "none" is no guidance. Empty for no guidance.
        spacings: Specs that a search tries besides the default one. Empty for all except learned ones.
        metric: Spec of the metric.
        model: The source of a model (see `load_model`), or a loaded model.
        source: "results" uses only results in `out`, "search" always searches, and "auto" searches where the results
            do not suffice.
        seconds: Time of the search. If None, 600, unless `evaluations` is set.
        evaluations: Network evaluations of the search, summed over images, in place of a time.
        n: Images per seed or block. If None, that of the results, or 200.
        labels: As for `evaluate`.
        features: Feature space of the metric. If None, the one that belongs to the model.
        features_weights: File with the weights of the feature space.
        data: Real images or their statistics. If None, the training data of the model.
        seed: First seed of the search.
        repeats: Number of measured batches of each latency.
        sampling_batch_size: Images per batch while the metric is measured.
        dtype: Precision of the network. Ignored for a loaded model.
        device: Device of the model. Ignored for a loaded model.
        out: Folder of results and latencies.

    Returns:
        The recommendation. `choice` is the recommended row, `code.line` the line for diffusers, `verdict` a paragraph.

    Raises:
        UserError: If an argument is invalid, nothing fits into the budget, or the results do not suffice.
        RunError: If a candidate fails in the last measurement.
    """
    if (nfe is None) == (milliseconds is None):
        raise UserError(f"give either {argument('nfe')} or {argument('milliseconds')}.")
    if source not in ("auto", "results", "search"):
        raise UserError(f"{argument('source', source)}: choose one of auto, results, search.")
    if nfe is not None:
        nfe = check_whole("nfe", nfe, 1, MAX_STEPS)
    if milliseconds is not None and not 0 < milliseconds <= 1e9:
        raise UserError(f"{argument('milliseconds', milliseconds)}: give a positive time per image.")
    if not 1 <= repeats <= MAX_REPEATS:
        raise UserError(f"{argument('repeats', repeats)}: give a whole number from 1 to {MAX_REPEATS:,}.")
    batch_size = check_whole("batch_size", batch_size, 1, MAX_BATCH)
    space, limit = _space(samplers, guidances, spacings), _limit(seconds, evaluations, 1)
    request = _request(
        space, [nfe or 8], model, metric, labels, n, sampling_batch_size, dtype, features, features_weights, data
    )
    _check_seed(seed)
    return _recommend(
        request,
        str(device),
        Store(user_path(out)),
        space,
        Budget(nfe, milliseconds, batch_size, repeats),
        source=source,
        named=bool(samplers),
        seed=seed,
        limit=limit,
        loaded=model if isinstance(model, Model) else None,
    )


def _space(samplers: Sequence[str], guidances: Sequence[str], spacings: Sequence[str]) -> Space:
    for name, value in (("samplers", samplers), ("guidances", guidances), ("spacings", spacings)):
        if isinstance(value, str) or not all(isinstance(spec, str) for spec in value):
            raise ArgumentTypeError(f"{argument(name)}: give a list of specs.")
    return Space(
        tuple(dict.fromkeys(samplers)) or tuple(all_specs("sampler")),
        tuple(dict.fromkeys(spacings)) or tuple(all_specs("spacing")),
        tuple(None if spec == "none" else spec for spec in dict.fromkeys(guidances)) or (None,),
    )


def _limit(seconds: float | None, evaluations: int | None, budgets: int) -> Limit:
    if seconds is not None and evaluations is not None:
        raise UserError(f"{argument('seconds')} and {argument('evaluations')} cannot be combined; use one of them.")
    if seconds is not None and not 0 < seconds <= 1e9:
        raise UserError(f"{argument('seconds', seconds)}: give a positive time.")
    if evaluations is not None:
        if not 1 <= evaluations <= MAX_EVALUATIONS:
            raise UserError(f"{argument('evaluations', evaluations)}: give a number from 1 to {MAX_EVALUATIONS:,}.")
        return Limit(evaluations=evaluations / budgets)
    return Limit(seconds=(DEFAULT_SECONDS if seconds is None else seconds) / budgets)


def _check_seed(seed: int) -> None:
    most = MAX_SEED - 2 * FRESH_OFFSET
    check_whole("seed", seed, 0, most)


def _request(
    space: Space,
    budgets: Sequence[int],
    model: str | Path | Model,
    metric: str,
    labels: str | int | None,
    n: int | None,
    batch_size: int,
    dtype: str,
    features: str | None,
    features_weights: str | None,
    data: str | None,
) -> Request:
    if not isinstance(model, str | os.PathLike | Model):
        raise ArgumentTypeError(f"{argument('model')} is of type {type(model).__name__}; give its name or folder.")
    source = str(model.identity["source"]) if isinstance(model, Model) else os.fspath(model)
    grid = one_grid([space.samplers[0]], nfe=budgets, guidances=[g or "none" for g in space.guidances])
    return Request(
        [grid],
        model=source,
        labels=labels,
        n=n,
        batch_size=batch_size,
        dtype=dtype,
        metrics=[metric],
        features=features,
        features_weights=features_weights,
        data=data,
    )


__all__ = ["recommend", "tune"]

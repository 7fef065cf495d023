"""Models whose images a stock pipeline of diffusers makes, by its own call: `pipeline:SOURCE[,argument=value…]`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor

from samplerbench.diffusers import FlowSamplerScheduler, SamplerScheduler, as_scheduler
from samplerbench.diffusers.own_noise import InitialNoise
from samplerbench.diffusers.plan import Plan
from samplerbench.diffusers.scheduler import StepScheduler
from samplerbench.diffusers.source import read_source
from samplerbench.diffusers.stock import (
    Stock,
    load_stock,
    open_stock,
    pipeline_class,
    read_arguments,
    split_source,
)
from samplerbench.errors import SamplerbenchError, Stopped, UserError, argument, is_out_of_memory
from samplerbench.limits import MAX_CLASSES
from samplerbench.models.checkpoint import Checkpoint
from samplerbench.models.files import LoadOptions, check_no_prompts
from samplerbench.models.flow import flow_levels
from samplerbench.models.model import Condition, Model
from samplerbench.models.prompts import read_prompts
from samplerbench.models.schedule import Schedule
from samplerbench.sampling import Denoiser, Guidance, Noise, Sampler, Step, intervals
from samplerbench.sampling.driver import OnStep
from samplerbench.sampling.flow import FlowSchedule
from samplerbench.sampling.inputs import Inputs
from samplerbench.sampling.meter import Meter
from samplerbench.sampling.process import RECTIFIED_FLOW, VARIANCE_PRESERVING
from samplerbench.untrusted import reason

EXAMPLE = "a photo"
"""The prompt of the trial call, for a pipeline that is only shown."""


@dataclass
class PipelineModel(Model):
    """A stock pipeline of diffusers. A sampler runs as its scheduler, and everything else is the pipeline's own.

    The pipeline encodes the prompts, applies its own guidance, and decodes the images. There is no denoiser, so
    guidance plugins, metrics that need D, and figures of the trajectory are not supported. `shape` is that of the
    images.

    Attributes:
        pipeline: the pipeline.
        name: name of its denoising network.
        config: configuration of its own scheduler.
        arguments: arguments of its call.
        prompts: the K prompts.
        negative_prompt: the negative prompt, or None.
        one_by_one: whether the pipeline is called for one image at a time, because it pads the prompts of a batch to
            the longest one, so that an image would depend on the other prompts of its batch.
        noise_shapes: shape of one sample in each draw of initial noise.
    """

    by_own_call: ClassVar[bool] = True

    pipeline: Any = None
    name: str = "transformer"
    config: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    negative_prompt: str | None = None
    one_by_one: bool = False
    noise_shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def counted(self) -> Any:
        """The denoising network in the pipeline. Its evaluations are counted."""
        return getattr(self.pipeline, self.name)

    def ask(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        self._refuse()

    def denoiser(self, inputs: Inputs, guidance: Guidance | None = None) -> Denoiser:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UserError(
            f"{self.identity['source']} runs a pipeline by its own call, which gives only images: what needs the "
            "denoiser (the metric gap, figures of steps, dry runs, an automatic batch size) is not supported."
        )

    def images(
        self, sampler: Sampler, sigmas: Tensor, index: Tensor, inputs: Inputs, seed: int, on_step: OnStep | None = None
    ) -> tuple[Tensor, bool]:
        """Make the images of one batch. Image i depends only on the seed, i, and the prompt or label of i.

        Args:
            sampler: the sampler.
            sigmas: noise levels, (N+1,) float64.
            index: sample indices, (B,) int64.
            inputs: prompts or labels of the samples.
            seed: random seed of the initial noise and of the noise of the steps.
            on_step: callback after each step.

        Returns:
            Images in [-1, 1], (B, C, H, W), and whether the sampler drew noise.

        Raises:
            UserError: if the sampler cannot be a scheduler, or the pipeline refuses its inputs or changes the state
                (`as_scheduler`).
        """
        scheduler = as_scheduler(sampler, self.config, seed=seed)
        scheduler.pinned, scheduler.on_step = sigmas, on_step
        rows = [slice(k, k + 1) for k in range(len(index))] if self.one_by_one else [slice(None)]
        parts, drew = [], False
        for row in rows:
            chosen = None if inputs.chosen is None else inputs.chosen[row]
            scheduler.samples = index[row]
            parts.append(self.call(scheduler, len(sigmas) - 1, InitialNoise(seed, index[row]), chosen))
            drew = drew or scheduler.draws > 0
        return torch.cat(parts), drew

    @torch.no_grad()
    def call(self, scheduler: StepScheduler, steps: int, noise: InitialNoise, chosen: Tensor | None) -> Tensor:
        """Call the pipeline.

        Args:
            scheduler: its scheduler.
            steps: number of steps N.
            noise: initial noise of the batch.
            chosen: indices of the prompts, or labels, (B,) int64. None for the example prompt.

        Returns:
            Images in [-1, 1], (B, C, H, W).

        Raises:
            UserError: if the call fails, or returns something else than images.
        """
        call: dict[str, Any] = dict(self.arguments)
        if self.text:
            call["prompt"] = [EXAMPLE] if chosen is None else [self.prompts[i] for i in chosen.tolist()]
            if self.negative_prompt is not None:
                call["negative_prompt"] = [self.negative_prompt] * len(call["prompt"])
        else:
            call["class_labels"] = [0] if chosen is None else chosen.tolist()
        self.pipeline.scheduler = scheduler
        try:
            with noise.of(self.pipeline):
                output = self.pipeline(**call, num_inference_steps=steps, output_type="np")
        except (SamplerbenchError, Stopped, _PlannedError):
            raise
        except Exception as error:  # pipelines raise many exception types for arguments that do not fit
            if is_out_of_memory(error):
                raise
            name = type(self.pipeline).__name__
            raise UserError(f"{self.identity['source']}: the call of {name} failed: {reason(error)}") from error
        finally:
            scheduler._give_up()
        images = getattr(output, "images", None)
        if not isinstance(images, np.ndarray) or images.ndim != 4 or len(images) != len(noise.index):
            raise UserError(
                f"{self.identity['source']}: {type(self.pipeline).__name__} does not return one image for each prompt "
                "or label."
            )
        return torch.from_numpy(images).permute(0, 3, 1, 2).to(self.device) * 2 - 1


class _PlannedError(Exception):
    """Ends a call of a pipeline when it has chosen its time steps."""

    def __init__(self, sigmas: Tensor) -> None:
        super().__init__()
        self.sigmas = sigmas


class _Planner(FlowSamplerScheduler):
    """A scheduler that ends the call when the time steps are known."""

    def _prepare(self, plan: Plan, device: str | torch.device | None) -> None:
        raise _PlannedError(plan.sigmas)


@dataclass(frozen=True)
class PipelineFlow(FlowSchedule):
    """The time steps of a rectified flow as a pipeline passes them to its scheduler, with the checkpoint's shift.

    Attributes:
        planned: function of the number of steps N that returns the noise levels, (N+1,) float64.
    """

    planned: Callable[[int], Tensor] | None = field(default=None, compare=False, repr=False)

    def grid(self, steps: int, shift: float | None = None, mu: float | None = None) -> Tensor:
        if self.planned is None or shift is not None or mu is not None:
            return super().grid(steps, shift, mu)
        return self.planned(steps)


def load_pipeline_model(spec: str, device: torch.device, dtype: torch.dtype, options: LoadOptions) -> PipelineModel:
    """Load `pipeline:SOURCE[,argument=value…]`, and call the pipeline once, with one step, to learn its sizes.

    Args:
        spec: the spec. SOURCE is a folder or a hub id.
        device: device of the networks.
        dtype: dtype of their weights.
        options: options for loading.

    Raises:
        UserError: if the pipeline or an argument is not supported, prompts are missing, or the call fails.
    """
    source, texts = split_source(spec)
    for name in ("compile", "graphs"):
        if getattr(options, name):
            raise UserError(f"{argument(name)} is not supported for a pipeline that is run by its own call.")
    checkpoint = open_stock(source, options)
    cls = pipeline_class(source, checkpoint.index)
    arguments = read_arguments(spec, cls, texts)
    text = "prompt" in _names_of(cls)
    if not text:
        check_no_prompts(spec, options)
    elif options.prompts is None and not options.show:
        raise UserError(
            f"{source} is a text-to-image model; give a file with one prompt per line, {argument('prompts', 'FILE')}, "
            f"or a prompt, {argument('prompt', 'TEXT')}."
        )
    negative = options.negative_prompt
    if negative is not None and "negative_prompt" not in _names_of(cls):
        raise UserError(f"{argument('negative_prompt', negative)}: {cls.__name__} takes no negative prompt.")
    prompts = None if options.prompts is None else read_prompts(options.prompts)
    config = checkpoint.config("scheduler", file="scheduler_config.json") | {
        "_class_name": checkpoint.kind("scheduler")
    }
    schedule = read_source(config, SamplerScheduler.__name__, FlowSamplerScheduler.__name__)
    stock = load_stock(checkpoint, as_scheduler(Trial(), config), device, dtype)
    flow = schedule if isinstance(schedule, FlowSchedule) else None
    counts = (0 if prompts is None else len(prompts.lines)) if text else _classes(checkpoint, stock)
    model = PipelineModel(
        network=getattr(stock.pipeline, stock.network),
        shape=(3, 1, 1),
        levels=flow_levels(schedule.timesteps) if isinstance(schedule, FlowSchedule) else schedule.levels,
        process=VARIANCE_PRESERVING if flow is None else RECTIFIED_FLOW,
        device=device,
        dtype=dtype,
        classes=counts or None,
        text=text,
        spacing=None if flow is None else "flow",
        pipeline=stock.pipeline,
        name=stock.network,
        config=config,
        arguments=arguments,
        prompts=() if prompts is None else tuple(prompts.lines),
        negative_prompt=negative,
        identity=_identity(spec, checkpoint, stock, arguments)
        | _schedule_identity(schedule)
        | (_prompt_identity(prompts, negative) if text else {}),
    )
    _try(model)
    if isinstance(schedule, FlowSchedule):
        model.flow = PipelineFlow(**vars(schedule), planned=functools.partial(_levels_of, model))
    return model


def _names_of(cls: Any) -> set[str]:
    import inspect

    return set(inspect.signature(cls.__call__).parameters)


def _classes(checkpoint: Checkpoint, stock: Stock) -> int:
    """The number of class labels of the denoising network."""
    fields = checkpoint.fields(stock.network)
    for key in ("num_embeds_ada_norm", "num_class_embeds", "num_classes"):
        if (known := fields.integer_or_none(key, 1, MAX_CLASSES)) is not None:
            return known
    raise UserError(f"{checkpoint.source}: the number of class labels of the {stock.network} is unknown.")


def _identity(spec: str, checkpoint: Checkpoint, stock: Stock, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "source": spec,
        "pipeline": checkpoint.pipeline,
        "revision": checkpoint.revision,
        "variant": checkpoint.options.variant or "",
        "by its own call": True,
        **stock.identity,
        "arguments": ", ".join(f"{name}={value}" for name, value in sorted(arguments.items())),
    }


def _schedule_identity(schedule: Schedule | FlowSchedule) -> dict[str, Any]:
    if isinstance(schedule, FlowSchedule):
        shift = f"dynamic, {schedule.kind}, by the pipeline" if schedule.dynamic else schedule.shift
        return {"prediction": "flow", "timesteps": schedule.timesteps, "shift": shift}
    return schedule.identity


def _prompt_identity(prompts: Any, negative: str | None) -> dict[str, Any]:
    return {
        "prompts": "" if prompts is None else prompts.sha256,
        "number of prompts": 0 if prompts is None else len(prompts.lines),
        "negative prompt": "" if negative is None else negative,
    }


@dataclass(frozen=True)
class Trial(Sampler):
    """Replace the state by D, for the trial call of a pipeline (Ho et al. 2020, the last line of algorithm 2)."""

    from_infinity = True

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        for s, t in intervals(sigmas):
            x = denoise(x, s)
            yield Step(t, x, x)


def _try(model: PipelineModel) -> None:
    """Call the pipeline once, with one step and one image, and store what it shows."""
    scheduler = as_scheduler(Trial(), model.config, seed=0)
    noise = InitialNoise(0, torch.zeros(1, dtype=torch.int64))
    with Meter(model.counted) as meter, _padding() as padded:
        images = model.call(scheduler, 1, noise, torch.zeros(1, dtype=torch.int64) if model.classes else None)
    name = f"{model.identity['source']}: {type(model.pipeline).__name__}"
    if not noise.shapes:
        raise UserError(f"{name} does not draw its initial latents with randn_tensor, so its noise cannot be set.")
    if not meter.network:
        raise UserError(f"{name} does not call its {model.name}, so its evaluations cannot be counted.")
    if images.shape[1] not in (1, 3):
        raise UserError(f"{name} makes images with {images.shape[1]} channels; 1 or 3 are supported.")
    model.shape = (images.shape[1], images.shape[2], images.shape[3])
    model.noise_shapes = tuple(noise.shapes)
    model.one_by_one = bool(padded)
    model.notes["initial noise"] = ", ".join("x".join(map(str, shape)) for shape in noise.shapes)
    model.rows_per_evaluation = meter.network
    model.notes["evaluations per step"] = f"{meter.network} of the {model.name}"
    if padded:
        model.notes["batches"] = "one image at a time: the prompts of a batch are padded to the longest"


def _is_flow(model: PipelineModel) -> bool:
    return model.process is RECTIFIED_FLOW


@contextmanager
def _padding() -> Iterator[list[str]]:
    """Context manager: list the calls of tokenizers that pad the prompts of a batch to the longest one.

    Calls without truncation only test whether a prompt is too long.
    """
    from transformers import PreTrainedTokenizerBase

    seen: list[str] = []
    original = PreTrainedTokenizerBase.__call__

    @functools.wraps(original)
    def noticing(self: Any, *args: Any, **settings: Any) -> Any:
        if settings.get("padding") in (True, "longest") and (settings.get("truncation") or settings.get("max_length")):
            seen.append(type(self).__name__)
        return original(self, *args, **settings)

    PreTrainedTokenizerBase.__call__ = noticing  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        PreTrainedTokenizerBase.__call__ = original  # type: ignore[method-assign]


def _levels_of(model: PipelineModel, steps: int) -> Tensor:
    """The noise levels of N steps that the pipeline itself chooses, (N+1,) float64."""
    planner = _Planner(Trial(), **_parameters(model.config))
    index = torch.zeros(1, dtype=torch.int64)
    try:
        model.call(planner, steps, InitialNoise(0, index), index if model.classes else None)
    except _PlannedError as planned:
        return planned.sigmas
    raise UserError(f"{model.identity['source']} does not call set_timesteps of its scheduler.")


def _parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a `FlowSamplerScheduler` for the configuration of another scheduler."""
    made = as_scheduler(Trial(), config)
    return {key: made.config[key] for key in made.config if not key.startswith("_") and key != "sampler"}

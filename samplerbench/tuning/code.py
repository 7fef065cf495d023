"""The code and the names of a row in other software: diffusers, ComfyUI and k-diffusion."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from samplerbench import registry
from samplerbench.bench.request import Request
from samplerbench.diffusers.equivalent import EquivalentScheduler, equivalent_scheduler
from samplerbench.elsewhere import NameElsewhere, guidance_scale, name_in_comfyui, same_parameters
from samplerbench.errors import SamplerbenchError
from samplerbench.models.model import Model
from samplerbench.sampling import is_infinite
from samplerbench.sampling.spacing import Spacing, make_grid
from samplerbench.tuning.search import Row
from samplerbench.untrusted import is_dir, read_json, user_path

_PROMPT = "a photo of a red cat"


@dataclass(frozen=True)
class Pipeline:
    """The diffusers pipeline of a model.

    Attributes:
        source: folder or hub id. None if the model is no pipeline; then the code uses a variable `pipe`.
        arguments: arguments of `from_pretrained`, as code.
        inputs: first arguments of a call, as code: a prompt or class labels.
        scaled: whether the pipeline multiplies its noise by `init_noise_sigma`, and calls `scale_model_input`.
        config: configuration of its scheduler. None if it is unknown.
        loading: arguments of `samplerbench.load_model`, as code, for a model that no pipeline of diffusers samples: one
            that is known only by its name, or a class-conditional network whose pipeline takes no labels. Empty if the
            pipeline can be called.
    """

    source: str | None = None
    arguments: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    scaled: bool = False
    config: Mapping[str, Any] | None = field(default=None, compare=False)
    loading: tuple[str, ...] = ()


def pipeline_of(request: Request, model: Model) -> Pipeline:
    """The pipeline of a model, if the model of the request is a folder or a hub repository with one.

    Args:
        request: names the model.
        model: the loaded model.
    """
    source = str(model.identity.get("source", request.model))
    inputs: tuple[str, ...] = ()
    if model.text:
        inputs = (json.dumps(_PROMPT),)
    elif model.classes is not None:
        inputs = ("class_labels=[0]",)
    origin = [f"{name}={json.dumps(value)}" for name in ("revision", "variant") if (value := getattr(request, name))]
    arguments = [f"torch_dtype={model.dtype!s}"] if model.dtype in (torch.float16, torch.bfloat16) else []
    dtype = [] if request.dtype == "fp32" else [f"dtype={json.dumps(request.dtype)}"]
    loading = () if model.text else (json.dumps(request.model), *origin, *dtype)
    unknown = Pipeline(inputs=inputs, scaled=model.text, loading=loading)
    without_labels = not model.text and model.classes is not None and not _takes_labels(model.identity.get("pipeline"))
    config: Mapping[str, Any]
    try:
        if is_dir(source):
            folder = user_path(source)
            if not (folder / "model_index.json").is_file():
                return unknown
            config = read_json(folder / "scheduler" / "scheduler_config.json", f"{source} has no scheduler")
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            from diffusers import DDPMScheduler

            config = DDPMScheduler.load_config(source, subfolder="scheduler", local_files_only=True)
        else:
            return unknown
    except (SamplerbenchError, OSError, ValueError):
        return unknown
    return Pipeline(
        source,
        ("use_safetensors=True", *arguments, *origin),
        inputs,
        model.text,
        config,
        loading if without_labels else (),
    )


def _takes_labels(pipeline: str | None) -> bool:
    """Whether the call of a class of pipelines has the argument `class_labels`."""
    import diffusers

    cls = getattr(diffusers, pipeline or "", None)
    return cls is not None and "class_labels" in inspect.signature(cls.__call__).parameters


@dataclass(frozen=True)
class Code:
    """A row in diffusers.

    Attributes:
        line: the line that sets the scheduler of a pipeline.
        imports: the import that it needs.
        lines: a program: imports, the pipeline, its scheduler, and a call; or the model and a call of samplerbench.
        stock: name of the equivalent scheduler of diffusers. None if the line uses `as_scheduler`.
    """

    line: str
    imports: str
    lines: str
    stock: str | None

    def as_dict(self) -> dict[str, Any]:
        """The fields."""
        return {"line": self.line, "import": self.imports, "program": self.lines, "scheduler": self.stock}


def code_of(row: Row, pipeline: Pipeline | None = None) -> Code:
    """Python code that uses a row in a diffusers pipeline.

    The line names the equivalent scheduler of diffusers if there is one for the configuration of the pipeline, and
    `as_scheduler` otherwise. A learned spacing is written as its noise levels. If the model has no pipeline that can be
    called, the program uses `samplerbench.sample`.

    Args:
        row: the row.
        pipeline: the pipeline. None for one in a variable `pipe`.
    """
    pipeline = pipeline or Pipeline()
    sampler = registry.parse("sampler", row.candidate.sampler)
    spacing = None if row.spacing is None else registry.parse("spacing", row.spacing)
    stock: EquivalentScheduler | None = None
    if pipeline.config is not None and spacing is not None and not getattr(spacing, "learned", False):
        stock = equivalent_scheduler(sampler, spacing, row.steps, pipeline.config, pipeline.scaled)
    names = ["DiffusionPipeline"] if pipeline.source else []
    if stock is None:
        text = _spacing(row)
        given = "" if text is None else f", spacing={json.dumps(text)}"
        line = f"pipe.scheduler = as_scheduler({json.dumps(row.candidate.sampler)}, pipe.scheduler{given})"
        imports = "from samplerbench.diffusers import as_scheduler"
        before = [f"from diffusers import {names[0]}"] if names else []
        before.append(imports)
    else:
        line = f"pipe.scheduler = {stock.code}"
        imports = f"from diffusers import {stock.name}"
        before = [f"from diffusers import {', '.join(sorted([*names, stock.name]))}"]
    if pipeline.loading:
        return Code(line, imports, _by_samplerbench(row, pipeline), None if stock is None else stock.name)
    lines = ["import torch"] if any("torch." in argument for argument in pipeline.arguments) else []
    lines += [*before, ""]
    if pipeline.source:
        arguments = "".join(f", {argument}" for argument in pipeline.arguments)
        lines.append(f"pipe = DiffusionPipeline.from_pretrained({json.dumps(pipeline.source)}{arguments})")
    lines.append(line)
    call = [*pipeline.inputs, f"num_inference_steps={row.steps}"]
    if row.candidate.guidance is not None:
        scale = guidance_scale(row.candidate.guidance)
        if scale is None:
            lines.append(
                f"# The guidance {row.candidate.guidance} is not part of a scheduler; set that of the pipeline."
            )
        else:
            call.append(f"guidance_scale={scale:g}")
    lines.append(f"images = pipe({', '.join(call)}).images")
    return Code(line, imports, "\n".join(lines) + "\n", None if stock is None else stock.name)


def _by_samplerbench(row: Row, pipeline: Pipeline) -> str:
    """A program that samples with samplerbench."""
    given = [json.dumps(row.candidate.sampler), str(row.steps), "model=model"]
    more = {"guidance": row.candidate.guidance, "spacing": _spacing(row)}
    given += [f"{name}={json.dumps(value)}" for name, value in more.items() if value is not None]
    model = f"model = samplerbench.load_model({', '.join(pipeline.loading)})"
    return f"import samplerbench\n\n{model}\nimages = samplerbench.sample({', '.join(given)})\n"


def _spacing(row: Row) -> str | None:
    """The spec of the spacing of a row. The levels themselves for a learned one."""
    if row.spacing is not None and getattr(registry.parse("spacing", row.spacing), "learned", False):
        return _levels(row.sigmas)
    return row.spacing


def _levels(sigmas: tuple[float, ...]) -> str:
    """The spec of noise levels, as `samplerbench schedule` writes it."""
    return "list:levels=" + ";".join("inf" if is_infinite(s) else repr(s) for s in sigmas[:-1])


@dataclass(frozen=True)
class Elsewhere:
    """A row in ComfyUI and k-diffusion.

    Attributes:
        row: sampler and spacing of the row.
        sampler: name of the sampler. None if there is no equivalent.
        scheduler: name of the scheduler, the spacing. None if there is no equivalent.
    """

    row: tuple[str, str]
    sampler: NameElsewhere | None
    scheduler: NameElsewhere | None

    @property
    def text(self) -> str:
        """`sampler dpmpp_2m, scheduler karras`, or what has no equivalent."""
        parts = []
        names = (("sampler", self.sampler), ("scheduler", self.scheduler))
        for own, (kind, name) in zip(self.row, names, strict=True):
            parts.append(f"no {kind} equivalent to {own}" if name is None else f"{kind} {name.text}")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """The two names."""
        return {
            "sampler": None if self.sampler is None else self.sampler.as_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.as_dict(),
        }


def elsewhere(row: Row, model: Model) -> Elsewhere:
    """The names of a row in ComfyUI and k-diffusion.

    A scheduler of ComfyUI is named if it gives the noise levels of the row, whatever the name of the spacing.

    Args:
        row: the row.
        model: the loaded model.
    """
    sampler = name_in_comfyui("sampler", same_parameters("sampler", registry.parse("sampler", row.candidate.sampler)))
    sigmas = torch.tensor(row.sigmas, dtype=torch.float64)

    def same(spec: str) -> bool:
        return row.spacing is not None and _same_grid(registry.parse("spacing", spec), sigmas, model)

    return Elsewhere(
        (row.candidate.sampler, row.spacing or "its own spacing"), sampler, name_in_comfyui("spacing", same)
    )


def _same_grid(spacing: Spacing, sigmas: Tensor, model: Model) -> bool:
    try:
        grid = make_grid(spacing, model.levels, len(sigmas) - 1)
    except SamplerbenchError:
        return False
    return grid.shape == sigmas.shape and bool(torch.allclose(grid, sigmas, rtol=1e-6, atol=0))


__all__ = ["Code", "Elsewhere", "Pipeline", "code_of", "elsewhere", "pipeline_of"]

"""Options shared by several commands, and the handling of Ctrl-C."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samplerbench.cli.numbers import parse_steps
from samplerbench.errors import UserError
from samplerbench.progress import Progress as Progress
from samplerbench.text import note

if TYPE_CHECKING:
    from samplerbench.bench.request import Grid
    from samplerbench.models import Model


def complete(*kinds: str) -> Any:
    """Complete registered names of these kinds in the shell. No plugin is imported."""

    def names(incomplete: str) -> list[str]:
        from samplerbench import registry

        return sorted({e.name for kind in kinds for e in registry.entries(kind) if e.name.startswith(incomplete)})

    return names


FEATURES = (
    "clip",
    "clip-rn101",
    "clip-rn50",
    "clip-rn50x16",
    "clip-rn50x4",
    "clip-rn50x64",
    "clip-vit-b-16",
    "clip-vit-b-32",
    "clip-vit-l-14",
    "clip-vit-l-14-336px",
    "cmmd",
    "cmmd-antialiased",
    "digits-cnn",
    "dinov2",
    "dinov2-vit-b-14",
    "dinov2-vit-g-14",
    "dinov2-vit-l-14",
    "dinov2-vit-s-14",
    "inception-v3-compat",
    "mnist-cnn",
    "vgg16",
)
"""The feature extractors, for completion and lists: torch-fidelity lists its own only after torch is imported."""

DTYPES = ("fp32", "tf32", "bf16", "fp16", "fp64")
"""The values of --dtype, for completion: they are defined in a module that imports torch."""


def choices(words: Sequence[str]) -> Any:
    """Complete these words in the shell."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


Samplers = Annotated[
    list[str],
    typer.Option(
        "--sampler",
        "-s",
        help="Sampler or generator, with optional parameters: `ddim:eta=0.5`. Can be repeated.",
        autocompletion=complete("sampler", "generator"),
    ),
]
Steps = Annotated[
    str | None,
    typer.Option("--steps", help="Comma-separated numbers of steps: `10,20,50`. Default: 50, unless --nfe is set."),
]
Budgets = Annotated[
    str | None,
    typer.Option(
        "--nfe",
        help="Comma-separated budgets of network function evaluations (NFE). Each sampler takes the most steps "
        "that fit.",
    ),
]
Guidances = Annotated[
    list[str],
    typer.Option(
        "--guidance",
        "-g",
        help="Guidance, with optional parameters: `cfg:scale=2` or `cfg:2`; `none` disables it. Can be repeated.",
        autocompletion=complete("guidance"),
    ),
]
Spacing = Annotated[
    str | None,
    typer.Option(
        "--spacing",
        help="Spacing of the noise levels: `karras:rho=7`. Default: the sampler's own spacing.",
        autocompletion=complete("spacing"),
    ),
]
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="Model: a registered name (`digits`), a checkpoint folder or file, or a repository id on the Hub.",
        autocompletion=complete("model"),
    ),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of the Hub repository.")]
Variant = Annotated[
    str | None,
    typer.Option("--variant", help="Variant of the weights: `fp16`, `non_ema`, …; `ema` loads the folder unet_ema."),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        "--prompts",
        help="Prompts of a text-to-image model: a file with one prompt per line, a `.jsonl` or `.csv` file with the "
        "columns prompt and id, or `hf:owner/name`. Prompt k is label k, from 0.",
    ),
]
Prompt = Annotated[
    list[str],
    typer.Option(
        "--prompt", help="Prompt of a text-to-image model, in place of --prompts. Can be repeated.", show_default=False
    ),
]
NegativePrompt = Annotated[
    str | None,
    typer.Option("--negative-prompt", help="Negative prompt of a text-to-image model. Default: the empty prompt."),
]
ImageSize = Annotated[
    str | None,
    typer.Option(
        "--image-size",
        help="Size of the images of a text-to-image model, HEIGHTxWIDTH in pixels: `768x1024`. Default: the model's.",
    ),
]
EmbeddedGuidance = Annotated[
    float | None,
    typer.Option(
        "--embedded-guidance",
        help="Guidance scale that a distilled network (FLUX.1-dev, LCM) takes as an input. Default: its pipeline's.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="Save memory with a text-to-image model: a comma-separated list of `offload`, `sequential-offload`, "
        "`vae-tiling`, `vae-slicing` and `attention-slicing`.",
    ),
]
Lora = Annotated[
    list[str],
    typer.Option(
        "--lora",
        help="LoRA file (safetensors) to merge into the network, with an optional scale: `FILE:0.8`. Can be repeated.",
        show_default=False,
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        help="Path of a scheduler_config.json, or of its folder: the noise schedule, in place of that of the pipeline.",
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        help="Pipeline (folder or repository id) with the configuration and the parts that a single .safetensors file "
        "or the folder of a network lacks.",
    ),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Load checkpoints from the local cache only, like HF_HUB_OFFLINE=1.")
]
Labels = Annotated[
    str | None,
    typer.Option(
        "--labels",
        help="Class labels: `balanced` (proportions of the data), `none`, one label, or the name of a class if the "
        "model has class names (`samplerbench show MODEL`). Default: balanced if the model has classes.",
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=2**64 - 1, help="Random seed. Sample i depends only on the seed and i.")
]
BatchSize = Annotated[
    str,
    typer.Option(
        "--batch-size",
        "-b",
        help="Images per batch; does not change the images. `auto` measures which size is fastest, and caches "
        "the result.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Data type of the network: fp32, tf32 (requires an NVIDIA GPU), bf16, fp16 or fp64. The "
        "sampler's state is float32; with fp64, it is float64.",
        autocompletion=choices(DTYPES),
    ),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the network with torch.compile: slower start, faster sampling.")
]
Graphs = Annotated[
    bool,
    typer.Option(
        "--graphs", help="Run whole batches as CUDA graphs. Useful for small networks. Requires an NVIDIA GPU."
    ),
]
Device = Annotated[str, typer.Option("--device", help="Device: auto, cpu, cuda, cuda:1, …")]


Out = Annotated[
    Path, typer.Option("--out", "-o", help="Folder for the results: one JSON file and one PNG of samples per cell.")
]


def grid(samplers: list[str], steps: str | None, nfe: str | None, guidances: list[str], spacing: str | None) -> Grid:
    """The grid of the options. Raises UserError."""
    from samplerbench.bench.request import one_grid

    if nfe is not None and steps is not None:
        parse_steps(nfe, "--nfe")
        raise UserError("--steps and --nfe cannot be combined; use one of them.")
    numbers = () if steps is None else parse_steps(steps)
    return one_grid(samplers, numbers, () if nfe is None else parse_steps(nfe, "--nfe"), guidances, spacing)


def one_of_prompts(prompt: Sequence[str], prompts: str | None) -> str | tuple[str, ...] | None:
    """The prompts given by --prompt, or the file given by --prompts; None without either.

    Raises:
        UserError: both are given.
    """
    if prompt and prompts is not None:
        raise UserError("--prompt and --prompts cannot be combined; use one of them.")
    return tuple(prompt) or prompts


def text_options(image_size: str | None, embedded_guidance: float | None, memory: str | None) -> dict[str, Any]:
    """The fields of a request for the options of text-to-image models."""
    words = () if memory is None else tuple(word.strip() for word in memory.split(",") if word.strip())
    return {"image_size": image_size, "embedded_guidance": embedded_guidance, "memory": words}


def note_prompts(model: Model) -> None:
    """Print a note about prompts that are longer than the text encoder reads, if there are any."""
    from samplerbench.models.text import prompt_warning

    if warning := prompt_warning(model):
        note(f"note: {warning}")


class Interrupts:
    """Handle Ctrl-C: the first press stops the run at the next checkpoint, the second stops it at once.

    Args:
        quiet: print nothing. For all processes of a distributed run but the first.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.count, self.quiet = 0, quiet

    def requested(self) -> bool:
        """Whether Ctrl-C has been pressed."""
        return self.count > 0

    def __enter__(self) -> Interrupts:
        import signal
        import threading

        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        import signal

        if self.main:
            signal.signal(signal.SIGINT, self.before)

    def _on_signal(self, *_: object) -> None:
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt
        if not self.quiet:
            note("stopping at the next checkpoint; press Ctrl-C again to stop now.", gap=True)

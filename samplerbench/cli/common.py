"""Options that several commands share, and what they have in common when they run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samplerbench.progress import Progress as Progress
from samplerbench.text import note

if TYPE_CHECKING:
    pass


def complete(kind: str) -> Any:
    """Shell completion of registered names; nothing is imported for it."""

    def names(incomplete: str) -> list[str]:
        from samplerbench import registry

        return sorted({e.name for e in registry.entries(kind) if e.name.startswith(incomplete)})

    return names


Samplers = Annotated[
    list[str],
    typer.Option(
        "--sampler",
        "-s",
        help="A sampler, with parameters: `ddim:eta=0.5`. Repeatable.",
        autocompletion=complete("sampler"),
    ),
]
Steps = Annotated[
    str | None, typer.Option("--steps", help="Numbers of steps, with commas: `10,20,50`. Default: 50, if no --nfe.")
]
Guidances = Annotated[
    list[str],
    typer.Option(
        "--guidance",
        "-g",
        help="A guidance, with parameters: `cfg:scale=2`; `none` for none. Repeatable.",
        autocompletion=complete("guidance"),
    ),
]
Spacing = Annotated[
    str | None,
    typer.Option(
        "--spacing",
        help="Where the steps are: `karras:rho=7`. Default: the sampler's own.",
        autocompletion=complete("spacing"),
    ),
]
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A name (`digits`), a checkpoint folder, or a hub id.",
        autocompletion=complete("model"),
    ),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub repository.")]
Variant = Annotated[
    str | None,
    typer.Option(
        "--variant", help="Which of the checkpoint's weights: `fp16`, `non_ema`, …; `ema` is the folder unet_ema."
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option("--prompts", help="For a model that draws from text: a file, one prompt a line. Line k is label k."),
]
NegativePrompt = Annotated[
    str | None,
    typer.Option("--negative-prompt", help="What guidance steers away from. Default: the empty prompt."),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Take checkpoints from the local cache only, as HF_HUB_OFFLINE=1 does.")
]
Labels = Annotated[
    str | None,
    typer.Option(
        "--labels",
        help="`balanced` as in the data, `none`, or one label. Default: balanced, if there are classes.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**64 - 1, help="Sample i is a function of seed and i alone.")]
BatchSize = Annotated[
    str,
    typer.Option(
        "--batch-size",
        "-b",
        help="Images at a time; changes no image. `auto` tries which is fastest, and remembers it.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="Of the network: fp32, tf32 (NVIDIA GPUs), bf16, fp16 or fp64; the state keeps fp32."),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the network with torch.compile: slow to start, then faster.")
]
Graphs = Annotated[
    bool, typer.Option("--graphs", help="Replay whole batches as CUDA graphs: for small networks on NVIDIA GPUs.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, …")]


Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the results: a JSON file and a grid PNG per cell.")]


class Interrupts:
    """Ctrl-C once: finish what is being done up to the next checkpoint, then stop. Twice: stop now.

    quiet: print nothing, as one of several processes.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.count, self.quiet = 0, quiet

    def asked(self) -> bool:
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
            note("stopping at the next checkpoint; Ctrl-C again stops now.", gap=True)

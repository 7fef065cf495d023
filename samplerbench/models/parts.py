"""Checkpoints that are not a whole pipeline: a single file, or the folder of a network (`unet/`, `transformer/`).

A single file has no configuration, and the folder of a network has no noise schedule. The option `config` names a
pipeline with the missing parts, and `scheduler` the configuration of a noise schedule.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from samplerbench.errors import UserError, argument
from samplerbench.models.checkpoint import Checkpoint, open_checkpoint, read_card
from samplerbench.models.files import LoadOptions, check_pipeline, resolve_checkpoint
from samplerbench.untrusted import is_dir, is_file, read_json, shorten, user_path

NETWORKS = ("unet", "transformer")
"""Names of the network in model_index.json."""

PICKLES = (".ckpt", ".bin", ".pt", ".pth", ".pkl")

PIXEL_PIPELINES = {"CMStochasticIterativeScheduler": "ConsistencyModelPipeline"}
"""Pipeline of a `UNet2DModel` by its scheduler. Other schedulers are those of a `DDPMPipeline`."""


def is_network(folder: Path) -> bool:
    """Whether a folder contains one network of diffusers and no pipeline."""
    if is_file(folder / "model_index.json") or not is_file(folder / "config.json"):
        return False
    try:
        found = read_json(folder / "config.json", "").get("_class_name")
    except UserError:
        return False
    return isinstance(found, str) and ("UNet" in found or "Transformer" in found)


def open_source(source: str, options: LoadOptions, found: tuple[Path, str] | None = None) -> Checkpoint:
    """Open a pipeline, a single safetensors file, or the folder of a network, without loading weights.

    Args:
        source: path or hub id.
        options: options for loading.
        found: folder and revision returned by `resolve_checkpoint`. None for a file.

    Raises:
        UserError: if a part is missing, or an option does not apply to the checkpoint. See also `open_checkpoint`.
    """
    if found is None:
        checkpoint = _single_file(source, options)
    elif is_network(found[0]):
        checkpoint = _network(source, options, found)
    elif options.config is not None:
        raise UserError(
            f"{argument('config', options.config)} applies only to a single file or the folder of a network, but "
            f"{source} is a whole pipeline."
        )
    else:
        checkpoint = open_checkpoint(source, options, found)
    return checkpoint if options.scheduler is None else with_scheduler(checkpoint, options.scheduler)


def is_single_file(source: str) -> bool:
    """Whether a source is a file with weights.

    Raises:
        UserError: if it is a pickle file.
    """
    path = user_path(source)
    if not is_file(path):
        return False
    if path.suffix.lower() in PICKLES:
        how = ", a network of EDM with `samplerbench convert edm`" if path.suffix.lower() == ".pkl" else ""
        raise UserError(f"{source}: pickle files are not supported; convert the file to safetensors{how}.")
    return path.suffix.lower() == ".safetensors"


def with_scheduler(checkpoint: Checkpoint, scheduler: str) -> Checkpoint:
    """Replace the scheduler of a checkpoint by another configuration.

    Args:
        checkpoint: the opened checkpoint.
        scheduler: path of scheduler_config.json, or of a folder with this file.

    Raises:
        UserError: if the file does not exist, is damaged, or does not name its class.
    """
    file, name = _scheduler_file(scheduler)
    index = checkpoint.index | {"scheduler": ["diffusers", name]}
    return replace(checkpoint, index=index, paths=checkpoint.paths | {"scheduler": file})


def _scheduler_file(scheduler: str) -> tuple[Path, str]:
    """The path of a scheduler configuration, and its class name."""
    given, path = argument("scheduler", scheduler), user_path(scheduler)
    places = [path] if not is_dir(path) else [path / "scheduler_config.json", path / "scheduler/scheduler_config.json"]
    file = next((place for place in places if is_file(place)), None)
    if file is None:
        raise UserError(f"{given}: there is no scheduler_config.json; give its path, or the folder that contains it.")
    name = read_json(file, f"{given}").get("_class_name")
    if not isinstance(name, str) or not name.isidentifier():
        raise UserError(f"{given}: the file does not name the class of the scheduler in _class_name.")
    return file, name


def _single_file(source: str, options: LoadOptions) -> Checkpoint:
    if options.config is None:
        raise UserError(
            f"{source} is a single file without a configuration; give a pipeline with the same architecture (a folder "
            f"or hub id, such as that of the base model), {argument('config', 'FOLDER')}."
        )
    base, part = _base(options, options.config)
    return replace(base, source=source, single_file=user_path(source), network=part)


def _network(source: str, options: LoadOptions, found: tuple[Path, str]) -> Checkpoint:
    folder, revision = found
    name = str(read_json(folder / "config.json", source).get("_class_name"))
    if options.config is not None:
        base, part = _base(options, options.config)
        if base.kind(part) != name:
            raise UserError(
                f"{source} is a {shorten(name)}, but the {part} of {options.config} is a {base.kind(part)}; give a "
                "pipeline with the same architecture."
            )
        return replace(base, source=source, revision=revision, network=part, paths={part: folder})
    if is_file(folder.parent / "model_index.json"):
        raise UserError(
            f"{source} is the network of the pipeline {folder.parent}; use {argument('model', str(folder.parent))}."
        )
    if name != "UNet2DModel":
        raise UserError(
            f"{source} is a {shorten(name)} without the other parts of its pipeline; give a pipeline that has them, "
            f"{argument('config', 'FOLDER')}."
        )
    if options.scheduler is None:
        raise UserError(
            f"{source} is a UNet2DModel without a noise schedule; give the configuration of its scheduler, "
            f"{argument('scheduler', 'FOLDER')}, or a pipeline with the same architecture, "
            f"{argument('config', 'FOLDER')}."
        )
    scheduler = _scheduler_file(options.scheduler)[1]
    index = {"_class_name": PIXEL_PIPELINES.get(scheduler, "DDPMPipeline"), "unet": ["diffusers", name]}
    card = read_card(folder, source)
    return Checkpoint(source, folder, revision, options, index, card, network="unet", paths={"unet": folder})


def _base(options: LoadOptions, config: str) -> tuple[Checkpoint, str]:
    """The pipeline of `config`, without its card, and the name of its network."""
    folder, revision = resolve_checkpoint(config, replace(options, revision=None))
    base = open_checkpoint(config, options, (folder, revision))
    check_pipeline(config, base.index)
    part = next((name for name in NETWORKS if base.kind(name) != "missing"), None)
    if part is None:
        raise UserError(f"{argument('config', config)}: its model_index.json has no {' or '.join(NETWORKS)}.")
    # The card is about the training of the network of this pipeline, not of the one that is loaded.
    return replace(base, card={}), part

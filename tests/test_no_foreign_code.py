"""No code of a checkpoint, a weights file or a data set is run: folders whose code would leave a file behind.

Each loader is given its own kind of folder, sound but for code that creates `MARK`, in three ways: classes of the
folder's own (`auto_map`), pickled weights, and an index of shards that names another file. Nothing is asked either.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from support.text_pipelines import pixart
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, ViTConfig, ViTForImageClassification

from samplerbench.bench import setup
from samplerbench.data import load_data
from samplerbench.errors import SamplerbenchError, UserError
from samplerbench.metrics import extractors
from samplerbench.metrics.extractors import load_extractor
from samplerbench.metrics.feature_network import FeatureNetwork
from samplerbench.models.checkpoint import Checkpoint
from samplerbench.models.classifier_guide import load_classifier
from samplerbench.models.edm import EDMPreconditioned
from samplerbench.models.exact import exact
from samplerbench.models.files import LoadOptions
from samplerbench.models.image_classifier import load_image_classifier
from samplerbench.models.latent import load_autoencoder as load_latents
from samplerbench.models.noise_classifier import NoiseConditionalClassifier
from samplerbench.models.stable_diffusion import RECIPE
from samplerbench.models.text_encoders import open_text_encoders
from samplerbench.training.latent import load_autoencoder

MARK = "MARK"
AUTO = ("AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoTokenizer", "AutoImageProcessor")


class Payload:
    """What creates the mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


# --- The folders ----------------------------------------------------------------------------------------------------


def small_unet() -> UNet2DModel:
    kinds = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    return UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, **kinds)


def save_pixel(folder: Path) -> Path:
    small_unet().save_pretrained(folder / "unet")
    DDPMScheduler().save_pretrained(folder / "scheduler")
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    index["scheduler"] = ["diffusers", "DDPMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder / "unet"


def save_edm(folder: Path) -> Path:
    EDMPreconditioned.around(small_unet()).save_pretrained(folder)
    return folder


def small_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4)


def save_vae(folder: Path) -> Path:
    small_autoencoder().save_pretrained(folder / "vae")
    return folder / "vae"


def save_trained_autoencoder(folder: Path) -> Path:
    small_autoencoder().save_pretrained(folder)
    return folder


def save_text(folder: Path) -> Path:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=8, max_position_embeddings=8)).save_pretrained(
        folder / "text_encoder"
    )
    words = ["a", "b", "a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return folder / "text_encoder"


def save_text_to_image(folder: Path) -> Path:
    pixart("PixArtAlphaPipeline").save_pretrained(folder)
    return folder / "text_encoder"


def save_image_classifier(folder: Path) -> Path:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=2)).save_pretrained(folder)
    means = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(means))
    return folder


def save_noise_classifier(folder: Path) -> Path:
    NoiseConditionalClassifier(1, 2, (8, 8)).save_pretrained(folder)
    return folder


def save_features(folder: Path) -> Path:
    FeatureNetwork(1, 2, (8,), 4).save_pretrained(folder)
    (folder / "samplerbench.json").write_text(json.dumps({"what": "features", "data": {"name": "mine"}}))
    return folder


def opened(folder: Path) -> Checkpoint:
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    return Checkpoint(str(folder), folder, "", LoadOptions(), index)


LOADERS: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Any]]] = {
    "pixel pipeline": (save_pixel, lambda f: setup.load_model(str(f), CPU, "fp32")),
    "edm": (save_edm, lambda f: setup.load_model(str(f), CPU, "fp32")),
    "autoencoder": (save_vae, lambda f: load_latents(opened(f), "vae", 4, (8, 8), CPU, torch.float32)),
    "trained autoencoder": (save_trained_autoencoder, lambda f: load_autoencoder(str(f))),
    "text encoder": (save_text, lambda f: open_text_encoders(opened(f), RECIPE, CPU).pipeline),
    "text-to-image": (save_text_to_image, lambda f: setup.load_model(str(f), CPU, "fp32", LoadOptions(prompts=("x",)))),
    "image classifier": (save_image_classifier, lambda f: load_image_classifier(str(f), exact("mixture"))),
    "noise classifier": (save_noise_classifier, lambda f: load_classifier(str(f), exact("mixture"))),
    "features": (save_features, lambda f: load_extractor(str(f), CPU)),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """For each loader its folder, and the folder of the weights in it."""
    found = {}
    for name, (save, _) in LOADERS.items():
        folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
        found[name] = (folder, save(folder).relative_to(folder))
    return found


@pytest.fixture(autouse=True)
def nothing_is_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    def asked(*_: Any) -> str:
        raise AssertionError("a question was asked")

    monkeypatch.setattr("builtins.input", asked)
    yield
    assert capsys.readouterr().out == ""


Attacked = tuple[Path, Path, Callable[[], Any], Path]


@pytest.fixture(params=LOADERS)
def attacked(request: pytest.FixtureRequest, sound: dict[str, tuple[Path, Path]], tmp_path: Path) -> Attacked:
    """(folder, folder of the weights, what loads it, the mark) of a copy that a test may spoil."""
    source, inner = sound[request.param]
    folder = shutil.copytree(source, tmp_path / "model")
    return folder, folder / inner, lambda: LOADERS[request.param][1](folder), tmp_path / MARK


def evil(mark: Path) -> str:
    return f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Evil:\n    pass\n"


def refusal(load: Callable[[], Any], mark: Path) -> str:
    """The one line with which loading is refused; what was to be run was not."""
    with pytest.raises(UserError) as refused:
        load()
    assert not mark.exists()
    assert "\n" not in str(refused.value)
    return str(refused.value)


# --- Models ---------------------------------------------------------------------------------------------------------


def test_the_folders_are_sound(attacked: Attacked) -> None:
    assert attacked[2]() is not None


def test_classes_of_a_folders_own_are_not_run(attacked: Attacked) -> None:
    folder, _, load, mark = attacked
    for file in list(folder.rglob("*.json")):
        written = json.loads(file.read_text("utf-8"))
        if file.name.endswith("config.json"):
            written["auto_map"] = dict.fromkeys(AUTO, "evil.Evil")
            file.write_text(json.dumps(written))
        (file.parent / "evil.py").write_text(evil(mark))
    with contextlib.suppress(SamplerbenchError):
        load()
    assert not mark.exists()


@pytest.mark.parametrize("known", [True, False])
def test_an_image_classifier_with_code_of_its_own(
    sound: dict[str, tuple[Path, Path]], tmp_path: Path, known: bool
) -> None:
    """A model type that transformers knows is loaded as that; another is refused, and nobody is asked."""
    folder = shutil.copytree(sound["image classifier"][0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["auto_map"] = dict.fromkeys(AUTO, "evil.Evil")
    config |= {} if known else {"model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(evil(tmp_path / MARK))
    load = LOADERS["image classifier"][1]
    if known:
        assert load(folder).classes == 2
    else:
        assert "refers to custom code (auto_map); code in" in refusal(lambda: load(folder), tmp_path / MARK)
    assert not (tmp_path / MARK).exists()


def test_pickled_weights_are_not_loaded(attacked: Attacked) -> None:
    _, inner, load, mark = attacked
    for file in inner.glob("*.safetensors"):
        file.unlink()
    for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.ckpt", "diffusion_pytorch_model.pt"):
        torch.save({"weight": Payload(mark)}, inner / name)
    assert "safetensors" in refusal(load, mark)


@pytest.mark.parametrize("other", ["evil.bin", "../evil.safetensors", "/evil.safetensors"])
def test_an_index_names_no_file_but_the_shards_that_are_hashed(attacked: Attacked, other: str) -> None:
    """The weights in the protocol are those beside the index. Another file that it names would be loaded unseen."""
    _, inner, load, mark = attacked
    (file,) = inner.glob("*.safetensors")
    tensors = load_file(file)
    torch.save({"weight": Payload(mark)}, inner / "evil.bin")
    save_file({k: torch.zeros_like(v) for k, v in tensors.items()}, inner.parent / "evil.safetensors", {"format": "pt"})
    shutil.copy(file, inner / f"{file.stem}-00001-of-00001.safetensors")
    (inner / f"{file.stem}.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, other)})
    )
    assert f'refers to "{other}"; it must refer to shards in the same folder' in refusal(load, mark)


def test_an_adapter_does_not_change_the_weights_unseen(attacked: Attacked) -> None:
    _, inner, load, mark = attacked
    (inner / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/other"}))
    assert "merge the adapter into the weights" in refusal(load, mark)


def test_a_kernel_on_the_hub_is_code_too(attacked: Attacked) -> None:
    _, inner, load, mark = attacked
    config = json.loads((inner / "config.json").read_text("utf-8"))
    (inner / "config.json").write_text(json.dumps(config | {"attn_implementation": "owner/kernel"}))
    assert "refers to code on the hub (attn_implementation: owner/kernel)" in refusal(load, mark)


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": ["evil", "Pipeline"]},
        {"_class_name": "EvilPipeline", "custom_pipeline": "evil"},
        {"unet": ["evil", "UNet2DModel"], "_class_name": "evil.Pipeline"},
        {"unet": ["evil", "Evil"]},
        {"scheduler": ["evil", "Evil"]},
    ],
)
def test_modules_that_an_index_names_are_not_imported(
    sound: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: dict[str, Any]
) -> None:
    folder = shutil.copytree(sound["pixel pipeline"][0], tmp_path / "model")
    written = json.loads((folder / "model_index.json").read_text("utf-8"))
    (folder / "model_index.json").write_text(json.dumps(written | index))
    for place in (folder, folder / "unet", folder / "scheduler"):
        (place / "evil.py").write_text(evil(tmp_path / MARK))
        (place / "pipeline.py").write_text(evil(tmp_path / MARK))
    monkeypatch.syspath_prepend(folder)
    assert "supported" in refusal(lambda: setup.load_model(str(folder), CPU, "fp32"), tmp_path / MARK)


def test_every_from_pretrained_says_that_no_code_is_trusted() -> None:
    """All of them, in the source: a loader that is added later too."""
    import ast

    import samplerbench

    calls = []
    for file in sorted(Path(samplerbench.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                given = {k.arg: k.value for k in node.keywords}
                if node.func.attr in ("from_pretrained", "load_dataset"):
                    calls.append(
                        (file.name, node.lineno, ast.unparse(given.get("trust_remote_code", ast.Constant(None))))
                    )
                assert node.func.attr != "load" or ast.unparse(node.func.value) not in ("pickle", "joblib", "yaml"), (
                    file
                )
                if ast.unparse(node.func) == "torch.load":
                    assert ast.unparse(given["weights_only"]) == "True", file
                if ast.unparse(node.func) == "np.load":
                    assert ast.unparse(given["allow_pickle"]) == "False", file
    assert len(calls) >= 7
    assert all(trusted == "False" for *_, trusted in calls), calls


# --- Data sets ------------------------------------------------------------------------------------------------------


def test_a_data_sets_script_is_not_run(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the optional library datasets is not installed")
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "images.py").write_text(evil(tmp_path / MARK))
    assert "cannot be loaded" in refusal(lambda: load_data(f"hf:{folder}"), tmp_path / MARK)


def test_a_pickled_array_is_not_loaded(tmp_path: Path) -> None:
    import numpy as np

    array = np.empty(1, dtype=object)
    array[0] = Payload(tmp_path / MARK)
    np.savez(tmp_path / "images.npz", images=array)
    assert "is of type object" in refusal(lambda: load_data(str(tmp_path / "images.npz")), tmp_path / MARK)
    (tmp_path / "bare.npz").write_bytes(pickle.dumps(Payload(tmp_path / MARK)))
    assert "cannot be read as an npz file" in refusal(lambda: load_data(str(tmp_path / "bare.npz")), tmp_path / MARK)


# --- Weights of feature extractors ----------------------------------------------------------------------------------


class Fidelity(nn.Module):
    """An extractor that loads its weights as torch-fidelity's do: by unpickling whatever the path holds."""

    def __init__(self, name: str, layers: list[str], feature_extractor_weights_path: str, **_: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "linear"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    known = extractors._registry()
    monkeypatch.setattr(extractors, "_registry", lambda: {**known, "small": Fidelity, "clip-small": Fidelity})


def state() -> dict[str, Tensor]:
    return {"linear.weight": torch.tensor([[1.0, 2.0]]), "linear.bias": torch.tensor([3.0])}


@pytest.mark.usefixtures("registered")
def test_weights_are_safetensors_or_a_state_dict(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "w.safetensors")
    torch.save(state(), tmp_path / "w.pth")
    torch.save(state(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    found = [load_extractor("small", CPU, str(tmp_path / name)) for name in ("w.safetensors", "w.pth", "old.pth")]
    assert len({e.sha256 for e in found}) == 1
    torch.testing.assert_close(found[0].module.state_dict(), state())


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", ["w.pth", "w.pt", "w.bin", "w.safetensors", "w"])
@pytest.mark.parametrize("old", [False, True])
def test_weights_that_are_a_pickle_of_something_else_are_refused(tmp_path: Path, name: str, old: bool) -> None:
    torch.save({**state(), "x": Payload(tmp_path / MARK)}, tmp_path / name, _use_new_zipfile_serialization=not old)
    line = refusal(lambda: load_extractor("small", CPU, str(tmp_path / name)), tmp_path / MARK)
    assert line.startswith(f"the weights {tmp_path / name} ")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", ["inception-v3-compat", "vgg16", "small"])
def test_that_holds_for_every_extractor_of_torch_fidelity(tmp_path: Path, name: str) -> None:
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Payload(tmp_path / MARK)))
    assert "contain more than tensors" in refusal(
        lambda: load_extractor(name, CPU, str(tmp_path / "w.pth")), tmp_path / MARK
    )


@pytest.mark.usefixtures("registered")
def test_a_torchscript_archive_is_a_program(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 1)), tmp_path / "w.pt")
    for name in ("clip-small", "small"):
        refusal(lambda name=name: load_extractor(name, CPU, str(tmp_path / "w.pt")), tmp_path / MARK)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("content", [b"", b"x" * 100, [1, 2], {"a": 1}, {}, torch.zeros(2)])
def test_weights_of_nothing_known_are_one_line(tmp_path: Path, content: Any) -> None:
    if isinstance(content, bytes):
        (tmp_path / "w.pth").write_bytes(content)
    else:
        torch.save(content, tmp_path / "w.pth")
    assert "the weights " in refusal(lambda: load_extractor("small", CPU, str(tmp_path / "w.pth")), tmp_path / MARK)


@pytest.mark.usefixtures("registered")
def test_cached_weights_are_not_unpickled_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch-fidelity loads what torch hub's cache holds with weights_only=False."""
    import torch_fidelity.feature_extractor_inceptionv3 as inception

    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    name = inception.URL_INCEPTION_V3.rsplit("/", 1)[1]
    torch.save({"x": Payload(tmp_path / MARK)}, tmp_path / "checkpoints" / name)
    refusal(lambda: load_extractor("inception-v3-compat", CPU), tmp_path / MARK)

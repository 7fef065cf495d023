"""Class names: read from data sets, stored in cards, and accepted as labels."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU
from diffusers import DDIMScheduler, DiTPipeline, UNet2DModel
from PIL import Image
from support.pipelines import tiny_autoencoder, tiny_transformer

import samplerbench
from samplerbench.bench import setup
from samplerbench.bench.labels import given_labels, parse_label
from samplerbench.bench.prepare import prepare
from samplerbench.bench.suite import load_suite
from samplerbench.cli import main
from samplerbench.data import ImageSet, load_data
from samplerbench.errors import ArgumentTypeError, UserError
from samplerbench.models import Model
from samplerbench.models.checkpoint import read_card
from samplerbench.models.edm import EDMPreconditioned
from samplerbench.training.loop import TrainSettings, fit
from samplerbench.training.unet import UNetSettings, UNetTask

IMAGENET = ("tench, Tinca tinca", "goldfish, Carassius auratus", "crane", "", "Crane", "crane, machine")


def refusal(call: Any, kind: type[UserError] = UserError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_images(folder: Path, classes: tuple[str, ...] = ("cat", "Dog", "7"), each: int = 3) -> Path:
    """A folder of random grey 8x8 images in class sub-folders."""
    random = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for k in range(each):
            Image.fromarray(random.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / name / f"{k}.png")
    return folder


# --- Data sets ------------------------------------------------------------------------------------------------------


def test_sub_folders_of_folders_and_archives_are_class_names(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "set")
    data = load_data(str(folder))
    assert data.class_names == ("7", "Dog", "cat")
    assert data.subset(torch.tensor([0]), "one").class_names == data.class_names
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in folder.rglob("*.png"):
            archive.write(file, file.relative_to(tmp_path))
    archived = load_data(str(tmp_path / "set.zip"))
    assert archived.class_names == data.class_names
    assert archived.sha256 == data.sha256
    assert load_data(f"{folder}:resize=4").class_names == data.class_names
    assert load_data(str(folder / "cat")).class_names == ()


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes are possible on Linux")
def test_a_folder_name_that_is_not_unicode_is_no_class_name(tmp_path: Path) -> None:
    write_images(tmp_path, ("cat", os.fsdecode(b"d\xff")))
    assert load_data(str(tmp_path)).class_names == ("cat", "")


@pytest.mark.parametrize(
    ("source", "classes", "expected"),
    [
        ("mnist", ["0 - zero", "1 - one", "2 - two"], ("zero", "one", "two")),
        ("cifar10", ["airplane", "automobile", "bird"], ("airplane", "automobile", "bird")),
        ("cifar10", ["airplane", "automobile"], ()),
        ("svhn", None, ()),
    ],
)
def test_classes_of_torchvision_are_class_names(
    monkeypatch: pytest.MonkeyPatch, source: str, classes: list[str] | None, expected: tuple[str, ...]
) -> None:
    from torchvision import datasets

    fields = {"data": np.zeros((3, 2, 2), np.uint8), "targets": [0, 2, 1]} | ({"classes": classes} if classes else {})
    cls = {"mnist": "MNIST", "cifar10": "CIFAR10", "svhn": "SVHN"}[source]
    monkeypatch.setattr(datasets, cls, lambda *_, **__: SimpleNamespace(**fields))
    assert load_data(source).class_names == expected


def test_class_labels_of_a_hub_data_set_are_class_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the optional library datasets is not installed")
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "kind": datasets.ClassLabel(names=["tench, Tinca tinca", "b"]),
            "k": datasets.Value("int64"),
        }
    )
    pixels = Image.fromarray(np.zeros((2, 2), np.uint8))
    rows = {"img": [pixels] * 2, "kind": [0, 0], "k": [0, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    assert load_data(f"hf:{tmp_path}").class_names == ("tench, Tinca tinca", "b")
    assert load_data(f"hf:{tmp_path},labels=k").class_names == ()


def test_data_without_names_has_none_and_wrong_names_are_refused() -> None:
    assert load_data("digits").class_names == ()
    images, labels = torch.zeros((2, 1, 2, 2), dtype=torch.uint8), torch.tensor([0, 1])
    assert ImageSet("mine", "all", images, labels, 2, class_names=("cat", "")).class_names == ("cat", "")
    wrong: list[Any] = [("cat",), ("a", "b", "c"), ("a", 1), ["a", "b"], "ab", ("a", "\ud800")]
    for names in wrong:
        message = refusal(lambda names=names: ImageSet("mine", "all", images, labels, 2, class_names=names))
        assert message.startswith("the data set mine: class_names must be a tuple with one text for each class"), names
    assert "number of classes is None" in refusal(
        lambda: ImageSet("mine", "all", images, None, None, class_names=("cat",))
    )


# --- Names as labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("tench", 0),
        ("Tinca tinca", 0),
        ("tench, Tinca tinca", 0),
        (" TENCH ", 0),
        ("carassius AURATUS", 1),
        ("Crane", 4),  # an exact match, although other classes have the name in lower case
        ("machine", 5),
        ("crane, machine", 5),
        ("1", 1),
        ("balanced", "balanced"),
        ("none", "none"),
    ],
)
def test_a_name_is_the_label_of_its_class(name: str, label: int | str) -> None:
    assert parse_label(name, IMAGENET) == label


def test_a_whole_number_and_a_mode_are_never_names() -> None:
    names = ("10", "1", "none", "balanced")
    assert [parse_label(text, names) for text in ("10", "1", "none", "balanced")] == [10, 1, "none", "balanced"]
    assert given_labels(["1", "none", 3], 4, names).tolist() == [1, 2, 3]


def test_an_accented_letter_is_the_same_in_one_character_and_in_two() -> None:
    assert parse_label("caf\u00e9", ("dog", "cafe\u0301")) == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("crane", 'labels="crane": 2 classes have this name; give one of their labels: 2, 5.'),
        ("CRANE", 'labels="CRANE": 3 classes have this name; give one of their labels: 2, 4, 5.'),
        (
            "tnech",
            'labels="tnech": no class of the model has this name; give "balanced", "none", one label or the name of a '
            'class. Did you mean "tench"?',
        ),
        (
            "xyz",
            'labels="xyz": no class of the model has this name; give "balanced", "none", one label or the name of a '
            "class.",
        ),
        ("", 'labels="": no class of the model has this name;'),
        (",", 'labels=",": no class of the model has this name;'),
    ],
)
def test_an_unknown_or_ambiguous_name_is_one_line(name: str, reason: str) -> None:
    message = refusal(lambda: parse_label(name, IMAGENET))
    assert message == reason if reason.endswith(("?", ".")) else message.startswith(reason)


def test_a_suggested_name_can_be_copied() -> None:
    assert refusal(lambda: parse_label("ca", ("cat\x1b[31m", "cat\nb", "c" * 101))).endswith("the name of a class.")
    many = ("cat",) * 12
    assert refusal(lambda: parse_label("cat", many)).endswith("give one of their labels: 0, 1, 2, 3, 4, ….")


@pytest.mark.parametrize("names", [(), ("", "")])
def test_without_names_the_message_is_that_of_numbers(names: tuple[str, ...]) -> None:
    assert refusal(lambda: parse_label("cat", names)) == 'labels="cat": give "balanced", "none" or one label.'
    message = "`labels`: label 1 is of type str; give whole numbers."
    assert refusal(lambda: given_labels([0, "cat"], 2, names), ArgumentTypeError) == message


def test_a_list_of_labels_can_have_names_and_numbers() -> None:
    assert given_labels(["goldfish", 0, "tench", "3", "goldfish"], 6, IMAGENET).tolist() == [1, 0, 0, 3, 1]
    assert given_labels(np.array(["tench", "goldfish"]), 6, IMAGENET).tolist() == [0, 1]  # type: ignore[arg-type]
    unknown = refusal(lambda: given_labels(["golfish"], 6, IMAGENET))
    assert unknown == (
        'labels="golfish": no class of the model has this name; give labels or names of classes. Did you mean '
        '"goldfish"?'
    )
    assert refusal(lambda: given_labels(["6"], 6, IMAGENET)) == "labels=6: the model has the labels 0 to 5."
    wrong = refusal(lambda: given_labels([0, 0.5], 6, IMAGENET), ArgumentTypeError)  # type: ignore[list-item]
    assert wrong == "`labels`: label 1 is of type float; give whole numbers or names of classes."


# --- Python ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture() -> Model:
    """Two labels, cat and dog."""
    model = samplerbench.load_model("exact:mixture", device="cpu")
    return dataclasses.replace(model, class_names=("cat", "dog"))


def test_sample_accepts_names(mixture: Model) -> None:
    def images(labels: Any) -> torch.Tensor:
        made = samplerbench.sample("ddim", 2, n=2, model=mixture, labels=labels, output_type="float", quiet=True)
        assert isinstance(made, torch.Tensor)
        return made

    assert torch.equal(images("Dog"), images(1))
    assert torch.equal(images(["dog", "cat"]), images([1, 0]))
    assert not torch.equal(images("dog"), images("cat"))
    assert 'Did you mean "dog"?' in refusal(lambda: images("dogg"))


def test_a_cell_by_name_and_by_number_is_the_same_cell(mixture: Model, tmp_path: Path) -> None:
    """Its result is recorded under the number, and is not run again."""
    given: Any = {"steps": 2, "n": 4, "metrics": "gap", "model": mixture, "out": tmp_path, "quiet": True}
    by_name, by_number = (samplerbench.evaluate("ddim", labels=labels, **given)[0] for labels in ("DOG", 1))
    assert by_name["labels"] == by_number["labels"] == "1"
    assert by_name["protocol"] == by_number["protocol"]
    assert by_number["seconds"] == by_name["seconds"]
    assert len(list(tmp_path.glob("*.json"))) == 1
    padded = samplerbench.evaluate("ddim", labels="01", **given)[0]
    assert padded["protocol"] == by_name["protocol"]


# --- Cards ----------------------------------------------------------------------------------------------------------


def train(out: Path, conditional: bool = True) -> Path:
    """A U-Net of a folder with the classes "7", "Dog" and "cat"."""
    data = load_data(str(write_images(out / "pets")))
    torch.manual_seed(0)
    task = UNetTask(data, UNetSettings(channels=(8, 8), groups=4, head_dim=4, class_conditional=conditional))
    fit(task, data, TrainSettings(steps=1, batch_size=2, cpu=True), out / "model")
    return out / "model"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional U-Net."""
    return train(tmp_path_factory.mktemp("trained"))


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_training_stores_the_names_and_the_model_has_them(trained: Path) -> None:
    card = json.loads((trained / "samplerbench.json").read_text("utf-8"))
    assert card["data"]["class_names"] == ["7", "Dog", "cat"]
    assert setup.load_model(str(trained), CPU, "fp32").class_names == ("7", "Dog", "cat")


def test_an_unconditional_model_of_named_data_has_no_names(tmp_path: Path) -> None:
    folder = train(tmp_path, conditional=False)
    assert read_card(folder, "it")["data"]["class_names"] == ["7", "Dog", "cat"]
    model = setup.load_model(str(folder), CPU, "fp32")
    assert (model.classes, model.class_names) == (None, ())


def test_an_edm_network_has_the_names_of_its_card(trained: Path, tmp_path: Path) -> None:
    network = UNet2DModel.from_pretrained(trained / "unet")
    EDMPreconditioned.around(network, sigma_data=0.5, null_label=3).save_pretrained(tmp_path)
    shutil.copy(trained / "samplerbench.json", tmp_path)
    assert setup.load_model(str(tmp_path), CPU, "fp32").class_names == ("7", "Dog", "cat")


def test_the_command_line_accepts_names(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = ("-s", "ddim", "--steps", "1", "--n", "2", "--model", str(trained))
    for labels in ("CAT", "2"):
        assert command("sample", str(tmp_path / f"{labels}.png"), *shared, "--labels", labels) == 0
    assert (tmp_path / "CAT.png").read_bytes() == (tmp_path / "2.png").read_bytes()
    suite = tmp_path / "pets.toml"
    text = f'model = {json.dumps(str(trained))}\nlabels = "dog"\nn = 2\n[[grid]]\nsamplers = ["ddim"]\nsteps = [1]\n'
    suite.write_text(text, "utf-8")
    prepared = prepare(load_suite(suite), "cpu")
    assert (prepared.request.labels, prepared.mode) == ("dog", "1")
    assert prepared.inputs(3).labels.tolist() == [1, 1, 1]  # type: ignore[union-attr]
    capsys.readouterr()
    assert command("run", str(suite), "--out", str(tmp_path / "out"), "--labels", "rat") == 2
    assert capsys.readouterr().err == (
        'samplerbench: --labels rat: no class of the model has this name; give "balanced", "none", one label or the '
        'name of a class. Did you mean "cat"?\n'
    )


def test_show_lists_the_first_names(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("show", str(trained)) == 0
    assert "0 7; 1 Dog; 2 cat" in capsys.readouterr().out
    from samplerbench.cli.listing import _first_names

    assert _first_names(["a", "", "b, c", "d", "e", "f", "g"]) == "0 a; 2 b, c; 3 d; 4 e; 5 f; …"
    assert command("show", "digits") == 0
    assert "class names" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"class_names": "abc"},
        {"class_names": {"0": "a"}},
        {"class_names": ["a", "b"]},
        {"class_names": []},
        {"class_names": ["a", "b", 3]},
        {"class_names": ["a", "b", None]},
        {"classes": None},
        {"classes": "3"},
        {"classes": 4},
    ],
)
def test_a_card_with_damaged_names_is_one_line(tmp_path: Path, changes: dict[str, Any]) -> None:
    good: dict[str, Any] = {"name": "mine", "classes": 3, "class_names": ["a", "", "c"]}
    file = tmp_path / "samplerbench.json"
    file.write_text(json.dumps({"data": good}), "utf-8")
    assert read_card(tmp_path, "it")["data"] == good
    file.write_text(json.dumps({"data": good | changes}), "utf-8")
    message = refusal(lambda: read_card(tmp_path, "it"))
    assert message.startswith(
        f"it has a damaged card: samplerbench.json{': ' if changes.get('classes', 1) else ' has no '}"
    )


def test_names_for_another_number_of_classes_are_refused_and_old_cards_load(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "model")
    card = json.loads((folder / "samplerbench.json").read_text("utf-8"))
    for data, names in (({"classes": 2, "class_names": ["a", "b"]}, None), ({"class_names": None}, ())):
        (folder / "samplerbench.json").write_text(json.dumps(card | {"data": card["data"] | data}), "utf-8")
        if names is None:
            message = refusal(lambda: setup.load_model(str(folder), CPU, "fp32"))
            assert message.endswith("samplerbench.json has 2 class names, but the model has 3 classes.")
        else:
            assert setup.load_model(str(folder), CPU, "fp32").class_names == names


# --- Transformers ---------------------------------------------------------------------------------------------------


def test_a_transformer_has_the_names_of_id2label(tmp_path: Path) -> None:
    DiTPipeline(tiny_transformer(), tiny_autoencoder(), DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text("utf-8"))

    def load(id2label: Any) -> Model:
        (tmp_path / "model_index.json").write_text(json.dumps(index | {"id2label": id2label}), "utf-8")
        return setup.load_model(str(tmp_path), CPU, "fp32")

    id2label = {"0": "tench, Tinca tinca", "999": "toilet tissue, toilet paper, bathroom tissue"}
    model = load(id2label)
    assert (len(model.class_names), model.class_names[0], model.class_names[1]) == (1000, "tench, Tinca tinca", "")
    theirs = DiTPipeline.from_pretrained(tmp_path, use_safetensors=True).labels
    assert theirs == {name: parse_label(name, model.class_names) for name in theirs}
    assert len(theirs) == 5
    assert load(None).class_names == load({}).class_names == ()
    for wrong in (["tench"], "tench", {"tench": 0}, {"0": 1}, {"1000": "x"}, {"-1": "x"}, {"0": None}, {"²": "x"}):
        message = refusal(lambda wrong=wrong: load(wrong))
        assert "model_index.json: id2label is " in message
        assert message.endswith("it must be an object with names of the labels 0 to 999.")

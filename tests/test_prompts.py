"""Prompts: the files that they are read from, their embeddings in the cache, and what is refused."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.pipelines import PROMPTS, configure, load
from support.text_flows import flux
from support.text_pipelines import ddim, our_images, pixart, xl

from samplerbench import cli
from samplerbench.errors import OutOfMemoryError, UserError
from samplerbench.models import embeddings
from samplerbench.models.embeddings import EmbeddingCache, Encoded
from samplerbench.models.files import LoadOptions
from samplerbench.models.offload import offload
from samplerbench.models.prompts import Prompts, read_prompts
from samplerbench.models.text_encoders import TextEncoders, explain_loading
from samplerbench.sampling import Inputs

pytestmark = pytest.mark.filterwarnings("ignore::Warning:diffusers")


# --- Files --------------------------------------------------------------------------------------------------------


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_prompts_with_ids_are_read_from_json_lines_and_tables(tmp_path: Path) -> None:
    expected = Prompts(["a red cat", 'a sign, "open"'], ("p1", "7"))
    rows = [{"id": "p1", "prompt": "a red cat"}, {"prompt": 'a sign, "open"', "id": 7, "seed": 3}]
    lines = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    table = write(tmp_path, "a.csv", '\ufeffID,Prompt,note\np1,a red cat,x\n7,"a sign, ""open""",\n')
    tabs = write(tmp_path, "a.tsv", 'prompt_id\tcaption\np1\ta red cat\n7\t"a sign, ""open"""\n')
    assert read_prompts(lines) == read_prompts(table) == read_prompts(tabs) == expected
    plain = write(tmp_path, "b.jsonl", '"a red cat"\n{"text": "a sign, \\"open\\""}\n')
    assert read_prompts(plain) == Prompts(expected.lines)
    # The protocol has the prompts and not the ids, so the same prompts are the same cell.
    assert read_prompts(plain).sha256 == expected.sha256 == read_prompts(expected.lines).sha256
    several = write(tmp_path, "c.jsonl", '{"prompt": "one\\ntwo"}\n')
    assert read_prompts(several).sha256 != Prompts(["one", "two"]).sha256


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '{"prompt": "x"}\n{"prompt"', r"line 2 is not JSON \("),
        ("a.jsonl", "[1]", "line 1 must be an object such as "),
        ("a.jsonl", '{"title": "x"}', r"line 1 has no prompt; name it prompt or caption or text\. It has: title\."),
        ("a.jsonl", '{"prompt": " "}', "line 1: the prompt is empty; write some text"),
        ("a.jsonl", '{"prompt": 3}', "line 1: it is not text"),
        (
            "a.jsonl",
            '{"prompt": "x", "id": 1}\n{"prompt": "y", "id": "1"}',
            'line 2 has the id "1" of line 1; ids m',
        ),
        ("a.jsonl", '{"prompt": "x", "id": 1}\n{"prompt": "y"}', "line 2 has no id; give an id to every prompt"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": "y", "id": 1}', "line 2 has an id, and the prompts before it have"),
        ("a.jsonl", '{"prompt": "x", "id": 1.5}', "line 1: an id must be text or a whole number"),
        ("a.jsonl", "\n", "there are no prompts; write at least one"),
        ("a.csv", "a,b\n1,2\n", "the header has no prompt; name it prompt or caption or text"),
        ("a.csv", "", r"the header has no prompt; .* It has: nothing"),
        ("a.csv", 'prompt\n"x\n', r"line \d cannot be read"),
        ("a.csv", "id,prompt\n1\n", "the prompt is empty"),
    ],
)
def test_damaged_prompt_files_are_refused_in_one_line(tmp_path: Path, name: str, text: str, says: str) -> None:
    file = write(tmp_path, name, text)
    with pytest.raises(UserError, match=says) as error:
        read_prompts(file)
    assert str(error.value).startswith(f'prompts="{file}'[:90])
    assert "\n" not in str(error.value)


class Rows:
    """A data set of `datasets`."""

    column_names = ("key", "caption")

    def __len__(self) -> int:
        return 2

    def __getitem__(self, name: str) -> list[str]:
        return {"key": ["a", "b"], "caption": ["a red cat", "two dogs"]}[name]


def test_prompts_are_read_from_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> Rows:
        asked.append((args, options))
        if options["split"] == "absent":
            raise ValueError("Unknown split\nmore")
        return Rows()

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read_prompts("hf:owner/name,split=test,id=key") == Prompts(["a red cat", "two dogs"], ("a", "b"))
    assert read_prompts("hf:owner/name, prompt=key").lines == ["a", "b"]
    assert asked[0] == (
        ("owner/name", None),
        {"split": "test", "revision": None, "trust_remote_code": False},
    )
    for spec, says in (
        ("hf:", "name the data set, as in hf:owner/name,split=test"),
        ("hf:a/b,columns=x", '"columns=x" is not one of split=…, prompt=…'),
        ("hf:a/b,prompt=captoin", 'has no column "captoin". Did you mean "caption"?'),
        ("hf:a/b,split=absent", r"the data set cannot be loaded \(ValueError: Unknown split\)\."),
    ):
        with pytest.raises(UserError, match=says):
            read_prompts(spec)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the library datasets: pip install datasets"):
        read_prompts("hf:owner/name")


# --- The cache ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny PixArt, with an empty cache."""
    monkeypatch.setenv("SAMPLERBENCH_CACHE", str(tmp_path / "cache"))
    pixart("PixArtAlphaPipeline").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def count_encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The prompts that are encoded from now on."""
    encoded: list[str] = []
    encode, encode_null = TextEncoders.encode, TextEncoders.encode_null

    def spy(self: TextEncoders, lines: list[str]) -> Any:
        encoded.extend(lines)
        return encode(self, lines)

    def spy_null(self: TextEncoders, negative: str | None) -> Any:
        encoded.append(f"not {negative}")
        return encode_null(self, negative)

    monkeypatch.setattr(TextEncoders, "encode", spy)
    monkeypatch.setattr(TextEncoders, "encode_null", spy_null)
    return encoded


def text_of(model: Any, index: int) -> torch.Tensor:
    rows: torch.Tensor = model.condition(Inputs(1, prompts=torch.tensor([index])))["text"]
    return rows


def test_prompts_are_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = count_encoded(monkeypatch)
    first = load(folder, prompts=tuple(PROMPTS))
    assert encoded == ["not None", *PROMPTS]
    assert first.text_encoder is None  # type: ignore[attr-defined]
    encoded.clear()
    monkeypatch.setattr(TextEncoders, "load", lambda self: pytest.fail("the text encoders are loaded again"))
    second = load(folder, prompts=(PROMPTS[1],))
    assert torch.equal(text_of(first, 1), text_of(second, 0))
    monkeypatch.undo()
    monkeypatch.setenv("SAMPLERBENCH_CACHE", str(folder.parent / "cache"))
    encoded = count_encoded(monkeypatch)
    load(folder, prompts=(PROMPTS[1], "a fox"), negative_prompt="fog")
    assert encoded == ["not fog", "a fox"]


@pytest.mark.slow
def test_a_change_of_the_encoder_or_the_tokenizer_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load(folder, prompts=(PROMPTS[0],))
    weights = load_file(folder / "text_encoder/model.safetensors")
    name = next(name for name in weights if "wo" in name)
    save_file(weights | {name: weights[name] * 2}, folder / "text_encoder/model.safetensors", {"format": "pt"})
    encoded = count_encoded(monkeypatch)
    after = load(folder, prompts=(PROMPTS[0],))
    assert encoded == ["not None", PROMPTS[0]]
    assert float((text_of(before, 0) - text_of(after, 0)).abs().max()) > 1e-3
    assert before.identity["text encoder"] != after.identity["text encoder"]
    configure(folder / "tokenizer/tokenizer_config.json", padding_side="left")
    encoded.clear()
    load(folder, prompts=(PROMPTS[0],))
    assert encoded == ["not None", PROMPTS[0]]
    file = folder / "tokenizer/tokenizer.json"
    file.write_text(file.read_text("utf-8") + "\n", encoding="utf-8")
    assert load(folder, prompts=(PROMPTS[0],)).identity["text encoder"] != after.identity["text encoder"]


@pytest.mark.slow
def test_damaged_files_of_the_cache_are_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = text_of(load(folder, prompts=(PROMPTS[0],)), 0)
    files = sorted((folder.parent / "cache/prompts").rglob("*.safetensors"))
    assert len(files) == 2
    for file in files:
        data = bytearray(file.read_bytes())
        data[-3] ^= 1
        file.write_bytes(bytes(data))
    encoded = count_encoded(monkeypatch)
    assert torch.equal(text_of(load(folder, prompts=(PROMPTS[0],)), 0), expected)
    assert encoded == ["not None", PROMPTS[0]]
    files[0].write_bytes(b"")
    encoded.clear()
    load(folder, prompts=(PROMPTS[0],))
    assert len(encoded) == 1


@pytest.mark.slow
def test_many_prompts_stay_in_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = our_images(load(folder, prompts=tuple(PROMPTS)), "ddim", None)
    monkeypatch.setattr(embeddings, "IN_MEMORY", 0)
    model: Any = load(folder, prompts=tuple(PROMPTS))
    assert not model.embeddings._kept
    assert torch.equal(our_images(model, "ddim", None), whole)
    # Without a cache, they are kept in memory.
    monkeypatch.setattr(EmbeddingCache, "read", lambda *_: None)
    monkeypatch.setattr(EmbeddingCache, "write", lambda *_: False)
    model = load(folder, prompts=tuple(PROMPTS))
    assert len(model.embeddings._kept) == 3
    assert torch.equal(our_images(model, "ddim", None), whole)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMPLERBENCH_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    cache = EmbeddingCache({"a": 1})
    assert not cache.write("x", Encoded({"text": torch.ones(2)}))
    assert cache.read("x") is None


def test_embeddings_of_different_lengths_are_padded(folder: Path) -> None:
    model: Any = load(folder, prompts=tuple(PROMPTS))
    made = model.embeddings
    made._kept[1] = {"text": torch.ones(500, 16), "mask": torch.ones(500, dtype=torch.int64)}
    made._measure(made._kept[1])
    rows = made.rows([0, 1])
    assert rows["text"].shape == (2, 500, 16)
    assert torch.equal(rows["text"][0, :120], made._kept[0]["text"])
    assert float(rows["text"][0, 120:].abs().max()) == 0
    assert int(rows["mask"][0].sum()) == int(made._kept[0]["mask"].sum())


def test_several_images_of_a_prompt(folder: Path) -> None:
    """Balanced labels: every prompt is used equally often, with other noise."""
    model = load(folder, prompts=tuple(PROMPTS[:2]))
    images = our_images(model, "ddim", None, [0, 1, 0, 1])
    assert float((images[0] - images[2]).abs().max()) > 0.01
    assert float((images[1] - images[3]).abs().max()) > 0.01


# --- What is said and refused -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_long_prompts_are_reported(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    long = "a very red cat " * 20
    model = load(folder, prompts=("a cat", long))
    assert model.notes["truncated prompts"] == "1"
    assert model.notes["truncated by"] == "tokenizer: 120"
    arguments = ["sample", str(tmp_path / "x.png"), "-s", "ddim", "--steps", "1", "--n", "1", "--model", str(folder)]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--prompt", "a cat", "--prompt", long])
    assert not ended.value.code
    assert (
        "note: 1 of 2 prompts is longer than the text encoder of the model reads (maximum tokens: tokenizer: 120); the "
        "rest of the text has no effect."
    ) in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        ({"text_encoder": [None, None]}, {}, r"is a PixArtAlphaPipeline without text_encoder, so prompts cannot be en"),
        ({"tokenizer": ["x", "Other"]}, {}, "with the tokenizer Other; only T5Tokenizer or T5TokenizerFast is suppor"),
        ({"transformer": ["x", "Other"]}, {}, "with the transformer Other; only PixArtTransformer2DModel or"),
        ({"_class_name": "WanPipeline"}, {}, "is a WanPipeline, which makes videos, not images; only images are supp"),
        ({"_class_name": "StableAudioPipeline"}, {}, "is a StableAudioPipeline, which makes audio, not images"),
        ({"_class_name": "KolorsPipeline"}, {}, "KolorsPipeline is not supported; supported pipelines: DDPMPipeline"),
        ({}, {"image_size": (18, 16)}, r'image_size="18x16": .* requires a height and a width that are multiples of 4'),
        ({}, {"embedded_guidance": 3.0}, "requires a network with an embedded guidance scale; .* is a PixArtAlphaPi"),
        ({}, {"memory": ("attention-slicing",)}, "attention-slicing.* is for U-Nets, and the network is a PixArtTrans"),
        ({}, {"memory": ("offload",)}, r'memory="offload" requires a GPU'),
        ({}, {"memory": ("offload", "sequential-offload")}, "choose one of offload and sequential-offload"),
        ({}, {"prompts": None}, "is a text-to-image model; give a file with one prompt per line"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(
    folder: Path, change: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    configure(folder / "model_index.json", **change)
    with pytest.raises(UserError, match=says) as error:
        load(folder, **{"prompts": tuple(PROMPTS)} | options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("transformer/config.json", {"caption_channels": 8}, "caption_channels of the network is 8, but the embeddi"),
        ("transformer/config.json", {"out_channels": 5}, "5 output channels for 4 input channels; it must have 4, or"),
        ("vae/config.json", {"latent_channels": 8}, "the network requires 4 channels, but the latents of the autoen"),
        (
            "vae/config.json",
            {"block_out_channels": []},
            "block_out_channels is .*; it must be a list of 1 to 16",
        ),
        (
            "vae/config.json",
            {"latents_mean": [1], "latents_std": [1]},
            "latents_mean is .*; it must be a list of 4 n",
        ),
        ("tokenizer/tokenizer_config.json", {"pad_token": None}, "the text encoders cannot encode a prompt; a confi"),
        ("tokenizer/tokenizer.json", None, "is incomplete: tokenizer/tokenizer.json or tokenizer/spiece.model or tok"),
        ("text_encoder/model.safetensors", None, "is incomplete: text_encoder/model.safetensors does not exist"),
    ],
)
def test_damaged_text_to_image_folders_are_refused_in_one_line(
    folder: Path, file: str, change: dict[str, Any] | None, says: str
) -> None:
    (folder / file).unlink() if change is None else configure(folder / file, **change)
    with pytest.raises(UserError, match=says) as error:
        load(folder, prompts=tuple(PROMPTS), image_size=(16, 16))
    assert "\n" not in str(error.value)


def test_a_gated_model_says_how_to_get_access(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def gated(*_: Any, **__: Any) -> None:
        raise GatedRepoError.__new__(GatedRepoError)  # it is made from a response of the hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    with pytest.raises(UserError, match="the model owner/name is gated; accept its licence on the hub, log in with"):
        load(Path("owner/name"), prompts=("x",))


def test_too_little_memory_says_what_to_try() -> None:
    for device, advice in (("cpu", 'dtype="bf16" or a machine with more memory'), ("cuda", 'memory="offload"')):
        with (
            pytest.raises(OutOfMemoryError, match=f"not enough memory for the text encoders; try {advice}"),
            explain_loading("the text encoders", torch.device(device)),
        ):
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_shown_model_encodes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextEncoders, "load", lambda self: pytest.fail("the text encoders are loaded"))
    model = load(folder, show=True)
    assert (model.classes, model.shape) == (None, (4, 8, 8))
    assert model.identity["number of prompts"] == 0


# --- Memory -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_slicing_does_not_change_the_images(tmp_path: Path) -> None:
    xl(tmp_path, ddim()).save_pretrained(tmp_path / "model")
    plain = load(tmp_path / "model", prompts=tuple(PROMPTS))
    sliced = load(tmp_path / "model", prompts=tuple(PROMPTS), memory=("vae-slicing", "attention-slicing"))
    assert sliced.identity == plain.identity
    assert sliced.network.how.memory == "vae-slicing, attention-slicing"
    assert sliced.autoencoder is not None
    assert sliced.autoencoder.module.use_slicing
    processors = {type(p).__name__ for p in sliced.network.attn_processors.values()}
    assert processors == {"SlicedAttnProcessor"}
    difference = our_images(plain, "ddim", None) - our_images(sliced, "ddim", None)
    assert float(difference.abs().max()) <= 1e-5
    tiled = load(tmp_path / "model", prompts=tuple(PROMPTS), memory=("vae-tiling",))
    assert tiled.identity == plain.identity | {"autoencoder tiling": True}


@pytest.mark.slow
@pytest.mark.parametrize("sequential", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_offloading_does_not_change_the_images(tmp_path: Path, sequential: bool) -> None:
    """accelerate's hooks move weights between devices. Both are the CPU here; on a GPU they differ."""
    flux(tmp_path, guidance_embeds=False).save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", prompts=tuple(PROMPTS), image_size=(16, 16))
    plain = our_images(model, "ddim", "flow")
    assert model.autoencoder is not None
    offload([model.network.inner, model.autoencoder.module], torch.device("cpu"), sequential)
    assert float((our_images(model, "ddim", "flow") - plain).abs().max()) <= 1e-6


def test_the_options_reach_the_model(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.npz"
    arguments = ["sample", str(tmp_path / "x.png"), "-s", "ddim", "--steps", "1", "--n", "1", "--npz", str(out)]
    prompts = write(tmp_path, "prompts.csv", "id,prompt\nq7,a cat\n")
    given = ["--model", str(folder), "--prompts", prompts, "--image-size", "16x24", "--memory", "vae-slicing"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, *given])
    assert not ended.value.code
    import numpy as np

    made = np.load(out)
    assert made["images"].shape == (1, 16, 24, 3)
    assert (made["labels"].tolist(), made["prompts"].tolist(), made["ids"].tolist()) == ([0], ["a cat"], ["q7"])
    assert LoadOptions(image_size=(16, 24)).image_size == (16, 24)


def test_a_tab_separated_file_without_quoting_keeps_its_quotation_marks(tmp_path: Path) -> None:
    """As in PartiPrompts.tsv, where a prompt begins with a quoted word. Quoted fields are read as in CSV."""
    file = tmp_path / "parti.tsv"
    rows = ['"GIGGLE" painted on a wall\tWorld Knowledge', 'The words "Fly" are written\tAbstract', "a cat\tAnimals"]
    file.write_text("\n".join(["Prompt\tCategory", *rows]), "utf-8")
    assert read_prompts(str(file)).lines == [row.split("\t")[0] for row in rows]
    file.write_text('Prompt\tCategory\n"a ""red"" cat"\tAnimals\n', "utf-8")
    assert read_prompts(str(file)).lines == ['a "red" cat']

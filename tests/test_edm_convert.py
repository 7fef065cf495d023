"""EDM's published networks: the converted network is the authors', and nothing in the file is run."""

from __future__ import annotations

import builtins
import io
import math
import os
import pickle
import random
import struct
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, run_images
from support.edm_pickles import NETWORKS, Persistent, dump, network_of, published, tensors_of
from torch import Tensor

from samplerbench.bench import setup
from samplerbench.cli.app import main
from samplerbench.errors import UserError
from samplerbench.limits import MAX_PICKLE_OPCODES
from samplerbench.models import edm_convert
from samplerbench.models.edm_blocks import Resample
from samplerbench.models.edm_convert import convert_edm, read_network
from samplerbench.models.inert_pickle import Budget, PickleError, read_pickle
from samplerbench.models.torch_pickle import read_storage

GOLDEN = {
    "ddpm++": ([0.981942, 0.345484, 0.801765, -0.208669, 0.188547, 0.186455], 0.243711),
    "ncsn++": ([0.944864, 0.489644, 0.829935, -0.049082, 0.139907, 0.026172], 0.227607),
    "skip": ([1.34643, 0.510382, 1.08352, -2.117533, 1.759722, 4.212198], 10.910503),
    "ddpm++ vp": ([1.266075, 0.660855, 1.175488, 1.818827, -2.007332, 1.210068], 9.988264),
    "adm": ([0.991307, 0.391849, 0.803997, 0.00777, -0.11818, -0.0378], 0.230629),
}
"""Six values and the mean square of D(x, σ), computed with the authors' code (NVlabs/edm, training/networks.py), whose
weights were set to `value(name)` by their names in that code. x, σ and the labels are those of `golden_state`."""
POINTS = ((0, 0, 0, 0), (0, 1, 7, 9), (0, 2, 15, 15), (1, 0, 3, 12), (1, 1, 8, 8), (1, 2, 15, 0))


def golden_state() -> tuple[Tensor, Tensor, Tensor]:
    sigma = torch.tensor([0.3, 5.0])
    x = torch.cos(torch.arange(2 * 3 * 16 * 16, dtype=torch.float64) ** 2 * 0.011).reshape(2, 3, 16, 16).float()
    return x * (1 + sigma[:, None, None, None]), sigma, torch.tensor([1, 3])


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("edm")
    for kind in NETWORKS:
        convert_edm(published(folder, kind), folder / kind)
    return {kind: folder / kind for kind in NETWORKS}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_converted_network_is_the_authors(kind: str, converted: dict[str, Path]) -> None:
    """Also a test of every name: the weights of the golden values depend on the names in the authors' code."""
    x, sigma, labels = golden_state()
    model = setup.load_model(str(converted[kind]), CPU, "fp32")
    with torch.no_grad():
        found = model.network(x, sigma, labels if model.classes else None)
    values, power = GOLDEN[kind]
    atol = 1e-5 * max(1.0, found.abs().max().item())
    torch.testing.assert_close(found[tuple(zip(*POINTS, strict=True))], torch.tensor(values), rtol=0, atol=atol)
    assert found.double().square().mean().item() == pytest.approx(power, rel=2e-5)


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_converted_network_is_a_model(kind: str, converted: dict[str, Path]) -> None:
    model = setup.load_model(str(converted[kind]), CPU, "fp32")
    assert model.shape == (3, 16, 16)
    assert model.classes == (4 if kind in ("ddpm++", "skip", "adm") else None)
    assert model.null == (kind == "skip")  # trained with label dropout
    levels = {
        "skip": (0.02, 100.0),
        "ddpm++ vp": (math.sqrt(math.expm1(0.1e-3 + 9.95e-6)), math.sqrt(math.expm1(10.05))),
    }
    low, high = levels.get(kind, (0.002, 80.0))
    assert (float(model.levels[0]), float(model.levels[-1])) == pytest.approx((low, high), rel=1e-9)
    images = run_images(model, "heun", None, 2, 2, torch.tensor([0, 3]) if model.classes else None)
    assert images.shape == (2, 3, 16, 16)
    assert images.float().std() > 0


def test_without_a_label_the_one_hot_vector_is_zero(converted: dict[str, Path]) -> None:
    """In DDPM++, L onehot(y) √K has a bias; without a label, only the bias is left."""
    x, sigma, _ = golden_state()
    network = setup.load_model(str(converted["skip"]), CPU, "fp64").network
    with torch.no_grad():
        null = network(x.double(), sigma.double(), torch.tensor([4, 4]))
        torch.testing.assert_close(null, network(x.double(), sigma.double(), None), rtol=0, atol=0)
        network.network.embed.label.weight.zero_()
        torch.testing.assert_close(null, network(x.double(), sigma.double(), torch.tensor([0, 1])), rtol=0, atol=1e-12)


def test_vp_levels_are_those_of_the_sde(converted: dict[str, Path]) -> None:
    """σ(t)² = exp(19.9 t²/2 + 0.1 t) - 1 at equal distances of t, and the network's time is 999 t."""
    model = setup.load_model(str(converted["ddpm++ vp"]), CPU, "fp64")
    t = torch.linspace(1e-3, 1, 1000, dtype=torch.float64)
    torch.testing.assert_close(model.levels**2, torch.expm1(9.95 * t**2 + 0.1 * t), rtol=1e-9, atol=0)
    torch.testing.assert_close(model.network.scalings.time(model.levels), 999 * t, rtol=1e-9, atol=0)
    assert model.alpha(3.0) == pytest.approx(1 / math.sqrt(10))


def test_fourier_frequencies_stay_float32(converted: dict[str, Path]) -> None:
    model = setup.load_model(str(converted["ncsn++"]), CPU, "bf16")
    embed = model.network.network.embed
    assert {p.dtype for p in model.network.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(embed.fourier.freqs, tensors_of("ncsn++")["map_noise.freqs"], rtol=0, atol=0)


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1]])
def test_resampling_is_the_separable_filter(taps: list[float]) -> None:
    """Against sums written out: down y[i] = Σ_k f[k] x[2i + k - p] / Σf; up has the transposed matrix, times 2."""
    size, pad = 8, (len(taps) - 1) // 2
    matrix = torch.zeros(size // 2, size, dtype=torch.float64)
    for i in range(size // 2):
        for k, weight in enumerate(taps):
            if 0 <= 2 * i + k - pad < size:
                matrix[i, 2 * i + k - pad] += weight / sum(taps)
    x = torch.randn(1, 2, size, size, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(Resample("down", taps)(x), matrix @ x @ matrix.T)
    small = x[..., :4, :4]
    torch.testing.assert_close(Resample("up", taps)(small), 4 * matrix.T @ small @ matrix)


# --- Nothing is run -------------------------------------------------------------------------------------------------


class Calls:
    """A pickle that calls a function."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.how = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.how


class SetsState(list[Any]):
    """A class of the file's own, whose __setstate__ and __reduce_ex__ would be run."""

    def __setstate__(self, state: Any) -> None:
        Path(state["mark"]).touch()


def nested(data: bytes) -> Calls:
    return Calls(torch.storage._load_from_bytes, data)


def inside(payload: Any) -> dict[str, Any]:
    """A sound file, but for the payload among the attributes of the network."""
    return {"ema": network_of("ddpm++", outer={"extra": payload})}


ATTACKS: dict[str, Callable[[str], bytes]] = {
    "os.system": lambda mark: dump(inside(Calls(os.system, f"touch {mark}"))),
    "builtins.eval": lambda mark: dump(inside(Calls(builtins.eval, f"open({mark!r}, 'w')"))),
    "builtins.exec at the top": lambda mark: dump(Calls(builtins.exec, f"open({mark!r}, 'w')")),
    "getattr": lambda mark: dump(inside(Calls(getattr, Path(mark), "touch"))),
    "a path of the standard library": lambda mark: dump(inside(Calls(Path.touch, Path(mark)))),
    "__setstate__": lambda mark: dump(inside(Calls(SetsState, state={"mark": mark}))),
    "os.system in a storage": lambda mark: dump(inside(nested(pickle.dumps(Calls(os.system, f"touch {mark}"))))),
    "a storage in a storage": lambda mark: dump(
        inside(nested(dump(nested(pickle.dumps(Calls(os.system, f"touch {mark}"))))))
    ),
    "torch.load": lambda mark: dump(inside(Calls(torch.load, mark))),
    "the unpickler": lambda mark: dump(inside(Calls(pickle.loads, pickle.dumps(Calls(os.system, f"touch {mark}"))))),
    "protocol 0": lambda mark: f"cposix\nsystem\n(S'touch {mark}'\ntR.".encode(),
    "an instance of protocol 0": lambda mark: f"(S'touch {mark}'\niposix\nsystem\n.".encode(),
    "an extension code": lambda mark: b"\x80\x04\x82\x01.",
    "a persistent id": lambda mark: b"\x80\x04K\x01Q.",
    "a dotted name": lambda mark: b"\x80\x04\x8c\x0bcollections\x8c\x19OrderedDict.__init_subclass__\x93.",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_code_of_the_file_is_run(attack: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mark, file = tmp_path / "MARK", tmp_path / "net.pkl"
    file.write_bytes(ATTACKS[attack](str(mark)))
    with pytest.raises(SystemExit) as ended:
        main(["convert", "edm", str(file), str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert ended.value.code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith(f"samplerbench: {file} cannot be converted: it ")
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_the_attacks_would_work_with_pickle(tmp_path: Path) -> None:
    """Otherwise the test above could not fail."""
    mark = tmp_path / "MARK"
    pickle.loads(pickle.dumps(Calls(os.system, f"touch {mark}")))
    assert mark.exists()


def test_the_source_code_in_the_file_is_run_by_others_only(tmp_path: Path) -> None:
    """The file has source code that raises, as its modules have; Python's own unpickler would call the function."""
    file = published(tmp_path, "ddpm++")
    assert b"code of the file was run" in file.read_bytes()
    assert read_network(file).network.settings.label_dim == 4


def test_a_truncated_file_is_one_line(tmp_path: Path) -> None:
    sound = published(tmp_path, "ddpm++").read_bytes()
    file = tmp_path / "cut.pkl"
    for length in [0, 1, 2, 10, 100, 1000, *range(5000, len(sound), len(sound) // 20), len(sound) - 1]:
        file.write_bytes(sound[:length])
        with pytest.raises(UserError, match=r"truncated|not a pickle") as raised:
            read_network(file)
        assert "\n" not in str(raised.value)


def test_a_damaged_file_is_one_line_or_sound(tmp_path: Path) -> None:
    """Each of 40 files has random bytes in its structure, before and between the weights."""
    sound = published(tmp_path, "ddpm++").read_bytes()
    file, dice = tmp_path / "damaged.pkl", random.Random(0)
    refused: list[str] = []
    places = [i for i in range(len(sound)) if sound[i : i + 1].isalpha() and sound[i - 1 : i + 2].isascii()]
    for _ in range(40):
        changed = bytearray(sound)
        for place in dice.sample(places, 3):
            changed[place] = dice.randrange(256)
        file.write_bytes(changed)
        try:
            read_network(file)
        except UserError as error:
            refused.append(str(error))
    assert len(refused) > 10
    assert not any("\n" in line for line in refused)


def storage(**changes: Any) -> bytes:
    """A storage of two float32 values in the format of torch.save before 1.6, with changes."""
    given = {"magic": 0x1950A86A20F9469CFC6C, "count": 2, "stored": 2, "kind": b"FloatStorage", "keys": ["0"]} | changes
    place = b"\x80\x02(X\x07\x00\x00\x00storagectorch\n" + given["kind"] + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    count = pickle.dumps(given["count"], 2)[2:-1]
    head = [pickle.dumps(item, 2) for item in (given["magic"], 1001, {"little_endian": True})]
    tail = pickle.dumps(given["keys"], 2) + struct.pack("<q", given["stored"]) + struct.pack("<2f", 1.5, -2.0)
    return b"".join([*head, place + count + b"NtQ.", tail])


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_storage_is_read_as_torch_reads_it() -> None:
    assert read_storage(storage(), Budget()).tolist() == [1.5, -2.0]
    assert torch.load(io.BytesIO(storage()), weights_only=True).tolist() == [1.5, -2.0]
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool):
        made = torch.tensor([1, 0, 1]).to(dtype)
        file = io.BytesIO()
        torch.save(made.storage(), file, _use_new_zipfile_serialization=False)
        assert torch.equal(read_storage(file.getvalue(), Budget()), made)


@pytest.mark.parametrize(
    "changes",
    [
        {"magic": 1},
        {"count": 2**40},
        {"count": 2**62},
        {"count": -1},
        {"count": 3},
        {"stored": 2**40},
        {"keys": ["1"]},
        {"keys": []},
        {"kind": b"nn.Linear"},
    ],
)
def test_a_storage_of_another_size_or_type_is_an_error(changes: dict[str, Any]) -> None:
    with pytest.raises(PickleError):
        read_storage(storage(**changes), Budget())


HUGE = {
    "bytes": b"\x80\x04\x8e" + struct.pack("<Q", 2**40),
    "more bytes than an address": b"\x80\x04\x8e" + struct.pack("<Q", 2**64 - 1),
    "text": b"\x80\x04\x8d" + struct.pack("<Q", 2**40),
    "a bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40),
    "an integer": b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1),
    "a frame": b"\x80\x04\x95" + struct.pack("<Q", 2**60),
    "a line": b"c" + b"x" * 10_000,
}


@pytest.mark.parametrize("what", HUGE)
def test_a_claimed_size_allocates_nothing(what: str, tmp_path: Path) -> None:
    file = tmp_path / "huge.pkl"
    file.write_bytes(HUGE[what])
    read_network_refused(file, "truncated|not a pickle|not supported")  # imports what it needs
    tracemalloc.start()
    read_network_refused(file, "truncated|not a pickle|not supported")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def read_network_refused(file: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as raised:
        read_network(file)
    assert "\n" not in str(raised.value)


def test_a_memo_index_allocates_nothing(tmp_path: Path) -> None:
    """Python's own unpickler allocates an array of this length."""
    file = tmp_path / "memo.pkl"
    file.write_bytes(b"\x80\x04}r" + struct.pack("<I", 2**32 - 1) + b".")
    read_network_refused(file, 'no network under the key "ema"')


def test_many_opcodes_are_an_error() -> None:
    data = b"\x80\x04" + b"}" * 1000 + b"."
    assert read_pickle(io.BytesIO(data), {}, Budget(1002)) == {}
    with pytest.raises(PickleError, match="more than 2,000,000 opcodes"):
        read_pickle(io.BytesIO(data), {}, Budget(1001))
    assert Budget().opcodes == MAX_PICKLE_OPCODES == 2_000_000


def test_storages_spend_the_same_budget(tmp_path: Path) -> None:
    """A file must not multiply its opcodes by storages inside it."""
    file = tmp_path / "storages.pkl"
    file.write_bytes(dump({"ema": [nested(storage()) for _ in range(20)]}))
    read_network_refused(file, "no network")
    budget = Budget(300)
    with pytest.raises(PickleError, match="opcodes"):
        read_pickle(io.BytesIO(file.read_bytes()), edm_convert.functions(budget), budget)


def test_deep_nesting_is_no_crash(tmp_path: Path) -> None:
    """A key of nested tuples would exhaust the stack when it is hashed."""
    file = tmp_path / "deep.pkl"
    file.write_bytes(b"\x80\x04}" + b")" + b"\x85" * 50_000 + b"Ns.")
    read_network_refused(file, "a tuple as the key of a dictionary")
    network = network_of("ddpm++")
    module = network._modules["model"]
    for _ in range(edm_convert.MAX_NESTING + 1):
        inner = Persistent("Layer")
        module.add_module("deeper", inner)
        module = inner
    file.write_bytes(dump({"ema": network}))
    read_network_refused(file, "nested too deeply")


def test_shared_weights_cannot_describe_a_network_larger_than_the_file(tmp_path: Path) -> None:
    read_network_refused(published(tmp_path, "ddpm++", model_channels=4096), "smaller than the weights")


def test_a_file_above_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = published(tmp_path, "ddpm++")
    monkeypatch.setattr(edm_convert, "MAX_PICKLE_BYTES", 1000)
    read_network_refused(file, "bytes; at most 1,000 are read")


# --- Unsupported networks -------------------------------------------------------------------------------------------


def changed(name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    tensors = tensors_of("ddpm++")
    tensors.pop(name, None)
    return tensors if tensor is None else tensors | {name: tensor}


BIAS = "enc.16x16_conv.bias"


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: network_of("ddpm++", changed(BIAS, None)), f"it has no tensor {BIAS}."),
        (
            lambda: network_of("ddpm++", changed(BIAS, torch.zeros(3))),
            f"the tensor {BIAS} is float32 [3]; it must be float32 [16].",
        ),
        (
            lambda: network_of("ddpm++", changed(BIAS, torch.full((16,), math.nan))),
            f"the tensor {BIAS} contains values that are not finite.",
        ),
        (lambda: network_of("ddpm++", changed("enc.more", torch.ones(1))), "it has an unknown tensor, enc.more."),
        (
            lambda: network_of("ddpm++", resample_filter=[1, 3, 3, 1]),
            "it has an unknown tensor, enc.8x8_down.conv0.resample_filter.",
        ),
        (
            lambda: Persistent("iDDPMPrecond"),
            "its network is iDDPMPrecond; only EDMPrecond, VPPrecond and VEPrecond are supported.",
        ),
        (lambda: Persistent("EDMPrecond"), "its U-Net must be SongUNet or DhariwalUNet."),
        (dict, 'it has no network under the key "ema", as the files of EDM have.'),
        (
            lambda: network_of("ddpm++", encoder_type="other"),
            'settings of the U-Net: encoder_type is \'other\'; it must be "standard" or "residual" or "skip".',
        ),
        (
            lambda: network_of("ddpm++", num_blocks=10**9),
            "settings of the U-Net: num_blocks is 1000000000; it must be a whole number from 1 to 64.",
        ),
        (
            lambda: network_of("ddpm++", outer={"label_dim": 7}),
            "settings of the network: label_dim is 7; it must be 4, that of the U-Net.",
        ),
        (
            lambda: network_of("ddpm++", outer={"sigma_data": -1.0}),
            "settings of the network: sigma_data is -1.0; it must be a number from 1e-06 to 1e+06.",
        ),
        (lambda: network_of("ddpm++", outer={"sigma_min": 90}), "0 < sigma_min 90.0 < sigma_max 80.0"),
    ],
)
def test_an_unsupported_network_is_one_line(make: Callable[[], Any], line: str, tmp_path: Path) -> None:
    file = tmp_path / "net.pkl"
    file.write_bytes(dump({"ema": make()}))
    with pytest.raises(UserError) as raised:
        read_network(file)
    assert str(raised.value).startswith(f"{file} cannot be converted: {line}")


def test_state_dicts_and_archives_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "net.pkl"
    torch.save({"ema": torch.ones(2)}, file)
    read_network_refused(file, "not a pickle")
    file.write_bytes(pickle.dumps(OrderedDict(ema=torch.ones(2))))
    read_network_refused(file, 'no network under the key "ema"')
    read_network_refused(tmp_path, "it is not a file")
    read_network_refused(tmp_path / "absent.pkl", "it cannot be read .No such file or directory.")


def test_the_folder_must_be_new(tmp_path: Path) -> None:
    file = published(tmp_path, "ddpm++ vp")
    with pytest.raises(UserError, match="is not empty; choose another folder"):
        convert_edm(file, tmp_path)
    with pytest.raises(UserError, match="is a file, not a folder"):
        convert_edm(file, file)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["convert", "edm", str(published(tmp_path, "adm")), str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert ended.value.code == 0
    assert out == f"{tmp_path / 'out'}\n"
    assert err.startswith("samplerbench: DhariwalUNet, 16x16 pixels, 4 class labels, ")
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_the_pickle_itself_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"convert the file to safetensors, a network of EDM with `samplerbench convert"
    ):
        setup.load_model(str(published(tmp_path, "adm")), CPU, "fp32")


def test_a_pickle_is_data_only() -> None:
    content = {"a": [1, 2.5, None, True], "b": ("x", b"y", {3}), "c": {"d": -(2**70)}}
    for protocol in (4, 5):
        assert read_pickle(io.BytesIO(pickle.dumps(content, protocol)), {}, Budget()) == content

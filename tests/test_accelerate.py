"""`accelerate launch` and torchrun: configuration files, several nodes, mixed precision, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from samplerbench import launcher
from samplerbench.bench import launch, presence
from samplerbench.bench.launch import Launch
from samplerbench.bench.presence import Member, Presence
from samplerbench.bench.team import Team
from samplerbench.cli.app import main
from samplerbench.data import load_data
from samplerbench.errors import LaunchError, UserError
from samplerbench.results.tensors import load_tensors
from samplerbench.training.loop import TrainSettings, fit
from samplerbench.training.unet import UNetSettings, UNetTask

CONFIG = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_CPU", "use_cpu": True, "num_processes": 2}
NODES = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.1", "main_process_port": 29501}
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees what a launcher of the test run set."""
    for name in os.environ:
        if name.startswith("ACCELERATE_") or name in (
            *SIZES,
            "MASTER_ADDR",
            "MASTER_PORT",
            "LOCAL_RANK",
            "PJRT_DEVICE",
        ):
            monkeypatch.delenv(name)


def write_config(file: Path, **changes: Any) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(CONFIG | changes), "utf-8")  # JSON is YAML
    return str(file)


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    return int(ended.value.code or 0)


# --- What accelerate was asked to start ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("accelerate launch --cpu x.py", ["--cpu", "x.py"]),
        ("/usr/bin/python /opt/bin/accelerate launch x.py", ["x.py"]),
        ("/usr/bin/python /opt/bin/accelerate-launch x.py", ["x.py"]),
        ("/usr/bin/python -m accelerate.commands.launch x.py", ["x.py"]),
        ("/usr/bin/python -m accelerate.commands.accelerate_cli launch x.py", ["x.py"]),
        ("accelerate config", None),
        ("/usr/bin/python -m samplerbench run --out accelerate-launch", None),
        ("torchrun x.py", None),
        ("", None),
    ],
)
def test_the_options_of_accelerate_are_read_from_its_command(words: str, expected: list[str] | None) -> None:
    assert launch.launch_options(words.split()) == expected


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({}, "", Launch(2, cpu=True)),
        ({"distributed_type": "NO"}, "", Launch(2, cpu=True)),
        ({"use_cpu": False}, "", Launch(2, cpu=True)),
        ({"distributed_type": "NO", "use_cpu": False}, "", Launch(2, cpu=False)),
        ({}, "--num_processes 3", Launch(3, cpu=True)),
        ({}, "--num-processes=3", Launch(3, cpu=True)),
        ({} | NODES, "", Launch(2, 2, 1, "10.0.0.1", 29501, True)),
        ({} | NODES, "--machine_rank 0 --main_process_port 5", Launch(2, 2, 0, "10.0.0.1", 5, True)),
        ({"distributed_type": "MULTI_GPU", "use_cpu": False}, "--cpu", Launch(2, cpu=True)),
    ],
)
def test_options_override_the_configuration_file(
    changes: dict[str, Any], options: str, expected: Launch, tmp_path: Path
) -> None:
    file = write_config(tmp_path / "config.yaml", **changes)
    words = ["--config_file", file, *options.split(), "-m", "samplerbench", "run", "--num_processes", "7"]
    assert launch.read_launch(words) == expected


def test_without_a_file_the_default_one_is_read_except_with_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.commands.config import config_args

    monkeypatch.setattr(config_args, "default_config_file", write_config(tmp_path / "default.yaml", num_processes=5))
    assert launch.read_launch(["x.py"]) == Launch(5, cpu=True)
    assert launch.read_launch(["--cpu", "x.py"]) == Launch(1, cpu=True)
    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "missing.yaml"))
    assert launch.read_launch(["x.py"]) == Launch()


@pytest.mark.parametrize("words", [["--num_processes"], ["--config_file", "missing.yaml", "x.py"]])
def test_settings_that_accelerate_cannot_read_are_an_error(words: list[str]) -> None:
    with pytest.raises(ValueError, match="accelerate cannot read its"):
        launch.read_launch(words)


def test_the_options_of_torchrun() -> None:
    assert Launch(2).torchrun() == ["--standalone", "--nproc-per-node", "2"]
    nodes = ["--nnodes", "2", "--node-rank", "1", "--nproc-per-node", "3"]
    assert Launch(6, 2, 1, "node-a", 29501).torchrun() == [*nodes, "--master-addr", "node-a", "--master-port", "29501"]
    with pytest.raises(LaunchError, match="num_processes is 3, which cannot be divided evenly over 2 machines"):
        Launch(3, 2, 0, "node-a", 29501).torchrun()
    with pytest.raises(LaunchError, match="main_process_ip and main_process_port"):
        Launch(4, 2).torchrun()


def test_only_a_process_that_accelerate_left_alone_starts_the_others() -> None:
    alone = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"}
    assert launch.is_lone(alone)
    assert not launch.is_lone({"ACCELERATE_USE_CPU": "True"})  # one process was requested
    assert not launch.is_lone({"MASTER_ADDR": "127.0.0.1"})
    assert not launch.is_lone(alone | {launch.RELAUNCHED: "1"})
    for size in SIZES:  # torchrun or MPI started them
        assert not launch.is_lone(alone | {size: "2"})


class Replaced(Exception):  # noqa: N818 - not an error
    """What os.execve does not return from."""


def replacement(
    options: list[str], monkeypatch: pytest.MonkeyPatch, cpu: str = "True"
) -> tuple[list[str], dict[str, str]]:
    """The command and the environment of the program that replaces this process."""
    calls: list[tuple[list[str], dict[str, str]]] = []

    def execve(program: str, words: list[str], environment: dict[str, str]) -> None:
        calls.append((words, environment))
        raise Replaced

    parents = [
        SimpleNamespace(cmdline=lambda words=words: words) for words in (["sh"], ["accelerate", "launch", *options])
    ]
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parents=lambda: parents))
    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(sys, "argv", ["samplerbench", "run", "suite.toml"])
    for name, value in (("ACCELERATE_USE_CPU", cpu), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    try:
        launch.start_the_others()
    except Replaced:
        return calls[0]
    return [], {}


@pytest.mark.parametrize("use_cpu", [True, False])
def test_a_configuration_file_for_several_cpu_processes_starts_them(
    use_cpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_config(tmp_path / "config.yaml", use_cpu=use_cpu, num_processes=4, **NODES)
    words, environment = replacement(["--config_file", file, "-m", "samplerbench"], monkeypatch, str(use_cpu))
    nodes = ["--nnodes", "2", "--node-rank", "1", "--nproc-per-node", "2"]
    nodes += ["--master-addr", "10.0.0.1", "--master-port", "29501"]
    assert words[1:] == ["-m", "torch.distributed.run", *nodes, "-m", "--", "samplerbench", "run", "suite.toml"]
    assert "MASTER_ADDR" not in environment
    assert environment["ACCELERATE_USE_CPU"] == "True"
    assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert not launch.is_lone(environment)


def test_processes_for_gpus_are_not_moved_to_the_cpu_but_a_note_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replacement(["--num_processes", "8", "-m", "samplerbench"], monkeypatch, "False") == ([], {})
    (line,) = capsys.readouterr().err.splitlines()
    assert "accelerate started a single process instead of 8" in line
    assert "pass --cpu to accelerate launch" in line


def test_without_readable_settings_a_note_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert replacement(["--config_file", "missing.yaml", "x.py"], monkeypatch) == ([], {})
    (line,) = capsys.readouterr().err.splitlines()
    assert "its settings could not be read" in line
    assert "torchrun --nproc-per-node N" in line


# --- What is refused -------------------------------------------------------------------------------------------------

RUN = ("run", "-m", "exact:mixture", "-s", "ddim", "--steps", "1", "--n", "4", "--metric", "gap")


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("ACCELERATE_USE_DEEPSPEED", "true", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "1", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "a parallelism_config"),
        ("PJRT_DEVICE", "TPU", "TPU"),
        ("PJRT_DEVICE", "CPU", None),
        ("ACCELERATE_USE_FSDP", "false", None),
        ("ACCELERATE_USE_CPU", "true", None),
    ],
)
def test_modes_that_shard_the_network_are_recognised(variable: str, value: str, expected: str | None) -> None:
    assert launcher.sharding({variable: value}) == expected


@pytest.mark.parametrize("arguments", [RUN, ("train", "features", "--steps", "1"), ("train", "unet", "--steps", "1")])
def test_run_and_train_refuse_a_sharded_network_with_one_line(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert command(*arguments, "--out", str(tmp_path / "out")) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith("samplerbench: accelerate is configured for FSDP, which samplerbench does not support: the ")
    assert "Set distributed_type to MULTI_GPU" in line
    assert not (tmp_path / "out").exists()


def test_the_other_processes_of_a_machine_end_without_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as ended:
        launch.end_launch("a message")
    assert ended.value.code == 2
    assert capsys.readouterr().err == ""


def test_the_python_interface_refuses_a_sharded_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="configured for DeepSpeed"):
        train(tmp_path)


def test_processes_for_gpus_without_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher.check_gpu(False)  # no launcher
    monkeypatch.setenv("WORLD_SIZE", "2")
    launcher.check_gpu(False)  # torchrun alone says nothing of GPUs
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    launcher.check_gpu(True)
    with pytest.raises(LaunchError, match=r"\(distributed_type: MULTI_GPU\), but torch finds no GPU on this machine"):
        launcher.check_gpu(False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    launcher.check_gpu(False)


# --- Mixed precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "options", "advice"),
    [
        ("bf16", (), "use --dtype bf16."),
        ("fp16", (), "use --dtype fp16."),
        ("fp8", (), "use --dtype bf16."),
        ("no", (), None),
        ("bf16", ("--dtype", "fp32"), None),
        ("bf16", ("--dtype", "bf16"), None),
    ],
)
def test_a_run_says_that_mixed_precision_does_not_apply(
    precision: str,
    options: tuple[str, ...],
    advice: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    assert command(*RUN, "--out", str(tmp_path), *options) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "mixed_precision" in line]
    assert len(lines) == (advice is not None)
    assert all(f"({precision}) does not apply to `run`; {advice}" in line for line in lines)
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text("utf-8"))["protocol_fields"]["dtype"] == "float32"


@pytest.fixture
def fresh_state() -> Iterator[Callable[[], None]]:
    """Reset accelerate, whose precision is set once per process."""
    from accelerate.state import AcceleratorState

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)

    reset()
    yield reset
    reset()


def train(out: Path, steps: int = 2, **changes: Any) -> Path:
    data = load_data("digits")
    torch.manual_seed(0)
    task = UNetTask(data, UNetSettings(channels=(8, 8), groups=4, head_dim=4))
    fit(task, data, TrainSettings(steps=steps, batch_size=8, cpu=True, checkpoint_every=1, **changes), out)
    return out


def weights(out: Path) -> dict[str, Any]:
    found = load_tensors(out / "checkpoint" / "state.safetensors").tensors
    return {name: tensor for name, tensor in found.items() if name.startswith("model.")}


def same(a: Path, b: Path) -> bool:
    return all(torch.equal(tensor, weights(b)[name]) for name, tensor in weights(a).items())


@pytest.mark.slow
def test_training_follows_the_launchers_precision_and_an_option_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_state: Callable[[], None]
) -> None:
    plain = train(tmp_path / "plain")
    fresh_state()
    explicit = train(tmp_path / "explicit", mixed_precision="bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    fresh_state()
    followed = train(tmp_path / "followed")
    fresh_state()
    overridden = train(tmp_path / "overridden", mixed_precision="no")
    assert same(followed, explicit)
    assert same(overridden, plain)
    assert not same(followed, plain)
    for out, expected in ((plain, "no"), (explicit, "bf16"), (followed, "bf16"), (overridden, "no")):
        card = json.loads((out / "samplerbench.json").read_text("utf-8"))
        assert card["training"]["mixed_precision"] == expected
        metadata = load_tensors(out / "checkpoint" / "state.safetensors").metadata
        assert json.loads(metadata["settings"])["mixed_precision"] == expected


def test_training_does_not_resume_with_another_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_state: Callable[[], None]
) -> None:
    train(tmp_path)
    fresh_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="was made with mixed_precision no; use the same settings"):
        train(tmp_path)


def test_a_precision_that_cannot_be_used_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fresh_state: Callable[[], None]
) -> None:
    with pytest.raises(UserError, match='mixed_precision="fp16": it requires a GPU'):
        train(tmp_path, mixed_precision="fp16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match='mixed_precision="fp16": it requires a GPU'):
        train(tmp_path)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(LaunchError, match="mixed_precision is fp8 in accelerate's configuration"):
        train(tmp_path)


# --- A lost process on another machine -------------------------------------------------------------------------------


def test_a_process_that_ended_on_another_machine_is_named_with_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    here = Member.me()
    there = dataclasses.replace(here, machine="b", host="node-b")
    members = [here, there, dataclasses.replace(there, pid=process.pid)]
    store = torch.distributed.HashStore()
    first, second = (Presence(rank, members, store, 60.0, print) for rank in (0, 1))
    assert first.ended() == []
    monkeypatch.setattr(presence, "this_machine", lambda: "b")
    assert second.ended() == [2]
    monkeypatch.undo()
    assert first.ended() == [2]
    assert first.name(2) == f"process 2 (pid {process.pid} on node-b)"


def test_one_process_of_each_node_announces_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    members, store = [Member.me()] * 4, torch.distributed.HashStore()
    teams = [Team(rank, 4, presence=Presence(rank, members, store, 60.0, print)) for rank in range(4)]
    announcing = []
    for rank, group in ((3, "1"), (1, "0"), (0, "0"), (2, "1")):
        monkeypatch.setenv("GROUP_RANK", group)
        announcing.append((rank, teams[rank].announces_loss()))
    assert announcing == [(3, True), (1, True), (0, False), (2, False)]
    assert [Team(rank, 2).announces_loss() for rank in (0, 1)] == [True, False]


# --- Whole runs ------------------------------------------------------------------------------------------------------

CELLS = ["-m", "exact:mixture", "-s", "ddim", "-s", "ddpm", "--steps", "4", "--n", "300", "-b", "16", "--blocks", "2"]
LONGEST = 240
"""Seconds after which a run is taken for hung."""
ENDLESS = """
import time
from dataclasses import dataclass
from samplerbench.sampling import Sampler, Step

@dataclass(frozen=True)
class Endless(Sampler):
    '''A sampler that samples a few batches and then waits (unpublished).'''

    def steps(self, denoise, x, sigmas, noise):
        global batches
        batches += 1
        while batches > 3:
            time.sleep(0.02)
        yield Step(0.0, x, denoise(x, sigmas[0]))

batches = 0
"""


def start(launcher: list[str], *arguments: str, **environment: str) -> subprocess.Popen[str]:
    words = [sys.executable, *launcher, *arguments]
    variables = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables)


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    printed = [process.communicate(timeout=LONGEST)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), printed
    return printed


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def node(rank: int, port: str) -> list[str]:
    """torchrun for one of two nodes of two processes."""
    place = ["--nnodes", "2", "--node-rank", str(rank), "--master-addr", "127.0.0.1", "--master-port", port]
    return ["-m", "torch.distributed.run", *place, "--nproc-per-node", "2", "-m", "--", "samplerbench"]


def machine(rank: int, port: str) -> list[str]:
    """accelerate for one of two machines with two CPU processes each."""
    place = ["--num_machines", "2", "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1"]
    words = [*place, "--main_process_port", port, "--cpu", "--num_processes", "4", "-m", "samplerbench"]
    return ["-m", "accelerate.commands.launch", *words]


def values(out: Path) -> dict[str, Any]:
    records = {file.name: json.loads(file.read_text("utf-8")) for file in out.glob("*.json")}
    return {name: (record["nfe"], record["metrics"]["fid"]["blocks"]) for name, record in records.items()}


def check_same(out: Path, single: dict[str, Any], processes: int) -> None:
    assert values(out).keys() == single.keys()
    for name, (nfe, fid) in values(out).items():
        assert nfe == single[name][0]
        assert fid == pytest.approx(single[name][1], rel=1e-4)
    assert {json.loads(f.read_text("utf-8"))["processes"] for f in out.glob("*.json")} == {processes}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("single")
    assert command("run", *CELLS, "--device", "cpu", "--out", str(out)) == 0
    assert len(values(out)) == 2
    return values(out)


@pytest.mark.slow
def test_the_default_configuration_of_accelerate_gives_two_processes(tmp_path: Path, single: dict[str, Any]) -> None:
    write_config(tmp_path / "accelerate" / "default_config.yaml", mixed_precision="bf16")
    out = tmp_path / "out"
    accelerate = ["-m", "accelerate.commands.launch", "-m", "samplerbench", "run"]
    (printed,) = finish(start(accelerate, *CELLS, "--out", str(out), HF_HOME=str(tmp_path)))
    assert printed.count("mixed_precision of accelerate's configuration (bf16) does not apply") == 1
    check_same(out, single, 2)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [node, machine], ids=["torchrun", "accelerate"])
def test_two_nodes_of_two_processes_give_the_same_numbers(
    tmp_path: Path, single: dict[str, Any], launcher: Callable[[int, str], list[str]]
) -> None:
    port, outs = free_port(), [tmp_path / "first", tmp_path / "second"]
    runs = [
        start(launcher(rank, port), "run", *CELLS, "--device", "cpu", "--out", str(out))
        for rank, out in enumerate(outs)
    ]
    printed = finish(*runs)
    check_same(outs[0], single, 4)
    assert not outs[1].exists()  # only the main process writes
    assert f"results and sample grids: {outs[0]}/" in printed[0]
    assert "samplerbench" not in printed[1]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [2, 0])
def test_a_lost_process_ends_the_run_on_both_nodes_with_the_sentence(tmp_path: Path, rank: int) -> None:
    file, port = tmp_path / "endless.py", free_port()
    file.write_text(ENDLESS, "utf-8")
    cells = ["-m", "exact:mixture", "-s", f"{file}:Endless", "--steps", "1", "--n", "400", "-b", "16"]
    nodes = [start(node(i, port), "run", *cells, "--device", "cpu", "--out", str(tmp_path / "out")) for i in range(2)]
    limit = 2400
    while not list((tmp_path / "out").glob("*.partial.safetensors")):
        assert (limit := limit - 1), [process.kill() for process in nodes]
        time.sleep(0.05)
    (lost,) = [
        child
        for process in nodes
        for child in psutil.Process(process.pid).children(recursive=True)
        if child.environ().get("RANK") == str(rank) and "samplerbench.bench.last_word" not in child.cmdline()
    ]
    lost.send_signal(signal.SIGKILL)
    printed = [process.communicate(timeout=LONGEST)[0] for process in nodes]
    assert [process.returncode for process in nodes] == [1, 1], printed
    for lines in (text.rstrip().splitlines() for text in printed):
        assert lines[-1].startswith("samplerbench: a process of this run has ended unexpectedly (see above). Nothing ")
    # By then the launcher may have ended the other process of that node too.
    lines_of = [
        re.findall(r"^samplerbench: process .* of this run ha(?:s|ve) ended .*", text, re.M) for text in printed
    ]
    assert f"process {rank} (pid {lost.pid} on {socket.gethostname()})" in lines_of[0 if rank else 1][0]
    assert len(lines_of[0]) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["run", *CELLS], ["train", "unet", "--steps", "1"]], ids=["run", "train"])
def test_a_configuration_that_is_refused_is_said_once_after_the_launchers_lines(
    tmp_path: Path, arguments: list[str]
) -> None:
    config = write_config(tmp_path / "config.yaml", distributed_type="FSDP", use_cpu=False, main_process_port=0)
    accelerate = ["-m", "accelerate.commands.launch", "--config_file", config, "-m", "samplerbench"]
    process = start(accelerate, *arguments, "--out", str(tmp_path / "out"))
    lines = process.communicate(timeout=LONGEST)[0].rstrip().splitlines()
    assert process.returncode == 1  # accelerate's own
    assert [line for line in lines if "exitcode" in line and "2 (pid" in line]
    assert [line.startswith("samplerbench: accelerate is configured for FSDP") for line in lines].count(True) == 1
    assert lines[-1].startswith("samplerbench: accelerate is configured for FSDP")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_configuration_for_gpus_on_a_machine_without_one_is_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path / "config.yaml", distributed_type="MULTI_GPU", use_cpu=False, main_process_port=0)
    accelerate = ["-m", "accelerate.commands.launch", "--config_file", config, "-m", "samplerbench"]
    process = start(accelerate, "run", *CELLS, "--out", str(tmp_path / "out"))
    lines = process.communicate(timeout=LONGEST)[0].rstrip().splitlines()
    assert process.returncode == 1
    assert "but torch finds no GPU on this machine" in lines[-1]
    assert sum("torch finds no GPU" in line for line in lines) == 1


@pytest.mark.slow
def test_training_on_two_cpu_processes_of_a_configuration_file_gives_the_same_loss(tmp_path: Path) -> None:
    unet = [
        "train",
        "unet",
        "--channels",
        "8,8",
        "--groups",
        "4",
        "--head-dim",
        "4",
        "--steps",
        "4",
        "--batch-size",
        "8",
    ]
    config = write_config(tmp_path / "config.yaml")
    accelerate = ["-m", "accelerate.commands.launch", "--config_file", config, "-m", "samplerbench"]
    losses = []
    for words, out in ((["-m", "samplerbench"], tmp_path / "one"), (accelerate, tmp_path / "two")):
        finish(start(words, *unet, "--out", str(out)))
        losses.append(json.loads((out / "samplerbench.json").read_text("utf-8"))["training"]["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)

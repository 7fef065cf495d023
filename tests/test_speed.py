"""What makes a run fast: batches of sizes that suit the network, no waiting for the device, and how it is recorded."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import logging
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CPU, make_cell
from diffusers.models.unets.unet_2d import UNet2DOutput
from support.denoising import denoiser, labelled
from torch import Tensor, nn

import samplerbench
from samplerbench import cli, registry
from samplerbench.bench import batch_size as sizes
from samplerbench.bench import engine, generate, prepare, replay, request, setup
from samplerbench.bench.generate import SamplerOnModel
from samplerbench.errors import RunError, UserError
from samplerbench.models import Model
from samplerbench.models.files import LoadOptions
from samplerbench.models.runner import HowRun, Runner, check_compiler, how_run
from samplerbench.results.store import Store
from samplerbench.sampling import Inputs, Noise, Sampler, Step
from samplerbench.sampling import driver as driving
from samplerbench.sampling.meter import Meter


def run_as(model: Model, how: HowRun) -> Model:
    """The model with a network that says it is run like this, and is run as it was."""
    made = copy.copy(model)
    made.network = Runner(model.network.inner, CPU)
    made.network.how = how
    return made


# --- the sizes of batches


class Rows(nn.Module):
    """Remembers how many rows it was given; its output for a row is a function of that row alone."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.seen: list[int] = []

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> UNet2DOutput:
        assert len(x) == len(t)
        self.seen.append(len(x))
        labels = 0 if class_labels is None else class_labels[:, None]
        return UNet2DOutput(sample=x * self.scale + t[:, None] + labels)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
def test_a_small_batch_is_filled_and_cut_again(rows: int) -> None:
    """The rows that were asked for come back, from a batch of at least four, and they alone are counted."""
    inner = Rows()
    runner = Runner(inner, CPU)
    x, t, y = torch.randn(rows, 3), torch.arange(rows).float(), torch.arange(rows) * 10
    with Meter(runner) as meter:
        output = runner(x, t, class_labels=y)
    assert inner.seen == [max(rows, 4)]
    assert meter.network == rows
    assert isinstance(output, UNet2DOutput)
    assert torch.equal(output.sample, x * 2 + t[:, None] + y[:, None])


def test_the_gradient_of_a_filled_batch_is_that_of_its_rows() -> None:
    """Rows that only fill the batch have no part in it."""
    x = torch.randn(3, 2, requires_grad=True)
    Runner(Rows(), CPU)(x, torch.zeros(3)).sample.sum().backward()
    assert torch.equal(x.grad, torch.full((3, 2), 2.0))


def test_a_large_network_and_a_device_are_given_batches_as_they_are() -> None:
    """There the filling would cost what it saves nobody."""
    large = Rows()
    large.weights = nn.Parameter(torch.empty(10_000_001, device="meta"))
    for runner in (Runner(large, CPU), Runner(Rows(), torch.device("cuda"))):
        assert runner.size(1) == 1


def test_a_runner_has_what_its_network_has() -> None:
    """Its attributes, and a copy of it is one of the network too."""
    runner = Runner(Rows(), CPU)
    assert runner.seen == []
    twin = copy.deepcopy(runner)
    twin.inner.scale.data.fill_(3.0)
    ones, zeros = torch.ones(5, 1), torch.zeros(5)
    assert (runner(ones, zeros).sample.mean(), twin(ones, zeros).sample.mean()) == (2, 3)
    with pytest.raises(AttributeError, match="nothing"):
        _ = runner.nothing


def test_a_compiled_network_is_compiled_once_for_a_run_and_its_remainders() -> None:
    """A last batch is filled to a size that is known; guidance's double batch is another size."""
    compilations: list[int] = []

    def backend(graph: Any, example: list[Tensor]) -> Callable[..., Any]:
        compilations.append(max(len(e) for e in example if e.ndim == 2))
        return graph.forward

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(3, 3)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.inside(x) + t[:, None]

    network = Linear()
    plain = copy.deepcopy(network)
    runner = Runner(network, CPU, compiled=True, backend=backend)
    torch._dynamo.reset()
    with torch.no_grad():
        for rows in (100, 100, 80, 200, 70, 12, 100, 9):
            x, t = torch.randn(rows, 3), torch.randn(rows)
            assert torch.allclose(runner(x, t), plain(x, t), atol=1e-6)
    assert sorted(runner.sizes) == [100, 200]
    assert compilations == [100, 200]
    runner.eager = True
    assert runner.size(77) == 77


@pytest.mark.parametrize(
    ("n", "size", "processes", "even"),
    [
        (1797, 256, 1, 225),
        (50_000, 256, 1, 256),
        (512, 256, 1, 256),
        (513, 256, 1, 171),
        (7, 256, 1, 7),
        (900, 256, 2, 225),
    ],
)
def test_batches_of_one_size_leave_little_to_fill(n: int, size: int, processes: int, even: int) -> None:
    """As many batches as before, of the same size; less than one row of each is missing from the last."""
    assert prepare.even_batches(n, size, processes) == even
    whole = even * processes
    assert -(-n // whole) == -(-n // (size * processes))
    assert -(-n // whole) * whole - n < -(-n // whole) * processes


@pytest.mark.parametrize(("option", "batch_size"), [({}, 8), ({"compile": True}, 6), ({"graphs": True}, 6)])
def test_where_the_size_of_a_batch_matters_all_are_of_one_size(
    option: dict[str, bool], batch_size: int, digits: Model, tmp_path: Path
) -> None:
    """18 images in batches of at most 8 are 8 + 8 + 2, or 6 + 6 + 6."""
    model = run_as(digits, HowRun("fp32", compiled="compile" in option, graphs="graphs" in option))
    asked = request.Request([request.Grid(["ddim"], [1])], n=18, batch_size=8)
    prepared = prepare.prepare(asked, "cpu", model)
    session = prepare.make_session(prepared, prepare.measure_reference(prepared), 0, Store(tmp_path))
    assert session.execution.batch_size == batch_size


def test_compiling_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, before anything is loaded."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match=r"requires a C\+\+ compiler"):
        check_compiler()
    monkeypatch.setenv("CXX", "my-compiler")
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if name == "my-compiler" else None)
    check_compiler()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--dtype", "tf32"], "--dtype tf32 requires an NVIDIA GPU; use --dtype fp32 on this device."),
        (["--dtype", "fp8"], "--dtype fp8: choose one of fp32, tf32, bf16, fp16, fp64."),
        (["--graphs"], "--graphs requires an NVIDIA GPU."),
        (["--batch-size", "0"], "--batch-size 0: at least 1 image is needed."),
        (["--batch-size", "big"], '--batch-size big: give a whole number, or "auto".'),
    ],
)
def test_what_cannot_be_had_here_is_one_line(
    options: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong and what to do, exit code 2."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "-s", "ddim", "--device", "cpu", "--out", str(tmp_path), *options])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"samplerbench: {complaint}\n"


def test_the_protocol_says_whether_the_network_was_compiled(digits: Model, make_session: Any) -> None:
    """Compiled kernels round differently, so it is another experiment; what was said before is hashed as before."""
    plain = make_session(4).measurement.shared
    assert "compile" not in plain
    assert plain["dtype"] == "float32"
    session = make_session(4, model=run_as(digits, HowRun("tf32", compiled=True)))
    assert session.measurement.shared == plain | {"compile": True, "dtype": "tf32"}


def test_a_compiled_model_says_so_and_a_suite_can_ask_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The option reaches the network from the command line, a suite and Python."""
    asked: list[bool] = []

    def runner(network: nn.Module, device: torch.device, compiled: bool = False, **how: Any) -> Runner:
        asked.append(compiled)
        made = Runner(network, device, **how)
        made.how = dataclasses.replace(made.how, compiled=compiled)
        return made

    monkeypatch.setattr(setup, "Runner", runner)
    monkeypatch.setattr(setup, "check_compiler", lambda: None)
    assert how_run(samplerbench.load_model("digits", compile=True).network).compiled
    suite = tmp_path / "a.toml"
    suite.write_text('compile = true\nn = 20\n[[grid]]\nsamplers = ["ddim"]\nsteps = [1]\n', "utf-8")
    for command in (["run", str(suite)], ["run", "-s", "ddim", "--steps", "1", "--n", "20", "--compile"]):
        with pytest.raises(SystemExit) as ended:
            cli.main([*command, "--out", str(tmp_path / "out")])
        assert not ended.value.code
    assert asked == [True, True, True]
    (result,) = (tmp_path / "out").glob("*.json")  # the same cell, so it was run once
    assert json.loads(result.read_text("utf-8"))["protocol_fields"]["compile"] is True


# --- the batch size that is fastest


@pytest.mark.parametrize(
    ("rates", "n", "best", "tried"),
    [
        ({16: 50, 32: 80, 64: 99, 128: 100, 256: 101, 512: 90, 1024: 80}, 50_000, 64, 1024),
        ({16: 50, 32: 80, 64: 99, 128: 150, 256: 0}, 50_000, 128, 256),
        ({16: 50, 32: 80}, 20, 32, 32),
        ({16: 50}, 5, 16, 16),
        ({16: 0}, 50_000, 1, 16),
    ],
)
def test_the_smallest_batch_within_three_percent_of_the_best_is_taken(
    rates: dict[int, float],
    n: int,
    best: int,
    tried: int,
    digits: Model,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Of those that fit; it stops where the rate falls; and the next run knows it without trying."""
    monkeypatch.setenv("SAMPLERBENCH_CACHE", str(tmp_path))
    asked: list[int] = []
    monkeypatch.setattr(sizes, "_rate", lambda model, size, evaluations: (asked.append(size), rates[size])[1])
    assert sizes.fastest_batch_size(digits, n) == best
    assert asked[-1] == tried
    again = list(asked)
    assert sizes.fastest_batch_size(digits, n) == best
    assert asked == again


def test_a_size_that_does_not_fit_has_no_rate(digits: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory is an answer; another error is an error."""
    assert sizes._rate(digits, 4, 1) > 0

    def refuse(what: str) -> Callable[..., Any]:
        def denoiser(*_: Any) -> Any:
            raise RuntimeError(what)

        return denoiser

    broken = copy.copy(digits)
    monkeypatch.setattr(type(digits), "denoiser", refuse("DefaultCPUAllocator: can't allocate memory"))
    assert sizes._rate(broken, 4, 1) == 0
    monkeypatch.setattr(type(digits), "denoiser", refuse("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        sizes._rate(broken, 4, 1)


def test_auto_is_the_batch_size_of_the_run(monkeypatch: pytest.MonkeyPatch, digits: Model, tmp_path: Path) -> None:
    """From the command line and from Python; a guidance's evaluations are counted in."""
    asked: list[tuple[int, int]] = []

    def found(model: Model, n: int, evaluations: int) -> int:
        asked.append((n, evaluations))
        return 7

    monkeypatch.setattr(sizes, "fastest_batch_size", found)
    common = ["--steps", "1", "--n", "20", "--batch-size", "auto", "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        cli.main(["run", "-s", "ddim", "-g", "cfg:scale=2", *common])
    results = samplerbench.evaluate("ddim", steps=1, n=20, model=digits, batch_size="auto", quiet=True)
    assert asked == [(20, 2), (20, 1)]
    (written,) = tmp_path.glob("*.json")
    assert (json.loads(written.read_text("utf-8"))["batch_size"], results[0]["batch_size"]) == (7, 7)


# --- nothing in a step waits for the device


class Watched(Tensor):
    """A tensor that stands for one on a device: whoever reads its values would have to wait."""

    FORBIDDEN = frozenset(
        {
            *("item", "tolist", "numpy", "cpu", "nonzero", "unique", "equal", "allclose", "is_nonzero", "argwhere"),
            *("masked_select", "__bool__", "__float__", "__int__", "__index__", "__len_hint__", "__contains__"),
        }
    )

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        masks = name == "__getitem__" and isinstance(args[1], Watched) and args[1].dtype == torch.bool
        if name in cls.FORBIDDEN or masks:
            raise AssertionError(f"{name} waits for the device")
        return super().__torch_function__(function, types, args, kwargs or {})


class WatchedNoise(Noise):
    """Step noise that is watched from its counters on."""

    def __init__(self, rows: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__(0, rows.as_subclass(Watched), shape, torch.float32)


WATCHED = [
    *("ddpm", "ddpm:variance=large", "ddim", "ddim:eta=0.5", "langevin:T=2", "pf-ode", "pf-ode:solver=heun"),
    *("pf-ode:solver=rk4", "heun", "heun:S_churn=10", "euler-maruyama", "reverse-diffusion", "pc", "dpm-solver"),
    *("dpm-solver:order=3", "dpm++", "dpm++:order=3", "dpm++:sde=true", "dpm++:method=singlestep", "unipc", "deis"),
    *("ipndm", "analytic-dpm", "consistency", "restart", "er-sde", "res", "res:method=singlestep", "sa-solver"),
    *("dpm++:sde=true,order=3", "dpm++:method=singlestep,sde=true", "dpm++:method=singlestep,ancestral=true"),
    *("replace", "repaint:jump_length=1,resamplings=2", "ddrm", "ddnm+", "sdedit", "ccdf"),
]
"""All but `pf-ode:solver=rk45`, whose step size depends on the state, and `diffusers/*`, whose code is not ours."""


def watched_walk(model: Model, sampler: str, guidance: str = "none") -> driving.Walk:
    if registry.get("sampler", registry.split(sampler)[0]).needs_task:
        model = model.observed(registry.parse("task", "super-resolution:factor=2"), model.real(4)[0])
    cell = generate.bound_cell(model, make_cell(model, sampler, None, 4, guidance))
    rows = torch.arange(4)
    noise = WatchedNoise(rows, model.shape)
    x = model.prior(torch.randn(4, *model.shape), float(cell.sigmas[0])).as_subclass(Watched)
    labels = torch.arange(4).as_subclass(Watched)
    denoise = denoiser(model, labels, 4, cell.guidance)
    return driving.walk(cell.sampler, denoise, x, cell.sigmas, noise)


@pytest.fixture
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver takes the state for one that it would have to wait for."""
    monkeypatch.setattr(driving, "_can_look", lambda x: False)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("sampler", WATCHED)
def test_no_sampler_reads_the_state(sampler: str, digits: Model) -> None:
    """From the prior to the last state the values stay on the device."""
    walked = watched_walk(digits, sampler)
    assert isinstance(walked.x, Watched)
    assert isinstance(walked.finite, Watched)


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("guidance", ["cfg:scale=2", "classifier", "interval", "cfg-rescale", "apg"])
def test_no_guidance_reads_the_state(guidance: str, digits: Model) -> None:
    """Nor the labels."""
    assert isinstance(watched_walk(digits, "ddim", guidance).x, Watched)


def test_every_built_in_sampler_is_watched() -> None:
    """A new one is added to the list, or to its reasons."""
    own = {e.name for e in registry.entries("sampler") if e.origin.startswith(registry.OWN)}
    assert own - {registry.split(s)[0] for s in WATCHED} == {"diffusers"}


class Peeking(Sampler):
    """Reads its state in every step."""

    def steps(self, denoise: Any, x: Tensor, sigmas: Tensor, noise: Noise) -> Any:
        """One look a step."""
        for s in sigmas.tolist()[1:]:
            if x.abs().max() > -1:
                yield Step(s, x)


@pytest.mark.usefixtures("as_on_a_device")
def test_a_sampler_that_reads_its_state_is_caught(digits: Model) -> None:
    """The watch has teeth."""
    cell = make_cell(digits, "ddim", None, 2)
    x = torch.zeros(2, *digits.shape).as_subclass(Watched)
    noise = WatchedNoise(torch.arange(2), digits.shape)
    with pytest.raises(RunError, match="__bool__ waits for the device"):
        driving.walk(Peeking(), denoiser(digits, torch.zeros(2).long(), 2), x, cell.sigmas, noise)


@pytest.mark.usefixtures("as_on_a_device")
def test_on_a_device_a_bad_state_is_found_at_the_end_with_its_step(digits: Model) -> None:
    """The look that was put off names the step all the same."""

    class Broken(Sampler):
        """Not finite from the second step on."""

        def steps(self, denoise: Any, x: Tensor, sigmas: Tensor, noise: Noise) -> Any:
            """Yields what it is given."""
            for i, s in enumerate(sigmas.tolist()[1:]):
                yield Step(s, x if i < 1 else x / 0)

    cell = make_cell(digits, "ddim", None, 3)
    noise = Noise(0, torch.arange(2), digits.shape, torch.float32)
    walked = driving.walk(Broken(), denoiser(digits, None, 2), torch.ones(2, *digits.shape), cell.sigmas, noise)
    with pytest.raises(RunError, match="not finite after step 2 of 3"):
        walked.check()


# --- graphs: what is captured once and replayed


class FakeGraph:
    """Does on the CPU what a CUDA graph does: a replay reads the same tensors and writes into the same tensors."""

    again: Callable[[], driving.Walk]

    def __init__(self) -> None:
        self.replays = 0

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def replay(self) -> None:
        """Run again, out of sight of every hook."""
        self.replays += 1
        walked = self.again()
        self.walk.x.copy_(walked.x)
        self.walk.finite.copy_(walked.finite)

    walk: driving.Walk


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[FakeGraph]:
    """Captures are of fake graphs, which are kept here."""
    made: list[FakeGraph] = []

    def capture(model: Model, run: replay.Run, rows: Tensor, inputs: Inputs) -> replay.Replay | None:
        graph = FakeGraph()
        captured = replay.capture(model, run, rows, inputs, graph)
        if captured is not None:
            hooks = (model.network._forward_pre_hooks, model.network._forward_hooks)

            def again() -> driving.Walk:
                kept = [dict(h) for h in hooks]
                for h in hooks:
                    h.clear()
                walked = run(captured.rows, captured.inputs)[0]
                for h, k in zip(hooks, kept, strict=True):
                    h.update(k)
                return walked

            graph.again, graph.walk = again, captured.walk
            made.append(graph)
        return captured

    monkeypatch.setattr(generate, "capture", capture)
    return made


@pytest.mark.parametrize("guidance", ["none", "cfg:scale=2"])
def test_replayed_batches_are_the_same_images_and_are_counted(
    guidance: str, graphs: list[FakeGraph], digits: Model, make_session: Any, tmp_path: Path
) -> None:
    """The first batch is run, the second captured and replayed, so is a last one that is smaller."""
    model = run_as(digits, HowRun("fp32", graphs=True))
    cell = make_cell(digits, "ddpm", None, 3, guidance)
    labels = torch.arange(11) % 10
    plain = list(engine.generate(digits, cell, torch.arange(11), labelled(labels), 0, 3))
    steps: list[int] = []
    replayed = list(
        engine.generate(model, cell, torch.arange(11), labelled(labels), 0, 3, lambda i, step: steps.append(i))
    )
    assert [g.replays for g in graphs] == [3]
    for a, b in zip(plain, replayed, strict=True):
        assert torch.equal(a.index, b.index)
        assert (a.images - b.images).abs().max() <= 1e-5
        assert b.stochastic
    assert steps == [0, 1, 2] * 4
    # Captured anew, under the eyes of the run's meter.
    session = make_session(11, model=model, batch_size=3)
    session.execution.store = Store(tmp_path / "graphs")
    outcome = engine.run_cell(session, cell)
    assert outcome.error is None
    assert outcome.record["nfe"] == 3 * (1 if guidance == "none" else 2)


def test_another_cell_is_captured_anew(graphs: list[FakeGraph], digits: Model) -> None:
    """And its run alone holds its graph, so that the graph of the cell before, with its memory, can be let go."""
    model = run_as(digits, HowRun("fp32", graphs=True))
    for steps in (2, 3):
        cell = make_cell(digits, "ddim", None, steps)
        made = engine.prepare(model, cell)
        list(made.generate(torch.arange(8), labelled(torch.arange(8)), 0, 4))
        assert isinstance(made, SamplerOnModel)
        assert len(made.replays) == 1
    assert [g.replays for g in graphs] == [1, 1]


def test_another_size_of_batches_is_captured_anew(graphs: list[FakeGraph], digits: Model) -> None:
    """And the graph of the size before, which holds its own memory, is let go."""
    made = engine.prepare(run_as(digits, HowRun("fp32", graphs=True)), make_cell(digits, "ddim", None, 2))
    assert isinstance(made, SamplerOnModel)
    for size in (4, 2):
        list(made.generate(torch.arange(8), labelled(torch.arange(8)), 0, size))
        assert len(made.replays) == 1
    assert [(len(g.walk.x), g.replays) for g in graphs] == [(4, 1), (2, 3)]


@pytest.mark.slow
def test_a_cell_that_is_done_leaves_no_graph(
    graphs: list[FakeGraph], digits: Model, make_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even until the garbage collector comes by: the next cell needs the memory."""
    made: list[weakref.ref[SamplerOnModel]] = []
    start = SamplerOnModel.__init__

    def watched(self: SamplerOnModel, *given: Any) -> None:
        start(self, *given)
        made.append(weakref.ref(self))

    monkeypatch.setattr(SamplerOnModel, "__init__", watched)
    session = make_session(8, model=run_as(digits, HowRun("fp32", graphs=True)), batch_size=4)
    session.measurement.metrics.append(registry.parse("metric", "gap:images=2"))  # it keeps its context
    gc.collect()
    gc.disable()
    try:
        assert engine.run_cell(session, make_cell(digits, "ddim", None, 2)).error is None
        assert graphs[0].replays == 1
        for graph in graphs:
            vars(graph).clear()  # the test's own hold the run that they repeat
        assert made
        assert all(ref() is None for ref in made)
    finally:
        gc.enable()


def test_a_remainder_is_not_captured(graphs: list[FakeGraph], digits: Model) -> None:
    """A graph of fewer rows could not hold the next block's whole batches."""
    model = run_as(digits, HowRun("fp32", graphs=True))
    cell = make_cell(digits, "ddim", None, 2)
    made = engine.prepare(model, cell)
    for _ in range(2):
        list(made.generate(torch.arange(5), labelled(torch.arange(5)), 0, 3))
    assert [(len(g.walk.x), g.replays) for g in graphs] == [(3, 2)]


def test_a_run_that_cannot_be_captured_is_sampled_without(
    digits: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line says so, once, and the images are the same."""

    class Refusing(FakeGraph):
        def __enter__(self) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(generate, "capture", lambda *given: replay.capture(*given, Refusing()))
    model = run_as(digits, HowRun("fp32", graphs=True))
    cell = make_cell(digits, "ddim", None, 2)
    labels = torch.arange(9)
    plain = torch.cat([b.images for b in engine.generate(digits, cell, torch.arange(9), labelled(labels), 0, 3)])
    found = torch.cat([b.images for b in engine.generate(model, cell, torch.arange(9), labelled(labels), 0, 3)])
    assert torch.equal(plain, found)
    assert capsys.readouterr().err.count("cannot be captured as a CUDA graph (operation not permitted") == 1


def test_what_is_too_long_or_guided_by_a_classifier_is_not_captured(graphs: list[FakeGraph], digits: Model) -> None:
    """A graph of so many kernels costs more than it saves; a classifier's gradient is left alone."""
    model = run_as(digits, HowRun("fp32", graphs=True))
    guided = make_cell(digits, "ddim", None, 2, "classifier")
    long = dataclasses.replace(make_cell(digits, "ddim", None, 2), sigmas=torch.zeros(generate.LONGEST + 2))
    for cell in (guided, long):
        made = SamplerOnModel(model, cell)
        assert made._replay(torch.arange(3), Inputs(3), 0, 3) is None
        assert made.replays == {}
    assert not graphs


def test_graphs_are_asked_for_where_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the option reaches the network; elsewhere it is refused."""
    with pytest.raises(UserError, match="`graphs` requires an NVIDIA GPU"):
        setup.load_model("digits", CPU, "fp32", LoadOptions(graphs=True))
    model = SimpleNamespace(network=nn.Identity(), autoencoder=None)
    monkeypatch.setattr(setup, "_load", lambda source, device, dtype, options: model)
    monkeypatch.setattr(setup, "set_precision", lambda dtype, device: torch.float32)
    loaded = setup.load_model("digits", torch.device("cuda"), "fp32", LoadOptions(graphs=True))
    assert how_run(loaded.network) == HowRun("fp32", graphs=True)


def test_notices_of_the_compiler_are_not_shown() -> None:
    """torch.compile explains at length how it traces functions of diffusers; a user can do nothing about it."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        setup.quiet_libraries()
        for module in ("torch._dynamo.variables.functions", "torch.nn.functional"):
            warnings.warn_explicit("x", UserWarning, "file.py", 1, module=module)
    assert [str(w.message) for w in shown] == ["x"]  # that of torch.nn alone
    assert logging.getLogger("torch.utils.cpp_extension").level == logging.ERROR

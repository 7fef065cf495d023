"""Latency: percentiles, throughput, cost, stages and counts with a clock that the test sets; the file; the front."""

from __future__ import annotations

import io
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from support.synthetic_results import put, record
from test_pipelines import tiny_stable_diffusion
from torch import Tensor

from samplerbench.bench import engine, generate, memory
from samplerbench.bench import latency as bench
from samplerbench.bench.latency import STAGE_BATCHES, measure_latency, prepare_latency, sample_images
from samplerbench.bench.prepare import Prepared, prepare
from samplerbench.bench.replay import _unseen
from samplerbench.bench.request import Grid, Request
from samplerbench.cli.app import main
from samplerbench.data.pixels import quantise
from samplerbench.errors import UserError
from samplerbench.models import Model
from samplerbench.models.runner import Runner
from samplerbench.report.html import page
from samplerbench.report.latency import (
    Tradeoff,
    front_table,
    latency_table,
    stage_table,
    tradeoff_figures,
    tradeoffs,
)
from samplerbench.report.load import load
from samplerbench.results.groups import Group, group
from samplerbench.results.latency import (
    LATENCY_FILE,
    Latency,
    add_latencies,
    cost_per_1000,
    images_per_second,
    percentile,
    read_latencies,
    summarised,
)
from samplerbench.results.seal import digest
from samplerbench.sampling import Denoiser, Inputs, Sampler, Step
from samplerbench.sampling.cost import Cost
from samplerbench.sampling.noise import Noise

MODEL = "exact:mixture"


def prepared(*samplers: Any, steps: int = 1, guidance: str | None = None, **options: Any) -> Prepared:
    return prepare_latency(Request([Grid(samplers or ["ddim"], [steps], guidances=[guidance])], **options), "cpu")


def latency(sampler: str = "ddim", steps: int | None = 10, ms: float = 10.0, **change: Any) -> Latency:
    """A latency of a cell of `support.synthetic_results.record`. ms: per image."""
    batch_size = change.pop("batch_size", 1)
    fields: dict[str, Any] = {
        "sampler": sampler,
        "guidance": None,
        "spacing": "trailing",
        "steps": steps,
        "nfe": 10,
        "network_calls": 10,
        "decoder_passes": 0,
        "model": "digits",
        "weights": "w",
        "dtype": "float32",
        "device": "cpu",
        "device_name": "",
        "threads": 1,
        "compile": False,
        "graphs": False,
        "warmup": 2,
        "first_seconds": 1.0,
        "seconds": [ms * batch_size / 1000],
        "stages": {"encoder": None, "network": 0.1, "guidance": None, "decoder": None, "rest": 0.0},
        "peak_device_bytes": None,
        "peak_host_bytes": 2**30,
        "price": None,
        "versions": {"torch": "2.15.0"},
        "finished": "2026-11-22T00:00:00+00:00",
    }
    return summarised(batch_size=batch_size, **(fields | change))


# Arithmetic


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=50), st.sampled_from([50, 95]))
def test_a_percentile_is_the_nearest_rank(seconds: list[float], percent: int) -> None:
    assert percentile(seconds, percent) == np.percentile(seconds, percent, method="inverted_cdf")


def test_with_few_batches_p95_is_the_slowest() -> None:
    numbers = [float(i) for i in range(1, 41)]
    assert [percentile(numbers[:n], 95) for n in (1, 5, 19, 20, 40)] == [1, 5, 19, 19, 38]
    assert [percentile(numbers[:n], 50) for n in (1, 2, 3, 20)] == [1, 1, 2, 10]


def test_throughput_counts_all_batches_and_the_cost_is_that_of_the_hours() -> None:
    rate = images_per_second([0.5, 1.5], 4)
    assert rate == 4  # eight images in two seconds
    assert math.isclose(cost_per_1000(3.6, 2.0), 0.5)  # 500 s at 3.6 an hour


# Measurement


class Clock:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def tick(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", made)
    return made


def on_network(ready: Prepared, hook: Callable[[int], None]) -> None:
    """Call the hook with the number of rows at each network call."""
    ready.model.network.register_forward_hook(lambda _, args, __: hook(len(args[0])))


def test_the_times_are_those_of_the_clock(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call takes 10 ms and 1 ms a row, and what follows the sampling 2 ms; the first call takes 5 s longer."""
    ready = prepared(steps=3, model=MODEL)
    calls = []

    def work(rows: int) -> None:
        calls.append(rows)
        clock.tick(0.010 + 0.001 * rows + (5 if len(calls) == 1 else 0))

    def convert(images: Tensor) -> Tensor:
        clock.tick(0.002)
        return quantise(images)

    on_network(ready, work)
    monkeypatch.setattr(bench, "quantise", convert)
    one, four = (o.latency for o in measure_latency(ready, [1, 4], repeats=4, warmup=2, price=7.2))
    assert one is not None
    assert four is not None
    assert math.isclose(one.first_seconds, 5.035)
    assert one.seconds == pytest.approx([0.035] * 4)
    assert four.seconds == pytest.approx([0.044] * 4)
    assert math.isclose(four.images_per_second, 4 / 0.044)
    assert four.cost_per_1000_images == pytest.approx(2e-3 * 1000 * 0.011)
    assert four.stages.model_dump() == pytest.approx(
        {"encoder": None, "network": 0.042, "guidance": None, "decoder": None, "rest": 0.002}
    )
    assert math.isclose(four.stages.total, 0.044)
    assert (four.nfe, four.network_calls, four.decoder_passes) == (3, 3, 0)
    assert four.peak_device_bytes is None
    assert four.peak_host_bytes > 2**20
    assert len(calls) == 2 * 3 * (2 + 4 + STAGE_BATCHES)
    assert ready.model.network._forward_pre_hooks == {}


def test_the_rounds_alternate_and_a_drifting_machine_favours_no_configuration(clock: Clock) -> None:
    """Every call takes longer than the one before."""
    ready = prepared(model=MODEL)
    order: list[int] = []

    def work(rows: int) -> None:
        order.append(rows)
        clock.tick(len(order))

    on_network(ready, work)
    found = [o.latency for o in measure_latency(ready, [4, 1], repeats=4, warmup=2)]
    assert order == [1, 1, 4, 4] + [4, 1, 1, 4] * 2 + [4, 1, 1, 4, 4, 1]
    assert [m.batch_size for m in found if m] == [4, 1]
    assert len({math.fsum(m.seconds) for m in found if m}) == 1


@dataclass(frozen=True)
class Small(Sampler):
    """Does not run four images."""

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        if len(x) == 4:
            raise torch.OutOfMemoryError("cannot allocate memory")
        yield Step(0.0, denoise(x, float(sigmas[0])))


def test_a_batch_that_does_not_fit_leaves_the_others() -> None:
    found = measure_latency(prepared(Small(), "ddim", model=MODEL), [2, 4], repeats=1, warmup=1)
    assert [o.latency is None for o in found] == [False, True, False, False]
    assert str(found[1].error) == "the device has not enough memory for a batch of 4; try batch_size=2."
    assert found[1].title.endswith("batch 4")


def test_guidance_networks_are_a_stage_of_their_own() -> None:
    ready = prepared(guidance="classifier:scale=1", model=MODEL, steps=2)
    (outcome,) = measure_latency(ready, [2], repeats=1)
    assert outcome.latency is not None
    assert outcome.latency.stages.guidance is not None
    assert outcome.latency.network_calls == 2


def test_graphs_are_replayed_in_the_rounds_and_not_in_the_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks do not see what a graph replays; here a run without hooks stands for the graph."""
    ready, replayed = prepared(steps=3, model=MODEL), []
    ready.model.network = Runner(ready.model.network, torch.device("cpu"), graphs=True)

    def capture(model: Model, run: Any, rows: Tensor, inputs: Inputs) -> Any:
        def replay(rows: Tensor, inputs: Inputs) -> Any:
            replayed.append(len(rows))
            with _unseen(model.network):
                return run(rows, inputs)[0]

        replay.draws, replay.cost = 0, Cost()  # type: ignore[attr-defined]
        return replay

    monkeypatch.setattr(generate, "capture", capture)
    outcomes = measure_latency(ready, [2, 4], repeats=5, warmup=2)
    assert sorted(replayed) == [2] * 6 + [4] * 6  # the second batch of the warm-up, and the rounds
    for outcome in outcomes:
        assert outcome.latency is not None
        assert outcome.latency.graphs
        assert (outcome.latency.nfe, outcome.latency.network_calls) == (3, 3)


def test_the_settings_are_checked() -> None:
    for settings, line in (
        (([], 1, 1), "`batch_size` is missing; give at least one."),
        (([0], 1, 1), "batch_size=0: at least 1 image is needed."),
        (([1], 0, 1), "repeats=0: give a whole number from 1 to 100,000."),
        (([1], 1, True), "warmup=True: give a whole number from 1 to 100,000."),
        (([1], 1, 1, 0.0), "price=0.0: give a positive price per hour."),
        (([1], 1, 1, None, True), "warmup=1: at least 2 batches are needed with `graphs`"),
    ):
        with pytest.raises(UserError) as caught:
            bench.check_settings(*settings)  # type: ignore[arg-type]
        assert str(caught.value).startswith(line)


# A text-to-image model


PROMPTS = ("a red cat", "two dogs", "the sea")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sd")
    tiny_stable_diffusion(folder, DDIMScheduler(clip_sample=False)).save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.mark.filterwarnings("ignore::Warning:diffusers")
def test_the_stages_of_a_text_to_image_model(text_model: str) -> None:
    ready = prepared(steps=2, guidance="cfg", model=text_model, prompts=PROMPTS, negative_prompt="noise")
    model: Any = ready.model
    encoded, decoded = [], []
    encoder = model.text_encoder.modules["text_encoder"]
    encoder.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
    model.autoencoder.decoder.register_forward_hook(lambda _, args, __: decoded.append(len(args[0])))
    (outcome,) = measure_latency(ready, [2], repeats=3, warmup=2)
    found = outcome.latency
    assert found is not None
    assert (found.nfe, found.network_calls, found.decoder_passes) == (4, 2, 1)
    assert encoded == [2, 1] * (2 + 3 + STAGE_BATCHES)  # two prompts, and the negative prompt
    assert decoded == [2] * (2 + 3 + STAGE_BATCHES)
    parts = found.stages
    assert parts.encoder is not None
    assert parts.decoder is not None
    assert min(parts.encoder, parts.network, parts.decoder) > 0
    assert parts.guidance is None
    # What is encoded again is what the network is given.
    both = model.encode_prompts(ready.inputs(2), True)
    expected = torch.cat([model.embeddings.rows([0, 1])["text"], model.null_embeddings["text"]])
    torch.testing.assert_close(both, expected)


@pytest.mark.filterwarnings("ignore::Warning:diffusers")
def test_a_run_does_not_keep_the_text_encoder_and_makes_the_same_images(text_model: str) -> None:
    ready = prepared(steps=2, guidance="cfg", model=text_model, prompts=PROMPTS)
    method = engine.prepare(ready.model, ready.cells[0])
    images = sample_images(ready.model, method, ready.inputs(2), 0, True)
    request = Request([Grid(["ddim"], [2], guidances=["cfg"])], model=text_model, prompts=PROMPTS)
    run = prepare(request, "cpu")
    assert run.model.text_encoder is None  # type: ignore[attr-defined]
    assert run.model.encode_prompts(run.inputs(2)) is None
    (batch,) = engine.generate(run.model, run.cells[0], torch.arange(2), run.inputs(2), 0, 2)
    assert torch.equal(quantise(batch.images), images)


# Memory


def test_the_peak_on_the_host_is_the_largest_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    class Process:
        rss = 5

        def memory_info(self) -> Process:
            return self

    process, seen = Process(), threading.Event()
    monkeypatch.setattr(memory.psutil, "Process", lambda: process)
    with memory.PeakMemory(torch.device("cpu")) as peak:
        assert peak.host_bytes == 5
        process.rss = 9
        for _ in range(1000):  # until the thread has read it
            if peak.host_bytes == 9:
                break
            seen.wait(0.01)
        process.rss = 7
    assert (peak.host_bytes, peak.device_bytes) == (9, None)
    assert not peak._thread.is_alive()


def test_the_peak_on_a_gpu_is_without_what_others_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    reset: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 1000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 300)
    gpu = torch.device("cuda:0")
    with memory.PeakMemory(gpu, kept=memory.allocated(gpu) - 100) as peak:
        assert reset == [gpu]
    assert peak.device_bytes == 800
    assert memory.allocated(torch.device("cpu")) == 0


# The file


def test_a_latency_replaces_the_one_of_the_same_conditions(tmp_path: Path) -> None:
    add_latencies(tmp_path, [latency(ms=1), latency(ms=2, batch_size=4), latency("heun", ms=3)])
    add_latencies(tmp_path, [latency(ms=9), latency(ms=8, compile=True), latency(ms=7, dtype="bfloat16")])
    assert [m.ms_per_image for m in read_latencies(tmp_path)] == pytest.approx([9, 2, 3, 8, 7])
    assert read_latencies(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"p50_seconds": 0.5}, "p50_seconds does not agree with the other fields"),
        ({"p95_seconds": 0.02}, "p95_seconds does not agree"),
        ({"images_per_second": 1.0}, "images_per_second does not agree"),
        ({"cost_per_1000_images": 1.0}, "cost_per_1000_images does not agree"),
        ({"price_per_hour": 2.0}, "cost_per_1000_images does not agree"),
        ({"seconds": []}, "latencies.0.seconds"),
        ({"seconds": [math.inf]}, "latencies.0.seconds.0"),
        ({"batch_size": "1"}, "latencies.0.batch_size"),
        ({"batch_size": True}, "latencies.0.batch_size"),
        ({"threads": 0}, "latencies.0.threads"),
        ({"sampler": ""}, "latencies.0.sampler"),
        ({"nfe": -1}, "latencies.0.nfe"),
        ({"more": 1}, "latencies.0.more"),
        ({"stages": {}}, "latencies.0.stages.encoder"),
    ],
)
def test_a_file_that_does_not_fit_the_schema_is_not_read(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    file = add_latencies(tmp_path, [latency()])
    content = json.loads(file.read_text("utf-8"))
    content["latencies"][0] |= change
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"latency.json is damaged or edited\.$"):
        read_latencies(tmp_path)
    del content["seal"]
    file.write_text(json.dumps(content | {"seal": digest(content)}))
    with pytest.raises(UserError) as caught:
        read_latencies(tmp_path)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', "[" * 1000])
def test_a_damaged_file_is_set_aside_and_reported(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path, record())
    file = tmp_path / LATENCY_FILE
    file.write_text(text)
    assert [p for p in load(tmp_path).problems if LATENCY_FILE in p] == [f"left out: {file} is damaged or edited"]
    add_latencies(tmp_path, [latency()])
    assert len(read_latencies(tmp_path)) == 1
    assert (tmp_path / f"{LATENCY_FILE}.damaged").read_text() == text
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_of_another_format_is_named(tmp_path: Path) -> None:
    content = {"format": 2, "latencies": []}
    (tmp_path / LATENCY_FILE).write_text(json.dumps(content | {"seal": digest(content)}))
    with pytest.raises(UserError, match="unknown format; format 1 is supported"):
        read_latencies(tmp_path)


def test_the_file_is_not_a_result(tmp_path: Path) -> None:
    put(tmp_path, record())
    add_latencies(tmp_path, [latency()])
    loaded = load(tmp_path)
    assert (len(loaded.records), len(loaded.latencies), loaded.problems) == (1, 1, [])


# Quality against latency


def one(*records: dict[str, Any]) -> Group:
    (found,) = group(records)
    return found


@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=8),
    st.sampled_from(["lower", "higher"]),
)
def test_the_front_holds_what_nothing_dominates(points: list[tuple[int, int]], better: str) -> None:
    sign = 1 if better == "lower" else -1
    records = [
        record(steps=i + 1, metrics={"fid": float(value)}, better={"fid": better})
        for i, (_, value) in enumerate(points)
    ]
    (found,) = tradeoffs(one(*records), [latency(steps=i + 1, ms=ms) for i, (ms, _) in enumerate(points)])
    assert len(found.points) == len(points)
    for i, (ms, value) in enumerate(points):
        dominated = any(a <= ms and sign * b <= sign * value and (a, sign * b) != (ms, sign * value) for a, b in points)
        (point,) = (p for p in found.points if p.record["steps"] == i + 1)
        assert point.optimal == (not dominated)


def test_a_metric_and_a_latency_meet_only_for_the_same_cell() -> None:
    found = one(record(), record(steps=20), record(guidance="cfg:scale=2"), record("heun"))
    others = [
        latency(steps=11),
        latency(guidance="cfg:scale=3"),
        latency(spacing="karras"),
        latency(weights="other"),
        latency(dtype="bfloat16"),
    ]
    assert tradeoffs(found, others) == []
    (made,) = tradeoffs(found, [*others, latency(ms=4), latency(guidance="cfg:scale=2", ms=9)])
    assert {(p.label, p.record["steps"], round(p.latency.ms_per_image)) for p in made.points} == {
        ("ddim", 10, 4),
        ("ddim + cfg:scale=2", 10, 9),
    }


def measured(*latencies: Latency) -> list[Tradeoff]:
    return tradeoffs(one(record(metrics={"fid": 4.0, "acc": 0.5}), record("heun", metrics={"fid": 3.0})), latencies)


def test_each_metric_and_each_condition_has_its_own_front() -> None:
    made = measured(latency(batch_size=4), latency(), latency("heun", graphs=True), latency("heun", ms=20))
    assert [(t.metric, t.batch_size, len(t.points)) for t in made] == [
        ("fid", 1, 2),
        ("fid", 1, 1),
        ("fid", 4, 1),
        ("acc", 1, 1),
        ("acc", 4, 1),
    ]
    assert "CUDA graphs" in made[1].title
    assert list(tradeoff_figures(made)) == [
        "fid-vs-latency-batch-1",
        "fid-vs-latency-batch-1-2",
        "fid-vs-latency-batch-4",
        "acc-vs-latency-batch-1",
        "acc-vs-latency-batch-4",
    ]
    figure = tradeoff_figures(made)["fid-vs-latency-batch-1"]()
    axes = figure.axes[0]
    assert axes.get_xlabel() == "milliseconds per image (p50)"
    labels = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}  # type: ignore[union-attr]
    assert labels["ddim"] == [[10.0, 4.0]]
    assert labels["Pareto front"] == [[10.0, 4.0], [20.0, 3.0]]


def test_a_value_that_is_not_finite_has_no_point() -> None:
    assert tradeoffs(one(record(metrics={"fid": math.nan})), [latency()]) == []


def test_the_page_has_a_section_only_with_latencies() -> None:
    groups = group([record(), record("<b>x")])
    plain, shown = page(groups, [], {}), page(groups, [], {}, latencies=[latency(), latency("<b>x", ms=20)])
    assert 'id="latency"' not in plain
    assert shown.count('<img src="data:image/svg+xml;base64,') == 1
    section = shown[shown.index('<section id="latency"') :].split("</section>")[0]
    assert "<b>" not in section
    assert "FID over milliseconds per image; cpu, 1 thread, batches of 1" in section


# The tables and the commands


def lines(content: Any, width: int = 80) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(content)
    return out.getvalue().splitlines()


def test_the_tables_fit_into_80_columns() -> None:
    stages = {"encoder": 0.01234, "network": 12.3, "guidance": 0.1, "decoder": 0.2, "rest": 0.0}
    found = [
        latency("dpm++:order=3", 1000, 123456.7, price=1.5, batch_size=128, stages=stages, peak_device_bytes=2**36),
        latency("ddim:eta=0.5", guidance="cfg:scale=1.5", ms=0.012),
    ]
    for table in (latency_table(found), stage_table(found), front_table(measured(latency())[0])):
        printed = lines(table)
        assert max(map(cell_len, printed)) <= 80
    text = "\n".join(lines(latency_table(found), 200))
    for part in ("15802458", "0.0120", "per 1,000", "51.4"):  # 1.5 / 3600 · 123.4567 s · 1000
        assert part in text
    assert "65536" in "\n".join(lines(stage_table(found), 200))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert isinstance(ended.value.code, int)
    return ended.value.code, *capsys.readouterr()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SAMPLERBENCH_DEBUG", "")


COMMAND = ("latency", "-s", "ddim", "--model", MODEL, "--repeats", "2", "--warmup", "1")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--price", "x"), "--price x: write a positive price per hour, without a currency: --price 2.5/h."),
        (("--price", "$2.5/h"), "--price $2.5/h: write a positive price per hour"),
        (("--price", "2.5"), "--price 2.5: write"),
        (("--price", "0/h"), "--price 0/h: write"),
        (("--price", "-1/h"), "--price -1/h: write"),
        (("--price", "nan/h"), "--price nan/h: write"),
        (("--batch-size", "0"), "--batch-size 0: at least 1 image is needed."),
        (("--batch-size", "auto"), '--batch-size auto: "auto" is not a whole number'),
        (("--batch-size", "1,,2"), "--batch-size 1,,2: a number is missing beside a comma"),
        (("--repeats", "0"), "--repeats 0: it must be at least 1."),
        (("--steps", "2", "--nfe", "2"), "--steps and --nfe cannot be combined"),
        (("--graphs", "--warmup", "2"), "--graphs requires an NVIDIA GPU."),
        (("--graphs",), "--warmup 1: at least 2 batches are needed with --graphs"),
        (("--dtype", "fp12"), "--dtype fp12: choose one of"),
        (("-s", "ddmi"), 'no sampler "ddmi"'),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = run(capsys, *COMMAND, *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"samplerbench: {line}")
    assert list(tmp_path.iterdir()) == []


def test_a_sampler_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "latency")
    assert (code, out) == (2, "")
    assert err == "samplerbench: name a sampler with --sampler; `samplerbench list samplers` shows them.\n"


def test_json_is_what_the_file_holds(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = ("--nfe", "1,2", "-s", "heun", "--batch-size", "1,2", "--price", "3.6/h", "--json")
    code, out, err = run(capsys, *COMMAND, *options, "-g", "cfg")
    printed = json.loads(out)
    measured, unmet = [e for e in printed if "seconds" in e], [e for e in printed if "unmet" in e]
    assert (code, err, len(measured), len(unmet)) == (0, "", 4, 2)
    assert [Latency.model_validate(entry) for entry in measured] == read_latencies(tmp_path / "results")
    assert {(e["nfe"], e["steps"], e["batch_size"]) for e in measured} == {(2, 1, 1), (2, 1, 2)}
    assert set(unmet[0]) == {"sampler", "guidance", "spacing", "steps", "budget", "unmet"}
    for entry in measured:
        assert entry["cost_per_1000_images"] == pytest.approx(1 / entry["images_per_second"])


def test_a_failure_has_exit_code_1_and_keeps_the_rest(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "lost.py").write_text(
        "from torch import inf\nfrom samplerbench.sampling import Sampler, Step\nclass Lost(Sampler):\n"
        "    def steps(self, denoise, x, sigmas, noise):\n        print('hello')\n        yield Step(0.0, x * inf)\n"
    )
    code, out, err = run(capsys, *COMMAND, "--steps", "1", "-s", "./lost.py:Lost", "--json", "--out", "o")
    found = json.loads(out)
    assert code == 1
    assert "seconds" in found[0]
    assert found[1]["error"].endswith("another spacing, or --dtype fp32.")
    assert "samplerbench: ./lost.py:Lost, 1 steps, batch 1: failed: " in err
    assert [m.sampler for m in read_latencies(tmp_path / "o")] == ["ddim"]


def test_the_commands_together(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, *COMMAND, "--steps", "1,2")
    assert (code, err) == (0, f"latencies: {Path('results', LATENCY_FILE)}\n")
    assert "time of a batch, 2 batches each; p95: the slowest" in out
    code, _, err = run(capsys, "figure", "pareto", "front.png")
    assert (code, err.count("\n")) == (2, 1)  # there are no results yet
    run(
        capsys, "run", "-s", "ddim", "--steps", "1,2", "--model", MODEL, "--metric", "gap:images=1,tol=0.01", "--n", "2"
    )
    code, out, err = run(capsys, "figure", "pareto", "front.svg", "--batch-size", "1")
    assert (code, err) == (0, "")
    assert out.endswith("front.svg\n")
    assert "milliseconds per image" in Path("front.svg").read_text("utf-8")
    code, out, _ = run(capsys, "report", "--no-plot", "--format", "html,plots")
    assert Path("results/report/plots/gap-vs-latency-batch-1.svg").exists()
    assert 'id="latency"' in Path("results/report/report.html").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("front.gif",), "front.gif: this figure cannot be animated; write a .png or .svg file."),
        (("front.png", "--metric", "kid"), "--metric kid: the results have fid."),
        (("front.png", "--batch-size", "2"), "--batch-size 2: latency.json has 1."),
        (("front.png",), "results: no result has the sampler, steps, guidance, weights and dtype of a latency"),
    ],
)
def test_what_a_front_cannot_show_is_one_line(
    arguments: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put(Path("results"), record())
    code, _, err = run(capsys, "figure", "pareto", "front.png")
    assert err == "samplerbench: results has no latency.json; `samplerbench latency … --out results` writes it.\n"
    add_latencies(Path("results"), [latency(weights="other")])
    code, out, err = run(capsys, "figure", "pareto", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"samplerbench: {line}")

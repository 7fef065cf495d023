"""All measurements of speed on one GPU, each in a process of its own with a time limit; see run.sh.

Images per second of a network of 35.7M parameters of CIFAR-10's size (random weights serve) under DDIM, at fp32, tf32
and bf16, plain, with CUDA graphs, compiled, and both; what part that is of the device's matrix products, as measured;
whether a sampler waits for the device; the overhead of every sampler; the table of end_to_end.py; the Fréchet
distance. A part that fails or runs out of time
is a line with its reason, and the others go on; what is known so far is on disk after every part.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import timing  # noqa: E402

DTYPES = ("fp32", "tf32", "bf16")


@dataclass
class Part:
    """One child process: its name, its command after the interpreter, and its limit in seconds."""

    name: str
    command: list[str]
    limit: float
    found: dict[str, Any] = field(default_factory=dict)


def parts(device: str, small: bool, folder: Path) -> list[Part]:
    """What is measured, the most important first."""
    me, where = str(HERE / "speed.py"), ["--device", device]
    checkpoint = ["--checkpoint", str(folder / "cifar")]
    tried = ["--small"] if small else []
    few = ["--repeats", "2"] if small else []

    def throughput(dtype: str, *how: str) -> Part:
        name = " ".join([dtype, *(h.removeprefix("--") for h in how)])
        limit = 120.0 if "--compile" in how else 60.0
        return Part(name, [me, "--part", "throughput", "--dtype", dtype, *how, *checkpoint, *where, *tried], limit)

    def overhead(model: str, dtype: str, samplers: list[str], *how: str) -> Part:
        command = [str(HERE.parent / "overhead.py"), "--model", model, "--dtype", dtype, *where, *how]
        command += [word for s in samplers for word in ("-s", s)]
        size = ["--batch", "8", "--nfe", "3", *few, *tried] if small else ["--batch", "256", "--repeats", "7"]
        return Part(" ".join(["overhead", model, dtype, *(h.removeprefix("--") for h in how)]), command + size, 90.0)

    table = [str(HERE.parent / "end_to_end.py"), "--model", "cifar", *where]
    table += ["--n", "8", "--steps", "2", *few, "--small-network"] if small else ["--n", "1024", "--steps", "10,20"]
    table += [] if small else ["--dtype", "tf32"]
    distance = [str(HERE.parent / "frechet.py"), "--without", "scipy sqrtm,eigvals"]
    distance += ["--dims", "64", *few] if small else ["--dims", "2048", "--repeats", "3"]
    main = ["ddim", "ddpm", "heun", "dpm++", "unipc"]
    return [
        Part("peak", [me, "--part", "peak", *where, *tried], 60.0),
        Part("waiting", [me, "--part", "waiting", *where], 60.0),
        *(throughput(dtype) for dtype in DTYPES),
        *(throughput(dtype, "--graphs") for dtype in ("bf16", "fp32", "tf32")),
        throughput("bf16", "--compile"),
        throughput("bf16", "--compile", "--graphs"),
        overhead("cifar", "bf16", main),
        overhead("digits", "fp32", main if small else []),
        overhead("digits", "fp32", main, "--graphs"),
        Part("end to end", table, 170.0),
        Part("frechet", distance, 60.0),
        throughput("tf32", "--compile"),
        throughput("fp32", "--compile"),
        throughput("tf32", "--compile", "--graphs"),
    ]


# --- The children ---------------------------------------------------------------------------------------------------


def measure_peak(chosen: argparse.Namespace) -> dict[str, Any]:
    """Matrix products per second, as floating-point operations, of each precision; and the network's own number."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    device, size = torch.device(chosen.device), 256 if chosen.small else 8192
    found: dict[str, Any] = {"peak": {}}
    for name in DTYPES:
        if name == "tf32" and device.type != "cuda":
            continue
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (torch.randn(size, size, device=device, dtype=precision(name)) for _ in range(2))
        for _ in range(3):
            a @ b
        seconds = timing.alternate({"product": lambda a=a, b=b: a @ b}, 30, lambda: synchronise(device))["product"]
        found["peak"][name] = 2 * size**3 / statistics.median(seconds)
    with tempfile.TemporaryDirectory() as folder:
        from diffusers import UNet2DModel

        checkpoint = timing.cifar_checkpoint(Path(folder), chosen.small)
        network = UNet2DModel.from_pretrained(checkpoint, subfolder="unet", use_safetensors=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.randn(1, 3, 32, 32), torch.tensor([500.0]))
    found["operations"] = counter.get_total_flops()
    found["parameters"] = sum(p.numel() for p in network.parameters())
    return found


def measure_throughput(chosen: argparse.Namespace) -> dict[str, Any]:
    """Images per second, from the prior to pixels, of whole batches; what the first batches took stands beside it."""
    import torch

    import samplerbench
    from samplerbench import registry
    from samplerbench.bench import engine, setup
    from samplerbench.data.pixels import quantise
    from samplerbench.sampling import Inputs

    device, batch, steps = torch.device(chosen.device), chosen.batch, chosen.steps
    if chosen.small:
        batch, steps = 4, 3
    checkpoint = timing.cifar_checkpoint(chosen.checkpoint, chosen.small)
    model = samplerbench.load_model(
        str(checkpoint), device=chosen.device, dtype=chosen.dtype, compile=chosen.compile, graphs=chosen.graphs
    )
    sampler = registry.parse("sampler", "ddim")
    (cell,), _ = engine.plan(model, [sampler], [steps], [None], lambda s: setup.pick_spacing(s, None))
    generator = engine.prepare(model, cell)

    def sample(batches: int) -> float:
        synchronise(device)
        begun = time.perf_counter()
        for part in generator.generate(torch.arange(batches * batch), Inputs(batches * batch), 0, batch):
            quantise(part.images)
        synchronise(device)
        return time.perf_counter() - begun

    # Compiled code is made at the first batch, a graph after it.
    first = sample(3)
    once = sample(1)
    batches = max(1, min(200, round(1.0 / once)))
    seconds = [sample(batches) / batches for _ in range(2 if chosen.small else 5)]
    rate = batch / statistics.median(seconds)
    found = {"batch": batch, "steps": steps, "first_seconds": first, "seconds_per_batch": seconds}
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return found | {"images_per_second": rate, "evaluations_per_second": rate * steps}


def measure_waiting(chosen: argparse.Namespace) -> dict[str, Any]:
    """For every built-in sampler and guidance, what in its loop waits for the device, by torch's sync debug mode."""
    import torch

    import samplerbench
    from samplerbench import registry
    from samplerbench.bench import engine, setup
    from samplerbench.bench.generate import SamplerOnModel
    from samplerbench.errors import RunError
    from samplerbench.sampling import Inputs

    if not chosen.device.startswith("cuda"):
        raise SystemExit("torch's sync debug mode is of NVIDIA GPUs.")
    model = samplerbench.load_model("digits", device=chosen.device)
    rows = torch.arange(64, device=model.device)
    found: dict[str, str] = {}
    runs = [(e.name, "none") for e in registry.entries("sampler") if e.name != "diffusers"]
    for name, guidance in [*runs, ("ddim", "cfg:scale=2"), ("ddim", "classifier")]:
        sampler = registry.parse("sampler", name)
        guided = [setup.pick_guidance(guidance)]
        (cell,), _ = engine.plan(model, [sampler], [5], guided, lambda s: setup.pick_spacing(s, None))
        run, inputs = engine.prepare(model, cell), Inputs(len(rows), rows % 10)
        assert isinstance(run, SamplerOnModel)
        run._walk(rows, inputs, 0)  # what is loaded once may wait
        synchronise(model.device)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run._walk(rows, inputs, 0)
            waits = ""
        except (RuntimeError, RunError) as error:
            waits = str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found[name if guidance == "none" else f"{name} + {guidance}"] = waits
    return {"waits": found}


def precision(name: str) -> Any:
    """The dtype of tensors for a precision."""
    import torch

    return torch.bfloat16 if name == "bf16" else torch.float32


def synchronise(device: Any) -> None:
    """Until the device is done."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- The parent -----------------------------------------------------------------------------------------------------


def run(part: Part, left: float, folder: Path) -> None:
    """Run a part within its limit and the time left; its figures, or the reason why there are none, are `found`."""
    limit = min(part.limit, left)
    file = folder / f"{part.name.replace(' ', '-')}.json"
    begun = time.monotonic()
    reason = ""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        child = subprocess.Popen(
            [sys.executable, *part.command, "--json", str(file)],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            if code := child.wait(limit):
                output.seek(0)
                lines = output.read().strip().splitlines() or [""]
                reason = f"exit code {code}: {lines[-1][:300]}"
        except subprocess.TimeoutExpired:
            reason = f"stopped after {limit:.0f} s"
            end(child)
    # A part that was stopped has kept what it knew by then.
    figures = json.loads(file.read_text("utf-8")) if file.exists() else None
    part.found = {"seconds": round(time.monotonic() - begun, 1), "reason": reason, "figures": figures}


def end(child: subprocess.Popen[str]) -> None:
    """End a child and those it has started: they are a session of their own."""
    import os
    import signal

    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def summary(done: list[Part], about: timing.Row) -> str:
    """The short table."""
    found = {part.name: part.found["figures"] for part in done if part.found.get("figures")}
    peak = found.get("peak", {})
    lines = [f"{about['device']}; torch {about['versions'].get('torch')}; {about['date']}", ""]
    if peak:
        products = ", ".join(f"{name} {rate / 1e12:,.1f}" for name, rate in peak["peak"].items())
        lines += [f"matrix products, 10^12 operations/s: {products}"]
        lines += [
            f"network: {peak['parameters'] / 1e6:.1f}M parameters, {peak['operations'] / 1e9:.2f}·10^9 operations",
            "",
        ]
    rows = []
    for part in done:
        figures = found.get(part.name)
        if not figures or "images_per_second" not in figures:
            continue
        of = peak.get("peak", {}).get(part.name.split()[0])
        share = f"{figures['evaluations_per_second'] * peak['operations'] / of:.1%}" if of else "unknown"
        rows.append(
            [
                *(part.name, figures["batch"], figures["steps"], f"{figures['images_per_second']:,.1f}"),
                *(f"{figures['evaluations_per_second']:,.0f}", share, f"{figures['first_seconds']:.1f}"),
            ]
        )
    if rows:
        head = ["U-Net", "batch", "steps", "images/s", "evaluations/s", "of the peak", "first 3 batches, s"]
        lines += [timing.table(rows, head), ""]
    if waits := found.get("waiting", {}).get("waits"):
        bad = [f"{name} ({why})" for name, why in waits.items() if why]
        lines += [
            f"samplers and guidances that wait for the device in their steps: {len(bad)} of {len(waits)}",
            *bad,
            "",
        ]
    rows = []
    for part in done:
        if part.name.startswith("overhead") and part.name in found:
            rows += [
                [part.name.removeprefix("overhead "), r["sampler"], r["nfe"], f"{r['ratio']['median']:.3f}"]
                for r in found[part.name]["rows"]
            ]
    if rows:
        lines += [timing.table(rows, ["overhead", "sampler", "NFE", "run / (NFE x network)"]), ""]
    if "end to end" in found:
        lines += end_to_end(found["end to end"]["rows"])
    if "frechet" in found:
        of = found["frechet"]["rows"]
        rows = [[r["method"], r["d"], r["problem"], f"{1e3 * r['seconds']:.1f}", f"{r['error']:.0e}"] for r in of]
        lines += [timing.table(rows, ["Fréchet distance", "features", "problem", "ms", "relative error"]), ""]
    gaps = [f"{part.name}: {part.found['reason']}" for part in done if part.found.get("reason")]
    return "\n".join([*lines, *(["not measured, or in part:", *gaps] if gaps else [])]).rstrip()


def end_to_end(rows: list[timing.Row]) -> list[str]:
    """The lines about the peer."""
    names = list(dict.fromkeys(r["by"] for r in rows))
    of = {name: {r["seed"]: r["wall"] for r in rows if r["by"] == name} for name in names}
    both = sorted(set.intersection(*(set(walls) for walls in of.values())))
    shown = [[n, f"{statistics.median(w.values()):.1f}", len(w)] for n, w in of.items()]
    lines = [timing.table(shown, ["end to end", "wall, s", "runs"])]
    if len(names) == 2 and both:
        peer = next(n for n in names if n != "samplerbench")
        ratio = timing.ratios([of[peer][k] for k in both], [of["samplerbench"][k] for k in both])
        lines += [f"{peer} over samplerbench: {ratio['median']:.2f}"]
    return [*lines, ""]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a small network and few images, to try it")
    parser.add_argument("--minutes", type=float, default=9.3, help="of the whole")
    parser.add_argument("--only", default="", help="only parts whose name has this in it, and the peak")
    parser.add_argument("--part", choices=["peak", "waiting", "throughput"], help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="fp32", help=argparse.SUPPRESS)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--graphs", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, default=512, help="images in a batch of the 35.7M network")
    parser.add_argument("--steps", type=int, default=10, help="of DDIM, for images/s")
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.part:
        measure = {"peak": measure_peak, "waiting": measure_waiting, "throughput": measure_throughput}
        found = measure[chosen.part](chosen)
        chosen.json.write_text(json.dumps(found), "utf-8")
        return
    end_at = time.monotonic() + 60 * chosen.minutes
    chosen.out.mkdir(parents=True, exist_ok=True)
    about = timing.environment(chosen.device, small=chosen.small)
    done: list[Part] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        timing.cifar_checkpoint(folder / "cifar", chosen.small)
        for part in parts(chosen.device, chosen.small, folder):
            if chosen.only not in part.name and part.name != "peak":
                continue
            if "throughput" in part.command:
                part.command += ["--batch", str(chosen.batch), "--steps", str(chosen.steps)]
            left = end_at - time.monotonic()
            if left < 10:
                part.found = {"seconds": 0.0, "reason": "no time was left", "figures": None}
            else:
                run(part, left, folder)
            done.append(part)
            print(f"# {part.name}: {part.found['seconds']:.0f} s {part.found['reason']}", flush=True)
            kept = {"benchmark": "gpu speed", **about, "parts": {p.name: p.found for p in done}}
            (chosen.out / "speed.json").write_text(json.dumps(kept, indent=1), "utf-8")
            (chosen.out / "speed.txt").write_text(summary(done, about) + "\n", "utf-8")
    print("\n" + summary(done, about))


if __name__ == "__main__":
    main()

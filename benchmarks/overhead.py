"""Measure the overhead of samplers: (time of sampling a batch) / (NFE x time of the bare network).

    python benchmarks/overhead.py                                   # digits, batch 256, every sampler: 5 minutes
    python benchmarks/overhead.py --model cifar --batch 256 --device cuda --dtype bf16 -s ddim -s ddpm

A run is what the engine does for one batch: prior, noise, the sampler's steps, decoding, pixels, with the evaluations
counted. The bare network is called as many times as were counted, on the same batch with the same labels, dtype,
threads and memory format, without anything around it. The two alternate in one process; the ratio is the median of the
ratios of neighbours. Models: the embedded digits; the MNIST network of benchmarks/models; a network of 35.7M parameters
of CIFAR-10's size with random weights (the architecture of google/ddpm-cifar10-32).
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timing

SAMPLERS = [
    *("ddpm", "ddpm:variance=large", "ddim", "ddim:eta=0.5", "analytic-dpm", "langevin:T=1", "euler-maruyama"),
    *("reverse-diffusion", "pc", "heun", "pf-ode:solver=rk4", "dpm-solver:order=2", "dpm-solver:order=3", "dpm++"),
    *("dpm++:order=3", "dpm++:sde=true", "unipc", "deis", "ipndm", "diffusers/DDIMScheduler"),
]
"""Every built-in sampler, and variants with different operations."""


def main() -> None:
    """Run the measurement and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["digits", "mnist", "cifar"], default="digits")
    parser.add_argument("-s", "--sampler", action="append", help="sampler; can be repeated; default: all")
    parser.add_argument(
        "--nfe",
        type=int,
        default=10,
        help="budget of network evaluations; each sampler uses the largest number of steps that fits",
    )
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--threads", type=int, help="number of threads; default: one per core")
    parser.add_argument(
        "--small", action="store_true", help="quick test with a small network in place of that of cifar"
    )
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    threads = timing.set_threads(chosen.threads)
    import torch

    torch.set_num_threads(threads)
    rows: list[timing.Row] = []
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(chosen, Path(folder))
        about = timing.environment(chosen.device, threads=threads, options=options_of(chosen))
        for spec in chosen.sampler or SAMPLERS:
            try:
                rows.append(bench.measure(spec))
            except Exception as error:  # the other samplers go on
                failed.append(f"{spec}: {type(error).__name__}: {error}")
                print(f"# {failed[-1]}", flush=True)
                continue
            print(f"# {spec}: {rows[-1]['ratio']['median']:.3f}", flush=True)
            timing.keep(chosen.json, "overhead", about, rows, failed=failed)
    if not rows:
        raise SystemExit("no sampler could be measured.")
    show(rows, about, chosen)


def options_of(chosen: argparse.Namespace) -> timing.Row:
    """The options as they stand in the JSON."""
    return {k: v for k, v in vars(chosen).items() if k not in ("json", "sampler")}


@dataclass(frozen=True)
class Job:
    """A run of one batch, and its bare network; both synchronise nothing."""

    run: Callable[[], Any]
    bare: Callable[[], Any]
    nfe: int
    stochastic: bool


class Bench:
    """One model on one device."""

    def __init__(self, chosen: argparse.Namespace, folder: Path) -> None:
        import samplerbench
        from samplerbench.bench.labels import make_labels

        self.chosen = chosen
        source = {"digits": "digits", "mnist": str(Path(__file__).parent / "models" / "mnist")}.get(chosen.model)
        source = source or str(timing.cifar_checkpoint(folder / "cifar", chosen.small))
        more = {name: True for name in ("compile", "graphs") if getattr(chosen, name)}
        self.model = samplerbench.load_model(source, device=chosen.device, dtype=chosen.dtype, **more)
        mode = "none" if self.model.classes is None else "balanced"
        self.labels = make_labels(mode, chosen.batch, self.model.classes, self.model.class_counts)

    def wait(self) -> None:
        """Wait for the device."""
        import torch

        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def job(self, spec: str) -> Job:
        """The run of a sampler under the budget, counted once."""
        import torch
        from samplerbench_plugins.analytic_dpm import AnalyticDPM

        from samplerbench import registry
        from samplerbench.bench import engine, setup
        from samplerbench.bench.generate import SamplerOnModel
        from samplerbench.data.pixels import quantise
        from samplerbench.models.runner import how_run
        from samplerbench.sampling import Inputs
        from samplerbench.sampling.meter import Meter

        model, batch = self.model, self.chosen.batch
        sampler = registry.parse("sampler", spec)
        cells, unmet = engine.plan(
            model, [sampler], [], [None], lambda s: setup.pick_spacing(s, None), [self.chosen.nfe]
        )
        if unmet:
            raise SystemExit(f"{spec}: {unmet[0].record['unmet']}")
        cell, index = cells[0], torch.arange(batch)
        generator: Any
        if model.data is None and isinstance(sampler, AnalyticDPM):
            # With random weights there are no data to estimate them from; any values cost the same time.
            variances = {s: s * s / (1 + s * s) for s in cell.sigmas.tolist()}
            generator = SamplerOnModel(model, replace(cell, method=sampler.with_state(variances=variances)))
        else:
            generator = engine.prepare(model, cell)
        found: dict[str, Any] = {}

        def run() -> None:
            with Meter(generator.network, generator.beside) as meter:
                for part in generator.generate(index, Inputs(batch, self.labels), 0, batch):
                    found["pixels"], found["stochastic"] = quantise(part.images), part.stochastic
                    found["replayed"] = part.uncounted.network
            found["nfe"] = (meter.network + found["replayed"]) / batch

        for _ in range(3 if how_run(model.network).graphs else 1):  # a graph is made after the first batch
            run()
        nfe = round(found["nfe"])
        # The network itself, without what samplerbench has put around it.
        network = getattr(model.network, "inner", model.network)
        x = torch.randn(batch, *model.shape, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)
        t = torch.full((batch,), 500.0, device=model.device)
        labels = None if self.labels is None else self.labels.to(model.device)

        def bare() -> None:
            with torch.no_grad():
                for _ in range(nfe):
                    network(x, t, class_labels=labels)

        bare()
        return Job(run, bare, nfe, found["stochastic"])

    def measure(self, spec: str) -> timing.Row:
        """The row of one sampler."""
        job = self.job(spec)
        seconds = timing.alternate({"run": job.run, "bare": job.bare}, self.chosen.repeats, self.wait)
        ratio = timing.ratios(seconds["run"], seconds["bare"])
        return {"sampler": spec, "nfe": job.nfe, "stochastic": job.stochastic, "ratio": ratio, "seconds": seconds}


def show(rows: list[timing.Row], about: timing.Row, chosen: argparse.Namespace) -> None:
    """Print the table, and the largest ratio of each kind."""
    import statistics

    print(
        f"\n{chosen.model}, batch {chosen.batch}, {chosen.dtype}{', compiled' if chosen.compile else ''}"
        f"{', graphs' if chosen.graphs else ''}; {about['device']}; {about['threads']} threads used; medians of "
        f"{chosen.repeats} alternating runs; {about['date']}\n"
    )
    lines = []
    for r in rows:
        run, bare = (statistics.median(r["seconds"][name]) for name in ("run", "bare"))
        spread = f"{r['ratio']['least']:.3f} to {r['ratio']['greatest']:.3f}"
        kind = "yes" if r["stochastic"] else "no"
        lines.append(
            [
                *(f"`{r['sampler']}`", kind, r["nfe"], f"{1000 * run:.1f}", f"{1000 * bare:.1f}"),
                *(f"{r['ratio']['median']:.3f}", spread),
            ]
        )
    print(timing.table(lines, ["sampler", "noise", "NFE", "run, ms", "network, ms", "ratio", "from, to"]))
    for name, stochastic in (("deterministic", False), ("stochastic", True)):
        of = [r for r in rows if r["stochastic"] == stochastic]
        if of:
            worst = max(of, key=lambda r: r["ratio"]["median"])
            print(f"largest {name} ratio: {worst['ratio']['median']:.3f} ({worst['sampler']})")


if __name__ == "__main__":
    main()

"""Compute one steps-vs-FID table with diffusers, PNG files and torch-fidelity, and with samplerbench.

    python benchmarks/end_to_end.py                     # digits, n = 1,442, steps 10, 20, 50, five times each
    python benchmarks/end_to_end.py --small             # to try it: half a minute
    python benchmarks/end_to_end.py --model cifar --device cuda --n 2000 --steps 10,20 --repeats 5

Both are whole processes, from their start to the printed FIDs, and take turns. (a) is what a user would write without
samplerbench (`peer` below): the checkpoint's own UNet2DModel and DDIMScheduler, batches of 256 under inference mode,
PNG files by Pillow, and `torch_fidelity.calculate_metrics` on their folder, with the real images' statistics in
torch-fidelity's cache, as samplerbench has its own at hand. (b) is `samplerbench run`. The timesteps (leading) and the
labels are the same; the noise is each one's own, and another in every repeat: the FIDs must agree within their spread.
Measured: wall time, processor time with children, peak memory of the largest process, bytes and files in its folder.

--model cifar is a network of 35.7M parameters with random weights, whose FID means nothing but must agree as well.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import timing

FEATURES = "digits-cnn"
REAL = 1000
"""Number of noise images that serve as real images for --model cifar."""


def peer(asked: dict[str, Any]) -> None:
    """The table by diffusers and torch-fidelity: prints {steps: FID} as JSON."""
    import torch
    import torch_fidelity
    from diffusers import DDIMScheduler, UNet2DModel
    from PIL import Image
    from torch_fidelity.metric_fid import KEY_METRIC_FID

    from samplerbench.metrics.extractors import extractor_names

    extractor_names()  # registers the digits' feature network with torch-fidelity
    device, folder = torch.device(asked["device"]), Path(asked["out"])
    if device.type == "cuda":
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = asked["dtype"] == "tf32"
    dtype = torch.bfloat16 if asked["dtype"] == "bf16" else torch.float32
    unet = UNet2DModel.from_pretrained(asked["model"], subfolder="unet", use_safetensors=True).eval().to(device, dtype)
    if asked["channels_last"]:
        unet = unet.to(memory_format=torch.channels_last)
    scheduler = DDIMScheduler.from_pretrained(asked["model"], subfolder="scheduler")
    generator = torch.Generator(device).manual_seed(asked["seed"])
    given = asked["labels"]
    labels = None if given is None else torch.tensor(given, device=device)
    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    found = {}
    for steps in asked["steps"]:
        images = folder / f"{steps}-steps"
        images.mkdir(parents=True)
        scheduler.set_timesteps(steps)
        for first in range(0, asked["n"], asked["batch"]):
            size = min(asked["batch"], asked["n"] - first)
            chosen = None if labels is None else labels[first : first + size]
            with torch.inference_mode():
                x = torch.randn(size, *shape, generator=generator, device=device)
                for t in scheduler.timesteps:
                    noise = unet(x.to(dtype), t, class_labels=chosen).sample.to(x.dtype)
                    x = scheduler.step(noise, t, x).prev_sample
                pixels = (x.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).cpu().permute(0, 2, 3, 1).numpy()
            for i, image in enumerate(pixels, first):
                Image.fromarray(image.squeeze()).save(images / f"{i:06d}.png")
        metrics = torch_fidelity.calculate_metrics(
            input1=str(images),
            input2=asked["real"],
            input2_cache_name="real",
            cache_root=asked["cache"],
            feature_extractor=FEATURES,
            fid=True,
            batch_size=asked["batch"],
            cuda=device.type == "cuda",
            # True is without worker processes, whose start takes longer than reading small images.
            save_cpu_ram=not asked["workers"],
            verbose=False,
        )
        found[str(steps)] = metrics[KEY_METRIC_FID]
    print(json.dumps(found))


class Table:
    """The table that both programs compute: checkpoint, real images and labels, written once to a folder."""

    def __init__(self, chosen: argparse.Namespace, folder: Path) -> None:
        import torch
        from PIL import Image

        from samplerbench.assets import asset
        from samplerbench.bench.labels import balanced_labels
        from samplerbench.data import load_data

        self.chosen, self.folder = chosen, folder
        self.steps = [int(part) for part in chosen.steps.split(",")]
        self.real = folder / "real"
        self.real.mkdir()
        self.labels: list[int] | None = None
        if chosen.model == "digits":
            self.model, self.source = str(asset("digits")), ["--model", "digits"]
            data = load_data("digits:split=train")
            images = data.images
            assert data.labels is not None
            self.labels = balanced_labels(chosen.n, torch.bincount(data.labels).tolist()).tolist()
        else:
            self.model = str(timing.cifar_checkpoint(folder / "cifar", chosen.small_network))
            self.source = ["--model", self.model, "--data", str(self.real), "--features", FEATURES]
            images = torch.randint(256, (REAL, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        for i, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
            Image.fromarray(image.squeeze()).save(self.real / f"{i:06d}.png")

    def ours(self, out: Path, seed: int, n: int) -> tuple[timing.Cost, dict[int, float]]:
        """One table by samplerbench."""
        c = self.chosen
        command = [sys.executable, "-m", "samplerbench", "run", *self.source, "-s", "ddim", "--steps", c.steps]
        command += ["--n", str(n), "--seed", str(seed), "--device", c.device, "--dtype", c.dtype, "--json"]
        command += ["--out", str(out), *shlex.split(c.options)]
        cost = timing.run_child(command, out, self._environment(out))
        return cost, {r["steps"]: r["metrics"]["fid"]["value"] for r in json.loads(cost.output)}

    def peer(self, out: Path, seed: int, n: int) -> tuple[timing.Cost, dict[int, float]]:
        """One table by diffusers and torch-fidelity."""
        c = self.chosen
        asked = {"model": self.model, "real": str(self.real), "cache": str(self.folder / "cache"), "out": str(out)}
        asked |= {"steps": self.steps, "n": n, "batch": c.batch, "seed": seed, "device": c.device, "dtype": c.dtype}
        asked |= {"labels": self.labels and self.labels[:n], "workers": c.workers, "channels_last": c.channels_last}
        file = self.folder / "asked.json"  # as an argument the labels of many images would be too long
        file.write_text(json.dumps(asked), "utf-8")
        cost = timing.run_child([sys.executable, __file__, "--peer", str(file)], out, self._environment(out))
        return cost, {int(k): v for k, v in json.loads(cost.output.strip().splitlines()[-1]).items()}

    def _environment(self, out: Path) -> dict[str, str]:
        (out / "tmp").mkdir(parents=True)
        return {"SAMPLERBENCH_CACHE": str(self.folder / "cache-ours"), "TMPDIR": str(out / "tmp")}


def main() -> None:
    """Run the measurement and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["digits", "cifar"], default="digits")
    parser.add_argument("--n", type=int, default=1442)
    parser.add_argument("--steps", default="10,20,50")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=256, help="batch size of the peer; samplerbench uses its default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "tf32", "bf16"])
    parser.add_argument("--threads", type=int, help="threads of both programs; default: one per core")
    parser.add_argument("--options", default="", help="additional options of `samplerbench run`, in one string")
    parser.add_argument(
        "--channels-last", action="store_true", help="use the channels-last memory format for the network of the peer"
    )
    parser.add_argument("--workers", action="store_true", help="use the worker processes of torch-fidelity")
    parser.add_argument("--small", action="store_true", help="quick test: 100 images, 2 and 4 steps, two repeats")
    parser.add_argument("--small-network", action="store_true", help="use a small network in place of that of cifar")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.peer is not None:
        peer(json.loads(chosen.peer.read_text("utf-8")))
        return
    if chosen.small:
        chosen.n, chosen.steps, chosen.repeats = 100, "2,4", 2
    threads = timing.set_threads(chosen.threads)
    options = {k: v for k, v in vars(chosen).items() if k not in ("json", "peer")}
    about = timing.environment(chosen.device, threads=threads, options=options)
    rows: list[timing.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        asked = Table(chosen, Path(folder))
        makers = {"diffusers, PNG, torch-fidelity": asked.peer, "samplerbench": asked.ours}
        for k, make in enumerate(makers.values()):  # the statistics of the real images, for both
            make(Path(folder) / f"first-{k}", 0, 8)
        for k in range(chosen.repeats):
            for name in list(makers)[:: 1 if k % 2 == 0 else -1]:
                out = Path(folder) / f"{k}-{len(name)}"
                cost, fids = makers[name](out, k, chosen.n)
                rows.append({"by": name, "seed": k, **cost.row(), "fid": fids})
                print(f"# {name}, seed {k}: {cost.wall:.1f} s", flush=True)
                timing.keep(chosen.json, "end to end", about, rows)
    show(rows, about, asked)


def show(rows: list[timing.Row], about: timing.Row, asked: Table) -> None:
    """Print the two tables: cost, and FIDs."""
    names = list(dict.fromkeys(r["by"] for r in rows))
    of = {name: sorted((r for r in rows if r["by"] == name), key=lambda r: r["seed"]) for name in names}
    c = asked.chosen
    print(
        f"\n{c.model}, n = {c.n}, DDIM with {c.steps} steps, {c.dtype}; {about['device']}; {about['threads']} threads "
        f"used; medians of {c.repeats} alternating runs; {about['date']}\n"
    )
    lines = []
    for name, found in of.items():
        middle = {k: statistics.median(r[k] for r in found) for k in ("wall", "cpu", "peak", "written", "files")}
        lines.append(
            [
                *(name, f"{middle['wall']:.1f}", f"{middle['cpu']:.1f}", timing.mebibytes(middle["peak"])),
                *(timing.mebibytes(middle["written"]), f"{middle['files']:.0f}"),
            ]
        )
    print(timing.table(lines, ["", "wall, s", "processor, s", "peak, MiB", "written, MiB", "files"]))
    first, second = names[0], names[-1]
    gains = []
    for key, what in (("wall", "wall"), ("cpu", "processor")):
        ratio = timing.ratios([r[key] for r in of[first]], [r[key] for r in of[second]])
        gains.append(f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['greatest']:.2f}) in {what} time")
    print(f"\n{first} over {second}: {', '.join(gains)}")
    print("\nFID, mean ± standard deviation over the repeats:\n")
    lines = []
    for steps in asked.steps:
        values = [[r["fid"][steps] for r in found] for found in of.values()]
        means, spreads = [statistics.fmean(v) for v in values], [statistics.stdev(v) for v in values if len(v) > 1]
        if spreads:
            shown = [f"{m:.3f} ± {s:.3f}" for m, s in zip(means, spreads, strict=True)]
            error = f"{(sum(s**2 for s in spreads) / len(values[0])) ** 0.5:.3f}"
        else:
            shown, error = [f"{m:.3f}" for m in means], "not known"
        lines.append([steps, *shown, f"{means[-1] - means[0]:+.3f}", error])
    print(timing.table(lines, ["steps", *names, "difference", "its standard error"]))


if __name__ == "__main__":
    main()

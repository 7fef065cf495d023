"""Measure the order of convergence of every deterministic solver on the two smooth exact problems.

From large noise on even steps, as `Sampler.convergence` claims it; from two small noise levels; and on uneven steps.

python benchmarks/orders.py            # prints the Markdown table of docs/solvers.md
python benchmarks/orders.py flow       # prints that of docs/flows.md: rectified flows, from t = 1
"""

from __future__ import annotations

import sys

import torch

from samplerbench import registry
from samplerbench.testing.sampler import (
    SMALL_STARTS,
    UNEVEN,
    Shape,
    flow_errors,
    measure_order,
    measure_order_from_infinity,
    order_errors,
)

SPECS = [
    "ddim",
    "pf-ode:solver=euler",
    "pf-ode:solver=heun",
    "pf-ode:solver=rk4",
    "heun",
    "dpm-solver:order=1",
    "dpm-solver:order=2",
    "dpm-solver:order=3",
    "dpm++:order=1",
    "dpm++:order=2,method=singlestep",
    "dpm++:order=2",
    "dpm++:order=3",
    *(f"unipc:order={p},variant={v}" for p in (1, 2, 3) for v in ("B1", "B2")),
    *(f"unipc:order={p},corrector=false" for p in (1, 2, 3)),
    *(f"deis:order={r}" for r in range(4)),
    *(f"ipndm:order={p}" for p in range(1, 5)),
    "dpm++:order=3,start=singlestep",
    "unipc:order=3,start=singlestep",
    "unipc:order=3,corrector=false,start=singlestep",
    *(f"deis:order={r},start=singlestep" for r in (2, 3)),
    *(f"ipndm:order={p},start=singlestep" for p in (3, 4)),
    "restart:K=0",
    "er-sde:order=2,phi=ode",
    "er-sde:phi=ode",
    "er-sde:phi=ode,derivatives=exact",
    "res",
    "res:method=singlestep",
    "sa-solver:tau=0",
    "sa-solver:tau=0,predictor=3,corrector=0",
    "sa-solver:tau=0,predictor=3,corrector=4",
]


COLUMNS: tuple[tuple[str, float | None, Shape], ...] = (
    *((f"from σ = {start:g}", start, "even") for start in SMALL_STARTS),
    *((f"{shape}", None, shape) for shape in UNEVEN),
)


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    names = ("sampler", "claim", "gaussian", "mixture", "claim from any start", *(name for name, _, _ in COLUMNS))
    print(f"| {' | '.join(names)} | error at the finest grid |")
    print(f"| --- |{' ---: |' * (len(names) - 1)} --- |")
    for spec in SPECS:
        sampler = registry.parse("sampler", spec)
        cells = [f"{slope:.2f} ± {margin:.2f}" for slope, margin in (measure_order(sampler, p) for p in PROBLEMS)]
        cells.append(str(sampler.convergence_from_any_start()))
        counts = (512, 1024, 2048) if sampler.even_in == "sigma" else (128, 256, 512, 1024)
        for _, start, shape in COLUMNS:
            slope, _ = measure_order(sampler, "mixture", start, shape, counts)
            cells.append(f"{slope:.2f}")
        n, error = order_errors(sampler, "mixture")[-1]
        row = (f"`{spec}`", str(sampler.convergence()), *cells, f"{error:.1e} at N = {n}")
        print(f"| {' | '.join(row)} |", flush=True)


def flow() -> None:
    """Print the table of rectified flows."""
    torch.set_num_threads(1)
    print("| sampler | claim from t = 1 | gaussian | mixture | error at N = 16 | error at N = 1024 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for spec in SPECS:
        sampler = registry.parse("sampler", spec)
        slopes = [f"{s:.2f} ± {m:.2f}" for s, m in (measure_order_from_infinity(sampler, p) for p in PROBLEMS)]
        errors = [f"{error:.1e}" for _, error in flow_errors(sampler, "mixture", (16, 1024))]
        row = (f"`{spec}`", str(sampler.convergence_from_infinity()), *slopes, *errors)
        print(f"| {' | '.join(row)} |", flush=True)


PROBLEMS = ("gaussian", "mixture")

if __name__ == "__main__":
    flow() if sys.argv[1:] == ["flow"] else main()

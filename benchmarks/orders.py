"""Measure the order of convergence of every deterministic solver on the two smooth exact problems.

python benchmarks/orders.py            # prints the Markdown table of docs/solvers.md
"""

from __future__ import annotations

import torch

from samplerbench import registry
from samplerbench.testing.sampler import measure_order, order_errors

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
]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| sampler | theory | gaussian | mixture | error at the finest grid (mixture) |")
    print("| --- | ---: | ---: | ---: | --- |")
    for spec in SPECS:
        sampler = registry.parse("sampler", spec)
        cells = [f"{slope:.2f} ± {margin:.2f}" for slope, margin in (measure_order(sampler, p) for p in PROBLEMS)]
        n, error = order_errors(sampler, "mixture")[-1]
        print(f"| `{spec}` | {sampler.convergence()} | {' | '.join(cells)} | {error:.1e} at N = {n} |", flush=True)


PROBLEMS = ("gaussian", "mixture")

if __name__ == "__main__":
    main()

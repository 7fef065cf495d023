"""The terms of the variational bound over the timestep (Nichol & Dhariwal 2021, figure 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from samplerbench.likelihoods.run import Likelihood
from samplerbench.report.plots import SETTINGS
from samplerbench.report.style import style
from samplerbench.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def bound_figure(found: Sequence[Likelihood]) -> Figure:
    """Each term L_{t-1} and L_0 over t, on a linear axis (left) and a logarithmic one (right).

    Args:
        found: variational bounds, one line each. t is the number of the step, 1 … N, divided by N; t = 1/N is L_0.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    plain = FuncFormatter(lambda v, _: f"{v:g}")
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for i, one in enumerate(found):
            terms = [*one.per_timestep, one.reconstruction]
            steps = len(terms)
            t = [(steps - k) / steps for k in range(steps)]
            label = printable(f"{one.sampler}, N = {steps}: {one.bits_per_dim:.3g}")
            looks = style(i) | {"marker": style(i)["marker"] if steps <= 50 else ""}
            for axes in (left, right):
                axes.plot(t, terms, label=label if axes is left else None, markersize=4, linewidth=1.4, **looks)
        right.set_xscale("log")
        for axes in (left, right):
            axes.set_yscale("log")
            axes.set_xlabel("t/N")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(plain)
                axis.set_minor_formatter(NullFormatter())
        left.set_ylabel("term of the bound, bits/dim")
        what = f"{found[0].n} images of {found[0].data}; t/N = 1/N is L_0"
        figure.suptitle(printable(what), fontsize=8, color="#555555", x=0.01, ha="left")
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure

"""samplerbench: diffusion samplers as plugins, and steps-vs-FID tables one can believe.

import samplerbench

images = samplerbench.sample("ddim", steps=20, n=16)
samplerbench.evaluate(["ddim", "unipc"], nfe=[10, 20], n=500).table()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from samplerbench import entry_point_guard

if TYPE_CHECKING:
    from samplerbench.api import Results, Trajectory, evaluate, initial_noise, load_model, sample
    from samplerbench.likelihoods.run import Likelihood, likelihood
    from samplerbench.tuning.api import recommend, tune
    from samplerbench.tuning.recommend import Recommendation
    from samplerbench.tuning.search import Tuned

entry_point_guard.watch()

__version__ = "0.1.0"
__all__ = [
    "Likelihood",
    "Recommendation",
    "Results",
    "Trajectory",
    "Tuned",
    "__version__",
    "evaluate",
    "initial_noise",
    "likelihood",
    "load_model",
    "recommend",
    "sample",
    "tune",
]


def __getattr__(name: str) -> Any:
    """The Python API, imported when it is asked for: `import samplerbench` alone imports no torch."""
    if name == "diffusers":
        return import_module("samplerbench.diffusers")
    if name in ("Likelihood", "likelihood"):
        from samplerbench.likelihoods import run

        return getattr(run, name)
    if name in ("Recommendation", "Tuned", "recommend", "tune"):
        module = {"Recommendation": "recommend", "Tuned": "search"}.get(name, "api")
        return getattr(import_module(f"samplerbench.tuning.{module}"), name)
    if name in __all__:
        from samplerbench import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

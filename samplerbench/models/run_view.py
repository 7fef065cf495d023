"""A model as a run uses it: with its guidance and inputs. Learned spacings are bound to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.models.model import Model, check_guidance
from samplerbench.models.sample import bind, start_batch, states_of_noise
from samplerbench.options import Configurable
from samplerbench.sampling.denoiser import Denoiser
from samplerbench.sampling.guidance import Guidance
from samplerbench.sampling.inputs import Inputs
from samplerbench.sampling.noise import Noise, Purpose, normal
from samplerbench.sampling.sampler import Sampler
from samplerbench.sampling.view import Estimates, RunView


def _spec(plugin: Configurable) -> str:
    return plugin.spec


class ModelRun(RunView):
    """A model with the guidance and the inputs of a run (`RunView`).

    Args:
        model: the model.
        guidance: guidance bound to the model. None for no guidance.
        inputs: function that returns the labels or prompts of the first n samples. None: no inputs, or label i modulo
            the number of classes for a model that has no unconditional prediction.
        identity: further plain data that the estimates depend on, besides the model and the guidance.
        describe: function that describes a plugin with all that its results depend on. None: its spec.
    """

    def __init__(
        self,
        model: Model,
        guidance: Guidance | None = None,
        inputs: Callable[[int], Inputs] | None = None,
        identity: Mapping[str, Any] | None = None,
        describe: Callable[[Configurable], str] | None = None,
    ) -> None:
        self.model, self.guidance, self._inputs = model, guidance, inputs or self._default_inputs
        self._identity, self._describe = dict(identity or {}), describe or _spec
        self.shape, self.levels, self.device, self.dtype = model.shape, model.levels, model.device, model.dtype
        self.classes, self.flow, self.observation = model.classes, model.flow, model.observation

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.model.image_shape

    def alpha(self, sigma: float) -> float:
        return self.model.alpha(sigma)

    def denoiser(self, inputs: Inputs) -> Denoiser:
        return self.model.denoiser(inputs)

    def decode(self, x: Tensor) -> Tensor:
        return self.model.decode(x)

    def real(self, n: int) -> tuple[Tensor, Tensor | None]:
        return self.model.real(n)

    def describe(self, plugin: Configurable) -> str:
        return self._describe(plugin)

    def estimates(self, name: str, **settings: str | int | float) -> AbstractContextManager[Estimates]:
        # The weights are part of every key. The rest of the identity has the noise schedule, the prompts and the like.
        of = {key: value for key, value in self.model.identity.items() if key not in ("source", "weights")}
        guidance = self.guidance
        about = of | {
            "levels": self.levels.tolist(),
            "guidance": None if guidance is None else self.describe(guidance),
            "guidance identity": None if guidance is None else dict(guidance.bound_identity),
            **self._identity,
        }
        text = json.dumps(about, sort_keys=True, default=str)
        return self.model.estimates(name, run=hashlib.sha256(text.encode()).hexdigest(), **settings)

    def run_denoiser(self, index: Tensor) -> Denoiser:
        index = index.to(self.device)
        return self.model.denoiser(self.model.inputs(index, self._rows(index)), self.guidance)

    def start(self, index: Tensor, sigma: float, seed: int) -> Tensor:
        z = normal(seed, Purpose.SCHEDULE, index.to(self.device), 0, self.shape).to(self.model.state_dtype)
        return states_of_noise(self.model, sigma, z)

    def sample(self, sampler: Sampler, sigmas: Tensor, index: Tensor, seed: int) -> Tensor:
        index = index.to(self.device)
        x = self.start(index, float(sigmas[0]), seed)
        noise = Noise(seed, index, self.shape, x.dtype)
        bound = bind(self.model, sampler, sigmas)
        batch = start_batch(
            self.model, bound, sigmas, index, self._rows(index), guidance=self.guidance, x=x, noise=noise
        )
        walked = batch.walk()
        if noise.draws:
            raise UserError(
                f"sampler {sampler.spec} draws noise, so its samples have no distance to a converged solution; use a "
                "deterministic sampler."
            )
        return walked.x if bool(walked.finite.all()) else torch.full_like(x, torch.nan)

    def _rows(self, index: Tensor) -> Inputs:
        """The inputs of the samples `index`, on the device."""
        inputs = self._inputs(int(index.max()) + 1).to(self.device).rows(index)
        check_guidance(self.model, self.guidance, inputs)
        return inputs

    def _default_inputs(self, n: int) -> Inputs:
        classes = self.model.classes
        if classes is None or self.model.null:
            return Inputs(n)
        chosen = torch.arange(n) % classes
        return Inputs(n, prompts=chosen) if self.model.text else Inputs(n, labels=chosen)

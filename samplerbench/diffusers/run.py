"""A run of a pipeline: a running sampler, and the entry of the plan at which it waits for D."""

from __future__ import annotations

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from samplerbench.diffusers.plan import Bare, Plan
from samplerbench.errors import UserError
from samplerbench.models.sample import state_dtype
from samplerbench.sampling import Noise, Prediction
from samplerbench.sampling.stepper import State, Stepper


class Run:
    """A run from one entry of a plan to its end.

    The pipeline holds the state α(σ) x in its own dtype. The sampler keeps x in at least float32.

    Args:
        plan: the evaluations of the sampler.
        index: the entry of the plan at which the run starts.
        seed: seed of the noise; None uses the generator of the pipeline.
        samples: indices of the samples whose noise is drawn with the seed, (B,). None for 0 … B-1.

    Attributes:
        index: the next entry of the plan.
        x: the state at which the sampler waits for D, (B, C, H, W); the final state if it is done.
        sigma: the noise level of x.
        sent: the state that was last returned to the pipeline, (B, C, H, W); None before the first.
    """

    x: Tensor
    sigma: float

    def __init__(self, plan: Plan, index: int, seed: int | None, samples: Tensor | None = None) -> None:
        self.plan, self.index, self.seed, self.samples = plan, index, seed, samples
        self._process = plan.subject.process
        self.sent: Tensor | None = None
        self._version = 0
        self._stepper: Stepper | None = None
        self._noise: Noise | None = None

    @property
    def done(self) -> bool:
        """Whether the sampler has finished."""
        return self.index == len(self.plan.evaluations)

    def meet(self, sample: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> None:
        """Prepare for D at the pipeline's state: start, continue, or restart if the pipeline changed the state.

        Args:
            sample: the state of the pipeline, (B, C, H, W).
            generator: generator of the noise, if there is no seed.

        Raises:
            UserError: the sampler cannot continue from the changed state.
        """
        if self._noise is None:
            self._noise = self._make_noise(sample)
        if isinstance(self._noise, _Drawn):
            self._noise.generator = generator
        if self._stepper is None:
            interval = self.plan.entries[self.index] or 0
        elif self._is_sent(sample):
            return
        else:
            interval = self._changed()
        self.close()
        sigmas = self.plan.sigmas[interval:]
        x = sample.to(state_dtype(sample.dtype)) / self._process.alpha(float(sigmas[0]))
        self._stepper = Stepper(self.plan.subject.sampler, sigmas, self._noise, Bare(self.plan.subject))
        self._receive(self._stepper.start(x))

    def answer(self, prediction: Prediction, dtype: torch.dtype) -> Tensor:
        """Send D to the sampler. Returns its next state in the pipeline's scale and dtype, (B, C, H, W)."""
        assert self._stepper is not None
        self.index += 1
        self._receive(self._stepper.send(prediction))
        self.sent = self._scaled().to(dtype)
        self._version = _version(self.sent)
        return self.sent

    def close(self) -> None:
        """Stop the sampler."""
        if self._stepper is not None:
            self._stepper.close()

    def _receive(self, state: State) -> None:
        """Store the state of the sampler. Raises UserError if it does not match the plan."""
        expected = None if self.done else self.plan.evaluations[self.index]
        level = Bare(self.plan.subject).level(state.sigma)
        if (None if state.done else level) != expected:
            self.plan.subject.refuse("its noise levels depend on the image")
        self.x, self.sigma = state.x, level

    def _scaled(self) -> Tensor:
        return self.x * self._process.alpha(self.sigma)

    def _make_noise(self, sample: Tensor) -> Noise:
        dtype = state_dtype(sample.dtype)
        if self.seed is None:
            return _Drawn(sample.shape, sample.device, dtype)
        samples = torch.arange(len(sample)) if self.samples is None else self.samples
        if len(sample) % len(samples) == 0:  # DiTPipeline holds every image twice, for its guidance
            samples = samples.repeat(len(sample) // len(samples))
        return Noise(self.seed, samples.to(sample.device), sample.shape[1:], dtype)

    @property
    def draws(self) -> int:
        """Number of draws of noise so far."""
        return 0 if self._noise is None else self._noise.draws

    def _is_sent(self, sample: Tensor) -> bool:
        """Whether this is the state that the last step returned, unchanged."""
        assert self.sent is not None
        if sample is self.sent and self._version == _version(sample) != -1:
            return True
        # Compare with the sampler's own state: the returned tensor may have been modified in place.
        return torch.equal(sample, self._scaled().to(self.sent.dtype).to(sample))

    def _changed(self) -> int:
        """The interval at which the sampler restarts after the pipeline changed the state."""
        interval = self.plan.entries[self.index]
        label = self.plan.subject.sampler.label()
        if interval is None:
            raise UserError(
                f"the pipeline changed the state at entry {self.index} of the timesteps, within a step of sampler "
                f"{label}, which is not supported; use a sampler with one evaluation per step."
            )
        if self.plan.remembers:
            raise UserError(
                f"the pipeline changed the state at entry {self.index} of the timesteps, which sampler {label} "
                f"does not "
                "support: its steps use earlier states. Use a sampler without history, such as ddim or ddpm."
            )
        return interval


class _Drawn(Noise):
    """Noise from the pipeline's generator, drawn like in diffusers' schedulers."""

    def __init__(self, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> None:
        self._shape, self._device, self._dtype = shape, device, dtype
        self.draws = 0
        self.generator: torch.Generator | list[torch.Generator] | None = None

    def __call__(self) -> Tensor:
        self.draws += 1
        return randn_tensor(self._shape, generator=self.generator, device=self._device, dtype=self._dtype)


def _version(x: Tensor) -> int:
    """The version counter of a tensor, which torch increments at each in-place operation; -1 for inference tensors."""
    return -1 if x.is_inference() else x._version

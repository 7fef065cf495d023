"""A sampler as a state machine: it asks for D, is sent D, and asks again until it is done.

    with Stepper(sampler, sigmas, noise, denoiser) as stepper:
        state = stepper.start(x)
        while not state.done:
            state = stepper.send(Prediction(network(state.x, state.sigma)))
    sample = state.x

The driver calls the sampler, which calls the denoiser. A host that calls the network itself, as a diffusers pipeline
does, needs the opposite: control must come back wherever the sampler calls the denoiser. A generator can only be
suspended in its own frame, not inside a function that it calls, so the sampler needs a stack of its own: a thread. Only
one of the two threads runs at a time, and the order of all work, and of all draws of noise, is the driver's.

Running the sampler again from its start at every request would need no thread, but would keep every D in memory and
take time quadratic in the number of requests.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from samplerbench.errors import RunError, UserError
from samplerbench.sampling.denoiser import Denoiser, Prediction, Sigma
from samplerbench.sampling.noise import Noise
from samplerbench.sampling.sampler import Sampler


@dataclass(frozen=True)
class State:
    """Where a sampler stands: it waits for D(x, σ), or it is done.

    Attributes:
        x: the state at which D is wanted, (B, C, H, W), or (k, C, H, W) where `rows` is given; the last state, (B, C,
            H, W), where the sampler is done.
        sigma: the noise level of x: one for all of x, or one for each of its rows, (B,) or (k,).
        rows: (k,) int64, the rows of the batch that x is; None is the whole batch.
        done: whether x is the sample.
    """

    x: Tensor
    sigma: Sigma
    rows: Tensor | None = None
    done: bool = False


class Stepper:
    """One run of a sampler that the caller drives by sending D.

    Gradients are off in the sampler; inference mode and the CUDA stream are the caller's. The run ends with the
    sampler, with the first error, with `close`, or when the stepper is garbage-collected; its thread ends with it.

    Args:
        sampler: which method.
        sigmas: (N+1,) float64 on the CPU, decreasing: the grid.
        noise: the noise of the steps.
        denoiser: answers whatever the sampler asks besides D: the model's levels, posterior variances, part of the
            batch. Its `predict` is not called.

    Attributes:
        state: what `start` or `send` returned last; None before `start`.
    """

    state: State | None

    def __init__(self, sampler: Sampler, sigmas: Tensor, noise: Noise, denoiser: Denoiser) -> None:
        self.state = None
        self._label = sampler.label()
        self._arguments = (sampler, sigmas, noise, denoiser)
        self._exchange = _Exchange()
        self._ending: weakref.finalize[..., Stepper] | None = None

    def start(self, x: Tensor) -> State:
        """Run the sampler to its first request.

        Args:
            x: (B, C, H, W), the start, at level sigmas[0].

        Raises:
            UserError: the stepper was started or closed before. What the sampler raises comes out as it is.
        """
        if self._ending is not None or self._exchange.closed:
            raise UserError(f"this run of sampler {self._label} was started before; make another Stepper.")
        modes = (torch.is_inference_mode_enabled(), _stream(x))
        # The thread does not hold the stepper, so a stepper that nobody holds is collected while its thread waits.
        arguments = (self._exchange, *self._arguments, x, modes)
        thread = threading.Thread(target=_work, args=arguments, name=f"sampler {self._label}", daemon=True)
        thread.start()
        self._ending = weakref.finalize(self, _end, self._exchange, thread)
        return self._receive()

    def send(self, prediction: Prediction) -> State:
        """Send D at the state asked for, and run the sampler to its next request or to its end.

        Args:
            prediction: D, of the shape of `state.x`, and the variance where the model learned one.

        Raises:
            UserError: the sampler does not wait for D, or this D has another shape. What the sampler raises comes out
                as it is.
        """
        if self.state is None or self.state.done or self._exchange.closed:
            raise UserError(f"sampler {self._label} does not wait for D: it was not started, or it has ended.")
        if prediction.x0.shape != self.state.x.shape:
            raise UserError(
                f"D has shape {tuple(prediction.x0.shape)}, and sampler {self._label} asks for it at a state of shape "
                f"{tuple(self.state.x.shape)}."
            )
        self._exchange.answers.put((prediction, _stream(prediction.x0)))
        return self._receive()

    def close(self) -> None:
        """End the run, wherever it is; the sampler's `finally` clauses are executed. Closing again does nothing."""
        self._exchange.closed = True
        if self._ending is not None:
            self._ending()

    def __enter__(self) -> Stepper:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self) -> State:
        try:
            received = self._exchange.states.get()
        except BaseException:  # Ctrl-C while the sampler computes
            self.close()
            raise
        if isinstance(received, State):
            self.state = received
            if received.done:
                self.close()
            return received
        self.close()
        try:
            raise received
        finally:
            del received  # its traceback holds this frame


class _ClosedError(BaseException):
    """Raised in a sampler that waits for a D that nobody will send."""


class _Exchange:
    """What the two threads hand to each other.

    Attributes:
        states: what the sampler asks, where it ended, or what it raised.
        answers: D and the stream it was computed on; None where the run is closed.
        closed: whether the sampler is to end where it next asks.
    """

    def __init__(self) -> None:
        self.states: SimpleQueue[State | BaseException] = SimpleQueue()
        self.answers: SimpleQueue[tuple[Prediction, Any] | None] = SimpleQueue()
        self.closed = False

    def ask(self, state: State) -> Prediction:
        """The sampler's side: hand over the request and wait for D. Raises _ClosedError."""
        answer = None
        if not self.closed:
            self.states.put(state)
            answer = self.answers.get()
        if answer is None:
            raise _ClosedError
        prediction, stream = answer
        _follow(stream)
        return prediction


class _Asking(Denoiser):
    """The denoiser that the sampler sees: D comes from the caller, everything else from the denoiser inside."""

    def __init__(self, exchange: _Exchange, inner: Denoiser, index: Tensor | None = None) -> None:
        self.exchange, self.inner, self.index = exchange, inner, index
        self.levels, self.process, self.prediction = inner.levels, inner.process, inner.prediction

    def __getattr__(self, name: str) -> Any:
        """What the denoiser inside has besides, as one for samplers of version 0.1 does."""
        if name == "inner":  # a copy that is still empty
            raise AttributeError(name)
        return getattr(self.inner, name)

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        return self.exchange.ask(State(x, sigma, self.index))

    def rows(self, index: Tensor) -> Denoiser:
        whole = index if self.index is None else self.index[index]
        return _Asking(self.exchange, self.inner.rows(index), whole)


def _work(
    exchange: _Exchange,
    sampler: Sampler,
    sigmas: Tensor,
    noise: Noise,
    denoiser: Denoiser,
    x: Tensor,
    modes: tuple[bool, Any],
) -> None:
    """The sampler's thread. The modes of torch belong to a thread, so those of the caller are set here too."""
    inference, stream = modes
    try:
        _follow(stream)
        last = None
        with torch.inference_mode(inference), torch.no_grad():
            for step in sampler.steps(_Asking(exchange, denoiser), x, sigmas, noise):
                last = step
        if last is None:
            raise RunError(f"sampler {sampler.label()} yielded no step.")
        exchange.states.put(State(last.x, last.sigma, done=True))
    except _ClosedError:
        pass
    except BaseException as error:
        exchange.states.put(error)


def _end(exchange: _Exchange, thread: threading.Thread) -> None:
    """End the sampler's thread; harmless where it has ended."""
    exchange.closed = True
    exchange.answers.put(None)
    if threading.current_thread() is not thread:
        thread.join()


def _stream(x: Tensor) -> Any:
    return torch.cuda.current_stream(x.device) if x.device.type == "cuda" else None


def _follow(stream: Any) -> None:
    """Queue this thread's work on the caller's device and stream, so that it runs in order with the network's."""
    if stream is not None:
        torch.cuda.set_stream(stream)

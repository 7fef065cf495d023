"""A sampler as a state machine: it requests D, receives D, and continues until it is done.

    with Stepper(sampler, sigmas, noise, denoiser) as stepper:
        state = stepper.start(x)
        while not state.done:
            state = stepper.send(Prediction(network(state.x, state.sigma)))
    sample = state.x

The driver calls the sampler, and the sampler calls the denoiser. A diffusers pipeline calls the network itself, so
control must return to the caller whenever the sampler calls the denoiser. Python can suspend a generator only in its
own frame, not inside a function that it calls. The sampler therefore runs in a separate thread. Only one of the two
threads runs at a time. The order of all operations and of all noise draws is the same as with the driver.

An alternative without threads is to restart the sampler at every request. It would keep every D in memory, and its
running time would be quadratic in the number of requests.
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
from samplerbench.sampling.sampler import Sampler, start_steps


@dataclass(frozen=True)
class State:
    """The state of a sampler: it waits for D(x, σ), or it is done.

    Attributes:
        x: input of the requested D, (B, C, H, W), or (k, C, H, W) if `rows` is set. If `done` is True, the final
            state, (B, C, H, W).
        sigma: noise level of x: a scalar, or one level per row, (B,) or (k,).
        rows: rows of the batch that x contains, (k,) int64. None for the whole batch.
        done: whether the sampler is done and x is the sample.
    """

    x: Tensor
    sigma: Sigma
    rows: Tensor | None = None
    done: bool = False


class Stepper:
    """One run of a sampler, where the caller computes D.

    Gradients are disabled in the sampler. It uses the inference mode and the CUDA stream of the caller. The run and its
    thread end when the sampler finishes, on the first error, on `close`, or when the stepper is garbage-collected.

    Args:
        sampler: the sampler.
        sigmas: noise levels, (N+1,) float64 on the CPU, strictly decreasing.
        noise: noise source of the steps.
        denoiser: denoiser that provides everything except D, such as the noise levels of the model. Its `predict` is
            not called.

    Attributes:
        state: last result of `start` or `send`. None before `start`.
    """

    state: State | None

    def __init__(self, sampler: Sampler, sigmas: Tensor, noise: Noise, denoiser: Denoiser) -> None:
        self.state = None
        self._label = sampler.label()
        self._arguments = (sampler, sigmas, noise, denoiser)
        self._exchange = _Exchange()
        self._ending: weakref.finalize[..., Stepper] | None = None

    def start(self, x: Tensor) -> State:
        """Run the sampler up to its first request. Errors of the sampler are raised unchanged.

        Args:
            x: initial state at noise level sigmas[0], (B, C, H, W).

        Raises:
            UserError: if the stepper was already started or closed.
        """
        if self._ending is not None or self._exchange.closed:
            raise UserError(
                f"the stepper of sampler {self._label} was already started or closed; create a new Stepper."
            )
        modes = (torch.is_inference_mode_enabled(), _stream(x))
        # The thread holds no reference to the stepper, so an unused stepper is collected while its thread waits.
        arguments = (self._exchange, *self._arguments, x, modes)
        thread = threading.Thread(target=_work, args=arguments, name=f"sampler {self._label}", daemon=True)
        thread.start()
        self._ending = weakref.finalize(self, _end, self._exchange, thread)
        return self._receive()

    def send(self, prediction: Prediction) -> State:
        """Send the requested D, and run the sampler up to its next request or its end.

        Errors of the sampler are raised unchanged.

        Args:
            prediction: D with the shape of `state.x`, and the variance if the model learned it.

        Raises:
            UserError: if the sampler does not wait for D, or the shape of D is wrong.
        """
        if self.state is None or self.state.done or self._exchange.closed:
            raise UserError(f"sampler {self._label} does not wait for D: it was not started, or it has finished.")
        if prediction.x0.shape != self.state.x.shape:
            raise UserError(
                f"D has shape {tuple(prediction.x0.shape)}, but sampler {self._label} requested it for a state of "
                f"shape {tuple(self.state.x.shape)}."
            )
        self._exchange.answers.put((prediction, _stream(prediction.x0)))
        return self._receive()

    def close(self) -> None:
        """Stop the run. The `finally` clauses of the sampler are executed. Repeated calls have no effect."""
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
        except BaseException:  # for example Ctrl-C during a step
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
            del received  # its traceback references this frame


class _ClosedError(BaseException):
    """Raised in a waiting sampler when its stepper is closed."""


class _Exchange:
    """The communication channel between the two threads.

    Attributes:
        states: requests, the final state, or an error of the sampler.
        answers: D and its CUDA stream. None if the run is closed.
        closed: whether the sampler must stop at its next request.
    """

    def __init__(self) -> None:
        self.states: SimpleQueue[State | BaseException] = SimpleQueue()
        self.answers: SimpleQueue[tuple[Prediction, Any] | None] = SimpleQueue()
        self.closed = False

    def ask(self, state: State) -> Prediction:
        """Send a request and wait for D. The thread of the sampler calls it. Raises _ClosedError when closed."""
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
    """The denoiser passed to the sampler. D comes from the caller, everything else from the inner denoiser."""

    def __init__(self, exchange: _Exchange, inner: Denoiser, index: Tensor | None = None) -> None:
        self.exchange, self.inner, self.index = exchange, inner, index
        self.levels, self.process, self.prediction = inner.levels, inner.process, inner.prediction
        self.observation = inner.observation

    def __getattr__(self, name: str) -> Any:
        """Delegate other attributes to the inner denoiser, such as those for samplers of version 0.1."""
        if name == "inner":  # copy.copy calls this before __init__
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
    """The main function of the sampler thread. It sets the torch modes of the caller, which are per thread."""
    inference, stream = modes
    try:
        _follow(stream)
        last = None
        with torch.inference_mode(inference), torch.no_grad():
            for step in start_steps(sampler, _Asking(exchange, denoiser), x, sigmas, noise):
                last = step
        if last is None:
            raise RunError(f"sampler {sampler.label()} yielded no step.")
        exchange.states.put(State(last.x, last.sigma, done=True))
    except _ClosedError:
        pass
    except BaseException as error:
        exchange.states.put(error)


def _end(exchange: _Exchange, thread: threading.Thread) -> None:
    """Stop the thread of the sampler. It has no effect if the thread has finished."""
    exchange.closed = True
    exchange.answers.put(None)
    if threading.current_thread() is not thread:
        thread.join()


def _stream(x: Tensor) -> Any:
    return torch.cuda.current_stream(x.device) if x.device.type == "cuda" else None


def _follow(stream: Any) -> None:
    """Use the CUDA device and stream of the caller, so that kernels run in order with those of the network."""
    if stream is not None:
        torch.cuda.set_stream(stream)

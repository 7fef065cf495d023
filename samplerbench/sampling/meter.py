"""The meter: counts network evaluations with forward and backward hooks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from samplerbench.errors import RunError
from samplerbench.sampling.cost import Cost


class Meter:
    """Count the rows (samples of a batch) that pass through the networks of a run.

    Use it as a context manager. It counts only inside the context.

        with Meter(model.network, guidance.networks) as meter:
            ...
        nfe = meter.network / images

    Args:
        network: innermost network of the model.
        classifiers: networks of the guidance.
        decoder: decoder of a latent model. None for a pixel-space model.
    """

    def __init__(
        self, network: nn.Module, classifiers: Iterable[nn.Module] = (), decoder: nn.Module | None = None
    ) -> None:
        self.network = 0
        """Rows evaluated by the network."""
        self.network_backward = 0
        """Rows through which the network was differentiated."""
        self.classifier_forward = 0
        """Rows evaluated by the classifier."""
        self.classifier_backward = 0
        """Rows through which the classifier was differentiated."""
        self.decoder = 0
        """Rows decoded from latents to images."""
        self._decoder = decoder
        self._network, self._classifiers = network, list(classifiers)
        self._handles: list[RemovableHandle] = []
        self._paused = False

    def __enter__(self) -> Meter:
        self._handles = [
            self._network.register_forward_pre_hook(self._on_network, with_kwargs=True),
            self._network.register_forward_hook(self._on_output),
        ]
        if self._decoder is not None:
            self._handles.append(self._decoder.register_forward_pre_hook(self._on_decoder, with_kwargs=True))
        for classifier in self._classifiers:
            self._handles.append(classifier.register_forward_pre_hook(self._on_forward, with_kwargs=True))
            self._handles.append(classifier.register_full_backward_hook(self._on_backward))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def cost(self) -> Cost:
        """The cost counted so far."""
        return Cost(
            self.network, self.network_backward, self.classifier_forward, self.classifier_backward, self.decoder
        )

    def pause(self) -> None:
        """Stop counting until `resume`. Use it for evaluations that are not part of sampling."""
        self._paused = True

    def resume(self) -> None:
        """Continue counting."""
        self._paused = False

    def _on_network(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.network += 0 if self._paused else _rows(args, kwargs)

    def _on_output(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # Module backward hooks require tensor outputs, but diffusers networks return output dataclasses.
        values = (output,) if isinstance(output, Tensor) else output.values() if isinstance(output, dict) else output
        tracked = next((v for v in values if isinstance(v, Tensor) and v.requires_grad), None)
        if tracked is not None:
            tracked.register_hook(self._on_network_gradient)

    def _on_network_gradient(self, gradient: Tensor) -> None:
        self.network_backward += 0 if self._paused else len(gradient)

    def _on_decoder(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.decoder += 0 if self._paused else _rows(args, kwargs)

    def _on_forward(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.classifier_forward += 0 if self._paused else _rows(args, kwargs)

    def _on_backward(self, _: nn.Module, grad_input: Any, grad_output: tuple[Tensor, ...]) -> None:
        self.classifier_backward += 0 if self._paused else len(grad_output[0])


def _rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.ndim:
            return len(value)
    raise RunError("the network was called without a batched tensor, so its evaluations cannot be counted.")

"""Inputs: the conditions of the samples, such as labels and prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of B samples besides noise. Every tensor has B rows.

    The inputs of sample i depend only on i, not on its batch.

    Attributes:
        count: number of samples, B.
        labels: class label of each sample, (B,) int64. None without labels.
        prompts: prompt index of each sample, (B,) int64. None without prompts.
        tensors: other inputs by name, each (B, ...). Examples are "observation", the measurement y of an inverse
            problem, and "truth", its ground truth x₀. `Model.condition` passes them to the network.

    Raises:
        ValueError: if a tensor does not have B rows.
    """

    count: int
    labels: Tensor | None = None
    prompts: Tensor | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tensor in self._named().items():
            if not tensor.ndim or len(tensor) != self.count:
                raise ValueError(f"the input {name} has shape {tuple(tensor.shape)}; it must have {self.count} rows")

    def __len__(self) -> int:
        return self.count

    @property
    def chosen(self) -> Tensor | None:
        """The label or the prompt index of each sample, (B,) int64. None without labels and prompts."""
        return self.prompts if self.labels is None else self.labels

    def rows(self, index: Tensor) -> Inputs:
        """Return the inputs of the rows `index`, (k,) int64."""
        return self._map(len(index), lambda tensor: tensor[index.to(tensor.device)])

    def to(self, device: object) -> Inputs:
        """Return the inputs with all tensors on a device."""
        return self._map(self.count, lambda tensor: tensor.to(device))  # type: ignore[call-overload]

    def clone(self) -> Inputs:
        """Return a copy with cloned tensors."""
        return self._map(self.count, lambda tensor: tensor.clone())

    def copy_(self, other: Inputs) -> None:
        """Copy the rows of `other` into the first rows. Fill the remaining rows with the last row of `other`.

        Args:
            other: inputs with the same names and 1 to B rows.
        """
        theirs = other._named()
        for name, tensor in self._named().items():
            tensor[: other.count].copy_(theirs[name])
            tensor[other.count :].copy_(theirs[name][-1])

    def extended(self, **tensors: Tensor) -> Inputs:
        """Return a copy with additional named tensors, each (B, ...)."""
        return replace(self, tensors={**self.tensors, **tensors})

    def _named(self) -> dict[str, Tensor]:
        named = {"labels": self.labels, "prompts": self.prompts, **self.tensors}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _map(self, count: int, change: Callable[[Tensor], Tensor]) -> Inputs:
        return Inputs(
            count,
            None if self.labels is None else change(self.labels),
            None if self.prompts is None else change(self.prompts),
            {name: change(tensor) for name, tensor in self.tensors.items()},
        )

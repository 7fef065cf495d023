"""Inputs: what samples are given besides noise, row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Inputs:
    """What each of B samples is given besides noise. Every tensor has B rows.

    The inputs of sample i are a function of i alone, so they do not depend on the batch that i is in.

    Attributes:
        count: B, the number of samples.
        labels: (B,) int64, the class label of each sample; None without labels.
        prompts: (B,) int64, which of the model's prompts each sample is given; None without prompts.
        tensors: other inputs by name, each (B, ...), for example "observation" (y of an inverse problem) or "truth"
            (the x₀ behind it). A model that uses one says so in `Model.condition`.

    Raises:
        ValueError: a tensor with another number of rows.
    """

    count: int
    labels: Tensor | None = None
    prompts: Tensor | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tensor in self._named().items():
            if not tensor.ndim or len(tensor) != self.count:
                raise ValueError(
                    f"the input {name} has the shape {tuple(tensor.shape)}; it must have {self.count} rows"
                )

    def __len__(self) -> int:
        return self.count

    @property
    def chosen(self) -> Tensor | None:
        """(B,) int64, the label or the prompt of each sample; None where samples have neither."""
        return self.prompts if self.labels is None else self.labels

    def rows(self, index: Tensor) -> Inputs:
        """The inputs of the rows `index`, (k,) int64."""
        return self._map(len(index), lambda tensor: tensor[index.to(tensor.device)])

    def to(self, device: object) -> Inputs:
        """The inputs with every tensor on a device."""
        return self._map(self.count, lambda tensor: tensor.to(device))  # type: ignore[call-overload]

    def clone(self) -> Inputs:
        """A copy whose tensors share no memory with these."""
        return self._map(self.count, lambda tensor: tensor.clone())

    def copy_(self, other: Inputs) -> None:
        """Overwrite the first rows with those of `other`, and the remaining rows with its last one.

        Args:
            other: inputs of the same names, with 1 to B rows.
        """
        theirs = other._named()
        for name, tensor in self._named().items():
            tensor[: other.count].copy_(theirs[name])
            tensor[other.count :].copy_(theirs[name][-1])

    def extended(self, **tensors: Tensor) -> Inputs:
        """The same inputs with further tensors, each (B, ...), by name."""
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

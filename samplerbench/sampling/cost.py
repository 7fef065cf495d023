"""The cost of sampling: network evaluations and seconds."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Cost:
    """The number of rows (samples of a batch) processed by each network.

    Costs can be added, and multiplied by a number of samples.

    Attributes:
        network: rows evaluated by the network.
        network_backward: rows through which the network was differentiated.
        classifier_forward: rows evaluated by a classifier.
        classifier_backward: rows through which a classifier was differentiated.
        decoder: rows decoded from latents to images.
    """

    network: int = 0
    network_backward: int = 0
    classifier_forward: int = 0
    classifier_backward: int = 0
    decoder: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: int) -> Cost:
        return Cost(*(a * times for a in astuple(self)))

    def per_image(self, n: int) -> dict[str, int | float]:
        """The average cost per image, keyed by the field names of a result. Whole averages are integers."""
        names = ("nfe", "network_backward", "classifier_forward", "classifier_backward", "decoder_passes")
        return {name: rows // n if rows % n == 0 else rows / n for name, rows in zip(names, astuple(self), strict=True)}


@dataclass(frozen=True)
class Seconds:
    """Time spent by one process, in seconds. Instances can be added.

    Attributes:
        sampling: time from the initial noise to the quantised images, excluding decoding.
        decoding: time to decode latents to images.
        measuring: time to compute features and metrics.
    """

    sampling: float = 0.0
    decoding: float = 0.0
    measuring: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

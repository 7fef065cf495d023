"""What sampling cost: evaluations and seconds, each counted once and added."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Cost:
    """Rows (samples of a batch) that passed through each network; costs add, and scale by a number of samples.

    Attributes:
        network: rows evaluated by the network.
        network_backward: rows through which the network was differentiated.
        classifier_forward: rows evaluated by a classifier.
        classifier_backward: rows through which a classifier was differentiated.
        decoder: rows decoded, from latents to images.
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
        """The cost of one of n images, by the names of a result: whole numbers where they are whole."""
        names = ("nfe", "network_backward", "classifier_forward", "classifier_backward", "decoder_passes")
        return {name: rows // n if rows % n == 0 else rows / n for name, rows in zip(names, astuple(self), strict=True)}


@dataclass(frozen=True)
class Seconds:
    """Time spent by one process; adds.

    Attributes:
        sampling: from the first noise to the quantised images, without decoding.
        decoding: from latents to images.
        measuring: features and metrics.
    """

    sampling: float = 0.0
    decoding: float = 0.0
    measuring: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

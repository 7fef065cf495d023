"""What a solver's order of convergence depends on: the noise level of the start, and steps that are uneven.

The claim of `convergence` is measured from σ = 157 (tests/test_orders.py). Here, on the mixture: from noise levels of
the data's size, where the first steps of a multistep method count; on Karras' grid and on alternating steps.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from samplerbench import registry
from samplerbench.sampling import Sampler
from samplerbench.testing.checks import NotApplicableError, checks_for
from samplerbench.testing.sampler import UNEVEN, Shape, measure_order, order_errors

COUNTS = (128, 256, 512)
DROPS = {"dpm++:order=3": 2, "unipc:order=3,corrector=false": 2, "deis:order=3": 2, "ipndm:order=4": 2, "unipc": 3}
"""Multistep methods that start with steps of lower order, and the order which that leaves."""


def sampler(spec: str, **more: object) -> Sampler:
    tail = ",".join(f"{key}={value}" for key, value in more.items())
    return registry.parse("sampler", spec + (f"{',' if ':' in spec else ':'}{tail}" if tail else ""))


def local_order(made: Sampler, start: float, counts: tuple[int, int] = (512, 1024)) -> float:
    """The order between two N, which is nearer to the asymptotic one than a fit."""
    (a, coarse), (b, fine) = order_errors(made, "mixture", start, counts=counts)
    return float(torch.tensor(coarse / fine).log() / torch.tensor(b / a).log())


@pytest.mark.parametrize("spec", DROPS)
def test_first_steps_of_lower_order_cost_order_from_a_small_start(spec: str) -> None:
    made = sampler(spec)
    assert made.convergence_from_any_start() == DROPS[spec] < (made.convergence() or 0)
    assert DROPS[spec] - 0.2 <= local_order(made, 2.0) <= DROPS[spec] + 0.35


@pytest.mark.parametrize("start", [5.0, 2.0])
@pytest.mark.parametrize("spec", [*DROPS, "deis:order=2", "ipndm:order=3"])
def test_a_singlestep_start_keeps_the_order_from_any_start(spec: str, start: float) -> None:
    made = sampler(spec, start="singlestep")
    assert made.convergence_from_any_start() == made.convergence()
    slope, _ = measure_order(made, "mixture", start, counts=COUNTS)
    assert slope == pytest.approx(made.convergence(), abs=0.2)


@pytest.mark.parametrize("spec", ["dpm++", "unipc:order=2", "deis:order=1", "dpm-solver:order=3", "heun"])
def test_methods_whose_first_steps_suffice_have_their_order_from_any_start(spec: str) -> None:
    made = sampler(spec)
    assert made.convergence_from_any_start() == made.convergence()
    slope, _ = measure_order(made, "mixture", 2.0, counts=COUNTS)
    assert slope == pytest.approx(made.convergence(), abs=0.2)


@pytest.mark.parametrize("spec", [*DROPS, "deis:order=2", "ipndm:order=3"])
def test_the_evaluations_of_a_singlestep_start_are_counted_and_foretold(spec: str) -> None:
    made = sampler(spec, start="singlestep")
    (check,) = [c for c in checks_for(made) if c.name == "nfe"]
    check()
    extra = {"dpm++:order=3": 1, "unipc:order=3,corrector=false": 1, "unipc": 2, "deis:order=2": 1, "ipndm:order=3": 1}
    assert made.nfe(20) == 20 + extra.get(spec, 4)
    assert made.nfe(1) == 1


@pytest.mark.parametrize("spec", ["dpm++", "dpm++:order=1", "unipc:order=2", "deis:order=1", "ipndm:order=2"])
def test_a_start_that_needs_no_help_is_left_as_it_is(spec: str) -> None:
    plain, helped = (
        order_errors(made, "mixture", counts=(32,)) for made in (sampler(spec), sampler(spec, start="singlestep"))
    )
    assert plain == helped
    assert sampler(spec, start="singlestep").nfe(20) == 20


@pytest.mark.parametrize("shape", UNEVEN)
@pytest.mark.parametrize(
    "spec", ["dpm++", "dpm++:order=3", "unipc", "unipc:order=2,variant=B1", "deis", "deis:variable=sigma", "heun"]
)
def test_the_order_holds_on_uneven_steps(spec: str, shape: Shape) -> None:
    made = sampler(spec)
    slope, _ = measure_order(made, "mixture", shape=shape, counts=COUNTS)
    assert slope == pytest.approx(made.convergence(), abs=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("order", [2, *(pytest.param(order, marks=pytest.mark.slow) for order in (3, 4))])
def test_constant_weights_lose_the_order_on_alternating_steps_and_ipndm_says_so(order: int) -> None:
    made = sampler(f"ipndm:order={order}")
    errors = [error for _, error in order_errors(made, "mixture", shape="alternating", counts=(256, 1024, 4096))]
    for coarse, fine in pairwise(errors):
        assert coarse / fine < 4**1.3
    even = [error for _, error in order_errors(made, "mixture", counts=(1024, 4096))]
    assert even[0] / even[1] > 4**1.9
    assert made.uniform_steps_only
    (check,) = [c for c in checks_for(made) if c.name == "order-uneven"]
    with pytest.raises(NotApplicableError, match="even steps only"):
        check()


def test_no_other_built_in_sampler_needs_even_steps() -> None:
    names = {entry.name for entry in registry.entries("sampler")}
    assert {name for name in names if sampler(name).uniform_steps_only} == {"ipndm"}

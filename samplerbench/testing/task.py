"""The checks of a task, by the definitions of the adjoint and of the Moore-Penrose inverse."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.sampling import Inputs, LinearOperator, Observation, Operator, Task
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.sampling.task import operator_of
from samplerbench.testing.checks import NotApplicableError
from samplerbench.testing.common import (
    Checks,
    check_documented,
    check_picklable,
    require,
    same,
    untouched_random_state,
)

_SHAPES = ((1, 8, 8), (3, 8, 12), (3, 16, 16))
_B = 5


def _operators(task: Task) -> Iterator[Operator]:
    """The operators for those shapes that the task supports, at least one."""
    refused: UserError | None = None
    supported = 0
    for shape in _SHAPES:
        try:
            operator = operator_of(task, shape)
        except UserError as error:
            refused = error
            continue
        supported += 1
        yield operator
    if not supported and refused is not None:
        raise refused


def _linear(task: Task) -> Iterator[LinearOperator]:
    if not task.linear:
        raise NotApplicableError("it says that it is not linear")
    for operator in _operators(task):
        assert isinstance(operator, LinearOperator)
        yield operator


def _random(shape: tuple[int, ...], draw: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return normal(3, Purpose.PRIOR, torch.arange(_B), draw, shape).to(dtype)


def _distance(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value of b."""
    return same(a, b) / max(float(b.abs().max()), 1e-300)


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference of real or complex tensors."""
    return float((a - b).abs().max())


def check_shapes(task: Task) -> str:
    """The observation has the shape that the operator states."""
    seen = []
    for operator in _operators(task):
        y = operator.forward(_random(operator.shape))
        require(
            tuple(y.shape) == (_B, *operator.observed), f"A x has shape {tuple(y.shape)[1:]}, not {operator.observed}"
        )
        seen.append(f"{'x'.join(map(str, operator.shape))} to {'x'.join(map(str, operator.observed))}")
    return ", ".join(seen)


def check_linear(task: Task) -> str:
    """A(2 x - 3 z) = 2 A x - 3 A z."""
    worst = 0.0
    for operator in _linear(task):
        x, z = _random(operator.shape), _random(operator.shape, 1)
        expected = 2 * operator.forward(x) - 3 * operator.forward(z)
        worst = max(worst, _distance(operator.forward(2 * x - 3 * z), expected))
    require(worst <= 1e-10, f"A(2 x - 3 z) differs from 2 A x - 3 A z by {worst:.1e}")
    return f"differ by {worst:.1e}"


def check_adjoint(task: Task) -> str:
    """⟨A x, y⟩ = ⟨x, Aᵀ y⟩."""
    worst = 0.0
    for operator in _linear(task):
        x, y = _random(operator.shape), _random(operator.observed, 1)
        left = (operator.forward(x) * y).flatten(1).sum(1)
        right = (x * operator.adjoint(y)).flatten(1).sum(1)
        worst = max(worst, same(left, right) / math.sqrt(y[0].numel()))
    require(worst <= 1e-10, f"⟨A x, y⟩ and ⟨x, Aᵀ y⟩ differ by {worst:.1e}")
    return f"differ by {worst:.1e}"


def check_pseudo_inverse(task: Task) -> str:
    """A A⁺ A = A, A⁺ A A⁺ = A⁺, and A⁺ A and A A⁺ are symmetric."""
    worst = 0.0
    for operator in _linear(task):
        forward, inverse = operator.forward, operator.pseudo_inverse
        x, y = _random(operator.shape), _random(operator.observed, 1)
        z, w = _random(operator.shape, 2), _random(operator.observed, 3)
        worst = max(worst, _distance(forward(inverse(forward(x))), forward(x)))
        worst = max(worst, _distance(inverse(forward(inverse(y))), inverse(y)))
        for apply, a, b in ((lambda t: inverse(forward(t)), x, z), (lambda t: forward(inverse(t)), y, w)):  # noqa: B023
            left, right = (apply(a) * b).flatten(1).sum(1), (a * apply(b)).flatten(1).sum(1)
            worst = max(worst, same(left, right) / math.sqrt(a[0].numel()))
    require(worst <= 1e-8, f"the equations of Penrose (1955) are violated by {worst:.1e}")
    return f"differ by {worst:.1e}"


def check_solve(task: Task) -> str:
    """(s A Aᵀ + t I) solve(r, s, t) = r, also with one s and t for each sample."""
    worst = 0.0
    for operator in _linear(task):
        r = _random(operator.observed)
        numbers = torch.linspace(0.2, 2, _B, dtype=torch.float64)
        for s, t in ((1.0, 0.3), (0.7, 2.0), (numbers, numbers.flip(0))):
            u = operator.solve(r, s, t)
            wide = [n.reshape(-1, *[1] * (r.ndim - 1)) if isinstance(n, Tensor) else n for n in (s, t)]
            worst = max(worst, _distance(wide[0] * operator.forward(operator.adjoint(u)) + wide[1] * u, r))
    require(worst <= 1e-8, f"the solution leaves a residual of {worst:.1e}")
    return f"residual {worst:.1e}"


def check_svd(task: Task) -> str:
    """Uᵀ A = S Vᵀ, A V Vᵀ = A, Vᵀ V = I, and V Vᵀ is a symmetric projection."""
    worst, supported = 0.0, 0
    for operator in _linear(task):
        svd = operator.svd()
        if svd is None:
            continue
        supported += 1
        require(bool((svd.values >= 0).all()), "a singular value is negative")
        x, z = _random(operator.shape), _random(operator.shape, 1)
        c = svd.v_adjoint(x)
        inside = svd.v(c)
        require(inside.shape == x.shape, f"V Vᵀ x has shape {tuple(inside.shape)[1:]}, not {operator.shape}")
        worst = max(worst, _difference(svd.u_adjoint(operator.forward(x)), svd.values * c))
        worst = max(worst, same(operator.forward(inside), operator.forward(x)))
        worst = max(worst, _difference(svd.v_adjoint(inside), c))
        left, right = (inside * z).flatten(1).sum(1), (x * svd.v(svd.v_adjoint(z))).flatten(1).sum(1)
        worst = max(worst, same(left, right) / math.sqrt(x[0].numel()))
    if not supported:
        raise NotApplicableError("it has no singular value decomposition")
    require(worst <= 1e-8, f"the equations of the singular value decomposition are violated by {worst:.1e}")
    return f"differ by {worst:.1e}"


def check_gradient(task: Task) -> str:
    """`pullback` is the derivative: ⟨r, A(x + h z) - A(x - h z)⟩/(2h) for small h."""
    worst, h = 0.0, 1e-6
    for operator in _operators(task):
        x, z, r = _random(operator.shape), _random(operator.shape, 1), _random(operator.observed, 2)
        slope = ((operator.forward(x + h * z) - operator.forward(x - h * z)) * r).flatten(1).sum(1) / (2 * h)
        product = (operator.pullback(x, r) * z).flatten(1).sum(1)
        worst = max(worst, same(slope, product) / float(slope.abs().max()))
        with torch.enable_grad():
            leaf = x.clone().requires_grad_(True)
            (by_autograd,) = torch.autograd.grad(operator.forward(leaf), leaf, r)
        worst = max(worst, _distance(by_autograd, operator.pullback(x, r)))
    require(worst <= 1e-5, f"the derivative differs by {worst:.1e}")
    return f"differ by {worst:.1e}"


def check_batch_split(task: Task) -> str:
    """A x of an image does not depend on the batch that it is in, and x is not modified."""
    worst = 0.0
    for operator in _operators(task):
        x = _random(operator.shape)
        copy = x.clone()
        together = operator.forward(x)
        alone = torch.cat([operator.forward(x[i : i + 1]) for i in range(_B)])
        require(torch.equal(x, copy), "the images were written into")
        require(together.data_ptr() != x.data_ptr(), "A x shares the memory of x; return a copy")
        worst = max(worst, same(together, alone))
    require(worst <= 1e-12, f"A x changes by {worst:.1e} with the batch")
    return f"differ by {worst:.1e}"


def check_dtype(task: Task) -> str:
    """It keeps float32 and float64, and they agree."""
    worst = 0.0
    for operator in _operators(task):
        x = _random(operator.shape)
        single, double = operator.forward(x.float()), operator.forward(x)
        require(single.dtype == torch.float32, f"A of float32 images is {single.dtype}")
        require(double.dtype == torch.float64, f"A of float64 images is {double.dtype}")
        worst = max(worst, same(single, double))
    require(worst <= 1e-4, f"float32 and float64 differ by {worst:.1e}")
    return f"differ by {worst:.1e}"


def check_observation(task: Task) -> str:
    """The observation of an image depends on the image, the task and the seed alone. Its noise has deviation σ_y."""
    with untouched_random_state():
        operator = next(_operators(task))
        again = next(_operators(task))
        images = _random(operator.shape).clamp(-1, 1)
        index = torch.arange(3 * _B)
        whole = Observation(task, operator, images, 7).extend(index, Inputs(len(index))).tensors
        parts = Observation(task, again, images, 7).extend(index[4:6], Inputs(2)).tensors
        other = Observation(task, operator, images, 8).extend(index, Inputs(len(index))).tensors
    y = whole["observation"]
    changed = same(y[4:6], parts["observation"])
    require(changed <= 1e-12, f"an observation changes by {changed:.1e} with the batch, or from call to call")
    changed = same(y[:_B], y[_B : 2 * _B])
    require(changed <= 1e-12, f"two samples of one image have observations that differ by {changed:.1e}")
    require(torch.equal(whole["truth"][:_B], images), "the truth is not the image")
    if task.sigma == 0:
        require(same(y, other["observation"]) <= 1e-12, "σ_y = 0, but the seed changes the observation")
        return "no noise"
    noise = torch.cat([(t["observation"] - operator.forward(t["truth"]))[:_B].flatten() for t in (whole, other)])
    ratio = float(noise.std()) / task.sigma
    require(abs(ratio - 1) < 6 / math.sqrt(2 * len(noise)), f"its noise has deviation {ratio:.3f} σ_y")
    return f"noise of deviation {ratio:.3f} σ_y"


CHECKS: Checks = [
    ("documented", check_documented),
    ("picklable", check_picklable),
    ("shapes", check_shapes),
    ("linear", check_linear),
    ("adjoint", check_adjoint),
    ("pseudo-inverse", check_pseudo_inverse),
    ("solve", check_solve),
    ("svd", check_svd),
    ("gradient", check_gradient),
    ("batch-split", check_batch_split),
    ("dtype", check_dtype),
    ("observation", check_observation),
]

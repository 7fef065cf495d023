"""Philox4x32-10 and the noise made of it."""

import math
import random

import pytest
import scipy.stats
import torch

from samplerbench.errors import UserError
from samplerbench.sampling.noise import Noise, Purpose, normal, philox, split_seed, uniform

WORD = 0xFFFFFFFF
ONES = (WORD,) * 4


def slow_philox(counter: tuple[int, ...], key: tuple[int, ...]) -> list[int]:
    """Philox4x32-10 in whole numbers, written from Salmon et al. 2011, section 3.3."""
    L0, R0, L1, R1 = counter[1], counter[0], counter[3], counter[2]
    for r in range(10):
        k0, k1 = (key[0] + r * 0x9E3779B9) % 2**32, (key[1] + r * 0xBB67AE85) % 2**32
        wide0, wide1 = 0xD2511F53 * R0, 0xCD9E8D57 * R1
        R0, L0, R1, L1 = wide1 // 2**32 ^ L0 ^ k0, wide1 % 2**32, wide0 // 2**32 ^ L1 ^ k1, wide0 % 2**32
    return [R0, L0, R1, L1]


def slow_normal(seed: int, purpose: int, index: int, draw: int, size: int) -> list[float]:
    """Box-Muller on slow_philox: the layout that every published result depends on."""
    found: list[float] = []
    for block in range(math.ceil(size / 4)):
        words = slow_philox((block, draw, index, purpose), (seed % 2**32, seed // 2**32))
        a, b, c, d = ((w + 0.5) / 2**32 for w in words)
        for u, v in ((a, b), (c, d)):
            r = math.sqrt(-2 * math.log(u))
            found += [r * math.cos(2 * math.pi * v), r * math.sin(2 * math.pi * v)]
    return found[:size]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (ONES, (WORD, WORD), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers_of_random123(counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]) -> None:
    assert tuple(int(word) for word in philox(counter, key)) == answer
    assert tuple(slow_philox(counter, key)) == answer


def test_agrees_with_whole_number_arithmetic_on_random_counters() -> None:
    rng = random.Random(0)
    key = (rng.getrandbits(32), rng.getrandbits(32))
    # The corners of the range, where a product of two words needs all 64 bits, beside random counters.
    counters = [
        tuple(rng.choice([0, 1, 2**31 - 1, 2**31, WORD, rng.getrandbits(32)]) for _ in range(4)) for _ in range(200)
    ]
    words = philox(torch.tensor(counters).T.unbind(), key)
    assert torch.stack(words, dim=1).tolist() == [slow_philox(c, key) for c in counters]


def test_counters_broadcast() -> None:
    rows, columns = torch.arange(3)[:, None], torch.arange(5)[None, :]
    words = philox((columns, 7, rows, 1), (3, 4))
    assert all(word.shape == (3, 5) and word.dtype == torch.int64 for word in words)
    assert [int(word[2, 4]) for word in words] == slow_philox((4, 7, 2, 1), (3, 4))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5), (1,), (7,)])
def test_normal_is_box_muller_of_philox(shape: tuple[int, ...]) -> None:
    seed, index = 2**40 + 17, [0, 5, WORD]
    z = normal(seed, Purpose.STEP, torch.tensor(index), 9, shape)
    assert z.shape == (3, *shape)
    assert z.dtype == torch.float64
    expected = [slow_normal(seed, 1, i, 9, math.prod(shape)) for i in index]
    torch.testing.assert_close(z.flatten(1), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-13)


def test_uniform_is_the_first_word() -> None:
    u = uniform(3, Purpose.LABEL, torch.tensor([0, 1, 2]))
    expected = [(slow_philox((0, 0, i, 2), (3, 0))[0] + 0.5) / 2**32 for i in range(3)]
    assert u.tolist() == expected


def test_a_sample_is_the_same_in_any_batch_and_order() -> None:
    index = torch.arange(23)
    whole = normal(1, Purpose.PRIOR, index, 0, (1, 4, 4))
    for size in (1, 7, 23):
        parts = [normal(1, Purpose.PRIOR, part, 0, (1, 4, 4)) for part in index.split(size)]
        assert torch.equal(torch.cat(parts), whole)
    shuffled = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    assert torch.equal(normal(1, Purpose.PRIOR, shuffled, 0, (1, 4, 4)), whole[shuffled])


@pytest.mark.parametrize(
    ("seed", "purpose", "draw"),
    [
        (6, Purpose.PRIOR, 0),
        (5 + 2**32, Purpose.PRIOR, 0),
        (5, Purpose.STEP, 0),
        (5, Purpose.LABEL, 0),
        (5, Purpose.PRIOR, 1),
    ],
)
def test_streams_are_separate(seed: int, purpose: Purpose, draw: int) -> None:
    index = torch.arange(50)
    a, b = normal(5, Purpose.PRIOR, index, 0, (64,)), normal(seed, purpose, index, draw, (64,))
    assert not bool((a == b).any())
    # 3200 pairs of independent numbers: the correlation has a standard deviation of 0.018.
    assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.07


def test_moments_and_distribution_are_those_of_a_normal() -> None:
    z = normal(0, Purpose.PRIOR, torch.arange(2000), 0, (1, 8, 8)).flatten()
    n = len(z)
    assert abs(float(z.mean())) < 4 / math.sqrt(n)
    assert abs(float(z.square().mean()) - 1) < 4 * math.sqrt(2 / n)
    assert abs(float(z.pow(3).mean())) < 4 * math.sqrt(15 / n)
    assert abs(float(z.pow(4).mean()) - 3) < 4 * math.sqrt(96 / n)
    assert scipy.stats.kstest(z.numpy(), "norm").pvalue > 0.01


def test_neither_pixels_nor_samples_are_correlated() -> None:
    z = normal(0, Purpose.STEP, torch.arange(4000), 3, (16,))
    for rows in (z.T, z[:1600].reshape(16, -1)):
        off = torch.corrcoef(rows) - torch.eye(16, dtype=torch.float64)
        assert float(off.abs().max()) < 5 / math.sqrt(rows.shape[1])


def test_the_largest_and_the_smallest_word_give_finite_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in (0, WORD):
        monkeypatch.setattr("samplerbench.sampling.noise.philox", lambda *_, w=word: [torch.full((1, 1), w)] * 4)
        z = normal(0, Purpose.PRIOR, torch.tensor([0]), 0, (4,))
        assert bool(z.isfinite().all())
        assert float(z.abs().max()) < 7  # √(-2 log 2⁻³³) = 6.76
        assert 0 < float(uniform(0, Purpose.LABEL, torch.tensor([0]))) < 1


def test_seeds_are_64_bits() -> None:
    assert split_seed(0) == (0, 0)
    assert split_seed(2**64 - 1) == (WORD, WORD)
    assert split_seed(2**32 + 5) == (5, 1)
    for seed in (-1, 2**64):
        with pytest.raises(UserError, match=str(seed)):
            split_seed(seed)


def test_noise_draws_the_steps_in_turn_and_counts_them() -> None:
    index = torch.tensor([4, 9])
    noise = Noise(7, index, (1, 2, 2), torch.float32)
    assert noise.draws == 0
    drawn = [noise() for _ in range(3)]
    assert noise.draws == 3
    for k, z in enumerate(drawn):
        assert z.dtype == torch.float32
        assert torch.equal(z, normal(7, Purpose.STEP, index, k, (1, 2, 2)).float())


def test_torchs_own_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = normal(0, Purpose.PRIOR, torch.arange(3), 0, (4,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(normal(0, Purpose.PRIOR, torch.arange(3), 0, (4,)), first)

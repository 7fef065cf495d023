"""The bounds of a variational autoencoder, against a linear Gaussian one, whose likelihood is a closed form."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

import samplerbench
from samplerbench.cli.app import main
from samplerbench.errors import UserError
from samplerbench.likelihoods.elbo import ElboTerms, elbo_terms, optimal_variance
from samplerbench.likelihoods.images import Images, load_images
from samplerbench.models import Model
from samplerbench.models.exact import exact
from samplerbench.models.latent import Autoencoder
from samplerbench.sampling.noise import Purpose, normal

N, D, LATENT, VARIANCE = 400, 6, 3, 0.3


@dataclass
class LinearGaussian:
    """p(z) = N(0, I), p(x | z) = N(W z + b, s² I), whose posterior is N(C Wᵀ(x-b)/s², C), C = (I + WᵀW/s²)⁻¹.

    The columns of W are orthogonal, so that C is diagonal. The encoder is the posterior, or has another mean and
    variance.
    """

    shift: float = 0.0
    widen: float = 1.0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        q, _ = torch.linalg.qr(torch.randn(D, LATENT, generator=generator, dtype=torch.float64))
        self.w = q * torch.tensor([0.5, 1.0, 1.5], dtype=torch.float64)
        self.b = torch.linspace(-0.5, 0.5, D, dtype=torch.float64)
        self.c = 1 / (1 + self.w.square().sum(0) / VARIANCE)
        draws = torch.randn(2, N, D, generator=generator, dtype=torch.float64)
        x = draws[0, :, :LATENT] @ self.w.T + self.b + math.sqrt(VARIANCE) * draws[1]
        self.images = Images("draws", x.reshape(N, 1, 2, 3), None, None)
        covariance = self.w @ self.w.T + VARIANCE * torch.eye(D, dtype=torch.float64)
        self.nll = -MultivariateNormal(self.b, covariance).log_prob(x)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.c * ((x.flatten(1) - self.b) @ self.w) / VARIANCE
        return mean + self.shift, (self.c * self.widen).expand_as(mean)

    @property
    def autoencoder(self) -> Autoencoder:
        linear = self

        class Module(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.decoder = nn.Linear(1, 1).double()

            def encode(self, x: Tensor) -> Any:
                mean, variance = linear.moments(x)
                q = SimpleNamespace(mean=mean.reshape(-1, 1, 1, 3), logvar=variance.log().reshape(-1, 1, 1, 3))
                return SimpleNamespace(latent_dist=q)

            def decode(self, z: Tensor) -> Any:
                return SimpleNamespace(sample=(z.flatten(1) @ linear.w.T + linear.b).reshape(-1, 1, 2, 3))

        return Autoencoder(Module(), (1, 2, 3), (1, 1, 3), scale=0.7, shift=0.1)

    def terms(self, samples: int, **options: Any) -> ElboTerms:
        return elbo_terms(self.autoencoder, self.images, torch.arange(N), VARIANCE, samples, **options)


def test_the_bound_of_a_linear_gaussian_autoencoder_is_its_closed_form() -> None:
    """-ELBO = -log p(x) + KL(q ‖ posterior), and each term is torch's."""
    vae = LinearGaussian(shift=0.2, widen=1.5)
    found, x = vae.terms(64), vae.images.values
    mean, variance = vae.moments(x)
    q = Independent(Normal(mean, variance.sqrt()), 1)
    prior = Independent(Normal(torch.zeros_like(mean), 1.0), 1)
    assert torch.allclose(found.divergence, kl_divergence(q, prior), rtol=1e-10)
    # E_q‖x - Wz - b‖² = ‖x - Wμ - b‖² + Σ s²‖w‖²
    residual = x.flatten(1) - mean @ vae.w.T - vae.b
    expected = residual.square().sum(1) + (variance * vae.w.square().sum(0)).sum(1)
    reconstruction = 0.5 * (expected / VARIANCE + D * math.log(2 * math.pi * VARIANCE))
    difference = found.reconstruction - reconstruction
    assert abs(float(difference.mean())) < 4.5 * float(difference.std()) / math.sqrt(N)
    posterior = Independent(Normal(mean - vae.shift, (variance / vae.widen).sqrt()), 1)
    gap = kl_divergence(q, posterior)
    assert gap.min() > 0.1
    assert torch.allclose(found.divergence + reconstruction, vae.nll + gap, rtol=1e-10)
    assert torch.equal(found.total, found.divergence + found.reconstruction)


def test_the_bound_is_tight_for_the_exact_posterior() -> None:
    """p(x, z)/q(z | x) is p(x) for every z."""
    vae = LinearGaussian()
    for samples in (1, 5):
        found = vae.terms(samples)
        assert torch.allclose(found.importance_weighted, vae.nll, rtol=1e-10)
        difference = found.total - vae.nll
        assert abs(float(difference.mean())) < 4.5 * float(difference.std()) / math.sqrt(N)


def test_the_importance_weighted_bound_approaches_the_likelihood() -> None:
    vae = LinearGaussian(shift=0.2, widen=1.5)
    gaps = []
    for samples in (1, 4, 16, 100):
        found = vae.terms(samples)
        gap = found.importance_weighted - vae.nll
        assert gap.mean() > -4.5 * gap.std() / math.sqrt(N)
        gaps.append(float(gap.mean()))
        # By Jensen's inequality, it is below the mean of the same weights.
        assert found.importance_weighted.mean() < found.total.mean() + 0.2 / samples
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2] > 8 * gaps[3]
    assert abs(gaps[3]) < 0.02


def test_the_optimal_variance_has_the_best_bound() -> None:
    vae = LinearGaussian()
    best = optimal_variance(vae.autoencoder, vae.images)
    # E‖x - Wz - b‖²/d with z from the exact posterior is s², because (x, z) has the joint distribution.
    assert best == pytest.approx(VARIANCE, rel=4.5 * math.sqrt(2 / (N * D)))
    rows = torch.arange(N)

    def bound(variance: float) -> float:
        return float(elbo_terms(vae.autoencoder, vae.images, rows, variance, 1, seed=1).total.mean())

    assert bound(best) < min(bound(best * 1.3), bound(best / 1.3))


def test_an_image_does_not_depend_on_the_batch() -> None:
    vae = LinearGaussian()
    whole = vae.terms(3, seed=5)
    rows = torch.tensor([7, 2, 300])
    part = elbo_terms(vae.autoencoder, vae.images, rows, VARIANCE, 3, seed=5, batch_size=2)
    assert torch.allclose(part.total, whole.total[rows], rtol=1e-12)
    assert torch.allclose(part.importance_weighted, whole.importance_weighted[rows], rtol=1e-12)


# --- A diffusers autoencoder ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LDMPipeline of random weights, whose card names the digits' training images."""
    from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel

    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("latent")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(1, 1, block_out_channels=(4, 4), latent_channels=2, norm_num_groups=2, sample_size=8, **blocks)
    unet = UNet2DModel(
        4, 2, 2, block_out_channels=(4,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        layers_per_block=1, norm_num_groups=2, add_attention=False,
    )  # fmt: skip
    LDMPipeline(vae, unet, DDIMScheduler(clip_sample=False)).save_pretrained(out)
    card = {"what": "unet", "data": {"source": "digits:split=train", "name": "digits", "split": "train"}}
    (out / "samplerbench.json").write_text(json.dumps(card), encoding="utf-8")
    return out


@pytest.mark.slow
def test_the_bound_of_a_diffusers_autoencoder_is_that_of_its_parts(latent_model: Path) -> None:
    """With the decoder's mass between the grey levels, by torch's distribution function."""
    n, samples, variance = 5, 3, 0.4
    (found,) = samplerbench.likelihood(
        method="elbo", model=latent_model, n=n, samples=samples, decoder_variance=variance, device="cpu"
    )
    assert (found.sampler, found.steps, found.nfe, found.levels, found.n) == (None, None, 0, 17, n)
    assert found.data == "digits:split=held-out"
    assert found.bits_per_dim == pytest.approx(found.prior + found.reconstruction)
    vae = AutoencoderKL.from_pretrained(latent_model / "vqvae")
    images = load_images(exact("gaussian", shape="1x8x8"), found.data, n)
    x = -1 + 2 * images.values.double() / 16
    with torch.no_grad():
        q = vae.encode(x.float()).latent_dist
        log_weights, nlls = [], []
        for k in range(samples):
            z = q.mean + q.std * normal(0, Purpose.LIKELIHOOD, torch.arange(n), k, (2, 4, 4))
            decoder = Normal(vae.decode(z.float()).sample.double(), math.sqrt(variance))
            low = torch.where(images.values == 0, 0.0, decoder.cdf(x - 1 / 16))
            high = torch.where(images.values == 16, 1.0, decoder.cdf(x + 1 / 16))
            nll = -(high - low).log().flatten(1).sum(1)
            ratio = (Normal(0.0, 1.0).log_prob(z) - Normal(q.mean, q.std).log_prob(z)).flatten(1).sum(1)
            nlls.append(nll)
            log_weights.append((ratio - nll).exp())
    scale = 64 * math.log(2)
    assert found.prior == pytest.approx(float(q.kl().mean()) / scale, rel=1e-4)
    assert found.reconstruction == pytest.approx(float(torch.stack(nlls).mean()) / scale, rel=1e-4)
    weighted = found.importance_weighted
    assert weighted is not None
    assert (weighted.samples, weighted.decoder_passes, weighted.fitted_to) == (samples, samples, None)
    expected = -torch.stack(log_weights).mean(0).log().mean() / scale
    assert weighted.bits_per_dim == pytest.approx(float(expected), rel=1e-4)
    assert found.gap is not None


def test_the_command_prints_both_bounds(latent_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["likelihood", "--method", "elbo", "--model", str(latent_model), "--n", "4", "--samples", "2"]
    with pytest.raises(SystemExit):
        main([*arguments, "--json"])
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["method"], row["sampler"], row["steps"], row["n"]) == ("elbo", None, None, 4)
    terms, weighted = row["terms"], row["importance_weighted"]
    assert row["bits_per_dim"] == pytest.approx(terms["prior"] + terms["reconstruction"])
    assert terms["per_timestep"] == []
    assert (weighted["samples"], weighted["fitted_to"]) == (2, "digits:split=train")
    assert weighted["bits_per_dim"] <= row["bits_per_dim"] + 0.1
    with pytest.raises(SystemExit):
        main(arguments)
    shown = capsys.readouterr().out
    assert "IWAE, K = 2" in shown
    assert f"{row['bits_per_dim']:.4f}" in shown
    assert "fitted to digits:split=train" in shown


# --- Refusals -------------------------------------------------------------------------------------------------------


def latent(module: nn.Module) -> Model:
    model = exact("gaussian", shape="1x8x8")
    return replace(model, autoencoder=Autoencoder(module, (1, 8, 8), (1, 8, 8), 1.0))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"model": "digits"}, 'this model works in pixel space and has no autoencoder; use method="vlb"'),
        ({"model": "digits", "samplers": "ddpm"}, 'method="elbo" is the bound of an autoencoder, which has no sampler'),
        ({"model": "digits", "samples": 0}, "samples=0: at least 1 sample is needed"),
        ({"model": "digits", "decoder_variance": 0.0}, "decoder_variance=0.0: give a number from 1e-12 to 1e12"),
    ],
)
def test_wrong_input_is_one_line(arguments: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as raised:
        samplerbench.likelihood(method="elbo", n=2, **arguments)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_vector_quantised_autoencoder_has_no_bound() -> None:
    model = latent(VQModel(1, 1, block_out_channels=(4,), norm_num_groups=2, latent_channels=1))
    with pytest.raises(UserError, match="the encoder of this model, VQModel, is deterministic, so it has no evidence"):
        samplerbench.likelihood(method="elbo", model=model, n=2)

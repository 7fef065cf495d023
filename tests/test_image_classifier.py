"""Guidance by a classifier of clean images: its gradient against closed forms, its cost, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, make_cell, run_images
from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel
from support.denoising import denoiser, labelled
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as vision
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification, ViTModel

from samplerbench import registry
from samplerbench.bench import engine, setup
from samplerbench.errors import UserError
from samplerbench.models import Model
from samplerbench.models.exact import exact
from samplerbench.models.image_classifier import Preprocessing, load_image_classifier
from samplerbench.models.model import check_guidance
from samplerbench.sampling import Inputs, coefficient
from samplerbench.sampling.guidance import bind_guidance
from samplerbench.sampling.meter import Meter

SIDE, MEAN, STD = 12, [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
PREPROCESSOR = {"do_resize": True, "size": {"height": SIDE, "width": SIDE}, "image_mean": MEAN, "image_std": STD}
GREY = PREPROCESSOR | {"image_mean": [0.5], "image_std": [0.5]}
LEVEL = 0.8


def vit(labels: int, channels: int = 3) -> ViTConfig:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return ViTConfig(**sizes, image_size=SIDE, patch_size=4, num_channels=channels, num_labels=labels)


def save_classifier(
    folder: Path, labels: int = 2, channels: int = 3, preprocessor: dict[str, Any] | None = PREPROCESSOR
) -> str:
    """A tiny transformer with random weights, large enough to have an opinion."""
    torch.manual_seed(0)
    network = ViTForImageClassification(vit(labels, channels))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.6)
    network.save_pretrained(folder)
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor), "utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two labels, as the exact mixture has."""
    return save_classifier(tmp_path_factory.mktemp("classifier"))


def by_hand(folder: str, images: Tensor) -> Tensor:
    """log p(y | image), (B, K), with preprocessing written out."""
    network = ViTForImageClassification.from_pretrained(folder).double().eval()
    grey = vision.resize((images + 1) / 2, [SIDE, SIDE], antialias=True)
    colours = torch.cat([(grey - m) / s for m, s in zip(MEAN, STD, strict=True)], dim=1)
    return network(colours).logits.log_softmax(1)


def score(
    model: Model, folder: str, x: Tensor, labels: Tensor, sigma: float | Tensor = LEVEL, **options: Any
) -> Tensor:
    """What the guidance adds to D, by σ², for g = 1."""
    chosen = dataclasses.replace(registry.parse("guidance", "image-classifier"), weights=folder, **options)
    given = labels if options.get("conditional") else None
    with torch.no_grad():
        guided, free = denoiser(model, labels, len(x), chosen)(x, sigma), denoiser(model, given, len(x))(x, sigma)
    return (guided - free) / coefficient(sigma, x) ** 2


# --- The gradient ---------------------------------------------------------------------------------------------------


def test_of_a_gaussian_the_gradient_is_the_classifiers_times_the_denoisers_slope(folder: str) -> None:
    """D = (v x + σ² μ)/(v + σ²) in each pixel, so ∇ₓ log p(y | D) = v/(v + σ²) ∇_D log p(y | D)."""
    model, labels = exact("gaussian"), torch.tensor([0, 1, 1])
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    variance = model.problem.variances.reshape(1, 1, 8, 8)
    with torch.no_grad():
        x0 = denoiser(model, None, 3)(x, LEVEL)
    leaf = x0.clone().requires_grad_(True)
    by_hand(folder, leaf)[torch.arange(3), labels].sum().backward()
    assert leaf.grad is not None
    expected = variance / (variance + LEVEL**2) * leaf.grad
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(score(model, folder, x, labels), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("conditional", [False, True])
def test_of_a_mixture_it_is_the_slope_of_the_log_probability(folder: str, conditional: bool) -> None:
    """Against central differences in float64, along random directions."""
    model, labels = exact("mixture", width=0.5), torch.tensor([0, 1, 0])
    generator = torch.Generator().manual_seed(3)
    x, along = (torch.randn(3, 1, 8, 8, generator=generator).double() for _ in range(2))

    def log_p(state: Tensor) -> Tensor:
        with torch.no_grad():
            x0 = denoiser(model, labels if conditional else None, 3)(state, LEVEL)
            return by_hand(folder, x0)[torch.arange(3), labels]

    h = 1e-5
    slope = (log_p(x + h * along) - log_p(x - h * along)) / (2 * h)
    found = (score(model, folder, x, labels, conditional=conditional) * along).flatten(1).sum(1)
    torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-8)


def test_the_guidance_adds_g_sigma_squared_times_it(folder: str) -> None:
    model, labels = exact("mixture", width=0.5), torch.tensor([0, 1, 1])
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(4)).double()
    sigma = torch.tensor([0.3, 0.8, 2.0]).double()
    guided = denoiser(model, labels, 3, registry.parse("guidance", f"image-classifier:scale=3,weights={folder}"))
    with torch.no_grad():
        found, free = guided(x, sigma), denoiser(model, None, 3)(x, sigma)
    leaf = x.clone().requires_grad_(True)
    log_p = by_hand(folder, denoiser(model, None, 3)(leaf, sigma))[torch.arange(3), labels]
    (gradient,) = torch.autograd.grad(log_p.sum(), leaf)
    torch.testing.assert_close(found - free, 3 * sigma.reshape(3, 1, 1, 1) ** 2 * gradient, rtol=0, atol=1e-10)
    assert not found.requires_grad


def latent_folder(folder: Path) -> Path:
    """A latent model with random weights: 1x8x8 images, 2x4x4 latents."""
    torch.manual_seed(5)
    blocks: dict[str, Any] = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    autoencoder = AutoencoderKL(
        1,
        1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=2,
        scaling_factor=0.4,
        sample_size=8,
        mid_block_add_attention=False,
        **blocks,
    )
    network = UNet2DModel(
        4,
        2,
        2,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        attention_head_dim=4,
        **blocks,
    )
    LDMPipeline(autoencoder, network, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


def test_of_a_latent_model_the_classifier_sees_the_decoded_image(folder: str, tmp_path: Path) -> None:
    model, labels = setup.load_model(str(latent_folder(tmp_path)), CPU, "fp64"), torch.tensor([0, 1])
    autoencoder = AutoencoderKL.from_pretrained(tmp_path / "vqvae").double()
    generator = torch.Generator().manual_seed(6)
    x, along = (torch.randn(2, 2, 4, 4, generator=generator).double() for _ in range(2))

    def log_p(state: Tensor) -> Tensor:
        with torch.no_grad():
            images = autoencoder.decode(denoiser(model, None, 2)(state, LEVEL) / 0.4).sample
            return by_hand(folder, images)[torch.arange(2), labels]

    h = 1e-5
    slope = (log_p(x + h * along) - log_p(x - h * along)) / (2 * h)
    found = (score(model, folder, x, labels) * along).flatten(1).sum(1)
    assert slope.abs().min() > 1e-4
    torch.testing.assert_close(found, slope, rtol=1e-4, atol=1e-8)


def test_it_makes_its_label_likelier(folder: str) -> None:
    model, labels = exact("mixture", width=0.5), torch.arange(32) % 2
    spec = f"image-classifier:scale=20,weights={folder}"
    plain, guided = (run_images(model, "ddim", None, 10, 32, labels, guidance=g) for g in ("none", spec))
    chosen = [by_hand(folder, images)[torch.arange(32), labels].mean().item() for images in (plain, guided)]
    assert chosen[1] > chosen[0] + 0.1


# --- Its cost -------------------------------------------------------------------------------------------------------


def test_one_forward_and_one_backward_pass_of_both_are_counted(
    digits: Model, make_session: Callable[..., engine.Session], tmp_path: Path
) -> None:
    spec = f"image-classifier:weights={save_classifier(tmp_path / 'ten', labels=10)}"
    cell = make_cell(digits, "pf-ode:solver=heun", None, 3, spec)
    record = engine.run_cell(make_session(n=6, batch_size=4), cell).record
    names = ("nfe", "network_backward", "classifier_forward", "classifier_backward")
    assert [record[name] for name in names] == [5, 5, 5, 5]


def test_at_scale_0_nothing_is_differentiated(folder: str) -> None:
    model, labels = exact("mixture"), torch.tensor([0, 1])
    guidance = bind_guidance(registry.parse("guidance", f"image-classifier:scale=0,weights={folder}"), model)
    assert guidance is not None
    x = torch.zeros(2, *model.shape).double()
    with Meter(model.network, guidance.networks) as meter, torch.no_grad():
        denoiser(model, labels, 2, guidance)(x, 1.0)
    assert (meter.network, meter.network_backward, meter.classifier_forward) == (2, 0, 0)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++:order=3", "langevin", "pf-ode:solver=rk45", "unipc"])
def test_it_works_with_samplers_of_every_kind(folder: str, sampler: str) -> None:
    model, labels = exact("mixture", width=0.5), torch.arange(3) % 2
    spec = f"image-classifier:scale=5,weights={folder}"
    guided = run_images(model, sampler, None, 4, 3, labels, guidance=spec)
    assert guided.isfinite().all()
    assert not torch.equal(guided, run_images(model, sampler, None, 4, 3, labels, guidance="none"))


# --- Preprocessing --------------------------------------------------------------------------------------------------


def test_the_shorter_side_is_resized_and_the_middle_cropped() -> None:
    images = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = Preprocessing(3, None, 16, (14, 10), 1 / 255, tuple(MEAN), tuple(STD))(images)
    whole = vision.center_crop(vision.resize((images + 1) / 2, [16], antialias=True), [14, 10])
    torch.testing.assert_close(found, vision.normalize(whole, MEAN, STD), rtol=0, atol=1e-5)


def test_grey_levels_keep_their_range_where_nothing_rescales_them() -> None:
    images = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 1, 1, 3)
    found = Preprocessing(3, None, None, None, 1.0, (0.0,), (1.0,))(images)
    assert found.shape == (1, 3, 1, 3)
    assert found[0, 2, 0].tolist() == [0.0, 127.5, 255.0]


# --- What it refuses ------------------------------------------------------------------------------------------------


def refused(model: Model, folder: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        load_image_classifier(str(folder), model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_image_classifier_is_one_line(tmp_path: Path) -> None:
    model = exact("mixture")
    assert "the folder does not exist" in refused(model, tmp_path / "nowhere")
    assert "config.json does not exist" in refused(model, tmp_path)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertForSequenceClassification(BertConfig(**small, vocab_size=9)).save_pretrained(tmp_path / "text")
    assert "Unrecognized configuration class" in refused(model, tmp_path / "text")
    ViTModel(vit(2)).save_pretrained(tmp_path / "headless")
    assert "2 tensors are missing from its weights" in refused(model, tmp_path / "headless")
    save_classifier(tmp_path / "bare", preprocessor=None)
    assert "preprocessor_config.json does not exist" in refused(model, tmp_path / "bare")
    save_classifier(tmp_path / "odd", preprocessor=PREPROCESSOR | {"size": {"longest_edge": 9}})
    assert "preprocessor_config.json: size has no shortest_edge; it must be" in refused(model, tmp_path / "odd")
    save_classifier(tmp_path / "two", preprocessor=PREPROCESSOR | {"image_std": [0.5, 0.5]})
    assert "image_std is [0.5, 0.5]; it must be a list of 1 or 3 numbers" in refused(model, tmp_path / "two")


def test_a_classifier_of_other_images_or_labels_is_one_line(digits: Model, folder: str, tmp_path: Path) -> None:
    assert "has 2 labels, but the model has 10" in refused(digits, folder)
    grey = save_classifier(tmp_path / "grey", channels=1, preprocessor=GREY)
    assert "requires images with 1 channels, but the model has 3" in refused(exact("mixture", shape="3x8x8"), grey)
    load_image_classifier(grey, exact("mixture"))


def test_no_folder_and_no_such_label_are_one_line(digits: Model, folder: str) -> None:
    with pytest.raises(UserError, match="image-classifier:weights=FOLDER"):
        bind_guidance(registry.parse("guidance", "image-classifier"), digits)
    guidance = bind_guidance(registry.parse("guidance", f"image-classifier:weights={folder}"), exact("gaussian"))
    with pytest.raises(UserError, match="the classifier has the labels 0 to 1"):
        check_guidance(exact("gaussian"), guidance, labelled(torch.tensor([2])))
    with pytest.raises(UserError, match="requires labels"):
        check_guidance(exact("gaussian"), guidance, Inputs(1))
    assert setup.label_classes(exact("gaussian"), [guidance]) == 2

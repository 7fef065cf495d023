"""Training: exact resume, the objective against independent derivations, and folders that others can load."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CPU, run_images
from diffusers import DDPMPipeline
from scipy.stats import norm
from torch import Tensor, nn

from samplerbench.bench import setup
from samplerbench.data import ImageSet, load_data
from samplerbench.data.pixels import dequantise
from samplerbench.errors import UserError
from samplerbench.metrics.extractors import load_extractor
from samplerbench.models import Model
from samplerbench.models.classifier_guide import load_classifier
from samplerbench.models.schedule import alphas_cumprod
from samplerbench.training.classifier import ClassifierTask
from samplerbench.training.features import FeaturesTask
from samplerbench.training.flow import FlowTask
from samplerbench.training.loop import StepRandom, TrainSettings, batch_indices, fit, learning_rate
from samplerbench.training.unet import UNetSettings, UNetTask, variational_bound

TINY = UNetSettings(channels=(8, 8), groups=4, head_dim=4, dropout=0.1)
SHORT = TrainSettings(steps=24, batch_size=8, warmup=4, checkpoint_every=7, ema_decay=0.9, cpu=True)
BARS = alphas_cumprod({"beta_schedule": "linear", "num_train_timesteps": 1000})


@pytest.fixture(scope="module")
def data() -> ImageSet:
    return load_data("digits")


def tiny_task(data: ImageSet, seed: int = 0, settings: UNetSettings = TINY) -> UNetTask:
    torch.manual_seed(seed)
    return UNetTask(data, settings)


def randomness(batch: int) -> StepRandom:
    return StepRandom(0, 0, slice(0, batch), batch, CPU)


def card(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "samplerbench.json").read_text("utf-8"))


# --- The loop -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(data: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    out = tmp_path_factory.mktemp("trained")
    fit(tiny_task(data), data, SHORT, out, ["samplerbench", "train", "unet", "--out", "a folder"])
    return out


class Stopped(UNetTask):
    """Ctrl-C in the step of this number, counted from 1."""

    def __init__(self, data: ImageSet, settings: UNetSettings, at: int) -> None:
        super().__init__(data, settings)
        self.left = at

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor | None, random: StepRandom) -> Tensor:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().loss(network, images, labels, random)


def test_a_run_that_was_stopped_and_resumed_is_the_uninterrupted_run(
    data: ImageSet, trained: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    with pytest.raises(KeyboardInterrupt):
        fit(Stopped(data, TINY, at=23), data, SHORT, tmp_path)
    assert not (tmp_path / "samplerbench.json").exists()
    # Step 23 was lost with what came after the last checkpoint, 21. The new network begins from other weights.
    result = fit(tiny_task(data, seed=99), data, SHORT, tmp_path)
    assert result.resumed
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / weights).read_bytes() == (trained / weights).read_bytes()
    one, other = (card(folder)["training"] for folder in (tmp_path, trained))
    differing = {key for key in one if one[key] != other[key]}
    assert differing == {"seconds", "resumed"}


def test_a_run_whose_minutes_are_over_stops_at_a_checkpoint_and_goes_on(
    data: ImageSet, trained: Path, tmp_path: Path
) -> None:
    result = fit(tiny_task(data), data, replace(SHORT, minutes=1e-6), tmp_path)
    assert result.steps == 20 < SHORT.steps
    assert not result.complete
    assert not (tmp_path / "samplerbench.json").exists()
    assert fit(tiny_task(data, seed=99), data, SHORT, tmp_path).resumed
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / weights).read_bytes() == (trained / weights).read_bytes()


@pytest.mark.slow
def test_with_a_constant_learning_rate_a_training_can_be_made_longer(data: ImageSet, tmp_path: Path) -> None:
    settings = replace(SHORT, schedule="constant")
    whole, longer = tmp_path / "whole", tmp_path / "longer"
    fit(tiny_task(data), data, settings, whole)
    fit(tiny_task(data), data, replace(settings, steps=10), longer)
    assert card(longer)["training"]["steps"] == 10
    assert fit(tiny_task(data, seed=99), data, settings, longer).resumed
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (whole / weights).read_bytes() == (longer / weights).read_bytes()
    with pytest.raises(UserError, match=r"has 24 steps; use steps=24 or more, or another `out`"):
        fit(tiny_task(data), data, replace(settings, steps=10), longer)


@pytest.mark.slow
def test_a_cooldown_can_be_chosen_until_it_begins(data: ImageSet, tmp_path: Path) -> None:
    """Resumed before the cooldown, a training has the weights of one that had it from the start."""
    constant = replace(SHORT, schedule="constant", checkpoint_every=6)
    planned = replace(constant, steps=24, cooldown=12)
    whole, resumed, late = tmp_path / "whole", tmp_path / "resumed", tmp_path / "late"
    fit(tiny_task(data), data, planned, whole)
    weights = "unet/diffusion_pytorch_model.safetensors"
    fit(tiny_task(data), data, replace(constant, steps=12), resumed)
    shutil.copytree(resumed, late)
    fit(tiny_task(data, seed=99), data, planned, resumed)
    assert (whole / weights).read_bytes() == (resumed / weights).read_bytes()
    with pytest.raises(UserError, match=r"was made with steps 24, cooldown 12; use the same"):
        fit(tiny_task(data), data, replace(constant, steps=30), resumed)
    with pytest.raises(UserError, match=r"was made with steps 12, cooldown 0; use the same"):
        fit(tiny_task(data), data, replace(constant, steps=20, cooldown=9), late)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"cooldown": 5}, "`cooldown=5` requires `schedule=constant`"),
        ({"cooldown": 11, "schedule": "constant", "steps": 10}, "it must be at most `steps=10`"),
    ],
)
def test_a_cooldown_that_does_not_fit_is_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as error:
        TrainSettings(**settings)
    assert says.replace("`", "") in str(error.value).replace('"', "").replace("`", "")


def test_what_is_saved_is_the_average_of_the_weights(data: ImageSet, tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Watched(UNetTask):
        def loss(self, network: nn.Module, images: Tensor, labels: Tensor | None, random: StepRandom) -> Tensor:
            seen.append(network.conv_out.weight.detach().clone())
            return super().loss(network, images, labels, random)

    torch.manual_seed(0)
    task = Watched(data, TINY)
    fit(task, data, TrainSettings(steps=3, batch_size=8, warmup=0, lr=0.1, ema_decay=0.5, cpu=True), tmp_path)
    before, *states = *seen, task.network.conv_out.weight.detach()
    # diffusers' warm-up of the decay: min(0.5, (1 + k) / (10 + k)) in update k, 0 in the first.
    average = before
    for k, state in enumerate(states):
        decay = 0.0 if k == 0 else min(0.5, (1 + k) / (10 + k))
        average = decay * average + (1 - decay) * state
    saved = DDPMPipeline.from_pretrained(tmp_path).unet.conv_out.weight
    torch.testing.assert_close(saved.detach(), average)
    assert (average - states[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("change", [{"lr": 0.5}, {"batch_size": 16}, {"seed": 1}, {"steps": 48}])
def test_a_checkpoint_of_other_settings_is_refused_in_one_line(
    data: ImageSet, trained: Path, change: dict[str, Any]
) -> None:
    settings = replace(SHORT, **change)
    with pytest.raises(UserError) as caught:
        fit(tiny_task(data), data, settings, trained)
    (name,) = change
    assert f"was made with {name} {getattr(SHORT, name)}; use the same settings" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_objective_or_of_other_data_is_refused(data: ImageSet, trained: Path) -> None:
    with pytest.raises(UserError, match=re.escape("was made with label_dropout 0.1; use the same settings")):
        fit(tiny_task(data, settings=replace(TINY, label_dropout=0.5)), data, SHORT, trained)
    half = data.subset(torch.arange(900), "half")
    with pytest.raises(UserError, match=f"was made with data digits {data.sha256[:12]}; use the same settings"):
        fit(tiny_task(half), half, SHORT, trained)


def test_a_checkpoint_of_another_network_is_refused(data: ImageSet, trained: Path) -> None:
    task = tiny_task(data)
    task.network.conv_out = nn.Conv2d(8, 1, 1)
    with pytest.raises(UserError, match="is of another network; use another `out`"):
        fit(task, data, SHORT, trained)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"channels": (8, 10)}, "channels=10: each width must be a multiple of groups=4"),
        ({"head_dim": 16}, "channels=8: a width with attention must be a multiple of head_dim=16"),
        ({"channels": (8,) * 5}, "a U-Net of 5 resolutions needs square images whose side is a multiple of 16"),
    ],
)
def test_a_network_that_cannot_be_built_is_refused(data: ImageSet, change: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=re.escape(line)):
        UNetTask(data, replace(TINY, **change))


def test_each_epoch_is_a_permutation_of_the_images() -> None:
    n, batch_size, epochs = 10, 4, 6
    steps = n * epochs // batch_size
    drawn = torch.cat([batch_indices(n, batch_size, 3, step) for step in range(steps)]).reshape(epochs, n)
    assert drawn.sort(dim=1).values.tolist() == [list(range(n))] * epochs
    assert len({tuple(epoch) for epoch in drawn.tolist()}) == epochs
    assert not torch.equal(batch_indices(n, n, 3, 0), batch_indices(n, n, 4, 0))


def test_a_batch_larger_than_the_data_is_filled_from_several_epochs() -> None:
    assert torch.bincount(batch_indices(5, 15, 0, 0)).tolist() == [3] * 5


def test_the_learning_rate_warms_up_and_decays() -> None:
    cosine = TrainSettings(steps=110, lr=0.2, warmup=10)
    rates = [learning_rate(cosine, step) for step in range(111)]
    assert rates[:10] == pytest.approx([0.02 * k for k in range(1, 11)])
    assert rates[60] == pytest.approx(0.1)  # half way down the half cosine
    assert rates[10] == pytest.approx(0.2)
    assert rates[110] == pytest.approx(0)
    assert all(later < sooner for sooner, later in pairwise(rates[10:]))
    constant = TrainSettings(steps=110, lr=0.2, warmup=10, schedule="constant")
    assert {learning_rate(constant, step) for step in range(9, 110)} == {0.2}
    cooled = replace(constant, cooldown=20)
    rates = [learning_rate(cooled, step) for step in range(110)]
    assert set(rates[9:91]) == {0.2}
    assert rates[100] == pytest.approx(0.1)
    assert rates[109] == pytest.approx(0.01)  # the last step still learns


def test_the_card_tells_how_the_folder_was_made(data: ImageSet, trained: Path) -> None:
    found = card(trained)
    assert found["what"] == "unet"
    assert found["data"]["name"] == "digits"
    assert found["data"]["sha256"] == data.sha256
    assert "CC BY 4.0" in found["data"]["licence"]
    assert found["data"]["class_counts"] == data.class_counts()
    assert (found["classes"], found["null_label"], found["label_dropout"]) == (10, 10, 0.1)
    training = found["training"]
    assert (training["seed"], training["steps"], training["images_seen"]) == (0, 24, 24 * 8)
    assert training["seconds"] > 0
    assert 0 < training["loss"] < 3
    assert found["command"] == "samplerbench train unet --out 'a folder'"
    readme = (trained / "README.md").read_text("utf-8")
    for word in ("digits (all), 1797 images of 1x8x8", "CC BY 4.0", "| steps | 24 |", "| images seen | 192 |"):
        assert word in readme


# --- What a training leaves behind ----------------------------------------------------------------------------------


def test_an_unconditional_folder_is_a_diffusers_pipeline(data: ImageSet, tmp_path: Path) -> None:
    task = tiny_task(data, settings=replace(TINY, class_conditional=False))
    fit(task, data, TrainSettings(steps=10, batch_size=8, cpu=True), tmp_path)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(batch_size=2, num_inference_steps=3, generator=generator, output_type="np").images
    assert images.shape == (2, 8, 8, 1)
    model = setup.load_model(str(tmp_path), CPU, "fp32")
    assert (model.classes, model.null, model.clip) == (None, False, False)
    assert run_images(model, "ddim", None, 3, 2, None).isfinite().all()


def test_a_class_conditional_folder_is_a_model_with_a_null_label(trained: Path, labels: Tensor) -> None:
    assert DDPMPipeline.from_pretrained(trained).unet.config.num_class_embeds == 11
    model = setup.load_model(str(trained), CPU, "fp32")
    assert (model.classes, model.null, model.data) == (10, True, "digits")
    assert run_images(model, "ddim", None, 3, 2, labels, guidance="cfg").isfinite().all()


def test_a_learned_variance_folder_samples_with_it(data: ImageSet, tmp_path: Path, labels: Tensor) -> None:
    task = tiny_task(data, settings=replace(TINY, learn_variance=True))
    fit(task, data, TrainSettings(steps=10, batch_size=8, cpu=True), tmp_path)
    model = setup.load_model(str(tmp_path), CPU, "fp32")
    assert model.learned_variance
    assert run_images(model, "ddpm:variance=learned", None, 3, 2, labels).isfinite().all()


def test_a_network_that_starts_from_a_model_predicts_what_the_model_predicts(data: ImageSet, trained: Path) -> None:
    """With a learned variance too: its additional channels start at 0, halfway between log β̃ and log β."""
    model = setup.load_model(str(trained), CPU, "fp32")
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([3, 500, 999]), torch.tensor([0, 5, 10])
    with torch.no_grad():
        wanted = DDPMPipeline.from_pretrained(trained).unet(x, t, class_labels=labels).sample
        for learned in (False, True):
            task = tiny_task(data, seed=1, settings=replace(TINY, learn_variance=learned))
            assert "init" not in task.identity()
            task.start_from(model)
            assert task.identity()["init"] == model.identity["weights"]
            output = task.network.eval()(x, t, class_labels=labels).sample
            assert torch.allclose(output[:, :1], wanted, atol=1e-6)
            assert torch.equal(output[:, 1:], torch.zeros(3, int(learned), 8, 8))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"channels": (8, 16)}, "its block_out_channels is [8, 8], but that of the new network is [8, 16]"),
        ({"class_conditional": False}, "its num_class_embeds is 11, but that of the new network is None"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "it has another prediction type or other noise levels"),
        ({"timesteps": 100}, "it has another prediction type or other noise levels"),
    ],
)
def test_a_model_with_another_architecture_or_process_is_no_start(
    data: ImageSet, trained: Path, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError) as error:
        tiny_task(data, settings=replace(TINY, **settings)).start_from(setup.load_model(str(trained), CPU, "fp32"))
    assert says in str(error.value)


def test_only_a_network_with_a_learned_variance_starts_from_one(data: ImageSet) -> None:
    settings = UNetSettings(channels=(32, 64), groups=8, head_dim=16)
    model = setup.load_model("digits-learned-variance", CPU, "fp32")
    with pytest.raises(UserError, match="it has a learned variance, and the new network has none"):
        tiny_task(data, settings=settings).start_from(model)
    tiny_task(data, settings=replace(settings, learn_variance=True)).start_from(model)


def test_a_flow_starts_only_from_a_flow(data: ImageSet) -> None:
    task = FlowTask(data, UNetSettings(channels=(32, 64), groups=8, head_dim=16))
    task.start_from(setup.load_model("digits-flow", CPU, "fp32"))
    with pytest.raises(UserError, match="it is not a rectified flow"):
        task.start_from(setup.load_model("digits", CPU, "fp32"))
    with pytest.raises(UserError, match="not a UNet2DModel"):
        task.start_from(setup.load_model("exact:gaussian", CPU, "fp32"))


def test_a_classifier_folder_guides(data: ImageSet, digits: Model, tmp_path: Path, labels: Tensor) -> None:
    torch.manual_seed(0)
    fit(ClassifierTask(data, (8, 8)), data, TrainSettings(steps=10, batch_size=8, cpu=True), tmp_path)
    loaded = load_classifier(str(tmp_path), digits)
    assert loaded.classes == 10
    assert loaded.logits(torch.zeros(3, 1, 8, 8), torch.full((3,), 0.5)).shape == (3, 10)
    guided = run_images(digits, "ddim", None, 2, 2, labels, guidance=f"classifier:weights={tmp_path}")
    own = run_images(digits, "ddim", None, 2, 2, labels, guidance="classifier")
    assert not torch.equal(guided, own)
    assert card(tmp_path)["training_accuracy_at_sigma"].keys() == {"0.01", "0.1", "0.3", "1", "3", "10"}


def test_a_feature_folder_is_a_feature_space(data: ImageSet, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = FeaturesTask(data, (8, 8), features=6)
    fit(task, task.train, TrainSettings(steps=10, batch_size=8, cpu=True), tmp_path)
    extractor = load_extractor("digits-cnn", CPU, str(tmp_path))
    assert extractor(data.images[:5]).shape == (5, 6)
    assert extractor.sha256 != load_extractor("digits-cnn", CPU).sha256
    found = card(tmp_path)
    assert (found["data"]["split"], found["data"]["images"], found["held_out_images"]) == ("train", 1438, 359)


# --- The objective --------------------------------------------------------------------------------------------------


class Scripted(nn.Module):
    """Stands in for the U-Net: answers with its parameter, and remembers what it was asked."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer = nn.Parameter(answer)
        self.asked: dict[str, Tensor | None] = {}

    def forward(self, noisy: Tensor, t: Tensor, class_labels: Tensor | None) -> SimpleNamespace:
        self.asked = {"noisy": noisy, "t": t, "labels": class_labels}
        return SimpleNamespace(sample=self.answer)


def test_labels_are_dropped_at_the_stated_rate(data: ImageSet) -> None:
    batch, rate = 5000, 0.2
    task = tiny_task(data, settings=replace(TINY, label_dropout=rate))
    network = Scripted(torch.zeros(batch, 1, 8, 8))
    given = torch.arange(batch) % 10
    task.loss(network, torch.zeros(batch, 1, 8, 8), given, randomness(batch))
    asked = network.asked["labels"]
    assert asked is not None
    dropped = asked == 10
    assert torch.equal(asked[~dropped], given[~dropped])
    assert abs(dropped.sum().item() - rate * batch) <= 5 * math.sqrt(batch * rate * (1 - rate))


def test_the_simple_loss_is_the_error_in_the_noise_that_was_added(data: ImageSet) -> None:
    batch = 64
    images, answer = dequantise(data.images[:batch]), torch.randn(batch, 1, 8, 8)
    network = Scripted(answer)
    loss = tiny_task(data).loss(network, images, None, randomness(batch))
    noisy, t = network.asked["noisy"], network.asked["t"]
    assert noisy is not None
    assert t is not None
    bar = BARS[t].reshape(-1, 1, 1, 1)
    noise = (noisy - bar.sqrt() * images) / (1 - bar).sqrt()
    assert loss.item() == pytest.approx((answer - noise).square().mean().item(), rel=1e-3)
    assert abs(noise.std().item() - 1) < 0.05
    assert t.min() < 100 < 900 < t.max()


def test_the_hybrid_loss_adds_a_thousandth_of_the_bound(data: ImageSet) -> None:
    batch = 16
    images, epsilon, fraction = dequantise(data.images[:batch]), *torch.randn(2, batch, 1, 8, 8)
    network = Scripted(torch.cat([epsilon, fraction], dim=1))
    hybrid = tiny_task(data, settings=replace(TINY, learn_variance=True)).loss(network, images, None, randomness(batch))
    simple = tiny_task(data).loss(Scripted(epsilon), images, None, randomness(batch))
    noisy, t = network.asked["noisy"], network.asked["t"]
    assert noisy is not None
    assert t is not None
    terms = variational_bound(BARS, images, noisy, t, epsilon, fraction)
    # L_vlb is a sum over the 1000 levels, of which each image has drawn one.
    assert (hybrid - simple).item() == pytest.approx(0.001 * 1000 * terms.mean().item(), rel=1e-4)


def test_the_variational_bound_teaches_the_variance_only(data: ImageSet) -> None:
    """ε gets the gradient of L_simple alone (Nichol & Dhariwal 2021, section 3.1: a stop-gradient on the mean)."""
    batch = 16
    images, epsilon, fraction = dequantise(data.images[:batch]), *torch.randn(2, batch, 1, 8, 8)

    def gradient(learned: bool) -> Tensor:
        settings = replace(TINY, learn_variance=learned)
        network = Scripted(torch.cat([epsilon, fraction], dim=1) if learned else epsilon)
        tiny_task(data, settings=settings).loss(network, images, None, randomness(batch)).backward()
        assert network.answer.grad is not None
        return network.answer.grad

    simple, (for_epsilon, for_fraction) = gradient(False), gradient(True).chunk(2, dim=1)
    torch.testing.assert_close(for_epsilon, simple, rtol=0, atol=0)
    assert for_fraction.abs().max() > 0


def bound_by_hand(x0: np.ndarray, noisy: np.ndarray, t: int, epsilon: np.ndarray, fraction: np.ndarray) -> float:
    """L_t in bits per dimension from the definitions, in float64, one Gaussian per pixel."""
    bars = BARS.numpy()
    betas = np.linspace(1e-4, 0.02, 1000)
    before = bars[t - 1] if t else 1.0
    # q(x_{t-1} | x_t, x_0) as the product of q(x_{t-1} | x_0) and q(x_t | x_{t-1}): precisions add.
    alpha, small = 1 - betas[t], betas[1] * (1 - bars[0]) / (1 - bars[1])
    if t:
        small = 1 / (1 / (1 - before) + alpha / betas[t])
    predicted = (noisy - np.sqrt(1 - bars[t]) * epsilon) / np.sqrt(bars[t])

    def posterior_mean(clean: np.ndarray) -> np.ndarray:
        if t == 0:
            return clean
        return small * (np.sqrt(before) * clean / (1 - before) + np.sqrt(alpha) * noisy / betas[t])

    share = (fraction + 1) / 2
    deviation = np.sqrt(np.exp(share * np.log(betas[t]) + (1 - share) * np.log(small)))
    mean = posterior_mean(predicted)
    if t:
        true = np.sqrt(small)
        kl = np.log(deviation / true) + (small + (posterior_mean(x0) - mean) ** 2) / (2 * deviation**2) - 0.5
        return float(kl.mean() / np.log(2))
    upper = np.where(x0 > 0.999, np.inf, x0 + 1 / 255)
    lower = np.where(x0 < -0.999, -np.inf, x0 - 1 / 255)
    mass = norm.cdf(upper, mean, deviation) - norm.cdf(lower, mean, deviation)
    return float(-np.log(np.maximum(mass, 1e-12)).mean() / np.log(2))


@pytest.mark.parametrize("t", [0, 1, 2, 50, 500, 999])
def test_the_variational_bound_against_an_independent_derivation(data: ImageSet, t: int) -> None:
    generator = torch.Generator().manual_seed(t)
    x0 = dequantise(data.images[:4])
    noise, error = torch.randn(2, *x0.shape, generator=generator)
    fraction = torch.rand(x0.shape, generator=generator) * 2 - 1
    noisy = (BARS[t].sqrt() * x0 + (1 - BARS[t]).sqrt() * noise).float()
    epsilon = noise + 0.3 * error
    found = variational_bound(BARS, x0, noisy, torch.full((4,), t), epsilon, fraction)
    for i in range(4):
        pixels = (v[i].double().numpy() for v in (x0, noisy))
        expected = bound_by_hand(*pixels, t, epsilon[i].double().numpy(), fraction[i].double().numpy())
        assert found[i].item() == pytest.approx(expected, rel=1e-3)


def test_the_divergence_is_zero_where_the_prediction_is_exact(data: ImageSet) -> None:
    t = torch.tensor([1, 10, 100, 500, 999])
    x0 = dequantise(data.images[: len(t)])
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    bar = BARS[t].reshape(-1, 1, 1, 1)
    noisy = (bar.sqrt() * x0 + (1 - bar).sqrt() * noise).float()
    exact = variational_bound(BARS, x0, noisy, t, noise, torch.full_like(x0, -1.0))
    torch.testing.assert_close(exact, torch.zeros(len(t)), rtol=0, atol=1e-8)
    other_variance = variational_bound(BARS, x0, noisy, t, noise, torch.full_like(x0, 1.0))
    other_mean = variational_bound(BARS, x0, noisy, t, noise + 0.5, torch.full_like(x0, -1.0))
    assert (other_variance[:3] > 1e-4).all()  # far from the data β̃ and β are the same
    assert (other_mean > 1e-3).all()

"""The figures: the inversion against closed forms, what each picture is made of, and the files that come out."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, run_images
from diffusers import DDIMScheduler, DDPMPipeline, LDMPipeline
from PIL import Image
from samplerbench_plugins.pf_ode import ProbabilityFlow
from sklearn.datasets import load_digits
from support.denoising import denoiser
from support.pipelines import tiny_autoencoder, tiny_unet
from torch import Tensor

from samplerbench import cli
from samplerbench.bench.prepare import prepare
from samplerbench.bench.request import Grid, Request
from samplerbench.bench.setup import load_model
from samplerbench.data.pixels import quantise
from samplerbench.errors import RunError, UserError
from samplerbench.figures import forward, interpolate, steps, trajectory
from samplerbench.figures.guidance import guidance_specs
from samplerbench.figures.invert import Method, encode, upward
from samplerbench.figures.output import pick_format, render_animation, render_still
from samplerbench.figures.panel import Drawing, Panel, draw
from samplerbench.figures.round_trip import in_prior_units, round_trip
from samplerbench.figures.scene import Scene, nearest, spread
from samplerbench.figures.slerp import slerp
from samplerbench.models import Model
from samplerbench.models.exact import exact
from samplerbench.models.schedule import alphas_cumprod
from samplerbench.sampling import Denoiser, Noise, Prediction, Sigma
from samplerbench.sampling.driver import drive
from samplerbench.sampling.noise import Purpose, normal
from samplerbench.sampling.process import VARIANCE_EXPLODING


def scene(
    model: str = "exact:mixture,shape=3x4x4",
    sampler: str = "ddim",
    counts: tuple[int, ...] = (4,),
    n: int = 3,
    guidances: tuple[str, ...] = ("none",),
    spacing: str = "trailing",
    dtype: str = "fp64",
    labels: str | None = None,
    **more: int,
) -> Scene:
    grid = Grid([sampler], counts, guidances=guidances, spacings=[spacing])
    return Scene(prepare(Request([grid], model=model, dtype=dtype, labels=labels), "cpu"), n, **more)


def draws(count: int, shape: tuple[int, ...] = (3, 4, 4), seed: int = 0) -> Tensor:
    return normal(seed, Purpose.PRIOR, torch.arange(count), 0, shape)


# --- Between two starts ---------------------------------------------------------------------------------------------


def test_slerp_begins_and_ends_where_it_should() -> None:
    a, b = draws(4), draws(4, seed=1)
    torch.testing.assert_close(slerp(a, b, 0.0), a, rtol=0, atol=1e-12)
    torch.testing.assert_close(slerp(a, b, 1.0), b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8])
def test_slerp_moves_on_the_sphere_at_a_constant_angular_speed(fraction: float) -> None:
    a, b = (z / z.flatten(1).norm(dim=1)[:, None, None, None] * 7 for z in (draws(4), draws(4, seed=1)))
    middle = slerp(a, b, fraction)
    torch.testing.assert_close(middle.flatten(1).norm(dim=1), torch.full((4,), 7.0).double(), rtol=0, atol=1e-12)
    whole, part = (torch.acos((a * x).flatten(1).sum(1) / 49) for x in (b, middle))
    torch.testing.assert_close(part, fraction * whole, rtol=0, atol=1e-9)


def test_slerp_of_a_point_with_itself_stays_there() -> None:
    a = draws(2).float()
    assert slerp(a, a, 0.3).dtype == torch.float32
    torch.testing.assert_close(slerp(a, a, 0.3), a)
    assert torch.equal(slerp(0 * a, 0 * a, 0.3), 0 * a)


def test_interpolation_begins_and_ends_with_the_samples_of_the_command() -> None:
    made = scene(n=2)
    images = interpolate.between(made, made.cells[0], 4)
    assert images.shape == (2, 4, 3, 4, 4)
    labels = made.labels
    assert labels is not None
    own = run_images(made.model, "ddim", "trailing", 4, 4, labels.repeat(2))
    assert torch.equal(images[:, 0], quantise(own[:2]))
    assert torch.equal(images[:, 3], quantise(own[2:]))
    middle = slerp(made.z(), made.z(2), 1 / 3)
    x = made.run(made.cells[0], made.model.prior(middle, float(made.cells[0].sigmas[0])), labels)
    assert torch.equal(images[:, 1], quantise(x))


# --- Inversion ------------------------------------------------------------------------------------------------------


def geometric(count: int, low: float = 0.02, high: float = 157.0) -> Tensor:
    return torch.logspace(math.log10(high), math.log10(low), count + 1, dtype=torch.float64)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
def test_inversion_reaches_the_closed_form_of_a_gaussian_at_its_order(method: Method, order: int) -> None:
    """x_T = μ + √((v + σ_T²)/(v + σ_0²))(x - μ): DESIGN section 7."""
    model = exact("gaussian", shape="1x2x2")
    x0, _ = model.real(5)
    denoise = denoiser(model, None, 5)
    truth = model.solve(x0, 0.02, 157.0)
    errors = [float((encode(denoise, x0, geometric(n), method) - truth).norm() / truth.norm()) for n in (100, 200, 400)]
    measured = [math.log2(a / b) for a, b in pairwise(errors)]
    assert errors[-1] < 0.02
    assert measured == pytest.approx([order, order], abs=0.1)


@pytest.mark.parametrize(("solver", "least"), [("euler", 1), ("heun", 2)])
def test_encoding_and_decoding_a_gaussian_returns_the_image_at_the_methods_order(solver: Method, least: int) -> None:
    model = exact("gaussian", shape="1x2x2")
    x0, _ = model.real(5)
    denoise, errors = denoiser(model, None, 5), []
    for n in (50, 100, 200):
        sigmas = geometric(n)
        x = encode(denoise, x0, sigmas, solver)
        noise = Noise(0, torch.arange(5), model.shape, torch.float64)
        back = drive(ProbabilityFlow(solver=solver), denoise, x, sigmas, noise)
        errors.append(float((back - x0).abs().max()))
    assert errors[-1] < 0.02
    for a, b in pairwise(errors):
        assert math.log2(a / b) > least - 0.1


def test_with_noise_of_the_least_level_the_closed_form_still_holds() -> None:
    model = exact("gaussian", shape="1x2x2")
    x0, _ = model.real(3)
    z = draws(3, (1, 2, 2), seed=9)
    found = encode(denoiser(model, None, 3), x0, geometric(400), "heun", z)
    torch.testing.assert_close(found, model.solve(x0 + 0.02 * z, 0.02, 157.0), rtol=1e-3, atol=1e-2)


def test_an_inversion_begins_at_the_least_level_there_is() -> None:
    levels = torch.tensor([0.1, 0.5, 3.0])
    assert upward(levels, torch.tensor([3.0, 0.5, 0.0])) == pytest.approx([0.1, 0.5, 3.0])
    assert upward(levels, torch.tensor([3.0, 0.1, 0.0])) == pytest.approx([0.1, 3.0])
    assert upward(levels, torch.tensor([3.0, 0.05, 0.0])) == pytest.approx([0.05, 3.0])
    assert upward(levels, torch.tensor([3.0, 1.0])) == pytest.approx([1.0, 3.0])
    assert upward(levels, torch.tensor([3.0, 0.0])) == pytest.approx([0.1, 3.0])


def test_an_inversion_that_leaves_the_finite_numbers_says_so() -> None:
    class Broken(Denoiser):
        levels, process = torch.tensor([0.1, 1.0]), VARIANCE_EXPLODING

        def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
            return Prediction(x / 0)

        def rows(self, index: Tensor) -> Denoiser:
            return self

    with pytest.raises(RunError, match="the inversion left the finite numbers"):
        encode(Broken(), torch.ones(1, 1, 2, 2), torch.tensor([1.0, 0.0]))


@pytest.mark.slow
def test_real_digits_come_back_the_better_the_more_steps(digits: Model) -> None:
    made = scene("digits", counts=(50, 200), dtype="fp32")
    x0, labels = made.real(20)
    few, many = (round_trip(made, cell, x0, labels) for cell in made.cells)
    assert many.mse < few.mse / 5
    assert few.mse < 5e-4
    assert [few.nfe, many.nfe] == [100, 400]
    assert few.errors.shape == (20,)
    # The pixels' own error, in [0, 1], differs from it only by the rounding to 1/255.
    shown = (many.images.double() - quantise(x0).double()) / 255
    assert math.sqrt(float(shown.square().mean())) == pytest.approx(math.sqrt(many.mse), abs=0.5 / 255)


def test_the_codes_of_digits_have_the_priors_variance_if_they_begin_as_the_marginal_does() -> None:
    """Digits have constant margins and 17 greys, so a clean start gives too short an x_T: see `encode`.

    The denoiser is the ideal one of the digits.
    """
    made = scene("exact:points", counts=(25,), spacing="geometric", dtype="fp32")
    x0, labels = made.real(20)
    (cell,) = made.cells
    denoise = denoiser(made.model, labels, 20)
    clean, noised = (
        in_prior_units(made, cell, encode(denoise, x0, cell.sigmas, "heun", z)).square().mean()
        for z in (None, draws(20, made.model.shape).float())
    )
    assert float(noised) == pytest.approx(1, abs=0.1)
    assert float(clean) < 0.6


def test_a_round_trip_needs_a_grid_and_a_deterministic_sampler() -> None:
    stochastic, adaptive = scene(sampler="ddpm"), scene(sampler="pf-ode:solver=rk45")
    x0, labels = stochastic.real(2)
    with pytest.raises(UserError, match="sampler ddpm draws noise on its way"):
        round_trip(stochastic, stochastic.cells[0], x0, labels)
    with pytest.raises(UserError, match="chooses its own steps, so there is no grid"):
        round_trip(adaptive, adaptive.cells[0], x0, labels)


# --- Steps, trajectory, guidance, forward -------------------------------------------------------------------------


def test_every_column_starts_from_the_same_state_and_ends_as_the_command_does() -> None:
    made = scene(counts=(1, 3, 6))
    seen: list[Tensor] = []
    hook = made.model.network.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    found = steps.columns(made)
    hook.remove()
    assert [column.nfe for column in found] == [1, 3, 6]
    x_T = math.sqrt(1 + float(made.model.levels[-1]) ** 2) * draws(3)
    for start in (seen[0], seen[1], seen[4]):
        torch.testing.assert_close(start, x_T, rtol=1e-12, atol=0)
    for column in found:
        assert column.cell.steps is not None
        own = run_images(made.model, "ddim", "trailing", column.cell.steps, 3, made.labels)
        assert torch.equal(column.images, quantise(own))
    (panel,) = steps.still(made, found).panels
    assert torch.equal(panel.images[1, 2], found[2].images[1])
    assert list(panel.columns) == ["1 step\n1 NFE", "3 steps\n3 NFE", "6 steps\n6 NFE"]


@pytest.mark.parametrize("sampler", ["ddpm", "heun"])
def test_the_batch_size_changes_no_figure(sampler: str) -> None:
    parts, whole = (scene(sampler=sampler, batch_size=size) for size in (2, 256))
    assert torch.equal(steps.columns(parts)[0].images, steps.columns(whole)[0].images)
    ways = [trajectory.follow(made, made.cells[0], 9) for made in (parts, whole)]
    for one, other in zip(*ways, strict=True):
        torch.testing.assert_close(one.x, other.x, rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "pf-ode:solver=rk4"])
def test_a_trajectory_shows_the_states_and_what_the_model_makes_of_them(sampler: str) -> None:
    made = scene(sampler=sampler, counts=(6,))
    (cell,) = made.cells
    points = trajectory.follow(made, cell, 7)
    assert [p.sigma for p in points] == pytest.approx(cell.sigmas.tolist())
    assert [p.taken for p in points] == list(range(7))
    assert torch.equal(points[0].x, made.start(cell))
    denoise = denoiser(made.model, made.labels, 3)
    for p in points[:-1]:
        torch.testing.assert_close(p.x0, denoise(p.x, p.sigma), rtol=0, atol=1e-12)
    assert torch.equal(points[-1].x, points[-1].x0)
    last = run_images(made.model, sampler, "trailing", 6, 3, made.labels)
    torch.testing.assert_close(points[-1].x, last, rtol=0, atol=1e-12)
    (panel,) = trajectory.still(made, cell, points).panels
    assert torch.equal(panel.images[2, 3], quantise(points[3].x[1] / math.sqrt(1 + points[3].sigma ** 2)))
    assert torch.equal(panel.images[3, 3], quantise(points[3].x0[1]))


def test_the_levels_to_show_are_the_nearest_of_the_way() -> None:
    assert nearest([100.0, 10.0, 1.0, 0.1, 0.0], [80.0, 20.0, 0.11, 0.0]) == [0, 1, 3, 4]
    assert spread(51, 3) == [0, 25, 50]
    assert spread(3, 9) == [0, 1, 2]


def test_guidance_columns_are_the_guided_samples() -> None:
    from samplerbench.figures.guidance import still

    made = scene(guidances=("cfg:scale=0", "cfg:scale=3"))
    (panel,) = still(made).panels
    assert list(panel.columns) == ["scale 0", "scale 3"]
    own = run_images(made.model, "ddim", "trailing", 4, 3, made.labels, guidance="cfg:scale=3")
    assert torch.equal(panel.images[:, 1], quantise(own))
    assert guidance_specs("cfg", ["0", "1.5"]) == ["cfg:scale=0", "cfg:scale=1.5"]
    assert guidance_specs("classifier:weights=a", ["2"]) == ["classifier:weights=a,scale=2"]


def test_the_forward_process_is_that_of_ddpm() -> None:
    """x_t = √ᾱ x₀ + √(1-ᾱ) z (Ho et al. 2020, eq. 4), with the ᾱ of the schedule itself."""
    made = scene("digits", n=200, dtype="fp64")
    levels = forward.pick_levels(made, 9, timesteps=[999, 400])
    assert [level.timestep for level in levels] == [None, 400, 999]
    x0, _ = made.real(200)
    z = made.z()
    bars = alphas_cumprod({})
    for level in levels[1:]:
        assert level.timestep is not None
        state = forward.noised(x0, z, level.sigma) / math.sqrt(1 + level.sigma**2)
        bar = bars[level.timestep]
        torch.testing.assert_close(state, bar.sqrt() * x0 + (1 - bar).sqrt() * z, rtol=0, atol=1e-12)
    # 12,800 draws: the standard error of their variance is √(2/12800) = 0.0125.
    assert float(state.var()) == pytest.approx(1, abs=0.05)
    seen, labels = forward.noising(made, levels)
    assert seen.shape == (3, 200, 1, 8, 8)
    assert torch.equal(seen[0], quantise(x0))
    assert torch.equal(seen[2], quantise(state))
    assert labels is not None


def test_real_images_are_of_the_data_with_their_labels_and_chosen_by_the_seed() -> None:
    first, second = (scene("digits", n=5, dtype="fp32", seed=seed) for seed in (0, 1))
    x0, labels = first.real(5)
    assert labels is not None
    data = load_digits()
    known = np.rint(data.images * (255 / 16)).astype(np.uint8)
    for image, label in zip(quantise(x0)[:, 0].numpy(), labels.tolist(), strict=True):
        rows = np.flatnonzero((known == image).all((1, 2)))
        assert label in data.target[rows]
    assert torch.equal(first.real(5)[0], x0)
    assert not torch.equal(second.real(5)[0], x0)


# --- Drawing --------------------------------------------------------------------------------------------------------


def random_panel(rows: int, columns: int, shape: tuple[int, int, int], **more: object) -> Panel:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (rows, columns, *shape), generator=generator, dtype=torch.uint8)
    return Panel(images, [""] * rows, [], **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(("shape", "zoom"), [((1, 8, 8), 16), ((1, 28, 28), 5), ((3, 32, 16), 4), ((3, 300, 300), 1)])
def test_images_are_enlarged_by_whole_pixels(shape: tuple[int, int, int], zoom: int) -> None:
    panel = random_panel(2, 2, shape)
    picture = Image.open(io.BytesIO(render_still(Drawing("", [panel]), "png"))).convert("RGB")
    pixels = np.asarray(picture)
    for axis in (0, 1):  # what is left without the white margins and gaps
        pixels = np.compress((pixels < 255).any((1 - axis, 2)), pixels, axis)
    blocks = panel.images.permute(0, 3, 1, 4, 2).reshape(2 * shape[1], 2 * shape[2], shape[0]).numpy()
    expected = blocks.repeat(zoom, 0).repeat(zoom, 1).repeat(3 // shape[0], 2)
    np.testing.assert_array_equal(pixels, expected)


def test_texts_stay_inside_the_figure_and_apart() -> None:
    panel = random_panel(2, 3, (1, 8, 8))
    panel = Panel(panel.images, ["a long name of a row", "b"], ["one header that is long", "2", "3"], "title " * 30)
    figure = draw(Drawing("Title", [panel, panel], "note"), 100)
    boxes = [text.get_window_extent() for text in figure.texts]
    for i, box in enumerate(boxes):
        assert 0 <= box.x0 < box.x1 <= figure.bbox.width
        assert 0 <= box.y0 < box.y1 <= figure.bbox.height
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert not any(box.overlaps(axes.bbox) for axes in figure.axes)


def test_an_animation_shows_every_frame_as_it_is() -> None:
    panels = [Panel(torch.full((1, 1, 1, 8, 8), 20 * i, dtype=torch.uint8), [""], []) for i in range(4)]
    frames = [Drawing(f"frame {i}" * (i + 1), [panel]) for i, panel in enumerate(panels)]
    for form in ("gif", "apng"):
        picture = Image.open(io.BytesIO(render_animation(frames, form, 0.2)))  # type: ignore[arg-type]
        assert (picture.format, picture.n_frames) == ("GIF" if form == "gif" else "PNG", 4)  # type: ignore[attr-defined]
        for i in range(4):
            picture.seek(i)
            assert picture.convert("RGB").getpixel((20, picture.height - 20)) == (20 * i,) * 3
            assert picture.info["duration"] == (200 if i < 3 else 1500)


def test_a_figure_that_no_file_can_hold_is_refused() -> None:
    panel = Panel(torch.zeros(600, 1, 1, 8, 8, dtype=torch.uint8), [""] * 600, [])
    with pytest.raises(UserError, match="pixels; ask for fewer rows or columns"):
        draw(Drawing("", [panel]), 200)


@pytest.mark.parametrize(
    ("name", "animate", "form"),
    [("a.png", False, "png"), ("a.PNG", True, "apng"), ("a.svg", False, "svg"), ("a.gif", False, "gif")],
)
def test_the_suffix_chooses_the_format(name: str, animate: bool, form: str) -> None:
    assert pick_format(Path(name), animate) == form


# --- The commands ---------------------------------------------------------------------------------------------------


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["figure", *arguments])
    assert isinstance(ended.value.code, int)
    return ended.value.code


SMALL = ("--model", "exact:mixture,shape=3x4x4")
COMMANDS = {
    "steps": ("-s", "ddim", "-s", "ddpm", "--steps", "1,2,3", *SMALL),
    "trajectory": ("-s", "ddim", "--steps", "4", "--columns", "4", *SMALL),
    "interpolate": ("-s", "ddim", "--steps", "3", "--points", "4", "--round-trip", "2,4", *SMALL),
    "guidance": ("-s", "ddim", "-g", "cfg", "--steps", "2", "--scales", "0,1,4", *SMALL),
    "forward": ("--columns", "5", *SMALL),
    "restore": ("--task", "inpaint", "-s", "ddim", "-g", "ddnm", "--steps", "2", "--samples", "2", "--n", "2", *SMALL),
}
FRAMES = {"steps": 3, "trajectory": 4, "interpolate": 6, "forward": 5}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_figure_is_a_png_and_an_svg(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png, svg = tmp_path / "figure.png", tmp_path / "figure.svg"
    for out in (png, svg):
        assert command(name, str(out), *COMMANDS[name]) == 0
        assert str(out) in capsys.readouterr().out
    with Image.open(png) as picture:
        assert (picture.format, getattr(picture, "n_frames", 1)) == ("PNG", 1)
        assert min(picture.size) > 300
        assert np.asarray(picture.convert("L")).std() > 10
        width, height = picture.size
    root = ElementTree.parse(svg).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert float(root.attrib["width"].removesuffix("pt")) == pytest.approx(width * 72 / 200)
    assert float(root.attrib["height"].removesuffix("pt")) == pytest.approx(height * 72 / 200)


def test_a_figure_is_a_function_of_its_seed(tmp_path: Path) -> None:
    outs = [tmp_path / f"{i}.png" for i in range(3)]
    for out, seed in zip(outs, ("5", "5", "6"), strict=True):
        assert command("trajectory", str(out), *COMMANDS["trajectory"], "--seed", seed) == 0
    same, again, other = (out.read_bytes() for out in outs)
    assert same == again != other


@pytest.mark.parametrize(
    ("name", "suffix"), [*((name, "gif") for name in FRAMES), ("forward", "apng"), ("forward", "png")]
)
def test_figures_that_move_have_a_frame_each(name: str, suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"figure.{suffix}"
    assert command(name, str(out), *COMMANDS[name], *(("--animate",) if suffix == "png" else ())) == 0
    with Image.open(out) as picture:
        assert picture.format == ("GIF" if suffix == "gif" else "PNG")
        assert picture.n_frames == FRAMES[name]  # type: ignore[attr-defined]


def test_the_error_of_the_round_trip_is_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--inversion", "heun", "--start", "noised", "--spacing", "trailing")
    assert command("interpolate", str(tmp_path / "i.png"), *COMMANDS["interpolate"], *more) == 0
    record = json.loads((tmp_path / "i.json").read_text("utf-8"))
    assert record["error"] == "mean squared error per dimension, images in [0, 1]"
    assert (record["inversion"], record["start"], record["images"]) == ("heun", "noised", 4)
    assert [trip["steps"] for trip in record["round_trips"]] == [2, 4]
    # Heun's way up evaluates twice a step, the way down once. The last level of `trailing` is above the model's
    # smallest, where the way up begins, so both have as many steps.
    assert [trip["nfe"] for trip in record["round_trips"]] == [6, 12]
    printed = capsys.readouterr().out
    for trip in record["round_trips"]:
        assert trip["mse"] == pytest.approx(np.mean(trip["mse_per_image"]))
        assert f"{trip['mse']:.2e}" in printed


def test_latents_are_decoded(tmp_path: Path) -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    LDMPipeline(tiny_autoencoder(), tiny_unet(), scheduler).save_pretrained(tmp_path / "latent")
    model = load_model(str(tmp_path / "latent"), CPU, "fp32")
    made = scene(str(tmp_path / "latent"), counts=(2,), n=2, dtype="fp32")
    x = made.start(made.cells[0])
    with torch.no_grad():
        expected = quantise(model.decode(x / math.sqrt(1 + 3.0**2)))
    assert torch.equal(made.pixels(x, 3.0), expected)
    out = tmp_path / "t.png"
    assert command("trajectory", str(out), "-s", "ddim", "--steps", "2", "--model", str(tmp_path / "latent")) == 0
    with Image.open(out) as picture:
        assert picture.format == "PNG"


ERRORS = {
    "steps a.jpg -s ddim": "a.jpg: the file must have the suffix .png, .svg, .gif or .apng.",
    "steps a -s ddim": "a: the file must have the suffix .png",
    "steps a.svg -s ddim --animate": "a.svg: an SVG file cannot be animated",
    "steps a.png -s ddim --n 0": "--n 0: it must be at least 1.",
    "steps a.png": "the option --sampler is missing.",
    "steps a.png -s ddmi": 'no sampler "ddmi". Did you mean "ddim"?',
    "steps a.png -s ddim --steps 0": "--steps 0: at least 1 step is needed.",
    "trajectory a.png -s ddim --columns 1": "--columns 1: it must be at least 2.",
    "trajectory a.png -s ddim --columns 3 --sigmas 1": "--sigmas and --columns cannot be combined",
    "trajectory a.png -s ddim --sigmas 1,x": '--sigmas 1,x: "x" is not a number',
    "trajectory a.png -s ddim --sigmas -1": "--sigmas -1: give numbers from 0 to 1e12.",
    "trajectory a.png -s ddim --sigmas nan": "--sigmas nan: give numbers from 0 to 1e12.",
    "trajectory a.png -s ddim --sigmas ,": "--sigmas is empty",
    "trajectory a.png -s pf-ode:solver=rk45": "sampler pf-ode:solver=rk45 chooses its own steps",
    "interpolate a.png -s ddpm --round-trip none": "sampler ddpm draws noise on its way",
    "interpolate a.png -s ddim --points 1": "--points 1: it must be at least 2.",
    "interpolate a.png -s ddim --round-trip x": '--round-trip x: "x" is not a whole number',
    "interpolate a.png -s ddim --data absent": 'no data set "absent"',
    "guidance a.png -s ddim -g cfg --model exact:gaussian": "guidance cfg requires a class-conditional model",
    "guidance a.png -s ddim -g none": "--guidance none has no scale",
    "guidance a.png -s ddim -g cfg --scales ,": "--scales is empty",
    "guidance a.png -s ddim -g cfg --scales 1,x": '--scales 1,x: "x" is not a number',
    "guidance a.png -s ddim -g cfg --labels none": "guidance cfg requires labels",
    "guidance a.gif -s ddim -g cfg": "a.gif: this figure cannot be animated",
    "forward a.png --timesteps 1000": "--timesteps 1000: the model has the timesteps 0 to 999.",
    "forward a.png --timesteps 1.5": '--timesteps 1.5: "1.5" is not a whole number',
    "forward a.png --timesteps 1 --sigmas 1": "--timesteps, --sigmas and --columns cannot be combined",
    "forward a.png --n 2000": "digits:split=train has 1442 images; 2000 are needed here.",
    "forward a.png --model exact:gaussian,shape=3x4x4 --data digits": "digits has images of 1x8x8, the model makes 3x4",
    "forward a.png --model unknown": "the model does not say what it was trained on; name the real images with --data.",
    "forward nowhere/else/a.png/b.png": "cannot write",
}


@pytest.mark.parametrize("arguments", ERRORS)
def test_errors_are_one_line(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if "unknown" in arguments:
        DDPMPipeline(tiny_unet(1), DDIMScheduler()).save_pretrained("unknown")
    if "nowhere" in arguments:
        Path("nowhere").write_text("a file, not a folder", encoding="utf-8")
    capsys.readouterr()
    assert command(*arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"samplerbench: {ERRORS[arguments]}")
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("a*"))


def test_the_help_needs_no_torch() -> None:
    code = (
        "import sys; from samplerbench import cli\n"
        "try: cli.main(['figure', 'interpolate', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'diffusers', 'matplotlib', 'numpy'} & set(sys.modules)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=False)
    assert child.returncode == 0, child.stderr
    assert "--round-trip" in child.stdout

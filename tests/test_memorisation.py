"""Metrics of memorisation: hand-made points, real images that a model has or has not seen, and the refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import samplerbench
from samplerbench import registry
from samplerbench.cli.app import app
from samplerbench.data import load_data
from samplerbench.errors import UserError
from samplerbench.metrics.extractors import load_extractor
from samplerbench.metrics.memorisation import Authenticity, Nearest, as_points
from samplerbench.metrics.metric import Batch, Context, Layer
from samplerbench.metrics.neighbours import Neighbours

TRAIN = "digits:split=train"


def evaluate(samplers: Any, **more: Any) -> list[dict[str, Any]]:
    return list(samplerbench.evaluate(samplers, quiet=True, **more))


# --- Neighbours ------------------------------------------------------------------------------------------------------


def test_neighbours_are_those_of_all_distances() -> None:
    generator = torch.Generator().manual_seed(0)
    real, points = (torch.randn(n, 7, generator=generator, dtype=torch.float64) for n in (2300, 1100))
    found = Neighbours(real)
    distances, indices = found.nearest(points, 3)
    every = torch.cdist(points, real)
    expected = every.topk(3, largest=False)
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(distances, expected.values, rtol=1e-9, atol=1e-12)
    own = torch.cdist(real, real).fill_diagonal_(torch.inf).min(dim=1).values
    torch.testing.assert_close(found.own, own, rtol=1e-7, atol=1e-9)


def test_a_copy_far_from_the_origin_is_at_distance_0() -> None:
    """The expanded square alone would lose it: the distances are computed again in float64."""
    real = 1000 + torch.randn(50, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 100
    distances, indices = Neighbours(real).nearest(real, 1)
    assert torch.equal(indices[:, 0], torch.arange(50))
    assert float(distances.max()) == 0


def test_equal_real_points_are_at_distance_0_from_each_other() -> None:
    real = torch.tensor([[0.0], [0.0], [5.0], [9.0]], dtype=torch.float64)
    assert Neighbours(real).own.tolist() == [0, 0, 4, 4]


# --- The metrics on points on a line ---------------------------------------------------------------------------------


class Line:
    """Real images of one pixel: 0, 10 and 40 of 255."""

    def __init__(self) -> None:
        self.points = Neighbours(as_points(pixels([0, 10, 40])))

    def neighbours(self, layer: Layer | None) -> Neighbours:
        assert layer is None
        return self.points


def pixels(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8).reshape(-1, 1, 1, 1)


def measured(metric: Authenticity | Nearest, values: list[int], cut: int) -> dict[str, Any]:
    context: Any = Context(None, real_set=Line())  # type: ignore[arg-type]
    parts = []
    for some in (values[:cut], values[cut:]):
        accumulator = metric.start(context)
        if some:
            images = pixels(some)
            accumulator.update(Batch(images, torch.empty(len(some), 0), None))
        parts.append(accumulator.state())
    whole = metric.start(context)
    for state in parts:
        whole.merge(state)
    return whole.result()


@pytest.mark.parametrize("cut", [0, 2, 5])
def test_authenticity_is_the_share_farther_than_the_neighbours_neighbour(cut: int) -> None:
    """Own distances are 10, 10 and 30. 2: at 2 from 0. 21: at 11 from 10. 75: at 35 from 40. 71: at 31. 69: at 29."""
    result = measured(Authenticity(), [2, 21, 75, 71, 69], cut)
    assert result["value"] == pytest.approx(3 / 5)
    assert result["standard_error"] == pytest.approx((0.6 * 0.4 / 4) ** 0.5)


@pytest.mark.parametrize("cut", [0, 1, 3])
def test_nearest_is_the_mean_ratio_of_the_two_smallest_distances(cut: int) -> None:
    """2: 2/8. 5: 5/5. 10: 0/10. A ratio of at most 1/3 is a copy."""
    result = measured(Nearest(), [2, 5, 10], cut)
    assert result["value"] == pytest.approx((2 / 8 + 1 + 0) / 3)
    assert result["memorised"] == pytest.approx(2 / 3)


# --- Real images -----------------------------------------------------------------------------------------------------


def test_the_splits_of_the_digits_are_disjoint_and_balanced() -> None:
    whole, train, held_out = (load_data(s) for s in ("digits", TRAIN, "digits:split=held-out"))
    assert (len(whole), len(train), len(held_out)) == (1797, 1442, 355)
    assert len({image.numpy().tobytes() for image in torch.cat([train.images, held_out.images])}) == len(
        {image.numpy().tobytes() for image in whole.images}
    )
    shares = torch.tensor(held_out.class_counts()) / torch.tensor(whole.class_counts())
    assert 0.19 < float(shares.min()) <= float(shares.max()) < 0.21
    assert load_data(train.source).sha256 == train.sha256


def test_training_images_are_copies_and_held_out_images_are_not(tmp_path: Path) -> None:
    """Real images in the place of samples: seen ones have authenticity 0, unseen ones about one half."""
    metrics = [f"authenticity:data={TRAIN}", f"nearest:data={TRAIN}"]
    seen, unseen = evaluate(
        [f"real:data={TRAIN}", "real:data=digits:split=held-out"], metrics=metrics, n=355, out=tmp_path
    )
    assert seen["metrics"]["authenticity"]["value"] == 0
    assert seen["metrics"]["nearest"]["value"] == 0
    assert seen["metrics"]["nearest"]["memorised"] == 1
    assert 0.45 < unseen["metrics"]["authenticity"]["value"] < 0.65
    assert unseen["metrics"]["nearest"]["memorised"] < 0.02
    assert unseen["metrics"]["authenticity"]["reference"] == "digits (train, 1442)"
    identity = unseen["protocol_fields"]["metric data"][TRAIN]
    assert identity == {"name": "digits", "split": "train", "n": 1442, "sha256": load_data(TRAIN).sha256}
    assert unseen["nfe"] == 0
    assert unseen["protocol_fields"]["real images"] == load_data("digits:split=held-out").sha256


def test_real_images_stand_in_a_table_beside_samples() -> None:
    records = evaluate(["real:data=digits:split=held-out", "ddim"], steps=1, n=200, metrics="fid")
    assert records[0]["metrics"]["fid"]["value"] < records[1]["metrics"]["fid"]["value"]


def test_real_images_are_measured_with_their_own_labels() -> None:
    """Label accuracy is that of the classifier on real images, not of the requested labels, which have no effect."""
    [record] = evaluate(["real:data=digits:split=held-out"], n=355, metrics=["label-accuracy"], batch_size=100)
    held_out = load_data("digits:split=held-out")
    logits = load_extractor("digits-cnn", torch.device("cpu"), metrics=["isc"]).all(held_out.images)["isc"]
    expected = (logits.argmax(dim=1) == held_out.labels).double().mean()
    assert record["metrics"]["label-accuracy"]["value"] == float(expected) > 0.95


@pytest.mark.parametrize("metric", ["kid", "fid-inf"])
def test_the_requested_labels_have_no_effect_on_real_images(metric: str) -> None:
    """The number of images of each class is random, so the images are no stratified sample."""
    n = 200 if metric == "kid" else 1600
    data = "digits:split=held-out" if metric == "kid" else "digits"
    [plain], [balanced] = (
        evaluate([f"real:data={data}"], n=n, metrics=[metric], labels=labels, batch_size=512)
        for labels in ("none", "balanced")
    )
    assert balanced["metrics"][metric]["value"] == pytest.approx(plain["metrics"][metric]["value"], rel=1e-9)
    assert balanced["metrics"][metric]["standard_error"] == pytest.approx(plain["metrics"][metric]["standard_error"])
    sources = [r["protocol_fields"].get("metric sources") for r in (plain, balanced)]
    assert sources[0] == sources[1]


def test_no_real_image_is_used_twice() -> None:
    images = samplerbench.sample("real:data=digits:split=held-out", n=355, seed=3, quiet=True)
    held_out = load_data("digits:split=held-out").images
    assert sorted(i.numpy().tobytes() for i in images) == sorted(i.numpy().tobytes() for i in held_out)
    with pytest.raises(UserError, match="the data set has 355 images, too few for this run"):
        samplerbench.sample("real:data=digits:split=held-out", n=356, quiet=True)


@pytest.mark.parametrize("space", ["pixels", "features"])
def test_the_value_does_not_depend_on_the_batch_size(space: str) -> None:
    one, two = (
        evaluate("ddim", steps=3, n=40, metrics=f"nearest:space={space}", batch_size=size)[0] for size in (40, 7)
    )
    first, second = (r["metrics"]["nearest"] for r in (one, two))
    assert first["value"] == pytest.approx(second["value"], rel=1e-5)
    assert first["features"] == ("" if space == "pixels" else "digits-cnn")
    assert first["reference"] == "digits (train, 1442)"


def test_a_model_that_does_not_say_what_it_was_trained_on_is_refused() -> None:
    with pytest.raises(UserError, match=r"authenticity needs the training images.* authenticity:data=NAME"):
        evaluate("ddim", steps=2, n=4, metrics="authenticity", model="exact:gaussian")


def test_a_data_set_that_does_not_exist_is_refused_before_sampling() -> None:
    with pytest.raises(UserError, match='no data set "nowhere"'):
        evaluate("ddim", steps=2, n=4, metrics="authenticity:data=nowhere")


# --- The command line ------------------------------------------------------------------------------------------------


def test_check_warns_of_a_model_that_copies() -> None:
    """All of scikit-learn's digits as a sum of points: its samples are training images."""
    result = CliRunner().invoke(app, ["check", "exact:points", "--json"])
    found = {r["check"]: r for r in json.loads(result.stdout)}
    assert found["memorisation"]["warning"] is True
    assert found["memorisation"]["passed"] is None
    assert "authenticity 0% of 200 samples" in found["memorisation"]["figure"]
    assert result.exit_code == 0


def test_the_figure_shows_samples_beside_the_nearest_images(tmp_path: Path) -> None:
    file = tmp_path / "nearest.png"
    arguments = ["figure", "nearest", str(file), "-s", "ddim", "--steps", "3", "--n", "3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    with Image.open(file) as image:
        assert image.width > 100
    named = CliRunner().invoke(app, [*arguments, "--data", "digits:split=held-out"])
    assert named.exit_code == 0, named.output


def test_they_pass_their_checks() -> None:
    from samplerbench.testing import run_checks

    for spec in ("authenticity", "nearest", "nearest:space=features"):
        failed = [r for r in run_checks(registry.parse("metric", spec)) if r.passed is False]
        assert not failed

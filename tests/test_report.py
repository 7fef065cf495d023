"""Reports from a folder of results: groups, tables, text formats, figures and the command."""

from __future__ import annotations

import csv
import io
import json
import math
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.synthetic_results import put, record, sheet
from typer.testing import CliRunner

import samplerbench
from samplerbench.cli.app import app, main
from samplerbench.errors import UserError
from samplerbench.registry import entries
from samplerbench.report.formats import finite, latex, latex_document, markdown, payload, rows, tex, to_csv
from samplerbench.report.load import load
from samplerbench.report.matrix import default_axis, matrix
from samplerbench.report.plots import figures, metric_figure, samples_figure, save
from samplerbench.report.reproduce import command
from samplerbench.report.series import Series, measured_order, pareto, series, sweeps
from samplerbench.report.sheet import block, tiles
from samplerbench.report.style import style
from samplerbench.report.terminal import text_plot
from samplerbench.results.groups import Group, group
from samplerbench.results.names import METRIC_TITLES, metric_title
from samplerbench.results.record import schema_errors

HOSTILE = "<script>alert(1)</script>|a_b&$%#{}~^\\"


def one(*records: dict[str, Any]) -> Group:
    (found,) = group(records)
    return found


def texts(found: Group, metric: str = "fid", axis: Any = "steps") -> dict[str, list[str]]:
    return {name: ["" if e is None else e.text for e in row] for name, row in matrix(found, metric, axis).rows}


# Loading


def test_what_is_amiss_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    kept, broken, empty = put(tmp_path, record("ddim"), record("heun"), record("deis") | {"metrics": {}})
    broken.write_text(broken.read_text("utf-8").replace("heun", "huen"))
    (tmp_path / "aa.json.damaged").write_text("{")
    (tmp_path / "bb.partial.safetensors").write_bytes(b"")
    (tmp_path / "run.log").write_text(
        "t  pc, 5 steps: failed: not a number at step 3\n"
        "t  deis, 5 steps: failed: no memory\nt  deis, 5 steps: fid 3.0  NFE 5  1.0 s\n"
    )
    found = load(tmp_path)
    assert [r["protocol"][:20] for r in found.records] == [kept.stem]
    assert set(found.problems[:2]) == {
        f"damaged or edited, left out: {broken.name}",
        f"without a metric, left out: {empty.name}",
    }
    assert found.problems[2:] == [
        "set aside as damaged: aa.json.damaged",
        "unfinished: bb; run the same command to resume it",
        "failed: pc, 5 steps: not a number at step 3",
    ]


def test_a_folder_without_results_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the folder .* does not exist"):
        load(tmp_path / "none")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(UserError, match=r"no valid results \(damaged or edited, left out: x.json\)"):
        load(tmp_path)


def test_the_synthetic_records_fit_the_schema() -> None:
    assert not schema_errors(record() | {"seal": "0" * 64})


# Groups and rows


def test_different_protocols_are_different_groups_and_name_the_field() -> None:
    found = group([record("ddim", n=9), record("heun", n=9), record("ddim", n=16)])
    assert [g.title for g in found] == ["n = 9", "n = 16"]
    assert [len(g.records) for g in found] == [2, 1]
    other = group([record(), record(protocol={"features": {"name": "inception", "weights": "f"}})])
    assert {g.title for g in other} == {"features.name = digits-cnn", "features.name = inception"}


def test_rows_may_differ_in_sampler_guidance_spacing_and_seed() -> None:
    found = one(record(), record("heun"), record(guidance="cfg:scale=2"), record(spacing="karras"), record(seed=1))
    assert found.title == ""
    assert set(found.labels.values()) == {
        "ddim on trailing seed 0",
        "ddim on trailing seed 1",
        "ddim on karras",
        "ddim + cfg:scale=2",
        "heun",
    }


def test_two_versions_of_a_sampler_are_two_rows() -> None:
    changed = record(protocol={"sampler": {"name": "ddim", "parameters": {}, "source": "edited"}})
    assert set(one(record(), changed).labels.values()) == {"ddim source s", "ddim source edited"}


def test_steps_alone_make_no_new_row() -> None:
    assert set(one(record(steps=5), record(steps=10)).labels.values()) == {"ddim"}


def test_results_that_differ_in_the_metrics_asked_for_are_one_row() -> None:
    found = one(record(metrics={"fid": [3.0, 4.0]}), record(metrics={"kid": [0.5, 0.7]}))
    assert len(found.records) == 1
    assert {m: e["value"] for m, e in found.records[0]["metrics"].items()} == {"fid": 3.5, "kid": 0.6}
    tuned = group([record(), record(protocol={"metrics": ["fid:k=2"]})])
    assert len(tuned) == 2
    assert tuned[0].title == "metrics.fid = fid"


# Tables


def test_the_best_of_each_column_is_marked_and_ties_are_by_paired_blocks() -> None:
    found = one(
        record("a", metrics={"fid": [1.0, 2.0, 3.0]}),
        record("b", metrics={"fid": [1.1, 2.1, 3.1001]}),  # worse by the same in each block: told apart
        record("c", metrics={"fid": [1.5, 1.9, 2.9]}),  # the sign changes from block to block
    )
    (a,), (b,), (c,) = (row for _, row in matrix(found, "fid", "steps").rows)
    assert a is not None
    assert b is not None
    assert c is not None
    assert (a.best, b.best, c.best) == (True, False, False)
    assert (a.tied, b.tied, c.tied) == (False, False, True)


def test_other_seeds_are_not_paired() -> None:
    """Each of b's blocks exceeds a's by the same, but as samples of other noise their means cannot be told apart."""
    a = record("a", metrics={"fid": [1.0, 2.0, 3.0]})
    b = record("b", metrics={"fid": [1.1, 2.1, 3.1001]}, seed=1)
    _, (entry,) = matrix(one(a, b), "fid", "steps").rows[1]
    assert entry is not None
    assert entry.tied


def test_higher_is_better_where_the_metric_says_so() -> None:
    found = matrix(one(record("a", metrics={"acc": 0.8}), record("b", metrics={"acc": 0.9})), "acc", "steps")
    assert [e.best for _, (e,) in found.rows if e is not None] == [False, True]
    assert found.arrow == "↑"


def test_a_single_row_is_not_the_best_and_nan_never_is() -> None:
    assert not any(e.best for _, row in matrix(one(record()), "fid", "steps").rows for e in row if e)
    found = matrix(one(record("a", metrics={"fid": [math.nan] * 3}), record("b"), record("c")), "fid", "steps")
    assert [name for name, (e,) in found.rows if e is not None and e.best] == ["b", "c"]


def test_columns_are_budgets_where_steps_cost_differently() -> None:
    found = one(record("heun", 5, nfe=9, budget=10), record("ddim", 10), record("ddim", 5, budget=5))
    assert default_axis(found) == "nfe"
    assert matrix(found, "fid", "nfe").columns == [5, 10]
    assert texts(found, axis="nfe")["heun"] == ["", "4.00 ± 0.10"]
    assert matrix(found, "fid", "steps").columns == [5, 10]
    assert texts(found, axis="steps")["heun"] == ["4.00 ± 0.10", ""]
    assert default_axis(one(record("ddim", 10))) == "steps"


def test_a_sampler_with_its_own_steps_has_its_own_column_at_the_end() -> None:
    assert matrix(one(record("pf-ode", None), record("ddim", 50)), "fid", "nfe").heads == ["50", "own"]


def test_a_generator_has_neither_steps_nor_a_spacing() -> None:
    """`real` and the prior of an autoencoder have no noise levels; an adaptive solver chooses its own."""
    real, own = record("real", None, nfe=0, spacing=None), record("pf-ode", None, spacing=None)
    assert matrix(one(real, record("ddim", 50)), "fid", "nfe").heads == ["50", "–"]
    assert matrix(one(real, own), "fid", "nfe").heads == ["own"]
    data = payload([one(real, own)], [])["groups"][0]["records"]
    assert {r["sampler"]: (r["steps_label"], r["spacing_label"]) for r in data} == {
        "real": ("–", "–"),
        "pf-ode": ("own", "own"),
    }


def test_real_images_as_a_row_are_in_the_table_of_the_samplers() -> None:
    real = record("real", None, nfe=0, spacing=None, protocol={"real images": "f00d"})
    assert len(group([real, record("ddim")])) == 1


def test_metrics_have_the_names_of_papers_and_plugins_their_own() -> None:
    titles = {name: metric_title(name) for name in ("fid", "kid", "gap:images=4", "label-accuracy", "./LPIPS.py:Lpips")}
    assert list(titles.values()) == ["FID", "KID", "Gap:images=4", "Label accuracy", "./LPIPS.py:Lpips"]
    assert metric_title("my-metric") == "my-metric"
    assert set(METRIC_TITLES) <= {entry.name for entry in entries("metric")}


def test_the_title_of_a_metric_without_features_has_none() -> None:
    made = record(metrics={"gap": 0.5})
    made["metrics"]["gap"] |= {"features": "", "reference": ""}
    assert metric_figure(one(made), "gap", "nfe").axes[0].get_title("left").endswith("float32")


# Text formats


def cells_of(line: str) -> list[str]:
    return [part.strip() for part in line.strip("|").split(" | ")]


def test_markdown_says_what_the_table_says() -> None:
    lines = markdown([one(record("a", 5), record("b", 5, metrics={"fid": [9.0, 9.1]}, blocks=3))], ["x.json"], None)
    table = [cells_of(line.strip("| ")) for line in lines.splitlines() if line.startswith("|")]
    assert table[0] == ["sampler \\\\ steps", "5"]
    assert table[2:] == [["a", "**4.00 ± 0.10**"], ["b", "9.05 ± 0.07"]]
    assert "**FID ↓** (digits-cnn features, against digits (all, 1797))" in lines
    assert "- x.json" in lines


def test_markdown_escapes_names() -> None:
    text = markdown([one(record(HOSTILE))], [], None)
    assert "<script>" not in text
    (line,) = [line for line in text.splitlines() if "alert" in line]
    assert line.replace("\\|", "").count("|") == 3  # the name's own bar ends no cell


def test_latex_escapes_what_latex_acts_on() -> None:
    assert tex("a_b & 5% #1 $x$ {y}") == "a\\_b \\& 5\\% \\#1 \\$x\\$ \\{y\\}"
    assert tex("\\~^") == "\\textbackslash{}\\textasciitilde{}\\textasciicircum{}"
    assert tex("η--漢") == "$\\eta$" + "{-}{-}" + "\\texttt{U+6F22}"


def test_latex_has_rules_marks_and_directions() -> None:
    text = latex([one(record("a"), record("b", metrics={"fid": [9.0, 9.1, 9.3]}))], None)
    for rule in ("\\toprule", "\\midrule", "\\bottomrule", "$\\downarrow$", "\\begin{tabular}{lr}"):
        assert text.count(rule) == 1
    assert "a & \\textbf{4.00 $\\pm$ 0.10} \\\\" in text
    assert "b & 9.13 $\\pm$ 0.15 \\\\" in text


@pytest.mark.skipif(not any(map(shutil.which, ("pdflatex", "tectonic"))), reason="no pdflatex or tectonic installed")
def test_the_latex_document_compiles(tmp_path: Path) -> None:
    records = [record(HOSTILE), record("漢 η σ \"'`<>"), record("heun", None), record("b", n=16)]
    (tmp_path / "report.tex").write_text(latex_document(latex(group(records), None)), "utf-8")
    engine = next(filter(None, map(shutil.which, ("pdflatex", "tectonic"))))
    flags = ["-interaction=nonstopmode", "-halt-on-error"] if engine.endswith("pdflatex") else []
    done = subprocess.run(
        [engine, *flags, "report.tex"], cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=100
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    assert "Overfull \\hbox" not in done.stdout


def test_csv_has_a_row_per_cell_with_its_protocol() -> None:
    made = record("ddim:eta=0.5", 5, metrics={"fid": [3.0, 4.0], "acc": [0.5, 0.7]}, guidance="cfg:scale=2")
    (row,) = csv.DictReader(io.StringIO(to_csv([one(made)])))
    assert float(row["fid"]) == 3.5
    assert json.loads(row["fid.blocks"]) == [3.0, 4.0]
    assert float(row["acc.sd"]) == pytest.approx(math.sqrt(0.02))
    for name, value in {
        "sampler": "ddim:eta=0.5", "steps": "5", "guidance": "cfg:scale=2", "seed": "0", "n": "9", "dtype": "float32",
        "features.name": "digits-cnn", "features.weights": "f", "reference.sha256": "r", "model.weights": "w",
        "versions.torch": "2.15.0", "seconds_per_image": "0.005", "protocol": made["protocol"],
    }.items():  # fmt: skip
        assert row[name] == value, name


def test_a_budget_of_a_cell_and_its_time_are_in_the_rows() -> None:
    found = rows([one(record(budget=10, images_per_second=0.0))])
    assert found[0]["budget"] == 10
    assert found[0]["seconds_per_image"] is None


def test_what_is_no_number_is_null() -> None:
    assert finite({"a": [math.nan, math.inf, 1.0]}) == {"a": [None, None, 1.0]}


def test_the_command_is_the_run_that_makes_the_cell() -> None:
    made = record(
        "dpm++:order=3", 7, guidance="cfg:scale=2", spacing="karras:rho=7", seed=4, protocol={"dtype": "bfloat16"}
    )
    words = shlex.split(command(made))
    assert words[:2] == ["samplerbench", "run"]
    assert dict(zip(words[2::2], words[3::2], strict=True)) == {
        "--sampler": "dpm++:order=3", "--steps": "7", "--guidance": "cfg:scale=2", "--spacing": "karras:rho=7",
        "--model": "digits", "--labels": "balanced", "--n": "9", "--blocks": "3", "--seed": "4", "--dtype": "bf16",
        "--metric": "fid", "--features": "digits-cnn",
    }  # fmt: skip
    assert "'a b;rm'" in command(record("a b;rm"))
    assert "--steps" not in command(record("pf-ode", None))


def test_the_command_says_how_the_model_was_loaded_and_what_was_observed() -> None:
    model = {
        "source": "owner/name", "revision": "abc123", "variant": "fp16", "prompts": "hash", "negative prompt": "a blur",
        "image size": [768, 1024], "embedded guidance": 3.5,
    }  # fmt: skip
    task = {"name": "inpaint", "images": {"name": "digits", "split": "held-out", "n": 355}}
    protocol = {"model": model, "task": task, "reference": None}
    words = shlex.split(command(record(task="inpaint:mask=half", model="owner/name", protocol=protocol)))
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert {name: given.get(name) for name in ("--task", "--data", "--revision", "--variant")} == {
        "--task": "inpaint:mask=half", "--data": "digits:split=held-out", "--revision": "abc123", "--variant": "fp16",
    }  # fmt: skip
    assert given["--prompts"] == "FILE"
    assert given["--negative-prompt"] == "a blur"
    assert (given["--image-size"], given["--embedded-guidance"]) == ("768x1024", "3.5")
    draws = {"reference": {"name": "exact/gaussian", "split": "draws"}}
    assert "--data" not in command(record(model="exact/gaussian", protocol=draws))


@pytest.mark.slow
@pytest.mark.parametrize("data", ["digits:split=held-out", None])
@pytest.mark.parametrize("metric", ["fid", "psnr"])
def test_the_command_of_a_run_with_a_task_has_the_same_protocol(
    data: str | None, metric: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how: dict[str, Any] = {"steps": 1, "n": 4, "metrics": metric, "tasks": "inpaint:mask=half", "data": data}
    (made,) = samplerbench.evaluate("ddim", guidances="ddnm", model="digits", quiet=True, **how)
    words = shlex.split(command(made))
    with pytest.raises(SystemExit) as ended:
        main([*words[1:], "--out", str(tmp_path)])
    assert ended.value.code == 0
    assert [r["protocol"] for r in load(tmp_path).records] == [made["protocol"]]


# Figures


def test_the_measured_order_is_that_of_a_power_law() -> None:
    """gap is a squared distance: an error of C/NFE^p is a gap of C²/NFE^(2p)."""
    steps = [5.0, 10.0, 20.0, 40.0]
    for p in (1, 2, 3):
        found = Series("s", steps, [(0.7 / x**p) ** 2 for x in steps], [None] * 4)
        assert measured_order(found) == pytest.approx(p)
    assert measured_order(Series("s", [5.0, 5.0], [1.0, 2.0], [None, None])) is None


def test_the_pareto_front_is_what_no_point_beats() -> None:
    points = [(1.0, 9.0), (2.0, 5.0), (2.0, 7.0), (3.0, 6.0), (4.0, 1.0), (5.0, 1.0)]
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] <= p[1]}
    assert pareto(points, lower=True) == [p for p in points if p not in beaten]
    assert pareto([(x, -y) for x, y in points], lower=False) == [(1.0, -9.0), (2.0, -5.0), (4.0, -1.0)]


def test_series_are_sorted_by_cost_and_keep_their_spread() -> None:
    (found,) = series(
        one(record(steps=20, metrics={"fid": [1.0, 3.0, 2.0]}), record(steps=5)), "fid", "seconds_per_image"
    )
    assert found.x == [0.005, 0.02]
    assert found.y == [4.0, 2.0]
    assert found.sd == pytest.approx([0.1, 1.0])


def test_a_sweep_of_scales_is_one_series_per_sampler_and_steps() -> None:
    made = [record("ddim", guidance=f"cfg:scale={g}", metrics={"fid": 1.0 + g}) for g in (3, 1.5, 2)]
    (found,) = sweeps(one(*made, record("heun", guidance="cfg:scale=2", metrics={"fid": 9.0})), "fid")
    assert (found.label, found.x, found.y) == ("ddim + cfg, 10 steps", [1.5, 2.0, 3.0], [2.5, 3.0, 4.0])
    assert not sweeps(one(record(), record("heun")), "fid")


def test_styles_differ_in_colour_mark_and_line_for_as_long_as_they_can() -> None:
    looks = [tuple(style(i).values()) for i in range(28)]
    assert len(set(looks)) == 28
    assert len({look[1:] for look in looks}) == 28  # in print, without colour, too


def test_the_figure_holds_the_points_and_the_bands() -> None:
    figure = metric_figure(one(record(steps=5), record(steps=10), record("heun", 5)), "fid", "nfe")
    (axes,) = figure.axes
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[5, 10], [5]]
    band = axes.collections[0].get_datalim(axes.transData)
    assert (band.y0, band.y1) == pytest.approx((3.9, 4.1))


def test_the_gap_is_drawn_with_its_order() -> None:
    made = [record(steps=n, metrics={"gap": 1.0 / n**4}) for n in (5, 10, 20)]
    figure = metric_figure(one(*made), "gap", "nfe")
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["ddim (order 2.0)"]


def test_over_seconds_the_pareto_front_is_drawn() -> None:
    made = [record("a", 5, metrics={"fid": [9.0] * 3}), record("a", 10, metrics={"fid": [3.9] * 3}), record("b", 20)]
    front = metric_figure(one(*made), "fid", "seconds_per_image").axes[0].get_lines()[-1]
    assert front.get_label() == "Pareto front"
    assert list(zip(*front.get_data(), strict=True)) == [(0.005, 9.0), (0.01, 3.9)]


def test_figures_are_as_many_as_the_results_allow(tmp_path: Path) -> None:
    made = one(record(guidance="cfg:scale=2"), record(guidance="cfg:scale=3"))
    found = figures(made, {})
    assert set(found) == {"fid-vs-nfe", "fid-vs-seconds-per-image", "fid-vs-guidance"}
    svg, png = save(found["fid-vs-guidance"](), tmp_path / "f")
    assert "<svg" in svg.read_text("utf-8")
    with Image.open(png) as picture:
        assert picture.format == "PNG"
    before = svg.read_bytes()
    save(found["fid-vs-guidance"](), tmp_path / "f")
    assert svg.read_bytes() == before


def test_metrics_with_similar_names_have_figures_of_their_own() -> None:
    made = one(record(metrics={"x:a=1": 1.0, "x:a=-1": 2.0}))
    found = figures(made, {})
    drawn = {found[name]().axes[0].get_ylabel() for name in ("x-a-1-vs-nfe", "x-a-1-2-vs-nfe")}
    assert {label.split(" ")[0] for label in drawn} == {"x:a=1", "x:a=-1"}


def test_a_name_with_dollars_is_no_formula(tmp_path: Path) -> None:
    svg, _ = save(metric_figure(one(record("$x^{$_")), "fid", "nfe"), tmp_path / "f")
    assert "$x^{$_" in svg.read_text("utf-8")


def test_tiles_are_cut_from_a_sheet_as_a_run_writes_it(tmp_path: Path) -> None:
    import torch

    from samplerbench.data.grid import save_grid

    for side, n in ((8, 9), (12, 7), (16, 100), (32, 5)):
        pixels = torch.randint(0, 250, (n, 1, side, side), dtype=torch.uint8)
        save_grid(pixels, tmp_path / "sheet.png")
        zoom = max(1, math.ceil(32 / side))
        found = tiles(tmp_path / "sheet.png", {"n": n}, 4)
        for i, image in enumerate(found):
            assert np.array_equal(np.asarray(image), np.kron(pixels[i, 0].numpy(), np.ones((zoom, zoom))))
        assert len(found) == 4


def test_a_sheet_that_cannot_be_read_has_no_tiles(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"no picture")
    assert tiles(tmp_path / "x.png", {"n": 9}, 4) == []
    sheet(10).resize((10, 11)).save(tmp_path / "small.png")
    assert tiles(tmp_path / "small.png", {"n": 9}, 4) == []


def test_large_tiles_are_scaled_down() -> None:
    assert block([Image.new("RGB", (512, 256))] * 3, columns=2).size == (2 * 130 - 2, 2 * 66 - 2)


def test_the_sample_figure_has_the_same_images_in_every_cell(tmp_path: Path) -> None:
    made = [record("a", 5), record("a", 10), record("b", 10)]
    files = put(tmp_path, *made, shade=100)
    found = one(*made)
    figure = samples_figure(found, {r["protocol"]: f.with_suffix(".png") for r, f in zip(made, files, strict=True)})
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(shown) == 3
    assert len(figure.axes) == 4  # b has no cell at 5 steps
    assert set(np.unique(shown[0])) == {100, 101, 102, 103, 104, 105, 255}


# The terminal


def test_the_text_plot_puts_points_on_a_log_scale() -> None:
    found = text_plot([Series("s", [1.0, 10.0, 100.0], [100.0, 10.0, 1.0], [])], "NFE", "FID", True, 41, 11).plain
    lines = found.splitlines()[1:12]
    spots = [(i, line.index("a", 11) - 11) for i, line in enumerate(lines) if "a" in line[11:]]
    assert spots == [(0, 0), (5, 20), (10, 40)]
    assert lines[0].split()[0] == "100.0"
    assert lines[10].split()[0] == "1.00"
    assert found.splitlines()[-1].split() == ["a", "s"]


def test_the_text_plot_draws_a_line_between_points() -> None:
    plot = text_plot([Series("s", [1.0, 100.0], [1.0, 1.0], [])], "x", "y", True, 20, 5).plain
    (row,) = [line for line in plot.splitlines() if line.count("a") == 2]
    assert all(0x2800 < ord(c) <= 0x28FF for c in row[12:-1])
    assert len(row) == 11 + 20


# The command


def run(*arguments: str, code: int = 0) -> Any:
    found = CliRunner().invoke(app, ["report", *arguments])
    assert found.exit_code == code, found.output
    return found


def test_the_command_writes_everything(tmp_path: Path) -> None:
    put(tmp_path, record("a"), record("b", metrics={"fid": [7.0, 7.1, 7.2]}), shade=50)
    shown = run(str(tmp_path), "--plot").output
    out = tmp_path / "report"
    assert {f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file()} == {
        "report.md", "cells.csv", "tables.tex", "report.tex", "report.json", "report.html", "plots/samples.svg",
        "plots/samples.png", "plots/fid-vs-nfe.svg", "plots/fid-vs-nfe.png", "plots/fid-vs-seconds-per-image.svg",
        "plots/fid-vs-seconds-per-image.png",
    }  # fmt: skip
    assert "FID ↓ (digits-cnn features" in shown
    assert "* 4.00 ± 0.10" in shown
    assert "* the best of its column" in shown
    [table] = json.loads((out / "report.json").read_text("utf-8"))["groups"][0]["tables"]
    assert f"FID ↓ ({table['measured_in']})" in shown.replace("\n", " ")
    assert table["measured_in"].count("(") == table["measured_in"].count(")")
    assert {r["label"] for r in json.loads((out / "report.json").read_text("utf-8"))["groups"][0]["records"]} == {
        "a",
        "b",
    }


def test_the_width_of_a_pipe_is_that_of_columns_and_nothing_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table of 8 columns and two long titles; without COLUMNS a pipe has 140 columns."""
    made = [record("s" * 40, steps, metrics={"fid": [123.4 + steps, 125.0]}) for steps in range(1, 9)]
    put(tmp_path, *made, record("b", n=16, model="m" * 60, protocol={"model": {"source": "q" * 60, "weights": "v"}}))
    monkeypatch.setenv("COLUMNS", "80")
    narrow = run(str(tmp_path), "--format", "md").output
    lines = [line for line in narrow.splitlines() if not line.startswith(str(tmp_path)[:5])]
    assert max(map(len, lines)) <= 80
    assert "…" not in narrow.replace("q" * 12 + "…", "").replace("m" * 12 + "…", "")
    monkeypatch.delenv("COLUMNS")
    wide = run(str(tmp_path), "--format", "md").output
    assert 80 < max(map(len, wide.splitlines())) <= 140
    for text in ("124.7", "128.2"):
        assert any(text in line for line in lines), text


def test_two_protocols_and_a_damaged_cell_are_told_and_the_rest_is_rendered(tmp_path: Path) -> None:
    put(tmp_path, record("a"), record("b", n=16))
    (tmp_path / "broken.json").write_text("{")
    found = run(str(tmp_path), "--format", "md,json")
    assert "damaged or edited, left out: broken.json" in found.stderr
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert text.count("**FID ↓**") == 2
    assert "## n = 9" in text
    assert "## n = 16" in text
    assert "broken.json" in text


def test_names_do_not_act_on_the_terminal(tmp_path: Path) -> None:
    put(tmp_path, record("[red]x[/red]"), record("\x1b[31mescape"))
    shown = run(str(tmp_path), "--format", "md").output
    assert "[red]x[/red]" in shown
    assert "\x1b[31m" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "pdf"], "choose one of md, csv"),
        (["--metric", "kid"], "the results have fid"),
        (["--out", "."], "choose another"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    put(tmp_path, record())
    monkeypatch.chdir(tmp_path)
    found = run(".", *arguments, code=1)
    assert isinstance(found.exception, UserError)
    assert message in str(found.exception)
    assert "\n" not in str(found.exception)


def test_only_the_metrics_asked_for_are_reported(tmp_path: Path) -> None:
    put(tmp_path, record(metrics={"fid": 1.0, "acc": 0.5}))
    run(str(tmp_path), "--format", "md", "--metric", "acc")
    text = (tmp_path / "report" / "report.md").read_text("utf-8")
    assert "acc ↑" in text
    assert "FID" not in text

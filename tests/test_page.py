"""The page: one file, no network, everything escaped; driven in a headless Chromium where there is one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.synthetic_results import put, record

from samplerbench.report.html import embed, page
from samplerbench.results.groups import group

HOSTILE = "<script>window.hacked = 1</script><img src=x onerror=hacked=1>"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")


def write(folder: Path) -> Path:
    """A page of three samplers, one with a hostile name, two metrics, a second protocol and a problem."""
    made = [
        record("ddim", 5, metrics={"fid": [9.0, 9.2, 9.1], "acc": [0.5, 0.6, 0.7]}),
        record("ddim", 10, metrics={"fid": [5.0, 5.2, 5.1], "acc": [0.8, 0.9, 0.7]}),
        record("heun", 5, nfe=9, metrics={"fid": [4.0, 4.4, 4.2], "acc": [0.9, 0.9, 0.9]}),
        record(HOSTILE, 10, metrics={"fid": [30.0, 30.2, 30.1], "acc": [0.1, 0.2, 0.3]}),
    ]
    other = [record("unipc", 5, n=16, model=f"digits</title>{HOSTILE}")]
    files = put(folder, *made, *other, shade=100)
    pictures = {r["protocol"]: f.with_suffix(".png") for r, f in zip([*made, *other], files, strict=True)}
    out = folder / "page.html"
    out.write_text(page(group([*made, *other]), [f"damaged: {HOSTILE}"], pictures), "utf-8")
    return out


class Markup(HTMLParser):
    """Elements, and addresses they refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [str(v) for k, v in attrs if k in ("src", "href", "action", "data", "srcset", "poster")]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page on the disk."""
    return write(tmp_path_factory.mktemp("page"))


def test_the_page_refers_to_nothing_outside_itself(written: Path) -> None:
    found = Markup()
    found.feed(written.read_text("utf-8"))
    assert found.addresses == ["data:,", "#cells"]
    assert "link" in found.tags
    assert found.tags.count("script") == 3
    assert "img" not in found.tags  # neither the hostile name's, nor any before the script makes it


def test_the_embedded_data_cannot_end_its_element(written: Path) -> None:
    text = written.read_text("utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert HOSTILE in {r["label"] for r in data["groups"][0]["records"]}
    assert len(data["pictures"]) == 5
    for character in "<>&":
        assert character not in found[1]
    assert json.loads(embed({"x": "</script><!--\u2028"})) == {"x": "</script><!--\u2028"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium with its logs."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if BROWSER is None or DRIVER is None:
        pytest.skip("no chromium and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--window-size=1280,900",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Any, written: Path) -> Any:
    """The browser with the page opened anew, its earlier logs read."""
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get_log("performance")
    browser.get(written.as_uri())
    return browser


def column(browser: Any, number: int) -> list[str]:
    """The texts of a column of the long table."""
    rows = browser.find_elements("css selector", "#cells tbody tr")
    return [row.find_elements("css selector", "th, td")[number].text for row in rows]


def press(browser: Any, selector: str) -> None:
    """Press a button as the keyboard does: focus and Enter."""
    browser.find_element("css selector", selector).send_keys("\n")


def webdriver_wait(browser: Any) -> Any:
    """Waits up to five seconds."""
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 5)


def curves(browser: Any) -> list[dict[str, Any]]:
    """What the plot draws."""
    return browser.execute_script(
        "return document.getElementById('plot').data.map((t) => ({name: t.name, x: t.x, y: t.y, sd: t.error_y.array}))"
    )


def test_the_page_opens_without_errors_requests_or_foreign_scripts(opened: Any, written: Path) -> None:
    press(opened, "#cells .open")
    press(opened, "#close")
    assert [entry for entry in opened.get_log("browser") if entry["level"] != "INFO"] == []
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert written.as_uri() in asked
    assert {url for url in asked if not url.startswith("data:")} == {written.as_uri()}
    assert opened.execute_script("return window.hacked === undefined")
    assert HOSTILE in column(opened, 0)
    assert HOSTILE in opened.find_element("css selector", ".problems").text


def test_a_heading_sorts_by_number_both_ways(opened: Any) -> None:
    for expected, state in ((["5", "5", "10", "10"], "ascending"), (["10", "10", "5", "5"], "descending")):
        press(opened, "[data-sort='steps']")
        assert column(opened, 2) == expected
        head = opened.find_element("css selector", "[data-sort='steps']").find_element("xpath", "..")
        assert head.get_attribute("aria-sort") == state
    press(opened, "[data-sort='metric:fid']")
    assert [float(text.split()[0]) for text in column(opened, 4)] == [4.2, 5.1, 9.1, 30.1]


def texts(browser: Any, selector: str) -> list[str]:
    """The texts of all elements of a selector."""
    return [element.text for element in browser.find_elements("css selector", selector)]


def test_the_filter_keeps_cells_that_have_every_word_everywhere(opened: Any) -> None:
    opened.find_element("id", "filter").send_keys("DDIM 5.10")
    assert column(opened, 0) == ["ddim"]
    assert column(opened, 2) == ["10"]
    assert opened.find_element("id", "count").text == "1 of 4 cells"
    assert [(c["name"], c["x"]) for c in curves(opened)] == [("ddim", [10])]
    assert texts(opened, "#matrix thead th")[1:] == ["10"]
    assert texts(opened, "#matrix tbody tr") == ["ddim 5.10 ± 0.10"]
    assert texts(opened, "#grids thead th")[1:] == ["10"]
    assert texts(opened, "#grids tbody th") == ["ddim"]
    assert texts(opened, "#story")[0].startswith("Lowest FID of all rows: ")


def test_a_number_in_the_filter_is_a_whole_number_of_the_cell(opened: Any) -> None:
    """The hash of a cell, or a longer number, may contain the digits."""
    for word, expected in (
        ("5", {("ddim", "5"), ("heun", "9")}),
        ("9", {("heun", "9")}),
        ("4", set()),
        ("hash", set()),
    ):
        field = opened.find_element("id", "filter")
        field.clear()
        field.send_keys(word)
        assert set(zip(column(opened, 0), column(opened, 3), strict=True)) == expected, word
    assert texts(opened, "#matrix tbody tr") == ["no cell matches"]
    assert curves(opened) == []


def test_the_samples_have_the_columns_of_the_table(opened: Any) -> None:
    """5 steps of Heun are 9 evaluations, so the table has the columns of NFE."""
    heads = texts(opened, "#matrix thead th")
    assert heads == ["sampler \\ NFE", "5", "9", "10"]
    assert texts(opened, "#grids thead th") == heads
    places = {}
    for row in opened.find_elements("css selector", "#grids tbody tr"):
        cells = row.find_elements("css selector", "td")
        places[row.find_element("css selector", "th").text] = [
            head for head, cell in zip(heads[1:], cells, strict=True) if cell.find_elements("css selector", "img")
        ]
    assert places == {"ddim": ["5", "10"], "heun": ["9"], HOSTILE: ["10"]}


@pytest.mark.slow
def test_a_generator_has_no_steps_and_is_a_line_across_the_plot(browser: Any, tmp_path: Path) -> None:
    gap = record("ddim", 10, metrics={"gap": [0.5] * 3})
    gap["metrics"]["gap"] |= {"features": "", "reference": ""}
    made = [record("ddim", 5), record("ddim", 20), record("real", None, nfe=0, spacing=None), gap]
    (tmp_path / "page.html").write_text(page(group(made), [], {}), "utf-8")
    browser.get((tmp_path / "page.html").as_uri())
    assert texts(browser, "#metrics button") == ["FID ↓", "Gap ↓"]
    assert texts(browser, "#matrix thead th")[1:] == ["5", "20", "–"]
    assert ("real", "–", "–") in set(zip(*(column(browser, i) for i in (0, 1, 2)), strict=True))
    (real,) = [c for c in curves(browser) if c["name"] == "real"]
    assert (real["x"], real["y"]) == ([5, 20], pytest.approx([4.0, 4.0]))
    press(browser, "[data-value='gap']")
    assert texts(browser, "#matrix caption") == ["Gap ↓"]


def test_the_switches_change_the_plot_and_the_table(opened: Any) -> None:
    (ddim,) = [c for c in curves(opened) if c["name"] == "ddim"]
    assert (ddim["x"], ddim["y"]) == ([5, 10], pytest.approx([9.1, 5.1]))
    assert ddim["sd"] == pytest.approx([0.1, 0.1])
    press(opened, "[data-value='acc']")
    press(opened, "[data-value='seconds_per_image']")
    (ddim,) = [c for c in curves(opened) if c["name"] == "ddim"]
    assert (ddim["x"], ddim["y"]) == (pytest.approx([0.005, 0.01]), pytest.approx([0.6, 0.8]))
    assert opened.find_element("css selector", "#matrix caption").text.startswith("acc ↑")
    assert opened.find_element("css selector", "[data-value='acc']").get_attribute("aria-pressed") == "true"


def test_a_sampler_can_be_taken_out_and_put_back(opened: Any) -> None:
    for left in (3, 4):
        press(opened, "[data-label='heun']")
        assert len(column(opened, 0)) == left
        assert ("heun" in {c["name"] for c in curves(opened)}) == (left == 4)


def test_hover_names_the_point(opened: Any) -> None:
    from selenium.webdriver import ActionChains

    marks = opened.find_elements("css selector", "#plot .scatterlayer .trace .points path")
    ActionChains(opened).move_to_element(marks[1]).perform()
    shown = "#plot .hoverlayer .hovertext"
    text = webdriver_wait(opened).until(lambda d: [e.text for e in d.find_elements("css selector", shown)])[0]
    assert text.startswith("ddim\nFID 9.10 ± 0.10\n")
    assert "5 steps, 5 NFE" in text


def test_details_hold_the_command_the_protocol_and_the_samples(opened: Any) -> None:
    press(opened, "#cells .open")
    body = opened.find_element("id", "details")
    assert body.is_displayed()
    assert body.find_element("css selector", ".command").text.startswith("samplerbench run --sampler")
    assert json.loads(body.find_element("css selector", ".json").get_property("textContent"))["dtype"] == "float32"
    image = body.find_element("css selector", "img")
    assert opened.execute_script("return arguments[0].naturalWidth", image) == 4 * 34 - 2
    press(opened, "#close")
    assert not body.is_displayed()


def test_the_other_protocol_is_a_page_of_its_own(opened: Any) -> None:
    opened.find_elements("css selector", "#group option")[1].click()
    assert column(opened, 0) == ["unipc"]
    assert [c["name"] for c in curves(opened)] == ["unipc"]


def test_the_theme_switch_changes_the_colours(opened: Any) -> None:
    ask = "return getComputedStyle(document.body).backgroundColor"
    before = opened.execute_script(ask)
    press(opened, "#theme")
    assert opened.execute_script(ask) != before
    press(opened, "#theme")
    assert opened.execute_script(ask) == before


@pytest.fixture
def phone(opened: Any) -> Iterator[Any]:
    """The page on a screen of 390 × 844 pixels."""
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    wait = webdriver_wait(opened)
    wait.until(lambda d: d.execute_script("return document.querySelector('#plot .main-svg').clientWidth") < 390)
    yield opened
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def right_edge(browser: Any, selector: str) -> float:
    """The horizontal position at which the first element of a selector ends, in pixels."""
    ask = "return document.querySelector(arguments[0]).getBoundingClientRect().right"
    return float(browser.execute_script(ask, selector))


def test_a_phone_scrolls_down_only(phone: Any) -> None:
    assert phone.execute_script("return document.documentElement.scrollWidth") == 390


def test_a_phone_shows_the_chosen_metric_and_the_samples_without_scrolling_sideways(phone: Any) -> None:
    for metric, title in (("fid", "FID ↓"), ("acc", "acc ↑")):
        press(phone, f"[data-value='{metric}']")
        assert texts(phone, "#cells thead th")[:3] == ["Sampler", "NFE", title]
        assert right_edge(phone, "#cells tbody td:nth-child(3)") <= 390
    assert right_edge(phone, "#grids img") <= 390
    assert texts(phone, "#grids thead th") == ["sampler \\ NFE", "5", "9", "10"]


def shown(labels: list[int] | None = None, texts: list[str] | None = None, ids: list[str] | None = None) -> Any:
    """The field `shown` of a record with nine samples."""
    optional = {"labels": labels, "texts": texts, "ids": ids}
    return {"shown": {"images": 9} | {name: value for name, value in optional.items() if value is not None}}


def embedded(folder: Path, *made: dict[str, Any]) -> dict[str, Any]:
    """The data of the page of records with sheets; sample i of record k has the grey level 20 k + i."""
    files = [put(folder, r, shade=20 * k)[0] for k, r in enumerate(made)]
    pictures = {r["protocol"]: f.with_suffix(".png") for r, f in zip(made, files, strict=True)}
    text = page(group(made), [], pictures)
    (folder / "page.html").write_text(text, "utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert data is not None
    return json.loads(data[1])


def levels(sample: dict[str, Any], *made: dict[str, Any]) -> list[set[int]]:
    """The grey levels of the image of each record."""
    return [_levels(sample["tiles"][r["protocol"]]) for r in made]


def _levels(uri: str) -> set[int]:
    import base64
    import io

    from PIL import Image

    head, content = uri.split(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        return set(image.convert("L").tobytes())


PROMPTED = {"protocol": {"model": {"source": "t2i", "prompts": "hash"}}}
TEXTS = ["a red cat", HOSTILE, "a boat"]


def test_samples_with_the_same_prompt_and_noise_are_side_by_side(tmp_path: Path) -> None:
    """Prompts 0, 1, 2 repeat, so the first three samples are shown, and one more to have four."""
    index = [i % 3 for i in range(9)]
    given = shown(index, [TEXTS[i] for i in index], [f"p{i}" for i in index]) | PROMPTED
    made = [record("ddim", 5, **given), record("ddim", 10, **given), record("heun", 5, nfe=9, **given)]
    data = embedded(tmp_path, *made)
    assert all("shown" not in r for r in data["groups"][0]["records"])
    (same,) = data["same"]
    assert [sample["heading"] for sample in same] == [*TEXTS, TEXTS[0]]
    assert [sample["note"] for sample in same] == [
        *(f"id p{i}, prompt {i}, sample {i}, seed 0" for i in range(3)),
        "id p0, prompt 0, sample 3, seed 0",
    ]
    for i, sample in enumerate(same):
        assert levels(sample, *made) == [{i}, {20 + i}, {40 + i}]


def test_the_first_sample_of_each_label_is_shown_with_the_name_of_its_class(tmp_path: Path) -> None:
    index = [7, 7, 7, 2, 2, 5, 4, 4, 3]
    made = [record(s, 5, **shown(index, [f"name {i}" for i in index])) for s in ("ddim", "unipc")]
    (same,) = embedded(tmp_path, *made)["same"]
    assert [(s["heading"], s["note"]) for s in same] == [
        (f"Class {label}: name {label}", f"sample {i}, seed 0") for i, label in ((0, 7), (3, 2), (5, 5), (6, 4), (8, 3))
    ]
    assert levels(same[2], *made) == [{5}, {25}]


def test_a_model_without_labels_has_the_first_four_samples(tmp_path: Path) -> None:
    made = [record(s, 5, labels="none", **shown()) for s in ("ddim", "unipc")]
    (same,) = embedded(tmp_path, *made)["same"]
    assert [(s["heading"], s["note"]) for s in same] == [(f"Sample {i}", "seed 0") for i in range(4)]


def test_a_result_of_an_older_version_takes_the_labels_of_the_same_condition(tmp_path: Path) -> None:
    """Without any other, only a run with one label says what it is."""
    index = [i % 3 for i in range(9)]
    made = [record("ddim", 5, **shown(index)), record("unipc", 5)]
    (same,) = embedded(tmp_path / "a", *made)["same"]
    assert [s["heading"] for s in same] == ["Class 0", "Class 1", "Class 2", "Class 0"]
    assert levels(same[1], *made) == [{1}, {21}]
    for labels, headings in (("balanced", ["Sample 0", "Sample 1"]), ("7", ["Class 7", "Class 7"])):
        older = [record(s, 5, labels=labels) for s in ("ddim", "unipc")]
        (same,) = embedded(tmp_path / labels, *older)["same"]
        assert [s["heading"] for s in same][:2] == headings


def test_cells_are_compared_only_if_noise_and_condition_are_equal(tmp_path: Path) -> None:
    """Another seed has other noise, a generator none; other labels of the same index are another sample."""
    a, b = ([i % k for i in range(9)] for k in (2, 3))
    made = [
        record("ddim", 5, **shown(a)),
        record("unipc", 5, **shown(a)),
        record("heun", 5, **shown(b)),
        record("ddim", 5, seed=1, **shown(a)),
        record("unipc", 5, seed=1, **shown(a)),
        record("real", None, nfe=0, spacing=None, protocol={"spacing": None}, **shown(a)),
        record("deis", 5, seed=2, **shown(a)),
    ]
    (same,) = embedded(tmp_path, *made)["same"]
    keys = [r["protocol"] for r in made]
    places = [(s["heading"], s["note"], sorted(keys.index(key) for key in s["tiles"])) for s in same]
    assert places[:4] == [
        ("Class 0", "sample 0, seed 0", [0, 1, 2]),
        ("Class 1", "sample 1, seed 0", [0, 1, 2]),
        ("Class 0", "sample 2, seed 0", [0, 1]),
        ("Class 1", "sample 3, seed 0", [0, 1]),
    ]
    assert {(note.split()[-1], tuple(cells)) for _, note, cells in places[4:]} == {("1", (3, 4))}


def test_a_single_cell_has_nothing_to_compare_with(tmp_path: Path) -> None:
    assert embedded(tmp_path, record("ddim", 5, **shown()))["same"] == [[]]


@pytest.mark.slow
def test_large_samples_are_scaled_down_and_the_page_stays_small(tmp_path: Path) -> None:
    """Noise is what compresses worst: 20 cells of 16 images of 512 x 512 take less than 45 MiB as PNG files."""
    import torch

    from samplerbench.data.grid import grid_size, save_grid
    from samplerbench.report.same_noise import MAX_PIXELS

    assert [grid_size(100, (3, side, side)) for side in (8, 256, 512, 1024, 8192)] == [100, 100, 64, 16, 1]
    made = [record(f"ddim:eta=0.{k}", 5, n=4, shown={"images": 4}) for k in range(1, 9)]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (4, 3, 512, 512), dtype=torch.uint8, generator=generator)
    pictures = {}
    for r, file in zip(made, put(tmp_path, *made), strict=True):
        save_grid(noise, file.with_suffix(".png"))
        pictures[r["protocol"]] = file.with_suffix(".png")
    text = page(group(made), [], pictures)
    data = json.loads(re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)[0])
    (same,) = data["same"]
    assert len(same) == 4
    assert "scaled down to 256 pixels" in data["same_note"]
    uris = [uri for sample in same for uri in sample["tiles"].values()]
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in uris)
    assert len(uris) * 256 * 256 <= MAX_PIXELS
    assert sum(map(len, uris)) / len(uris) < 3 * 256 * 256  # less than a byte a value, even for noise


def test_the_comparison_follows_the_filter_and_the_switches(browser: Any, tmp_path: Path) -> None:
    index = [i % 3 for i in range(9)]
    given = shown(index, [TEXTS[i] for i in index]) | PROMPTED
    embedded(tmp_path, record("ddim", 5, **given), record("ddim", 10, **given), record("heun", 5, nfe=9, **given))
    browser.get((tmp_path / "page.html").as_uri())
    assert texts(browser, "#same h3") == [*TEXTS, TEXTS[0]]  # the hostile prompt is text
    assert browser.execute_script("return window.hacked === undefined")
    first = "#same article:first-child "
    assert texts(browser, first + "thead th") == ["sampler \\ NFE", "5", "9", "10"]
    assert texts(browser, first + "tbody th") == ["ddim", "heun"]
    alts = [e.get_attribute("alt") for e in browser.find_elements("css selector", first + "img")]
    assert alts == ["ddim, 5 steps, 5 NFE", "ddim, 10 steps, 10 NFE", "heun, 5 steps, 9 NFE"]
    assert browser.execute_script("return [...document.querySelectorAll('#same img')].every((i) => i.naturalWidth)")
    press(browser, "[data-label='heun']")
    assert texts(browser, first + "tbody th") == ["ddim"]
    browser.find_element("id", "filter").send_keys("heun")
    assert not browser.find_element("id", "same-section").is_displayed()


@pytest.mark.slow
def test_restorations_are_shown_with_their_truth_and_observation(browser: Any, tmp_path: Path) -> None:
    import samplerbench
    from samplerbench.report.load import load

    how: dict[str, Any] = {"steps": 1, "n": 5, "model": "exact:mixture", "metrics": "psnr", "quiet": True}
    samplerbench.evaluate("ddim", guidances=["ddnm", "none"], tasks="inpaint", out=tmp_path, **how)
    found = load(tmp_path)
    (tmp_path / "page.html").write_text(page(group(found.records), [], found.pictures), "utf-8")
    browser.get((tmp_path / "page.html").as_uri())
    assert browser.find_element("id", "same-title").text == "Restorations of the same observation"
    articles = browser.find_elements("css selector", "#same article")
    assert len(articles) == 4
    for article in articles:
        assert [f.text for f in article.find_elements("css selector", "figure")] == ["truth", "observation"]
        assert len(article.find_elements("css selector", "td img")) == 2
    assert "three rows: the truth, the observation" in browser.find_element("id", "grids-about").text
    pictures = browser.find_elements("css selector", "#grids img")
    assert [p.get_attribute("alt").partition(" of ")[0] for p in pictures] == [
        "Truth, observation and restored images"
    ] * 2
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_the_comparison_fits_a_phone(phone: Any) -> None:
    assert right_edge(phone, "#same img") <= 390
    assert texts(phone, "#same article:first-child thead th") == ["sampler \\ NFE", "5", "9", "10"]


@pytest.mark.slow
def test_long_names_of_schedulers_do_not_widen_the_page(browser: Any, tmp_path: Path) -> None:
    """The name of a scheduler of diffusers with its parameters is wider than a phone."""
    name = "diffusers/DPMSolverMultistepScheduler:use_karras_sigmas=true"
    embedded(tmp_path, *(record(s, n, **shown()) for s in (name, "ddim") for n in (5, 10)))
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        browser.get((tmp_path / "page.html").as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

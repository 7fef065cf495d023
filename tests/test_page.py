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

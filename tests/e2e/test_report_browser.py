"""Reports in chromium, without a network: nothing on the console, filters and views of the samples,
light and dark, a narrow screen. `make test-browser`."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain.cli.main import main
from tests.report_folders import EVIL, PROMPT, TEXTS, add_samples, run_folder

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from selenium import webdriver

    programs = [shutil.which("chromium"), shutil.which("chromedriver")]
    assert all(programs), "no chromium here: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(programs[1])
    with webdriver.Chrome(options, service) as driver:
        driver.execute_cdp_cmd("Network.enable", {})
        yield driver


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folders = tmp_path_factory.mktemp("runs")
    add_samples(run_folder(folders / "one", note=EVIL))
    add_samples(run_folder(folders / "two", lr=0.5), held_out=False)
    out = folders / "report.html"
    assert main(["report", str(folders / "one"), str(folders / "two"), "--out", str(out)]) == 0
    return out


def show(chromium: Any, path: Path, *, width: int = 1280, scheme: str = "light") -> Any:
    """The page, loaded and drawn from top to bottom."""
    size = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": width < 600}
    feature = {"name": "prefers-color-scheme", "value": scheme}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    chromium.get("about:blank")
    for log in ("browser", "performance"):
        chromium.get_log(log)
    chromium.get(path.as_uri())
    chromium.execute_script("sessionStorage.clear(); location.reload()")
    until(lambda: chromium.execute_script("return document.readyState === 'complete'"))
    if "packed-samples" in path.read_text():
        until(lambda: chromium.execute_script("return document.body.dataset.ready === 'yes'"))
    figures = chromium.find_elements("css selector", "figure:has(script.spec)")
    chromium.execute_script("document.querySelectorAll('details').forEach((d) => d.open = true)")
    for figure in figures:
        chromium.execute_script("arguments[0].scrollIntoView()", figure)
    drawn = "return document.querySelectorAll('figure canvas').length"
    until(lambda: chromium.execute_script(drawn) == len(figures))
    return chromium


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)


def fill(driver: Any, **values: str) -> list[str]:
    """Sets filters as a person does; the first cells of the rows that are left."""
    script = """
        const form = document.querySelector("#viewer form");
        form.reset();
        for (const [name, value] of Object.entries(arguments[0])) form.elements[name].value = value;
        form.dispatchEvent(new Event("input"));
        return [...document.querySelectorAll("#list tbody tr")].map((r) => r.innerText);
    """
    return driver.execute_script(script, values)


def fits(driver: Any) -> bool:
    return driver.execute_script(
        "return document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    )


def count(driver: Any) -> str:
    return driver.find_element("css selector", ".pager span").text.partition(" samples")[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_on_the_console_nothing_loaded_and_no_sideways_scrolling(
    chromium, page, width, scheme
):
    driver = show(chromium, page, width=width, scheme=scheme)
    fill(driver, run="0", prompt="0")
    assert fits(driver)
    said = driver.get_log("browser")
    assert not said, said
    events = [json.loads(e["message"])["message"] for e in driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}
    ground = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, ground.removeprefix("rgb(").removesuffix(")").split(","))) > 384
    assert light == (scheme == "light")


def test_filters(chromium, page):
    driver = show(chromium, page)
    assert count(driver) == "26 of 26"
    for values, expected in (
        ({"run": "1"}, "12 of 26"),
        ({"held_out": "1"}, "2 of 26"),
        ({"step": "1"}, "12 of 26"),
        ({"prompt": "0"}, "2 of 26"),
        ({"low": "1"}, "10 of 26"),
        ({"high": "0"}, "12 of 26"),
        ({"finish": "length"}, "4 of 26"),
        ({"correct": "null"}, "4 of 26"),
        ({"find": "世界"}, "4 of 26"),
        ({"find": "ONERROR"}, "5 of 26"),
        ({"find": "what is <b>1+1", "run": "0"}, "14 of 26"),
        ({"find": "nowhere"}, "0 of 26"),
    ):
        fill(driver, **values)
        assert count(driver) == expected, values
    rows = fill(driver, correct="null", run="1")
    assert all("unscored" in row for row in rows), "an unscored sample has no reward of 0"


def test_pages_and_sorting(chromium, page):
    driver = show(chromium, page)
    fill(driver)
    first = driver.find_elements("css selector", "#list tbody tr")
    assert len(first) == 12
    driver.find_element("css selector", ".pager button:last-child").click()
    assert "13 to 24" in driver.find_element("css selector", ".pager span").text
    heads = driver.find_elements("css selector", "#list th")
    next(h for h in heads if h.text == "tokens").click()
    cells = driver.find_elements("css selector", "#list tbody td:nth-child(4)")
    lengths = [int(c.text) for c in cells]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 2


def test_a_sample_shows_its_tokens_and_no_text_is_html(chromium, page):
    driver = show(chromium, page)
    for text in TEXTS:
        if not text.strip():
            continue
        fill(driver, run="0", held_out="0", step="1", find=text.split()[0])
        driver.execute_script("document.querySelector('#list tbody tr').click()")
        spans = driver.find_elements("css selector", "#sample .tokens [data-t]")
        shown = driver.execute_script(
            "return document.querySelector('#sample .tokens').textContent"
        )
        assert shown == text and len(spans) == len(text.encode()), "a token is a byte here"
        marked = driver.find_elements("css selector", "#sample .tokens .trained")
        assert len(marked) == len([i for i in range(len(spans)) if i % 3 > 1])
    asked = driver.execute_script("return document.querySelector('#sample .text').textContent")
    assert asked == PROMPT
    assert driver.title == "one, two" and not driver.find_elements("css selector", "img")
    fill(driver, run="0", held_out="0", step="1", correct="true")
    driver.execute_script("document.querySelector('#list tbody tr').click()")
    spans = driver.find_elements("css selector", "#sample .tokens [data-t]")
    colours = {s.value_of_css_property("background-color") for s in spans}
    assert len(colours) > 3, "log-probs are colours"


def test_one_prompt_over_training(chromium, page):
    driver = show(chromium, page)
    fill(driver, run="1")
    driver.execute_script("document.querySelector('#list tbody tr').click()")
    driver.find_element("css selector", "#sample button").click()
    titles = [h.text for h in driver.find_elements("css selector", ".side h3")]
    assert titles == ["Step 1, two", "Step 3, two"]
    assert len(driver.find_elements("css selector", ".side dl")) == 2 * len(TEXTS)


def test_what_was_chosen_outlives_a_reload(chromium, page):
    driver = show(chromium, page)
    fill(driver, find="世界")
    driver.execute_script("delete document.body.dataset.ready; location.reload()")
    until(lambda: driver.execute_script("return document.body?.dataset.ready === 'yes'"))
    assert count(driver) == "4 of 26"


def test_a_pipeline_and_what_prep_wrote(chromium, tmp_path):
    from tests.unit.test_report_pipeline import write_pipeline

    folder = write_pipeline(tmp_path / "p")
    rows = [{"prompt": EVIL, "chosen": f"a{i}", "rejected": EVIL, "margin": i} for i in range(20)]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    pairs = tmp_path / "pairs"
    assert main(["report", str(folder)]) == 0
    assert main(["prep", "pairs", str(tmp_path / "raw.jsonl"), "--out", str(pairs)]) == 0
    for path in (folder / "report.html", pairs / "report.html"):
        for width in (1280, 390):
            driver = show(chromium, path, width=width)
            assert fits(driver)
            assert not (said := driver.get_log("browser")), said
            assert not driver.find_elements("css selector", "img") and driver.title != "1"

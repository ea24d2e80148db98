"""The caption page: what the file holds, and what a real browser shows of it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from pixelllm.pictures import word_color
from pixelllm.viewer import write_html

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMEDRIVER = shutil.which("chromedriver")
DESKTOP, PHONE = (1280, 800), (390, 844)
EVIL = "</script><img src=x onerror=window.broken=1>"


def make_caption(folder: Path, name: str, size=(320, 200), extra: str = "") -> dict:
    """Words across a plain image; the second has no point, the third no box."""
    path = folder / name
    Image.new("RGB", size, (70, 80, 90)).save(path)
    words = [
        {"text": "A", "point": [0.2, 0.3], "box": [0.1, 0.1, 0.4, 0.6], "log_prob": -0.1},
        {"text": "red", "point": None, "box": None, "log_prob": -0.2},
        {"text": "ball,", "point": [0.83, 0.71], "box": None, "log_prob": -0.3},
        {"text": "here", "point": [0.5, 0.5], "box": [0.3, 0.4, 0.6, 0.8], "log_prob": -0.4},
    ]
    return {
        "image": str(path),
        "size_hw": [size[1], size[0]],
        "caption": "A red ball, here" + extra,
        "words": words,
        "log_prob": -1.0,
    }


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not (CHROMIUM and CHROMEDRIVER):
        pytest.skip("no chromium and chromedriver on the path (packages chromium, chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    flags = "headless no-sandbox disable-gpu no-first-run disable-background-networking"
    for flag in [*flags.split(), "disable-component-update", "disable-sync", "hide-scrollbars"]:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(CHROMEDRIVER))
    yield driver
    driver.quit()


def show(browser, path: Path, size=DESKTOP, reduced_motion: bool = False) -> None:
    width, height = size
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": size == PHONE})
    motion = {"name": "prefers-reduced-motion", "value": "reduce" if reduced_motion else ""}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [motion]})
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(path.as_uri())


def wait(browser, script: str):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 15, poll_frequency=0.05).until(
        lambda b: b.execute_script(f"return {script}")
    )


def frame_of(browser, selector: str) -> dict[str, float]:
    script = "return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()"
    return browser.execute_script(script, selector)


def words_of(browser):
    return browser.find_elements("css selector", ".word")


def hover(browser, element) -> None:
    from selenium.webdriver import ActionChains

    ActionChains(browser).move_to_element(element).perform()


def assert_marker_at(browser, point, index: int, count: int) -> None:
    """The marker's middle, and the colour on the screen there, are the word's."""
    photo, marker = frame_of(browser, "#photo"), frame_of(browser, "#marker")
    expected = (photo["x"] + point[0] * photo["width"], photo["y"] + point[1] * photo["height"])
    middle = (marker["x"] + marker["width"] / 2, marker["y"] + marker["height"] / 2)
    assert middle == pytest.approx(expected, abs=2)
    screen = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    pixel = screen.getpixel((round(expected[0]), round(expected[1])))
    assert pixel == pytest.approx(word_color(index, count), abs=8)


@pytest.fixture
def page(tmp_path):
    caption = make_caption(tmp_path, "a.png", extra=EVIL)
    write_html([caption], tmp_path / "page.html", title="A <b>title</b>")
    return tmp_path / "page.html"


@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_hovered_or_tapped_word_shows_its_point_and_box(browser, page, size):
    """The acceptance check: the marker is where the JSON says, within 2 px."""
    show(browser, page, size)
    wait(browser, "document.querySelector('#photo').naturalWidth")
    for index, point in ((0, [0.2, 0.3]), (2, [0.83, 0.71])):
        if size == PHONE:
            target = frame_of(browser, f".word[data-index='{index}']")
            spot = {"x": target["x"] + target["width"] / 2, "y": target["y"] + 8}
            for kind, touches in (("touchStart", [spot]), ("touchEnd", [])):
                touch = {"type": kind, "touchPoints": touches}
                browser.execute_cdp_cmd("Input.dispatchTouchEvent", touch)
        else:
            hover(browser, words_of(browser)[index])
        wait(browser, f"document.querySelector('.word.now')?.dataset.index === '{index}'")
        assert_marker_at(browser, point, index, 4)
    assert browser.find_element("id", "box").is_displayed() is False
    browser.execute_script("document.querySelector('.word').click()")
    photo, box = frame_of(browser, "#photo"), frame_of(browser, "#box")
    expected = [photo["x"] + 0.1 * photo["width"], photo["x"] + 0.4 * photo["width"]]
    assert [box["left"], box["right"]] == pytest.approx(expected, abs=2)
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_word_without_a_point_shows_no_marker(browser, page):
    show(browser, page)
    hover(browser, words_of(browser)[1])
    assert "none for this word" in browser.find_element("id", "facts").text
    assert not browser.find_element("id", "marker").is_displayed()


def test_play_advances_to_the_end_and_stops(browser, page):
    show(browser, page)
    browser.find_element("id", "play").click()
    first = wait(browser, "document.querySelector('#scrub').value / 1")
    assert browser.find_element("id", "play").get_attribute("aria-label") == "Pause"
    wait(browser, "document.querySelector('.word.now')?.dataset.index === '3'")
    assert float(browser.find_element("id", "scrub").get_attribute("value")) > first
    wait(browser, "document.querySelector('#play').ariaLabel === 'Play'")
    assert not browser.find_elements("css selector", ".word.now, .word.later")


def test_scrubbing_lights_the_word_of_that_time(browser, page):
    show(browser, page)
    scrub = browser.find_element("id", "scrub")
    script = "arguments[0].value = 0; arguments[0].dispatchEvent(new Event('input'))"
    browser.execute_script(script, scrub)
    assert browser.find_element("css selector", ".word.now").text == "A"
    assert len(browser.find_elements("css selector", ".word.later")) == 3


def test_reduced_motion_steps_from_point_to_point(browser, page):
    """The marker is never between two words' points."""
    show(browser, page, reduced_motion=True)
    browser.find_element("id", "play").click()
    seen = set()
    deadline = time.monotonic() + 15
    while browser.find_element("id", "play").get_attribute("aria-label") == "Pause":
        assert time.monotonic() < deadline
        seen.add(browser.execute_script("return document.querySelector('#marker').style.left"))
    assert {"20%", "50%"} <= seen <= {"", "20%", "83%", "50%"}


def test_keyboard_walks_through_the_words(browser, page):
    from selenium.webdriver import ActionChains, Keys

    show(browser, page)
    keys = ActionChains(browser)
    for _ in range(4):  # play, scrub, speed, first word
        keys.send_keys(Keys.TAB)
    keys.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT).perform()
    assert browser.switch_to.active_element.text == "ball,"
    assert_marker_at(browser, [0.83, 0.71], 2, 4)


def test_hostile_text_is_only_text(browser, page):
    show(browser, page)
    assert browser.find_element("id", "caption").text == "A red ball, here" + EVIL
    assert browser.find_element("tag name", "h1").text == "A <b>title</b>"
    assert browser.execute_script("return window.broken") is None


def test_gallery_opens_an_image_and_returns(browser, tmp_path):
    captions = [make_caption(tmp_path, f"{n}.png", (200 + 40 * n, 200)) for n in range(3)]
    captions[1] |= {
        "title": "Second",
        "prompt_box": [0.5, 0.0, 1.0, 1.0],
        "reference": {"caption": "by hand", "traces": [[{"x": 0.1, "y": 0.2, "t": 0.0}] * 2]},
    }
    write_html(captions, tmp_path / "gallery.html")
    show(browser, tmp_path / "gallery.html")
    cards = browser.find_elements("css selector", ".card")
    assert len(cards) == 3
    cards[1].click()
    wait(browser, "document.querySelector('#photo').naturalWidth === 240")
    assert browser.find_element("id", "heading").text == "Second"
    assert browser.find_element("id", "prompt").is_displayed()
    browser.find_element("id", "reference").click()
    assert "by hand" in browser.find_element("id", "human").text
    browser.find_element("id", "next").click()
    wait(browser, "document.querySelector('#photo').naturalWidth === 280")
    browser.find_element("id", "back").click()
    wait(browser, "!document.querySelector('#gallery').hidden")
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_captions_of_one_image_share_its_picture(browser, tmp_path):
    """Three hundred boxes of a photo would fill the page with copies of it."""
    names = ("a.png", "b.png", "a.png", "a.png")
    made = {n: make_caption(tmp_path, n, (200 + 40 * (n == "b.png"), 200)) for n in names}
    write_html([made[name] for name in names], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("data:image/jpeg") == 2 * 2
    show(browser, tmp_path / "page.html")
    for number, width in ((4, 200), (2, 240)):
        browser.execute_script(f"location.hash = '#{number}'")
        wait(browser, f"document.querySelector('#photo').naturalWidth === {width}")


def test_large_gallery_loads_what_is_in_sight(browser, tmp_path):
    """Two hundred images stay usable: far thumbnails wait, no full image is decoded."""
    write_html([make_caption(tmp_path, "a.png")] * 200, tmp_path / "many.html")
    show(browser, tmp_path / "many.html")
    loaded = "document.querySelectorAll('.card img[src]').length"
    assert 0 < wait(browser, loaded) < 100
    assert browser.execute_script("return document.querySelector('#photo').src") == ""
    browser.execute_script("scrollTo(0, document.body.scrollHeight)")
    wait(browser, "document.querySelectorAll('.card img')[199].src")


def test_no_browser_request_leaves_the_file(browser, page):
    show(browser, page)
    script = "return performance.getEntriesByType('resource').map((e) => e.name)"
    assert all(name.startswith("data:") for name in browser.execute_script(script))


def test_file_is_self_contained(page):
    text = page.read_text()
    assert "default-src 'none'" in text
    assert not re.findall(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""", text)
    assert not re.findall(r"https?://|@import|fetch\(|XMLHttpRequest", text)


def test_embedded_image_is_scaled_down(tmp_path):
    write_html([make_caption(tmp_path, "large.png", (3000, 1500))], tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    encoded = re.search(r"data:image/jpeg;base64,([^<]+)", text).group(1)
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).size == (1024, 512)
    entry = json.loads(re.search(r'id="captions">(.*?)</script>', text).group(1))[0]
    assert entry["size"] == [1500, 3000] and entry["name"] == "large.png"


def test_infinite_log_probability_is_left_out(tmp_path):
    caption = make_caption(tmp_path, "a.png")
    caption["words"][0]["log_prob"] = caption["log_prob"] = float("-inf")
    write_html([caption], tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert "-Infinity" not in text and '"log_prob":null' in text


def test_no_caption_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no caption to show"):
        write_html([], tmp_path / "a.html")


def test_bad_caption_leaves_no_page(tmp_path):
    captions = [make_caption(tmp_path, "a.png"), make_caption(tmp_path, "b.png")]
    captions[1]["words"][0]["point"] = [0.5]
    with pytest.raises(ValueError, match="b.png: word 0"):
        write_html(captions, tmp_path / "page.html")
    assert not [p for p in tmp_path.iterdir() if "page" in p.name]

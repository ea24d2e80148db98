"""The page of objects: what the file holds, and what a real browser shows of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from test_viewer import DESKTOP, EVIL, PHONE, browser, frame_of, hover, show, wait  # noqa: F401

from pixelllm.dense_page import write_dense_html
from pixelllm.overlays import object_color

LARGE, SMALL, LEFT = (0.3, 0.2, 0.9, 0.9), (0.4, 0.4, 0.7, 0.6), (0.0, 0.0, 0.2, 0.3)


def detection(box, caption, score):
    words = [{"text": caption, "point": [0.5, 0.5], "box": list(box), "log_prob": -1.0}]
    scores = {"score": score, "detection_score": score / 2, "log_prob": -1.0}
    return {"box": list(box), "caption": caption, "words": words, **scores}


def make_result(folder: Path, name: str, *detections, size=(320, 200)) -> dict:
    path = folder / name
    Image.new("RGB", size, (70, 80, 90)).save(path)
    return {"image": str(path), "size_hw": [size[1], size[0]], "detections": list(detections)}


@pytest.fixture
def page(tmp_path) -> Path:
    found = (detection(LARGE, "a large box", 0.8), detection(SMALL, "a small box" + EVIL, 0.5))
    result = make_result(tmp_path, "a.png", *found, detection(LEFT, "in the corner", 0.2))
    write_dense_html([result], tmp_path / "page.html", "A <b>title</b>")
    return tmp_path / "page.html"


def rows(browser):  # noqa: F811
    return browser.find_elements("css selector", "#objects button")


def assert_shown(browser, box, caption: str) -> None:  # noqa: F811
    """The frame lies on the box, and the tag with its caption inside the picture."""
    stage, frame, tag = (frame_of(browser, name) for name in (".stage", "#box", "#tag"))
    sides = (frame["left"], frame["top"], frame["right"], frame["bottom"])
    extent = (stage["width"], stage["height"]) * 2
    start = (stage["left"], stage["top"]) * 2
    expected = [a + v * n for a, v, n in zip(start, box, extent, strict=True)]
    assert sides == pytest.approx(expected, abs=1.5)
    assert stage["left"] <= tag["left"] and tag["right"] <= stage["right"]
    assert stage["top"] <= tag["top"] and tag["bottom"] <= stage["bottom"]
    assert caption in browser.find_element("id", "tag").text


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_the_page_fits_the_screen(browser, page, size):  # noqa: F811
    show(browser, page, size)
    script = "[document.documentElement.scrollWidth, innerWidth]"
    width, screen = browser.execute_script(f"return {script}")
    assert width <= screen and len(rows(browser)) == 3
    rows(browser)[0].click()
    assert_shown(browser, LARGE, "a large box")
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_row_under_the_mouse_shows_its_box(browser, page):  # noqa: F811
    show(browser, page)
    hover(browser, rows(browser)[2])
    assert_shown(browser, LEFT, "in the corner · 0.20")
    hover(browser, browser.find_element("tag name", "h1"))
    assert not browser.find_element("id", "box").is_displayed()


def test_of_boxes_under_the_mouse_the_smallest_is_meant(browser, page):  # noqa: F811
    show(browser, page)
    hover(browser, browser.find_element("id", "photo"))  # its middle lies in two boxes
    assert_shown(browser, SMALL, "a small box")
    assert "now" in rows(browser)[1].get_attribute("class")


def test_a_tap_stays_and_a_second_one_lets_go(browser, page):  # noqa: F811
    show(browser, page, PHONE)
    browser.find_element("css selector", ".stage canvas").click()
    assert_shown(browser, SMALL, "a small box")
    assert rows(browser)[1].get_attribute("aria-pressed") == "true"
    browser.find_element("css selector", ".stage canvas").click()
    assert not browser.find_element("id", "box").is_displayed()


def test_keyboard_walks_through_the_objects(browser, page):  # noqa: F811
    from selenium.webdriver import ActionChains, Keys

    show(browser, page)
    keys = ActionChains(browser).send_keys(Keys.TAB, Keys.TAB)  # slider, first object
    keys.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN).perform()
    assert_shown(browser, LEFT, "in the corner")


def test_the_slider_leaves_the_surer_objects(browser, page):  # noqa: F811
    show(browser, page)
    script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
    for least, count in ((0.5, 2), (0.51, 1), (0, 3)):
        browser.execute_script(script, browser.find_element("id", "least"), least)
        assert len(rows(browser)) == count
        assert f"{count} of 3 objects" in browser.find_element("id", "meta").text


def test_hostile_text_is_only_text(browser, page):  # noqa: F811
    show(browser, page)
    assert rows(browser)[1].text.startswith("a small box" + EVIL)
    assert browser.find_element("tag name", "h1").text == "A <b>title</b>"
    assert browser.execute_script("return window.broken") is None


def test_several_images_make_a_gallery(browser, tmp_path):  # noqa: F811
    """One with hundreds of objects begins with those that are readable, one has none."""
    many = [detection(LEFT, f"object {n}", 1 - n / 400) for n in range(300)]
    results = [make_result(tmp_path, "many.png", *many), make_result(tmp_path, "none.png")]
    write_dense_html(results, tmp_path / "gallery.html")
    show(browser, tmp_path / "gallery.html")
    cards = browser.find_elements("css selector", ".card")
    assert [card.text for card in cards] == ["object 0; object 1; object 2", "nothing found"]
    cards[0].click()
    wait(browser, "document.querySelector('#photo').naturalWidth === 320")
    assert len(rows(browser)) == 41
    browser.find_element("id", "next").click()
    wait(browser, "document.querySelector('#meta').textContent.startsWith('0 of 0 objects')")
    browser.find_element("id", "back").click()
    wait(browser, "!document.querySelector('#gallery').hidden")
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_file_is_self_contained(page):
    text = page.read_text()
    assert "default-src 'none'" in text and "{{" not in text
    assert not re.findall(r"https?://|@import|fetch\(|XMLHttpRequest", text)
    (entry,) = json.loads(re.search(r'id="captions">(.*?)</script>', text).group(1))
    assert entry["size"] == [200, 320] and entry["objects"][0]["box"] == list(LARGE)
    assert entry["objects"][1]["color"] == list(object_color(1))


def test_no_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no image to show"):
        write_dense_html([], tmp_path / "a.html")


def test_a_missing_image_leaves_no_page(tmp_path):
    result = {**make_result(tmp_path, "a.png"), "image": str(tmp_path / "lost.png")}
    with pytest.raises(FileNotFoundError, match="lost.png"):
        write_dense_html([result], tmp_path / "page.html")
    assert not list(tmp_path.glob("page*"))

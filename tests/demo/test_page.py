"""The demo's page in a real browser: python -m pytest -m slow tests/demo/test_page.py

With EVLGEN_SCREENSHOTS=FOLDER the screenshots go there; those in docs/ are made so. With
EVLGEN_PHOTOS=FOLDER, a data root with the parts of run_scripts/photos, the photographs' captioner too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from evlgen.captioning import caption_files
from evlgen.datasets.shapes.world import draw, scene
from evlgen.models.zoo import load_model

pytestmark = pytest.mark.slow
WAIT = 120_000  # milliseconds for an answer on a busy machine
PHONE = {"width": 390, "height": 844}
DESKTOP = {"width": 1180, "height": 900}


@pytest.fixture(scope="module")
def chromium():
    for name in ("gradio", "playwright"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f'{name} is not installed: pip install "evlgen[demo]" playwright')
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(chromium, tmp_path_factory):
    """A demo of the bundled model twice, side by side, in a process of its own."""
    folder = tmp_path_factory.mktemp("demo")
    load_model("evlgen_opt", "shapes").save_pretrained(folder / "again")
    with demo(folder, str(folder / "again"), SHAPES) as address:
        yield address


@contextlib.contextmanager
def demo(folder: Path, *checkpoints: str, **environment: str):
    """The address of a demo."""
    command = [sys.executable, "-m", "evlgen", "demo", "--port", "0", *checkpoints]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, **environment}
        )
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+/", line)
    try:
        assert found, line + (folder / "log").read_text()
        yield found[0]
    finally:
        process.terminate()
        assert process.wait(60) in (0, -15)


SHAPES = str(Path(importlib.util.find_spec("evlgen").origin).parent / "assets" / "shapes" / "connector")


@pytest.fixture
def open_page(chromium, address, tmp_path):
    """Opens the page; at the end nothing but its server was asked for anything, and no script has failed."""
    asked, failures = [], []
    with contextlib.ExitStack() as stack:

        def open_page(scheme="light", size=DESKTOP):
            context = stack.enter_context(
                contextlib.closing(chromium.new_context(color_scheme=scheme, viewport=size))
            )
            page = context.new_page()
            page.set_default_timeout(WAIT)
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: failures.append(str(error)))
            page.goto(address)
            page.get_by_label("Caption by connector").wait_for()
            return page

        yield open_page
    others = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert (others, failures) == ([], [])


def drawn(folder: Path, number: int) -> Path:
    path = folder / f"{number}.png"
    Image.fromarray(draw(scene("test", number))).save(path)
    return path


def upload(page, path: Path) -> None:
    page.locator("#file input[type=file]").set_input_files(path)


def captions(page) -> list[str]:
    return [box.input_value() for box in page.locator(".caption textarea").all()]


def ask(page, question: str) -> None:
    """Asks, and waits until every chat shows the question."""
    page.locator("#question textarea").fill(question)
    page.keyboard.press("Enter")
    for chat in page.locator(".answers").all():
        wait_for(lambda chat=chat: question in chat.inner_text())


def tops(page) -> list[tuple[float, float]]:
    """Of each chat, where its label ends and where its messages begin, in pixels."""
    found = []
    for chat in page.locator(".answers").all():
        label = chat.locator("label").bounding_box()
        found.append((label["y"] + label["height"], chat.get_by_role("log").bounding_box()["y"]))
    return found


def wait_for(found, seconds: float = WAIT / 1000):
    ends = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < ends
        time.sleep(0.1)
    return value


def shot(page, name: str, tmp_path: Path) -> None:
    folder = Path(os.environ.get("EVLGEN_SCREENSHOTS", tmp_path))
    page.wait_for_timeout(1000)  # the end of animations
    page.screenshot(path=folder / f"{name}.png", full_page=True)


def test_upload_caption_merging_and_question(open_page, tmp_path):
    page = open_page()
    path = drawn(tmp_path, 1)
    upload(page, path)
    found = wait_for(lambda: all(captions(page)) and captions(page))
    ((_, expected),) = caption_files([str(path)])
    assert found == [expected, expected]
    words = page.locator(".words").first.inner_text().split()
    assert words[0] == expected.split()[0] and words[-3:] == ["(end)", words[-2], "%"]

    drawing = page.locator(".merging img").first
    page.get_by_text("again, layer 3: 17 soft prompts").wait_for()
    before = drawing.get_attribute("src")
    page.locator("#layer input[type=range]").focus()
    page.keyboard.press("ArrowLeft")  # the keyboard alone
    page.keyboard.press("ArrowLeft")
    page.get_by_text("again, layer 1: 49 tokens").wait_for()
    wait_for(lambda: drawing.get_attribute("src") != before)

    ask(page, "how many shapes are there?")
    wait_for(lambda: all("two" in part.inner_text() for part in page.locator(".answers").all()))
    ask(page, "what colour is it?")
    wait_for(lambda: page.locator(".answers").first.inner_text().count("?") == 2)
    assert all(messages >= label_end for label_end, messages in tops(page))
    page.locator("#layer input[type=range]").focus()
    page.keyboard.press("End")
    page.get_by_text("again, layer 3: 17 soft prompts").wait_for()
    shot(page, "demo", tmp_path)


def test_a_broken_file_is_explained_and_the_page_goes_on(open_page, tmp_path):
    page = open_page()
    whole = drawn(tmp_path, 2)
    for name, content, reason in (
        ("broken.png", whole.read_bytes()[:200], "broken"),
        ("page.jpg", b"<svg onload=alert(1)>", "is not an image"),
        ("video.mp4", b"\0" * 2000, "video.mp4"),
    ):
        (tmp_path / name).write_bytes(content)
        upload(page, tmp_path / name)
        wait_for(lambda reason=reason: reason in page.locator("#problem").inner_text())
        assert captions(page) == ["", ""] and str(tmp_path) not in page.locator("#problem").inner_text()
        page.locator("#file").get_by_label("Clear").first.click()
        wait_for(lambda: not page.locator("#problem").inner_text())
    upload(page, whole)
    wait_for(lambda: all(captions(page)))


def test_two_pages_at_once_keep_to_themselves(open_page, tmp_path):
    pages = [open_page(), open_page()]
    paths = [drawn(tmp_path, number) for number in (3, 7)]
    for page, path in zip(pages, paths, strict=True):
        upload(page, path)
    expected = [caption for _, caption in caption_files([str(path) for path in paths])]
    assert expected[0] != expected[1]
    for page, caption in zip(pages, expected, strict=True):
        assert wait_for(lambda page=page: all(captions(page)) and captions(page)) == [caption, caption]
    for page, text in zip(pages, ("how many shapes are there?", "what colour is it?"), strict=True):
        page.locator("#question textarea").fill(text)
        page.get_by_role("button", name="Ask").click()
    for page, text in zip(pages, ("how many shapes are there?", "what colour is it?"), strict=True):
        wait_for(lambda page=page, text=text: text in page.locator(".answers").first.inner_text())
        assert page.locator(".answers").first.inner_text().count("?") == 1


def test_examples_on_a_phone_in_the_dark(open_page, tmp_path):
    page = open_page("dark", PHONE)
    page.locator("#examples button").nth(3).click()  # the drawn video: its frames are images to this model
    found = wait_for(lambda: all(captions(page)) and captions(page))
    assert len(found[0].splitlines()) == 4
    page.get_by_text("again, layer 3: 17 soft prompts").wait_for()
    for image in page.locator(".merging").all():
        image.scroll_into_view_if_needed()  # they are loaded when they come into view
        wait_for(lambda image=image: image.locator("img").bounding_box()["height"] > 20)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert "dark" in page.evaluate("document.body.className")
    shot(page, "demo-phone", tmp_path)


def test_without_arguments_the_photographs_captioner_is_there_where_its_parts_are(chromium, tmp_path):
    parts = os.environ.get("EVLGEN_PHOTOS")
    if parts is None:
        pytest.skip("EVLGEN_PHOTOS does not name a data root with the parts of run_scripts/photos")
    with demo(tmp_path, EVLGEN_CACHE=parts) as address:
        page = chromium.new_page(viewport=DESKTOP)
        page.set_default_timeout(WAIT)
        page.goto(address)
        page.get_by_label("Caption by shapes").wait_for()
        page.get_by_label("Caption by photos").wait_for()
        names = [button.inner_text() for button in page.locator("#examples button").all()]
        assert [name.split()[0] for name in names] == ["drawn"] * 4 + ["Flickr8k"] * 4
        page.locator("#examples button").nth(6).click()
        found = wait_for(lambda: all(captions(page)) and captions(page))
        assert re.search(r"\b(man|woman|person|people|boy|girl|child|dogs?|player)\b", found[1]), found
        page.get_by_text("photos, layer 5: 14 soft prompts").wait_for()
        ask(page, "how many dogs are there?")
        shot(page, "demo-photographs", tmp_path)
        page.close()

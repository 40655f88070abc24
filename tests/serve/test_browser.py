"""The page in a real Chromium, with streams of plain colours in a model's place: what a person sees and does."""

import shutil
import threading
import time

import numpy as np
import pytest
import uvicorn
from shared.numbered import Numbered

from rehyat_jax.serve.app import About, make_app
from rehyat_jax.serve.host import Host
from rehyat_jax.serve.live import Pace

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.full,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
]
COLOURS = {"a red ground": (200, 30, 30), "a blue ground": (30, 30, 200)}
#: The middle pixel of what is shown.
PIXEL = """() => {
  const canvas = document.createElement("canvas");
  canvas.width = video.videoWidth; canvas.height = video.videoHeight;
  const context = canvas.getContext("2d");
  context.drawImage(video, 0, 0);
  return [...context.getImageData(canvas.width / 2, canvas.height / 2, 1, 1).data].slice(0, 3);
}"""


class Plain(Numbered):
    """A ground in the sentence's colour."""

    def __next__(self) -> np.ndarray:
        return np.broadcast_to(np.uint8(COLOURS[self.prompt]), (12, 64, 64, 3)).copy()

    def fork(self, *, seed: int | None = None) -> "Plain":
        return Plain(self.prompt)


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    host = Host(lambda wish: Plain(wish.prompt), pace=Pace(ahead=2.0), folder=tmp_path_factory.mktemp("streams"))
    app = make_app(host, About(model="plain", device="none", words=("red", "blue"), example="a red ground"))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(20)


@pytest.fixture
def page(address):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page()
        mistakes: list[str] = []
        page.on("pageerror", lambda error: mistakes.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#words button")
        yield page
        browser.close()
    assert not mistakes


def until(page, what, seconds: float = 30.0):
    """What a script gives once it is true: the page's policy forbids the library's own way of waiting."""
    end = time.monotonic() + seconds
    while not (value := page.evaluate(what)):
        assert time.monotonic() < end, f"{what} did not come: {page.inner_text('main')}"
        page.wait_for_timeout(50)
    return value


def near(pixel, colour) -> bool:
    return max(abs(a - b) for a, b in zip(pixel, colour, strict=True)) < 24


def test_a_sentence_plays_is_changed_and_gone_back_to(page):
    page.click("#go")
    until(page, "video.currentTime > 0.2")
    begun = page.evaluate("video.currentTime")
    until(page, f"video.currentTime > {begun + 3}")
    assert page.evaluate("video.buffered.length") == 1
    assert near(page.evaluate(PIXEL), COLOURS["a red ground"])

    page.fill("#prompt", "a blue ground")
    page.click("#go")
    sentence = until(page, "document.querySelectorAll('#line li.sentence').length > 1 && view.chunks.length - 1")
    until(page, f"video.currentTime > view.chunks[{sentence}].first_frame / 16 + 0.2")
    assert near(page.evaluate(PIXEL), COLOURS["a blue ground"])

    page.locator("#line button").nth(1).click()  # back, with the sentence in force
    until(page, "view.chunks[1] && view.chunks[1].prompt === 'a blue ground'")
    until(page, "video.currentTime > 1.8")
    assert near(page.evaluate(PIXEL), COLOURS["a blue ground"])
    assert page.evaluate("video.buffered.length") == 1

    page.locator("#line button").nth(1).focus()
    page.keyboard.press("b")
    until(page, "document.querySelectorAll('#streams button').length === 2")


def test_every_part_has_a_name_and_narrow_screens_do_not_scroll_sideways(page):
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth <= 360")
    page.click("#go")
    until(page, "document.querySelectorAll('#line button').length > 0")
    unnamed = """() => [...document.querySelectorAll("button, input, a")].filter(
      (part) => !(part.getAttribute("aria-label") || part.textContent.trim() || (part.labels && part.labels.length))
    ).map((part) => part.outerHTML)"""
    assert page.evaluate(unnamed) == []

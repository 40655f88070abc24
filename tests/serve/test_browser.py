"""The page in a real Chromium, with streams of plain colours in a model's place: what a person sees and does."""

import shutil
import threading
import time

import numpy as np
import pytest
import uvicorn
from shared.numbered import Numbered, resumed

from rehyat_jax.serve.app import About, Model, make_app
from rehyat_jax.serve.host import Host
from rehyat_jax.serve.steerable import Pace

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
    host = Host(
        lambda wish: Plain(wish.prompt),
        resume=lambda folder: Plain(resumed(folder).prompt),
        pace=Pace(ahead=2.0),
        folder=tmp_path_factory.mktemp("streams"),
    )
    about = About(
        model="plain",
        models=(
            Model(name="plain", steps=4, offered_steps=(1, 2, 4)),
            Model(name="guided", steps=20, offered_steps=(5, 10, 20), guidance=4.0, guided=True),
        ),
        device="none",
        words=("red", "blue"),
        example="a red ground",
    )
    app = make_app(host, about)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(20)


@pytest.fixture(params=[""])
def page(address, request):
    """A script may run in it before its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_page()
        mistakes: list[str] = []
        page.on("pageerror", lambda error: mistakes.append(str(error)))
        page.add_init_script(request.param)
        page.goto(address)
        page.wait_for_selector("#words button")
        yield page
        for stream in page.evaluate("fetch('/v1/streams').then((answer) => answer.json())")["data"]:
            page.evaluate(f"fetch('/v1/streams/{stream['id']}', {{ method: 'DELETE' }})")
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
    asked = page.evaluate("view.chunks.length")
    until(page, "document.querySelectorAll('#line li.sentence').length > 1")
    sentence = page.evaluate("view.chunks.findIndex((chunk) => chunk.prompt === 'a blue ground')")
    assert sentence <= asked + 2  # the one under way is finished first
    until(page, f"video.currentTime > view.chunks[{sentence}].first_frame / 16 + 0.2")
    assert near(page.evaluate(PIXEL), COLOURS["a blue ground"])

    page.locator("#line button").nth(1).click()  # back, with the sentence in force
    until(page, "view.chunks[1] && view.chunks[1].prompt === 'a blue ground'")
    until(page, "video.currentTime > 1.8")
    assert near(page.evaluate(PIXEL), COLOURS["a blue ground"])
    assert page.evaluate("video.buffered.length") == 1

    page.locator("#line button").nth(1).focus()
    page.keyboard.press("b")
    until(page, "document.querySelectorAll('#streams .watch').length >= 2")
    until(page, "document.querySelectorAll('#streams [aria-pressed=true]').length === 1")


UNNAMED = """() => [...document.querySelectorAll("button, input, select, a, video")].filter(
  (part) => !(part.getAttribute("aria-label") || part.textContent.trim() || (part.labels && part.labels.length))
).map((part) => part.outerHTML)"""
#: The least contrast of the text to its ground, as WCAG counts it.
CONTRAST = """() => {
  const light = (colour) => {
    const parts = colour.match(/[0-9.]+/g).slice(0, 3).map((value) => value / 255)
      .map((value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const ground = light(getComputedStyle(document.body).backgroundColor);
  return Math.min(...[...document.querySelectorAll("h1, label, dt, dd, .hint, #told, #words button")].map((part) => {
    const [low, high] = [ground, light(getComputedStyle(part).color)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  }));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_part_has_a_name_and_narrow_screens_do_not_scroll_sideways(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth <= 360")
    page.click("#go")
    until(page, "document.querySelectorAll('#line button').length > 2 && document.querySelector('#streams img')")
    until(page, "line.scrollWidth > line.clientWidth + 99 && line.scrollLeft + line.clientWidth > line.scrollWidth - 2")
    assert page.evaluate("scrollY") == 0  # the line follows what is made, not the page
    page.evaluate("line.scrollLeft = 0")
    count = page.locator("#line li").count()
    until(page, f"line.children.length > {count}")
    assert page.evaluate("line.scrollLeft") == 0
    page.click("summary")
    assert page.evaluate("document.documentElement.scrollWidth <= 360")
    assert page.evaluate(UNNAMED) == []
    # Whole multiples of the model's own 32 pixels.
    until(page, "parseFloat(video.style.width) % 32 === 0 && parseFloat(video.style.width) <= 328")
    assert page.evaluate(CONTRAST) >= 4.5  # level AA


#: A browser without MediaSource that plays playlists, as iPhones do, and one that does not.
NO_SOURCE = "delete window.MediaSource;"
NO_PLAYLISTS = NO_SOURCE + "HTMLMediaElement.prototype.canPlayType = () => '';"


@pytest.mark.parametrize(("page", "kind"), [(NO_SOURCE, "m3u8"), (NO_PLAYLISTS, "mp4")], indirect=["page"])
def test_a_browser_without_media_source_plays_the_same_stream(page, kind):
    page.click("#go")
    until(page, f"video.currentTime > 1 && video.currentSrc.includes('.{kind}')")
    assert near(page.evaluate(PIXEL), COLOURS["a red ground"])
    page.fill("#prompt", "a blue ground")
    page.click("#go")
    until(page, "document.querySelectorAll('#line li.sentence').length > 1")
    page.locator("#line button").nth(1).click()
    until(page, "view.chunks[1] && view.chunks[1].prompt === 'a blue ground'")
    until(page, "video.currentSrc.includes(`v=${view.turns - 1}`) && view.turns > 1 && video.currentTime > 0.9")
    assert near(page.evaluate(PIXEL), COLOURS["a blue ground"])


#: As Safari's: it asks for data by events, and what is given while it does not ask is a mistake here.
MANAGED = """
  const Plain = window.MediaSource;
  delete window.MediaSource;
  window.given = [];
  window.ManagedMediaSource = class extends Plain {
    streaming = false;
    constructor() {
      super();
      window.managed = this;
      this.addEventListener("sourceopen", () => setTimeout(() => this.ask(true), 300));
    }
    ask(streaming) {
      this.streaming = streaming;
      this.dispatchEvent(new Event(streaming ? "startstreaming" : "endstreaming"));
    }
    addSourceBuffer(type) {
      const buffer = super.addSourceBuffer(type), append = buffer.appendBuffer.bind(buffer);
      buffer.appendBuffer = (data) => {
        if (!this.streaming || !video.disableRemotePlayback) throw new Error("given unasked");
        window.given.push(data.byteLength);
        append(data);
      };
      return buffer;
    }
  };
"""


@pytest.mark.parametrize("page", [MANAGED], indirect=True)
def test_a_managed_source_is_given_what_it_asks_for(page):
    """It stops to ask, and goes on; it drops what was played and what was not; the picture goes on at the newest."""
    page.click("#go")
    until(page, "video.currentTime > 1")
    page.evaluate("managed.ask(false)")
    given = page.evaluate("given.length")
    page.wait_for_timeout(1500)
    assert page.evaluate("given.length") == given
    page.evaluate("managed.ask(true)")
    time_then = page.evaluate("video.currentTime")
    until(page, f"video.currentTime > {time_then + 1}")
    page.evaluate("managed.ask(false)")
    until(page, "!view.buffer.updating")
    page.evaluate("view.buffer.remove(0, video.buffered.end(0))")
    page.evaluate("managed.ask(true)")
    time_then = page.evaluate("video.currentTime")
    until(page, f"video.currentTime > {time_then + 1}")
    assert near(page.evaluate(PIXEL), COLOURS["a red ground"])


def test_guidance_is_for_models_that_have_a_use_for_it(page):
    page.click("summary")
    assert page.is_disabled("#guidance")
    assert page.get_attribute("#steps", "placeholder") == "4"
    page.select_option("#model", "guided")
    assert page.is_enabled("#guidance")
    offered = page.evaluate("[...document.querySelectorAll('#offered option')].map((each) => each.value)")
    assert offered == ["5", "10", "20"]


def test_words_that_a_model_does_not_know_are_told_and_are_one_stop_of_tab(page):
    page.fill("#prompt", "a red moon, Blue moon")
    assert page.inner_text("#unknown") == "Not among the words of this model: a, moon."
    page.fill("#prompt", "red, Blue")
    assert page.inner_text("#unknown") == ""
    page.focus("#go")
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == "blue"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"


def test_a_sentence_before_the_first_chunk_changes_the_stream_that_begins(page):
    """And makes no second one. A stream that has ended is begun anew."""
    page.evaluate(
        """() => {
      prompt.value = "a red ground"; go.click();
      prompt.value = "a blue ground"; go.click();
    }""".replace("prompt.", "document.getElementById('prompt').").replace("go.", "document.getElementById('go').")
    )
    until(page, "view.chunks.some((chunk) => chunk.prompt === 'a blue ground')")
    assert page.evaluate("fetch('/v1/streams').then((answer) => answer.json()).then(({ data }) => data.length)") == 1
    until(page, "document.querySelector('#streams li button:last-child')")
    page.click("#streams li button:last-child")
    until(page, "document.getElementById('go').textContent === 'Start'")
    page.fill("#prompt", "a red ground")
    page.click("#go")
    until(page, "video.currentTime > 0.5")


def test_all_of_it_by_the_keyboard(page):
    """Start, pause, choose, branch, a new stream, save the video and the state, load it again, end a stream."""
    page.keyboard.press("/")
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('#line button').length > 3 && !video.paused")
    before = page.locator("#streams li").count()
    page.locator("h1").click()
    page.keyboard.press("Space")
    assert page.evaluate("video.paused")
    page.keyboard.press("Space")
    with page.expect_download() as saved:
        page.keyboard.press("s")
    assert saved.value.suggested_filename.endswith(".mp4")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("b")
    until(page, f"document.querySelectorAll('#streams li').length > {before}")
    page.keyboard.press("n")
    until(page, f"document.querySelectorAll('#streams li').length > {before + 1}")
    with page.expect_download() as saved:
        page.focus("#state")
        page.keyboard.press("Enter")
    page.set_input_files("#load", saved.value.path())
    until(page, f"document.querySelectorAll('#streams li').length > {before + 2}")
    until(page, "document.querySelectorAll('#line button').length > 0")
    while count := page.locator("#streams li").count():
        page.locator("#streams li button:last-child").first.focus()
        page.keyboard.press("Enter")
        until(page, f"document.querySelectorAll('#streams li').length < {count}")

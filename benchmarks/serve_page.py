"""The live page in a real Chromium with the real model: seconds until something is seen.

``python -m benchmarks.serve_page --steps 4 --minutes 1``: from the command to the page, from the page to the first
frame, from a chunk made to its first frame shown, from another sentence to its first frame; frames a second made. The
second run counts, whose programs are compiled. Needs Debian's Chromium and the package playwright.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import time

from playwright.sync_api import Page, sync_playwright

SENTENCES = ("a koala moving right slowly on a red background", "a lemon moving up slowly on a blue background")
#: When each chunk came, and when its first frame was shown.
WATCH = """() => {
  window.times = { opened: performance.now(), came: [], shown: [] };
  const frame = (now, { mediaTime }) => {
    if (view) view.chunks.forEach((chunk, number) => {
      if (mediaTime + 0.001 >= chunk.first_frame / view.fps) times.shown[number] ??= performance.now();
    });
    video.requestVideoFrameCallback(frame);
  };
  video.requestVideoFrameCallback(frame);
  setInterval(() => {
    if (view) view.chunks.forEach((_, number) => { times.came[number] ??= performance.now(); });
  }, 5);
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--every", type=float, default=10.0, help="seconds after which the sentence changes")
    parser.add_argument("--steps", type=int, default=None, help="denoising steps; the model's own when not given")
    parser.add_argument("--model", default="mini-sprites")
    options = parser.parse_args()
    command = [sys.executable, "-m", "rehyat_jax", "serve", "--port", "0", "--model", options.model]
    begun = time.monotonic()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        assert server.stderr is not None
        address = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+", line)))
        listening = time.monotonic() - begun
        flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        page = browser.new_page()
        page.goto(address)
        try:
            print(json.dumps({"command_to_page": round(listening, 2)} | watched(page, options)))
        finally:
            browser.close()
            server.terminate()


def watched(page: Page, options: argparse.Namespace) -> dict[str, object]:
    page.evaluate(WATCH)
    page.wait_for_selector("#words button")
    page.fill("#prompt", SENTENCES[0])
    if options.steps is not None:
        page.click("summary")
        page.fill("#steps", str(options.steps))
    page.click("#go")
    begun, changes, told = time.monotonic(), [], 0
    while (passed := time.monotonic() - begun) < 60 * options.minutes:
        page.wait_for_timeout(100)
        if passed // options.every > told:
            told += 1
            page.fill("#prompt", SENTENCES[told % 2])
            changes.append((page.evaluate("performance.now()"), SENTENCES[told % 2]))
            page.click("#go")
    times = page.evaluate("times")
    prompts = page.evaluate("view.chunks.map((chunk) => chunk.prompt)")
    seconds = page.evaluate("view.chunks.map((chunk) => [chunk.num_frames, chunk.seconds])")[2:]
    shown = [(a, b) for a, b in zip(times["came"], times["shown"], strict=False) if a is not None and b is not None]
    changed = []
    for asked, prompt in changes:
        later = [b for p, b in zip(prompts, times["shown"], strict=False) if b and p == prompt and b > asked]
        # Frames of the same sentence's last turn are long past: another one was between.
        changed += [min(later) - asked] if later else []
    return {
        "page_to_first_frame": round((times["shown"][0] - times["opened"]) / 1000, 2),
        "made_to_shown_median": round(statistics.median(b - a for a, b in shown[2:]) / 1000, 2),
        "sentence_to_screen_median": round(statistics.median(changed) / 1000, 2) if changed else None,
        "sentence_to_screen_worst": round(max(changed) / 1000, 2) if changed else None,
        "frames_per_second": round(sum(n for n, _ in seconds) / sum(s for _, s in seconds), 2),
        "steps": page.inner_text("#how"),
    }


if __name__ == "__main__":
    main()

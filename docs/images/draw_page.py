"""The README's picture of the live page: the real server and model in a real Chromium, a sentence changed on the way.

``python docs/images/draw_page.py`` writes ``docs/images/page.png``; needs Debian's Chromium and the package playwright.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

OUT = Path(__file__).with_name("page.png")
SENTENCES = ("a koala moving right slowly on a red background", "a lemon moving up slowly on a blue background")
#: Chunks before each change, and before the picture.
CHUNKS = 3


def main() -> None:
    serve = [sys.executable, "-m", "rehyat_jax", "serve", "--port", "0"]
    with subprocess.Popen(serve, stderr=subprocess.PIPE, text=True) as server, sync_playwright() as playwright:
        assert server.stderr is not None
        address = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+", line)))
        flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
        page = browser.new_page(viewport={"width": 900, "height": 900}, color_scheme="light")
        page.goto(address)
        page.wait_for_selector("#words button")
        for number, sentence in enumerate(SENTENCES, start=1):
            page.fill("#prompt", sentence)
            page.click("#go")
            while page.locator("#line button").count() < number * CHUNKS + 1:
                time.sleep(0.2)
        page.screenshot(path=OUT, full_page=True)
        browser.close()
        server.terminate()
    print(f"{OUT}: {OUT.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

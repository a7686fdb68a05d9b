"""Takes the pictures of docs/playground.md: the page when its first example was answered, light and dark.

Run: ``python benchmarks/show_playground.py``, where ``make test-playground`` runs: it needs gradio, playwright and a
Chromium (``CHROMIUM`` says where, if it is not on the PATH).
"""

import io
import os
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from flux_attention.playground.page import launch
from flux_attention.playground.player import Player
from flux_attention.shipped import load_shipped

IMAGES = Path(__file__).parents[1] / "docs/images"
WIDTH = 1080


def take(browser, address, theme):
    """Return the page down to the answers, as bytes of a PNG."""
    page = browser.new_page(color_scheme=theme, viewport={"width": WIDTH, "height": 1000})
    page.goto(address)
    page.click("#ask")
    page.wait_for_selector(".way[data-way=sparse] .state.another", timeout=60_000)
    page.mouse.move(0, 0)  # off the button, which would look different
    answers = page.locator("#cards").bounding_box()
    height = answers["y"] + answers["height"] + 16
    return page.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": height})


def main():
    """Write both pictures."""
    blocks, address = launch(Player(*load_shipped(), "shipped", "shipped"))
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as manager:
        browser = manager.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for theme in ("light", "dark"):
            picture = Image.open(io.BytesIO(take(browser, address, theme))).convert("RGB")
            picture.save(IMAGES / f"playground_{theme}.webp", lossless=True, method=6)
        browser.close()
    blocks.close(verbose=False)


if __name__ == "__main__":
    main()

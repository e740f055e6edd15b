"""A PNG of an HTML page for the documentation.

    python docs/screenshot.py PAGE.html IMAGE.png [--width 1000] [--height 1400] [--dark]

Needs playwright and a Chromium. The demo's images come from its own test; see tests/demo/test_page.py.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

COLOURS = 256  # of the PNG, whose size is to stay below 150 kB

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("page", type=Path)
parser.add_argument("image", type=Path)
parser.add_argument("--width", type=int, default=1000)
parser.add_argument("--height", type=int, help="of the part that is shown (default: the whole page)")
parser.add_argument("--from", type=int, default=0, dest="top", help="pixels above that part")
parser.add_argument("--dark", action="store_true")
args = parser.parse_args()
with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    page = browser.new_page(
        viewport={"width": args.width, "height": 900}, color_scheme="dark" if args.dark else "light"
    )
    page.set_default_timeout(120_000)
    page.goto(args.page.resolve().as_uri())
    if page.evaluate("document.documentElement.scrollWidth > window.innerWidth"):
        raise SystemExit(f"{args.page} is wider than {args.width} pixels")
    shot = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    browser.close()
height = min(args.height or shot.height, shot.height - args.top)
shot = shot.convert("RGB").crop((0, args.top, shot.width, args.top + height))
shot.quantize(COLOURS, dither=Image.Dither.NONE).save(args.image, optimize=True)
print(f"{args.image}: {args.image.stat().st_size / 1000:.0f} kB, {shot.width} x {shot.height}")

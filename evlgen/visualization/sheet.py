"""A sheet of images: columns with headings, rows with titles, a note below."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evlgen.common.safe_text import printable

_MOST_CHARACTERS = 500  # of a name or heading that are measured; fewer fit
INK, FAINT, PAPER = (20, 20, 20), (105, 105, 105), (255, 255, 255)


@dataclass(frozen=True)
class Row:
    """One row of a sheet.

    Attributes:
        title: in bold along the left edge; "" for none.
        subtitle: beside it.
        panels: images [H, W, 3] uint8, one size throughout the sheet.
        opens: whether it stands a little apart from the row above.
    """

    title: str
    subtitle: str
    panels: Sequence[np.ndarray]
    opens: bool = True


def draw_sheet(headings: Sequence[Sequence[str]], rows: Sequence[Row], note: str = "") -> Image.Image:
    """Puts panels on a white sheet.

    Args:
        headings: for each column lines of text, the first in bold.
        note: a line or more below the rows.
    """
    height, width = rows[0].panels[0].shape[:2]
    text = _text_size(headings, width)
    gap, line = max(4, width // 40), round(text * 1.35)
    left = gap + line * max(bool(row.title) + bool(row.subtitle) for row in rows)
    top = gap + line * max(map(len, headings)) + gap // 2
    tops = _tops(rows, top, height, gap)
    notes = _wrapped(note, _font(text), len(headings) * (width + gap)) if note else []
    size = (
        left + len(headings) * (width + gap),
        tops[-1] + height + gap + (gap + line * len(notes)) * bool(notes),
    )
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, lines in enumerate(headings):
        for i, words in enumerate(lines):
            place = (left + column * (width + gap) + width / 2, gap + line * i)
            font = _font(text, bold=i == 0)
            pen.text(place, _shortened(words, font, width), INK if i < 2 else FAINT, font, anchor="ma")
    for row, y in zip(rows, tops, strict=True):
        for column, panel in enumerate(row.panels):
            sheet.paste(Image.fromarray(panel), (left + column * (width + gap), y))
        titles = [(row.title, True, INK)] * bool(row.title) + [(row.subtitle, False, FAINT)] * bool(
            row.subtitle
        )
        for i, (words, bold, ink) in enumerate(titles):
            sheet.paste(_upward(words, _font(text, bold), ink, (line, height)), (gap // 2 + i * line, y))
    for i, words in enumerate(notes):
        pen.text((left, tops[-1] + height + gap + line * i), words, FAINT, _font(text))
    return sheet


def write_on(panel: np.ndarray, words: str, centre: tuple[float, float], size: int) -> np.ndarray:
    """The panel with a word at (x, y): white with a black rim, seen on any colour."""
    image = Image.fromarray(panel)
    rim = max(1, size // 8)
    ImageDraw.Draw(image).text(
        centre, words, "white", _font(size, bold=True), anchor="mm", stroke_width=rim, stroke_fill="black"
    )
    return np.asarray(image)


def _text_size(headings: Sequence[Sequence[str]], width: int) -> int:
    """The size at which every heading fits above its column."""
    size = max(11, width // 15)
    longest = max(
        _font(size, bold=i == 0).getlength(words) for lines in headings for i, words in enumerate(lines)
    )
    return max(8, min(size, int(size * width / max(longest, 1))))


def _tops(rows: Sequence[Row], top: int, height: int, gap: int) -> list[int]:
    tops = []
    for i, row in enumerate(rows):
        top += gap * 2 if i and row.opens else 0
        tops.append(top)
        top += height + gap
    return tops


def _upward(words: str, font: ImageFont.FreeTypeFont, ink: tuple, size: tuple[int, int]) -> Image.Image:
    """Words that run from bottom to top in the middle of a strip of a size."""
    width, length = size
    words = _shortened(words, font, length)
    strip = Image.new("RGB", (length, width), PAPER)
    ImageDraw.Draw(strip).text((length / 2, width / 2), words, ink, font, anchor="mm")
    return strip.transpose(Image.Transpose.ROTATE_90)


def _shortened(words: str, font: ImageFont.FreeTypeFont, length: float) -> str:
    """Words that are no longer than ``length`` pixels, with an ellipsis where something is left out."""
    words = kept = printable(words, _MOST_CHARACTERS)
    while kept and font.getlength(words if kept == words else f"{kept}…") > length:
        kept = kept[:-1]
    return words if kept == words else f"{kept}…"


def _wrapped(words: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


@functools.lru_cache(maxsize=32)
def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    import matplotlib  # its fonts are the same on every machine

    name = f"DejaVuSans{'-Bold' if bold else ''}.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)

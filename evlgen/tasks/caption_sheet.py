"""A sheet of images with their captions, as one PNG."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from evlgen.common.safe_text import printable

_MOST_TEXT = 500  # characters of a text that are looked at; fewer fit
_PLAIN = {"parse_math": False, "usetex": False}  # a caption with dollar signs is no formula


def caption_sheet(
    images: Sequence[Image.Image | None], captions: Sequence[tuple[str, str]], path: Path, columns: int = 4
) -> None:
    """Writes the images in rows, each with the caption written about it and, in grey, a reference.

    Args:
        images: Pillow images; None where there is none to show.
        captions: (written, reference) for each image.
        path: the PNG file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not images:
        return
    rows = -(-len(images) // columns)
    height = 4.3 * rows  # inches, of which 3.1 are image and the rest text, in each row
    figure = Figure(figsize=(3.2 * columns, height))
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    figure.subplots_adjust(
        left=0.01, right=0.99, top=1 - 0.05 / height, bottom=1.15 / height, wspace=0.04, hspace=1.2 / 3.1
    )
    for axis in axes:
        axis.set_axis_off()
    for axis, image, texts in zip(axes, images, captions, strict=False):
        written, reference = (
            textwrap.fill(printable(text[:_MOST_TEXT]), width, max_lines=lines, placeholder="…")
            for text, width, lines in zip(texts, (36, 44), (4, 3), strict=True)
        )
        if image is not None:
            axis.imshow(image, interpolation="nearest" if max(image.size) <= 128 else "antialiased")
        text = axis.text(
            0,
            -0.04,
            written,
            transform=axis.transAxes,
            va="top",
            fontsize=10,
            **_PLAIN,
        )
        lines = text.get_text().count("\n") + 1
        axis.annotate(
            reference,
            (0, -0.04),
            xycoords=axis.transAxes,
            xytext=(0, -13 * lines - 2),
            textcoords="offset points",
            va="top",
            fontsize=8,
            color="0.45",
            **_PLAIN,
            annotation_clip=False,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)

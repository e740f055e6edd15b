"""How figures look, and how they get into a file or a page. Drawn by matplotlib without a display."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from evlgen.common.safe_text import printable

# Okabe and Ito's colours, which all kinds of sight tell apart, but for the yellow, which is faint on white,
# and with grey for black, which is not seen on a dark page.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F")
_MARKERS = "osD^vPX"
_DASHES = ("-", "--", ":")
GREY = "#595959"
_LONGEST_LABEL = 100  # characters
_INK, _LINES = "#2a2c2f", "#e5e5e6"
_IN_THE_DARK = {_INK: "#d9dce1", _LINES: "#3a3e44", GREY: "#a4a9b0"}
_STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.facecolor": "none",
    "grid.color": _LINES,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    "axes.axisbelow": True,
    "svg.fonttype": "path",
    # names and values of users are no formulas
    "text.parse_math": False,
    "text.usetex": False,
}


def grid(rows: int, columns: int, names: Sequence[str]) -> tuple[Figure, Any]:
    """A figure with a legend of all names above its axes.

    Returns:
        the figure, and its axes [rows, columns].
    """
    labels = [printable_label(name) for name in names]
    per_row = max(1, min(len(labels), 120 // (max(map(len, labels), default=0) + 8)))
    legend_rows = -(-len(labels) // per_row)
    figure = Figure(figsize=(10.6, 3.5 * rows + 0.3 * legend_rows + 0.2), layout="constrained")
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=0.08, h_pad=0.08, wspace=0.03, hspace=0.03)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    handles = []
    for number in range(len(labels)):
        colour, marker, dashes = look(number)
        handles += axes[0][0].plot([], [], dashes, color=colour, marker=marker, lw=2, ms=5)
    if labels:
        figure.legend(handles, labels, loc="outside upper left", ncols=per_row, frameon=False)
    return figure, axes


def look(number: int) -> tuple[str, str, str]:
    """Colour, marker and dashes of the n-th configuration."""
    turn = number // len(COLOURS)
    return COLOURS[number % len(COLOURS)], _MARKERS[number % len(_MARKERS)], _DASHES[turn % len(_DASHES)]


def thin(axis: Axes, whole: bool = False) -> None:
    """Few and plain numbers on the x axis; ``whole``: without fractions."""
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=whole))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.10g}"))


def smoothed(x: list[float], y: list[float]) -> tuple[list[float], list[float]]:
    """Means over at most some hundred groups of neighbours: a loss of single batches is mostly noise."""
    size = max(1, len(y) // 60)
    groups = [slice(i, i + size) for i in range(0, len(y), size)]
    return [x[g][-1] for g in groups], [math.fsum(y[g]) / len(y[g]) for g in groups]


def styled() -> Any:
    """Inside, figures are drawn in the style of all of them."""
    from matplotlib import rc_context

    return rc_context(_STYLE)


def as_png(figure: Figure, dpi: int = 130) -> bytes:
    """The bytes of a PNG file."""
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def as_data_address(figure: Figure) -> str:
    """The figure as an SVG inside of an address, for an ``img`` element. Its text and lines are light where
    the page is dark."""
    buffer = io.StringIO()
    with styled():
        figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="none")
    text = buffer.getvalue()
    light = dark = ""
    for number, (colour, other) in enumerate(_IN_THE_DARK.items()):
        text = text.replace(colour, f"var(--c{number})")
        light, dark = f"{light}--c{number}:{colour};", f"{dark}--c{number}:{other};"
    style = f"<style>:root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    start = text.index("<defs>")
    text = text[:start] + style + text[start:]
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode()


def printable_label(text: object) -> str:
    """A user's text as a label."""
    return printable(text, _LONGEST_LABEL)


def log_scale(axis: Axes) -> None:
    """Makes the y axis logarithmic, with plain numbers."""
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_minor_formatter(NullFormatter())

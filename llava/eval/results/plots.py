"""Common look of all plots of the evaluation: figure, colours, caption, file. Needs no display.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart, without the yellow, which is faint on
white. If there are more lines than colours, markers tell them apart.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from llava.common.files import as_user_error_on_write

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, FAINT = "#222222", "#8a8a8a"
WIDTH = 12.0  # inches: 1200 pixels
DPI = 100
_LINE = 0.2  # inches that a line of the caption takes
_LETTERS = 165  # characters in a line of the caption, at its font size and WIDTH
_UNITS = ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"))
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.color": INK,
    "axes.labelcolor": INK,
}


def style():
    """Return the context in which a plot is made, from its first line to `save`."""
    return matplotlib.rc_context(_STYLE)


def look(number: int) -> dict:
    """Colour and marker of the nth line of a plot; every pair comes once before any comes again."""
    return {"color": COLORS[number % len(COLORS)], "marker": MARKERS[number // len(COLORS) % len(MARKERS)]}


def shades(number: int) -> list[tuple]:
    """Colours for an ordered series (layers): light for the first, dark for the last."""
    return [matplotlib.colormaps["Blues"](0.25 + 0.7 * n / max(1, number - 1)) for n in range(number)]


def panels(rows: int, columns: int, height: float, **options) -> tuple[Figure, list[list[Axes]]]:
    """Return (figure, axes) of rows x columns panels. height: inches of a row. options: for Figure.subplots."""
    # Figure and not pyplot: pyplot keeps each figure in a global list and may look for a display.
    figure = Figure(figsize=(WIDTH, rows * height), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08, h_pad=0.1)
    return figure, figure.subplots(rows, columns, squeeze=False, **options).tolist()


def log_ticks(axis: Axis) -> None:
    """Make an axis logarithmic, with plain numbers as labels. Call it after the lines are drawn: a wide range gets fewer ticks."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 6 * low else (1, 1.5, 2, 3, 5, 7), numticks=99))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axis.set_minor_locator(NullLocator())


def short_number(value: float) -> str:
    """Return a number with the largest unit that is not above it: 1.5 G."""
    size, unit = next(((size, unit) for size, unit in _UNITS if value >= size), (1, ""))
    return f"{value / size:g}{unit}"


def save(figure: Figure, path: Path, caption: Sequence[str]) -> None:
    """Write `figure` as a PNG with a caption below it. caption: sentences or paragraphs."""
    # The figure grows by the height of the caption, and the panels keep theirs: rect is in shares of the new height.
    lines = [line for part in caption for line in textwrap.wrap(part, _LETTERS)]
    width, height = figure.get_size_inches()
    below = _LINE * (len(lines) + 1)
    figure.set_size_inches(width, height + below)
    figure.get_layout_engine().set(rect=(0, below / (height + below), 1, height / (height + below)))
    figure.text(
        0.01, 0.5 * _LINE / (height + below), "\n".join(lines), fontsize=9, color=INK, va="bottom", linespacing=1.35
    )
    with as_user_error_on_write(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor="white")

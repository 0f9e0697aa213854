"""Positions of everything in a chart: score against one cost, with one point and its interval per run.

chart.svg.jinja draws it. Positions are in units of a view box of WIDTH x HEIGHT. Colours are CSS variables
(--series-0 ...), so that the light and the dark scheme of the page apply.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from matplotlib.ticker import LogLocator, MaxNLocator

from llava.eval.report.comparison import Comparison
from llava.eval.results.plots import COLORS, short_number

WIDTH, HEIGHT = 400, 290
LEFT, RIGHT, TOP, BOTTOM = 70, 390, 14, 238  # of the plotted area; left of it is room for ticks such as 1612.5
APART = 9  # between points that would lie on each other
_MARKERS = {  # around the origin, about 10 across
    "circle": "M5,0A5,5 0 1 1 -5,0A5,5 0 1 1 5,0Z",
    "square": "M-4.4,-4.4H4.4V4.4H-4.4Z",
    "triangle": "M0,-5.4L5.2,4.2H-5.2Z",
    "diamond": "M0,-6L5,0L0,6L-5,0Z",
    "down": "M0,5.4L5.2,-4.2H-5.2Z",
    "plus": "M-1.7,-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
}
STAR = "M0,-7.5L2.1,-2.4L7.5,-2.3L3.3,1.2L4.6,6.6L0,3.6L-4.6,6.6L-3.3,1.2L-7.5,-2.3L-2.1,-2.4Z"


@dataclass(frozen=True)
class SeriesStyle:
    """Look of a series, which is the runs of one method and its options. style: CSS class; marker: SVG path."""

    style: str
    marker: str


@dataclass
class Point:
    """The point of a run. says: text shown when the mouse is over it; low, high: y of the ends of its interval."""

    x: float
    y: float
    look: SeriesStyle
    says: str
    low: float | None = None
    high: float | None = None


@dataclass
class Chart:
    """One chart.

    x_ticks, y_ticks: (position, label). lines: (look, points to join). level: y of the reference if it is method none.
    """

    label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    y_label: str
    points: list[Point] = field(default_factory=list)
    lines: list[tuple[SeriesStyle, list[Point]]] = field(default_factory=list)
    level: float | None = None


def looks(comparison: Comparison) -> dict[str, SeriesStyle]:
    """Return label -> look for the runs with a score. Method none is a star; no two labels have the same look."""
    labels = dict.fromkeys(run.label for run in comparison.runs if run.score is not None)
    markers, found = list(_MARKERS.values()), {}
    for label in labels:
        if label == "none":
            found[label] = SeriesStyle("series-none", STAR)
            continue
        # There are six colours and six markers. After each round of the colours, the markers are shifted by one, so a
        # pair occurs again only after 36 labels.
        n = len(found) - ("none" in found)
        shift = n // len(COLORS)
        found[label] = SeriesStyle(f"series-{n % len(COLORS)}", markers[(n + shift) % len(markers)])
    return found


def charts(comparison: Comparison) -> list[Chart]:
    """Return one chart per cost that at least two runs with a score have measured."""
    costs = {
        "vision tokens per image, mean over layers (log)": (lambda run: run.measured("vision_tokens_per_image", "layer_mean"), ""),
        "FLOPs per question until the first token, predicted (log)": (lambda run: run.measured("prefill_flops_predicted", "mean"), "FLOPs"),
        "ms per question, all stages (log)": (lambda run: run.milliseconds, "ms"),
    }  # fmt: skip
    drawn = []
    for label, (cost, unit) in costs.items():
        values = {n: cost(run) for n, run in enumerate(comparison.runs) if run.score is not None and cost(run)}
        if len(values) > 1:
            drawn.append(_chart(comparison, label, unit, values))
    return drawn


def _chart(comparison: Comparison, label: str, unit: str, values: dict[int, float]) -> Chart:
    """Return the chart of one cost. values: number of the run -> its cost."""
    # 1. The range of the axes: y by round ticks around all intervals, x with some room on both sides.
    known, scores = looks(comparison), comparison.scores
    heights = [comparison.runs[n].score for n in values]
    heights += [end for n in values if scores[n] for end in (scores[n].low, scores[n].high)]
    y_ticks = [float(tick) for tick in MaxNLocator(6, min_n_ticks=3).tick_values(min(heights), max(heights))]
    # A share has no ticks above 100 %.
    if not comparison.first.points:
        y_ticks = [tick for tick in y_ticks if tick < 100] + ([100.0] if y_ticks[-1] >= 100 else [])
    bottom, top = y_ticks[0], y_ticks[-1]
    left, right = min(values.values()) / 1.2, max(values.values()) * 1.2

    def across(value: float) -> float:
        share = math.log(value / left) / math.log(right / left)
        return round(LEFT + share * (RIGHT - LEFT), 1)

    def up(value: float) -> float:
        return round(BOTTOM - (value - bottom) / (top - bottom) * (BOTTOM - TOP), 1)

    # 2. Ticks and points.
    percent = "" if comparison.first.points else " %"
    x_ticks = [(across(tick), short_number(tick)) for tick in _log_ticks(left, right)]
    chart = Chart(label, x_ticks, [(up(tick), f"{tick:g}") for tick in y_ticks], comparison.score_name)
    for n, value in values.items():
        run, interval = comparison.runs[n], scores[n]
        says = f"{run.title}: {run.score:.1f}{percent}"
        says += f" [{interval.low:.1f}, {interval.high:.1f}]" if interval else ""
        says += f" at {short_number(float(f'{value:.4g}'))} {unit}".rstrip()
        says += " (scatters)" if unit == "ms" and run.scatters else ""
        point = Point(across(value), up(run.score), known[run.label], says)
        if interval:
            point.low, point.high = up(interval.low), up(interval.high)
        chart.points.append(point)
        if n == comparison.reference and run.method == "none":
            chart.level = point.y
    # 3. Lines, after the points have moved.
    _move_apart(chart.points)
    for look in known.values():
        places = [point for point in chart.points if point.look == look]  # sorted by budget, as the runs are
        if len(places) > 1:
            chart.lines.append((look, places))
    return chart


def _log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers between `low` and `high`, at most seven where possible, so that labels do not overlap."""
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [
            float(tick) for tick in LogLocator(subs=steps, numticks=99).tick_values(low, high) if low <= tick <= high
        ]
        if len(ticks) <= 7:
            break
    return ticks


def _move_apart(points: list[Point]) -> None:
    """Move points with about the same x apart, so that their intervals do not cover each other."""
    together: list[list[Point]] = []
    for point in sorted(points, key=lambda point: point.x):
        if together and point.x - together[-1][0].x < APART / 2:
            together[-1].append(point)
        else:
            together.append([point])
    for group in together:
        for n, point in enumerate(group):
            point.x = round(point.x + (n - (len(group) - 1) / 2) * APART, 1)

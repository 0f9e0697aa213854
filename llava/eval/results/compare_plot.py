"""The plot of a comparison: accuracy against the layer mean of vision tokens, and against FLOPs."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes

from llava.eval.results.compare_table import READS_COSINES, headline_of, on_demo, summary
from llava.eval.results.plots import FAINT, INK, log_ticks, look, panels, save, style
from llava.methods.index import method_names

# Methods with bars are moved apart in x, by this share from the first to the last. CAPTION names about half of it.
_SPREAD = 0.26
CAPTION = (
    "Dashed: methods that drop tokens inside the LLM. random: mean over seeds. Bars: 95 % bootstrap over images. On the left, "
    "methods are moved sideways by up to 13 %, so that bars do not hide each other. On the right, positions are exact."
)
DEMO_CAVEAT = (
    "Caveat: these small models were trained on drawn shapes with a loss on the cosine that text-guided selection "
    f"({READS_COSINES}) reads, so they favour it. The plot shows what pruning costs on this task. It does not show which "
    "method is better on real data."
)


def draw(rows: list[dict], path: Path) -> None:
    """Draw the rows of a compare.csv and write the plot: one row of panels per checkpoint."""
    # 1. The methods that have a budget, in the order of the index, and their looks.
    rows = summary(rows)
    checkpoints = list(dict.fromkeys(row["checkpoint"] for row in rows))
    order = [*method_names(), *(row["method"] for row in rows)]
    methods = [name for name in dict.fromkeys(order) if any(r["method"] == name and r["budget_percent"] for r in rows)]
    styles = _styles(methods)
    # 2. The panels.
    with style():
        figure, axes = panels(len(checkpoints), 2, height=4.4, sharey="row")
        legend = {}
        for checkpoint, (left, right) in zip(checkpoints, axes, strict=True):
            here = [row for row in rows if row["checkpoint"] == checkpoint]
            for n, name in enumerate(methods):
                points = [row for row in here if row["method"] == name]
                # A factor and not a distance, because the axis is logarithmic.
                aside = (1 + _SPREAD) ** (n / max(1, len(methods) - 1) - 0.5)
                if points:
                    legend[name] = _line(left, points, "layer_mean", styles[name], aside, bars=True)
                    _line(right, points, "prefill_flops", styles[name])
            _ends(left, here, "layer_mean")
            _ends(right, here, "prefill_flops")
            left.set_xlabel("vision tokens per image, mean over the layers of the LLM (log)")
            right.set_xlabel("FLOPs per question, from pixels to the first token (log)")
            left.set_title(
                f"{checkpoint}: {here[0]['questions']:.0f} questions about {here[0]['pictures']:.0f} pictures"
            )
            left.set_ylabel(f"{headline_of(here[0])} (%)")
        # 3. One legend for all panels. A method may be missing on one checkpoint, so it is sorted here.
        legend = {name: legend[name] for name in methods}
        figure.legend(legend.values(), legend, loc="outside right upper", title="method", handlelength=3)
        save(figure, path, (CAPTION, DEMO_CAVEAT) if on_demo(rows) else (CAPTION,))


def _styles(methods: list[str]) -> dict[str, dict]:
    """Return method -> look: AdaV in black, random in grey, all others by colour and marker."""
    plain = {"adav": {"color": "black", "marker": "o"}, "random": {"color": FAINT, "marker": "x"}}
    others = [name for name in methods if name not in plain]
    styles = {name: look(n) for n, name in enumerate(others)} | plain
    return {name: style | {"linewidth": 2.2 if name == "adav" else 1.3} for name, style in styles.items()}


def _inside_the_llm(rows: list[dict]) -> bool:
    """Return whether a method drops tokens inside the LLM: then layers read different numbers of vision tokens."""
    # 0.01: both numbers are rounded means.
    return any(abs(row["layer_mean"] - row["tokens_after"]) > 0.01 for row in rows)


def _line(axis: Axes, points: list[dict], x: str, look_: dict, aside: float = 1.0, bars: bool = False):
    """Draw the points of one method; return the line for the legend.

    x: column of the x axis. aside: factor on x. bars: draw intervals.
    """
    points = sorted(points, key=lambda row: row["budget_percent"])
    across, up = [aside * row[x] for row in points], [100 * row["accuracy"] for row in points]
    if bars:
        low, high = ([100 * row["accuracy_" + end] for row in points] for end in ("low", "high"))
        axis.vlines(across, low, high, color=look_["color"], linewidth=1, alpha=0.45)
    # The marker "x" is drawn by its edge alone. A white edge would make it invisible.
    crossed = look_["marker"] == "x"
    (line,) = axis.plot(
        across,
        up,
        linestyle="--" if _inside_the_llm(points) else "-",
        markersize=6,
        markeredgecolor=look_["color"] if crossed else "white",
        markeredgewidth=1.5 if crossed else 0.6,
        zorder=4 if look_["color"] == "black" else 3,
        **look_,
    )
    return line


def _ends(axis: Axes, rows: list[dict], x: str) -> None:
    """Draw the two ends of the scale as horizontal lines, and a star at the x of all tokens."""
    for name, dashes, text in (("none", "--", "all tokens"), ("no_image", ":", "no image")):
        for row in (row for row in rows if row["method"] == name):
            height = 100 * row["accuracy"]
            axis.axhline(height, color=INK, linestyle=dashes, linewidth=1, zorder=1)
            if name == "none":
                axis.plot(row[x], height, "*", color=INK, markersize=11, zorder=5)
            place = {"xy": (0, height), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axis.annotate(text, **place, xytext=(4, 2), ha="left", va="bottom", fontsize=9)
    log_ticks(axis.xaxis)

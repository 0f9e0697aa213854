"""The plot of a comparison: accuracy against the vision tokens that a layer reads, and against FLOPs."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes

from llava.config import method_names
from llava.eval.compare_table import summary
from llava.eval.plots import FAINT, INK, log_ticks, look, panels, save, style

# Field of a row, label of the x axis, and by which share of x the methods are moved apart.
_AXES = (
    ("layer_mean", "vision tokens per image, mean over the layers of the LLM (log)", 0.26),
    ("prefill_flops", "FLOPs per question from pixels to the first token (log)", 0.08),
)
CAPTION = (
    "Dashed: methods that drop tokens inside the LLM. Bars: 95 % bootstrap over pictures. random: mean over seeds. Methods are "
    "moved apart sideways, by up to 13 % (tokens) and 4 % (FLOPs), so that bars do not hide each other.",
    "Caveat: these are small models trained on drawn shapes with a loss on the very cosine that text-guided selection (t2i, "
    "mix, adav and its kin) reads, so text guidance is flattered. The plot shows what pruning costs on this task; it is "
    "no evidence for one method over another on real data.",
)


def draw(rows: list[dict], path: Path) -> None:
    """Write the plot of the rows of a compare.csv: one row of panels per checkpoint."""
    rows = summary(rows)
    checkpoints = list(dict.fromkeys(row["checkpoint"] for row in rows))
    order = [*method_names(), *(row["method"] for row in rows)]
    methods = [name for name in dict.fromkeys(order) if any(r["method"] == name and r["budget_percent"] for r in rows)]
    styles = _styles(methods)
    with style():
        figure, axes = panels(len(checkpoints), len(_AXES), height=4.4, sharey="row")
        for checkpoint, (left, right) in zip(checkpoints, axes, strict=True):
            here = [row for row in rows if row["checkpoint"] == checkpoint]
            for axis, (name, label, spread) in zip((left, right), _AXES, strict=True):
                _panel(axis, here, name, spread, methods, styles)
                axis.set_xlabel(label)
            count = f"{here[0]['questions']:.0f} questions about {here[0]['pictures']:.0f} pictures"
            left.set_title(f"{checkpoint}: {count}")
            left.set_ylabel("accuracy (%)")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", title="method", handlelength=2.6, labelspacing=0.7)
        save(figure, path, CAPTION)


def _styles(methods: list[str]) -> dict[str, dict]:
    """AdaV in black, random in grey, everything else by colour and marker."""
    plain = {"adav": {"color": "black", "marker": "o"}, "random": {"color": FAINT, "marker": "x"}}
    others = [name for name in methods if name not in plain]
    styles = {name: look(n) for n, name in enumerate(others)} | plain
    return {name: style | {"linewidth": 2.2 if name == "adav" else 1.3} for name, style in styles.items()}


def _inside_the_llm(rows: list[dict]) -> bool:
    """Whether layers read different numbers of vision tokens."""
    return any(abs(row["layer_mean"] - row["tokens_after"]) > 0.01 for row in rows)


def _panel(axis: Axes, rows: list[dict], x: str, spread: float, methods: list[str], styles: dict[str, dict]) -> None:
    for n, name in enumerate(methods):
        points = sorted((row for row in rows if row["method"] == name), key=lambda row: row[x])
        if not points:
            continue
        aside = (1 + spread) ** (n / max(1, len(methods) - 1) - 0.5)
        accuracy = [100 * row["accuracy"] for row in points]
        bars = [[100 * abs(row["accuracy"] - row["accuracy_" + end]) for row in points] for end in ("low", "high")]
        drawn = axis.errorbar(
            [aside * row[x] for row in points],
            accuracy,
            yerr=bars,
            label=name,
            linestyle="--" if _inside_the_llm(points) else "-",
            markersize=6,
            markeredgecolor="white" if styles[name]["marker"] != "x" else None,
            markeredgewidth=0.6 if styles[name]["marker"] != "x" else 1.5,
            elinewidth=1,
            zorder=4 if name == "adav" else 3,
            **styles[name],
        )
        for bar in drawn[2]:
            bar.set_alpha(0.45)
    for name, dashes, text in (("none", "--", "all tokens"), ("no_image", ":", "no image")):
        for row in (row for row in rows if row["method"] == name):
            height = 100 * row["accuracy"]
            axis.axhline(height, color=INK, linestyle=dashes, linewidth=1, zorder=1)
            if name == "none":
                axis.plot(row[x], height, "*", color=INK, markersize=11, zorder=5)
            place = {"xy": (0, height), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
            axis.annotate(text, **place, xytext=(4, 2), ha="left", va="bottom", fontsize=9)
    log_ticks(axis.xaxis)

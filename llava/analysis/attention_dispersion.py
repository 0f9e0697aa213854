"""Where attention to the image goes: the vision tower's [CLS] token against the LLM's last prompt token, layer by layer.

    python -m llava.analysis.attention_dispersion CHECKPOINT --questions FILE --images DIR --limit N --out DIR

FasterVLM (arXiv 2412.01818) gives this motivation: the LLM's attention to vision tokens is shifted towards the end of
the sequence, and it is more dispersed than the [CLS] attention. The command writes attention_dispersion.csv (dispersion
and shift, one row per source and layer), attention_positions.csv (mean attention per position) and a plot.

Both kinds of attention are made comparable first: patches in LLM order, without newline tokens, scaled to the sum one.
Positions are relative (0 is the first patch, 1 the last), because images differ in their number of patches.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from llava.analysis.prompts import TOP, effective_share, parser, prompts, top_share, write_csv
from llava.common.errors import exits_cleanly
from llava.eval.scoring.bootstrap import cluster_intervals

BINS = 36  # bins of the position axis
# Every image's concentration curve is read at these shares, because images differ in their number of patches.
_GRID = np.linspace(0, 1, 101)


def rows_of_prompt(shard, prepared) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attention of one prompt: [CLS] attention [P], the LLM's [L, P], and the image's share [L] of each layer's row.

    The first two are scaled to the sum one.
    """
    import torch

    from llava.analysis.last_query_rows import LastQueryRows

    (selection,), ((start, length),) = prepared.selections[0], prepared.image_spans[0]
    with LastQueryRows(shard.model) as reader, torch.inference_mode():
        shard.model(
            inputs_embeds=prepared.inputs_embeds,
            attention_mask=prepared.attention_mask,
            position_ids=prepared.position_ids,
            # LastQueryRows reads the keys from the cache.
            use_cache=True,
            logits_to_keep=1,
        )
    patches = (selection.tile >= 0).cpu()  # newline tokens have tile -1 and no saliency
    cls = selection.saliency.cpu()[patches].double().numpy()
    llm = reader.calls[0][:, 0, start : start + length].double()
    on_image = llm.sum(dim=1).numpy()
    llm = llm[:, patches].numpy()
    return cls / cls.sum(), llm / llm.sum(axis=1, keepdims=True), on_image


def density(values: np.ndarray, bins: int) -> np.ndarray:
    """Densities [..., bins] of distributions [..., P] over positions. 1 means the same as under uniform attention."""
    # P is rarely a multiple of the bins: a patch that lies across an edge is divided between both bins, linearly.
    size = values.shape[-1]
    edges = np.linspace(0, size, bins + 1)
    sums = np.concatenate([np.zeros((*values.shape[:-1], 1)), np.cumsum(values, axis=-1)], axis=-1)
    low = np.minimum(edges.astype(int), size - 1)
    at = np.take(sums, low, axis=-1) + (edges - low) * np.take(values, low, axis=-1)
    return np.diff(at, axis=-1) * bins


def figures(values: np.ndarray) -> dict[str, float]:
    """Measures of dispersion and shift of one distribution [P], by name."""
    centres = (np.arange(len(values)) + 0.5) / len(values)
    quarters = density(values, 4) / 4
    return {
        "effective_share": effective_share(values),
        **{f"top_{100 * share:g}_percent": top_share(values, share) for share in TOP},
        "centre": float(values @ centres),
        "first_quarter": quarters[0],
        "last_quarter": quarters[-1],
    }


def curve(values: np.ndarray) -> np.ndarray:
    """[101] mass of the largest 0, 1, ..., 100 % of the values of a distribution [P]."""
    sums = np.concatenate([[0], np.cumsum(np.sort(values)[::-1])])
    return np.interp(_GRID, np.linspace(0, 1, len(sums)), sums)


class Dispersion:
    """Measurements by source and prompt. Sources: ("cls", ""), ("llm", layer) with layers from 0, ("llm", "mean")."""

    def __init__(self):
        self.figures: dict[tuple, list[dict]] = defaultdict(list)
        self.positions: dict[tuple, list[np.ndarray]] = defaultdict(list)
        self.curves: dict[tuple, list[np.ndarray]] = defaultdict(list)
        self.patches: list[int] = []
        self.pictures: list[str] = []

    def add(self, picture: str, cls: np.ndarray, llm: np.ndarray, on_image: np.ndarray) -> None:
        sources = {("cls", ""): (cls, np.nan), ("llm", "mean"): (llm.mean(axis=0), on_image.mean())}
        sources |= {("llm", layer): (row, share) for layer, (row, share) in enumerate(zip(llm, on_image, strict=True))}
        for source, (values, share) in sources.items():
            self.figures[source].append({"share_of_row": share} | figures(values))
            self.positions[source].append(density(values, BINS))
            self.curves[source].append(curve(values))
        self.patches.append(len(cls))
        self.pictures.append(picture)

    def table(self) -> list[dict]:
        """One row per source and layer: means over prompts, with 95 % bootstrap intervals over pictures."""
        rows = []
        for (source, layer), found in self.figures.items():
            row = {"source": source, "layer": layer, "prompts": len(found), "pictures": len(set(self.pictures))}
            row["patches"] = float(np.mean(self.patches))
            values = np.array([list(one.values()) for one in found])
            # Questions about one picture share its attention, so the bootstrap resamples pictures.
            for name, *ends in zip(found[0], *cluster_intervals(values, self.pictures), strict=True):
                row |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
            rows.append(row)
        return rows

    def position_table(self) -> list[dict]:
        return [
            {"source": source, "layer": layer, "from": n / BINS, "to": (n + 1) / BINS, "attention": value}
            for (source, layer), found in self.positions.items()
            for n, value in enumerate(np.mean(found, axis=0))
        ]


def draw(found: Dispersion, table: list[dict], title: str, path: Path) -> None:
    """Plot four panels: attention over positions, concentration, and both per layer."""
    from matplotlib.ticker import MaxNLocator

    from llava.eval.results.plots import COLORS, FAINT, panels, save, shades, style

    cls, llm = COLORS[1], COLORS[0]
    layers = [layer for source, layer in found.figures if source == "llm" and layer != "mean"]
    rows = {(row["source"], row["layer"]): row for row in table}
    with style():
        figure, ((where, concentration), (shift, dispersion)) = panels(2, 2, height=3.9)
        # 1. Above: one curve per layer of the LLM, its mean, and [CLS]. Only the outer layers are named in the legend.
        middles = (np.arange(BINS) + 0.5) / BINS
        for axis, x, data in ((where, middles, found.positions), (concentration, _GRID, found.curves)):
            for layer, color in zip(layers, shades(len(layers)), strict=True):
                label = f"LLM, layer {layer}" if layer in (layers[0], layers[-1]) else None
                axis.plot(x, np.mean(data["llm", layer], axis=0), color=color, linewidth=1, label=label)
            axis.plot(x, np.mean(data["llm", "mean"], axis=0), color=llm, linewidth=2.4, label="LLM, mean of layers")
            axis.plot(x, np.mean(data["cls", ""], axis=0), color=cls, linewidth=2.4, label="[CLS] of the tower")
        where.axhline(1, color=FAINT, linestyle=":", linewidth=1)
        where.set(title="Attention by position", xlabel="position among the patches (0 first, 1 last)")
        where.set(ylabel="attention (1 = all tokens alike)", ylim=(0, None), xlim=(0, 1))
        where.legend(loc="best", fontsize=9)
        concentration.plot([0, 1], [0, 1], color=FAINT, linestyle=":", linewidth=1)
        concentration.set(title="How few tokens have most of it", xlabel="share of tokens, largest first")
        concentration.set(ylabel="share of attention", xlim=(0, 1), ylim=(0, 1.02))
        # 2. Below: one measure per layer with its interval, beside the band of [CLS].
        for axis, name, even, title_, label in (
            (shift, "centre", 0.5, "Shift, by layer", "mean position (0.5 = not shifted)"),
            (dispersion, "top_10_percent", 0.1, "Concentration, by layer", "attention on the top 10 % of tokens"),
        ):
            values = np.array([[rows["llm", layer][name + end] for layer in layers] for end in ("", "_low", "_high")])
            axis.errorbar(layers, values[0], abs(values[1:] - values[0]), color=llm, marker="o")
            axis.axhline(rows["cls", ""][name], color=cls, linewidth=2.4)
            axis.axhspan(
                rows["cls", ""][f"{name}_low"], rows["cls", ""][f"{name}_high"], color=cls, alpha=0.2, linewidth=0
            )
            axis.axhline(even, color=FAINT, linestyle=":", linewidth=1)
            axis.set(title=title_, xlabel="layer of the LLM", ylabel=label)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        # 3. Title and caption.
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        caption = (
            f"{len(found.patches)} questions, {np.mean(found.patches):.0f} patches on average, in the order in which the LLM reads "
            "them. LLM: the last prompt token's row, mean over heads. Both sum to one over the patches of an image. Dotted: all "
            "tokens alike. Bars and band: 95 % bootstrap over pictures.",
            "Says something about this checkpoint and these questions only.",
        )
        save(figure, path, caption)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parser("llava.analysis.attention_dispersion", __doc__.split("\n")[0], limit=100).parse_args(argv)
    found = Dispersion()
    for shard, sample, prepared in prompts(args):
        found.add(sample.image, *rows_of_prompt(shard, prepared))
    rows = found.table()
    write_csv(rows, args.out / "attention_dispersion.csv")
    write_csv(found.position_table(), args.out / "attention_positions.csv")
    draw(found, rows, Path(args.checkpoint).name, args.out / "attention_dispersion.png")
    for row in rows:
        print(
            f"{row['source']:>3} {row['layer']!s:>4}: top 10 % of patches have {100 * row['top_10_percent']:.1f} % of the attention, "
            f"mean position {row['centre']:.3f}"
        )
    print(args.out / "attention_dispersion.png")


if __name__ == "__main__":
    main()

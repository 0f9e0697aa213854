"""Who gets the LLM's attention while it answers: text before the image, the image, the question, the answer so far.

    python -m llava.analysis.attention_share CHECKPOINT --questions FILE --images DIR --limit N --steps T --out DIR

A-VL (arXiv 2409.14846) gives this motivation: vision tokens receive attention throughout decoding, but only a few of
them at a time, and not always the same ones. Text receives attention if it is near. Every prompt is decoded greedily
for exactly T steps. The end token is forbidden, so the tokens after the end of an answer are not what the model would
have generated. Step 0 is prefill, and its row is that of the last prompt token. The command writes attention_share.csv
(means over prompts, one row per step and layer) and a plot.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from llava.analysis.prompts import effective_share, parser, positive, prompts, top_set, top_share, write_csv
from llava.common.errors import exits_cleanly

KINDS = {
    "before": "text before the image",
    "image": "image",
    "after": "text after the image",
    "generated": "answer so far",
}
TOP = 0.10  # share of the vision tokens whose attention and overlap are reported


def rows_of_answer(shard, prepared, steps: int) -> list[np.ndarray]:
    """Attention rows [L, keys] of the newest token, mean over heads, for each of `steps` steps of one prompt."""
    from llava.analysis.last_query_rows import LastQueryRows

    with LastQueryRows(shard.model) as reader:
        shard.model.generate(
            prepared=prepared,
            do_sample=False,
            num_beams=1,
            # A checkpoint's generation_config may set these two, and transformers then warns about greedy decoding.
            temperature=None,
            top_p=None,
            # The minimum forbids the end token, so all prompts have the same number of steps and can be averaged.
            min_new_tokens=steps,
            max_new_tokens=steps,
            pad_token_id=shard.engine.pad,
        )
    return [call[:, 0].double().numpy() for call in reader.calls]


def figures(rows: list[np.ndarray], span: tuple[int, int], prompt: int) -> dict[str, np.ndarray]:
    """Measures [steps, L] by name.

    rows: per step [L, keys]. span: (start, length) of the image. prompt: tokens of the prompt, vision tokens included.

    Concentration and overlap use the image's part of the row, scaled to the sum one.
    """
    start, length = span
    found: dict[str, list] = defaultdict(list)
    first = before = None
    for row in rows:
        parts = np.split(row, [start, start + length, prompt], axis=1)
        for kind, part in zip(KINDS, parts, strict=True):
            found[kind].append(part.sum(axis=1))
        image = parts[1] / parts[1].sum(axis=1, keepdims=True)
        found["image_top_10_percent"].append(top_share(image, TOP))
        found["image_effective_share"].append(effective_share(image))
        top = top_set(image, TOP)
        # Step 0 has no earlier step to compare with. NaN becomes an empty field of the .csv and a gap in the plot.
        never = np.full(len(row), np.nan)
        found["overlap_with_prefill"].append(never if first is None else _overlap(top, first))
        found["overlap_with_last_step"].append(never if before is None else _overlap(top, before))
        first, before = top if first is None else first, top
    return {name: np.stack(values) for name, values in found.items()}


def _overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[L] share of the tokens of one set [L, P] that are also in the other set. Both sets have the same size."""
    return (one & other).sum(axis=1) / one.sum(axis=1)


def table(means: dict[str, np.ndarray], prompts_: int) -> list[dict]:
    """One row per step and layer, and after the layers of each step their mean."""
    steps, layers = means["image"].shape
    rows = []
    for step in range(steps):
        for layer in [*range(layers), "mean"]:
            row = {"step": step, "layer": layer, "prompts": prompts_}
            for name, values in means.items():
                row[name] = values[step].mean() if layer == "mean" else values[step, layer]
            rows.append(row)
    return rows


def draw(means: dict[str, np.ndarray], prompts_: int, title: str, path: Path) -> None:
    """Plot four panels: shares over steps and over layers, and concentration and overlap of the image's part."""
    from matplotlib.ticker import MaxNLocator

    from llava.eval.results.plots import COLORS, FAINT, panels, save, shades, style

    steps, layers = means["image"].shape
    colors = dict(zip(KINDS, (FAINT, COLORS[1], COLORS[5], COLORS[0]), strict=True))
    with style():
        figure, ((over_steps, over_layers), (concentration, drift)) = panels(2, 2, height=3.9)
        # 1. Shares of the four kinds of tokens, over steps and by layer.
        shares = [means[kind].mean(axis=1) for kind in KINDS]
        over_steps.stackplot(range(steps), shares, labels=KINDS.values(), colors=colors.values(), alpha=0.9)
        over_steps.set(title="Who is read, over steps (mean of layers)", ylim=(0, 1), ylabel="share of attention")
        bottom = np.zeros(layers)
        for kind in KINDS:
            share = means[kind].mean(axis=0)
            over_layers.bar(range(layers), share, 0.85, bottom, color=colors[kind], alpha=0.9, label=KINDS[kind])
            bottom += share
        over_layers.set(title="Who is read, by layer (mean of steps)", ylim=(0, 1), xlabel="layer of the LLM")
        figure.legend(*over_steps.get_legend_handles_labels(), loc="outside upper right", ncols=len(KINDS))
        # 2. Concentration of the image's part, one curve per layer and their mean.
        for layer, color in enumerate(shades(layers)):
            label = f"layer {layer}" if layer in (0, layers - 1) else None
            concentration.plot(means["image_top_10_percent"][:, layer], color=color, linewidth=1, label=label)
        mean = means["image_top_10_percent"].mean(axis=1)
        concentration.plot(mean, color=COLORS[1], linewidth=2.4, label="mean of layers")
        concentration.set(title="How few image tokens have most of the image's part", ylim=(0, 1))
        concentration.set(ylabel="share of its top 10 %")
        # 3. Overlap of the top tokens with those of other steps.
        for name, text, color in (
            ("overlap_with_last_step", "with the step before", COLORS[0]),
            ("overlap_with_prefill", "with prefill", COLORS[1]),
        ):
            drift.plot(means[name].mean(axis=1), color=color, marker="o", markersize=4, linewidth=2, label=text)
        drift.set(title="Whether they stay the same (mean of layers)", ylim=(0, 1), ylabel="overlap of the top 10 %")
        # 4. Axes, title and caption.
        for axis in (concentration, drift):
            axis.axhline(TOP, color=FAINT, linestyle=":", linewidth=1)
            axis.legend(loc="best", fontsize=9)
        for axis in (over_steps, concentration, drift):
            axis.set(xlim=(0, max(1, steps - 1)), xlabel="decode step (0 = prefill)")
        for axis in (over_steps, over_layers, concentration, drift):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.suptitle(title, x=0.01, ha="left", fontsize=12)
        caption = (
            f"{prompts_} questions, {steps} steps each: the end token is barred, so on a model whose answers are one word, all steps "
            "but the first are not what it would have said. Rows of the newest token, mean over heads. Dotted: chance.",
            "Says something about this checkpoint and these questions only.",
        )
        save(figure, path, caption)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    arguments = parser("llava.analysis.attention_share", __doc__.split("\n")[0], limit=50)
    arguments.add_argument("--steps", type=positive, default=16, help="decode steps, prefill's own included (16)")
    args = arguments.parse_args(argv)
    sums: dict[str, np.ndarray] = {}
    number = 0
    for shard, _, prepared in prompts(args):
        rows = rows_of_answer(shard, prepared, args.steps)
        found = figures(rows, prepared.image_spans[0][0], prepared.lengths[0])
        # Only sums are kept: the rows of all prompts would need memory for prompts x steps x layers x keys.
        sums = {name: sums.get(name, 0) + values for name, values in found.items()}
        number += 1
    means = {name: values / number for name, values in sums.items()}
    write_csv(table(means, number), args.out / "attention_share.csv")
    draw(means, number, Path(args.checkpoint).name, args.out / "attention_share.png")
    for step in sorted({0, args.steps // 2, args.steps - 1}):
        shares = ", ".join(f"{text} {100 * means[kind][step].mean():.1f} %" for kind, text in KINDS.items())
        print(f"step {step}: {shares}")
    print(args.out / "attention_share.png")


if __name__ == "__main__":
    main()

"""Draws the vision tokens that methods kept of one image, their scores and their costs, side by side on one page.

    python -m llava.serve.overlay --image X --question Q --methods adav,fastervlm --tokens 144 -o out.png

runs the methods and draws the page (llava/serve/overlay.py). From selections that exist already:

    picture = draw_overlay(image, tile_plan(image.size, model.config), side, {"adav": selection}, {"adav": "red"})
    picture.save("kept.png")

In all functions: image is the picture as it was opened, in any mode; plan is its TilePlan (llava.mm_utils.tile_plan);
side is the number of patches per tile side. Drawings are PIL images. This file does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from llava.overlay.blocks import (
    GAP,
    PANEL,
    ROOM,
    STAGE,
    beside,
    flowed,
    framed,
    grid,
    heat_scale,
    legend,
    section,
    shelves,
    split_bar,
    stacked,
    view_block,
)
from llava.overlay.lettering import FAINT, INK, LARGE, PAGE, SIZE, SMALL, WARNING, text_block
from llava.overlay.views import (
    detailed,
    heat_views,
    kept_at,
    kept_views,
    left_of,
    places_of,
    survivors_of,
)

if TYPE_CHECKING:
    from llava.methods.before_llm import Selection
    from llava.mm_utils import TilePlan

MOST_STAGES = 12  # views in a row of stages; of more cuts, this many are drawn at even distances
TEXT_COLOR, SALIENCY_COLOR = (0, 130, 140), (215, 105, 20)


def draw_overlay(
    image: Image.Image,
    plan: TilePlan,
    side: int,
    selections: dict[str, Selection],
    answers: dict[str, str] | None = None,
    title: str = "",
    columns: int = 4,
    *,
    subtitle: str = "",
    caveat: str = "",
    notes: dict[str, Sequence[str]] | None = None,
    why: bool = False,
    sections: dict[str, Image.Image] | None = None,
    footer: str = "",
) -> Image.Image:
    """A page with one panel per method: its name, the number of tokens that it kept, their patches, its answer.

    selections: method name (or any other label) -> what it kept of this image
    answers:    label -> answer, where there is one
    title:      above everything, for example the question; subtitle: smaller, under it
    caveat:     what the answers are worth, under these, where that has to be said
    columns:    panels beside each other
    notes:      label -> lines under its answer, for example measured costs
    why:        also heat maps of both scores of AdaV, and what is left after each cut of methods inside the LLM, where
                the selections' reports have them
    sections:   title -> further picture under the panels (llava.overlay.cache_strip); footer: small print at the end

    An image of one tile has one view. An image with crops has two: tile 0, which is the whole image squeezed into a
    square, and the crops at the places where they were cut. Padding is hatched. For a method inside the LLM the page
    shows the tokens after its last cut. Tokens that are no patch (newline, merged) are counted but not drawn.
    """
    # 1. The panels.
    image = image.convert("RGB")
    panels = [
        _panel(name, image, plan, side, selection, answers, (notes or {}).get(name, ()))
        for name, selection in selections.items()
    ]
    columns = max(1, min(columns, len(panels)))
    parts = [grid(panels, columns)] if panels else [Image.new("RGB", (PANEL, 1), PAGE)]
    # 2. The heat maps of AdaV's scores.
    maps = {}
    for name, kept in selections.items():
        if why and has_scores(kept):
            split = f"{kept.report['k_text']} by the question : {kept.report['k_saliency']} by saliency"
            maps[f"{name}: why these tokens ({split})"] = draw_scores(image, plan, side, kept)
    if len(panels) == len(maps) == 1:
        parts, maps = [beside([parts[0], *maps.values()], 2 * GAP)], {}
    # 3. The width of the page is known now. Stages and sections are fitted into it, two side by side on a wide page.
    sections = sections or {}
    width = max([parts[0].width, 2 * PANEL, *(picture.width for picture in [*maps.values(), *sections.values()])])
    room = width if width < 3 * ROOM else (width - 2 * GAP) // 2
    for name, kept in selections.items():
        if why and kept.report.get("survivors"):
            maps[f"{name}: what is left inside the LLM"] = draw_stages(image, plan, side, kept, room)
    parts += shelves([section(text, picture) for text, picture in [*maps.items(), *sections.items()]], width)
    # 4. Title, legend and footer.
    top = [text_block(title, width, LARGE, INK, 3, bold=True)] if title else []
    top += [text_block(subtitle, width, SMALL, FAINT, 3)] if subtitle else []
    top += [text_block(caveat, width, SMALL, WARNING, 8)] if caveat else []
    ends = [legend(_meanings(plan, side, selections, why), width)]
    ends += [text_block(footer, width, SMALL, FAINT, 8)] if footer else []
    return framed([*([stacked(top)] if top else []), *parts, stacked(ends)])


def draw_scores(image: Image.Image, plan: TilePlan, side: int, selection: Selection) -> Image.Image:
    """Both score maps of an AdaV selection side by side."""
    return beside(score_maps(image, plan, side, selection))


def score_maps(image: Image.Image, plan: TilePlan, side: int, selection: Selection) -> list[Image.Image]:
    """Heat maps of both scores of an AdaV selection, each with its share of the budget.

    Reads report["text_score"] and report["saliency_score"] [N], report["k_text"] and report["k_saliency"]. Kept tokens
    are outlined on both maps. UserError if the report has no scores, or scores of another image.
    """
    from llava.common.errors import UserError
    from llava.mm_utils import NEWLINE, merge_order

    # 1. The place of each token and the shares of the budget, from the plan and the report.
    if not has_scores(selection):
        raise UserError(
            "the selection's report has no scores to draw; allowed are selections of adav, adav_cover and adav_zoom"
        )
    report, tokens = selection.report, merge_order(plan, side).tolist()
    places = [(-1, -1, -1) if at == NEWLINE else (at // side**2, at % side**2 // side, at % side) for at in tokens]
    k_text, k_saliency = report["k_text"], report["k_saliency"]
    share = k_text / max(1, k_text + k_saliency)
    # 2. One heat map per score.
    maps = []
    for name, by, count, bar, color in (
        ("text_score", "Closeness to the question", k_text, (0, share), TEXT_COLOR),
        ("saliency_score", "Saliency ([CLS] attention)", k_saliency, (share, 1), SALIENCY_COLOR),
    ):
        # Newline tokens and crops that were not encoded have no score: NaN, which would spoil the maximum.
        found = np.array(report[name].tolist())
        scores = np.nan_to_num(found, nan=0.0)
        if len(scores) != len(places):
            raise UserError(f"the selection has {len(scores)} scores, but this image {len(places)} tokens")
        largest = float(scores.max(initial=0))
        # Square root: a softmax gives most patches about a hundredth of the maximum. Without the root all are black.
        levels = np.sqrt(scores.clip(0) / largest) if largest > 0 else np.zeros(len(scores))
        if selection.tiles is not None:
            levels[np.isnan(found)] = np.nan
        views = view_block(heat_views(image, plan, side, places, levels, places_of(selection)), ROOM)
        width = max(PANEL, views.width)
        maps.append(
            stacked(
                [
                    text_block(by, width, LARGE, INK, 1, bold=True),
                    text_block(f"{count} of {k_text + k_saliency} tokens by this score", width, SIZE, FAINT, 1),
                    views,
                    split_bar(width, *bar, color),
                    heat_scale(width, "0", f"{largest:.2g}"),
                ]
            )
        )
    return maps


def draw_stages(
    image: Image.Image, plan: TilePlan, side: int, selection: Selection, width: int = 4 * ROOM
) -> Image.Image:
    """Small views of the tokens that stay: before the first cut inside the LLM and after each cut, in rows of `width`.

    Reads report["survivors"] (slots after each cut) and report["cuts"] (where each cut was made).
    """
    stages, where = selection.report["survivors"], selection.report["cuts"]
    shown = np.unique(np.linspace(0, len(stages) - 1, min(len(stages), MOST_STAGES)).round().astype(int)).tolist()
    blocks = [_stage(image, plan, side, places_of(selection), "enters the LLM")]
    blocks += [_stage(image, plan, side, survivors_of(selection, stages[nth]), where[nth]) for nth in shown]
    row = flowed(blocks, width)
    if len(shown) == len(stages):
        return row
    return stacked([row, text_block(f"{len(shown)} of {len(stages)} cuts are drawn", width, SMALL, FAINT, 1)])


def has_scores(selection: Selection) -> bool:
    """True if the report of a selection has both scores of AdaV."""
    return {"text_score", "saliency_score", "k_text", "k_saliency"} <= selection.report.keys()


def counted(selection: Selection) -> str:
    """The tokens that stay, in words: "58 of 420 tokens (12 newline, 3 made)"."""
    if not selection.total:
        return "no vision token"  # `no_image`: the tower did not run
    left = left_of(selection)
    patches = [place for place in left if place[0] >= 0]
    repeated = len(patches) - len(set(patches))  # AdaV with compat "public" keeps some patches twice
    stages = selection.report.get("survivors")
    numbers = selection.indices.tolist()
    if stages:
        numbers = [numbers[slot] if slot >= 0 else -1 for slot in stages[-1].tolist()]
    made = sum(number < 0 for number in numbers)
    kinds = ((len(left) - len(patches) - made, "newline"), (made, "made"), (repeated, "twice"))
    extra = ", ".join(f"{count} {kind}" for count, kind in kinds if count)
    where = " after the last cut" if stages else ""
    return f"{len(left)} of {selection.total} tokens{where}" + (f" ({extra})" if extra else "")


def _panel(name, image, plan, side, selection, answers, notes) -> Image.Image:
    """The panel of one method: name, count, views, answer and notes below each other."""
    views = view_block(kept_views(image, plan, side, selection), ROOM)
    width = max(PANEL, views.width)
    blocks = [
        text_block(name, width, LARGE, INK, 1, bold=True),
        text_block(counted(selection), width, SIZE, FAINT, 1),
        views,
    ]
    if answers is not None:
        blocks.append(text_block(f"answer: {answers.get(name, '-') or '(empty)'}", width, SIZE, INK, 6, bold=True))
    return stacked(
        [*blocks, *([stacked([text_block(note, width, SMALL, INK, 2) for note in notes], 1)] if notes else [])]
    )


def _stage(image, plan, side, places, label: str) -> Image.Image:
    """The small view of one stage, below its label and its number of tokens."""
    views = beside([view for _, view in kept_at(image, plan, side, places, STAGE)], 6)
    width = max(views.width, 120)
    told = [text_block(label, width, SMALL, INK, 1), text_block(f"{len(places)} tokens", width, SMALL, FAINT, 1)]
    return stacked([*told, views], 2)


def width_of(columns: int) -> int:
    """Width in pixels of a page with this number of columns. It serves as `width` of draw_caches."""
    return max(3, columns) * (ROOM + GAP) - GAP


def _meanings(plan: TilePlan, side: int, selections: dict[str, Selection], why: bool) -> list[tuple]:
    """Entries of the legend. Only what this page shows is explained."""
    entries = [("kept", "kept"), ("dropped", "dropped")]
    if any(map(detailed, selections.values())):
        entries.insert(1, ("detail", "kept for its fine detail"))
    # A negative offset means that the image was cropped, so there is no padding.
    if plan.resized != plan.canvas and plan.offset[0] >= 0 and plan.offset[1] >= 0:
        entries.append(("padding", "padding, no part of the image"))
    if why and any(map(has_scores, selections.values())):
        entries += [("heat", "score, as its root: 0 to the largest"), ("chosen", "kept, by either score")]
    words = " ".join(counted(selection) for selection in selections.values())
    if "newline" in words:
        entries.append(("", "newline: tokens that end a row of patches; counted, no patch to draw"))
    if "made" in words:
        entries.append(("", "made: tokens merged of several patches; counted, no one place to draw"))
    if "twice" in words:
        entries.append(("", "twice: patches that the method feeds to the LLM a second time"))
    return entries

"""Draws the vision tokens of an adaptive KV cache while the answer is generated: a strip, or frames of a GIF.

In all functions:
    states  [1 + steps] arrays [L, K]: the classes of the K tokens of `selection` in L layers, after prefill and after
            each decode step. llava/overlay/cache_trace.py makes them.
    layer   a layer, counted from 1; None draws for each patch the class that it has in most layers
This file does not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from llava.overlay.blocks import ROOM, STAGE, beside, flowed, framed, grid, legend, stacked
from llava.overlay.lettering import FAINT, INK, LARGE, SIZE, SMALL, WARNING, text_block
from llava.overlay.views import ABSENT, CLASS_COLORS, CORE, MINOR, SECONDARY, class_views, places_of

if TYPE_CHECKING:
    from llava.methods.before_llm import Selection
    from llava.mm_utils import TilePlan

MOST_STEPS = 12  # views in a strip; of more steps, this many are drawn at even distances
FRAME, FIRST_FRAME = 700, 1400  # milliseconds that a frame is shown; longer for the first, which marks the start


@dataclass(frozen=True)
class CacheStates:
    """The cache during one answer. interval: decode steps between re-rankings of the core, -1 for never."""

    selection: Selection
    states: Sequence[np.ndarray]
    interval: int = -1


def shown(classes: np.ndarray, layer: int | None = None) -> np.ndarray:
    """The class [K] to draw for each token. classes: [L, K] of all layers; layer: see the head of this file.

    If two classes have the same number of layers, the one that is read more often counts, in the order core, secondary,
    minor, absent.
    """
    if layer is not None:
        return classes[layer - 1]
    # argmax takes the first maximum, so the order of this tuple decides ties.
    votes = np.stack([(classes == name).sum(axis=0) for name in (CORE, SECONDARY, MINOR, ABSENT)])
    return np.array([CORE, SECONDARY, MINOR, ABSENT])[votes.argmax(axis=0)]


def draw_caches(
    image: Image.Image,
    plan: TilePlan,
    side: int,
    caches: dict[str, CacheStates],
    layer: int | None = None,
    width: int = 4 * ROOM,
) -> Image.Image:
    """One strip per label of `caches`, and a legend.

    A strip has small views after prefill and after each decode step, in rows of `width` pixels.
    image, plan, side: see llava/overlay/page.py.
    """
    strips = []
    for name, cache in caches.items():
        count = len(cache.states)
        steps = np.unique(np.linspace(0, count - 1, min(count, MOST_STEPS)).round().astype(int)).tolist()
        row = flowed([_step(image, plan, side, cache, step, layer, STAGE) for step in steps], width)
        told = f" ({len(steps)} of {count} states are drawn)" if len(steps) < count else ""
        strips += [text_block(name + told, row.width, SIZE, INK, 1, bold=True), row]
    across = max(2 * ROOM, *(strip.width for strip in strips))
    return stacked([*strips, _legend(next(iter(caches.values())).interval, layer, min(width, across))], 8)


def cache_frames(
    image: Image.Image,
    plan: TilePlan,
    side: int,
    caches: dict[str, CacheStates],
    layer: int | None = None,
    title: str = "",
    columns: int = 4,
    footer: str = "",
    caveat: str = "",
) -> list[Image.Image]:
    """Pages of equal size, one after prefill and one after each decode step, with a view per label of `caches`.

    columns: views side by side. title, footer: text above and below.
    """
    frames = []
    for step in range(max(len(cache.states) for cache in caches.values())):
        panels = [
            stacked([text_block(name, ROOM, LARGE, INK, 1, bold=True), _step(image, plan, side, cache, step, layer, 1)])
            for name, cache in caches.items()
        ]
        body = grid(panels, min(columns, len(panels)))
        interval = next(iter(caches.values())).interval
        ends = [_legend(interval, layer, body.width)]
        ends += [text_block(footer, body.width, SMALL, FAINT, 6)] if footer else []
        top = [text_block(title, body.width, LARGE, INK, 3, bold=True)] if title else []
        top += [text_block(caveat, body.width, SMALL, WARNING, 10)] if caveat else []
        frames.append(framed([*top, body, stacked(ends)]))
    return frames


def save_frames(frames: Sequence[Image.Image], path: Path) -> None:
    """Write frames as a GIF that repeats. `path` is overwritten."""
    # One palette for all frames and no dithering: otherwise areas that do not change would flicker.
    palette = frames[0].quantize(255, dither=Image.Dither.NONE)
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    durations = [FIRST_FRAME] + [FRAME] * len(others)
    first.save(path, save_all=True, append_images=others, duration=durations, loop=0)


def _step(image, plan, side, cache: CacheStates, step: int, layer: int | None, scale: float) -> Image.Image:
    """The views after one step, below its label and its counts (core + secondary + minor, mean over layers)."""
    classes = cache.states[step]
    views = [
        view for _, view in class_views(image, plan, side, places_of(cache.selection), shown(classes, layer), scale)
    ]
    across = sum(view.width for view in views)
    body = beside(views, 6) if scale < 1 or across <= ROOM else stacked(views)
    label = f"step {step}" if step else "after prefill"
    if step and cache.interval > 0 and step % cache.interval == 0:
        label += ", re-ranked"
    rows = classes if layer is None else classes[layer - 1 : layer]
    core, secondary, minor = ((rows == name).sum(axis=1).mean() for name in (CORE, SECONDARY, MINOR))
    numbers = f"{core:.4g} + {secondary:.4g} + {minor:.4g}"
    room = max(body.width, 130)
    return stacked([text_block(label, room, SMALL, INK, 1), text_block(numbers, room, SMALL, FAINT, 1), body], 2)


def _legend(interval: int, layer: int | None, width: int) -> Image.Image:
    """The legend of the classes. Without re-ranking (interval -1) there is no secondary class."""
    names = {CORE: "core: read at every step", MINOR: "minor: evicted after prefill"}
    if interval > 0:
        names[SECONDARY] = (
            f"secondary: stored, read and ranked anew every {interval} steps" if interval > 1 else "secondary"
        )
    entries = [(color, names[name]) for name, color in CLASS_COLORS.items() if name in names]
    entries.append(((25, 25, 25), "in no cache: dropped before, or padding"))
    where = "of most layers" if layer is None else f"of layer {layer}"
    of_all = ", mean over layers" if layer is None else ""
    entries.append(("", f"Class of a patch: {where}, after the step. Numbers: core + secondary + minor{of_all}."))
    return legend(entries, width)

"""The one progress bar of all commands: rate and remaining time on a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterable

from tqdm import tqdm

DELAY = 1.0  # seconds: what is done by then shows no bar


def progress_bar(what: str, over: Iterable | None = None, total: float | None = None, unit: str = "it", **options):
    """A tqdm bar on stderr, quiet where that is no terminal: iterate over it, or `update` it within `with`.

    what: a few words before the bar; over: what to iterate over; total: steps, where `over` does not know its length;
    unit: of the rate; options: for tqdm (initial, unit_scale, disable=True).
    """
    return tqdm(
        over, desc=what, total=total, unit=unit, **{"disable": None, "delay": DELAY, "dynamic_ncols": True, **options}
    )

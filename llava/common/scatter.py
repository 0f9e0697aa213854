"""When the repeats of a time differ too much for its figure to be quoted: the one rule for all figures.

A busy machine makes a time several times longer, and its repeats then differ from each other. A few slow repeats, such
as the first one, do no harm to a median: what counts is the middle half. Imports no torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

LIMIT = 0.15  # of repeats of one thing: on an idle machine the spread is a few hundredths
# Of the batches of a run, by predicted FLOP: they differ in padding, so the spread was 0.08 to 0.34 on an idle machine.
BATCH_LIMIT = 0.4
REASON = "its repeats differ too much, probably because the machine was busy; do not quote it"


def spread(repeats: Sequence[float]) -> float:
    """Distance between the quartiles of positive numbers, as a share of their median; 0.0 for fewer than two."""
    if len(repeats) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(repeats, n=4, method="inclusive")
    return (high - low) / middle if middle else 0.0


def scatters(share: float | None, limit: float = LIMIT) -> bool:
    """Return whether a figure whose repeats have this `spread` must be marked.

    spread None: there were too few repeats to know."""
    return share is not None and share > limit

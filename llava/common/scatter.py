"""When the repeats of a measurement scatter too much for its figure to be quoted: the one rule for all figures.

A busy machine makes times several times longer, and its repeats differ from each other. Imports no torch.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

LIMIT = 0.25  # of the median; on an idle machine the quartiles lie within 0.1
MARK = "scatters"  # what stands beside a figure in a table
REASON = "the repeats differ too much, probably because the machine was busy; do not quote this time"


def spread(repeats: Sequence[float]) -> float:
    """Distance between the quartiles of positive numbers, as a share of their median; 0.0 for fewer than two."""
    if len(repeats) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(repeats, n=4, method="inclusive")
    return (high - low) / middle if middle else 0.0


def scatters(share: float | None) -> bool:
    """Whether a figure whose repeats have this `spread` has to be marked. None: it has no repeats, nothing is known."""
    return share is not None and share > LIMIT

"""Cluster bootstrap: intervals of means over questions, where several questions share an image.

The results of questions about one image are correlated, so images are drawn with replacement, not questions. All
columns use the same draws. So the interval of a difference of two methods is a paired one: the difference is one more
column.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from llava.common.progress import progress_bar

RESAMPLES = 10_000
LEVEL = 0.95
# Resamples at a time. The weights of all 10,000 at once would need 800 MB for 10,000 images.
_CHUNK = 500


def cluster_intervals(
    values: np.ndarray, clusters: Sequence[Hashable], resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (mean, low, high), [M] each: percentile intervals of the column means of `values`.

    values:   [Q, M], one row per question, one column per quantity
    clusters: Q labels; questions with the same label are drawn together

    A resample draws as many clusters as there are. Its mean is over all questions of the drawn clusters, so a cluster
    with more questions weighs more, as in the mean itself. The same seed gives the same draws for any columns.
    ValueError if `values` and `clusters` do not fit.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or len(clusters) != len(values) or not len(values):
        raise ValueError(f"values has shape {values.shape}, allowed is one row for each of {len(clusters)} clusters")
    # A mean is a ratio of sums with a denominator of 1 per question.
    _, low, high = ratio_intervals(values, np.ones((len(values), 1)), None, clusters, resamples, level, seed)
    return values.mean(axis=0), low, high


def ratio_intervals(
    numerators: np.ndarray,
    denominators: np.ndarray,
    combine: np.ndarray | None,
    clusters: Sequence[Hashable],
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (value, low, high), [M] each: percentile intervals of weighted sums of R ratios of sums.

    numerators:   [Q, R], one row per question
    denominators: [Q, R], or [Q, 1] if all ratios have the same. A ratio with a drawn denominator of 0 counts as 0.
    combine:      [R, M], weight of each ratio in each quantity (-1 to subtract it). None: M = R, each ratio alone.

    The draws are those of `cluster_intervals`.
    """
    # 1. Sum over each cluster: a resample is then a product of weights and sums.
    number = {label: n for n, label in enumerate(dict.fromkeys(clusters))}
    member = np.array([number[label] for label in clusters])

    def per_cluster(columns: np.ndarray) -> np.ndarray:
        return np.stack([np.bincount(member, weights=column) for column in columns.T], axis=1)

    def quantities(above: np.ndarray, below: np.ndarray) -> np.ndarray:
        ratios = np.divide(above, below, out=np.zeros_like(above), where=below != 0)
        return ratios if combine is None else ratios @ combine

    above, below = per_cluster(numerators), per_cluster(denominators)
    # 2. Draw. How often each cluster is drawn has a multinomial distribution with equal probabilities.
    draws, even = np.random.default_rng(seed), np.full(len(above), 1 / len(above))
    drawn = []
    with progress_bar("bootstrap", total=resamples, unit=" resamples") as shown:
        for start in range(0, resamples, _CHUNK):
            weights = draws.multinomial(len(above), even, size=min(_CHUNK, resamples - start))
            drawn.append(quantities(weights @ above, weights @ below))
            shown.update(len(weights))
    # 3. Percentiles of the drawn values, and the value of the whole data.
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return quantities(above.sum(0, keepdims=True), below.sum(0, keepdims=True))[0], low, high

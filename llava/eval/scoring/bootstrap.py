"""Bootstrap intervals of means over questions that come in groups: several questions share a picture.

Questions of one picture are right or wrong together, so pictures are what is drawn with replacement (cluster
bootstrap). Paired: every column sees the same draws, and a difference of two methods is a column like any other.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from llava.common.progress import progress_bar

RESAMPLES = 10_000
LEVEL = 0.95
_CHUNK = 500  # resamples at a time: memory stays small whatever the number of pictures


def cluster_intervals(
    values: np.ndarray, clusters: Sequence[Hashable], resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, low, high), [M] each: percentile intervals of the column means of `values`.

    values:   [Q, M], one row per question, one column per quantity
    clusters: Q labels; questions with the same label are drawn together

    A resample draws as many clusters as there are, and its mean is over the questions of those: a cluster of more
    questions weighs more, as it does in the mean itself. The same seed gives the same draws, whatever the columns.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or len(clusters) != len(values) or not len(values):
        raise ValueError(f"values has shape {values.shape}, allowed is one row for each of {len(clusters)} clusters")
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
    """(value, low, high), [M] each: percentile intervals of sums of ratios of sums, with the draws of `cluster_intervals`.

    numerators:   [Q, R], one row per question
    denominators: [Q, R], or [Q, 1] where all ratios have the same; a ratio whose denominator is drawn as 0 counts as 0
    combine:      [R, M], how often each ratio counts in each quantity (-1 in a difference); None: each is one
    """
    number = {label: n for n, label in enumerate(dict.fromkeys(clusters))}
    member = np.array([number[label] for label in clusters])

    def per_cluster(columns: np.ndarray) -> np.ndarray:
        return np.stack([np.bincount(member, weights=column) for column in columns.T], axis=1)

    def quantities(above: np.ndarray, below: np.ndarray) -> np.ndarray:
        ratios = np.divide(above, below, out=np.zeros_like(above), where=below != 0)
        return ratios if combine is None else ratios @ combine

    above, below = per_cluster(numerators), per_cluster(denominators)
    draws, even = np.random.default_rng(seed), np.full(len(above), 1 / len(above))
    drawn = []
    with progress_bar("bootstrap", total=resamples, unit=" resamples") as shown:
        for start in range(0, resamples, _CHUNK):
            weights = draws.multinomial(len(above), even, size=min(_CHUNK, resamples - start))
            drawn.append(quantities(weights @ above, weights @ below))
            shown.update(len(weights))
    low, high = np.quantile(np.concatenate(drawn), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return quantities(above.sum(0, keepdims=True), below.sum(0, keepdims=True))[0], low, high

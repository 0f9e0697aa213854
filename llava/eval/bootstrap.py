"""Bootstrap intervals of means over questions that come in groups: several questions share a picture.

Questions of one picture are right or wrong together, so pictures are what is drawn with replacement (cluster
bootstrap). Paired: every column sees the same draws, and a difference of two methods is a column like any other.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

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
    number = {label: n for n, label in enumerate(dict.fromkeys(clusters))}
    member = np.array([number[label] for label in clusters])
    if values.ndim != 2 or len(member) != len(values) or not len(values):
        raise ValueError(f"values has shape {values.shape}, allowed is one row for each of {len(member)} clusters")
    counts = np.bincount(member).astype(np.float64)
    sums = np.stack([np.bincount(member, weights=column) for column in values.T], axis=1)
    draws, even = np.random.default_rng(seed), np.full(len(counts), 1 / len(counts))
    means = []
    for start in range(0, resamples, _CHUNK):
        weights = draws.multinomial(len(counts), even, size=min(_CHUNK, resamples - start))
        means.append((weights @ sums) / (weights @ counts)[:, None])
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return values.mean(axis=0), low, high

"""The order of samples under --group_by_modality_length: batches of one modality, shared out evenly by length.

LLaVA's rule (arXiv 2310.03744, section A): a batch of texts does not wait for images, and each of the parts that a global
batch is cut into (ranks, accumulation steps) gets about as many words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


def grouped_order(lengths: list[int], batch: int, parts: int, generator: torch.Generator) -> list[int]:
    """A permutation of the samples. lengths: words, negative for a text; batch: samples of one part; parts: of a global batch.

    Every global batch (batch * parts samples in a row) has one modality, but for the last, which takes what is left of both.
    """
    whole, groups, left = batch * parts, [], []
    for images in (True, False):
        mine = torch.tensor([i for i, length in enumerate(lengths) if (length > 0) == images], dtype=torch.long)
        mine = mine[torch.randperm(len(mine), generator=generator)].tolist()
        full = len(mine) - len(mine) % whole
        groups += [mine[i : i + whole] for i in range(0, full, whole)]
        left += mine[full:]
    groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    return [i for group in groups for i in _even_parts(group, lengths, batch, parts)] + left


def _even_parts(group: list[int], lengths: list[int], batch: int, parts: int) -> list[int]:
    """The samples of a global batch, part after part: the longest first, each to the part with the fewest words so far."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    words = [0] * parts
    for i in sorted(group, key=lambda i: -abs(lengths[i])):
        part = min((p for p in range(parts) if len(shares[p]) < batch), key=lambda p: words[p])
        shares[part].append(i)
        words[part] += abs(lengths[i])
    return [i for share in shares for i in share]


class ModalityGroupedSampler(Sampler):
    """`grouped_order`, another one in each epoch: it depends on (seed, epoch) alone, so a resumed run goes on with it."""

    def __init__(self, lengths: list[int], batch: int, parts: int, seed: int, epoch: Callable[[], int]):
        self.lengths, self.batch, self.parts, self.seed, self.epoch = lengths, batch, parts, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch())
        return iter(grouped_order(self.lengths, self.batch, self.parts, generator))

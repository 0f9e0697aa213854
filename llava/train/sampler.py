"""Order of the samples under --group_by_modality_length: batches of one modality, whose parts have similar lengths.

LLaVA's rule (arXiv 2310.03744, section A). A batch of texts does not have to wait for images. A global batch is divided
into parts (ranks and accumulation steps), and each part gets about the same number of words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


def grouped_order(lengths: list[int], batch: int, parts: int, generator: torch.Generator) -> list[int]:
    """Permutation of the samples' indices.

    lengths: words of each sample, negative without image. batch: samples per part. parts: parts of a global batch.

    Every global batch (batch * parts samples in a row) has one modality. The samples that fill no global batch of their
    modality come last, mixed.
    """
    whole, groups, left = batch * parts, [], []
    for images in (True, False):
        mine = torch.tensor([i for i, length in enumerate(lengths) if (length > 0) == images], dtype=torch.long)
        mine = mine[torch.randperm(len(mine), generator=generator)].tolist()
        full = len(mine) - len(mine) % whole
        groups += [mine[i : i + whole] for i in range(0, full, whole)]
        left += mine[full:]
    # The rest stays at the end: a shorter batch in the middle would shift all batches after it.
    groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    return [i for group in groups for i in _even_parts(group, lengths, batch, parts)] + left


def _even_parts(group: list[int], lengths: list[int], batch: int, parts: int) -> list[int]:
    """Samples of a global batch, part after part. Long samples are placed first, each in the part with fewest words."""
    # Every part must get exactly `batch` samples: the data loader cuts the order at fixed places.
    shares: list[list[int]] = [[] for _ in range(parts)]
    words = [0] * parts
    for i in sorted(group, key=lambda i: -abs(lengths[i])):
        part = min((p for p in range(parts) if len(shares[p]) < batch), key=lambda p: words[p])
        shares[part].append(i)
        words[part] += abs(lengths[i])
    return [i for share in shares for i in share]


class ModalityGroupedSampler(Sampler):
    """Sampler over `grouped_order`. The order depends on (seed, epoch) only, so a resumed run continues in it.

    epoch: returns the current epoch. It is called at the start of each epoch.
    """

    def __init__(self, lengths: list[int], batch: int, parts: int, seed: int, epoch: Callable[[], int]):
        self.lengths, self.batch, self.parts, self.seed, self.epoch = lengths, batch, parts, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        # The large prime keeps apart the seeds of neighbouring runs: seed 1, epoch 0 is not seed 0, epoch 1.
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch())
        return iter(grouped_order(self.lengths, self.batch, self.parts, generator))

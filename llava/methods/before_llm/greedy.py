"""Base of greedy methods: they choose one patch after another, for all images of a batch at the same time."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.common.transfer import to_device
from llava.methods.before_llm.base import ImageTokens, Selection, Selector

ENTRIES = 1 << 26  # most similarities of the images that choose together: 256 MB in float32


@dataclass
class GreedyInputs:
    """Input of a greedy rule for one image: T tiles of M patches. Each tile chooses on its own.

    similarity    [T, R, M] float32, of R things with M patches; where the things are the patches, R is M
    real          [T, M]  False in the padding
    extra_inputs  further tensors that the rule reads, [T, M] or [T] each
    counts        how many patches of each tile to choose, at most the real ones
    to_selection  function from the image's part of the rule's result, [T, ...], to the Selection
    """

    similarity: Tensor
    real: Tensor
    extra_inputs: tuple[Tensor, ...]
    counts: list[int]
    to_selection: Callable[[Tensor], Selection]


class GreedySelector(Selector):
    """Base of greedy methods. A method implements `problem`, the input of its rule for one image, and `rule`.

    Tiles of several images choose together, as many as fit into memory; smaller tiles are padded with zeros. Each
    image's similarities are computed on their own and no tile reads another, so the choice does not depend on the
    batch.
    """

    @abstractmethod
    def problem(self, image: ImageTokens, text: Tensor, budget: int) -> GreedyInputs:
        """Return the input of the rule for one image; the arguments are those of `keep`."""

    @abstractmethod
    def rule(self, similarity: Tensor, real: Tensor, *others: Tensor, counts: Tensor, fewest: int, most: int) -> Tensor:
        """Return the choice in T tiles, [T, ...] as GreedyInputs.to_selection reads it.

        The usual result is `most` picks per tile, in the order of choice. counts [T]: patches to choose; fewest, most:
        the smallest and the largest count, known to the host. M is the size of the largest tile of the batch. A tile with a smaller count may choose more than
        its count.
        """

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        return self.keep_all([image], [text], [budget])[0]

    def keep_all(self, images: list[ImageTokens], texts: list[Tensor], budgets: list[int]) -> list[Selection]:
        selections = []
        for group in _groups(map(self.problem, images, texts, budgets)):
            rows, largest = _padded_sizes(group)
            similarity = torch.cat([_filled(problem.similarity, (rows, largest)) for problem in group])
            columns = zip(*((problem.real, *problem.extra_inputs) for problem in group), strict=True)
            rest = [torch.cat([_filled(part, (largest,)[: part.dim() - 1]) for part in column]) for column in columns]
            counts = torch.tensor([count for problem in group for count in problem.counts])
            picks = self.rule(
                similarity,
                *rest,
                counts=to_device(counts, similarity.device),
                fewest=int(counts.min()),
                most=int(counts.max()),
            ).split([len(problem.counts) for problem in group])
            selections += [problem.to_selection(picked) for problem, picked in zip(group, picks, strict=True)]
        return selections


def _groups(problems: Iterable[GreedyInputs]) -> Iterator[list[GreedyInputs]]:
    """Yield the problems in order, in groups of at most ENTRIES similarities and at least one problem."""
    group: list[GreedyInputs] = []
    for problem in problems:
        tiles = sum(len(member.similarity) for member in [*group, problem])
        rows, largest = _padded_sizes([*group, problem])
        # Counted after padding: one large tile makes all tiles of its group as large.
        if group and tiles * rows * largest > ENTRIES:
            yield group
            group = []
        group.append(problem)
    if group:
        yield group


def _padded_sizes(group: list[GreedyInputs]) -> tuple[int, int]:
    """Return (R, M) of the largest similarities of a group."""
    return max(one.similarity.shape[1] for one in group), max(one.similarity.shape[2] for one in group)


def _filled(values: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Return values [T, m, ...] padded with zeros to [T, *sizes]."""
    if values.shape[1:] == sizes:
        return values
    filled = values.new_zeros(len(values), *sizes)
    filled[(slice(None), *(slice(size) for size in values.shape[1:]))] = values
    return filled

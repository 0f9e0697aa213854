"""Methods that take one patch after another, each choice in the light of those before it: all images of a batch at once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.common.transfer import to_device
from llava.methods.before_llm.base import ImageTokens, Selection, Selector

ENTRIES = 1 << 26  # of the similarities of the images that choose together: 256 MB


@dataclass
class Problem:
    """What one image asks of a greedy rule: to choose among M patches, in each of T tiles apart from the others.

    similarity  [T, M, M] float32
    real        [T, M]    which patches there are; the others are padding
    others      what else the rule reads, [T, M] or [T] each
    counts      how many of each tile are wanted, at most as many as are real
    keep        the image's part of what the rule returns, [T, ...] -> what is kept of the image
    """

    similarity: Tensor
    real: Tensor
    others: tuple[Tensor, ...]
    counts: list[int]
    keep: Callable[[Tensor], Selection]


class GreedySelector(Selector):
    """Base of methods that take one patch after another. Each says what it asks of an image (`problem`), and its rule.

    The tiles of as many images as fit into memory choose together, the smaller ones filled up with zeros. The
    similarities are those that an image has by itself, and a rule lets no tile look at another: the choice does not
    depend on the batch.
    """

    @abstractmethod
    def problem(self, image: ImageTokens, text: Tensor, budget: int) -> Problem:
        """As `keep`, up to the choice itself."""

    @abstractmethod
    def rule(self, similarity: Tensor, real: Tensor, *others: Tensor, counts: Tensor, most: int) -> Tensor:
        """The choice in T tiles, [T, ...] as Problem.keep reads it: usually `most` picks each, in the order of choice.

        counts [T], most: the largest of them; M is that of the largest tile of the batch, and a tile that wants fewer than others may run on.
        """

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        return self.keep_all([image], [text], [budget])[0]

    def keep_all(self, images: list[ImageTokens], texts: list[Tensor], budgets: list[int]) -> list[Selection]:
        selections = []
        for group in _groups(map(self.problem, images, texts, budgets)):
            largest = max(problem.similarity.shape[-1] for problem in group)
            similarity = torch.cat([_filled(problem.similarity, (largest, largest)) for problem in group])
            columns = zip(*((problem.real, *problem.others) for problem in group), strict=True)
            rest = [torch.cat([_filled(part, (largest,)[: part.dim() - 1]) for part in column]) for column in columns]
            counts = torch.tensor([count for problem in group for count in problem.counts])
            picks = self.rule(
                similarity, *rest, counts=to_device(counts, similarity.device), most=int(counts.max())
            ).split([len(problem.counts) for problem in group])
            selections += [problem.keep(picked) for problem, picked in zip(group, picks, strict=True)]
        return selections


def _groups(problems: Iterable[Problem]) -> Iterator[list[Problem]]:
    """Problems in order, as many at once as ENTRIES allows, at least one."""
    group: list[Problem] = []
    for problem in problems:
        tiles = sum(len(member.similarity) for member in [*group, problem])
        largest = max(member.similarity.shape[-1] for member in [*group, problem])
        if group and tiles * largest**2 > ENTRIES:
            yield group
            group = []
        group.append(problem)
    if group:
        yield group


def _filled(values: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """values [T, m, ...] -> [T, *sizes], zeros behind what there is."""
    if values.shape[1:] == sizes:
        return values
    filled = values.new_zeros(len(values), *sizes)
    filled[(slice(None), *(slice(size) for size in values.shape[1:]))] = values
    return filled

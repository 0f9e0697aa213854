"""What every cache policy says: which entries stay after prefill, which of them a decode step reads, and how many.

A policy sees a prompt in three regions: the text before the first image, which is never touched; the image tokens,
ranked once per layer; and the text after the first image's start, ranked per layer and KV head. Its counts are pure
functions of numbers, so bytes and FLOPs are known before anything runs; which entries they are, storage.py works out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from llava.methods.kv_cache.scores import Scorer


class RowSpans(NamedTuple):
    """A row as one layer's attention sees it. length: its tokens, padding excluded; images: (start, count) of each."""

    length: int
    images: Sequence[tuple[int, int]]

    def regions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Positions in the row of: text before the first image, image tokens, text behind the first image's start."""
        image = torch.zeros(self.length, dtype=torch.bool)
        for start, count in self.images:
            image[start : start + count] = True
        first = self.images[0][0] if self.images else self.length
        text = ~image
        text[:first] = False
        return torch.arange(first), image.nonzero().flatten(), text.nonzero().flatten()


class Counts(NamedTuple):
    """Entries that one layer's attention saw of one row's prompt.

    before: text before the first image, or the whole prompt where there is no image
    image:  image tokens; after: text behind the first image's start, text between images included
    entered: image tokens that entered the LLM, before anything inside it dropped some
    """

    before: int
    image: int
    after: int
    entered: int


class Budget(NamedTuple):
    """Size of the evictable region after a step, and how many of its newest entries cannot be evicted."""

    total: int
    recent: int


@dataclass(frozen=True)
class CachePolicy(ABC):
    """Base of every cache policy. Its fields are its settings."""

    # Whether the whole sequence is one evictable region, image tokens and all.
    whole: ClassVar[bool] = False
    # Decode steps from one re-ranking of the core to the next; -1: all image entries that stay are read at every step.
    interval = -1

    @classmethod
    @abstractmethod
    def of(cls, config) -> CachePolicy:
        """The policy with the settings of an AdaVConfig."""

    @property
    def scorer(self) -> Scorer | None:
        """How entries of the evictable region are ranked; None where nothing is ever evicted from it."""
        return None

    @property
    def contiguous(self) -> bool:
        """Whether every step reads all that is stored, and nothing is evicted after prefill."""
        return self.scorer is None and self.interval < 0

    def image(self, entered: int, held: int) -> tuple[int, int]:
        """(stay, core): of `held` image entries, how many stay after prefill, and how many of those are the core."""
        return held, held

    def budget(self, prompt: int, seen: int) -> Budget:
        """Size of the evictable region once `seen` of its tokens have been there, `prompt` of them in the prompt.

        Called where there is a scorer. It never falls as `seen` grows, so a step evicts at most its own number of
        entries: one.
        """
        raise NotImplementedError

    def updates(self, step: int) -> bool:
        """Whether decode step `step`, counted from 1, reads every image entry and re-ranks the core."""
        return self.interval > 0 and step % self.interval == 0

    def plan(self, counts: Counts) -> LayerPlan:
        """What becomes of one row's prompt in one layer."""
        if self.whole:
            return LayerPlan(self, 0, 0, 0, counts.before + counts.image + counts.after)
        stay, core = self.image(counts.entered, counts.image)
        if self.interval < 0:  # no core: what stays of the image is read like the text before it
            return LayerPlan(self, counts.before + stay, 0, 0, counts.after)
        return LayerPlan(self, counts.before, stay, core, counts.after)


@dataclass(frozen=True)
class LayerPlan:
    """Entries of one row in one layer, in the order in which they are stored.

    front: read at every step and never evicted; image: stored image entries of which `core` are read between
    re-rankings; prompt: the prompt's tokens in the evictable region, before any eviction.
    """

    policy: CachePolicy
    front: int
    image: int
    core: int
    prompt: int

    def text(self, step: int) -> int:
        """Entries of the evictable region after prefill (step 0) and `step` decode steps."""
        return text_counts(self.policy, self.prompt, step)[step]

    def stored(self, step: int = 0) -> int:
        """All entries after `step` decode steps."""
        return self.front + self.image + self.text(step)

    def read(self, step: int) -> int:
        """Entries that decode step `step` >= 1 reads, its own included."""
        return self.front + (self.image if self.policy.updates(step) else self.core) + self.text(step - 1) + 1

    def text_slots(self, steps: int) -> int:
        """Slots of the evictable region for `steps` decode steps: a step evicts only after it has read."""
        counts = text_counts(self.policy, self.prompt, steps)
        return max([counts[0], *(count + 1 for count in counts[:-1])])

    def slots(self, steps: int) -> int:
        """Slots in all for `steps` decode steps."""
        return self.front + self.image + self.text_slots(steps)


@lru_cache(maxsize=4096)
def budgets(policy: CachePolicy, prompt: int, steps: int) -> tuple[Budget, ...]:
    """[1 + steps] of a policy that evicts: its budget after prefill and after each decode step."""
    return tuple(policy.budget(prompt, prompt + step) for step in range(steps + 1))


@lru_cache(maxsize=4096)
def text_counts(policy: CachePolicy, prompt: int, steps: int) -> tuple[int, ...]:
    """[1 + steps] entries of the evictable region after prefill and after each decode step."""
    if policy.scorer is None:
        return tuple(range(prompt, prompt + steps + 1))
    first, *others = (budget.total for budget in budgets(policy, prompt, steps))
    counts = [min(prompt, first)]
    for total in others:
        counts.append(min(counts[-1] + 1, total))
    return tuple(counts)


def share(part: float, n: int) -> int:
    """`part` of n, rounded down; a product that floating point leaves a hair below a whole number is that number."""
    return int(part * n + 1e-6)


def rounded_up(count: int, multiple: int) -> int:
    """`count` rounded up to a multiple of `multiple`; above eight of them to one of four times as much.

    Captured steps are kept by capacity: few sizes mean few captures. multiple 1 rounds nothing.
    """
    if multiple > 1 and count > 8 * multiple:
        multiple *= 4
    return -(-count // multiple) * multiple

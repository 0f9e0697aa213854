"""Base class of cache policies: which KV entries stay after prefill, and which of them a decode step reads.

A policy sees a prompt in three regions: the text before the first image, which is never evicted; the vision tokens,
ranked per layer; and the text after the first image's start, ranked per layer and KV head. The number of entries is a
pure function of numbers, so bytes and FLOPs are known before anything runs. Which entries they are is decided in
llava/model/decoding/layer_cache.py.
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
    """A batch row as one layer's attention sees it. length: tokens without padding; images: (start, count) of each."""

    length: int
    images: Sequence[tuple[int, int]]

    def regions(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the positions of: text before the first image, vision tokens, text after the first image's start."""
        image = torch.zeros(self.length, dtype=torch.bool)
        for start, count in self.images:
            image[start : start + count] = True
        first = self.images[0][0] if self.images else self.length
        text = ~image
        text[:first] = False
        return torch.arange(first), image.nonzero().flatten(), text.nonzero().flatten()


class Counts(NamedTuple):
    """Numbers of prompt entries of one row that one layer's attention saw.

    before: text before the first image, or the whole prompt where there is no image
    image: vision tokens
    after: text after the first image's start, text between images included
    entered: vision tokens that entered the LLM, before a dropper removed some
    """

    before: int
    image: int
    after: int
    entered: int


class Budget(NamedTuple):
    """The most entries of the evictable region after a step, and how many of the newest are protected from eviction."""

    total: int
    recent: int


@dataclass(frozen=True)
class CachePolicy(ABC):
    """Base of every cache policy. The fields of the dataclass are its settings."""

    # True: the whole sequence, vision tokens included, is one evictable region.
    whole: ClassVar[bool] = False
    # Decode steps between two rankings of the core; -1: every step reads all stored vision entries.
    interval = -1

    @classmethod
    @abstractmethod
    def from_config(cls, config) -> CachePolicy:
        """Return the policy with the settings of an AdaVConfig."""

    @property
    def scorer(self) -> Scorer | None:
        """The ranking of the evictable region; None where nothing is evicted from it."""
        return None

    @property
    def contiguous(self) -> bool:
        """Whether every step reads all stored entries and nothing is evicted after prefill."""
        return self.scorer is None and self.interval < 0

    def image(self, entered: int, held: int) -> tuple[int, int]:
        """Return (stay, core): how many of `held` vision entries stay after prefill, and how many of these are core.

        entered: vision tokens that entered the LLM; a policy may take its shares of them.
        """
        return held, held

    def budget(self, prompt: int, seen: int) -> Budget:
        """Return the size of the evictable region after `seen` tokens of it, `prompt` of which are in the prompt.

        It is called only where there is a scorer. The size never falls as `seen` grows. A step adds one entry, so it
        evicts at most one.
        """
        raise NotImplementedError

    def updates(self, step: int) -> bool:
        """Return whether decode step `step`, counted from 1, reads every vision entry and ranks the core again."""
        return self.interval > 0 and step % self.interval == 0

    def plan(self, counts: Counts) -> LayerPlan:
        """Return how many entries of one row's prompt one layer stores in each region."""
        if self.whole:
            return LayerPlan(self, 0, 0, 0, counts.before + counts.image + counts.after)
        stay, core = self.image(counts.entered, counts.image)
        if self.interval < 0:  # no core: stored vision entries are read at each step, like the text before them
            return LayerPlan(self, counts.before + stay, 0, 0, counts.after)
        return LayerPlan(self, counts.before, stay, core, counts.after)


@dataclass(frozen=True)
class LayerPlan:
    """Numbers of entries of one row in one layer, in the order in which they are stored.

    front: entries that every step reads and that are never evicted
    image: stored vision entries; core: how many of them the steps between two update steps read
    prompt: prompt tokens in the evictable region, before any eviction
    """

    policy: CachePolicy
    front: int
    image: int
    core: int
    prompt: int

    def text(self, step: int) -> int:
        """Return the entries of the evictable region after prefill and `step` decode steps."""
        return text_counts(self.policy, self.prompt, step)[step]

    def stored(self, step: int = 0) -> int:
        """Return the number of all stored entries after `step` decode steps."""
        return self.front + self.image + self.text(step)

    def read(self, step: int) -> int:
        """Return the number of entries that decode step `step` >= 1 reads, its own included."""
        return self.front + (self.image if self.policy.updates(step) else self.core) + self.text(step - 1) + 1

    def text_slots(self, steps: int) -> int:
        """Return the slots that the evictable region needs for `steps` decode steps."""
        # + 1: a step writes and reads its own entry before it evicts one.
        counts = text_counts(self.policy, self.prompt, steps)
        return max([counts[0], *(count + 1 for count in counts[:-1])])

    def slots(self, steps: int) -> int:
        """Return the slots that all regions need for `steps` decode steps."""
        return self.front + self.image + self.text_slots(steps)


@lru_cache(maxsize=4096)
def budgets(policy: CachePolicy, prompt: int, steps: int) -> tuple[Budget, ...]:
    """Return the budgets of a policy that evicts, after prefill and after each decode step: [1 + steps]."""
    return tuple(policy.budget(prompt, prompt + step) for step in range(steps + 1))


@lru_cache(maxsize=4096)
def text_counts(policy: CachePolicy, prompt: int, steps: int) -> tuple[int, ...]:
    """Return the entries of the evictable region after prefill and after each decode step: [1 + steps]."""
    if policy.scorer is None:
        return tuple(range(prompt, prompt + steps + 1))
    first, *others = (budget.total for budget in budgets(policy, prompt, steps))
    counts = [min(prompt, first)]
    for total in others:
        counts.append(min(counts[-1] + 1, total))
    return tuple(counts)


def rounded_up(count: int, multiple: int) -> int:
    """Return `count` rounded up to a multiple of `multiple`; counts above 8 x `multiple` to one of 4 x `multiple`.

    multiple 1 rounds nothing.
    """
    # A captured step fits one capacity only. Few different capacities mean few captures.
    if multiple > 1 and count > 8 * multiple:
        multiple *= 4
    return -(-count // multiple) * multiple

"""H2O (arXiv 2306.14048): heavy hitters and recent entries stay, whatever they are entries of."""

from __future__ import annotations

from dataclasses import dataclass

from llava.methods.kv_cache.base import Budget, CachePolicy, share
from llava.methods.kv_cache.scores import Scorer, Summed

# A-VL's baseline setting (its public code): of the tokens so far, at every step.
GROWING_HEAVY, GROWING_RECENT = 0.125, 0.375


@dataclass(frozen=True)
class H2O(CachePolicy):
    """Per layer and KV head, the newest entries and of the others those that have received the most attention.

    heavy, recent: both as shares of the prompt, fixed when prefill ends: the paper's rule. Without them A-VL's
        baseline: 12.5 % heavy and 37.5 % recent of all tokens so far, growing.

    Reads every row of the prompt's attention once more, in chunks: S x S products of head size in every layer, which is
    as much as the scores of prefill cost. Text before the image can be evicted too, the first token included. Every
    step reads everything that is stored.
    """

    heavy: float | None = None
    recent: float | None = None

    whole = True

    @classmethod
    def of(cls, config) -> H2O:
        return cls(config.h2o_heavy_share, config.h2o_recent_share)

    @property
    def scorer(self) -> Scorer:
        return Summed()

    def budget(self, prompt: int, seen: int) -> Budget:
        if self.heavy is None:
            heavy, recent = share(GROWING_HEAVY, seen), share(GROWING_RECENT, seen)
        else:
            heavy, recent = share(self.heavy, prompt), share(self.recent, prompt)
        return Budget(heavy + recent, recent)

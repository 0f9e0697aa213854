"""H2O (arXiv 2306.14048): heavy hitters and recent entries stay, vision and text alike."""

from __future__ import annotations

from dataclasses import dataclass

from llava.common.rounding import floor_share
from llava.methods.kv_cache.base import Budget, CachePolicy
from llava.methods.kv_cache.scores import Scorer, Summed

# Setting of the H2O baseline in A-VL's public code: shares of the tokens so far, at every step.
GROWING_HEAVY, GROWING_RECENT = 0.125, 0.375


@dataclass(frozen=True)
class H2O(CachePolicy):
    """Keeps, per layer and KV head, the newest entries and those of the others with the most attention so far.

    heavy, recent: shares of the prompt, both or neither. The sizes are fixed when prefill ends, as in the paper.
        Without them the rule is A-VL's baseline: 12.5 % heavy and 37.5 % recent of all tokens so far, growing.

    Prefill computes every row of the prompt's attention once more, in chunks: S x S products of head size per layer, as
    many as the attention scores themselves. Text before the image can be evicted too, the first token included. Every
    step reads all stored entries.
    """

    heavy: float | None = None
    recent: float | None = None

    whole = True

    @classmethod
    def from_config(cls, config) -> H2O:
        return cls(config.h2o_heavy_share, config.h2o_recent_share)

    @property
    def scorer(self) -> Scorer:
        return Summed()

    def budget(self, prompt: int, seen: int) -> Budget:
        if self.heavy is None:
            heavy, recent = floor_share(GROWING_HEAVY, seen), floor_share(GROWING_RECENT, seen)
        else:
            heavy, recent = floor_share(self.heavy, prompt), floor_share(self.recent, prompt)
        return Budget(heavy + recent, recent)

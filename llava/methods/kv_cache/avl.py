"""A-VL (arXiv 2409.14846): the image in core, secondary and minor entries; the text within a budget."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor

from llava.methods.kv_cache.base import Budget, CachePolicy, share
from llava.methods.kv_cache.scores import Centred, Latest, Scorer, Summed


@dataclass(frozen=True)
class AVL(CachePolicy):
    """Adaptive attention during decoding, vision and text apart.

    Vision: when a layer has been prefilled, the share `rate` of the image tokens that entered the LLM is evicted
    (minor), those that the prompt's last query attends to least in the mean over heads. What stays is stored; of it the
    best share 1 - `compute_rate` of the image tokens is read (core), the others are not (secondary). Every `interval`-th
    step reads all that is stored, and re-ranks the core by that step's attention. interval -1: no core, all that is
    stored is read. Several images are ranked together. A layer that holds fewer image tokens than may stay, because a
    method inside the LLM has dropped some, keeps what it holds.

    Text after the first image's start, None where it is not pruned: max(round((1 - text_rate) * tokens so far),
    text_minimum) entries per KV head, by `text_rule`: "h2o" (the share `heavy` heavy hitters, the others recent),
    "history" (half of them recent, the others by attention above its own quantile `text_rate`) or "direct" (the latest
    query's attention). Text before the image stays.

    Costs in prefill, per layer: one row of attention for the image and, with text rules h2o and history, a row per text
    token. Update steps cost a sort of the image entries per layer, pruned text a pass over the text list per KV head.
    """

    rate: float | None = None
    compute_rate: float = 0.0
    interval: int = -1
    text_rule: str | None = None
    text_rate: float = 0.0
    text_minimum: int = 0
    heavy: float = 0.7

    @classmethod
    def of(cls, config) -> AVL:
        vision, text = {}, {}
        if config.vision_adaptive_attention:
            vision = {
                "rate": config.vision_adaptive_attention_rate,
                "compute_rate": config.vision_adaptive_attention_compute_rate,
                "interval": config.vision_adaptive_attention_update_interval,
            }
        if config.text_pruning_flag:
            text = {
                "text_rule": config.text_rule,
                "text_rate": config.text_pruning_rate,
                "text_minimum": config.text_init_cache,
                "heavy": config.text_heavy_share,
            }
        return cls(**vision, **text)

    @property
    def scorer(self) -> Scorer | None:
        rules = {"h2o": Summed, "direct": Latest, "history": lambda: Centred(self.text_rate)}
        return None if self.text_rule is None else rules[self.text_rule]()

    def image(self, entered: int, held: int) -> tuple[int, int]:
        if self.rate is None:
            return held, held
        stay, core = (min(held, floor((1 - part) * entered + 1e-6)) for part in (self.rate, self.compute_rate))
        return stay, core

    def budget(self, prompt: int, seen: int) -> Budget:
        total = max(round((1 - self.text_rate) * seen), self.text_minimum)
        recent = {"h2o": total - share(self.heavy, total), "history": total // 2, "direct": 0}[self.text_rule]
        return Budget(total, recent)

"""A-VL (arXiv 2409.14846): vision entries are core, secondary or minor; text entries have a budget."""

from __future__ import annotations

from dataclasses import dataclass

from llava.common.rounding import floor_share
from llava.methods.kv_cache.base import Budget, CachePolicy
from llava.methods.kv_cache.scores import Centred, Latest, Scorer, Summed


@dataclass(frozen=True)
class AVL(CachePolicy):
    """Adaptive attention during decoding, with separate rules for vision and text entries.

    Vision: after the prefill of a layer, the share `rate` of the vision tokens that entered the LLM is evicted (minor).
    These are the tokens that the prompt's last query attends to least, mean over heads. The others stay stored. The
    best share 1 - `compute_rate` of the vision tokens is read at each step (core), the rest is not (secondary). Every
    `interval`-th step is an update step: it reads all stored vision entries and ranks the core again by its attention.
    With interval -1 there is no core, and all stored entries are read. Several images are ranked together. A layer may
    hold fewer vision tokens than could stay, because a method inside the LLM dropped some; it keeps what it holds.

    Text after the first image's start: max(round((1 - text_rate) * tokens so far), text_minimum) entries stay per KV
    head, chosen by `text_rule`. "h2o": the share `heavy` are heavy hitters, the others are recent. "history": half are
    recent, the others have the most attention above the quantile `text_rate`. "direct": the latest query's attention
    decides. None: text is not pruned. Text before the image always stays.

    Cost of prefill per layer: one attention row for the image and, with "h2o" and "history", one row per text token.
    Cost of decoding per layer: a sort of the vision entries at update steps, and a pass over the text list of each KV
    head where text is pruned.
    """

    rate: float | None = None
    compute_rate: float = 0.0
    interval: int = -1
    text_rule: str | None = None
    text_rate: float = 0.0
    text_minimum: int = 0
    heavy: float = 0.7

    @classmethod
    def from_config(cls, config) -> AVL:
        # The values of a rule that is switched off are ignored, so the policy has its defaults for them.
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
        # Shares of the tokens that entered the LLM, not of those that a dropper left here.
        stay, core = (min(held, floor_share(1 - part, entered)) for part in (self.rate, self.compute_rate))
        return stay, core

    def budget(self, prompt: int, seen: int) -> Budget:
        total = max(round((1 - self.text_rate) * seen), self.text_minimum)
        recent = {"h2o": total - floor_share(self.heavy, total), "history": total // 2, "direct": 0}[self.text_rule]
        return Budget(total, recent)

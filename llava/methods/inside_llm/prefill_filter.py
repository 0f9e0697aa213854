"""A-VL's prefill filter (arXiv 2409.14846): FastV's cut by a rate, beside whatever acts before the LLM."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor

from llava.common.errors import UserError
from llava.methods.inside_llm.fastv import FastV
from llava.methods.inside_llm.plan import Cut


@dataclass(frozen=True)
class PrefillFilter(FastV):
    """After `layer` layers the share `rate` of each image's tokens goes: those that FastV's score ranks lowest.

    Not a `method` of its own: prefill_filter_flag adds it to a method before the LLM. At least one token of an image
    stays.
    """

    rate: float = 0.5

    @classmethod
    def of(cls, config) -> PrefillFilter | None:
        """The filter that an AdaVConfig asks for; None where it is off."""
        if not config.prefill_filter_flag:
            return None
        return cls(layer=config.prefill_filter_layer, rate=config.prefill_filter_rate)

    def check(self, model_config) -> None:
        layers = model_config.num_hidden_layers
        if self.layer > layers - 1:
            raise UserError(
                f'"prefill_filter_layer" is {self.layer}, but the LLM has {layers} layers, so at most {layers - 1} is '
                "allowed"
            )

    def explicit(self, n: int, layers: int) -> tuple[Cut, ...]:
        left = max(1, floor((1 - self.rate) * n + 1e-6))
        return (Cut(self.layer - 1, left),) if left < n else ()

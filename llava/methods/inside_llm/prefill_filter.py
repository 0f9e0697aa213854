"""Prefill filter of A-VL (arXiv 2409.14846): FastV's cut with a rate, added to a method before the LLM."""

from __future__ import annotations

from dataclasses import dataclass

from llava.common.errors import UserError
from llava.common.rounding import floor_share
from llava.methods.inside_llm.fastv import FastV
from llava.methods.inside_llm.plan import Cut


@dataclass(frozen=True)
class PrefillFilter(FastV):
    """Drops the share `rate` of each image's tokens after `layer` layers: those with the lowest FastV scores.

    This is no value of the key `method`: prefill_filter_flag adds it to a method before the LLM. At least one token of
    each image stays.
    """

    rate: float = 0.5

    @classmethod
    def from_config(cls, config) -> PrefillFilter | None:
        """Return the filter that an AdaVConfig asks for; None where it is off."""
        if not config.prefill_filter_flag:
            return None
        return cls(layer=config.prefill_filter_layer, rate=config.prefill_filter_rate)

    def check(self, model_config) -> None:
        # FastV.check is not called: its message names options.layer, a key that the user of the filter has not set.
        layers = model_config.num_hidden_layers
        if self.layer > layers - 1:
            raise UserError(
                f'"prefill_filter_layer" is {self.layer}, but the LLM has {layers} layers, so at most {layers - 1} is '
                "allowed"
            )

    def explicit(self, n: int, layers: int) -> tuple[Cut, ...]:
        left = max(1, floor_share(1 - self.rate, n))
        return (Cut(self.layer - 1, left),) if left < n else ()

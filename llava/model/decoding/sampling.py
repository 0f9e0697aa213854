"""The choice of the next token of each row from its logits: greedy, or sampled from the most probable tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.common.errors import UserError

# Smaller temperatures or top_p could become 0 in float32. At this value only the most probable token can be drawn.
SMALLEST = 1e-30


@dataclass(frozen=True)
class Sampling:
    """Generation settings of one row.

    max_new_tokens: the most new tokens, the end token included
    temperature: 0 takes the most probable token; above 0 a token is drawn
    top_p: tokens are drawn from the smallest set of most probable tokens whose probability reaches top_p (nucleus
        sampling, arXiv 1904.09751)
    seed: of the draws of this row, which do not depend on the batch
    stop: strings at which the answer ends; they are not part of it
    UserError for a value out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        if isinstance(self.stop, str):
            # A string is a sequence of strings, so every letter would become a stop string.
            object.__setattr__(self, "stop", (self.stop,))
        for name, good, allowed in (
            (
                "max_new_tokens",
                _whole(self.max_new_tokens) and self.max_new_tokens >= 1,
                "a whole number of at least 1",
            ),
            ("temperature", _number(self.temperature) and self.temperature >= 0, "a number of at least 0"),
            ("top_p", _number(self.top_p) and 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("seed", _whole(self.seed) and 0 <= self.seed < 2**63, "a whole number from 0 to below 2^63"),
            ("stop", all(isinstance(s, str) and s for s in self.stop), "strings that are not empty"),
        ):
            if not good:
                raise UserError(f"{name} is {getattr(self, name)!r}, allowed is {allowed}")


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class Chooser:
    """Chooses the next tokens of a batch, each row by its `Sampling`. It holds the random state of one generation."""

    def __init__(self, rows: Sequence[Sampling], device: torch.device):
        self._drawn = [(b, row) for b, row in enumerate(rows) if row.temperature > 0]
        self._generators = [torch.Generator(device).manual_seed(row.seed) for _, row in self._drawn]

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the tokens [B] that follow from logits [B, V]; ties go to the lowest token id."""
        tokens = logits.argmax(dim=-1)
        for (b, row), generator in zip(self._drawn, self._generators, strict=True):
            probability = torch.softmax(logits[b].float() / max(row.temperature, SMALLEST), dim=-1)
            ranked, order = probability.sort(descending=True, stable=True)
            # A token is in the set if the tokens before it do not reach top_p. The first token always is.
            ranked.masked_fill_(ranked.cumsum(dim=-1) - ranked >= max(row.top_p, SMALLEST), 0.0)
            # torch.multinomial draws in this way too, but its checks wait for the device. Of independent exponential
            # waiting times with rates p_i, the shortest one is that of entry i with probability p_i.
            waiting = torch.empty_like(ranked).exponential_(generator=generator)
            tokens[b] = order[(ranked / waiting).argmax()]
        return tokens

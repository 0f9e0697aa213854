"""How the next token of each row is chosen from its logits: greedily, or drawn from the most probable ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.common.errors import UserError

# Below it float32 takes a temperature or a top_p for 0; by then only the most probable token is drawn.
SMALLEST = 1e-30


@dataclass(frozen=True)
class Sampling:
    """What one row asks of generation.

    max_new_tokens: at most so many, the end token included. temperature: 0 takes the most probable token; above 0 a token
    is drawn, of the smallest set of most probable ones whose probability reaches `top_p`. seed: of the draws of this row,
    which do not depend on the batch it is in. stop: strings at which the answer ends; they are not part of it.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        if isinstance(self.stop, str):
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
    """The next tokens of a batch, row by row as its `Sampling` says. Holds the random state of one generation."""

    def __init__(self, rows: Sequence[Sampling], device: torch.device):
        self._drawn = [(b, row) for b, row in enumerate(rows) if row.temperature > 0]
        self._generators = [torch.Generator(device).manual_seed(row.seed) for _, row in self._drawn]

    def __call__(self, logits: Tensor) -> Tensor:
        """logits [B, V] -> tokens [B]; ties go to the lowest token."""
        tokens = logits.argmax(dim=-1)
        for (b, row), generator in zip(self._drawn, self._generators, strict=True):
            probability = torch.softmax(logits[b].float() / max(row.temperature, SMALLEST), dim=-1)
            ranked, order = probability.sort(descending=True, stable=True)
            # A token belongs to the set where those before it do not reach top_p yet: the first always does.
            ranked.masked_fill_(ranked.cumsum(dim=-1) - ranked >= max(row.top_p, SMALLEST), 0.0)
            # As torch.multinomial draws one, without its checks, which read the device: of independent exponential waiting
            # times with these rates the shortest is entry i's with probability i.
            waiting = torch.empty_like(ranked).exponential_(generator=generator)
            tokens[b] = order[(ranked / waiting).argmax()]
        return tokens

"""What every method that drops vision tokens inside the LLM says, and what it is given to choose with.

A method acts in prefill only. It says where it cuts and how many tokens stay (`plan`), which attention rows it reads
(`score`), and, where it does more than keep the best, what it makes of the others (`choose`). The decoder loop
(llava/model/decoding/layer_loop.py) does the rest for all methods: attention rows, hidden states, positions, masks
and the KV cache of each layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from llava.common.errors import UserError
from llava.methods.attention_rows import RowAttention
from llava.methods.before_llm.base import lowest_index_topk
from llava.methods.inside_llm.plan import Cut, LayerTokens, budget_for_mean, layer_mean, layer_tokens


@dataclass
class ImageSlots:
    """Where an image lies in its sequence just now.

    start, count: its slots are start .. start + count - 1 (newline tokens are slots like all others)
    queries [R]: the slots whose attention the method reads; see Dropper.queries
    ends_prompt: its last slot is the prompt's last, which the answer is read from, so that slot always stays
    """

    start: int
    count: int
    queries: Tensor
    ends_prompt: bool = False

    def of(self, values: Tensor) -> Tensor:
        """The image's part of a tensor over the sequence, [S, ...] -> [count, ...]."""
        return values[self.start : self.start + self.count]


@dataclass
class Choice:
    """What becomes of one image at one cut. Numbers count the image's slots before the cut, from 0.

    kept [k]: ascending; made [m, D]: hidden states of new tokens, which come after the kept ones
    sources: for each new token the slots that went into it
    """

    kept: Tensor
    made: Tensor | None = None
    sources: list[list[int]] = field(default_factory=list)


@dataclass(frozen=True)
class Dropper(ABC):
    """Base of every method that drops vision tokens inside the LLM. Its fields are its options.

    budget: what overall_tokens counts. "last": image tokens left after the last cut. "mean": image tokens that
        attention sees, in the mean over layers.
    """

    budget: str = "last"

    place: ClassVar[str]  # AFTER, BEFORE or INSIDE a layer
    # Positions of survivors: their own in the whole prompt, or counted anew after each cut.
    reindexed: ClassVar[bool] = False
    needs_image: ClassVar[bool] = True
    uses_budget: ClassVar[bool] = True
    tower_states: ClassVar[tuple[str, ...]] = ()
    reads_features: ClassVar[bool] = True  # every token goes through the projector, and into the LLM
    # Options of the path around the method that change nothing here: each method's positions are its published rule.
    ignored_options: ClassVar[tuple[str, ...]] = ("positions",)

    @abstractmethod
    def plan(self, n: int, k: int, layers: int) -> tuple[Cut, ...]:
        """The cuts that leave k of n image tokens, 1 <= k < n, at most one per layer and in layer order."""

    @abstractmethod
    def score(self, attention: RowAttention, image: ImageSlots) -> Tensor:
        """[count] in float32: how much each of the image's slots matters; the lowest are dropped.

        attention: of the layer that the cut belongs to (for BEFORE: rows of the last query only).
        """

    def explicit(self, n: int, layers: int) -> tuple[Cut, ...] | None:
        """The cuts where an option states them outright, whatever the budget; None where no option does."""
        return None

    def queries(self, image: Tensor, text: Tensor) -> Tensor:
        """[r] indices into `text`: whose attention rows count. Computed once, from input embeddings.

        image [n, D], text [m, D]: embeddings of the image and of its text (text_scope), m >= 1. An image without text
        is read from the prompt's last slot instead.
        """
        return torch.arange(len(text), device=text.device)

    def choose(self, scores: Tensor, cut: Cut, image: ImageSlots, hidden: Tensor) -> Choice:
        """What stays of an image, given its scores [count] and hidden states [count, D]."""
        return Choice(keep_best(scores, cut.keep, image.ends_prompt))

    def select(self, attention: RowAttention, cut: Cut, image: ImageSlots, hidden: Tensor) -> Choice:
        """score, then choose."""
        return self.choose(self.score(attention, image), cut, image, hidden)

    def _states_every_cut(self, option: str) -> None:
        """For __post_init__: `option` may be a list, and where it is given, options.budget has nothing left to say."""
        value = getattr(self, option)
        if isinstance(value, list):
            object.__setattr__(self, option, tuple(value))
        if value is not None and self.budget == "mean":
            raise UserError(f'options.{option} states what is kept, so options.budget "mean" does not go with it')

    def check(self, model_config) -> None:
        """Raise UserError where the method cannot run on an LLM of this shape; warn where it does so unfitted."""
        if model_config.num_hidden_layers < 2:
            raise UserError(
                f"the LLM has {model_config.num_hidden_layers} layer, allowed for methods inside it are at least 2"
            )

    def cuts(self, n: int, overall_tokens: int, layers: int) -> tuple[Cut, ...]:
        """The cuts of an image of n tokens under the whole configuration; none where everything is kept."""
        stated = self.explicit(n, layers)
        if stated is not None:
            return stated
        if overall_tokens >= n:
            return ()
        k = overall_tokens if self.budget == "last" else _k_for_mean(self, n, overall_tokens, layers)
        return self.plan(n, k, layers)

    def schedule(self, n: int, overall_tokens: int, layers: int) -> list[LayerTokens]:
        """Image tokens that each of `layers` layers computes on, for one image of n tokens.

        A pure function of the options and its arguments, and what the decoder loop obeys. Per layer: `attention` is
        what its attention sees and what its KV cache holds of the image after prefill, `mlp` what its MLP sees. Where
        the cut is BEFORE a layer, the norm and key projection of that layer run a second time, over all tokens from
        before the cut, and its query projection for one token.
        """
        return layer_tokens(n, self.cuts(n, overall_tokens, layers), self.place, layers)


@lru_cache(maxsize=1024)
def _k_for_mean(dropper: Dropper, n: int, target: int, layers: int) -> int:
    def mean_of(k: int) -> float:
        return layer_mean(layer_tokens(n, dropper.plan(n, k, layers), dropper.place, layers))

    return budget_for_mean(mean_of, n, target, type(dropper).__name__.lower())


def keep_best(scores: Tensor, keep: int, keep_last: bool = False) -> Tensor:
    """[keep] indices of the highest scores [n], ascending; ties go to the lowest index, what is no number goes last.

    keep_last: the last of the n stays whatever its score.
    """
    scores = scores.float().nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    if keep_last:
        scores[-1] = float("inf")
    return torch.sort(lowest_index_topk(scores, keep)).values

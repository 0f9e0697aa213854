"""Base class of all methods that drop vision tokens inside the LLM, and the data that it exchanges with the layer loop.

A method acts in prefill only. `plan` says at which layers it cuts and how many tokens stay. `score` reads attention
rows and rates the tokens. `choose` keeps the best ones; a method may override it to merge the others. The decoder loop
(llava/model/decoding/layer_loop.py) handles attention rows, hidden states, positions, masks and the KV cache of each
layer, for all methods alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass, field
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from llava.common.errors import UserError
from llava.methods.attention_rows import RowAttention
from llava.methods.inside_llm.plan import Cut, LayerTokens, budget_for_mean, layer_mean, layer_tokens
from llava.methods.ranking import keep_best


@dataclass
class ImageSlots:
    """The place of one image in its sequence before one cut.

    start, count: the image has the slots start .. start + count - 1; newline tokens count as slots
    queries [R]: slots whose attention rows the method reads, see Dropper.queries
    ends_prompt: the image's last slot is the last of the prompt. The first answer token is read from that slot, so it
        always stays.
    """

    start: int
    count: int
    queries: Tensor
    ends_prompt: bool = False

    def of(self, values: Tensor) -> Tensor:
        """Return the image's part of a tensor over the sequence, [S, ...] -> [count, ...]."""
        return values[self.start : self.start + self.count]


@dataclass
class Choice:
    """The result of one cut of one image. All indices count the image's slots before the cut, from 0.

    kept [k]: slots that stay, ascending
    made [m, D]: hidden states of merged tokens
    sources: for each merged token, the slots that were merged into it
    order [k + m]: the image's slots after the cut; merged tokens are numbered from `count`. None: merged tokens come
        after the kept ones, but before the slot that the answer is read from.
    """

    kept: Tensor
    made: Tensor | None = None
    sources: list[list[int]] = field(default_factory=list)
    order: Tensor | None = None


@dataclass(frozen=True)
class Dropper(ABC):
    """Base of every method that drops vision tokens inside the LLM. The fields of the dataclass are its options.

    budget: what overall_tokens counts. "last": vision tokens after the last cut. "mean": vision tokens that attention
        sees, mean over layers.
    """

    budget: str = "last"

    place: ClassVar[str]  # where in its layer a cut happens: AFTER, BEFORE or INSIDE (plan.py)
    # True: position ids are counted anew after each cut. False: kept tokens keep the ids of the whole prompt.
    reindexed: ClassVar[bool] = False
    merges: ClassVar[bool] = False  # True: dropped tokens are merged into new ones
    needs_image: ClassVar[bool] = True
    uses_budget: ClassVar[bool] = True
    resizes: ClassVar[bool] = False
    zooms: ClassVar[bool] = False
    tower_states: ClassVar[tuple[str, ...]] = ()
    words: ClassVar[None] = None  # droppers read the tokens of the prompt, see Selector.words
    reads_features: ClassVar[bool] = True  # every token enters the LLM, so all of them go through the projector
    # `positions` has no effect on droppers: the published rule of each method fixes its position ids.
    # True: `select` reads hidden states after the model's final norm, and makes no tokens of them.
    reads_normed: ClassVar[bool] = False
    ignored_options: ClassVar[tuple[str, ...]] = ("positions", "detail_share")

    @abstractmethod
    def plan(self, n: int, k: int, layers: int) -> tuple[Cut, ...]:
        """Return the cuts that leave k of n vision tokens, in layer order and at most one per layer; 1 <= k < n."""

    def score(self, attention: RowAttention, image: ImageSlots) -> Tensor:
        """Return a float32 score [count] for each of the image's slots; the slots with the lowest scores are dropped.

        attention: rows of the layer that the cut belongs to. Under BEFORE it has the last query's row only.
        A method has this, or its own `select`.
        """
        raise TypeError(f"{type(self).__name__} has neither score nor select")

    def explicit(self, n: int, layers: int) -> tuple[Cut, ...] | None:
        """Return the cuts that an option states directly, independent of the budget; None where no option does."""
        return None

    def queries(self, image: Tensor, text: Tensor) -> Tensor:
        """Return indices [r] into `text`: the text tokens whose attention rows count. Called once, before layer 0.

        image [n, D], text [m, D]: input embeddings of the image and of its text (option text_scope), m >= 1. For an
        image without text the caller uses the prompt's last slot instead.
        """
        return torch.arange(len(text), device=text.device)

    def choose(self, scores: Tensor, cut: Cut, image: ImageSlots, hidden: Tensor) -> Choice:
        """Return what stays of an image, given its scores [count] and hidden states [count, D]."""
        return Choice(keep_best(scores, cut.keep, image.ends_prompt))

    def select(self, attention: RowAttention, cut: Cut, image: ImageSlots, hidden: Tensor) -> Choice:
        """Score the slots of an image and return what stays of it: `score`, then `choose`.

        hidden [S, D]: states of the whole sequence, which a method may compare the image with
        """
        return self.choose(self.score(attention, image), cut, image, image.of(hidden))

    def _states_every_cut(self, option: str) -> None:
        """Check an option that states every cut; for __post_init__. Lists become tuples.

        Raises UserError where the option is given together with budget "mean", which it would make meaningless.
        """
        value = getattr(self, option)
        # JSON gives lists, but a dropper is a key of lru_cache and must be hashable.
        if isinstance(value, list):
            object.__setattr__(self, option, tuple(value))
        if value is not None and self.budget == "mean":
            raise UserError(f'options.{option} states what is kept, so options.budget "mean" does not go with it')

    def check(self, model_config) -> None:
        """Raise UserError where the method cannot run on an LLM of this shape; warn where it was fitted on another."""
        if model_config.num_hidden_layers < 2:
            raise UserError(
                f"the LLM has {model_config.num_hidden_layers} layer, allowed for methods inside it are at least 2"
            )

    def with_kept_positions(self) -> Dropper:
        """Return this method with kept tokens that keep the position ids of the whole prompt, whatever its own rule is.

        Merged tokens have no such position, so the method must make none.
        """
        if not self.reindexed:
            return self
        other = copy(self)
        object.__setattr__(other, "reindexed", False)
        return other

    def cuts(self, n: int, overall_tokens: int, layers: int) -> tuple[Cut, ...]:
        """Return the cuts of an image of n tokens under options and budget; empty where every token is kept."""
        stated = self.explicit(n, layers)
        if stated is not None:
            return stated
        if overall_tokens >= n:
            return ()
        k = overall_tokens if self.budget == "last" else _k_for_mean(self, n, overall_tokens, layers)
        return self.plan(n, k, layers)

    def schedule(self, n: int, overall_tokens: int, layers: int) -> list[LayerTokens]:
        """Return how many vision tokens of an image of n tokens each of `layers` layers computes on.

        The result depends only on the options and the arguments, and the decoder loop obeys it. Per layer, `attention`
        is the number that attention sees and that the KV cache holds after prefill; `mlp` is the number that the MLP
        sees. Not counted: under BEFORE the norm and the key projection of the layer run a second time over all tokens
        from before the cut, and its query projection runs for one token.
        """
        return layer_tokens(n, self.cuts(n, overall_tokens, layers), self.place, layers)


@lru_cache(maxsize=1024)
def _k_for_mean(dropper: Dropper, n: int, target: int, layers: int) -> int:
    """Return the last count for the layer mean `target` (budget_for_mean). Cached: the search makes n - 1 plans."""

    def mean_of(k: int) -> float:
        return layer_mean(layer_tokens(n, dropper.plan(n, k, layers), dropper.place, layers))

    return budget_for_mean(mean_of, n, target, type(dropper).__name__.lower())

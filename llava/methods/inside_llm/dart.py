"""DART (arXiv 2502.11494): a few pivots, and the vision tokens that are least similar to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.methods.attention_rows import RowAttention
from llava.methods.before_llm.similarity import unit_rows
from llava.methods.inside_llm.base import Choice, ImageSlots
from llava.methods.inside_llm.one_cut import OneCut
from llava.methods.inside_llm.plan import Cut
from llava.methods.ranking import lowest_index_topk

PIVOTS = 4  # of the image, and as many of its text


def quotas(tokens: int, pivots: int) -> list[int]:
    """Return how many of `tokens` tokens each pivot adds. They share evenly, and the first ones take the remainder."""
    share, extra = divmod(tokens, pivots)
    return [share + (nth < extra) for nth in range(pivots)]


@dataclass(frozen=True)
class DART(OneCut):
    """One cut between layers `layer` - 1 and `layer`: pivots stay, and what is least similar to each of them.

    layer: see OneCut; published: 2
    compat: "public" keeps 4 + 8 * floor(min(K, n - 4) / 8) of n tokens, as the authors' code does for K = 192, 128 and
        64, and uses the pivots in its order: that of a Python set of their slots. In LLaVA-1.6 the authors' code keeps
        324 tokens whatever is asked for; that is K = 320 here.

    Pivots are 4 tokens of the image and 4 of its text (option text_scope), those with the largest L1 norm of the keys
    of layer `layer` - 1, after the rotary embedding, summed over the query heads. Image pivots stay. Then each pivot in
    turn, image pivots first and each group by falling norm, adds the vision tokens whose state has the lowest cosine
    with its own. States are those after the layer, under the model's final norm. All pivots add equally many, and the
    first ones take what the division leaves. With fewer than 4 tokens to keep all are pivots. Where an image has no
    text behind it, the prompt's last token is the text pivot; where the image ends the prompt, that token stays, and
    there is no text pivot.

    Kept tokens keep their positions. The cost is 8 dot products with each vision token, and no attention row.
    """

    compat: str | None = None

    reads_normed = True

    def plan(self, n: int, k: int, layers: int) -> tuple[Cut, ...]:
        if self.compat == "public":
            k = min(n, PIVOTS + 2 * PIVOTS * (max(0, min(k, n - PIVOTS)) // (2 * PIVOTS)))
        return super().plan(n, k, layers) if k < n else ()

    def select(self, attention: RowAttention, cut: Cut, image: ImageSlots, hidden: Tensor) -> Choice:
        # 1. Pivots. The slot that the answer is read from stays in any case, so it is no candidate.
        norms, free, keep = attention.key_norms(), image.count, cut.keep
        text = image.queries.to(norms.device)
        if image.ends_prompt:
            text, free, keep = text[:0], free - 1, keep - 1
        own = lowest_index_topk(image.of(norms)[:free], min(PIVOTS, keep))
        pivots = torch.cat([own + image.start, text[lowest_index_topk(norms[text], min(PIVOTS, len(text)))]])
        if self.compat == "public":
            pivots = in_set_order(pivots)
        # 2. Cosines of the pivots with the image's tokens.
        states = unit_rows(hidden)
        pivots = pivots.to(states.device)
        cosines = states[pivots] @ image.of(states).T
        # 3. What each pivot adds. Tokens that are taken are last in its list.
        taken = torch.zeros(image.count, dtype=torch.int8, device=states.device)
        taken[free:] = 1
        taken.index_fill_(0, own.to(states.device), 1)
        rest = quotas(keep - len(own), len(pivots)) if len(pivots) else []
        for cosine, count in zip(cosines, rest, strict=True):
            farthest = lowest_index_topk(-cosine.masked_fill(taken.bool(), float("inf")), count)
            taken.index_fill_(0, farthest, 1)
        return Choice(torch.sort(lowest_index_topk(taken, cut.keep)).values)


def in_set_order(pivots: Tensor) -> Tensor:
    """Return the slots in the order in which CPython iterates over a set that they were put into one by one.

    With eight slots this is by slot modulo 32, and a slot whose place is taken moves on. It reads them on the host.
    """
    return torch.tensor(list(set(pivots.tolist())), device=pivots.device)

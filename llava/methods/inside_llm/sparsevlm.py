"""SparseVLM (arXiv 2410.04417): text tokens that are close to the image rate its tokens; dropped tokens are merged."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.methods.attention_rows import RowAttention
from llava.methods.inside_llm.base import Choice, Dropper, ImageSlots
from llava.methods.inside_llm.clustering import density_peaks
from llava.methods.inside_llm.plan import AFTER, Cut, counts_of, scaled_layer
from llava.methods.ranking import keep_best, lowest_index_topk

LAYERS = (2, 6, 15)  # layers of 32, 0-based, after which the cuts happen
TOKENS = 576  # vision tokens of the image that the published lists are for
# Tokens kept at the three cuts, without the merged tokens (github.com/Gumpest/SparseVLMs).
LISTS = {
    "1.0": ((300, 200, 110), (303, 110, 36), (238, 48, 26), (66, 30, 17)),
    "2.0": ((300, 200, 118), (238, 108, 60), (246, 54, 28), (66, 34, 20)),
}


def recycled(dropped: int) -> int:
    """Return how many of `dropped` tokens are merged: the upper 30 %, plus one."""
    # In integers, so that floating-point error decides nothing.
    return dropped * 3 // 10 + 1 if dropped else 0


def clusters(dropped: int) -> int:
    """Return how many merged tokens `dropped` tokens give: one for every ten that are recycled, plus one."""
    return recycled(dropped) // 10 + 1 if dropped else 0


def with_total(total: int, now: int) -> tuple[int, int]:
    """Return (kept, made) with kept + made = total < now, and with as many tokens kept as the merged ones allow.

    At least one token is kept. Merged tokens that do not fit beside it are not made.
    """
    kept = next((k for k in range(total, 0, -1) if k + clusters(now - k) <= total), 1)
    return kept, min(clusters(now - kept), total - kept)


@dataclass(frozen=True)
class SparseVLM(Dropper):
    """Cuts after layers 2, 6 and 15 of 32 (0-based). Raters score the tokens; the best of the dropped ones are merged.

    version: "1.0" merges (recycles) dropped tokens and counts positions anew after each cut. "2.0" has the lists of
        SparseVLM+, keeps positions and merges nothing. Two parts of 2.0 are not implemented: the division of attention
        by a map of RoPE alone, and the choice of 14 heads. Its rows are averaged over all heads, as in 1.0.
    keep: three counts of tokens kept at the cuts, or shares of n below 1, none above the one before it. As published,
        the merged tokens of 1.0 are added to them. Without `keep`, the budget counts merged tokens too. The published
        list that needs the least scaling is scaled, merged tokens included, so that its last count is the budget.

    Raters are the text tokens whose share of the image's attention, by input embeddings, is above the mean. All text
    tokens are raters where none is above it, and the prompt's last token is the rater where the image has no text. The
    score is the attention of the raters, mean over heads and raters. Recycling is density-peak clustering without the
    authors' random jitter; each cluster becomes the mean of its tokens.
    """

    version: str = "1.0"
    keep: tuple | None = None

    place = AFTER

    def __post_init__(self):
        self._states_every_cut("keep")

    @property
    def reindexed(self) -> bool:
        return self.version == "1.0"

    @property
    def merges(self) -> bool:
        return self.version == "1.0"

    def plan(self, n: int, k: int, layers: int) -> tuple[Cut, ...]:
        # "Least scaling" on a log scale: half and twice the published last count are equally far away.
        totals = min(self._published_totals(), key=lambda entry: abs(math.log(k / n / (entry[-1] / TOKENS))))
        return self._cuts([min(n, round(total * k / totals[-1])) for total in totals], n, layers, counted=True)

    def explicit(self, n: int, layers: int) -> tuple[Cut, ...] | None:
        return None if self.keep is None else self._cuts(counts_of(self.keep, n), n, layers, counted=False)

    def _published_totals(self) -> list[list[int]]:
        """Return the published lists as tokens left after each cut, merged tokens included."""
        return [
            [cut.keep + cut.made for cut in self._cuts(entry, TOKENS, 32, counted=False)]
            for entry in LISTS[self.version]
        ]

    def _cuts(self, counts, n: int, layers: int, counted: bool) -> tuple[Cut, ...]:
        """Return the cuts that leave `counts` tokens. counted: whether `counts` include the merged tokens."""
        # layers - 2: a cut after the last layer would save nothing. Of cuts that share a layer, the later one counts.
        at = dict(zip([scaled_layer(layer, layers, layers - 2) for layer in LAYERS], counts, strict=True))
        cuts, now = [], n
        for layer, count in at.items():
            if count >= now:
                continue
            made = clusters(now - count) if self.version == "1.0" else 0
            kept, made = with_total(count, now) if counted and made else (count, made)
            cuts.append(Cut(layer, kept, made))
            now = kept + made
        return tuple(cuts)

    def queries(self, image: Tensor, text: Tensor) -> Tensor:
        # In float32: weights are compared with their mean, and half precision would round many of them to it.
        weight = (image.float() @ text.float().T).softmax(dim=1).mean(dim=0)
        raters = torch.nonzero(weight > weight.mean()).flatten()
        return raters if len(raters) else super().queries(image, text)

    def score(self, attention: RowAttention, image: ImageSlots) -> Tensor:
        return image.of(attention.mean(image.queries))

    def choose(self, scores: Tensor, cut: Cut, image: ImageSlots, hidden: Tensor) -> Choice:
        # 1. Keep the tokens with the best scores.
        kept = keep_best(scores, cut.keep, image.ends_prompt)
        if not cut.made:
            return Choice(kept)
        # 2. Take the best of the dropped tokens, in sequence order: the tie rule of the clustering reads the order.
        dropped = torch.ones(image.count, dtype=torch.bool, device=scores.device)
        dropped[kept] = False
        dropped = torch.nonzero(dropped).flatten()
        best = dropped[lowest_index_topk(scores[dropped].nan_to_num(nan=float("-inf")), recycled(len(dropped)))]
        members = torch.sort(best).values
        # 3. Cluster them; each cluster becomes its mean, summed in float32.
        states = hidden[members.to(hidden.device)]
        cluster = density_peaks(states, cut.made).to(hidden.device)
        made = states.new_zeros((cut.made, states.shape[1]), dtype=torch.float32)
        made.index_add_(0, cluster, states.float())
        made /= torch.bincount(cluster, minlength=cut.made)[:, None]
        sources = [members[(cluster == c).to(members.device)].tolist() for c in range(cut.made)]
        return Choice(kept, made.to(hidden.dtype), sources)

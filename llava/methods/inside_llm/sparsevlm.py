"""SparseVLM (arXiv 2410.04417): text tokens that look at the image rate its tokens; the dropped ones are recycled."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.methods.attention_rows import RowAttention
from llava.methods.before_llm.base import lowest_index_topk
from llava.methods.inside_llm.base import Choice, Dropper, ImageSlots, keep_best
from llava.methods.inside_llm.clustering import density_peaks
from llava.methods.inside_llm.plan import AFTER, Cut, counts_of, scaled_layer

LAYERS = (2, 6, 15)  # of 32, 0-based: a cut comes after each of them
TOKENS = 576  # of the image that the published lists are for
# Tokens kept at the three cuts, clusters not counted (github.com/Gumpest/SparseVLMs).
LISTS = {
    "1.0": ((300, 200, 110), (303, 110, 36), (238, 48, 26), (66, 30, 17)),
    "2.0": ((300, 200, 118), (238, 108, 60), (246, 54, 28), (66, 34, 20)),
}


def recycled(dropped: int) -> int:
    """How many of `dropped` tokens go into clusters: the upper 30 % and one more."""
    return dropped * 3 // 10 + 1 if dropped else 0


def clusters(dropped: int) -> int:
    """How many tokens are made of `dropped` ones: one for every ten that are recycled, and one more."""
    return recycled(dropped) // 10 + 1 if dropped else 0


def with_total(total: int, now: int) -> tuple[int, int]:
    """(kept, made) that add up to `total` < now: as many tokens kept as the number of clusters leaves room for.

    At least one token is kept; what does not fit beside it is not made.
    """
    kept = next((k for k in range(total, 0, -1) if k + clusters(now - k) <= total), 1)
    return kept, min(clusters(now - kept), total - kept)


@dataclass(frozen=True)
class SparseVLM(Dropper):
    """Cuts after layers 2, 6 and 15 of 32 (0-based). Text raters choose; of what is dropped, the best is merged.

    version: "1.0" recycles, and counts positions anew after each cut. "2.0" has SparseVLM+'s lists, keeps positions and
        merges nothing. Of 2.0 the division of attention by a map of RoPE alone, and the choice of 14 heads, are not
        built: its rows are averaged over all heads, as in 1.0.
    keep: three counts (or shares of n below 1), never rising, of tokens kept at the cuts, as published; under 1.0
        clusters come on top of them. Without it overall_tokens, which counts clusters, scales the published list that
        needs the least scaling, clusters included, so that it ends there.

    Raters: the text tokens whose share of the image's attention, by input embeddings, is above the mean; all of them
    where none is, and the prompt's last token where the image has no text. Reads their rows, averaged over heads and
    raters. Recycling is density-peak clustering without the authors' random jitter; each cluster becomes its mean.
    """

    version: str = "1.0"
    keep: tuple | None = None

    place = AFTER

    def __post_init__(self):
        self._states_every_cut("keep")

    @property
    def reindexed(self) -> bool:
        return self.version == "1.0"

    def plan(self, n: int, k: int, layers: int) -> tuple[Cut, ...]:
        totals = min(self._published_totals(), key=lambda entry: abs(math.log(k / n / (entry[-1] / TOKENS))))
        return self._cuts([min(n, round(total * k / totals[-1])) for total in totals], n, layers, counted=True)

    def explicit(self, n: int, layers: int) -> tuple[Cut, ...] | None:
        return None if self.keep is None else self._cuts(counts_of(self.keep, n), n, layers, counted=False)

    def _published_totals(self) -> list[list[int]]:
        """The published lists as tokens left after each cut, clusters included."""
        return [
            [cut.keep + cut.made for cut in self._cuts(entry, TOKENS, 32, counted=False)]
            for entry in LISTS[self.version]
        ]

    def _cuts(self, counts, n: int, layers: int, counted: bool) -> tuple[Cut, ...]:
        """counted: whether `counts` include the clusters."""
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
        weight = (image.float() @ text.float().T).softmax(dim=1).mean(dim=0)
        raters = torch.nonzero(weight > weight.mean()).flatten()
        return raters if len(raters) else super().queries(image, text)

    def score(self, attention: RowAttention, image: ImageSlots) -> Tensor:
        return image.of(attention.mean(image.queries))

    def choose(self, scores: Tensor, cut: Cut, image: ImageSlots, hidden: Tensor) -> Choice:
        kept = keep_best(scores, cut.keep, image.ends_prompt)
        if not cut.made:
            return Choice(kept)
        dropped = torch.ones(image.count, dtype=torch.bool, device=scores.device)
        dropped[kept] = False
        dropped = torch.nonzero(dropped).flatten()
        best = dropped[lowest_index_topk(scores[dropped].nan_to_num(nan=float("-inf")), recycled(len(dropped)))]
        members = torch.sort(best).values
        states = hidden[members.to(hidden.device)]
        cluster = density_peaks(states, cut.made).to(hidden.device)
        made = states.new_zeros((cut.made, states.shape[1]), dtype=torch.float32)
        made.index_add_(0, cluster, states.float())
        made /= torch.bincount(cluster, minlength=cut.made)[:, None]
        sources = [members[(cluster == c).to(members.device)].tolist() for c in range(cut.made)]
        return Choice(kept, made.to(hidden.dtype), sources)

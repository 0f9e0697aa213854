"""FitPrune (arXiv 2409.10197): every layer drops some vision tokens; a fitted table says how many."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.common.errors import UserError
from llava.common.rounding import floor_share
from llava.methods.attention_rows import RowAttention
from llava.methods.inside_llm.base import Dropper, ImageSlots
from llava.methods.inside_llm.fitprune_tables import Table, nearest_in_share, read_tables, with_ratio
from llava.methods.inside_llm.plan import INSIDE, Cut, largest_remainder


@dataclass(frozen=True)
class FitPrune(Dropper):
    """Cuts inside each layer, between attention and MLP: the vision tokens with the lowest scores are dropped.

    ratio: FLOPs reduction in percent. It picks a table and replaces the budget (shipped: 10 to 90 for LLaVA-1.5-7B, 40
        and 60 for LLaVA-1.6-7B). As in the authors' code, its counts are taken as shares of n and rounded down.
    table: a table file of `llava.analysis.fit_fitprune_table`, used instead of the shipped ones
    Without `ratio`, the table whose dropped share is nearest is scaled to n - k tokens by largest remainder.

    Let M be the maximum over heads of a layer's attention. The score of a token is (mean of M over the image's queries)
    x (sum of M over the queries of its text). The text is that of option text_scope, or the prompt's last token where
    there is none. All these rows are read in chunks. This takes about half as many products as the layer's own
    attention, in float32 and without flash kernels, so the method saves less time than FLOPs. Kept tokens keep their
    positions. The KV cache of a layer holds the tokens from before its cut.
    """

    ratio: float | None = None
    table: str | None = None

    place = INSIDE

    def __post_init__(self):
        self._states_every_cut("ratio")
        ratios = sorted({table.ratio for table in self._tables()})
        if self.ratio is not None and self.ratio not in ratios:
            where = self.table or "the shipped tables"
            raise UserError(
                f"options.ratio is {self.ratio:g}, but {where} are for {', '.join(f'{r:g}' for r in ratios)} %"
            )

    def _tables(self) -> tuple[Table, ...]:
        return read_tables(self.table)

    def check(self, model_config) -> None:
        super().check(model_config)
        sizes = (model_config.num_hidden_layers, model_config.hidden_size, model_config.intermediate_size)
        tables = self._tables()
        # A warning and no error: a table for another depth still gives a usable schedule (Table.over).
        if all(table.sizes != sizes for table in tables):
            fitted = " and ".join(sorted({table.model for table in tables}))
            warnings.warn(
                f"no FitPrune table was fitted on an LLM of {sizes[0]} layers of {sizes[1]} and {sizes[2]}: that of "
                f"{fitted} is used, stretched over its depth; llava.analysis.fit_fitprune_table fits one",
                stacklevel=2,
            )

    def plan(self, n: int, k: int, layers: int) -> tuple[Cut, ...]:
        table = nearest_in_share(self._tables(), (n - k) / n, n)
        return _cuts(largest_remainder(table.over(layers), n - k), n)

    def explicit(self, n: int, layers: int) -> tuple[Cut, ...] | None:
        if self.ratio is None:
            return None
        table = with_ratio(self._tables(), self.ratio, n)
        return _cuts([floor_share(drop / table.image_tokens, n) for drop in table.over(layers)], n)

    def score(self, attention: RowAttention, image: ImageSlots) -> Tensor:
        within, across = shares(attention, image)
        return within * across


def shares(attention: RowAttention, image: ImageSlots) -> tuple[Tensor, Tensor]:
    """Return two attention scores of the image's slots, [count] each, from the maximum over heads.

    The first is the mean over the image's own queries, the second the sum over `image.queries`.
    """
    own = torch.arange(image.start, image.start + image.count, device=image.queries.device)
    within = image.of(attention.head_max_sum(own)) / image.count
    return within, image.of(attention.head_max_sum(image.queries))


def _cuts(drops: list[int], n: int) -> tuple[Cut, ...]:
    """Return the cuts of an image of n tokens when layer l drops drops[l]. A layer that drops none gets no cut."""
    cuts, left = [], n
    for layer, drop in enumerate(drops):
        if drop:
            left -= drop
            cuts.append(Cut(layer, left))
    return tuple(cuts)

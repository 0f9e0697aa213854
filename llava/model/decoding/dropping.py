"""Dropping: the record of the vision tokens that are dropped inside the LLM for one request.

llava_arch.prepare makes it, prefill fills it, and decoding reads it. Rows of a batch differ in length and in their kept
tokens. In every layer they stay right-aligned: all rows end at the same slot and padding is on the left, in the hidden
states and in the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from llava.common.errors import UserError
from llava.common.transfer import to_device
from llava.constants import IGNORE_INDEX
from llava.methods.attention_rows import RowAttention
from llava.methods.inside_llm.base import Choice, Dropper, ImageSlots
from llava.methods.inside_llm.plan import AFTER, BEFORE, INSIDE, Cut, LayerTokens, layer_tokens
from llava.methods.kv_cache.base import RowSpans


@dataclass
class PromptRow:
    """The prompt of one row before any cut. Slots are counted from its first real token.

    length: tokens of the row; images: (start, count) of each image
    text: per image, the slots [m] of its text (option text_scope)
    """

    length: int
    images: list[tuple[int, int]]
    text: list[Tensor]


@dataclass
class CutRecord:
    """The result of one cut of one image. All indices count the image's slots before the cut.

    layer: the layer of the cut; the dropper's `place` says whether before, in or after it
    kept [k]: slots that stay, ascending
    sources: for each merged token, the slots that were merged into it
    order [k + made]: the image's slots after the cut; merged tokens get the numbers behind the last slot
    """

    layer: int
    kept: Tensor
    sources: list[list[int]]
    order: Tensor


@dataclass
class _Row:
    """The state of a row during prefill: as PromptRow, for the tokens that are left. cuts: per image, by layer."""

    length: int
    images: list[ImageSlots]
    cuts: list[dict[int, Cut]]


@dataclass
class Stage:
    """Data that all layers with the same kept tokens share. B rows, S slots.

    lengths: real tokens of each row; valid [B, S]: True for real slots; None where all are real
    shift [B]: the offset that is subtracted from positions in the whole prompt
    """

    lengths: list[int]
    valid: Tensor | None
    shift: Tensor


class Dropping:
    """The vision tokens that each layer keeps of each row, for one request.

    dropper, overall_tokens: the method and its budget per image; layers: of the LLM; prompts: one per row
    After prefill:
    records   per prompt, per image: its CutRecords in layer order
    stages    the distinct sets of kept tokens; stage_of[layer]: the one that the layer's attention and KV cache see
    """

    def __init__(self, dropper: Dropper, overall_tokens: int, layers: int, prompts: list[PromptRow]):
        self.dropper, self.layers, self.prompts = dropper, layers, prompts
        self.cuts = [[dropper.cuts(count, overall_tokens, layers) for _, count in prompt.images] for prompt in prompts]
        self.records: list[list[list[CutRecord]]] = []
        self.stages: list[Stage] = []
        self.stage_of: list[int] = []
        self._rows: list[_Row] = []
        self._times = 1  # rows per prompt

    # --- counts and records -----------------------------------------------------------------------------------

    def schedule(self, row: int, image: int) -> list[LayerTokens]:
        """Return the vision tokens that each layer computes on, for one image of the batch."""
        return layer_tokens(self.prompts[row].images[image][1], self.cuts[row][image], self.dropper.place, self.layers)

    def left(self, row: int, image: int) -> int:
        """Return the last count of an image: its tokens after the last cut."""
        cuts = self.cuts[row][image]
        return cuts[-1].keep + cuts[-1].made if cuts else self.prompts[row].images[image][1]

    def cached(self, row: int) -> list[int]:
        """Return the entries of the row's prompt in each layer's KV cache, without padding, by the schedule."""
        prompt = self.prompts[row]
        text = prompt.length - sum(count for _, count in prompt.images)
        seen = [self.schedule(row, image) for image in range(len(prompt.images))]
        return [text + sum(tokens[layer].attention for tokens in seen) for layer in range(self.layers)]

    def image_counts(self) -> list[list[int]]:
        """Return the vision tokens of each row that each layer's attention sees, [L][B], by the schedule."""
        seen = [
            [self.schedule(row, image) for image in range(len(prompt.images))]
            for row, prompt in enumerate(self.prompts)
        ]
        return [[sum(tokens[layer].attention for tokens in images) for images in seen] for layer in range(self.layers)]

    def numbering(self) -> list[int]:
        """Return, per layer, the number of the way in which it counts positions, [L].

        Kept tokens are counted anew after every cut, or keep their positions; then all numbers are 0.
        """
        if not self.dropper.reindexed:
            return [0] * self.layers
        layers = {cut.layer for row in self.cuts for cuts in row for cut in cuts}
        # A cut BEFORE a layer changes the positions of that layer. Other cuts change those of the layers behind it.
        reach = 1 if self.dropper.place == BEFORE else 0
        return [sum(cut < layer + reach for cut in layers) for layer in range(self.layers)]

    def survivors(self, row: int, image: int) -> list[Tensor]:
        """Return the slots of an image that are left after each of its cuts; -1 for merged tokens."""
        now, after = torch.arange(self.prompts[row].images[image][1]), []
        for record in self.records[row][image]:
            now = torch.cat([now, torch.full((len(record.sources),), -1)])[record.order.cpu()]
            after.append(now)
        return after

    def places(self, row: int, image: int) -> list[str]:
        """Return the places of an image's cuts in words, with layers counted from 1: "after layer 2", "in layer 3"."""
        words = {AFTER: "after layer {}", INSIDE: "in layer {}", BEFORE: "before layer {}"}[self.dropper.place]
        return [words.format(record.layer + 1) for record in self.records[row][image]]

    def left_of_prompt(self, row: int) -> Tensor:
        """Return the slots [s] of a row's prompt that are left after the last cut, in order; -1 for merged tokens."""
        pieces, at = [], 0
        for image, (start, count) in enumerate(self.prompts[row].images):
            now = [torch.arange(count), *self.survivors(row, image)][-1]
            pieces += [torch.arange(at, start), torch.where(now < 0, now, now + start)]
            at = start + count
        return torch.cat([*pieces, torch.arange(at, self.prompts[row].length)])

    def labels(self, labels: Tensor) -> Tensor:
        """Return the labels [B, S'] of the tokens that are left, from labels [B, S] of the padded prompts.

        Merged tokens get IGNORE_INDEX: there is no target for them.
        """
        left = [self.left_of_prompt(row).to(labels.device) for row in range(len(self.prompts))]
        out = labels.new_full((len(left), max(map(len, left))), IGNORE_INDEX)
        for b, slots in enumerate(left):
            own = labels[b, labels.shape[1] - self.prompts[b].length :]
            out[b, out.shape[1] - len(slots) :] = torch.where(slots < 0, IGNORE_INDEX, own[slots])
        return out

    # --- prefill ----------------------------------------------------------------------------------------------

    def begin(self, embeds: Tensor) -> None:
        """Start the prefill of `embeds` [B, S, D]; the record of an earlier prefill of this prompt is dropped.

        B is the number of prompts or a multiple of it, because transformers repeats each row under beam search.
        UserError for embeddings of another shape.
        """
        length = max(prompt.length for prompt in self.prompts)
        times, rest = divmod(embeds.shape[0], len(self.prompts))
        if embeds.shape[1] != length or rest or not times:
            raise UserError(
                f"prefill got a batch of {embeds.shape[0]} x {embeds.shape[1]} tokens, but the prompt that vision tokens "
                f"are dropped from has {len(self.prompts)} x {length}; a prompt is prefilled in one piece, with a cache"
            )
        self.records = [[[] for _ in prompt.images] for prompt in self.prompts]
        self._rows, self.stages, self.stage_of = [], [], []
        self._times = times
        for b in range(embeds.shape[0]):
            prompt, cuts = self.prompts[b // times], self.cuts[b // times]
            row = embeds[b, length - prompt.length :]
            images = [
                ImageSlots(
                    start, count, self._queries(row, start, count, text, prompt.length), start + count == prompt.length
                )
                for (start, count), text in zip(prompt.images, prompt.text, strict=True)
            ]
            self._rows.append(_Row(prompt.length, images, [{cut.layer: cut for cut in one} for one in cuts]))
        self._add_stage(embeds.device)

    def _queries(self, row: Tensor, start: int, count: int, text: Tensor, length: int) -> Tensor:
        """Return the slots whose attention is read for one image of a row of embeddings [length, D]."""
        if len(text) == 0:
            return torch.full((1,), length - 1, device=row.device)
        text = to_device(text, row.device)
        return text[self.dropper.queries(row[start : start + count], row[text])]

    def _add_stage(self, device: torch.device) -> None:
        """Add the stage of the tokens that are left now."""
        lengths = [row.length for row in self._rows]
        whole = self.stages[0].lengths if self.stages else lengths
        longest = max(lengths)
        valid = None
        if min(lengths) < longest:
            real = to_device(torch.tensor(lengths), device)
            valid = torch.arange(longest, device=device) >= longest - real[:, None]
        shift = to_device(torch.tensor([a - b for a, b in zip(whole, lengths, strict=True)]), device)
        self.stages.append(Stage(lengths, valid, shift * int(self.dropper.reindexed)))

    @property
    def stage(self) -> Stage:
        """The stage of the tokens that are left now."""
        return self.stages[-1]

    def note_layer(self) -> None:
        """Note that the next layer's attention runs on the current stage."""
        self.stage_of.append(len(self.stages) - 1)

    def cuts_at(self, layer: int) -> bool:
        """Return whether any image of any row is cut at `layer`."""
        return any(layer in cuts for row in self._rows for cuts in row.cuts)

    def spans(self) -> list[RowSpans]:
        """Return the current length and images of each row."""
        return [RowSpans(row.length, [(image.start, image.count) for image in row.images]) for row in self._rows]

    def positions(self, device: torch.device) -> Tensor:
        """Return the current slots of each row counted from 0, [B, S]; 0 in the padding."""
        longest = max(self.stage.lengths)
        start = longest - to_device(torch.tensor(self.stage.lengths), device)
        return (torch.arange(longest, device=device) - start[:, None]).clamp(min=0)

    def cut(self, layer: int, query: Tensor, key: Tensor, scaling: float, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Drop tokens at `layer`. Returns (index [B, S'], made [B, M, D]), the content of each slot after the cut.

        query [B, H, Q, d]: of the last Q slots; key [B, G, S, d]; hidden [B, S, D]: all of the layer, padded as now,
            after the final norm for a dropper that reads_normed
        index: a slot of `hidden`, or S + i for merged token i of that row; padding repeats slot 0
        """
        # Each row on its own, without its padding: rows without a cut here need no attention rows.
        length = hidden.shape[1]
        orders, made = [], []
        for b, row in enumerate(self._rows):
            left = length - row.length
            attention = None
            if any(layer in cuts for cuts in row.cuts):
                attention = RowAttention(query[b][:, -row.length :], key[b][:, left:], scaling)
            order, new = self._cut_row(b, layer, attention, hidden[b, left:])
            orders.append(order + left)
            made.append(new)
        self._add_stage(hidden.device)
        longest, most = max(map(len, orders)), max(map(len, made))
        index = torch.stack([pad(order, (longest - len(order), 0)) for order in orders])
        return index, torch.stack([pad(new, (0, 0, 0, most - len(new))) for new in made])

    def _cut_row(self, b: int, layer: int, attention: RowAttention, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Cut one row without padding, hidden [S, D]: return its slots after the cut, and the merged tokens."""
        row, slots = self._rows[b], torch.arange(len(hidden), device=hidden.device)
        pieces, made, counts, at, total = [], [hidden[:0]], [], 0, len(hidden)
        for i, image in enumerate(row.images):
            order, cut = image.of(slots), row.cuts[i].get(layer)
            if cut is not None:
                choice = self.dropper.select(attention, cut, image, hidden)
                inside = _order(choice, image)
                if b % self._times == 0:  # the other beams of this prompt are cut alike
                    record = CutRecord(layer, choice.kept, choice.sources, inside)
                    self.records[b // self._times][i].append(record)
                numbers = torch.arange(total, total + len(choice.sources), device=hidden.device)
                order = torch.cat([order, numbers])[inside.to(hidden.device)]
                if choice.made is not None:
                    made.append(choice.made)
                    total += len(choice.made)
            pieces += [slots[at : image.start], order]
            counts.append(len(order))
            at = image.start + image.count
        order = torch.cat([*pieces, slots[at:]])
        _move(row, order, counts, total)
        return order, torch.cat(made)

    # --- decoding ---------------------------------------------------------------------------------------------

    def decode_mask(self, stage: int, new: int, queries: int) -> Tensor | None:
        """Return the attention mask [B, 1, queries, S + new] for the last `queries` of `new` tokens after the prompt.

        stage: the stage whose prompt tokens the layer's KV cache holds. None where one query sees everything.
        """
        valid = self.stages[stage].valid
        if valid is None and queries == 1:
            return None
        longest = max(self.stages[stage].lengths)
        at = torch.arange(longest + new, device=self.stages[stage].shift.device)
        mask = (at <= at[-queries:, None])[None, None]
        if valid is not None:
            mask = mask & pad(valid, (0, new), value=True)[:, None, None]
        return mask


def _order(choice: Choice, image: ImageSlots) -> Tensor:
    """Return the image's slots after a cut, counted as before it; merged tokens are numbered from image.count."""
    if choice.order is not None:
        return choice.order
    made = torch.arange(image.count, image.count + len(choice.sources), device=choice.kept.device)
    if image.ends_prompt:  # the answer is read from the last slot, so merged tokens go before it
        return torch.cat([choice.kept[:-1], made, choice.kept[-1:]])
    return torch.cat([choice.kept, made])


def _move(row: _Row, order: Tensor, counts: list[int], numbered: int) -> None:
    """Update `row` after a cut: its slots are now `order`, its images have `counts` tokens.

    order counts slots as before the cut, below `numbered`. Queries are slots of text or the last slot of the prompt,
    which are never dropped, so each of them has a new place.
    """
    place = torch.empty(numbered, dtype=torch.long, device=order.device)
    place[order] = torch.arange(len(order), device=order.device)
    gone, images = 0, []
    for image, count in zip(row.images, counts, strict=True):
        queries = place[image.queries.to(place.device)]
        images.append(replace(image, start=image.start - gone, count=count, queries=queries))
        gone += image.count - count
    row.images, row.length = images, len(order)

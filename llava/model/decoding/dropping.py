"""Dropping: what one request's dropping has come to. Made by llava_arch.prepare, filled by prefill, read by decoding.

Rows of a batch differ in length and in what survives. In every layer they stay right-aligned: a row's tokens end where
the others' end, and padding is on the left, in the hidden states as in the KV cache.
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
    """One row's prompt before any cut. Slots are counted from its first real token.

    length: its tokens; images: (start, count) of each; text: per image, the slots of its text (text_scope), [m] each
    """

    length: int
    images: list[tuple[int, int]]
    text: list[Tensor]


@dataclass
class CutRecord:
    """What one cut did to one image. All numbers count the image's slots before the cut.

    layer: where (before, in or after it: the dropper's `place`)
    kept [k]: ascending; sources: for each token made of dropped ones, what went into it
    order [k + made]: the image's slots after the cut, made tokens numbered on from the last slot
    """

    layer: int
    kept: Tensor
    sources: list[list[int]]
    order: Tensor


@dataclass
class _Row:
    """A row while prefill goes on: as PromptRow, for what is left of it."""

    length: int
    images: list[ImageSlots]
    cuts: list[dict[int, Cut]]


@dataclass
class Stage:
    """What layers with the same survivors share. B rows, S slots.

    lengths: real tokens of each row; valid [B, S]: which slots are real, None where all are
    shift [B]: how far below the whole prompt's positions this stage's lie
    """

    lengths: list[int]
    valid: Tensor | None
    shift: Tensor


class Dropping:
    """Which image tokens each layer of each row keeps, for one request.

    dropper, overall_tokens: the method and its budget per image; layers: of the LLM; prompts: one per row
    After prefill:
    records   per prompt, per image: its CutRecords in layer order
    stages    the distinct sets of survivors; stage_of[layer]: the one that the layer's attention and cache see
    """

    def __init__(self, dropper: Dropper, overall_tokens: int, layers: int, prompts: list[PromptRow]):
        self.dropper, self.layers, self.prompts = dropper, layers, prompts
        self.cuts = [[dropper.cuts(count, overall_tokens, layers) for _, count in prompt.images] for prompt in prompts]
        self.records: list[list[list[CutRecord]]] = []
        self.stages: list[Stage] = []
        self.stage_of: list[int] = []
        self._rows: list[_Row] = []
        self._times = 1  # rows per prompt

    # --- what it comes to -------------------------------------------------------------------------------------

    def schedule(self, row: int, image: int) -> list[LayerTokens]:
        """Image tokens that each layer computes on, for one image of the batch."""
        return layer_tokens(self.prompts[row].images[image][1], self.cuts[row][image], self.dropper.place, self.layers)

    def left(self, row: int, image: int) -> int:
        """Tokens of an image that are left after the last cut."""
        cuts = self.cuts[row][image]
        return cuts[-1].keep + cuts[-1].made if cuts else self.prompts[row].images[image][1]

    def cached(self, row: int) -> list[int]:
        """Entries of the row's own prompt in each layer's KV cache, padding excluded, as the schedule has it."""
        prompt = self.prompts[row]
        text = prompt.length - sum(count for _, count in prompt.images)
        seen = [self.schedule(row, image) for image in range(len(prompt.images))]
        return [text + sum(tokens[layer].attention for tokens in seen) for layer in range(self.layers)]

    def image_counts(self) -> list[list[int]]:
        """[L][B] image tokens of each row that each layer's attention sees, as the schedule has it."""
        seen = [
            [self.schedule(row, image) for image in range(len(prompt.images))]
            for row, prompt in enumerate(self.prompts)
        ]
        return [[sum(tokens[layer].attention for tokens in images) for images in seen] for layer in range(self.layers)]

    def numbering(self) -> list[int]:
        """[L] in which of several ways each layer counts positions: survivors are numbered anew after every cut, or keep
        the positions that they had."""
        if not self.dropper.reindexed:
            return [0] * self.layers
        layers = {cut.layer for row in self.cuts for cuts in row for cut in cuts}
        # A cut before a layer's attention counts for that layer, one inside or after it for those that follow.
        reach = 1 if self.dropper.place == BEFORE else 0
        return [sum(cut < layer + reach for cut in layers) for layer in range(self.layers)]

    def survivors(self, row: int, image: int) -> list[Tensor]:
        """After each cut of an image, what is left of it: slots of the whole image; -1 for tokens that were made."""
        now, after = torch.arange(self.prompts[row].images[image][1]), []
        for record in self.records[row][image]:
            now = torch.cat([now, torch.full((len(record.sources),), -1)])[record.order.cpu()]
            after.append(now)
        return after

    def places(self, row: int, image: int) -> list[str]:
        """Where each cut of an image was, in words, layers counted from 1: "after layer 2", "in layer 3"."""
        words = {AFTER: "after layer {}", INSIDE: "in layer {}", BEFORE: "before layer {}"}[self.dropper.place]
        return [words.format(record.layer + 1) for record in self.records[row][image]]

    def left_of_prompt(self, row: int) -> Tensor:
        """[s] slots of a row's prompt that are left after the last cut, in order; -1 for tokens that were made."""
        pieces, at = [], 0
        for image, (start, count) in enumerate(self.prompts[row].images):
            now = [torch.arange(count), *self.survivors(row, image)][-1]
            pieces += [torch.arange(at, start), torch.where(now < 0, now, now + start)]
            at = start + count
        return torch.cat([*pieces, torch.arange(at, self.prompts[row].length)])

    def labels(self, labels: Tensor) -> Tensor:
        """Labels [B, S] of the padded prompts -> [B, S'] of what is left of them; made tokens have none."""
        left = [self.left_of_prompt(row).to(labels.device) for row in range(len(self.prompts))]
        out = labels.new_full((len(left), max(map(len, left))), IGNORE_INDEX)
        for b, slots in enumerate(left):
            own = labels[b, labels.shape[1] - self.prompts[b].length :]
            out[b, out.shape[1] - len(slots) :] = torch.where(slots < 0, IGNORE_INDEX, own[slots])
        return out

    # --- prefill ----------------------------------------------------------------------------------------------

    def begin(self, embeds: Tensor) -> None:
        """Start prefill of `embeds` [B, S, D]; whatever an earlier generation with this prompt left is forgotten.

        Under beam search transformers repeats each row; so are they here.
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
        """Slots whose attention is read for one image of a row of embeddings [length, D]."""
        if len(text) == 0:
            return torch.full((1,), length - 1, device=row.device)
        text = to_device(text, row.device)
        return text[self.dropper.queries(row[start : start + count], row[text])]

    def _add_stage(self, device: torch.device) -> None:
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
        """The survivors as they are now."""
        return self.stages[-1]

    def note_layer(self) -> None:
        """The next layer's attention runs on the survivors as they are now."""
        self.stage_of.append(len(self.stages) - 1)

    def cuts_at(self, layer: int) -> bool:
        """Whether any image of any row is cut at `layer`."""
        return any(layer in cuts for row in self._rows for cuts in row.cuts)

    def spans(self) -> list[RowSpans]:
        """Per row, its length and its images as they are now."""
        return [RowSpans(row.length, [(image.start, image.count) for image in row.images]) for row in self._rows]

    def positions(self, device: torch.device) -> Tensor:
        """[B, S]: each row's slots counted from 0 as they are now; 0 in the padding."""
        longest = max(self.stage.lengths)
        start = longest - to_device(torch.tensor(self.stage.lengths), device)
        return (torch.arange(longest, device=device) - start[:, None]).clamp(min=0)

    def cut(self, layer: int, query: Tensor, key: Tensor, scaling: float, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Drop tokens at `layer`. Returns (index [B, S'], made [B, M, D]): what each slot is from now on.

        query [B, H, Q, d] of the last Q slots, key [B, G, S, d], hidden [B, S, D]: of the layer, padded as they are now
        index: slot of `hidden`, or S + i for the made token i of that row; padding repeats slot 0
        """
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
        """One row's part of `cut`, without padding: hidden [S, D] -> its slots from now on, and the tokens made."""
        row, slots = self._rows[b], torch.arange(len(hidden), device=hidden.device)
        pieces, made, counts, at, total = [], [hidden[:0]], [], 0, len(hidden)
        for i, image in enumerate(row.images):
            order, cut = image.of(slots), row.cuts[i].get(layer)
            if cut is not None:
                choice = self.dropper.select(attention, cut, image, image.of(hidden))
                inside = _order(choice, image)
                if b % self._times == 0:  # its other beams do the same
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
        """[B, 1, queries, S + new] of what the last `queries` of `new` tokens after the prompt see; None for all."""
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
    """The image's slots after a cut, counted as before it; made tokens are numbered from image.count on."""
    made = torch.arange(image.count, image.count + len(choice.sources), device=choice.kept.device)
    if image.ends_prompt:  # the answer is read from the last slot, so nothing may come after it
        return torch.cat([choice.kept[:-1], made, choice.kept[-1:]])
    return torch.cat([choice.kept, made])


def _move(row: _Row, order: Tensor, counts: list[int], numbered: int) -> None:
    """Bring `row` up to date: its slots are now `order`, counted as before (below `numbered`), its images `counts` long.

    The slots that queries count are text, or the prompt's last: never dropped.
    """
    place = torch.empty(numbered, dtype=torch.long, device=order.device)
    place[order] = torch.arange(len(order), device=order.device)
    gone, images = 0, []
    for image, count in zip(row.images, counts, strict=True):
        queries = place[image.queries.to(place.device)]
        images.append(replace(image, start=image.start - gone, count=count, queries=queries))
        gone += image.count - count
    row.images, row.length = images, len(order)

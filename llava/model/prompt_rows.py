"""Rows of a batch during preparation: ids without padding, places of images and questions, and the padded batch.

All index arithmetic is on the host. The device gets one index tensor, which says where each of its vectors goes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava.common.errors import UserError
from llava.common.transfer import to_device
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.methods.before_llm import Selection
from llava.model.decoding.dropping import PromptRow
from llava.model.decoding.prepared import PreparedPrompt


@dataclass
class Row:
    """One row of a batch, on the host and without padding.

    ids [S]; labels [S] or None
    places: indices of the image placeholders among the ids
    questions: per image, bool [S], True for the ids of its text
    selections: per image, the tokens that the LLM reads; empty until they are selected
    """

    ids: Tensor
    labels: Tensor | None
    places: list[int]
    questions: list[Tensor]
    selections: list[Selection] = field(default_factory=list)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(start, length) of each image in the spliced row."""
        spans, grown = [], 0
        for place, selection in zip(self.places, self.selections, strict=True):
            spans.append((place + grown, len(selection.indices)))
            grown += len(selection.indices) - 1
        return spans

    @property
    def length(self) -> int:
        """Number of tokens of the spliced row."""
        return len(self.ids) + sum(len(selection.indices) - 1 for selection in self.selections)

    @property
    def unpruned(self) -> int:
        """Number of tokens that the row would have without selection."""
        return len(self.ids) + sum(selection.total - 1 for selection in self.selections)


def batch_of(values, name: str = "input_ids") -> Tensor:
    """[B, S] whole numbers from a tensor or list, [B, S] or one row [S]. UserError for anything else."""
    found = f"of type {type(values).__name__}"
    if isinstance(values, (list, tuple)):
        try:
            values = torch.tensor(values)
        except (TypeError, ValueError, RuntimeError):
            values = None  # rows of different lengths, or no numbers
    if isinstance(values, Tensor):
        found = f"{str(values.dtype).removeprefix('torch.')} of shape {list(values.shape)}"
        values = values[None] if values.dim() == 1 else values
        if values.dim() == 2 and values.numel() and not values.is_floating_point() and not values.is_complex():
            return values
    raise UserError(f"{name} is {found}, allowed are whole numbers of shape [batch, tokens] or [tokens]")


def real_tokens(input_ids: Tensor, attention_mask: Tensor | None, model_config) -> list[tuple[Tensor, Tensor]]:
    """Return, per row, its token ids without padding and the mask [S] of real tokens, on the device of the ids.

    UserError for a mask of another shape than the ids.
    """
    if attention_mask is None:
        pad, bos = model_config.pad_token_id, model_config.bos_token_id
        mask = torch.ones_like(input_ids, dtype=torch.bool)
        if pad is not None and pad != bos and input_ids.shape[0] > 1:
            mask = (input_ids != pad).cumsum(dim=1) > 0  # only leading pad tokens are padding
    else:
        if attention_mask.dim() == 1:
            attention_mask = attention_mask[None]
        if attention_mask.shape != input_ids.shape:
            raise UserError(
                f"attention_mask has shape {list(attention_mask.shape)}, allowed is that of input_ids, "
                f"{list(input_ids.shape)}: it is for the prompt before images are spliced in"
            )
        mask = attention_mask.to(input_ids.device).bool()
    return [(ids[keep], keep) for ids, keep in zip(input_ids, mask, strict=True)]


def labels_of(labels: Tensor | None, rows: list[tuple[Tensor, Tensor]]) -> list[Tensor | None]:
    """Return, per row, its labels without padding; None where there are none. labels: [S] or [B, S]."""
    if labels is None:
        return [None] * len(rows)
    labels = labels[None] if labels.dim() == 1 else labels
    return [own.to(keep.device)[keep] for own, (_, keep) in zip(labels, rows, strict=True)]


def image_places(ids: Tensor) -> list[int]:
    """Return the indices of the image placeholders among the ids of a row."""
    return torch.nonzero(ids == IMAGE_TOKEN_INDEX).flatten().tolist()


def turn_around(ids: list[int], place: int, markers) -> tuple[int, int]:
    """Return [start, end) of the conversation turn that contains ids[place]: the ids between the nearest markers."""
    start, end = 0, len(ids)
    for at in range(len(ids)):
        for marker in markers:
            if tuple(ids[at : at + len(marker)]) == marker:
                if at + len(marker) <= place:
                    start = max(start, at + len(marker))
                elif at > place:
                    return start, at
    return start, end


def question_of(ids: Tensor, place: int, scope: str, markers, labels: Tensor | None = None) -> Tensor:
    """Return a mask [S] of the ids that text-aware methods read for the image at ids[place].

    scope: "after" is every text token behind the image; "turn" is the text of its turn, between `markers`
    labels [S]: ids with a label are no part of the question
    """
    inside = torch.zeros(len(ids), dtype=torch.bool)
    if scope == "after":
        inside[place + 1 :] = True
    else:
        start, end = turn_around(ids.tolist(), place, markers)
        inside[start:end] = True
    # In training the answer is in the ids. Without this a selector would read it.
    if labels is not None:
        inside &= labels == IGNORE_INDEX
    return inside & (ids != IMAGE_TOKEN_INDEX)


def word_ids(tokenizer, words: list[str]) -> list[int]:
    """Return the ids of `words`, each tokenised by itself and without special tokens."""
    return [number for word in words for number in tokenizer(word, add_special_tokens=False).input_ids]


def words_read(
    words_of: Callable[[str], list[str]],
    ids: Tensor,
    place: int,
    markers,
    to_text: Callable[[list[int]], str],
    to_ids: Callable[[list[str]], list[int]],
    labels: Tensor | None = None,
) -> list[int]:
    """Return the token ids of the words that a method reads for the image at ids[place], from the turn of the image.

    words_of: the method's Selector.words. to_text: token ids -> string. to_ids: words -> token ids. markers and labels:
    as `question_of` takes them
    """
    turn = question_of(ids, place, "turn", markers, labels)
    return to_ids(words_of(to_text(ids[turn].tolist())))


def prompt_row(row: Row) -> PromptRow:
    """Return a row for `Dropping`: the places of its images and of their text after the images are spliced in.

    Text before an image is left out, because it cannot attend to the image.
    """
    spans, sizes = row.spans, torch.ones_like(row.ids)
    sizes[row.places] = torch.tensor([count for _, count in spans], dtype=sizes.dtype)
    starts = sizes.cumsum(dim=0) - sizes
    text = [starts[question] for question in row.questions]
    behind = [slots[slots > start] for slots, (start, _) in zip(text, spans, strict=True)]
    return PromptRow(row.length, spans, behind)


def embed(rows: list[Row], embedding: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
    """Return the word embeddings [M, D] of all rows, one after another. Those of placeholders mean nothing."""
    # The id of a placeholder is negative, which the embedding would refuse.
    ids = torch.cat([row.ids for row in rows])
    return embedding(to_device(ids.masked_fill(ids == IMAGE_TOKEN_INDEX, 0), device))


def question_embeddings(rows: list[Row], words: Tensor) -> list[Tensor]:
    """Return the embeddings [m, D] of each image's text, for all images of the batch in reading order."""
    found, start = [], 0
    for row in rows:
        found += [torch.nonzero(question).flatten() + start for question in row.questions]
        start += len(row.ids)
    if not found:
        return []
    # One index for the whole batch: each copy to the device and each gather has a fixed cost.
    return list(words[to_device(torch.cat(found), words.device)].split([len(index) for index in found]))


def splice(rows: list[Row], words: Tensor, positions: str) -> PreparedPrompt:
    """Return all rows as one batch, padded on the left. words [M, D]: the embeddings of all ids (`embed`).

    positions: "reindexed" counts positions anew; "original" takes those of the prompt without selection
    """
    device, kept = words.device, [selection for row in rows for selection in row.selections]
    # 1. All vectors: words, the kept tokens of each image, and a zero vector for the padding.
    features = [selection.features.to(device, words.dtype) for selection in kept]
    vectors = torch.cat([words, *features, words.new_zeros(1, words.shape[1])])
    # 2. The place of each vector, mask and positions: computed on the host, then sent to the device in one copy.
    length, padding = max(row.length for row in rows), len(vectors) - 1
    index = torch.full((len(rows), length), padding)
    mask, position_ids = torch.zeros_like(index), torch.zeros_like(index)
    word, image = 0, len(words)
    for b, row in enumerate(rows):
        pieces, begin = [], 0
        for place, selection in zip(row.places, row.selections, strict=True):
            pieces += [torch.arange(word + begin, word + place), torch.arange(image, image + len(selection.indices))]
            begin, image = place + 1, image + len(selection.indices)
        index[b, length - row.length :] = torch.cat([*pieces, torch.arange(word + begin, word + len(row.ids))])
        mask[b, length - row.length :] = 1
        position_ids[b, length - row.length :] = torch.arange(row.length)
        word += len(row.ids)
    sent = to_device(torch.stack([index, mask, position_ids]), device)
    offset = torch.zeros(len(rows), 1, dtype=torch.long, device=device)
    # 3. Original positions depend on the kept tokens, which only the device knows.
    position_ids = sent[2]
    if positions == "original":
        position_ids = _original_positions(rows, device)[sent[0]]
        unpruned = torch.tensor([[row.unpruned] for row in rows])
        offset = to_device(unpruned, device) - 1 - position_ids[:, -1:]
    return PreparedPrompt(
        inputs_embeds=vectors.index_select(0, sent[0].flatten()).unflatten(0, index.shape),
        attention_mask=sent[1],
        position_ids=position_ids,
        labels=_labels(rows, index, len(vectors), device),
        selections=[row.selections for row in rows],
        image_spans=[[(length - row.length + start, n) for start, n in row.spans] for row in rows],
        lengths=[row.length for row in rows],
        unpruned_lengths=[row.unpruned for row in rows],
        position_offset=offset,
    )


def _original_positions(rows: list[Row], device: torch.device) -> Tensor:
    """Return the position of each vector of `splice` in its row without selection, [M + kept + 1]; 0 for padding."""
    text, images = [], []
    for row in rows:
        own, at = torch.arange(len(row.ids)), 0
        for place, selection in zip(row.places, row.selections, strict=True):
            images.append(selection.indices.to(device) + place + at)
            own[place + 1 :] += selection.total - 1
            at += selection.total - 1
        text.append(own)
    return torch.cat([to_device(torch.cat(text), device), *images, torch.zeros(1, dtype=torch.long, device=device)])


def _labels(rows: list[Row], index: Tensor, vectors: int, device: torch.device) -> Tensor | None:
    """Return the labels [B, S] of the spliced batch; None where there are none. Vision tokens have IGNORE_INDEX."""
    if rows[0].labels is None:
        return None
    text = torch.cat([row.labels for row in rows])
    others = text.new_full((vectors - len(text),), IGNORE_INDEX)
    return to_device(torch.cat([text, others])[index], device)

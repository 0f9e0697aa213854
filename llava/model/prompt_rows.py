"""Rows of a batch while `prepare` puts them together: ids without padding, pieces in reading order, one padded batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import UserError
from llava.model.prepared import PreparedPrompt
from llava.model.token_dropping.state import PromptRow
from llava.model.token_selection import Selection


@dataclass
class Row:
    """One row of a batch while it is being put together: pieces in reading order."""

    embeds: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)
    selections: list[Selection] = field(default_factory=list)
    spans: list[tuple[int, int]] = field(default_factory=list)
    questions: list[Tensor] = field(default_factory=list)  # per image: which ids are its text
    length: int = 0
    unpruned: int = 0

    def add(self, embeds: Tensor, positions: Tensor, unpruned: int, labels: Tensor | None = None) -> None:
        """embeds [n, D] at `positions` [n], counted from the end of what is there; the piece was `unpruned` long."""
        self.embeds.append(embeds)
        self.positions.append(positions + self.unpruned)
        self.labels.append(positions.new_full((embeds.shape[0],), IGNORE_INDEX) if labels is None else labels)
        self.length += embeds.shape[0]
        self.unpruned += unpruned


def real_tokens(input_ids: Tensor, attention_mask: Tensor | None, model_config) -> list[tuple[Tensor, Tensor]]:
    """Per row: its token ids without padding, and the mask [S] that says which they are."""
    if attention_mask is None:
        pad, bos = model_config.pad_token_id, model_config.bos_token_id
        mask = torch.ones_like(input_ids, dtype=torch.bool)
        if pad is not None and pad != bos and input_ids.shape[0] > 1:
            mask = (input_ids != pad).cumsum(dim=1) > 0  # only a leading run is padding
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
    """Per row: its labels [S, or a padded batch of them] without padding; None where there are none."""
    if labels is None:
        return [None] * len(rows)
    labels = labels[None] if labels.dim() == 1 else labels
    return [own.to(keep.device)[keep] for own, (_, keep) in zip(labels, rows, strict=True)]


def image_places(ids: Tensor) -> list[int]:
    """Where images go among the ids of a row."""
    return torch.nonzero(ids == IMAGE_TOKEN_INDEX).flatten().tolist()


def turn_around(ids: list[int], place: int, markers) -> tuple[int, int]:
    """[start, end) of the turn that holds ids[place]: what lies between the nearest markers around it."""
    start, end = 0, len(ids)
    for at in range(len(ids)):
        for marker in markers:
            if tuple(ids[at : at + len(marker)]) == marker:
                if at + len(marker) <= place:
                    start = max(start, at + len(marker))
                elif at > place:
                    return start, at
    return start, end


def prompt_row(row: Row, ids: Tensor) -> PromptRow:
    """A row for `Dropping`: where its images and their text lie once the images are spliced into `ids`.

    Text before an image is none of its text here: it cannot attend to the image.
    """
    sizes = torch.ones_like(ids)
    sizes[ids == IMAGE_TOKEN_INDEX] = sizes.new_tensor([count for _, count in row.spans])
    starts = sizes.cumsum(dim=0) - sizes
    text = [starts[question] for question in row.questions]
    behind = [slots[slots > start] for slots, (start, _) in zip(text, row.spans, strict=True)]
    return PromptRow(row.length, row.spans, behind)


def stack(rows: list[Row], positions: str, with_labels: bool) -> PreparedPrompt:
    """Pad the rows left to one length."""
    length = max(row.length for row in rows)
    first = rows[0].embeds[0]
    embeds = first.new_zeros((len(rows), length, first.shape[-1]))
    mask = torch.zeros((len(rows), length), dtype=torch.long, device=first.device)
    position_ids, label_ids = mask.clone(), torch.full_like(mask, IGNORE_INDEX)
    offset = mask.new_zeros((len(rows), 1))
    for b, row in enumerate(rows):
        pad = length - row.length
        embeds[b, pad:] = torch.cat(row.embeds)
        mask[b, pad:] = 1
        label_ids[b, pad:] = torch.cat(row.labels)
        if positions == "original":
            position_ids[b, pad:] = torch.cat(row.positions)
            offset[b] = row.unpruned - 1 - position_ids[b, -1]
        else:
            position_ids[b, pad:] = torch.arange(row.length, device=mask.device)
    return PreparedPrompt(
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=position_ids,
        labels=label_ids if with_labels else None,
        selections=[row.selections for row in rows],
        image_spans=[[(length - row.length + s, n) for s, n in row.spans] for row in rows],
        lengths=[row.length for row in rows],
        unpruned_lengths=[row.unpruned for row in rows],
        position_offset=offset,
    )

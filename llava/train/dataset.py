"""LLaVA's training data: a JSON list of conversations with images, checked as a whole before anything is trained.

    [{"id": "1", "image": "a/b.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                       {"from": "gpt", "value": "A cat."}]}, ...]

"image" is a path inside the image folder, or a list of paths where a conversation has several; a text-only sample has none.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

from llava.common.errors import UserError, first_line
from llava.common.pictures import rgb
from llava.common.progress import progress_bar
from llava.config import AdaVConfig
from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.mm_utils import NEWLINE, merge_order, process_images, tile_plan
from llava.train.labels import labelled_tokens, turns_of


@dataclass
class Sample:
    """One conversation. where: how messages name it; turns: user and assistant alternate; images: paths."""

    where: str
    turns: list[str]
    images: list[str]

    @property
    def words(self) -> int:
        """Its length as LLaVA counts it for grouping; negative for a text without image."""
        count = max(1, sum(len(turn.split()) for turn in self.turns))
        return count if self.images else -count


def read_samples(path: str, image_folder: str | None) -> list[Sample]:
    """All samples of a data file. UserError, naming the sample, for the first thing that is wrong with any of them:
    its form, its number of <image> placeholders, an image that is not there or lies outside the folder."""
    rows = _read_list(Path(path))
    samples, known = [], {}
    for number, row in enumerate(progress_bar("checking samples", rows, unit=" samples")):
        where = f"{path}, sample {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: found {type(row).__name__}, allowed is one JSON object per sample")
        where += f' (id "{row["id"]}")' if "id" in row else ""
        turns, images = turns_of(row, where), _images_of(row, where)
        placeholders = sum(turn.count(DEFAULT_IMAGE_TOKEN) for turn in turns)
        if placeholders != len(images):
            raise UserError(
                f"{where}: {placeholders} {DEFAULT_IMAGE_TOKEN} in its turns, but {len(images)} images; allowed is one each"
            )
        if images and image_folder is None:
            raise UserError(f"{where}: has an image, but --image_folder does not say where images lie")
        for name in images:
            if name not in known:
                known[name] = _image_path(image_folder, name, where)
        samples.append(Sample(where, turns, [known[name] for name in images]))
    if not samples:
        raise UserError(f"{path}: has no samples")
    return samples


def check_captions(samples: list[Sample]) -> None:
    """UserError for a sample that template plain (an image and its caption) cannot hold."""
    for sample in samples:
        if len(sample.turns) != 2 or len(sample.images) != 1:
            raise UserError(
                f"{sample.where}: {len(sample.turns)} turns and {len(sample.images)} images, but template plain takes one "
                "image and its caption"
            )


def _read_list(path: Path) -> list:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: found {type(rows).__name__}, allowed is one JSON list of conversations")
    return rows


def _images_of(row: dict, where: str) -> list[str]:
    images = row.get("image")
    images = [] if images is None else images if isinstance(images, list) else [images]
    if not all(isinstance(name, str) and name for name in images):
        raise UserError(f'{where}: "image" is {json.dumps(row["image"])}, allowed is a path or a list of paths')
    return images


def _image_path(folder: str, name: str, where: str) -> str:
    path = os.path.normpath(os.path.join(folder, name))
    if os.path.isabs(name) or not path.startswith(os.path.join(os.path.normpath(folder), "")):
        raise UserError(f"{where}: image {name} does not lie inside {folder}")
    if not os.path.isfile(path):
        raise UserError(f"{where}: image {path} is not there")
    return path


class ConversationDataset(Dataset):
    """Samples as token ids, labels and pixels. Everything is made when an item is asked for.

    max_length: of a sample, its vision tokens included. What is longer is cut at the end, as LLaVA does, with a warning;
    a sample whose images or whose every answer would be cut is an error.
    selection: how vision tokens are chosen, which decides how many of them there are.
    """

    def __init__(
        self,
        samples: list[Sample],
        template: str,
        tokenizer,
        image_processor,
        model_config,
        selection: AdaVConfig,
        max_length: int,
    ):
        self.samples, self.template, self.tokenizer = samples, template, tokenizer
        self.image_processor, self.model_config, self.selection = image_processor, model_config, selection
        self.max_length = max_length

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def lengths(self) -> list[int]:
        """Words of each sample, negative without image: what batches are grouped by."""
        return [sample.words for sample in progress_bar("lengths", self.samples, unit=" samples")]

    def __getitem__(self, index: int) -> dict:
        """input_ids [S], labels [S], pixels (a list of [3, H, W] or [T, 3, H, W]) and sizes [(width, height)]."""
        sample = self.samples[index]
        images = [_open(path, sample.where) for path in sample.images]
        ids, labels = labelled_tokens(sample.turns, self.template, self.tokenizer)
        vision = sum(self._vision_tokens(image.size) - 1 for image in images)  # less the placeholder of each
        room = self.max_length - vision
        if len(ids) > room:
            self._refuse_cut(sample, ids, labels, room)
            warnings.warn(
                f"{sample.where}: {len(ids) + vision} tokens, of which the first {self.max_length} are used "
                "(--model_max_length)",
                stacklevel=2,
            )
            ids, labels = ids[:room], labels[:room]
        anyres = self.selection.option("anyres")
        pixels = [process_images([image], self.image_processor, self.model_config, anyres)[0] for image in images]
        return {
            "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels),
            "pixels": pixels,
            "sizes": [image.size for image in images],
        }

    def _refuse_cut(self, sample: Sample, ids: list[int], labels: list[int], room: int) -> None:
        if IMAGE_TOKEN_INDEX in ids[max(0, room) :] or all(label == IGNORE_INDEX for label in labels[: max(0, room)]):
            raise UserError(
                f"{sample.where}: too long: {len(ids) + self.max_length - room} tokens with its vision tokens, and cut to "
                f"--model_max_length, {self.max_length}, it has no whole image or no answer left"
            )

    def _vision_tokens(self, size: tuple[int, int]) -> int:
        """How many tokens the LLM reads of an image of `size`."""
        plan = tile_plan(size, self.model_config, self.selection.option("anyres"))
        vision = self.model_config.vision
        order = merge_order(plan, vision.image_size // vision.patch_size)
        patches = int((order != NEWLINE).sum())
        keeps_all = self.selection.method == "none" or self.selection.overall_tokens >= patches
        return len(order) if keeps_all else self.selection.overall_tokens

    def blank(self) -> dict:
        """A sample with a black image and nothing to learn.

        It joins a batch of texts, so that tower and projector take part in every step on every rank: gradients are then
        there to be averaged, and ZeRO-3 gathers the same weights everywhere.
        """
        image = Image.new("RGB", (self.model_config.mm_tile_size,) * 2)
        pixels = process_images([image], self.image_processor, self.model_config, self.selection.option("anyres"))[0]
        ids = torch.tensor([self.tokenizer.bos_token_id or 0, IMAGE_TOKEN_INDEX, self.tokenizer.eos_token_id or 0])
        return {
            "input_ids": ids,
            "labels": torch.full_like(ids, IGNORE_INDEX),
            "pixels": [pixels],
            "sizes": [image.size],
        }


def _open(path: str, where: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return rgb(image)
    except Exception as error:  # Pillow's decoders raise whatever their format makes them stumble over
        raise UserError(f"{where}: image {path} cannot be read ({first_line(error)})") from error


@dataclass
class Collator:
    """Items of a ConversationDataset as one batch for the model's forward, padded right."""

    blank: Callable[[], dict]

    def __call__(self, items: list[dict]) -> dict:
        """input_ids, labels, attention_mask [B, S], images and image_sizes (flat, in reading order)."""
        if not any(item["pixels"] for item in items):
            items = [*items, self.blank()]
        mask = [torch.ones_like(item["input_ids"]) for item in items]
        columns = {
            "input_ids": ([item["input_ids"] for item in items], 0),
            "labels": ([item["labels"] for item in items], IGNORE_INDEX),
            "attention_mask": (mask, 0),
        }
        batch = {
            name: torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
            for name, (rows, value) in columns.items()
        }
        batch["images"] = [pixels for item in items for pixels in item["pixels"]]
        batch["image_sizes"] = [size for item in items for size in item["sizes"]]
        return batch

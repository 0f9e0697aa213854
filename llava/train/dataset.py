"""LLaVA's training data: a JSON list of conversations with images. All samples are checked before training starts.

    [{"id": "1", "image": "a/b.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is this?"},
                                                       {"from": "gpt", "value": "A cat."}]}, ...]

"image" is a path inside the image folder, or a list of paths where a conversation has several; a text-only sample has none,
and <image> is text in it.
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
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.mm_utils import NEWLINE, merge_order, process_images, tile_plan
from llava.train.data_problems import Ignored, ImageFolder
from llava.train.labels import labelled_tokens, turns_of


@dataclass
class Sample:
    """One conversation. where: its name in messages. turns: texts of user and assistant in turn. images: paths."""

    where: str
    turns: list[str]
    images: list[str]

    @property
    def words(self) -> int:
        """Number of words, which LLaVA uses as length for grouping. Negative if the sample has no image."""
        count = max(1, sum(len(turn.split()) for turn in self.turns))
        return count if self.images else -count


class Samples(list):
    """The samples of a data file that can be learnt from. note: a sentence that counts what is not learnt; "" for nothing."""

    note = ""


def read_samples(path: str, image_folder: str | None) -> Samples:
    """All samples of a data file that can be learnt from.

    Samples without an answer, and those whose images are not as many as their <image>, are left out. A warning counts them,
    and samples in which one of several answers is empty. UserError, naming the sample, for the first one that is no
    conversation, and for a file without samples to learn from; UserError, naming them all, for images that are not there.
    """
    rows = _read_list(Path(path))
    if not rows:
        raise UserError(f"{path}: has no samples")
    samples, images, ignored = Samples(), ImageFolder(image_folder), Ignored(str(path), len(rows))
    for number, row in enumerate(progress_bar("checking samples", rows, unit=" samples")):
        name = f"sample {number}"
        if not isinstance(row, dict):
            raise UserError(f"{path}, {name}: found {type(row).__name__}, allowed is one JSON object per sample")
        name += f' (id "{_short(row["id"])}")' if "id" in row else ""
        where = f"{path}, {name}"
        files = _images_of(row, where)
        turns = turns_of(row, where, len(files))
        if not ignored.leaves_out(name, turns, len(files)):
            samples.append(Sample(where, turns, [images.path(file, where) for file in files]))
    images.check(str(path))
    if not samples:
        ignored.refuse_all()
    samples.note = ignored.note()
    if samples.note and os.environ.get("RANK", "0") == "0":
        warnings.warn(samples.note, stacklevel=2)
    return samples


def _short(value) -> str:
    """A value of a data file as a message names it: on one line, and not long."""
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:57] + "..."


def check_captions(samples: list[Sample]) -> None:
    """Raise UserError for a sample that is not one image with its caption, as the template plain needs."""
    for sample in samples:
        if len(sample.turns) != 2 or len(sample.images) != 1:
            raise UserError(
                f"{sample.where}: {len(sample.turns)} turns and {len(sample.images)} images, but template plain takes one "
                "image and its caption"
            )


def _read_list(path: Path) -> list:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
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


class ConversationDataset(Dataset):
    """Samples as token ids, labels and pixels. Each item is made when it is read.

    max_length: largest number of tokens of a sample, with its vision tokens. A longer sample is cut at the end with a
    warning, as LLaVA does. UserError if an image or every answer of the sample would be cut off.
    selection: how vision tokens are chosen. Their number depends on it.
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
        """Words of each sample, negative without image. Batches are grouped by this number."""
        return [sample.words for sample in progress_bar("lengths", self.samples, unit=" samples")]

    def __getitem__(self, index: int) -> dict:
        """One sample: input_ids, labels [S], pixels (list of [3, H, W] or [T, 3, H, W]), sizes [(width, height)]."""
        sample = self.samples[index]
        images = [_open(path, sample.where) for path in sample.images]
        ids, labels = labelled_tokens(sample.turns, self.template, self.tokenizer, with_images=bool(sample.images))
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
        """Number of vision tokens that the LLM reads for an image of `size` = (width, height)."""
        plan = tile_plan(size, self.model_config, self.selection.option("anyres"))
        vision = self.model_config.vision
        order = merge_order(plan, vision.image_size // vision.patch_size)
        patches = int((order != NEWLINE).sum())
        # A budget that reaches all patches means no selection, and the newline tokens stay, too.
        keeps_all = self.selection.method == "none" or self.selection.overall_tokens >= patches
        return len(order) if keeps_all else self.selection.overall_tokens

    def blank(self) -> dict:
        """A sample with a black image and no learnt label.

        It is added to a batch of texts, so that tower and projector run in every step on every rank. Without it, DDP
        would wait for gradients that one rank does not have, and ZeRO-3 for weights that it does not gather.
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
    """Makes one right-padded batch of items of a ConversationDataset. blank: see ConversationDataset.blank."""

    blank: Callable[[], dict]

    def __call__(self, items: list[dict]) -> dict:
        """The model's arguments: input_ids, labels, attention_mask [B, S], images and image_sizes in reading order."""
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

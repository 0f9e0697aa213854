"""Training pictures and questions as flat arrays. They are drawn once and stored under playground/train/."""

import multiprocessing
import os
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from llava.common.progress import progress_bar
from llava.mm_utils import cut_tiles, tile_plan
from llava.shapes.captions import MAX_TOKENS, PROMPT, caption
from llava.shapes.questions import ask_some
from llava.shapes.scenes import draw_scene, scene_rng
from llava.shapes.tokenizer import build_tokenizer
from llava.shapes.vocabulary import (
    COLOR_NAMES,
    KINDS,
    MAX_OBJECTS,
    PLURALS,
    PRACTICE_TYPES,
    QUESTION_TYPES,
    SHORT_ANSWER,
    SYSTEM,
    category_of,
)

BLOCK = 12  # tokens of the longest question, its cue and its answer
CAPTION_BLOCK = 11 + MAX_TOKENS  # the same for a caption; 11 are the question, its cue and `</s>`
FORMAT = 1  # part of the cache's name: increase it when the arrays change
_CATEGORIES = (*QUESTION_TYPES, *PRACTICE_TYPES)
_COVERED = 8  # an object owns a patch if it covers at least so many of its 64 pixels
_ARRAYS = ("tiles", "tile_objects", "first_tile", "sizes", "kinds", "colors", "questions", "cue", "category")


def prefix_ids():
    """Token ids of the text before the image: `<s>`, the system sentence, `USER:`."""
    return _tokenizer().encode(f"{SYSTEM} USER: ").ids


def question_ids(text):
    """Token ids of the text after the image: line feed, question, `ASSISTANT:`. There is no `<s>`."""
    return _tokenizer().encode(f"\n{text} ASSISTANT:", add_special_tokens=False).ids


@lru_cache(maxsize=1)
def _tokenizer():
    return build_tokenizer()


def word_id(word):
    """Token id of a word."""
    return _tokenizer().token_to_id(word)


def object_words(kind, color):
    """Words that name an object: its kind, colour, category and, for a shape, the plural."""
    words = [kind, color, category_of(kind)]
    return words + [PLURALS[kind]] if kind in PLURALS else words


@lru_cache(maxsize=1)
def naming_table():
    """float32 [kinds * colours, V]: 1 for each token that names an object. Its row is kind * len(colours) + colour."""
    table = torch.zeros(len(KINDS) * len(COLOR_NAMES), _tokenizer().get_vocab_size())
    for k, kind in enumerate(KINDS):
        for c, color in enumerate(COLOR_NAMES):
            for word in object_words(kind, color):
                table[k * len(COLOR_NAMES) + c, word_id(word)] = 1.0
    return table


def anyres_config(pinpoints, tile_size=96):
    """Configuration with the keys that llava.mm_utils.tile_plan reads. pinpoints: canvases; None: one tile."""
    return SimpleNamespace(
        mm_tile_size=tile_size,
        image_aspect_ratio="anyres" if pinpoints else "pad",
        image_grid_pinpoints=pinpoints,
        mm_patch_merge_type="spatial_unpad" if pinpoints else "flat",
    )


def scene_tiles(scene, pinpoints, patch=8):
    """(tiles uint8 [T, 96, 96, 3], patch owners int8 [T, 144]), cut exactly as in evaluation."""
    if not pinpoints:
        return scene.pixels[None], _patch_owners(scene.owner, patch)[None]
    plan = tile_plan(scene.size, anyres_config(pinpoints))
    tiles = np.stack([np.asarray(tile) for tile in cut_tiles(Image.fromarray(scene.pixels), plan)])
    # The owners go the same way as the pixels, but by nearest neighbour: a mean of two object numbers means nothing.
    # + 1, because an image of bytes cannot hold -1.
    owner = Image.fromarray((scene.owner + 1).astype(np.uint8))
    canvas = Image.new("L", plan.canvas, 0)
    canvas.paste(owner.resize(plan.resized, Image.Resampling.NEAREST), plan.offset)
    side, (across, down) = plan.tile_size, plan.grid
    crops = [
        canvas.crop((x * side, y * side, (x + 1) * side, (y + 1) * side)) for y in range(down) for x in range(across)
    ]
    views = [owner.resize((side, side), Image.Resampling.NEAREST), *crops]
    return tiles, np.stack([_patch_owners(np.asarray(view).astype(np.int8) - 1, patch) for view in views])


def _patch_owners(owner, patch):
    """int8 [P]: index of the object that covers most of each patch, or -1 if none covers enough."""
    rows, columns = owner.shape[0] // patch, owner.shape[1] // patch
    counts = np.stack(
        [(owner == number).reshape(rows, patch, columns, patch).sum((1, 3)) for number in range(MAX_OBJECTS)]
    )
    best = counts.argmax(0)
    return np.where(counts.max(0) >= _COVERED, best, -1).astype(np.int8).reshape(-1)


def _asked_ids(scene, rng, asked):
    """List of (ids of a question, its cue and its answer, number of ids of the answer, category) of one picture."""
    if asked.captions:
        answer = _tokenizer().encode(f"{caption(scene)} </s>", add_special_tokens=False).ids
        return [(question_ids(PROMPT) + answer, len(answer), -1)]
    return [
        ([*question_ids(question.text), word_id(question.answer)], 1, _CATEGORIES.index(question.category))
        for question in ask_some(scene, rng, asked.questions, asked.weights)
    ]


def _draw_chunk(job):
    family, split, start, count, asked, pinpoints = job
    out = {name: [] for name in _ARRAYS}
    for index in range(start, start + count):
        scene = draw_scene(family, split, index)
        tiles, owners = scene_tiles(scene, pinpoints)
        rows = _asked_ids(scene, scene_rng(family, split, index, stream=1), asked)
        blocks = np.full((len(rows), asked.block), word_id("<pad>"), np.int16)
        for row, (ids, _, _) in enumerate(rows):
            blocks[row, : len(ids)] = ids
        pad = [-1] * (MAX_OBJECTS - len(scene.objects))
        out["tiles"].append(tiles)
        out["tile_objects"].append(owners)
        out["first_tile"].append(len(tiles))
        out["sizes"].append(scene.size)
        out["kinds"].append([KINDS.index(placed.kind) for placed in scene.objects] + pad)
        out["colors"].append([COLOR_NAMES.index(placed.color) for placed in scene.objects] + pad)
        out["questions"].append(blocks)
        out["cue"].append([len(ids) - answer - 1 for ids, answer, _ in rows])  # the token before the answer
        out["category"].append([category for _, _, category in rows])
    join = {"tiles": np.concatenate, "tile_objects": np.concatenate}
    types = {"first_tile": np.int64, "sizes": np.int16}
    types |= dict.fromkeys(("kinds", "colors", "cue", "category"), np.int8)
    return {name: join[name](rows) if name in join else np.asarray(rows, types.get(name)) for name, rows in out.items()}


@dataclass(frozen=True)
class Asked:
    """What is asked about each picture: `questions` questions, drawn by `weights` (questions.ask_some), or one caption."""

    questions: int = 8
    weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    captions: bool = False

    @property
    def block(self):
        """Tokens of the longest question, its cue and its answer."""
        return CAPTION_BLOCK if self.captions else BLOCK

    def __str__(self):
        return "captions" if self.captions else f"{self.questions}-{'_'.join(f'{w:g}' for w in self.weights)}"


@dataclass
class PictureSet:
    """n pictures with Q questions each, as arrays that are memory-mapped from the cache.

    tiles uint8 [T, 96, 96, 3]; tile_objects int8 [T, 144]; first_tile int64 [n + 1]: picture i has the tiles
    first_tile[i] : first_tile[i + 1]. sizes [n, 2] (width, height); kinds, colors [n, 6], -1 if there is no object.
    questions int16 [n, Q, L], right-padded, the answer last; cue [n, Q]: index of the ":" before the answer. L is 12, and
    90 for captions, which end with `</s>`. category [n, Q]: index of the question's type, -1 for a caption.
    """

    tiles: np.ndarray
    tile_objects: np.ndarray
    first_tile: np.ndarray
    sizes: np.ndarray
    kinds: np.ndarray
    colors: np.ndarray
    questions: np.ndarray
    cue: np.ndarray
    category: np.ndarray

    def __len__(self):
        return len(self.sizes)

    @property
    def captions(self):
        """Whether each picture has a caption instead of questions."""
        return bool(self.category[0, 0] < 0)


def picture_set(family, split, start, count, asked, pinpoints, cache, processes=2):
    """PictureSet of the pictures start .. start + count - 1. They are drawn at first use and then read from `cache`."""
    key = f"{family}-{split}-{start}-{count}-{asked}-f{FORMAT}"
    folder = Path(cache) / key
    if not folder.exists():
        size = 250
        jobs = [
            (family, split, first, min(size, start + count - first), asked, pinpoints)
            for first in range(start, start + count, size)
        ]
        # imap keeps the order of the jobs, so the arrays do not depend on the number of processes.
        with multiprocessing.get_context("fork").Pool(min(processes, os.cpu_count() or 1, len(jobs))) as pool:
            drawn = pool.imap(_draw_chunk, jobs)
            chunks = [*progress_bar(f"drawing pictures, {size} each", drawn, total=len(jobs), unit=" parts")]
        # Written under another name and renamed: another run may draw the same pictures, or read the folder too early.
        part = folder.with_name(f"{key}.part{os.getpid()}")
        part.mkdir(parents=True, exist_ok=True)
        for name in _ARRAYS:
            array = np.concatenate([chunk[name] for chunk in chunks])
            if name == "first_tile":
                array = np.concatenate([[0], np.cumsum(array)])
            np.save(part / f"{name}.npy", array)
        try:
            part.rename(folder)
        except OSError:  # the other run was first, and its pictures are the same
            shutil.rmtree(part)
    return PictureSet(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS})


def with_suffix(blocks, cue):
    """Insert "\\nAnswer the question using a single word or phrase." before `ASSISTANT:` in every question.

    blocks int16 [..., 12], cue [...] -> blocks with as many more tokens as the sentence has, and a later cue.
    """
    suffix = np.asarray(_tokenizer().encode(f"\n{SHORT_ANSWER}", add_special_tokens=False).ids, blocks.dtype)
    longer = np.full((*blocks.shape[:-1], BLOCK + len(suffix)), word_id("<pad>"), blocks.dtype)
    # Questions of one length together: the place to insert depends on the length only.
    for length in np.unique(cue):
        rows = cue == length
        head, tail = blocks[rows][:, : length - 1], blocks[rows][:, length - 1 :]
        middle = np.broadcast_to(suffix, (len(head), len(suffix)))
        longer[rows] = np.concatenate([head, middle, tail], axis=1)
    return longer, cue + len(suffix)

"""Writes question files of the demo task in LLaVA's own layout.

    python -m llava.shapes.dataset --family v1.5 --split test --questions 1000 --out playground/data/eval/shapes-v1.5

writes OUT/images/*.png, OUT/questions.jsonl (question_id, image, text, category) and OUT/labels.jsonl (question_id, answer,
category). With --captions, each picture has one question, whose answer is its caption. The same arguments always give the same files; a folder that already holds them is left alone.
"""

import argparse
import json
import multiprocessing
import os
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from llava.common.errors import UserError, exits_cleanly
from llava.common.progress import progress_bar
from llava.shapes.captions import PROMPT, caption
from llava.shapes.questions import Question, ask
from llava.shapes.scenes import FAMILIES, SPLITS, draw_scene, scene_rng, scene_size
from llava.shapes.vocabulary import QUESTION_TYPES

PER_IMAGE = len(QUESTION_TYPES)  # questions that share a picture, unless they ask for captions
SEED_SETS = 3  # disjoint sets of scenes per split
_FORMAT = 1  # part of the folder's stamp: a new number makes all folders be written again


def scene_questions(family, split, index, seed_set=0):
    """(scene, questions) of one picture: one question of each type, in a fixed order.

    A type that is not possible for the scene is replaced by `exists`, which always is.
    """
    scene = draw_scene(family, split, index, seed_set)
    rng = scene_rng(family, split, index, seed_set, stream=1)
    return scene, [ask(scene, category, rng) or ask(scene, "exists", rng) for category in QUESTION_TYPES]


def scene_caption(family, split, index, seed_set=0):
    """(scene, questions) of one picture: the one question whose answer is the caption."""
    scene = draw_scene(family, split, index, seed_set)
    return scene, [Question(PROMPT, caption(scene), "caption")]


def is_test_picture(picture: Image.Image, questions: int) -> bool:
    """Return whether an RGB picture belongs to the first `questions` questions of a family's test split."""
    return any(
        scene_size(family, "test", index) == picture.size
        and np.array_equal(draw_scene(family, "test", index).pixels, np.asarray(picture))
        for family in FAMILIES
        for index in range(questions // PER_IMAGE)
    )


def write_dataset(family, split, questions, out, seed_set=0, captions=False):
    """Write the first `questions` questions of a split into the folder `out`. Returns `out` as a Path.

    seed_set: 0, 1 or 2, disjoint sets of scenes of the same split. Four questions share a picture; with `captions`, each
    picture has one question, and its answer is the picture's caption. UserError for bad arguments. A folder that is complete already is not written again.
    """
    # 1. Is the folder complete? If not, the record goes first: a stopped run must not leave it beside other files.
    _check(family, split, questions, seed_set)
    out = Path(out)
    stamp = {"family": family, "split": split, "questions": questions, "seed_set": seed_set, "format": _FORMAT}
    stamp |= {"captions": True} if captions else {}
    record = out / "dataset.json"
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == stamp:
        return out
    record.unlink(missing_ok=True)
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    for left_over in images.glob("*.png"):
        left_over.unlink()
    # 2. Draw the pictures.
    indices = range(questions if captions else -(-questions // PER_IMAGE))
    asked_of = partial(scene_caption if captions else scene_questions, family, split, seed_set=seed_set)
    work = partial(_write_scene, asked_of, images)
    # spawn would run a caller without a __main__ guard again from its start. Where fork is missing, one process draws.
    # A few pictures are drawn faster than processes start.
    forks = "fork" in multiprocessing.get_all_start_methods()
    if len(indices) < 64 or not forks:
        asked = [work(index) for index in indices]
    else:
        with multiprocessing.get_context("fork").Pool(min(2, os.cpu_count() or 1)) as pool:
            drawn = pool.imap(work, indices, chunksize=32)
            asked = [*progress_bar("drawing", drawn, total=len(indices), unit=" pictures")]
    # 3. Write questions and labels.
    rows = [(name, question) for name, group in asked for question in group][:questions]
    with (
        open(out / "questions.jsonl", "w", encoding="utf-8") as question_file,
        open(out / "labels.jsonl", "w", encoding="utf-8") as label_file,
    ):
        for number, (name, (text, answer, category)) in enumerate(rows, start=1):
            question = {"question_id": number, "image": name, "text": text, "category": category}
            label = {"question_id": number, "answer": answer, "category": category}
            question_file.write(json.dumps(question) + "\n")
            label_file.write(json.dumps(label) + "\n")
    # 4. The record comes last, so a folder that has it is complete.
    record.write_text(json.dumps(stamp) + "\n", encoding="utf-8")
    return out


def _write_scene(asked_of, images, index):
    scene, asked = asked_of(index)
    name = f"{index + 1:06d}.png"
    # The pictures are noise, which hardly compresses, and writing should not take longer than drawing.
    Image.fromarray(scene.pixels).save(images / name, compress_level=1)
    return name, [(question.text, question.answer, question.category) for question in asked]


def _check(family, split, questions, seed_set):
    if family not in FAMILIES:
        raise UserError(f"family is {family!r}, allowed are {', '.join(FAMILIES)}")
    if split not in SPLITS:
        raise UserError(f"split is {split!r}, allowed are {', '.join(SPLITS)}")
    if isinstance(questions, bool) or not isinstance(questions, int) or questions < 1:
        raise UserError(f"questions is {questions!r}, allowed is a whole number from 1")
    if seed_set not in range(SEED_SETS):
        raise UserError(f"set is {seed_set!r}, allowed are 0, 1 and 2")


def _whole_number(text):
    # Text that is not a number passes through, so that _check reports it in its own words.
    try:
        return int(text)
    except ValueError:
        return text


@exits_cleanly
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="v1.5", help="v1.5 (one tile) or v1.6 (several); default v1.5")
    parser.add_argument("--split", default="test", help="train, validation or test; default test")
    parser.add_argument("--questions", type=_whole_number, default=1000, help="number of questions; default 1000")
    parser.add_argument(
        "--set", dest="seed_set", type=_whole_number, default=0, help="0, 1 or 2: disjoint sets; default 0"
    )
    parser.add_argument("--captions", action="store_true", help="ask for one caption per picture")
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args(argv)
    try:
        out = write_dataset(args.family, args.split, args.questions, args.out, args.seed_set, args.captions)
    except OSError as error:
        raise UserError(f"cannot write the questions to {args.out}: {error.strerror or error}") from error
    print(f"{args.questions} questions of {args.family} {args.split} in {out}")


if __name__ == "__main__":
    main()

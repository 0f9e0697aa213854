"""Recipes: functions that convert the public data set of a benchmark to LLaVA's files, one function per benchmark.

Column names are those of the data sets on the Hugging Face hub (lmms-lab/*). If a data set has another selection of
questions than LLaVA's own file, `RECIPES` has the data set's count, and `note` says what is different.

A recipe takes the benchmark and the rows of its tables, writes all files, and returns the number of questions. The
question file is written last: if it exists, the other files are complete.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import as_user_error_on_write, write_atomically, write_json, write_rows
from llava.eval.benchmarks import Benchmark, mme, pope, vizwiz
from llava.eval.scoring.annotations import OPTION_LETTER, SHORT_ANSWER

# The columns of the authors' .tsv, in their order.
MMBENCH_COLUMNS = (
    "index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category", "comment",
    "split",
)  # fmt: skip
# "question_type" of the official SEED-Bench.json, which the data set on the hub lacks.
SEED_TYPES = {
    "Scene Understanding": 1,
    "Instance Identity": 2,
    "Instance Attributes": 3,
    "Instance Location": 4,
    "Instances Counting": 5,
    "Spatial Relation": 6,
    "Instance Interaction": 7,
    "Visual Reasoning": 8,
    "Text Understanding": 9,
    "Action Recognition": 10,
    "Action Prediction": 11,
    "Procedure Understanding": 12,
}


@dataclass(frozen=True)
class Recipe:
    """The conversion of one benchmark.

    repo: data set on the hub. parts: split -> ((configuration, split) pairs of `repo` to read, number of questions).
    convert: the function that writes the files. note: printed after the conversion.
    """

    repo: str
    parts: dict[str, tuple[list[tuple[str, str]], int]]
    convert: Callable[..., int]
    note: str = ""


def image_bytes(image) -> bytes:
    """Return the image file as it was uploaded. ValueError if the column has none."""
    # Not decoded and encoded again: that would change the pixels of a JPEG.
    if not isinstance(image, dict) or not image.get("bytes"):
        raise ValueError("an image column that holds no file")
    return image["bytes"]


def write_image(folder: Path, name: str, content: bytes) -> None:
    """Write folder/name, unless it exists in full. Raises UserError for a name that leads out of the folder."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f'image name "{name}" leads out of {folder}')
    # After an interruption, the same command continues: images that are there are not written again.
    if path.is_file() and path.stat().st_size == len(content):
        return
    with as_user_error_on_write(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(content)
        os.replace(temporary, path)


def vqav2_val(benchmark: Benchmark, rows: Iterable[dict]) -> int:
    """Write VQAv2 val in the official format."""
    questions, annotations = [], []
    for row in rows:
        ids = {"image_id": row["image_id"], "question_id": row["question_id"]}
        write_image(benchmark.image_folder, f"COCO_val2014_{row['image_id']:012d}.jpg", image_bytes(row["image"]))
        questions.append({**ids, "question": row["question"]})
        names = ("question_type", "answer_type", "multiple_choice_answer", "answers")
        annotations.append({**ids, **{name: row[name] for name in names}})
    write_json(benchmark.labels, {"annotations": annotations}, indent=None)
    write_json(benchmark.question_file, {"questions": questions}, indent=None)
    return len(questions)


def gqa(benchmark: Benchmark, instructions: Iterable[dict], images: Iterable[dict]) -> int:
    """Write GQA testdev-balanced. Questions and images are two tables of the data set."""
    for row in images:
        write_image(benchmark.image_folder, f"{row['id']}.jpg", image_bytes(row["image"]))
    labels = {row["id"]: {name: value for name, value in row.items() if name != "id"} for row in instructions}
    rows = [
        _question(key, f"{entry['imageId']}.jpg", entry["question"] + SHORT_ANSWER) for key, entry in labels.items()
    ]
    write_json(benchmark.labels, labels, indent=None)
    write_rows(benchmark.question_file, rows)
    return len(rows)


def vizwiz_both(benchmark: Benchmark, rows: Iterable[dict]) -> int:
    """Write VizWiz: val in the official format, test in LLaVA's."""
    entries = []
    for row in rows:
        name = f"{row['question_id']}.jpg"
        write_image(benchmark.image_folder, name, image_bytes(row["image"]))
        answers = [{"answer": answer} for answer in row["answers"] or []]
        entries.append({"image": name, "question": row["question"], "answers": answers, "answer_type": row["category"]})
    if benchmark.split == "val":
        write_json(benchmark.question_file, entries, indent=None)
    else:
        ask = vizwiz.UNANSWERABLE + SHORT_ANSWER
        questions = [_question(entry["image"], entry["image"], entry["question"] + ask) for entry in entries]
        write_rows(benchmark.question_file, questions)
    return len(entries)


def sqa(benchmark: Benchmark, rows: Iterable[dict]) -> int:
    """Write ScienceQA. The data set has no problem ids, so the row number is used as id."""
    conversations, problems = [], {}
    for number, row in enumerate(rows, 1):
        key, image = str(number), row["image"]
        # The format "CQM-A" of LLaVA's file: context, question, options; the answer is a letter.
        hint = f"Context: {row['hint']}\n" if row["hint"] else ""
        options = "".join(f"\n{letter}. {choice}" for letter, choice in zip("ABCDE", row["choices"], strict=False))
        value = ("<image>\n" if image else "") + hint + row["question"] + options
        turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "ABCDE"[row["answer"]]}]
        conversation = {"id": key, "conversations": turns}
        if image:
            conversation["image"] = f"{key}/image.png"
            write_image(benchmark.image_folder, conversation["image"], image_bytes(image))
        conversations.append(conversation)
        problems[key] = {name: value for name, value in row.items() if name != "image"}
    write_json(benchmark.folder / "problems.json", problems, indent=None)
    write_json(benchmark.folder / "pid_splits.json", {"test": list(problems)}, indent=None)
    write_json(benchmark.question_file, conversations, indent=None)
    return len(conversations)


def textvqa(benchmark: Benchmark, rows: Iterable[dict]) -> int:
    """Write TextVQA val, with the OCR tokens in the prompt as in LLaVA's file."""
    questions, data = [], []
    for row in rows:
        image = f"{row['image_id']}.jpg"
        write_image(benchmark.image_folder, image, image_bytes(row["image"]))
        # LLaVA's file has a capital at the start of each question, and the OCR tokens in a line of their own.
        tokens = "\nReference OCR token: " + ", ".join(row["ocr_tokens"])
        questions.append(_question(row["image_id"], image, row["question"].capitalize() + tokens + SHORT_ANSWER))
        data.append({name: row[name] for name in ("question_id", "image_id", "question", "answers")})
    write_json(benchmark.labels, {"data": data}, indent=None)
    write_rows(benchmark.question_file, questions)
    return len(questions)


def pope_all(benchmark: Benchmark, rows: Iterable[dict]) -> int:
    """Write POPE: questions of all three categories in one file, labels in three."""
    questions, labels = [], {category: [] for category in pope.CATEGORIES}
    for number, row in enumerate(rows, 1):
        content = image_bytes(row["image"])
        # An image has many rows. Its name, or else a hash of its content, keeps it to one file.
        image = f"{row.get('image_source') or hashlib.sha256(content).hexdigest()[:20]}.jpg"
        write_image(benchmark.image_folder, image, content)
        questions.append(
            {**_question(number, image, row["question"] + SHORT_ANSWER), "category": row["category"].lower()}
        )
        label = {"question_id": number, "image": image, "text": row["question"], "label": row["answer"].lower()}
        labels[row["category"].lower()].append(label)
    for category, lines in labels.items():
        write_rows(pope.label_file(benchmark.folder / "coco", category), lines)
    write_rows(benchmark.question_file, questions)
    return len(questions)


def mme_all(benchmark: Benchmark, rows: Iterable[dict]) -> int:
    """Write MME: LLaVA's questions, and the .txt files of the release."""
    questions, texts = [], {}
    for row in rows:
        name, task = row["question_id"], row["category"]
        write_image(benchmark.image_folder, name, image_bytes(row["image"]))
        # Some sub-tasks of the release have images/ and questions_answers_YN/, the others have all files side by side.
        nested = "questions_answers_YN/" if "/images/" in name else ""
        path = benchmark.image_folder / task / f"{nested}{Path(name).stem}.txt"
        texts[path] = texts.get(path, "") + f"{row['question']}\t{row['answer']}\n"
        # The question ends with the release's instruction. LLaVA asks with its own.
        bare = row["question"].replace(mme.YES_NO, "").strip()
        questions.append({**_question(name, name, bare + SHORT_ANSWER), "category": task})
    for path, text in texts.items():
        with as_user_error_on_write(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    write_rows(benchmark.question_file, questions)
    return len(questions)


def mmbench(benchmark: Benchmark, rows: Iterable[dict]) -> int:
    """Write MMBench as the authors' .tsv, with the images in base64."""
    text, count = io.StringIO(), 0
    table = csv.DictWriter(text, MMBENCH_COLUMNS, delimiter="\t", restval="", extrasaction="ignore")
    table.writeheader()
    for row in rows:
        # The data sets do not agree on the capital L. Left as it is, the column would be dropped as unknown.
        row = {name.replace("L2-", "l2-"): "" if value is None else value for name, value in row.items()}
        table.writerow({**row, "image": base64.b64encode(image_bytes(row["image"])).decode()})
        count += 1
    with as_user_error_on_write(benchmark.folder):
        benchmark.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(benchmark.question_file, text.getvalue())
    return count


def mmvet(benchmark: Benchmark, rows: Iterable[dict]) -> int:
    """Write MM-Vet: LLaVA's questions, and mm-vet.json for a judge."""
    questions, labels = [], {}
    for row in rows:
        key = row["question_id"]
        write_image(benchmark.image_folder, f"{key}.png", image_bytes(row["image"]))
        questions.append({"question_id": int(key.removeprefix("v1_")), "image": f"{key}.png", "text": row["question"]})
        entry = {"imagename": f"{key}.png", "question": row["question"], "answer": row["answer"]}
        labels[key] = {**entry, "capability": [part.strip() for part in row["capability"].split(",")]}
    write_json(benchmark.labels, labels, indent=None)
    write_rows(benchmark.question_file, questions)
    return len(questions)


def seed(benchmark: Benchmark, rows: Iterable[dict]) -> int:
    """Write the image questions of SEED-Bench."""
    questions, labels = [], []
    for row in rows:
        # Questions about videos are not part of the benchmark here.
        if row["data_type"] != "image":
            continue
        # The column has a string or a list of one string.
        data_id = row["data_id"] if isinstance(row["data_id"], str) else row["data_id"][0]
        image = f"SEED-Bench-image/{Path(data_id).name}"
        write_image(benchmark.image_folder, image, image_bytes(row["image"][0]))
        options = "".join(f"\n{letter}. {row[f'choice_{letter.lower()}']}" for letter in "ABCD")
        kind = int(row["question_type_id"])
        questions.append(
            {**_question(row["question_id"], image, row["question"] + options + OPTION_LETTER), "category": kind}
        )
        names = ("question_id", "question", "answer", "data_type")
        labels.append({**{name: row[name] for name in names}, "data_id": data_id, "question_type_id": kind})
    write_json(benchmark.labels, {"question_type": SEED_TYPES, "questions": labels}, indent=None)
    write_rows(benchmark.question_file, questions)
    return len(questions)


def _question(key: int | str, image: str, text: str) -> dict:
    """Return a row of a question file in LLaVA's format."""
    return {"question_id": key, "image": image, "text": text, "category": "default"}


# The number of questions is checked after a conversion: a data set that has changed, or a copy that is not complete,
# would give a score that cannot be compared.
RECIPES = {
    "vqav2": Recipe("lmms-lab/VQAv2", {"val": ([("default", "validation")], 214354)}, vqav2_val),
    "gqa": Recipe(
        "lmms-lab/GQA",
        {
            "testdev-balanced": (
                [("testdev_balanced_instructions", "testdev"), ("testdev_balanced_images", "testdev")],
                12578,
            )
        },
        gqa,
    ),
    "vizwiz": Recipe(
        "lmms-lab/VizWiz-VQA",
        {"test": ([("default", "test")], 8000), "val": ([("default", "val")], 4319)},
        vizwiz_both,
    ),
    "sqa": Recipe("lmms-lab/ScienceQA", {"test": ([("ScienceQA-FULL", "test")], 4241)}, sqa),
    "textvqa": Recipe("lmms-lab/textvqa", {"val": ([("default", "validation")], 5000)}, textvqa),
    "pope": Recipe(
        "lmms-lab/POPE",
        {"test": ([("default", "test")], 9000)},
        pope_all,
        "LLaVA's own file has 8,910 questions: 90 fewer in the category random",
    ),
    "mme": Recipe("lmms-lab/MME", {"test": ([("default", "test")], 2374)}, mme_all),
    "mmbench": Recipe(
        "lmms-lab/MMBench_EN",
        {"dev": ([("default", "dev")], 4377), "test": ([("default", "test")], 6718)},
        mmbench,
    ),
    "mmbench_cn": Recipe(
        "lmms-lab/MMBench_CN",
        {"dev": ([("default", "dev")], 4329), "test": ([("default", "test")], 6666)},
        mmbench,
    ),
    "mmvet": Recipe("lmms-lab/MMVet", {"test": ([("default", "test")], 218)}, mmvet),
    "seed": Recipe("lmms-lab/SEED-Bench", {"image": ([("default", "test")], 14233)}, seed),
}

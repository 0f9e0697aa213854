"""Every benchmark in miniature: a few questions, images and annotations in the real layout, for the tests.

    make_benchmark("pope", tmp_path / "data", questions=8)

All splits of the benchmark are made. The right answer to question i is known from `i` alone: "yes" where i is even,
else "no"; the letter "AB"[i % 2]; the words of `WORDS[i % len(WORDS)]`.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import random
from pathlib import Path

from PIL import Image

WORDS = ("red", "2", "yes", "left side")
SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
QUESTIONS = ("What colour is the shape?", "How many shapes are there?", "Is there a shape?", "Where is the shape?")


def make_benchmark(name: str, root: Path, questions: int = 8) -> None:
    """Write benchmark `name` below root/<its folder>; `questions` per split (rounded up to whole pairs or groups)."""
    MAKERS[name](Path(root), questions)


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def picture(i: int) -> Image.Image:
    width, height = 60 + 3 * i, 50 + 7 * i
    return Image.frombytes("RGB", (width, height), random.Random(i).randbytes(3 * width * height))


def write_image(path: Path, i: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(i).save(path)


def yes_no(i: int) -> str:
    return "no" if i % 2 else "yes"


def ten_answers(i: int) -> list[str]:
    """What ten people answered: seven say the word, three another."""
    return [WORDS[i % len(WORDS)]] * 7 + ["unanswerable"] * 3


def make_vqav2(root: Path, questions: int) -> None:
    folder = root / "vqav2"
    rows = []
    for i in range(questions):
        name = f"COCO_test2015_{i // 2:012d}.jpg"
        write_image(folder / "test2015" / name, i // 2)
        text = QUESTIONS[i % 4] + SHORT
        rows.append({"question_id": 1000 + i, "image": name, "text": text, "category": "default"})
    write_rows(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", rows)
    unasked = {"question_id": 9999, "image": rows[0]["image"], "text": "Not asked?", "category": "default"}
    write_rows(folder / "llava_vqav2_mscoco_test2015.jsonl", [*rows, unasked])
    asked, annotations = [], []
    for i in range(questions):
        write_image(folder / "val2014" / f"COCO_val2014_{i // 2:012d}.jpg", i // 2)
        ids = {"image_id": i // 2, "question_id": 2000 + i}
        asked.append({**ids, "question": QUESTIONS[i % 4]})
        answers = [
            {"answer": text, "answer_confidence": "yes", "answer_id": j} for j, text in enumerate(ten_answers(i), 1)
        ]
        kind = ("other", "number", "yes/no", "other")[i % 4]
        more = {"question_type": "what", "answer_type": kind, "multiple_choice_answer": answers[0]["answer"]}
        annotations.append({**ids, **more, "answers": answers})
    write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": asked})
    write_json(folder / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})


def make_gqa(root: Path, questions: int) -> None:
    folder = root / "gqa"
    rows, labels = [], {}
    for i in range(questions):
        image = f"n{i // 4}"
        write_image(folder / "data" / "images" / f"{image}.jpg", i // 4)
        key = f"20{i:06d}"
        text = QUESTIONS[i % 4] + SHORT
        rows.append({"question_id": key, "image": f"{image}.jpg", "text": text, "category": "default"})
        labels[key] = {
            "question": QUESTIONS[i % 4],
            "imageId": image,
            "answer": WORDS[i % 4],
            "isBalanced": True,
            "types": {"structural": ("query", "verify")[i % 2], "semantic": "attr", "detailed": "x"},
        }
    write_rows(folder / "llava_gqa_testdev_balanced.jsonl", rows)
    write_json(folder / "data" / "testdev_balanced_questions.json", labels)


def make_vizwiz(root: Path, questions: int) -> None:
    folder = root / "vizwiz"
    rows, labels = [], []
    hint = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    for i in range(questions):
        name = f"VizWiz_test_{i:08d}.jpg"
        write_image(folder / "test" / name, i)
        text = QUESTIONS[i % 4] + hint + SHORT
        rows.append({"question_id": name, "image": name, "text": text, "category": "default"})
        name = f"VizWiz_val_{i:08d}.jpg"
        write_image(folder / "val" / name, i)
        answers = [{"answer": text, "answer_confidence": "yes"} for text in ten_answers(i)]
        more = {"answers": answers, "answer_type": "other", "answerable": 1}
        labels.append({"image": name, "question": QUESTIONS[i % 4], **more})
    write_rows(folder / "llava_test.jsonl", rows)
    write_json(folder / "val.json", labels)


def make_sqa(root: Path, questions: int) -> None:
    """Two of three questions have an image."""
    folder = root / "scienceqa"
    rows, problems = [], {}
    for i in range(questions):
        key, image = str(10 + i), i % 3 != 2
        problems[key] = {
            "question": QUESTIONS[i % 4],
            "choices": ["red", "blue"],
            "answer": i % 2,
            "hint": "Look closely." if i % 2 else "",
            "image": "image.png" if image else None,
            "split": "test",
        }
        context = "Context: Look closely.\n" if i % 2 else ""
        value = ("<image>\n" if image else "") + f"{context}{QUESTIONS[i % 4]}\nA. red\nB. blue"
        turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "AB"[i % 2]}]
        row = {"id": key, "conversations": turns}
        if image:
            row["image"] = f"{key}/image.png"
            write_image(folder / "images" / "test" / key / "image.png", i)
        rows.append(row)
    problems["9"] = {"question": "Of the training split?", "choices": ["a", "b"], "answer": 0, "split": "train"}
    write_json(folder / "llava_test_CQM-A.json", rows)
    write_json(folder / "problems.json", problems)
    write_json(folder / "pid_splits.json", {"train": ["9"], "test": [row["id"] for row in rows]})


def make_textvqa(root: Path, questions: int) -> None:
    """Two questions per image, which share their question_id in LLaVA's file."""
    folder = root / "textvqa"
    rows, data = [], []
    for i in range(questions):
        image = f"{i // 2:016x}"
        write_image(folder / "train_images" / f"{image}.jpg", i // 2)
        text = f"{QUESTIONS[i % 4]}\nReference OCR token: STOP, {i}{SHORT}"
        rows.append({"question_id": image, "image": f"{image}.jpg", "text": text, "category": "default"})
        answers = ten_answers(i)
        data.append({"question_id": 34602 + i, "image_id": image, "question": QUESTIONS[i % 4], "answers": answers})
    write_rows(folder / "llava_textvqa_val_v051_ocr.jsonl", rows)
    write_json(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "dataset_version": "0.5.1", "data": data})


def make_pope(root: Path, questions: int) -> None:
    """The categories in turn; every category asks about every image. "an umbrella" is misspelt as in LLaVA's file."""
    folder = root / "pope"
    rows, labels = [], {category: [] for category in ("adversarial", "popular", "random")}
    things = ("a dog", "an umbrella", "a car", "a person")
    for i in range(questions):
        category, j = list(labels)[i % 3], i // 3
        image = f"COCO_val2014_{j // 4:012d}.jpg"
        write_image(folder / "val2014" / image, j // 4)
        asked = f"Is there {things[j % 4]} in the "
        text = asked + ("imange?" if things[j % 4].startswith("an ") else "image?")
        rows.append({"question_id": i + 1, "image": image, "text": text + SHORT, "category": category})
        labels[category].append({"question_id": j + 1, "image": image, "text": asked + "image?", "label": yes_no(i)})
    write_rows(folder / "llava_pope_test.jsonl", rows)
    for category, lines in labels.items():
        write_rows(folder / "coco" / f"coco_pope_{category}.json", lines)


def make_mme(root: Path, questions: int) -> None:
    """Pairs over four categories, of both layouts of the release, one of them a cognition task."""
    folder = root / "MME"
    release = folder / "MME_Benchmark_release_version"
    rows = []
    for i in range((questions + 1) // 2):
        category = ("existence", "artwork", "code_reasoning", "posters")[i % 4]
        nested = category in ("artwork", "posters")
        image = f"{category}/images/{i:04d}.png" if nested else f"{category}/{i:04d}.png"
        write_image(release / image, i)
        gap = "  " if category == "code_reasoning" else " "  # both spacings occur in the release
        lines = []
        for text, label in ((QUESTIONS[2], "Yes"), ("Is there a ship?", "No")):
            lines.append(f"{text}{gap}Please answer yes or no.\t{label}\n")
            rows.append({"question_id": image, "image": image, "text": text + SHORT, "category": category})
        annotation = release / category / ("questions_answers_YN" if nested else "") / f"{i:04d}.txt"
        annotation.parent.mkdir(parents=True, exist_ok=True)
        annotation.write_text("".join(lines), encoding="utf-8")
    write_rows(folder / "llava_mme.jsonl", rows)


def _base64_png(i: int) -> str:
    buffer = io.BytesIO()
    picture(i).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _write_mmbench(path: Path, questions: int, labelled: bool) -> None:
    """Groups of rotations: two rows for a question of two options, index and index + 1,000,000."""
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source"]
    columns += ["l2-category", "comment", "split"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, columns, delimiter="\t", restval="")
        table.writeheader()
        for i in range((questions + 1) // 2):
            for turn in range(2):
                options = ("red", "blue")[:: -1 if turn else 1]
                row = {"index": 241 + i + 1000000 * turn, "question": QUESTIONS[i % 4], "A": options[0]}
                row |= {"B": options[1], "image": _base64_png(i), "category": ("colour", "place")[i % 2]}
                row |= {"hint": 'A "hint".\nOf two lines.' if i % 2 else "", "source": "made", "l2-category": "all"}
                row |= {"split": path.stem.split("_")[1]}
                if labelled:
                    row["answer"] = "AB"[(i + turn) % 2]
                table.writerow(row)


def make_mmbench(root: Path, questions: int) -> None:
    _write_mmbench(root / "mmbench" / "mmbench_dev_20230712.tsv", questions, labelled=True)
    _write_mmbench(root / "mmbench" / "mmbench_test_20230712.tsv", questions, labelled=False)


def make_mmbench_cn(root: Path, questions: int) -> None:
    _write_mmbench(root / "mmbench" / "mmbench_dev_cn_20231003.tsv", questions, labelled=True)
    _write_mmbench(root / "mmbench" / "mmbench_test_cn_20231003.tsv", questions, labelled=False)


def make_mmvet(root: Path, questions: int) -> None:
    folder = root / "mm-vet"
    rows, labels = [], {}
    for i in range(questions):
        name = f"v1_{i}.png"
        write_image(folder / "images" / name, i)
        rows.append({"question_id": i, "image": name, "text": QUESTIONS[i % 4]})
        labels[f"v1_{i}"] = {
            "imagename": name,
            "question": QUESTIONS[i % 4],
            "answer": WORDS[i % 4],
            "capability": ["rec"] if i % 2 else ["rec", "ocr"],
        }
    write_rows(folder / "llava-mm-vet.jsonl", rows)
    write_json(folder / "mm-vet.json", labels)


def make_seed(root: Path, questions: int) -> None:
    """The image questions, and one more about a video, which is not asked."""
    folder = root / "seed_bench"
    rows, labels = [], []
    for i in range(questions + 1):
        video = i == questions
        data_id = f"{i // 2}_100{i // 2}"
        image = f"SEED-Bench-video-image/{i}.png" if video else f"SEED-Bench-image/{data_id}"
        image_file = folder / image
        image_file.parent.mkdir(parents=True, exist_ok=True)
        picture(i // 2).save(image_file, "PNG")  # the release's image names have no ending
        text = f"{QUESTIONS[i % 4]}\nA. red\nB. blue\nC. two\nD. left{LETTER}"
        key = f"v{i}" if video else 101000 + i
        kind = 10 if video else 1 + i % 2
        rows.append({"image": image, "text": text, "category": kind, "question_id": key})
        labels.append(
            {
                "question_id": str(key),
                "question": QUESTIONS[i % 4],
                "choice_a": "red",
                "choice_b": "blue",
                "choice_c": "two",
                "choice_d": "left",
                "answer": "AB"[i % 2],
                "data_id": data_id,
                "data_type": "video" if video else "image",
                "question_type_id": kind,
            }
        )
    types = {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10}
    write_rows(folder / "llava-seed-bench.jsonl", rows)
    write_json(folder / "SEED-Bench.json", {"question_type": types, "questions": labels})


MAKERS = {
    "vqav2": make_vqav2,
    "gqa": make_gqa,
    "vizwiz": make_vizwiz,
    "sqa": make_sqa,
    "textvqa": make_textvqa,
    "pope": make_pope,
    "mme": make_mme,
    "mmbench": make_mmbench,
    "mmbench_cn": make_mmbench_cn,
    "mmvet": make_mmvet,
    "seed": make_seed,
}

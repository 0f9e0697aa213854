"""MMBench (arXiv 2307.06281), English: local circular accuracy on dev, and the server's upload file for dev and test.

Files in mmbench/: mmbench_dev_20230712.tsv or mmbench_test_20230712.tsv. They contain the images in base64, which are
unpacked into mmbench/images on the first run. A question is asked once per rotation of its options; the indices of
these rows are equal modulo 1,000,000. It counts as right only if all its rotations are right (circular evaluation).
The server matches free text with an LLM, this scorer matches letters only, so the two may differ a little. Answers are
joined by index.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Hashable
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import as_user_error_on_write
from llava.common.progress import progress_bar
from llava.eval.benchmarks.base import Benchmark
from llava.eval.benchmarks.questions import Sample, make_samples, refuse_repeated_ids
from llava.eval.scoring.annotations import OPTION_LETTER
from llava.eval.scoring.match_answers import join, mean
from llava.eval.scoring.multiple_choice import option_letter
from llava.eval.scoring.verdicts import MEAN, Verdict

# The row of rotation r of question i has the index i + r * ROTATION.
ROTATION = 1_000_000
LETTERS = "ABCD"
# Cells that are missing for pandas.read_table, with which LLaVA reads these files. LLaVA itself adds the words nan and
# none in any case.
MISSING = frozenset(
    ("#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>")
    + ("N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null")
)
UNWRITABLE = re.compile("[\0-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")  # characters that XML does not have
NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category", "L2-category")


class MMBench(Benchmark):
    """MMBench in English: dev is scored here, test only by the server."""

    name = "mmbench"
    splits = ("dev", "test")
    headline = "accuracy"
    max_new_tokens = 1024  # LLaVA's model_vqa_mmbench
    download_page = "https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md#mmbench"
    files = {"dev": "mmbench_dev_20230712.tsv", "test": "mmbench_test_20230712.tsv"}
    instruction = OPTION_LETTER

    @property
    def folder(self) -> Path:
        return self.data_root / "mmbench"

    @property
    def question_file(self) -> Path:
        return self.folder / self.files[self.split]

    @property
    def image_folder(self) -> Path:
        return self.folder / "images"

    def group(self, sample: Sample) -> Hashable:
        return sample.question_id % ROTATION

    def make_data(self) -> None:
        """Unpack the images. The file name is a hash of the content, so rotations of a question share one file."""
        if not self.question_file.is_file():
            return
        with as_user_error_on_write(self.image_folder):
            self.image_folder.mkdir(exist_ok=True)
            for row in progress_bar("images", read_table(self.question_file), unit=" rows"):
                content = _content(row, self.question_file)
                path = self.image_folder / _name(content)
                # Another run may unpack at the same time. With the rename, no run ever sees half of an image.
                if not path.exists():
                    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
                    temporary.write_bytes(content)
                    os.replace(temporary, path)

    def prompt(self, row: dict) -> str:
        return row["text"] + self.instruction

    def read(self) -> list[Sample]:
        rows = []
        for row in read_table(self.question_file):
            image = _name(_content(row, self.question_file))
            rows.append({**row, "question_id": row["index"], "image": image, "text": question(row)})
        samples = make_samples(list(enumerate(rows, 1)), self.question_file, self.prompt, unit="row")
        refuse_repeated_ids(samples, self.question_file)
        return samples

    def annotations(self) -> tuple[Path, list[tuple]] | None:
        if self.split != "dev":
            return None
        table = read_table(self.question_file)
        labels = [(row["index"], row["answer"]) for row in table if "answer" in row]
        for row in table:
            if row.get("answer", "A") not in row.keys() & set(LETTERS):
                where = f"{self.question_file}, index {row['index']}"
                raise UserError(f'{where}: "answer" is {row["answer"]!r}, allowed is one of its options')
        return self.question_file, labels

    def score(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        """Return the circular accuracy (dev), and write the upload file if all questions were asked."""
        answers = [(sample.question_id, row["text"]) for sample, row in zip(samples, rows, strict=True)]
        table = [sample.row for sample in samples]
        # An upload has to cover the whole split.
        if self.partial is None:
            place = self.folder / "answers_upload" / self.question_file.stem
            upload = self.upload_file(folder, place, "xlsx")
            write_upload(dict(answers), table, upload)
            written = {"upload": str(upload), "answered": len(answers)}
        else:
            written = {}
        return {**(score(answers, table, self.question_file) if self.split == "dev" else {}), **written}

    def verdicts(self, samples: list[Sample], rows: list[dict], folder: Path) -> list[Verdict] | None:
        """Return one verdict per rotation; None for test.

        The terms of a question are in the verdict of its last rotation, because only then it is known whether all of
        them are right.
        """
        if self.split != "dev":
            return None
        left = Counter(self.group(sample) for sample in samples)
        whole: dict[Hashable, bool] = defaultdict(lambda: True)
        verdicts = []
        for sample, row in zip(samples, rows, strict=True):
            question_, answer = self.group(sample), sample.row["answer"]
            right = option_letter(row["text"], LETTERS) == answer
            left[question_] -= 1
            whole[question_] &= right
            terms = () if left[question_] else ((MEAN, float(whole[question_]), 1.0),)
            expected = f"{answer}. {sample.row.get(answer, '')}".rstrip(". ")
            verdicts.append(Verdict(float(right), expected, (sample.row.get("category", "all"),), terms))
        return verdicts


def read_table(path: Path) -> list[dict]:
    """The rows of an MMBench .tsv: column -> text, without missing cells; "index" is a number.

    A question is text whatever it says, even "None". An "image" that is another row's index stands for that row's
    image. UserError says what is wrong with the file.
    """
    # The default limit (131,072 characters) is below the size of an image in base64. It is global, so it is restored.
    limit = csv.field_size_limit(1 << 30)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a table ({error})") from None
    finally:
        csv.field_size_limit(limit)
    for number, row in enumerate(rows, 1):
        missing = [name for name in ("index", "question", "A") if not row.get(name)]
        missing += ["image"] if _missing(row.get("image")) else []
        if missing or None in row or None in row.values() or not _is_number(row["index"]):
            what = f"lacks {', '.join(missing)}" if missing else "is not a row of the table"
            raise UserError(f"{path}, row {number} of {len(rows)}: {what}; is the file cut off?")
        row["index"] = int(row["index"])
    images = {str(row["index"]): row["image"] for row in rows}
    for row in rows:
        if _is_number(row["image"]) and row["image"] not in images:
            where = f"{path}, index {row['index']}"
            raise UserError(f"{where}: its image is that of index {row['image']}, which is not there")
    return [
        {name: cell for name, cell in row.items() if name in ("index", "question") or not _missing(cell)}
        | {"image": images.get(row["image"], row["image"])}
        for row in rows
    ]


def _is_number(cell: str) -> bool:
    return cell.isascii() and cell.isdigit()


def _missing(cell: str | None) -> bool:
    return not cell or cell in MISSING or cell.lower() in ("nan", "none")


def question(row: dict) -> str:
    """Return hint, question and options, one per line. The options A. to D. end at the first that is missing."""
    lines = [row["hint"]] if "hint" in row else []
    lines.append(row["question"])
    for letter in LETTERS:
        if letter not in row:
            break
        lines.append(f"{letter}. {row[letter]}")
    return "\n".join(lines)


def _content(row: dict, path: Path) -> bytes:
    """Return the image file of a row. Raises UserError if its cell is not base64."""
    try:
        return base64.b64decode(row["image"], validate=True)
    except ValueError:
        raise UserError(f"{path}, index {row['index']}: its image is not base64; is the file cut off?") from None


def _name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20] + (".png" if content.startswith(b"\x89PNG") else ".jpg")


def score(answers: list[tuple], table: list[dict], source: Path, partial: bool = False) -> dict:
    """Return the circular accuracy of (index, answer) pairs: a question is right if all its rotations are right.

    table: rows of `read_table`. source: the file, for messages. single_pass_accuracy counts each rotation by itself.
    """
    unlabelled = sum("answer" not in row for row in table)
    if unlabelled:
        raise UserError(f"{source}: {unlabelled} of {len(table)} rows have no answer, so this split is the server's")
    rotations, categories = defaultdict(list), {}
    for index, ([text], [row]) in join(answers, [(row["index"], row) for row in table], source, partial).items():
        rotations[index % ROTATION].append(option_letter(text, LETTERS) == row["answer"])
        categories[index % ROTATION] = row.get("category", "all")
    per_category = defaultdict(list)
    for base, right in rotations.items():
        per_category[categories[base]].append(all(right))
    groups = [value for group in per_category.values() for value in group]
    return {
        "accuracy": mean(groups),
        "questions": len(groups),
        "single_pass_accuracy": mean(value for right in rotations.values() for value in right),
        "rows": len(answers),
        "per_category": {name: mean(group) for name, group in sorted(per_category.items())},
    }


def write_upload(answers: dict, table: list[dict], upload: Path) -> None:
    """Write the .xlsx that the server takes: the table without images and notes, and a column of predictions.

    answers: index -> answer. Raises UserError if openpyxl is not installed.
    """
    try:
        from openpyxl import Workbook
    except ImportError:
        raise UserError(
            "MMBench's upload needs the package openpyxl, which is not installed: pip install openpyxl"
        ) from None

    columns = list(dict.fromkeys(name for row in table for name in row if name not in NOT_UPLOADED))
    # These two were added by `MMBench.read`.
    columns = [name for name in columns if name not in ("question_id", "text")]
    # The predictions are the seventh column, after the options, as LLaVA's script inserts them.
    order = [name for name in ("index", "question", *LETTERS) if name in columns]
    rest = [name for name in columns if name not in order]
    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    sheet.append([*order, "prediction", *rest])
    for row in table:
        cells = [*map(row.get, order), answers.get(row["index"]), *map(row.get, rest)]
        sheet.append([UNWRITABLE.sub("", cell) if isinstance(cell, str) else cell for cell in cells])
    temporary = upload.with_name(f".{upload.name}.{os.getpid()}.tmp")
    with as_user_error_on_write(upload):
        upload.parent.mkdir(parents=True, exist_ok=True)
        book.save(temporary)
        os.replace(temporary, upload)

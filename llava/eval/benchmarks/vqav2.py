"""VQAv2 (arXiv 1612.00837): an upload file for test-dev, soft accuracy on val.

Files in vqav2/. For test-dev, in LLaVA's layout: the questions (llava_vqav2_mscoco_test-dev2015.jsonl), the whole test
split, which an upload must cover (llava_vqav2_mscoco_test2015.jsonl), and the images (test2015). For val, the official
files: v2_OpenEnded_mscoco_val2014_questions.json, v2_mscoco_val2014_annotations.json and val2014. Only the EvalAI
server has the answers of test-dev. Answers are joined by question_id.
"""

from __future__ import annotations

from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import write_json
from llava.common.progress import progress_bar
from llava.eval.benchmarks.base import Benchmark
from llava.eval.benchmarks.questions import Sample, make_samples, read_lines, refuse_repeated_ids
from llava.eval.scoring.annotations import SHORT_ANSWER, key_of, kind_of, people_of, read_part, told_when_malformed
from llava.eval.scoring.evalai_normalisation import normalise
from llava.eval.scoring.match_answers import join, mean
from llava.eval.scoring.verdicts import Verdict, mean_by_kind, most_said
from llava.eval.scoring.vqa_accuracy import official_accuracy

TEST_DEV = "llava_vqav2_mscoco_test-dev2015"


class VQAv2(Benchmark):
    """VQAv2. In the upload file, answers are in EvalAI's normal form, and questions that were not asked have none."""

    name = "vqav2"
    splits = ("test-dev", "val")
    headline = "accuracy"
    download_page = "https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md#vqav2"

    @property
    def folder(self) -> Path:
        return self.data_root / "vqav2"

    @property
    def question_file(self) -> Path:
        names = {"test-dev": f"{TEST_DEV}.jsonl", "val": "v2_OpenEnded_mscoco_val2014_questions.json"}
        return self.folder / names[self.split]

    @property
    def whole_split(self) -> Path:
        return self.folder / "llava_vqav2_mscoco_test2015.jsonl"

    @property
    def labels(self) -> Path:
        return self.folder / "v2_mscoco_val2014_annotations.json"

    @property
    def image_folder(self) -> Path:
        return self.folder / {"test-dev": "test2015", "val": "val2014"}[self.split]

    def annotation_files(self) -> list[Path]:
        return [self.labels if self.split == "val" else self.whole_split]

    def read(self) -> list[Sample]:
        """Return the questions. Raises UserError if the whole test split lacks one of them."""
        # Checked here and not when the upload file is written, which is hours later.
        if self.split == "val":
            samples = self._read_val()
        else:
            samples = super().read()
            ids = {sample.question_id for sample in samples}
            unknown_ids = len(ids - set(split_ids(self.whole_split)))
            if unknown_ids:
                raise UserError(
                    f"{self.whole_split}: lacks {unknown_ids} of the {len(ids)} question_ids of {self.question_file}"
                )
        refuse_repeated_ids(samples, self.question_file)
        return samples

    def _read_val(self) -> list[Sample]:
        questions = read_part(self.question_file, "questions")
        with told_when_malformed(self.question_file):
            rows = [
                {
                    "question_id": question["question_id"],
                    "image": f"COCO_val2014_{question['image_id']:012d}.jpg",
                    "text": question["question"] + SHORT_ANSWER,
                }
                for question in questions
            ]
        return make_samples(list(enumerate(rows, 1)), self.question_file, unit="entry")

    def annotations(self) -> tuple[Path, list[tuple]] | None:
        if self.split != "val":
            return None
        return self.labels, read_labels(read_part(self.labels, "annotations"), self.labels)

    def score(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        """Return the soft accuracy (val), or write answers_upload/<split>/<checkpoint>/<run>.json (test-dev)."""
        answers = _answers(samples, rows)
        if self.split == "val":
            return score(answers, read_part(self.labels, "annotations"), self.labels, bool(self.partial))
        upload = self.upload_file(folder, self.folder / "answers_upload" / TEST_DEV, "json")
        return write_upload(dict(answers), split_ids(self.whole_split), upload)

    def verdicts(self, samples: list[Sample], rows: list[dict], folder: Path) -> list[Verdict] | None:
        if self.split != "val":
            return None
        return judge(_answers(samples, rows), read_part(self.labels, "annotations"), self.labels, bool(self.partial))


def _answers(samples: list[Sample], rows: list[dict]) -> list[tuple]:
    return [(sample.question_id, row["text"]) for sample, row in zip(samples, rows, strict=True)]


def read_labels(annotations: list[dict], source: Path) -> list[tuple[int, tuple[list[str], str]]]:
    """(question_id, (what people answered, answer type)) of the official annotations."""
    labels = []
    with told_when_malformed(source):
        for entry in annotations:
            key = key_of(entry["question_id"], f"{source}, an annotation")
            said = [answer["answer"] for answer in entry["answers"]]
            where = f"{source}, question {key}"
            labels.append((key, (people_of(said, where), kind_of(entry.get("answer_type", "other"), where))))
    return labels


def judge(answers: list[tuple], annotations: list[dict], source: Path, partial: bool = False) -> list[Verdict]:
    """(question_id, answer) pairs by VQAv2's rule, after the normalisation that an upload would get."""
    joined = join(answers, read_labels(annotations, source), source, partial)
    return [
        Verdict.plain(official_accuracy(normalise(answer), people), most_said(people), [kind])
        for [answer], [(people, kind)] in progress_bar("scoring", joined.values(), unit=" answers")
    ]


def score(answers: list[tuple], annotations: list[dict], source: Path, partial: bool = False) -> dict:
    """Return the accuracy of (question_id, answer) pairs, overall and per answer type."""
    verdicts = judge(answers, annotations, source, partial)
    return {
        "accuracy": mean(verdict.value for verdict in verdicts),
        "questions": len(verdicts),
        "per_answer_type": mean_by_kind(verdicts),
    }


def split_ids(path: Path) -> list:
    """Return the question_ids of a question file, in its order."""
    rows = read_lines(path)
    for number, row in rows:
        if not isinstance(row.get("question_id"), (int, str)):
            raise UserError(f'{path}, line {number}: has no "question_id" that is a whole number or a string')
    return [row["question_id"] for _, row in rows]


def write_upload(answers: dict, ids: list, upload: Path) -> dict:
    """Write [{question_id, answer}] for all `ids`: answers in EvalAI's normal form, "" for a question without answer.

    Raises UserError if an answer belongs to none of `ids`.
    """
    unknown_ids = len(answers.keys() - set(ids))
    if unknown_ids:
        raise UserError(
            f"{upload}: not written, {unknown_ids} of {len(answers)} answers are to none of the split's questions"
        )
    content = [
        {"question_id": i, "answer": normalise(answers[i]) if i in answers else ""}
        for i in progress_bar("upload file", ids, unit=" answers")
    ]
    write_json(upload, content, indent=None)
    return {"upload": str(upload), "answered": len(answers), "empty": len(ids) - len(answers)}

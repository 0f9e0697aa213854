"""VizWiz-VQA (arXiv 1802.08218): an upload file for test, soft accuracy on val.

Files in vizwiz/. For test, in LLaVA's layout: llava_test.jsonl and the images (test). For val: the official val.json
and its images (val); the instructions are those of LLaVA's test questions. Answers are joined by image, because each
image has one question.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import read_json, write_json
from llava.common.progress import progress_bar
from llava.eval.benchmarks.base import Benchmark
from llava.eval.benchmarks.questions import Sample, make_samples
from llava.eval.scoring.annotations import SHORT_ANSWER, kind_of, people_of, told_when_malformed
from llava.eval.scoring.evalai_normalisation import normalise
from llava.eval.scoring.match_answers import join, mean
from llava.eval.scoring.verdicts import Verdict, most_said
from llava.eval.scoring.vqa_accuracy import official_accuracy

# LLaVA's instruction for VizWiz. Many of its photographs do not show what the question asks for.
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


class VizWiz(Benchmark):
    """VizWiz-VQA. The answers of test are only on the server."""

    name = "vizwiz"
    splits = ("test", "val")
    headline = "accuracy"
    download_page = "https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md#viswiz"

    @property
    def folder(self) -> Path:
        return self.data_root / "vizwiz"

    @property
    def question_file(self) -> Path:
        return self.folder / {"test": "llava_test.jsonl", "val": "val.json"}[self.split]

    @property
    def image_folder(self) -> Path:
        return self.folder / self.split

    def read(self) -> list[Sample]:
        if self.split == "test":
            samples = super().read()
        else:
            with told_when_malformed(self.question_file):
                rows = [
                    {
                        "question_id": entry["image"],
                        "image": entry["image"],
                        "text": entry["question"] + UNANSWERABLE + SHORT_ANSWER,
                    }
                    for entry in read_json(self.question_file)
                ]
            samples = make_samples(list(enumerate(rows, 1)), self.question_file, unit="entry")
        twice = [image for image, count in Counter(sample.image for sample in samples).items() if count > 1]
        if twice:
            raise UserError(f'{self.question_file}: image "{twice[0]}" has several questions, allowed is one each')
        return samples

    def annotations(self) -> tuple[Path, list[tuple]] | None:
        if self.split != "val":
            return None
        return self.question_file, read_labels(read_json(self.question_file), self.question_file)

    def key(self, sample: Sample) -> str:
        return sample.image

    def score(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        """Return the soft accuracy (val), or write answers_upload/<checkpoint>/<run>.json (test)."""
        answers = _answers(samples, rows)
        if self.split == "val":
            return score(answers, read_json(self.question_file), self.question_file, bool(self.partial))
        return write_upload(answers, self.upload_file(folder, self.folder / "answers_upload", "json"))

    def verdicts(self, samples: list[Sample], rows: list[dict], folder: Path) -> list[Verdict] | None:
        if self.split != "val":
            return None
        return judge(_answers(samples, rows), read_json(self.question_file), self.question_file, bool(self.partial))


def _answers(samples: list[Sample], rows: list[dict]) -> list[tuple]:
    return [(sample.image, row["text"]) for sample, row in zip(samples, rows, strict=True)]


def read_labels(entries: list[dict], source: Path) -> list[tuple[str, tuple[list[str], str | None]]]:
    """(image, (what people answered, answer type)) of the entries of the official file that have answers."""
    labels = []
    with told_when_malformed(source):
        for entry in entries:
            if "answers" in entry:
                said = [answer["answer"] for answer in entry["answers"]]
                where = f"{source}, image {entry['image']}"
                labels.append((entry["image"], (people_of(said, where), kind_of(entry.get("answer_type"), where))))
    return labels


def judge(answers: list[tuple], entries: list[dict], source: Path, partial: bool = False) -> list[Verdict]:
    """(image, answer) pairs by the rule of the VQA evaluation, after the upload's normalisation."""
    joined = join(answers, read_labels(entries, source), source, partial)
    return [
        Verdict.plain(official_accuracy(normalise(answer), people), most_said(people), [kind])
        for [answer], [(people, kind)] in progress_bar("scoring", joined.values(), unit=" answers")
    ]


def score(answers: list[tuple], entries: list[dict], source: Path, partial: bool = False) -> dict:
    """Return the accuracy of (image, answer) pairs."""
    verdicts = judge(answers, entries, source, partial)
    return {"accuracy": mean(verdict.value for verdict in verdicts), "questions": len(verdicts)}


def write_upload(answers: list[tuple], upload: Path) -> dict:
    """Write [{image, answer}], with answers in EvalAI's normal form."""
    write_json(upload, [{"image": image, "answer": normalise(text)} for image, text in answers], indent=None)
    return {"upload": str(upload), "answered": len(answers)}

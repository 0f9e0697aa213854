"""TextVQA val (arXiv 1904.08920), with OCR tokens in the prompt: soft accuracy against ten answers.

Files in textvqa/: LLaVA's questions (llava_textvqa_val_v051_ocr.jsonl), TextVQA_0.5.1_val.json, and the images
(train_images). LLaVA's question_id is the image id, and an image may have several questions. So answers are joined by
(image id, lower-case question), with the question taken from the prompt.
"""

from __future__ import annotations

from pathlib import Path

from llava.common.errors import UserError
from llava.common.progress import progress_bar
from llava.eval.benchmarks.base import Benchmark
from llava.eval.benchmarks.questions import Sample
from llava.eval.scoring.annotations import key_of, people_of, read_part, told_when_malformed
from llava.eval.scoring.match_answers import join, mean, shown
from llava.eval.scoring.verdicts import Verdict, most_said
from llava.eval.scoring.vqa_accuracy import textvqa_accuracy


class TextVQA(Benchmark):
    """TextVQA val."""

    name = "textvqa"
    splits = ("val",)
    headline = "accuracy"
    repeats = True
    download_page = "https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md#textvqa"

    @property
    def folder(self) -> Path:
        return self.data_root / "textvqa"

    @property
    def question_file(self) -> Path:
        return self.folder / "llava_textvqa_val_v051_ocr.jsonl"

    @property
    def labels(self) -> Path:
        return self.folder / "TextVQA_0.5.1_val.json"

    @property
    def image_folder(self) -> Path:
        return self.folder / "train_images"

    def annotation_files(self) -> list[Path]:
        return [self.labels]

    def annotations(self) -> tuple[Path, list[tuple]]:
        return self.labels, read_labels(read_part(self.labels, "data"), self.labels)

    def key(self, sample: Sample) -> tuple[str, str]:
        return sample.question_id, question(sample.prompt, self.question_file)

    def score(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        return score(self._answers(samples, rows), read_part(self.labels, "data"), self.labels, bool(self.partial))

    def verdicts(self, samples: list[Sample], rows: list[dict], folder: Path) -> list[Verdict]:
        return judge(self._answers(samples, rows), read_part(self.labels, "data"), self.labels, bool(self.partial))

    def _answers(self, samples: list[Sample], rows: list[dict]) -> list[tuple]:
        return [(self.key(sample), row["text"]) for sample, row in zip(samples, rows, strict=True)]


def question(prompt: str, source: Path) -> str:
    """Return the lower-case question of one of LLaVA's prompts. Raises UserError for a prompt of another form.

    The lines of a prompt are: question, instruction; or question, OCR tokens, instruction; or OCR tokens, question,
    instruction.
    """
    # LLaVA's prompt_processor (eval_textvqa.py) has the same three cases, and one for an older format.
    lines = prompt.split("\n")
    ocr = [line.startswith("Reference OCR token:") for line in lines]
    if len(lines) == 2 or (len(lines) == 3 and any(ocr)):
        return lines[1 if ocr[0] else 0].lower()
    raise UserError(
        f"{source}: a prompt has {len(lines)} lines, allowed are a question, one line of OCR tokens and an instruction"
    )


def read_labels(data: list[dict], source: Path) -> list[tuple[tuple[str, str], list[str]]]:
    """((image id, question), what people answered) of the official data."""
    labels = []
    with told_when_malformed(source):
        for entry in data:
            key = key_of(entry["image_id"], f"{source}, an entry"), entry["question"].lower()
            labels.append((key, people_of(entry["answers"], f"{source}, {shown(key)}")))
    return labels


def judge(answers: list[tuple], data: list[dict], source: Path, partial: bool = False) -> list[Verdict]:
    """((image id, question), answer) pairs, in their order. A question that was annotated twice counts the mean."""
    joined = join(answers, read_labels(data, source), source, partial, repeats=True)
    verdicts = []
    for key, text in progress_bar("scoring", answers, unit=" answers"):
        several = joined[key][1]
        value = mean(textvqa_accuracy(text, people) for people in several)
        verdicts.append(Verdict.plain(value, most_said([one for people in several for one in people])))
    return verdicts


def score(answers: list[tuple], data: list[dict], source: Path, partial: bool = False) -> dict:
    """Return the accuracy of ((image id, question), answer) pairs."""
    verdicts = judge(answers, data, source, partial)
    return {"accuracy": mean(verdict.value for verdict in verdicts), "questions": len(verdicts)}

"""POPE (arXiv 2305.10355): is an object in the image? F1 of the answer "yes" in three categories, and their mean.

Files in pope/: LLaVA's questions (llava_pope_test.jsonl), the official labels (coco/coco_pope_<category>.json) and the
COCO images (val2014). LLaVA's scorer relies on the order of lines. Here labels are joined by (category, image,
question).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from pathlib import Path

from llava.common.errors import UserError
from llava.eval.benchmarks.base import Benchmark
from llava.eval.benchmarks.questions import Sample, read_lines
from llava.eval.scoring.annotations import SHORT_ANSWER, key_of, told_when_malformed
from llava.eval.scoring.match_answers import agreed, join, mean
from llava.eval.scoring.verdicts import Verdict

CATEGORIES = ("adversarial", "popular", "random")


class POPE(Benchmark):
    """POPE. The headline is the mean of the F1 of the three categories."""

    name = "pope"
    headline = "f1"
    repeats = True
    download_page = "https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md#pope"

    @property
    def folder(self) -> Path:
        return self.data_root / "pope"

    @property
    def question_file(self) -> Path:
        return self.folder / "llava_pope_test.jsonl"

    @property
    def image_folder(self) -> Path:
        return self.folder / "val2014"

    def annotation_files(self) -> list[Path]:
        return [label_file(self.folder / "coco", category) for category in CATEGORIES]

    def read(self) -> list[Sample]:
        return with_category(super().read(), self.question_file)

    def annotations(self) -> tuple[Path, list[tuple]]:
        return self.folder / "coco", read_labels(self.folder / "coco")

    def key(self, sample: Sample) -> tuple[str, str, str]:
        return key(sample)

    def check_label(self, key: Hashable, labels: list, source: Path) -> None:
        agreed(labels, key, source)

    def score(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        return score(_answers(samples, rows), self.folder / "coco", bool(self.partial))

    def verdicts(self, samples: list[Sample], rows: list[dict], folder: Path) -> list[Verdict]:
        """Return the verdicts. Their terms are one ratio per category.

        F1 is 2 x hits / (answers "yes" + labels "yes"). The division by the number of categories makes the sum of the
        ratios their mean.
        """
        judged = judge(_answers(samples, rows), self.folder / "coco", bool(self.partial))
        categories = len({category for category, _, _ in judged})
        verdicts = []
        for category, said, are in judged:
            terms = ((category, 2 * (said and are) / categories, float(said + are)),)
            verdicts.append(Verdict(float(said == are), "yes" if are else "no", (category,), terms))
        return verdicts


def _answers(samples: list[Sample], rows: list[dict]) -> list[tuple]:
    return [(key(sample), row["text"]) for sample, row in zip(samples, rows, strict=True)]


def with_category(samples: list[Sample], path: Path) -> list[Sample]:
    """Return the samples unchanged. Raises UserError if one belongs to none of the three categories."""
    for sample in samples:
        if sample.row.get("category") not in CATEGORIES:
            raise UserError(
                f'{path}, line {sample.line}: "category" is {sample.row.get("category")!r}, '
                f"allowed are {', '.join(CATEGORIES)}"
            )
    return samples


def label_file(folder: Path, category: str) -> Path:
    """Return the path of the label file of a category."""
    return folder / f"coco_pope_{category}.json"


def key(sample: Sample) -> tuple[str, str, str]:
    """Return the key that answers and labels are joined by: (category, image, question)."""
    return (sample.row["category"], sample.image, _spelled(sample.text.removesuffix(SHORT_ANSWER)))


def _spelled(question: str) -> str:
    # The authors later corrected "imange" to "image" in their files. Both spellings are the same question.
    return question.strip().replace("imange", "image")


def says_yes(text: str) -> bool:
    """Return whether an answer counts as yes: its first sentence has none of the words No, no and not."""
    # The rule of the official evaluate.py, which LLaVA's eval_pope.py has too. Other spellings (NO) count as yes.
    words = text.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def read_labels(folder: Path) -> list[tuple[tuple[str, str, str], bool]]:
    """(key, is yes) of the files in `folder`."""
    labels = []
    for category in CATEGORIES:
        source = label_file(folder, category)
        with told_when_malformed(source):
            for number, row in read_lines(source):
                if row["label"] not in ("yes", "no"):
                    raise UserError(f'{source}, line {number}: "label" is {row["label"]!r}, allowed are yes and no')
                image = key_of(row["image"], f"{source}, line {number}")
                labels.append(((category, image, _spelled(row["text"])), row["label"] == "yes"))
    return labels


def judge(answers: list[tuple], labels: Path, partial: bool = False) -> list[tuple[str, bool, bool]]:
    """(category, said yes, is yes) of (key, answer) pairs, in their order, by the files in `labels`."""
    joined = join(answers, read_labels(labels), labels, partial, repeats=True)
    are = {key_: agreed(several, key_, labels) for key_, (_, several) in joined.items()}
    return [(key_[0], says_yes(text), are[key_]) for key_, text in answers]


def score(answers: list[tuple], labels: Path, partial: bool = False) -> dict:
    """Return the F1 of (key, answer) pairs per category ("yes" is the positive class), and the mean over categories.

    labels: folder of the label files.
    """
    counts: dict[str, dict] = defaultdict(lambda: dict.fromkeys([(a, b) for a in (0, 1) for b in (0, 1)], 0))
    for category, said, are in judge(answers, labels, partial):
        counts[category][said, are] += 1
    per_category = {category: _measures(counts[category]) for category in CATEGORIES if category in counts}
    total = len(answers)
    right = sum(table[True, True] + table[False, False] for table in counts.values())
    yes = sum(table[True, True] + table[True, False] for table in counts.values())
    return {
        "f1": mean(measures["f1"] for measures in per_category.values()),
        "questions": total,
        "accuracy": right / total,
        "yes_ratio": yes / total,
        **{category: measures for category, measures in per_category.items()},
    }


def _measures(table: dict) -> dict:
    """Return F1, precision and recall. table: number of questions by (said yes, is yes)."""
    hits, said, are = table[True, True], table[True, True] + table[True, False], table[True, True] + table[False, True]
    return {
        "f1": 2 * hits / (said + are) if said + are else 0.0,
        "precision": hits / said if said else 0.0,
        "recall": hits / are if are else 0.0,
        "questions": sum(table.values()),
    }

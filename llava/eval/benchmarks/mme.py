"""MME (arXiv 2306.13394): two yes/no questions per image, in 14 sub-tasks; points for perception and cognition.

Files in MME/: LLaVA's questions (llava_mme.jsonl) and the folder MME_Benchmark_release_version. For each sub-task, this
folder has the images, and per image one .txt of questions and answers. Both are in the same folder, or in images/ and
questions_answers_YN/. Answers are joined by (sub-task, image, question without instruction). They are also written in
the format that the official calculation.py reads.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import as_user_error_on_write, write_atomically
from llava.eval.benchmarks.base import Benchmark
from llava.eval.benchmarks.questions import Sample
from llava.eval.scoring.annotations import SHORT_ANSWER, told_when_malformed
from llava.eval.scoring.match_answers import agreed, join, mean
from llava.eval.scoring.verdicts import Verdict

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
YES_NO = "Please answer yes or no."


class MME(Benchmark):
    """MME. The headline is the points of perception, as published tables print them."""

    name = "mme"
    headline = "perception"
    points = True
    repeats = True
    download_page = "https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md#mme"

    @property
    def folder(self) -> Path:
        return self.data_root / "MME"

    @property
    def question_file(self) -> Path:
        return self.folder / "llava_mme.jsonl"

    @property
    def image_folder(self) -> Path:
        return self.folder / "MME_Benchmark_release_version"

    def group(self, sample: Sample) -> Hashable:
        return sample.image

    def annotations(self) -> tuple[Path, list[tuple]]:
        release = read_release(self.image_folder)
        return self.image_folder, [(key_, label.lower()) for key_, (_, label) in release]

    def key(self, sample: Sample) -> tuple[str, str, str]:
        return key(sample.question_id, sample.text)

    def check_label(self, key: Hashable, labels: list, source: Path) -> None:
        agreed(labels, key, source)

    def score(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        """Return the points per sub-task, and write eval_tool/answers/<checkpoint>/<run>/<sub-task>.txt."""
        answers = _answers(samples, rows)
        release = read_release(self.image_folder)
        result = score(answers, release, self.image_folder, bool(self.partial))
        texts = self.upload_file(folder, self.folder / "eval_tool" / "answers", "txt").with_suffix("")
        write_answers(answers, release, texts)
        return {**result, "answers": str(texts)}

    def verdicts(self, samples: list[Sample], rows: list[dict], folder: Path) -> list[Verdict]:
        """Return the verdicts. Their terms are two ratios per sub-task of perception.

        The ratios are the share of right answers, and the share of images with all answers right. The headline has no
        points of cognition, so verdicts of cognition have no terms.
        """
        answers, release = _answers(samples, rows), read_release(self.image_folder)
        judged = judge(answers, release, self.image_folder, bool(self.partial))
        asked = _asked(release)
        images: dict[tuple, list[bool]] = defaultdict(list)
        verdicts = []
        for ((task, image, _), _), (right, label) in zip(answers, judged, strict=True):
            images[task, image].append(right)
            terms = [(f"{task}, answers", 100.0 * right, 1.0)]
            # The answer that completes an image carries the image's term. In a partial run some are never complete.
            if len(images[task, image]) == asked[task, image]:
                terms.append((f"{task}, images", 100.0 * all(images[task, image]), 1.0))
            verdicts.append(Verdict(float(right), label, (task,), tuple(terms) if task in PERCEPTION else ()))
        return verdicts


def _answers(samples: list[Sample], rows: list[dict]) -> list[tuple]:
    return [(key(sample.question_id, sample.text), row["text"]) for sample, row in zip(samples, rows, strict=True)]


def key(question_id: str, text: str) -> tuple[str, str, str]:
    """Return the key of a row of LLaVA's question or answer files.

    The key is (sub-task, image without ending, question without instruction). question_id is "<sub-task>/.../<image>".
    """
    task, _, rest = str(question_id).partition("/")
    return task, Path(rest).stem, _bare(text)


def _bare(question: str) -> str:
    """Return a question without its instruction, with single spaces."""
    # LLaVA's file replaces the release's instruction by its own, so the questions are equal only without both.
    question = question.replace(SHORT_ANSWER.strip(), "").replace(YES_NO, "")
    return " ".join(question.split())


def read_release(release: Path) -> list[tuple[tuple, tuple[str, str]]]:
    """Return (key, (question as the release spells it, Yes or No)) for each line of every .txt of the release.

    Raises UserError that names a malformed line.
    """
    if not release.is_dir():
        raise UserError(f"{release}: no such folder")
    labels = []
    for folder in sorted(path for path in release.iterdir() if path.is_dir()):
        texts = folder / "questions_answers_YN"
        for path in sorted((texts if texts.is_dir() else folder).glob("*.txt")):
            with told_when_malformed(path):
                lines = path.read_text(encoding="utf-8").split("\n")
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                question, tab, label = line.strip().rpartition("\t")
                if folder.name not in PERCEPTION + COGNITION or not tab or label.strip().lower() not in ("yes", "no"):
                    raise UserError(
                        f'{path}, line {number}: found "{line.strip()}", allowed is a question of one of the '
                        f"{len(PERCEPTION + COGNITION)} sub-tasks, a tab and Yes or No"
                    )
                labels.append(((folder.name, path.stem, _bare(question)), (question, label.strip())))
    return labels


def said(text: str) -> str:
    """Return yes, no or other, by the rule of calculation.py: only the first four characters of an answer count."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def judge(answers: list[tuple], release: list[tuple], source: Path, partial: bool = False) -> list[tuple[bool, str]]:
    """Return (is right, the right answer: yes or no) for each of the (key, answer) pairs, in their order."""
    # repeats: a question that the release has several times about one image counts as often.
    joined = join(answers, release, source, partial, repeats=True)
    labels = {
        key_: agreed([label.lower() for _, label in several], key_, source) for key_, (_, several) in joined.items()
    }
    return [(said(text) == labels[key_], labels[key_]) for key_, text in answers]


def _asked(release: list[tuple]) -> dict[tuple, int]:
    """Return (sub-task, image) -> number of questions that the release asks about the image."""
    return Counter((task, image) for (task, image, _), _ in release)


def score(answers: list[tuple], release: list[tuple], source: Path, partial: bool = False) -> dict:
    """Return the points of (key, answer) pairs.

    A sub-task has 100 x (share of right answers) + 100 x (share of images with all answers right) points. perception is
    the sum over ten sub-tasks (at most 2,000), cognition over four (at most 800).
    partial: sub-tasks that were not asked add 0. An image without all its answers counts only in the first share.
    """
    asked, judged = _asked(release), judge(answers, release, source, partial)
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for ((task, image, _), _), (is_right, _) in zip(answers, judged, strict=True):
        right[task][image].append(is_right)
    points = {}
    for task, images in right.items():
        whole = [all(values) for image, values in images.items() if len(values) == asked[task, image]]
        share = mean(value for values in images.values() for value in values)
        points[task] = 100 * share + 100 * (mean(whole) if whole else 0.0)
    return {
        "perception": sum(points.get(task, 0.0) for task in PERCEPTION),
        "cognition": sum(points.get(task, 0.0) for task in COGNITION),
        "questions": len(answers),
        "per_task": {task: points[task] for task in PERCEPTION + COGNITION if task in points},
    }


def write_answers(answers: list[tuple], release: list[tuple], folder: Path) -> None:
    """Write folder/<sub-task>.txt. Each line is image.txt, question, right answer and answer, separated by tabs."""
    known = dict(release)
    lines: dict[str, list[str]] = defaultdict(list)
    for (task, image, bare), text in answers:
        question, label = known[task, image, bare]
        # A tab or a line break in an answer would break the format.
        lines[task].append("\t".join([f"{image}.txt", question, label, " ".join(text.split())]))
    with as_user_error_on_write(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for task, content in lines.items():
        write_atomically(folder / f"{task}.txt", "\n".join(content) + "\n")

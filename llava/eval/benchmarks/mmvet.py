"""MM-Vet (arXiv 2308.02490): free answers. The output is a file for the authors' grader, or a score by another judge.

Files in mm-vet/: LLaVA's questions (llava-mm-vet.jsonl), the images (images), and mm-vet.json. The last is needed only
with a judge (JUDGE_URL and JUDGE_MODEL in the environment, see llava.eval.benchmarks.llm_judge). GPT-4 graded the
published numbers; the numbers of another judge are not comparable with them. Answers are joined by question id
(v1_<id>).
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import read_json, write_json
from llava.eval.benchmarks.base import Benchmark
from llava.eval.benchmarks.llm_judge import Judge, grade_all, graded_as, kept_grades
from llava.eval.benchmarks.questions import Sample, refuse_repeated_ids
from llava.eval.scoring.annotations import kind_of, told_when_malformed
from llava.eval.scoring.match_answers import join, mean
from llava.eval.scoring.verdicts import Verdict

# The prompt of the authors' grader (yuweihao/MM-Vet, mm-vet_evaluator.ipynb), word for word, because it is protocol.
_MEME = (
    "This meme is poking fun at the fact that the names of the countries Iceland and Greenland are misleading. Despite "
    "its name, Iceland is known for its beautiful green landscapes, while Greenland is mostly covered in ice and snow. "
    "The meme is saying that the person has trust issues because the names of these countries do not accurately "
    "represent their landscapes."
)
GRADER = f"""Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> in the ground truth means it is totally right only when all elements in the ground truth are present in the prediction, and <OR> means it is totally right when any one element in the ground truth is present in the prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 (totally right). Just complete the last space of the correctness score.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
What is x in the equation? | -1 <AND> -5 | x = 3 | 0.0
What is x in the equation? | -1 <AND> -5 | x = -1 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -5 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -5 or 5 | 0.5
What is x in the equation? | -1 <AND> -5 | x = -1 or x = -5 | 1.0
Can you explain this meme? | {_MEME} | The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not very icy and Greenland isn't very green. | 0.4
Can you explain this meme? | {_MEME} | The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, despite its name, has lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This is why I have trust issues' is a playful way to suggest that these contradictions can lead to distrust or confusion. The humor in this meme is derived from the unexpected contrast between the names of the countries and their actual physical characteristics. | 1.0
"""


class MMVet(Benchmark):
    """MM-Vet. The headline is the mean grade, if a judge is named."""

    name = "mmvet"
    headline = "total"
    max_new_tokens = 1024  # LLaVA's model_vqa
    download_page = "https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md#mm-vet"

    @property
    def folder(self) -> Path:
        return self.data_root / "mm-vet"

    @property
    def question_file(self) -> Path:
        return self.folder / "llava-mm-vet.jsonl"

    @property
    def labels(self) -> Path:
        return self.folder / "mm-vet.json"

    @property
    def image_folder(self) -> Path:
        return self.folder / "images"

    def annotation_files(self) -> list[Path]:
        return [self.labels] if Judge.from_environment() else []

    def read(self) -> list[Sample]:
        samples = super().read()
        refuse_repeated_ids(samples, self.question_file)
        return samples

    def annotations(self) -> tuple[Path, list[tuple]] | None:
        if Judge.from_environment() is None:
            return None
        labels = read_json(self.labels)
        with told_when_malformed(self.labels):
            for key, entry in labels.items():
                for kind in (_spaced(entry["answer"]), entry["question"], *entry["capability"]):
                    kind_of(kind, f"{self.labels}, {key}")
        return self.labels, list(labels.items())

    def key(self, sample: Sample) -> str:
        return name(sample.question_id)

    def score(self, samples: list[Sample], rows: list[dict], folder: Path) -> dict:
        """Write results/<checkpoint>/<run>.json. With a judge, return the mean grade, overall and per capability."""
        answers = [(sample.question_id, row["text"]) for sample, row in zip(samples, rows, strict=True)]
        upload = self.upload_file(folder, self.folder / "results", "json")
        written = write_results(answers, upload)
        judge = Judge.from_environment()
        if judge is None:
            return written
        graded = score(answers, read_json(self.labels), self.labels, judge, folder / "grades.jsonl", bool(self.partial))
        return {**graded, **written}

    def verdicts(self, samples: list[Sample], rows: list[dict], folder: Path) -> list[Verdict] | None:
        """Return the verdicts from the grades in `folder`; None if the run was not graded. No judge is asked."""
        # The model that graded the run, which may not be the one in the environment now.
        model = read_json(folder / "score.json").get("judge")
        if model is None:
            return None
        labels, known = read_json(self.labels), kept_grades(folder / "grades.jsonl")
        answers = [(sample.question_id, row["text"]) for sample, row in zip(samples, rows, strict=True)]
        asked = prompts(answers, labels, self.labels, bool(self.partial))
        ungraded = [key for key, prompt in asked.items() if graded_as(model, prompt) not in known]
        if ungraded:
            raise UserError(f"{folder / 'grades.jsonl'}: has no grade of {model} for {len(ungraded)} answers")
        with told_when_malformed(self.labels):
            return [
                Verdict.plain(
                    known[graded_as(model, prompt)], _spaced(labels[key]["answer"]), labels[key]["capability"]
                )
                for key, prompt in asked.items()
            ]


def name(question_id: int | str) -> str:
    """Return the name of a question in mm-vet.json."""
    return f"v1_{question_id}"


def write_results(answers: list[tuple], upload: Path) -> dict:
    """Write {"v1_<id>": answer}, the format of the authors' grader."""
    write_json(upload, {name(key): text for key, text in answers})
    return {"upload": str(upload), "answered": len(answers)}


def prompts(answers: list[tuple], labels: dict, source: Path, partial: bool = False) -> dict[str, str]:
    """Return name -> prompt of the judge, for (id, answer) pairs in their order."""
    joined = join([(name(key), text) for key, text in answers], labels.items(), source, partial)
    with told_when_malformed(source):
        return {
            key: f"{GRADER}{entry['question']} | {_spaced(entry['answer'])} | {text} |"
            for key, ([text], [entry]) in joined.items()
        }


def score(answers: list[tuple], labels: dict, source: Path, judge: Judge, kept: Path, partial: bool = False) -> dict:
    """Return the mean grade of (id, answer) pairs, overall and per capability.

    labels: content of mm-vet.json, read from `source`. kept: the file that each grade is written to at once.
    """
    asked = prompts(answers, labels, source, partial)
    with told_when_malformed(source):
        capabilities = {key: labels[key]["capability"] for key in asked}
    grades = grade_all(judge, asked, kept)
    per_capability = defaultdict(list)
    for key, grade in grades.items():
        for capability in capabilities[key]:
            per_capability[capability].append(grade)
    return {
        "total": mean(grades.values()),
        "questions": len(grades),
        "judge": judge.model,
        "per_capability": {kind: mean(values) for kind, values in sorted(per_capability.items())},
    }


def _spaced(answer: str) -> str:
    # The grader's examples have spaces around the two words; mm-vet.json has none.
    return answer.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")

"""Runs as the report reads them: the files of their folders and, if the questions still exist, every judged answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import digest_of, read_json
from llava.common.scatter import BATCH_LIMIT, scatters
from llava.eval.benchmarks import BENCHMARKS, Benchmark
from llava.eval.benchmarks.answer_file import match, read_answers
from llava.eval.benchmarks.questions import Sample
from llava.eval.benchmarks.subset import Subset
from llava.eval.results.published import TABLE
from llava.eval.results.published_table import label_of
from llava.eval.results.run_record import read_record
from llava.eval.scoring.verdicts import Verdict, headline

# The parts of run.json that the report reads without a check.
_NEEDED = (
    *("benchmark", "split", "asked", "tokens", "checkpoint", "configuration", "generation", "question_file"),
    *("questions", "environment", "sessions", "score", "published"),
)
_ORDER = [*TABLE, *(name for name in BENCHMARKS if name not in TABLE)]


@dataclass(frozen=True)
class Answer:
    """A question, the answer of a run, and its verdict."""

    sample: Sample
    text: str
    verdict: Verdict

    @property
    def cluster(self):
        """Cluster of the bootstrap: questions about one image are resampled together."""
        return self.sample.image or self.sample.key


@dataclass
class RecordedRun:
    """A run folder.

    report, identity: content of run.json and identity.json. answers: sample key -> answer, in question order. If
    answers are not judged one by one, `answers` is empty and `gap` has the reason.
    """

    folder: Path
    report: dict
    identity: dict
    answers: dict[tuple, Answer] = field(default_factory=dict)
    gap: str = ""
    benchmark: Benchmark | None = None

    @property
    def name(self) -> str:
        """Name of the benchmark."""
        return self.report["benchmark"]

    @property
    def checkpoint(self) -> str:
        """The checkpoint's name."""
        return self.report["checkpoint"]["name"]

    @property
    def method(self) -> str:
        return self.report["configuration"]["method"]

    @cached_property
    def label(self) -> str:
        """Method, options and other settings that are not the default. Runs of one label differ in their budget."""
        return label_of(self.report["configuration"])

    @property
    def budget(self) -> str:
        """overall_tokens as text, or "all" or "0" for a method without budget."""
        return self.report["tokens"]

    @property
    def budgeted(self) -> bool:
        """Whether overall_tokens changes the tokens that the method keeps."""
        return self.budget not in ("all", "0")

    @property
    def title(self) -> str:
        """Label and budget."""
        return f"{self.label}, {self.budget} tokens" if self.budgeted else self.label

    @property
    def points(self) -> bool:
        """Whether the score is in points, not in percent."""
        return self.name in BENCHMARKS and BENCHMARKS[self.name].points

    @property
    def score(self) -> float | None:
        """The score as published tables print it: percent, or points. None if there is none."""
        return self.report["published"]

    @property
    def state(self) -> str:
        """Remark beside the score; "" for a run that is finished and scored on all its questions."""
        score, asked = self.report["score"], self.report["questions"]
        if score is None:
            return f"not finished: {self.report.get('answered', 0):,} of {asked:,} questions are answered"
        if self.score is None:
            return "no score here: a file to upload" if "upload" in score else "answers alone, nothing is scored"
        left_out = asked - self.report.get("answered", asked)
        if left_out:
            return f"partial: {left_out:,} of {asked:,} questions left out, their images cannot be read"
        part = score.get("partial")
        return f"partial: {part}" if part and part != self.identity["part"] else ""

    @cached_property
    def group(self) -> str:
        """Digest that is equal for runs that differ only in their configuration. Only those are compared."""
        # "table" is the content of a file that the configuration names.
        return digest_of(
            {name: value for name, value in self.identity.items() if name not in ("configuration", "table")}
        )

    @property
    def size(self) -> float:
        """Layer mean of the vision tokens, for sorting; infinite for method none."""
        if self.method == "none":
            return float("inf")
        return self.measured("vision_tokens_per_image", "layer_mean") or 0.0

    def measured(self, *names: str) -> float | None:
        """Return a number of run.json by the names on its path, or None."""
        value = self.report
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    @property
    def milliseconds(self) -> float | None:
        """Milliseconds per question: all stages, summed over shards, without loading of the checkpoint."""
        stages, answered = self.measured("seconds_per_stage"), self.measured("answered")
        return 1000 * sum(stages.values()) / answered if stages and answered else None

    @property
    def scatters(self) -> bool:
        """Whether the times of the run differ too much to be quoted."""
        return scatters(self.measured("prefill_spread"), BATCH_LIMIT)

    @property
    def place(self) -> tuple:
        """Sort key: the order of runs on the page."""
        order = _ORDER.index(self.name) if self.name in _ORDER else len(_ORDER)
        group = (self.checkpoint, order, self.report["split"], str(self.report["asked"]), self.group)
        return (*group, self.method != "none", self.label, -self.size, str(self.folder))


def find(folders: Iterable[Path]) -> tuple[list[RecordedRun], list[str]]:
    """Return (the runs in and below `folders`, in the order of the page; remarks about folders that were left out).

    Raises UserError for a folder without a run, and for a malformed run.json.
    """
    found: dict[Path, RecordedRun] = {}
    notes = []
    for folder in map(Path, folders):
        records = sorted(folder.rglob("identity.json"))
        if not records:
            raise UserError(
                f"{folder}: holds no run (a folder with run.json); allowed are run folders and those above them"
            )
        for path in records:
            if not path.with_name("run.json").is_file():
                notes.append(f"{path.parent}: has no run.json yet, so it is left out")
                continue
            # Resolved: a run that is named twice, or also through a folder above it, is read once.
            found.setdefault(path.parent.resolve(), _read(path.parent, path))
    if not found:
        raise UserError(f"{notes[0]}, and there is no other run")
    return sorted(found.values(), key=lambda run: run.place), notes


def _read(folder: Path, identity: Path) -> RecordedRun:
    known = read_json(identity)
    for name in ("part", "questions", "configuration"):
        if not isinstance(known, dict) or name not in known:
            raise UserError(f'{identity}: has no "{name}", is this the record of a run?')
    return RecordedRun(folder, read_record(folder / "run.json", _NEEDED), known)


class Questions:
    """Reader of questions and judge of answers. Runs with the same questions share them."""

    def __init__(self, data_root: Path | None = None):
        """data_root: folder of the benchmarks; None takes the folder that each run used."""
        self.data_root = data_root
        self._known: dict[tuple, list[Sample]] = {}

    def judge(self, run: RecordedRun) -> None:
        """Set `run.answers`, or set `run.gap` to the reason why the answers cannot be judged one by one."""
        # No error for the whole page: the score of the run is known all the same.
        try:
            run.answers = self._answers(run)
        except UserError as error:
            run.gap = str(error)

    def _answers(self, run: RecordedRun) -> dict[tuple, Answer]:
        """Return the judged answers of a run. Raises UserError if they cannot be judged one by one."""
        # 1. Join the answers with the questions as they were asked.
        if run.score is None:
            raise UserError(run.state)
        benchmark = self._benchmark(run)
        samples = self._samples(run, benchmark)
        path = run.folder / "merge.jsonl"
        answered, rows = match(samples, read_answers(path), path, partial=True)
        benchmark.partial = run.report["score"].get("partial")
        # 2. Judge.
        verdicts = benchmark.verdicts(answered, rows, run.folder)
        if verdicts is None:
            raise UserError("its answers cannot be judged one by one")
        # 3. The verdicts must give the score of the run. If they do not, the annotations have changed since.
        again = headline(verdicts) * (1 if benchmark.points else 100)
        if abs(again - run.score) > 1e-6 * max(1.0, abs(run.score)):
            raise UserError(
                f"{benchmark.question_file.parent}: by the annotations that are there now the run's score is {again:.2f}, not "
                f"{run.score:.2f}, so its answers are not judged one by one"
            )
        run.benchmark = benchmark
        return {
            sample.key: Answer(sample, row["text"], verdict)
            for sample, row, verdict in zip(answered, rows, verdicts, strict=True)
        }

    def _benchmark(self, run: RecordedRun) -> Benchmark:
        """Return the benchmark as it was for the run. The run's question file tells its folder."""
        if run.name not in BENCHMARKS:
            raise UserError(f'benchmark "{run.name}" is not known, so its answers are not judged')
        kind, split, file = BENCHMARKS[run.name], run.report["split"], Path(run.report["question_file"])
        roots = [self.data_root] if self.data_root else file.parents
        for root in roots:
            benchmark = kind(root, None, split)
            if benchmark.question_file == file or self.data_root:
                return benchmark
        raise UserError(f"{file}: is no question file of {run.name}; --data-root says where the benchmarks are")

    def _samples(self, run: RecordedRun, benchmark: Benchmark) -> list[Sample]:
        """Return the samples of a run. Raises UserError if the question file has changed since."""
        asked = run.report["asked"]
        known = (benchmark.name, benchmark.split, *asked.values(), str(benchmark.data_root))
        if known not in self._known:
            subset = asked["subset"] and Subset(asked["subset"], asked["seed"])
            self._known[known] = benchmark.chosen(benchmark.load_questions(), asked["limit"], subset)
        samples = self._known[known]
        if digest_of([[list(sample.key), sample.prompt] for sample in samples]) != run.identity["questions"]:
            raise UserError(f"{benchmark.question_file}: holds other questions than the run was asked")
        return samples

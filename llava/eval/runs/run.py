"""One run: its identity, its folder, the questions that are still unanswered, and its score.

runs/<benchmark>/<checkpoint>/<method>-<tokens>[-<split>][-subset<n>]-<digest>/
    identity.json    everything that an answer depends on; the digest in the folder's name is its hash
    adav_configs.json  copy of the configuration
    shards/          answers in the order in which they were made, work orders, logs; code.json: versions of the code that
                     made answers
    merge.jsonl      every answer once, in the order of the question file
    score.json       the score that the benchmark computed from them
    run.json         how the run was made: versions, commit, hardware, command, tokens, times, memory
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from llava.common.errors import UserError
from llava.common.files import (
    BASE,
    as_user_error_on_write,
    digest_of,
    read_json,
    repair,
    write_json,
)
from llava.common.find_checkpoint import EvalCheckpoint
from llava.common.machine import commit, environment
from llava.config import AdaVConfig
from llava.eval.benchmarks import Benchmark
from llava.eval.benchmarks.questions import Sample
from llava.eval.benchmarks.subset import Subset
from llava.eval.runs.division import by_image
from llava.eval.runs.engines import RunEngine
from llava.eval.runs.exported import Exported
from llava.eval.runs.locks import hold_folder
from llava.eval.runs.run_summary import summarise
from llava.eval.runs.shard_answers import collect, merge, remove_answers
from llava.eval.runs.work_order import Generation, OrderedSample, WorkOrder
from llava.methods.installed import origin
from llava.methods.plugins import plugin_of


@dataclass(frozen=True)
class Family:
    """The checkpoint of one --family of the launcher.

    conversation: the template that it was trained with. None, if the checkpoint's files say it.
    """

    checkpoint: str
    conversation: str | None = None


FAMILIES = {
    "demo": Family("playground/llava-shapes-v1.5"),
    "v1_5": Family("liuhaotian/llava-v1.5-7b"),
    "v1_6": Family("liuhaotian/llava-v1.6-vicuna-7b"),
    "v1_6_34B": Family("liuhaotian/llava-v1.6-34b", "chatml_direct"),
}


DATA_ROOT = BASE / "playground" / "data" / "eval"


OUTPUT = BASE / "runs"


BATCH_SIZE = 8
# By engine. vLLM takes a batch as its queue: it starts the next request where one ends.
BATCH_SIZES = {"llava": BATCH_SIZE, "vllm": 128}
# Of a small model on a CPU: Python takes a good part of its time, and more questions share the text before the image.
SMALL_MODEL_BATCH_SIZE = 32
BATCH_SIZE_HELP = f"{BATCH_SIZE}, {SMALL_MODEL_BATCH_SIZE} for a small model on a CPU, {BATCH_SIZES['vllm']} with vllm"

# What stands for the budget of the methods that have none.
_NO_BUDGET = {"none": "all", "no_image": "0"}


class Run:
    """One benchmark under one configuration of one checkpoint.

    Answers of an earlier start of the same run are used again; `todo` returns the samples that are missing.
    limit, subset: only the first `limit` samples, or a drawn subset. output: folder above all run folders. engine: by
    default the own one.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        config: AdaVConfig,
        checkpoint: EvalCheckpoint,
        generation: Generation,
        output: Path,
        model_base: EvalCheckpoint | None = None,
        limit: int | None = None,
        subset: Subset | None = None,
        partial: bool = False,
        engine: RunEngine | None = None,
    ):
        """partial: some of the questions may have no label (`Benchmark.scorable`). They are asked all the same."""
        # A budget has no effect on these methods, so it must not make two runs of one.
        if config.method in _NO_BUDGET:
            config = config.replaced(overall_tokens=AdaVConfig.overall_tokens)
        self.benchmark, self.config, self.checkpoint = benchmark, config, checkpoint
        self.generation, self.model_base, self.engine = generation, model_base, engine or RunEngine()
        self.exported = Exported(checkpoint, model_base, output)
        self.samples = benchmark.load(limit, subset, partial)
        self.identity = {
            "benchmark": benchmark.name,
            "split": benchmark.split,
            "part": benchmark.partial,
            "checkpoint": checkpoint.identity,
            "model_base": model_base and model_base.identity,
            "configuration": config.to_dict(),
            "generation": asdict(generation),
            "questions": digest_of([[list(sample.key), sample.prompt] for sample in self.samples]),
            "images": str(Path(benchmark.image_folder).resolve()),
        }
        # Another engine, or another version of it, may round otherwise.
        if self.engine.identity is not None:
            self.identity["engine"] = self.engine.identity
        # FitPrune's table is a file. Its content counts, because the configuration has only its path.
        if "table" in config.options:
            self.identity["table"] = digest_of(read_json(config.options["table"]))
        # A method from outside the package changes while its name and options stay: the file or the version counts.
        self.plugin = plugin_of(config.method)
        if self.plugin:
            self.identity["plugin"] = self.plugin.digest
        elif origin(config.method):
            self.identity["installed"] = origin(config.method)
        self.asked = {"limit": limit, "subset": subset and subset.size, "seed": subset and subset.seed}
        # A limit above the number of questions asks all of them, which is the same run as no limit.
        if not benchmark.partial:
            self.asked = dict.fromkeys(self.asked)
        self.tokens = _NO_BUDGET.get(config.method, str(config.overall_tokens))
        # 2. The name of the folder: the facts that a reader looks for, then the digest.
        parts = [config.method, self.tokens]
        if benchmark.split != benchmark.splits[0]:
            parts.append(_safe(benchmark.split))
        if subset and benchmark.partial:
            parts.append(f"subset{len(self.samples)}")
        # With --plan the checkpoint may not be fetched yet, so the digest of its files is unknown.
        digest = digest_of(self.identity) if checkpoint.folder else "DIGEST"
        name = "-".join([*parts, digest])
        self.folder = Path(output) / benchmark.name / _safe(checkpoint.short_name) / name
        self.shards = self.folder / "shards"
        # 3. State, filled by `open` and `refresh`.
        self._lock: int | None = None
        self.answered: dict[tuple, dict] = {}
        self.errors: dict[tuple, str] = {}

    def open(self, fresh: bool = False) -> None:
        """Make the folder if needed, lock it, and read the answers that it has.

        fresh: remove these answers first. Raises UserError if another process works on the run.
        """
        with as_user_error_on_write(self.folder):
            self.shards.mkdir(parents=True, exist_ok=True)
        # The lock comes first: another start of the run must not lose answers to `fresh` or to `repair`.
        self._lock = hold_folder(self.folder)
        if fresh:
            remove_answers(self.folder)
        for path in self.shards.glob("shard-*.jsonl"):
            # A shard that was killed may have left a torn last line. The next row would be appended to it.
            with as_user_error_on_write(path):
                repair(path)
        write_json(self.folder / "identity.json", self.identity)
        write_json(self.folder / "adav_configs.json", self.config.to_dict())
        self.refresh()

    def close(self) -> None:
        """Release the lock of this process. Worker processes that still run keep theirs."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def lock(self) -> int:
        """The file descriptor of the folder's lock.

        Worker processes inherit it, so the folder stays locked as long as one of them lives.
        """
        return self._lock

    def todo(self) -> list[Sample]:
        """Return the samples without an answer; those of one image are neighbours."""
        return by_image([sample for sample in self.samples if sample.key not in self.answered])

    def order(self, shard: int, samples: list[Sample], batch_size: int) -> WorkOrder:
        """Return the work order of one shard: everything that llava.eval.worker needs."""
        # Resolved paths: a worker of another rank may have another working directory.
        return WorkOrder(
            checkpoint=str(self.checkpoint.folder),
            model_base=self.model_base and str(self.model_base.folder),
            config=self.config,
            generation=self.generation,
            batch_size=batch_size,
            image_folder=Path(self.benchmark.image_folder).resolve(),
            answers=self.answers_of(shard).resolve(),
            samples=tuple(OrderedSample(sample.key, sample.images, sample.prompt) for sample in samples),
            for_vllm=str(self.exported.folder.resolve()) if self.engine.name == "vllm" else None,
            plugin=self.plugin,
        )

    def write_order(self, shard: int, samples: list[Sample], batch_size: int) -> Path:
        """Write the work order of one shard; return its path."""
        path = self.order_of(shard)
        self.order(shard, samples, batch_size).write(path)
        return path

    def order_of(self, shard: int) -> Path:
        """Return the path of the work order of one shard."""
        return self.shards / f"order-{shard}.json"

    def answers_of(self, shard: int) -> Path:
        """Return the path of the answer file of one shard."""
        return self.shards / f"shard-{shard}.jsonl"

    def refresh(self) -> None:
        """Read the answers of the shards again."""
        self.answered, self.errors = collect(self.shards)

    def finish(self, partial: bool = False) -> dict:
        """Merge and score.

        Raises UserError where an image was unreadable or a label is missing: nothing is scored then, unless `partial`
        allows it to score the other questions and to say so.
        """
        self.refresh()
        samples = self.benchmark.scorable(self._readable(partial), partial)
        left_out = {sample.key for sample in self.samples} - {sample.key for sample in samples}
        answered = {key: row for key, row in self.answered.items() if key not in left_out}
        rows = merge(samples, answered, self.merged, self.checkpoint.short_name, digest_of(self.identity))
        score = self.benchmark.finish(samples, rows, self.folder)
        write_json(self.folder / "score.json", score)
        return score

    @property
    def merged(self) -> Path:
        """The file of all answers."""
        return self.folder / "merge.jsonl"

    def _readable(self, partial: bool) -> list[Sample]:
        """Return the samples to score: all, or, with `partial`, those whose group has no unreadable image."""
        bad = [sample for sample in self.samples if sample.key in self.errors]
        if not bad:
            return self.samples
        if not partial:
            sample = bad[0]
            named = ", ".join(f'"{name}"' for name in sample.images)
            others = [name for name in dict.fromkeys(n for s in bad for n in s.images) if name not in sample.images]
            more = f" (and {len(others)} more: {', '.join(others[:5])})" if others else ""
            raise UserError(
                f"{self.benchmark.question_file}, {sample.place}: image {named} cannot be read "
                f"({self.errors[sample.key]}){more}; {len(self.answered)} of {len(self.samples)} questions are answered, "
                "nothing is scored (--partial scores those)"
            )
        # Whole groups are left out: a rotation of MMBench or a pair of MME cannot be scored without the other members.
        group = self.benchmark.group
        groups = {group(sample) for sample in bad}
        good = [sample for sample in self.samples if group(sample) not in groups]
        asked = self.benchmark.partial or f"{len(self.samples):,} questions"
        self.benchmark.partial = f"{len(good):,} questions without an unreadable image, out of {asked}"
        return good

    def note_code(self, digest: str) -> bool:
        """Note the digest of the code that is about to answer. Returns True if other code has answered questions before.

        Noted before the first answer: a start that is killed leaves no run.json.
        """
        path = self.shards / "code.json"
        before = read_json(path) if path.is_file() and self.answered else []
        write_json(path, [*dict.fromkeys([*before, digest])])
        return bool(self.answered) and before != [digest]

    def record(self, session: dict, score: dict | None) -> dict:
        """Write run.json with `session` (one start of the command) after the earlier ones; return its content.

        score: None if the run is not finished.
        """
        path = self.folder / "run.json"
        before = read_json(path).get("sessions", []) if path.is_file() else []
        report = {
            "benchmark": self.benchmark.name,
            "split": self.benchmark.split,
            "part": self.benchmark.partial,
            "asked": self.asked,
            "tokens": self.tokens,
            "checkpoint": {**self.checkpoint.identity, "folder": str(self.checkpoint.folder)},
            "configuration": self.config.to_dict(),
            "configuration_digest": self.config.digest,
            "generation": asdict(self.generation),
            "engine": {"name": self.engine.name, "version": self.engine.version},
            "question_file": str(self.benchmark.question_file),
            "benchmark_arguments": self.benchmark.arguments(),
            "questions": len(self.samples),
            "commit": commit(),
            "environment": environment(),
            "sessions": [*before, session],
            **summarise(list(self.answered.values())),
            "score": score,
            "published": score and self.benchmark.published(score),
            "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        write_json(path, report)
        return report


def _safe(name: str) -> str:
    """Return a name that is safe as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip(".") or "checkpoint"

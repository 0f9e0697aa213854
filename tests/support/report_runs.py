"""Run folders as the launcher leaves them, with answers of the test's choice: for the tests of the report."""

from __future__ import annotations

from pathlib import Path

from benchmark_data import make_benchmark
from eval_data import make_folder_only_checkpoint
from test_benchmarks import right_answer

from llava.common.find_checkpoint import EvalCheckpoint
from llava.config import AdaVConfig
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.benchmarks.subset import Subset
from llava.eval.runs.run import Run
from llava.eval.runs.shard_answers import AnswerFile
from llava.eval.runs.work_order import Generation


def wrong_answer(name: str, n: int) -> str:
    """A wrong answer to question n: the other one of yes and no, or an option that there is not."""
    return {"yes": "no", "no": "yes"}[right_answer(name, n)] if name == "pope" else "E"


class Bench:
    """One place with benchmarks, a checkpoint and the runs of it."""

    def __init__(self, root: Path):
        self.data, self.output = root / "data", root / "runs"
        self.checkpoints = {}
        self.root, self.made = root, set()

    def checkpoint(self, name: str) -> EvalCheckpoint:
        if name not in self.checkpoints:
            folder = make_folder_only_checkpoint(self.root / "checkpoints" / name, made_for=name)
            self.checkpoints[name] = EvalCheckpoint(name, folder, {})
        return self.checkpoints[name]

    def run(
        self,
        name: str = "gqa",
        method: str = "none",
        wrong=(),
        texts=None,
        tokens: int = 8,
        split=None,
        checkpoint: str = "tiny",
        questions: int = 16,
        finish: bool = True,
        unreadable=(),
        cost: float = 1.0,
        limit=None,
        subset=None,
        **changes,
    ) -> Path:
        """A run whose answers are right but to the questions numbered in `wrong`; texts: number -> another answer."""
        if name not in self.made:
            make_benchmark(name, self.data, questions)
            self.made.add(name)
        known = self.checkpoint(checkpoint)
        benchmark = BENCHMARKS[name](self.data, known, split)
        config = AdaVConfig(method=method, overall_tokens=tokens, **changes)
        drawn = Subset(subset) if subset else None
        run = Run(benchmark, config, known, Generation(16), self.output, limit=limit, subset=drawn)
        place = {sample.key: n for n, sample in enumerate(BENCHMARKS[name](self.data, known, split).load())}
        run.open()
        rows = []
        for sample in run.samples:
            n = place[sample.key]
            if n in unreadable:
                rows.append({"key": list(sample.key), "error": "OSError: torn"})
                continue
            text = wrong_answer(name, n) if n in wrong else right_answer(name, n)
            rows.append(self._row(sample, (texts or {}).get(n, text), tokens if method != "none" else 16, cost))
        answers = AnswerFile(run.answers_of(0))
        answers.append(rows)
        answers.close()
        session = {"started": "2026-01-01T00:00:00+0000", "command": f"python launch.py {name} --method {method}"}
        session |= {"commit": "abc", "code": "def", "shards": 1, "devices": ["cpu"], "batch_size": 8}
        session |= {"answered": len(rows), "reused": 0, "wall_seconds": 2.0, "outcome": "finished"}
        if finish:
            run.record(session, run.finish(partial=bool(unreadable)))
        else:
            run.refresh()
            run.record({**session, "outcome": "Interrupted: SIGTERM"}, None)
        run.close()
        return run.folder

    @staticmethod
    def _row(sample, text: str, tokens: int, cost: float) -> dict:
        images = [] if sample.image is None else [tokens]
        return {
            "key": list(sample.key),
            "answer": text,
            "total": [16] * len(images),
            "kept": images,
            "layer_mean": images,
            "new_tokens": 2,
            "conversation": "vicuna_v1",
            "seconds": {"prefill": 0.004 * cost, "decode": 0.001},
            "prefill_flops": int(1e9 * cost * tokens),
            "kv_bytes_live": 1000 * tokens,
            "kv_bytes_allocated": 2000 * tokens,
            "kv_bytes_predicted": 1000 * tokens,
        }

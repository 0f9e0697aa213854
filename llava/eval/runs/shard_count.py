"""How many worker processes answer a run, on how many threads each, and in what batches. Imports no torch."""

from __future__ import annotations

from llava.common.threads import is_small, processes_for, threads_for
from llava.config import AdaVConfig
from llava.eval.benchmarks.questions import Sample
from llava.eval.runs.division import useful_shards
from llava.eval.runs.run import BATCH_SIZES, SMALL_MODEL_BATCH_SIZE, Run
from llava.methods.inside_llm import dropper_names

# Fewest questions of each process on a CPU. Its start takes seconds: two processes for 200 questions each were slower than
# one where another program kept a core busy (docs/evaluation.md).
_FEWEST_QUESTIONS = 600
# Most vision tokens of an image in a batch of SMALL_MODEL_BATCH_SIZE.
_FEW_TOKENS = 200


def shards_to_start(runs: list[Run], missing: list[list[Sample]], asked: int | None, devices: list[str]) -> int:
    """Return the number of shards that answer `missing`, the unanswered samples of each run.

    asked: the user's number; None is one per device, and on a CPU as many as cores, memory and questions allow.
    """
    if asked is None:
        own = (
            runs[0].engine.name == "llava"
        )  # on a CPU, one vLLM holds its requests back until it has the memory for them
        asked = len(devices) or (processes_for(_parameters(runs[0])) if own else 1)
        if not devices:
            asked = min(asked, max(1, sum(map(len, missing)) // _FEWEST_QUESTIONS))
    return useful_shards(missing, asked)


def shard_threads(runs: list[Run], asked: int | None, devices: list[str]) -> int | None:
    """Return the CPU threads of each shard; None divides the cores. asked: the user's number, or None."""
    return threads_for(None if devices else _parameters(runs[0]), asked)


def batch_size_of(runs: list[Run], asked: int | None, devices: list[str]) -> int:
    """Return the number of samples of a batch. asked: the user's number, or None."""
    engine, small = runs[0].engine.name, not devices and is_small(_parameters(runs[0]))
    return asked or min(default_batch_size(engine, small, run.checkpoint.anyres, run.config) for run in runs)


def default_batch_size(engine: str, small: bool, anyres: bool, config: AdaVConfig) -> int:
    """Return the samples of a batch under a configuration. small: a small model on a CPU; anyres: several tiles per image.

    With all tokens of several tiles, matrix products take most of the time, and a larger batch only needs more memory: the
    demo v1.6 takes 20.9 ms per question in batches of 32, and 18.9 in batches of 8.
    """
    every = config.method in ("none", *dropper_names()) or config.overall_tokens > _FEW_TOKENS
    return SMALL_MODEL_BATCH_SIZE if engine == "llava" and small and not (anyres and every) else BATCH_SIZES[engine]


def _parameters(run: Run) -> int | None:
    """Return the parameters of the model of a run, with those of its base; None if they are unknown."""
    known = [one.parameters for one in (run.checkpoint, run.model_base) if one is not None]
    return None if None in known else sum(known)

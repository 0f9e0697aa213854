"""WorkOrder: the task that the launcher gives to a worker process, as one JSON file. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from llava.common.files import read_json, write_atomically
from llava.config import AdaVConfig


@dataclass(frozen=True)
class Generation:
    """Settings of generation that are not in the configuration.

    conversation: name of a template; None takes the checkpoint's. temperature: 0 is greedy. Above 0, each sample has a
    seed of its own, made from `seed` and its key, so neither batches nor interruptions change an answer.
    """

    max_new_tokens: int
    conversation: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    temperature: float = 0.0
    top_p: float | None = None
    seed: int = 0


class OrderedSample(NamedTuple):
    """A question of a work order.

    key: that of the sample (llava.eval.benchmarks.questions). image: file name in the image folder, or None.
    """

    key: tuple
    image: str | None
    prompt: str


@dataclass(frozen=True)
class WorkOrder:
    """The questions of one shard, and everything that a worker needs to answer them.

    checkpoint, model_base: folders. answers: the file that answers are appended to. for_vllm: the folder of the checkpoint
    in transformers' format, if vLLM answers; None if this repository's engine does.
    """

    checkpoint: str
    model_base: str | None
    config: AdaVConfig
    generation: Generation
    batch_size: int
    image_folder: Path
    answers: Path
    samples: tuple[OrderedSample, ...]
    for_vllm: str | None = None

    def write(self, path: Path) -> None:
        """Write the order as a JSON file."""
        record = asdict(self) | {"image_folder": str(self.image_folder), "answers": str(self.answers)}
        # asdict leaves named tuples as they are, and JSON would write them without names.
        record["samples"] = [sample._asdict() for sample in self.samples]
        write_atomically(path, json.dumps(record))

    @classmethod
    def read(cls, path: Path) -> WorkOrder:
        """Read an order that `write` wrote."""
        record = read_json(path)
        samples = (OrderedSample(tuple(one["key"]), one["image"], one["prompt"]) for one in record["samples"])
        return cls(
            **record
            | {
                "config": AdaVConfig(**record["config"]),
                "generation": Generation(**record["generation"]),
                "image_folder": Path(record["image_folder"]),
                "answers": Path(record["answers"]),
                "samples": tuple(samples),
            }
        )

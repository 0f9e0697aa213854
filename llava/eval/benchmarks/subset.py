"""A seeded part of a benchmark's questions: the same part whatever order the file has."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from llava.eval.benchmarks.questions import Sample


@dataclass(frozen=True)
class Subset:
    """At least `size` questions drawn with `seed`.

    A question's place in the draw depends on its own key alone: the subset is the same whatever order the file has, and a
    smaller one is part of a larger one.
    """

    size: int
    seed: int = 0

    def draw(self, samples: list[Sample], group: Callable[[Sample], Hashable]) -> list[Sample]:
        """Whole groups (rotations, pairs: Benchmark.group) until there are `size` samples, in the order of `samples`."""
        groups: dict[Hashable, list[Sample]] = {}
        for sample in samples:
            groups.setdefault(group(sample), []).append(sample)
        drawn: set[tuple] = set()
        for members in sorted(groups.values(), key=lambda members: self._place(members[0])):
            if len(drawn) >= self.size:
                break
            drawn.update(sample.key for sample in members)
        return [sample for sample in samples if sample.key in drawn]

    def _place(self, sample: Sample) -> bytes:
        return hashlib.blake2b(repr((self.seed, sample.key)).encode(), digest_size=16).digest()

    def label(self, chosen: int, total: int) -> str:
        return f"{chosen:,} of {total:,} questions, drawn with seed {self.seed}"

"""Subset: a part of a benchmark's questions, drawn with a seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from llava.eval.benchmarks.questions import Sample


@dataclass(frozen=True)
class Subset:
    """At least `size` questions drawn with `seed`.

    The place of a group in the draw depends on the key of its first question and the seed only. So the subset does not
    depend on the order of the groups in the file, and a smaller subset is a part of a larger one.
    """

    size: int
    seed: int = 0

    def draw(self, samples: list[Sample], group: Callable[[Sample], Hashable]) -> list[Sample]:
        """Draw whole groups (Benchmark.group) until there are `size` samples; return them in the order of `samples`."""
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
        # A hash, not Python's random: it is the same on all machines and versions. hash() has a new salt per process.
        return hashlib.blake2b(repr((self.seed, sample.key)).encode(), digest_size=16).digest()

    def label(self, chosen: int, total: int) -> str:
        """Return the words for the score: how many questions were drawn."""
        return f"{chosen:,} of {total:,} questions, drawn with seed {self.seed}"

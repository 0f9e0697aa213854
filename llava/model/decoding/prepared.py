"""PreparedPrompt, a batch that is ready for the LLM with all state of its request, and StageClock, which times it."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from llava.methods.before_llm import Selection
from llava.model.decoding.adaptive_cache import Caching
from llava.model.decoding.dropping import Dropping

# What one more pass through the layers costs, in tokens of a pass of a small model.
PASS_TOKENS = 64


@dataclass(frozen=True)
class SharedPrefixes:
    """One prefix for each row of a batch. groups [B]: number of each row's prefix; lengths [U]: tokens of each prefix."""

    groups: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of_rows(cls, keys: Sequence[Hashable], lengths: Sequence[int], totals: Sequence[int]) -> SharedPrefixes:
        """Return the prefixes of rows.

        keys: rows with equal keys have the same prefix. lengths: tokens of each row's prefix. totals: tokens of each row
        """
        number = {key: n for n, key in enumerate(dict.fromkeys(keys))}
        groups = tuple(number[key] for key in keys)
        # At least one token of each row is left, whose logits are the result.
        shared = [
            min(min(length, total - 1) for length, total, own in zip(lengths, totals, groups, strict=True) if own == n)
            for n in range(len(number))
        ]
        return cls(groups, tuple(shared))


def worth_sharing(levels: Sequence[SharedPrefixes], totals: Sequence[int]) -> tuple[SharedPrefixes, ...]:
    """Return those of `levels` whose sharing makes prefill cheapest; () where whole rows are.

    levels: from the shortest prefixes to the longest; prefixes of a level begin with those of the levels before it.
    totals: tokens of each row
    """

    def cost(chosen: Sequence[SharedPrefixes]) -> int:
        tokens, starts = 0, [0] * len(totals)
        for level in chosen:
            firsts = [level.groups.index(n) for n in range(len(level.lengths))]
            tokens += sum(length - starts[row] for row, length in zip(firsts, level.lengths, strict=True)) + PASS_TOKENS
            starts = [level.lengths[n] for n in level.groups]
        return tokens + sum(totals) - sum(starts)

    every = [chosen for number in range(len(levels) + 1) for chosen in combinations(levels, number)]
    return min(every, key=lambda chosen: (cost(chosen), -len(chosen)))


@dataclass
class PreparedPrompt:
    """A batch that is ready for the LLM. B rows, padded on the left to S tokens.

    inputs_embeds [B, S, D]; attention_mask [B, S]; position_ids [B, S] (0 in the padding); labels [B, S] or None
    selections        per row, per image: the Selection of its vision tokens
    image_spans       per row, per image: (start, length) in the padded row
    lengths           per row: real tokens; unpruned_lengths: the same without selection
    position_offset   [B, 1]: position of the first generated token minus (last position + 1)
    dropping          drops vision tokens between LLM layers; None where all of them stay
    prefixes          prefixes that rows share, the shortest first (shared_prefill.py); () where each row is prefilled on its
                      own
    caching           settings of the KV cache
    clock             times of the stages before the LLM
    """

    inputs_embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor | None
    selections: list[list[Selection]]
    image_spans: list[list[tuple[int, int]]]
    lengths: list[int]
    unpruned_lengths: list[int]
    position_offset: Tensor
    dropping: Dropping | None = None
    prefixes: tuple[SharedPrefixes, ...] = ()
    caching: Caching | None = None
    clock: StageClock | None = None

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per stage: vision_tower, projector, selection, splice. Waits for the device to finish them."""
        return {} if self.clock is None else self.clock.seconds


class StageClock:
    """Seconds per stage.

    On a GPU the times are those of the device. Events mark the borders of stages and are read only by `seconds`, so
    timing itself makes neither host nor device wait.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = {}
        self._open: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def stage(self, name: str, on_host: bool = False):
        """Time the work inside the `with` block. on_host: it is work of the host, such as reading a file."""
        if self._cuda and not on_host:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._open.append((name, begin, end))
        else:
            start = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - start)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds by stage, in the order in which the stages were first entered."""
        for name, begin, end in self._open:
            end.synchronize()
            self._add(name, begin.elapsed_time(end) / 1000)  # elapsed_time is in milliseconds
        self._open = []
        return self._seconds

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

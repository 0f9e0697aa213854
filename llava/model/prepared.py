"""PreparedPrompt: a batch that is ready for the LLM, and all that belongs to its request; and the clock that times it."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava.model.kv_cache.cache import Caching
from llava.model.token_dropping import Dropping
from llava.model.token_selection import Selection


@dataclass
class PreparedPrompt:
    """A batch that is ready for the LLM. B rows, padded left to S.

    inputs_embeds [B, S, D]; attention_mask [B, S]; position_ids [B, S] (0 in the padding); labels [B, S] or None
    selections        per row, per image: what was kept
    image_spans       per row, per image: (start, length) in the padded row
    lengths           per row: real tokens now; unpruned_lengths: what they would be without selection
    position_offset   [B, 1]: what the first generated token's position is above "last position + 1"
    dropping          which of the image tokens go between LLM layers; None where all of them stay
    caching           how keys and values are kept
    seconds           time per stage: vision_tower, projector, selection, splice
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
    caching: Caching | None = None
    seconds: dict[str, float] = field(default_factory=dict)


class StageClock:
    """Seconds per stage; on a GPU each stage waits for the device, so that its work is counted where it belongs."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = {}
        self._cuda = device.type == "cuda"

    @contextmanager
    def stage(self, name: str):
        self._wait()
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def _wait(self):
        if self._cuda:
            torch.cuda.synchronize()

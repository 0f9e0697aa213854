"""Images after the vision tower, and a bounded store of recent ones, so that questions about one image share them.

Nothing here depends on a question. Tokens of an EncodedImage are selected anew for each question.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, fields

from torch import Tensor

from llava.methods.before_llm.base import ImageTokens
from llava.mm_utils import TilePlan

RECORD_BYTES = 1024  # estimate for the Python objects of one image, so that images without tensors count too


@dataclass(frozen=True)
class EncodedImage:
    """One encoded image: its tile plan, and its vision tokens in LLM order; tokens is None under `no_image`.

    total: where the image was made smaller (Selector.resizes), its vision tokens before that; else None
    """

    plan: TilePlan
    tokens: ImageTokens | None
    total: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, plus RECORD_BYTES."""
        if self.tokens is None:
            return RECORD_BYTES
        held = [*_tensors(self.tokens), *(_tensors(self.tokens.tower) if self.tokens.tower else [])]
        return RECORD_BYTES + sum(tensor.nbytes for tensor in held)


def _tensors(record) -> list:
    """Return the tensors among the fields of a dataclass instance."""
    values = (getattr(record, f.name) for f in fields(record))
    return [value for value in values if hasattr(value, "nbytes")]


class RecentImages:
    """Encoded images, or tensors of their pixels, by key, up to `capacity` bytes; the least recently used are dropped.

    It belongs to one worker and one checkpoint. The key must contain everything else that the encoding depends on: the
    image file, and the part of the configuration that LlavaMetaForCausalLM.encoding returns.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.nbytes = 0
        self._held: OrderedDict[Hashable, EncodedImage | Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable) -> EncodedImage | Tensor | None:
        """Return the image of `key` and mark it as used; None where it is not stored."""
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: Hashable, image: EncodedImage | Tensor) -> None:
        """Store `image`, unless it alone exceeds the capacity."""
        if key in self._held:
            self.nbytes -= self._held.pop(key).nbytes
        if image.nbytes > self.capacity:
            return
        self._held[key] = image
        self.nbytes += image.nbytes
        while self.nbytes > self.capacity:
            self.nbytes -= self._held.popitem(last=False)[1].nbytes

"""Images after the vision tower, and a bounded store of the most recent ones, so that questions about one image share it.

Nothing here depends on a question: tokens are selected of an EncodedImage anew for each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, fields

from llava.methods.before_llm.base import ImageTokens
from llava.mm_utils import TilePlan

RECORD_BYTES = 1024


@dataclass(frozen=True)
class EncodedImage:
    """One image as the LLM could read it: how it was cut into tiles, and its vision tokens in LLM order.

    tokens: None under a method that looks at no image.
    """

    plan: TilePlan
    tokens: ImageTokens | None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that belong to it, and a little for what holds them."""
        if self.tokens is None:
            return RECORD_BYTES
        held = [*_tensors(self.tokens), *(_tensors(self.tokens.tower) if self.tokens.tower else [])]
        return RECORD_BYTES + sum(tensor.nbytes for tensor in held)


def _tensors(record) -> list:
    values = (getattr(record, f.name) for f in fields(record))
    return [value for value in values if hasattr(value, "nbytes")]


class RecentImages:
    """Encoded images by key, the least recently used ones dropped as soon as all together exceed `capacity` bytes.

    Belongs to one worker and one checkpoint. The key must name everything else that the encoding depends on: the image
    file and what a configuration asks of the tower (LlavaMetaForCausalLM.encoding).
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.nbytes = 0
        self._held: OrderedDict[Hashable, EncodedImage] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable) -> EncodedImage | None:
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: Hashable, image: EncodedImage) -> None:
        """Keep `image`, unless it is larger than the capacity by itself."""
        if key in self._held:
            self.nbytes -= self._held.pop(key).nbytes
        if image.nbytes > self.capacity:
            return
        self._held[key] = image
        self.nbytes += image.nbytes
        while self.nbytes > self.capacity:
            self.nbytes -= self._held.popitem(last=False)[1].nbytes

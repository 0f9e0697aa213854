"""ImageRequest: all that the model must know about one image beside its pixels, as bytes that travel with them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property

import torch
from torch import Tensor

from llava.methods.before_llm import SELECTORS, Selector


@dataclass(frozen=True)
class ImageRequest:
    """How the tokens of one image of one prompt are selected.

    image     hash of the image, without any settings
    size      (width, height) of the image: in pixels, or in tokens where an image is a grid of tokens
    method, options: as `select` takes them; options are those of the method alone
    budget    as `select` takes it, and what an image that is made smaller may cost; 1 for methods that read none
    anyres    rule by which the image is cut into tiles; None where it is not cut
    question  token ids that the method reads, of the question or of its words (Selector.words); None for a method that
              reads none
    words     the question as a string; None unless the method reads the state text_cosine
    key       ImageTokens.key; None for a method that does not read it
    saliency  the option of that name

    Two requests are equal exactly where the LLM gets the same tokens, so `to_bytes` is the identity of the result in
    vLLM's caches. A field that a method does not read must be None: otherwise equal tokens are computed again.
    """

    image: str
    size: tuple[int, int]
    method: str
    budget: int
    options: dict
    anyres: str | None
    question: tuple[int, ...] | None = None
    words: str | None = None
    key: int | None = None
    saliency: str = "attention"

    @property
    def tiles_key(self) -> tuple[str, str | None, int | None]:
        """Identifies the pixels of the image's tiles, whatever the question; methods share them unless they resize."""
        return self.image, self.anyres, self.budget if self.selector.resizes else None

    @cached_property
    def selector(self) -> Selector:
        """The method with its options."""
        return SELECTORS[self.method](**self.options)

    def to_bytes(self) -> bytes:
        """Return the request as JSON; equal requests give equal bytes."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    def to_tensor(self) -> Tensor:
        """Return the request as uint8 [bytes]."""
        return torch.frombuffer(bytearray(self.to_bytes()), dtype=torch.uint8)

    @classmethod
    def from_tensor(cls, tensor: Tensor) -> ImageRequest:
        """Return the request that `to_tensor` gave as `tensor`, which lies on the host."""
        values = json.loads(tensor.numpy().tobytes())
        question = values["question"]
        return cls(
            **values | {"size": tuple(values["size"]), "question": None if question is None else tuple(question)}
        )

"""Selecting: what the model classes of all families share, from the requests of a batch to the selected tokens."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from llava.common.transfer import to_device
from llava.integrations.vllm.image_request import ImageRequest
from llava.integrations.vllm.processor import REQUEST
from llava.methods.before_llm import ImageTokens, Selection, select_all


class Selecting:
    """Mixin for vLLM's model classes. Only images that carry an ImageRequest are embedded in another way than vLLM's."""

    @property
    @abstractmethod
    def tower_device(self) -> torch.device:
        """The device of the vision tower."""

    @abstractmethod
    def embed_kept(self, inputs: dict, requests: list[ImageRequest]) -> list[Tensor]:
        """Return what `embed_multimodal` returns of each image, one row for each kept token.

        inputs: what the processor made of the images, as vLLM batches it.
        """

    def embed_multimodal(self, **kwargs: object):
        """Return the LLM embeddings of each image, [K, D], with the columns that the family adds."""
        requests = kwargs.pop(REQUEST, None)
        if requests is None:
            return super().embed_multimodal(**kwargs)
        return self.embed_kept(kwargs, [ImageRequest.from_tensor(one) for one in requests])

    def _select(self, images: list[ImageTokens], requests: list[ImageRequest]) -> list[Selection]:
        """Return the kept tokens of each image."""
        texts = self._questions(requests)
        # All images with one method and its options are selected together, which greedy methods make use of.
        groups: dict[tuple, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault((request.method, request.budget, repr(request.options)), []).append(i)
        kept: dict[int, Selection] = {}
        for (method, budget, _), members in groups.items():
            own = ([values[i] for i in members] for values in (images, texts))
            kept.update(zip(members, select_all(method, *own, budget, **requests[members[0]].options), strict=True))
        return [kept[i] for i in range(len(requests))]

    def _questions(self, requests: list[ImageRequest]) -> list[Tensor]:
        """Return the word embeddings [m, D] of each request's question; m is 0 for methods that read none."""
        counts = [len(request.question or ()) for request in requests]
        # One copy and one lookup for the whole batch. Id 0 stands for an empty batch, as vLLM's lookup needs one.
        ids = [token for request in requests for token in request.question or ()]
        words = self.language_model.embed_input_ids(to_device(torch.tensor([*ids, 0]), self.tower_device))
        return list(words[:-1].split(counts))

"""What vLLM's processors have in common with our settings: they count placeholders, make pixels and name cache entries.

A processor runs in vLLM's front end. It lays out the prompt before the model has seen a pixel, so the number of kept
tokens follows from the image size and the settings alone.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property

from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import PromptReplacement

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.integrations.vllm.image_request import ImageRequest
from llava.integrations.vllm.prompt_images import PromptImages
from llava.integrations.vllm.settings import KEY, check, of_request, server_keys

REQUEST = "adav_request"  # a field of an image that reaches the model


@dataclass
class _Prompt:
    """The prompt that a thread is processing.

    images: the ImageRequest of each image. hashes: identities of all items in vLLM's caches, by modality. counts: tokens of
    an image by ImageRequest.size. missing: the images whose pixels no cache has, as indices.
    """

    settings: AdaVConfig
    images: list[ImageRequest]
    hashes: dict[str, list[str]]
    counts: dict[tuple[int, int], int]
    missing: list[int] = field(default_factory=list)


# vLLM calls a processor from several threads, so the state of a prompt cannot be on the processor. None: plain vLLM.
_PROMPT: ContextVar[_Prompt | None] = ContextVar("adav_prompt", default=None)


#: How often `forget_images` was called. The stores of the model may lie in other processes, which only requests reach.
_forgotten = 0


def forget_images() -> None:
    """Make later requests of this process compute pixels and tower outputs anew, also of images that are stored.

    The stores drop the old entries later, as the least recently used ones. vLLM's reset_mm_cache() does not empty them.
    """
    global _forgotten
    _forgotten += 1


def settings_of_server(model_config, refuse: Callable[[AdaVConfig], None] = check) -> dict[str, object]:
    """Return the keys of the server's settings; {} where it has none. UserError for settings that cannot be used.

    refuse: the check of the model's family.
    """
    # vLLM hands all of mm_processor_kwargs to the checkpoint's own processor, which does not know our key. So it is
    # moved into the configuration of the model, in each process that reads it first.
    settings, model = model_config.get_multimodal_config(), model_config.hf_config
    given = settings.mm_processor_kwargs or {}
    if KEY in given:
        setattr(model, KEY, server_keys(given[KEY], refuse))
        settings.mm_processor_kwargs = {name: value for name, value in given.items() if name != KEY}
    return getattr(model, KEY, {})


class Info:
    """Mixin for vLLM's processing info of a family: it has the server's settings, and our reading of the checkpoint."""

    #: Raises UserError for settings that the family cannot run with.
    refuse = staticmethod(check)

    def __init__(self, ctx):
        super().__init__(ctx)
        first = not hasattr(ctx.model_config.hf_config, KEY)
        self.server = settings_of_server(ctx.model_config, self.refuse)
        # An architecture without selection ends the start of the server. Only the first processor reads the checkpoint for
        # this, because that takes milliseconds and vLLM makes a further processor for each chat request.
        if self.server and first:
            self.images  # noqa: B018

    @cached_property
    def images(self) -> PromptImages:
        """UserError for an architecture or an engine that our code does not work with."""
        return self.make_images()

    @abstractmethod
    def make_images(self) -> PromptImages:
        """Return the PromptImages of the checkpoint. UserError as in `images`."""

    @abstractmethod
    def size(self, items: ImageProcessorItems, index: int, hf_kwargs: Mapping[str, object]) -> tuple[int, int]:
        """Return ImageRequest.size of an image. hf_kwargs: settings of the checkpoint's own processor."""


class Processor:
    """Mixin for vLLM's processors of a family. Without settings, all is the base class's own."""

    def apply(self, inputs, timing_ctx):
        """Process a prompt as vLLM does. VLLMValidationError (HTTP 400) for settings that cannot be used."""
        try:
            inputs, prompt = self._with_settings(inputs)
        except UserError as error:
            raise VLLMValidationError(str(error)) from None
        before = _PROMPT.set(prompt)
        try:
            return super().apply(inputs, timing_ctx)
        finally:
            _PROMPT.reset(before)

    def _with_settings(self, inputs):
        """Return the inputs without our settings, and the _Prompt that the settings ask for; None for plain vLLM."""
        given = dict(inputs.hf_processor_mm_kwargs)
        asked = given.pop(KEY, {})
        plain = replace(inputs, hf_processor_mm_kwargs=given)
        if KEY not in inputs.hf_processor_mm_kwargs and not self.info.server:
            return inputs, None
        settings = of_request(asked, self.info.server, self.info.refuse)
        items = inputs.mm_data_items.get("image")
        if not items:
            return plain, None
        if not isinstance(items, ImageProcessorItems):
            raise UserError(
                'ready embeddings of an image came with "adav", which selects from pixels; allowed is an image'
            )
        # 1. The base class would mix our settings into the hash. What the model reads is added instead.
        hashes = super()._get_mm_hashes(plain)
        own = [f"{_forgotten} {one}" for one in hashes["image"]]
        # 2. What each image is asked.
        sizes = [self.info.size(items, index, given) for index in range(len(items))]
        images = self.info.images.requests(inputs.prompt, sizes, own, settings)
        identities = [hashlib.blake2b(image.to_bytes(), digest_size=32).hexdigest() for image in images]
        # 3. How many tokens it keeps; a budget that rounds down to nothing is refused here.
        counts = {size: self.info.images.tokens(size, settings) for size in set(sizes)}
        return plain, _Prompt(settings, images, {**hashes, "image": identities}, counts, list(range(len(images))))

    def _get_mm_hashes(self, inputs):
        """Return the identity of each image's tokens, in vLLM's caches of pixels, encoder outputs and KV blocks."""
        prompt = _PROMPT.get()
        return super()._get_mm_hashes(inputs) if prompt is None else prompt.hashes

    def _get_cache_missing_items(self, *args, **kwargs):
        cached, missing = super()._get_cache_missing_items(*args, **kwargs)
        prompt = _PROMPT.get()
        if prompt is not None:
            prompt.missing = [index for index, hit in enumerate(cached["image"]) if not hit]
        return cached, missing

    def _apply_hf_processor_main(self, mm_items, hf_kwargs):
        """Return pixels and ImageRequest of each image that no cache has."""
        prompt = _PROMPT.get()
        if prompt is None:
            return super()._apply_hf_processor_main(mm_items, hf_kwargs)
        requests = [prompt.images[index] for index in prompt.missing]
        inputs = self.inputs(mm_items, hf_kwargs, requests)
        if requests:
            inputs[REQUEST] = [one.to_tensor() for one in requests]
        return inputs

    @abstractmethod
    def inputs(self, mm_items, hf_kwargs: Mapping[str, object], requests: Sequence[ImageRequest]) -> BatchFeature:
        """Return what the model gets of `mm_items` beside the requests of their images."""

    @abstractmethod
    def fields(self, hf_inputs: BatchFeature, hf_kwargs: Mapping[str, object]) -> dict[str, MultiModalFieldConfig]:
        """Return how vLLM divides `inputs` into items."""

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs) -> Mapping[str, MultiModalFieldConfig]:
        if _PROMPT.get() is None:
            return super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        own = {REQUEST: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}
        return self.fields(hf_inputs, hf_processor_mm_kwargs) | own

    def size(self, mm_items, hf_kwargs: Mapping[str, object], out_mm_kwargs, index: int) -> tuple[int, int]:
        """Return ImageRequest.size of an image of `mm_items`. out_mm_kwargs: what `inputs` gave, item by item."""
        return self.info.size(mm_items["image"], index, hf_kwargs)

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs) -> Sequence[PromptReplacement]:
        updates, prompt = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs), _PROMPT.get()
        if prompt is None:
            return updates
        images = self.info.images

        def placeholders(index: int) -> list[int]:
            size = self.size(mm_items, hf_processor_mm_kwargs, out_mm_kwargs, index)
            if size not in prompt.counts:  # the checkpoint's processor resized the image as the request asks
                prompt.counts[size] = images.tokens(size, prompt.settings)
            return [images.image_id] * prompt.counts[size]

        own = PromptReplacement(modality="image", target=[images.image_id], replacement=placeholders)
        return [own if update.modality == "image" else update for update in updates]

    def get_dummy_inputs(self, *args, **kwargs):
        """Return inputs with the most tokens per image, from which vLLM sizes its memory."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        # Any request may ask for all tokens, whatever the server's settings are.
        keep_all = {KEY: {"method": "none", "options": {}}} if self.info.server else {}
        return replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, **keep_all})

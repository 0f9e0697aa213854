"""vLLM's processors of LLaVA, with our settings: they count placeholders, make pixels and name cache entries.

A processor runs in vLLM's front end. It lays out the prompt before the model has seen a pixel, so the number of kept
tokens follows from the image size and the settings alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models.llava import (
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
    PixtralHFMultiModalProcessor,
    PixtralHFProcessingInfo,
)
from vllm.model_executor.models.llava_next import LlavaNextMultiModalProcessor, LlavaNextProcessingInfo
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems
from vllm.multimodal.processing import PromptReplacement

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.integrations.vllm.image_request import ImageRequest
from llava.integrations.vllm.prompt_images import PromptImages
from llava.integrations.vllm.settings import KEY, of_request, server_keys

PIXELS, REQUEST = "adav_pixels", "adav_request"  # fields of an image that reach the model


@dataclass
class _Prompt:
    """The prompt that a thread is processing.

    images: the ImageRequest of each image. missing: the images whose pixels no cache has, as indices.
    """

    settings: AdaVConfig
    images: list[ImageRequest]
    missing: list[int] = field(default_factory=list)


# vLLM calls a processor from several threads, so the state of a prompt cannot be on the processor. None: plain vLLM.
_PROMPT: ContextVar[_Prompt | None] = ContextVar("adav_prompt", default=None)


def settings_of_server(model_config) -> dict[str, object]:
    """Return the keys of the server's settings; {} where it has none. UserError for settings that cannot be used."""
    # vLLM hands all of mm_processor_kwargs to the checkpoint's own processor, which does not know our key. So it is
    # moved into the configuration of the model, in each process that reads it first.
    settings, model = model_config.get_multimodal_config(), model_config.hf_config
    given = settings.mm_processor_kwargs or {}
    if KEY in given:
        setattr(model, KEY, server_keys(given[KEY]))
        settings.mm_processor_kwargs = {name: value for name, value in given.items() if name != KEY}
    return getattr(model, KEY, {})


class _Info:
    """Mixin for vLLM's processing info of a LLaVA: it has the server's settings, and our reading of the checkpoint."""

    def __init__(self, ctx):
        super().__init__(ctx)
        self.server = settings_of_server(ctx.model_config)
        if self.server:
            self.images  # noqa: B018  an architecture without selection ends the start of the server

    @cached_property
    def images(self) -> PromptImages:
        """UserError for an architecture that our code does not know."""
        processor = self.get_hf_processor().image_processor
        return PromptImages(self.get_hf_config(), processor.to_dict(), self.get_tokenizer(), self.model_id)


class LlavaInfo(_Info, LlavaProcessingInfo):
    """Of LLaVA-1.5."""


class LlavaNextInfo(_Info, LlavaNextProcessingInfo):
    """Of LLaVA-1.6."""


class PixtralInfo(_Info, PixtralHFProcessingInfo):
    """Of Pixtral, which vLLM runs as a LLaVA; settings are refused."""


def llava_info(ctx):
    """Return the processing info of a LlavaForConditionalGeneration."""
    pixtral = ctx.model_config.hf_config.vision_config.model_type == "pixtral"
    return (PixtralInfo if pixtral else LlavaInfo)(ctx)


class _Processor:
    """Mixin for vLLM's processors of a LLaVA. Without settings, all is the base class's own."""

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
        settings = of_request(asked, self.info.server)
        items = inputs.mm_data_items.get("image")
        if not items:
            return plain, None
        if not isinstance(items, ImageProcessorItems):
            raise UserError(
                'ready embeddings of an image came with "adav", which selects from pixels; allowed is an image'
            )
        # The base class would mix our settings into the hash. What the model reads is added below instead.
        hashes = super()._get_mm_hashes(plain)["image"]
        sizes = [_size(items, index) for index in range(len(items))]
        images = self.info.images.requests(inputs.prompt, sizes, hashes, settings)
        for size in sizes:
            self.info.images.tokens(size, settings)  # a budget that rounds down to nothing
        return plain, _Prompt(settings, images, list(range(len(images))))

    def _get_mm_hashes(self, inputs):
        """Return the identity of each image's tokens, in vLLM's caches of pixels, encoder outputs and KV blocks."""
        hashes, prompt = super()._get_mm_hashes(inputs), _PROMPT.get()
        if prompt is None:
            return hashes
        own = [hashlib.blake2b(image.to_bytes(), digest_size=32).hexdigest() for image in prompt.images]
        return {**hashes, "image": own}

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
        items, dtype = mm_items.get("image") or (), self.info.ctx.model_config.dtype
        requests = [prompt.images[index] for index in prompt.missing]
        pixels = [
            self.info.images.pixels(_picture(items.get(nth)), request, dtype) for nth, request in enumerate(requests)
        ]
        return BatchFeature({PIXELS: pixels, REQUEST: [one.to_tensor() for one in requests]} if requests else {})

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs) -> Mapping[str, MultiModalFieldConfig]:
        if _PROMPT.get() is None:
            return super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return {
            PIXELS: MultiModalFieldConfig.batched("image"),
            REQUEST: MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs) -> Sequence[PromptReplacement]:
        prompt = _PROMPT.get()
        if prompt is None:
            return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        placeholder = self.info.get_hf_config().image_token_index

        def placeholders(index: int) -> list[int]:
            return [placeholder] * self.info.images.tokens(_size(mm_items["image"], index), prompt.settings)

        return [PromptReplacement(modality="image", target=[placeholder], replacement=placeholders)]

    def get_dummy_inputs(self, *args, **kwargs):
        """Return inputs with the most tokens per image, from which vLLM sizes its memory."""
        inputs = super().get_dummy_inputs(*args, **kwargs)
        # Any request may ask for all tokens, whatever the server's settings are.
        keep_all = {KEY: {"method": "none", "options": {}}} if self.info.server else {}
        return replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, **keep_all})


class LlavaProcessor(_Processor, LlavaMultiModalProcessor):
    """Of LLaVA-1.5."""


class LlavaNextProcessor(_Processor, LlavaNextMultiModalProcessor):
    """Of LLaVA-1.6."""


class PixtralProcessor(_Processor, PixtralHFMultiModalProcessor):
    """Of Pixtral."""


def llava_processor(info, dummy_inputs):
    """Return the processor of a LlavaForConditionalGeneration."""
    return (PixtralProcessor if isinstance(info, PixtralInfo) else LlavaProcessor)(info, dummy_inputs)


def _size(items: ImageProcessorItems, index: int) -> tuple[int, int]:
    """Return (width, height) of an image."""
    size = items.get_image_size(index)
    return size.width, size.height


def _picture(image) -> Image.Image:
    """Return an image of a prompt as a PIL image. vLLM's offline API takes arrays too."""
    if isinstance(image, Image.Image):
        return image
    array = np.asarray(image.cpu() if isinstance(image, torch.Tensor) else image)
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise VLLMValidationError(
            f'an image is an array of {array.dtype} of shape {list(array.shape)}; beside "adav" allowed are PIL images, and '
            "arrays of uint8 with three colours"
        )
    return Image.fromarray(array)

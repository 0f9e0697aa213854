"""LLaVA-1.5 and LLaVA-1.6 with a CLIP tower: images are tiles of one size, and positions count from 0 without gaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models import llava, llava_next
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems
from vllm.transformers_utils.processor import cached_image_processor_from_config

from llava.common.errors import UserError
from llava.integrations.vllm.image_request import ImageRequest
from llava.integrations.vllm.processor import Info, Processor, settings_of_server
from llava.integrations.vllm.prompt_images import TiledImages, Tiling
from llava.integrations.vllm.selecting import Selecting
from llava.integrations.vllm.settings import store_bytes
from llava.integrations.vllm.tower_store import TileStates, TowerStore
from llava.methods.before_llm import ImageTokens, TowerStates
from llava.model.image_tokens import project_now, projects_late, tokens_in_order
from llava.model.multimodal_encoder.clip_encoder import cls_attention, middle_layer, received_attention
from llava.model.multimodal_encoder.clip_text_tower import ClipTextTower
from llava.model.processors import adopt_padding

PIXELS = "adav_pixels"  # a field of an image that reaches the model


# --- processor ----------------------------------------------------------------------------------------------------


class _TiledInfo(Info):
    """Of a LLaVA."""

    def make_images(self) -> TiledImages:
        processor = self.get_hf_processor().image_processor
        return TiledImages(self.get_hf_config(), processor.to_dict(), self.get_tokenizer(), self.model_id)

    def size(self, items: ImageProcessorItems, index: int, hf_kwargs: Mapping[str, object]) -> tuple[int, int]:
        size = items.get_image_size(index)
        return size.width, size.height


class LlavaInfo(_TiledInfo, llava.LlavaProcessingInfo):
    """Of LLaVA-1.5."""


class LlavaNextInfo(_TiledInfo, llava_next.LlavaNextProcessingInfo):
    """Of LLaVA-1.6."""


class PixtralInfo(_TiledInfo, llava.PixtralHFProcessingInfo):
    """Of Pixtral, which vLLM runs as a LLaVA; settings are refused."""


def llava_info(ctx):
    """Return the processing info of a LlavaForConditionalGeneration."""
    pixtral = ctx.model_config.hf_config.vision_config.model_type == "pixtral"
    return (PixtralInfo if pixtral else LlavaInfo)(ctx)


class _TiledProcessor(Processor):
    """Of a LLaVA. Pixels are made by our own code."""

    def inputs(self, mm_items, hf_kwargs: Mapping[str, object], requests: Sequence[ImageRequest]) -> BatchFeature:
        items, dtype = mm_items.get("image") or (), self.info.ctx.model_config.dtype
        pixels = [
            self.info.images.pixels(_picture(items.get(nth)), request, dtype) for nth, request in enumerate(requests)
        ]
        return BatchFeature({PIXELS: pixels} if requests else {})

    def fields(self, hf_inputs: BatchFeature, hf_kwargs: Mapping[str, object]) -> dict[str, MultiModalFieldConfig]:
        return {PIXELS: MultiModalFieldConfig.batched("image")}


class LlavaProcessor(_TiledProcessor, llava.LlavaMultiModalProcessor):
    """Of LLaVA-1.5."""


class LlavaNextProcessor(_TiledProcessor, llava_next.LlavaNextMultiModalProcessor):
    """Of LLaVA-1.6."""


class PixtralProcessor(_TiledProcessor, llava.PixtralHFMultiModalProcessor):
    """Of Pixtral."""


def llava_processor(info, dummy_inputs):
    """Return the processor of a LlavaForConditionalGeneration."""
    return (PixtralProcessor if isinstance(info, PixtralInfo) else LlavaProcessor)(info, dummy_inputs)


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


# --- model --------------------------------------------------------------------------------------------------------


class _SelectsTiles(Selecting):
    """Mixin for vLLM's models of a LLaVA with a CLIP tower."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model_config = vllm_config.model_config
        try:
            self._tiling = Tiling(self.config, model_config.model)
        except UserError:  # another tower; the processor refuses requests with settings
            return
        # Methods that know which patches show only padding learn it from the layout.
        adopt_padding(self._tiling.config, cached_image_processor_from_config(model_config))
        vision = self._tiling.vision
        self._store = TowerStore(
            patches=self._tiling.side**2,
            width=vision.hidden_size,
            head_size=vision.hidden_size // vision.num_attention_heads,
            capacity=store_bytes(vllm_config.additional_config),
            dtype=model_config.dtype,
            device=self.vision_tower.device,
        )
        self._text_tower: ClipTextTower | None = None
        self._text_tower_name = settings_of_server(model_config).get("options", {}).get("text_tower")

    @property
    def tower_device(self) -> torch.device:
        return self.vision_tower.device

    def embed_kept(self, inputs: dict, requests: list[ImageRequest]) -> list[Tensor]:
        if self._text_tower_name and self._text_tower is None:
            # vLLM's own trial of the largest image comes first, so a tower that cannot be loaded ends the start.
            tower = SimpleNamespace(config=self._tiling.vision, device=self.vision_tower.device)
            self._text_tower = ClipTextTower.load(self._text_tower_name, tower)
        images = self._image_tokens(inputs[PIXELS], requests)
        return [selection.features for selection in self._select(images, requests)]

    def _image_tokens(self, pixels: Sequence[Tensor], requests: list[ImageRequest]) -> list[ImageTokens]:
        """Return the ImageTokens of each request; projected, where its method reads features or keeps all."""
        # 1. The tower, once for each image that is not stored.
        states = self._tile_states(pixels, requests)
        # 2. The tokens of each image in LLM order. Requests of one image share them.
        tokens: dict[tuple, ImageTokens] = {}
        for request in requests:
            if request.tiles_key not in tokens:
                own = states[request.tiles_key]
                layout = self._tiling.layout(request.size, request.anyres)
                tower = TowerStates(self.multi_modal_projector, hidden=own.hidden, keys=own.keys, received=own.received)
                tokens[request.tiles_key] = tokens_in_order(
                    own.hidden[:, 1:], own.saliency, layout, self.multi_modal_projector, tower=tower
                )
        # 3. The projector, once for each image of which more than the kept tokens is needed.
        now = dict.fromkeys(
            request.tiles_key
            for request in requests
            if not projects_late(request.selector, tokens[request.tiles_key], request.budget)
        )
        newline = getattr(self, "image_newline", None)
        projected = dict(zip(now, project_now([tokens[key] for key in now], newline), strict=True))
        # 4. What belongs to the question.
        images = []
        for request in requests:
            late = projects_late(request.selector, tokens[request.tiles_key], request.budget)
            image = (tokens if late else projected)[request.tiles_key]
            tower = image.tower
            if request.words is not None:
                tower = replace(tower, text_cosine=self._text_tower.cosine(tower.hidden[:, 1:], request.words))
            images.append(replace(image, key=request.key or 0, tower=tower))
        return images

    def _tile_states(self, pixels: Sequence[Tensor], requests: list[ImageRequest]) -> dict[tuple, TileStates]:
        """Return the outputs of the tower for each image, by ImageRequest.tiles_key."""
        given = {request.tiles_key: own for request, own in zip(requests, pixels, strict=True)}
        maps = {request.tiles_key for request in requests if "received" in request.selector.tower_states}
        states = self._store.get(list(given))
        missing = [key for key in given if key not in states or (key in maps and states[key].received is None)]
        if missing:
            found = self._run_tower(torch.cat([given[key] for key in missing]), not maps.isdisjoint(missing))
            for key, own in zip(missing, found.split([len(given[key]) for key in missing]), strict=True):
                states[key] = own
                self._store.put(key, own)
        return states

    def _run_tower(self, pixels: Tensor, maps: bool) -> TileStates:
        """Run vLLM's tower on tiles [T, 3, H, W]. maps: compute TileStates.received, too.

        vLLM's attention returns no weights, so hooks read its queries and keys.
        """
        layers = self.vision_tower.vision_model.encoder.layers
        middle, last = layers[middle_layer(len(layers)) - 1].self_attn, layers[-1].self_attn
        seen: dict[torch.nn.Module, Tensor] = {}

        def read(module, given, result):
            seen[module] = result[0]

        hooks = [one.qkv_proj.register_forward_hook(read) for one in ([middle, last] if maps else [last])]
        try:
            hidden = self.vision_tower(pixels, feature_select_strategy="full")
        finally:
            for hook in hooks:
                hook.remove()
        query, key = _by_head(seen[last.qkv_proj], last)
        means = [cls_attention(query, key, last.scale), key.float().mean(dim=1)]
        if maps:
            parts = (*_by_head(seen[middle.qkv_proj], middle), middle.scale), (query, key, last.scale)
            means.append(torch.stack([received_attention(*part) for part in parts], dim=-1))
        if last.tp_size > 1:
            # Each rank has the means over its own heads, and all ranks have equally many.
            sums = tensor_model_parallel_all_reduce(torch.cat([mean.flatten(1) for mean in means], dim=1))
            parts = (sums / last.tp_size).split([mean[0].numel() for mean in means], dim=1)
            means = [part.reshape(mean.shape) for part, mean in zip(parts, means, strict=True)]
        return TileStates(hidden, *means)


def _by_head(projected: Tensor, attention) -> list[Tensor]:
    """Return queries and keys [T, heads of this rank, 1 + P, d] from what qkv_proj of an `attention` returned."""
    heads = attention.num_heads_per_partition
    return [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in projected.chunk(3, dim=-1)[:2]]


@MULTIMODAL_REGISTRY.register_processor(llava_processor, info=llava_info, dummy_inputs=llava.LlavaDummyInputsBuilder)
class LlavaForConditionalGeneration(_SelectsTiles, llava.LlavaForConditionalGeneration):
    """LLaVA-1.5."""


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextProcessor, info=LlavaNextInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class LlavaNextForConditionalGeneration(_SelectsTiles, llava_next.LlavaNextForConditionalGeneration):
    """LLaVA-1.6."""

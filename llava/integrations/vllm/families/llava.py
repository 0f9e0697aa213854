"""LLaVA-1.5 and LLaVA-1.6 with a CLIP tower: images are tiles of one size, and positions count from 0 without gaps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.model_executor.models import llava, llava_next
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems
from vllm.transformers_utils.processor import cached_image_processor_from_config

from llava.common.errors import UserError
from llava.integrations.vllm.clip_tower import run_tower
from llava.integrations.vllm.image_request import ImageRequest
from llava.integrations.vllm.processor import Info, Processor, settings_of_server
from llava.integrations.vllm.prompt_images import TiledImages, Tiling
from llava.integrations.vllm.selecting import Selecting
from llava.integrations.vllm.settings import store_bytes
from llava.integrations.vllm.tower_store import TileStates, TowerStore
from llava.methods.before_llm import ImageTokens, TowerStates
from llava.model.image_tokens import (
    Look,
    layout_of,
    part_layout_of,
    project_now,
    projects_late,
    tokens_in_order,
    wanted_tiles,
)
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

#: Outputs of the tower for single tiles, by (ImageRequest.tiles_key, number of the tile).
_Rows = dict[tuple, TileStates]


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
        given = {request.tiles_key: own for request, own in zip(requests, pixels, strict=True)}
        # 1. The tiles that each request needs, and the outputs of the tower for them.
        rows: _Rows = {}
        tiles = self._wanted_tiles(rows, given, requests)
        self._encode(rows, given, requests, tiles)
        # 2. The tokens in LLM order, projected where more than the kept ones are needed.
        images = self._in_order(rows, requests, tiles)
        late = [projects_late(one.selector, own, one.budget) for one, own in zip(requests, images, strict=True)]
        images = self._projected(images, late)
        # 3. What belongs to the question.
        for n, request in enumerate(requests):
            tower = images[n].tower
            if request.words is not None:
                tower = replace(tower, text_cosine=self._text_tower.cosine(tower.hidden[:, 1:], request.words))
            images[n] = replace(images[n], key=request.key or 0, tower=tower)
        return images

    def _wanted_tiles(self, rows: _Rows, pixels: dict, requests: list[ImageRequest]) -> list[tuple[int, ...]]:
        """Return the tiles that each request needs: all, unless its method zooms. Encodes what methods look at."""
        wanted = [tuple(range(len(pixels[request.tiles_key]))) for request in requests]
        # 1. The requests whose method may leave crops unencoded, and those of them that must look at tile 0 to know which.
        zooming = [n for n, request in enumerate(requests) if request.selector.zooms and len(wanted[n]) > 1]
        asked = [requests[n] for n in zooming]
        plans = [self._tiling.plan(request.size, request.anyres) for request in asked]
        sizes = [self._tiling.layout(request.size, request.anyres).sizes for request in asked]
        looks = [n for n, one in enumerate(asked) if not one.selector.needs_every_crop(sizes[n], one.budget)]
        # 2. What is seen in tile 0.
        whole, texts = [None] * len(asked), [None] * len(asked)
        if looks:
            own = [asked[n] for n in looks]
            self._encode(rows, pixels, own, [(0,)] * len(own))
            images = self._in_order(rows, own, [(0,)] * len(own))
            images = self._projected(images, [not request.selector.reads_features for request in own])
            for n, image, text in zip(looks, images, self._questions(own), strict=True):
                whole[n], texts[n] = image, text
        # 3. The tiles that follow from it, for all requests together: the host waits for the device once.
        found = [
            Look(request.selector, plans[n], whole[n], texts[n], request.budget) for n, request in enumerate(asked)
        ]
        for n, tiles in zip(zooming, wanted_tiles(found, self._tiling.side), strict=True):
            wanted[n] = tiles
        return wanted

    def _encode(
        self, rows: _Rows, pixels: dict, requests: list[ImageRequest], tiles: Sequence[tuple[int, ...]]
    ) -> None:
        """Add to `rows` what the tower gives for the `tiles` of each request, from the store or by a run of the tower.

        pixels: [T, 3, H, W] of each image, by ImageRequest.tiles_key
        """
        # 1. What is wanted, and whether with the attention that patches receive.
        wanted: dict[tuple, bool] = {}
        for request, own in zip(requests, tiles, strict=True):
            maps = "received" in request.selector.tower_states
            for tile in own:
                wanted[request.tiles_key, tile] = wanted.get((request.tiles_key, tile), False) or maps

        def lacking() -> list[tuple]:
            return [key for key, maps in wanted.items() if key not in rows or (maps and rows[key].received is None)]

        # 2. What is stored.
        rows |= self._store.get(lacking())
        # 3. The rest through the tower, in one run per size of tiles.
        sizes: dict[int, list[tuple]] = {}
        for key in lacking():
            sizes.setdefault(pixels[key[0]].shape[-1], []).append(key)
        for size, keys in sizes.items():
            own = torch.cat([pixels[image][tile : tile + 1] for image, tile in keys])
            found = self._run_tower(own, any(wanted[key] for key in keys)).split([1] * len(keys))
            encoded = dict(zip(keys, found, strict=True))
            rows |= encoded
            if size == self._tiling.vision.image_size:  # the store has rows of one size
                self._store.put(encoded)

    def _run_tower(self, pixels: Tensor, maps: bool) -> TileStates:
        return run_tower(self.vision_tower, pixels, maps)

    def _in_order(
        self, rows: _Rows, requests: list[ImageRequest], tiles: Sequence[tuple[int, ...]]
    ) -> list[ImageTokens]:
        """Return the tokens of the `tiles` of each request, not projected. Equal ones are one object."""
        made: dict[tuple, ImageTokens] = {}
        keys = [(request.tiles_key, own) for request, own in zip(requests, tiles, strict=True)]
        for (image, own), request in zip(keys, requests, strict=True):
            if (image, own) in made:
                continue
            states = TileStates.joined([rows[image, tile] for tile in own])
            side, plan = math.isqrt(states.saliency.shape[1]), self._tiling.plan(request.size, request.anyres)
            if request.selector.resizes or len(own) == plan.tiles:
                layout = layout_of(plan, side, len(own))
            else:
                layout = part_layout_of(plan, side, own)
            tower = TowerStates(
                self.multi_modal_projector, hidden=states.hidden, keys=states.keys, received=states.received
            )
            made[image, own] = tokens_in_order(
                states.hidden[:, 1:], states.saliency, layout, self.multi_modal_projector, tower=tower
            )
        return [made[key] for key in keys]

    def _projected(self, images: list[ImageTokens], late: Sequence[bool]) -> list[ImageTokens]:
        """Return `images`; those that are not `late` have gone through the projector, in one call and each once."""
        now = {id(image): image for image, wait in zip(images, late, strict=True) if not wait}
        made = project_now(list(now.values()), getattr(self, "image_newline", None))
        done = dict(zip(now, made, strict=True))
        return [image if wait else done[id(image)] for image, wait in zip(images, late, strict=True)]


@MULTIMODAL_REGISTRY.register_processor(llava_processor, info=llava_info, dummy_inputs=llava.LlavaDummyInputsBuilder)
class LlavaForConditionalGeneration(_SelectsTiles, llava.LlavaForConditionalGeneration):
    """LLaVA-1.5."""


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextProcessor, info=LlavaNextInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class LlavaNextForConditionalGeneration(_SelectsTiles, llava_next.LlavaNextForConditionalGeneration):
    """LLaVA-1.6."""

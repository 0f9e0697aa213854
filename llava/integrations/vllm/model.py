"""vLLM's models of LLaVA-1.5 and LLaVA-1.6, with token selection between tower and LLM.

Only `embed_multimodal` differs from vLLM's, and only for images that carry an ImageRequest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.models import llava, llava_next
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.transformers_utils.processor import cached_image_processor_from_config

from llava.common.errors import UserError
from llava.common.transfer import to_device
from llava.integrations.vllm import processor
from llava.integrations.vllm.image_request import ImageRequest
from llava.integrations.vllm.prompt_images import Tiling
from llava.integrations.vllm.settings import store_bytes
from llava.integrations.vllm.tower_store import TileStates, TowerStore
from llava.methods.before_llm import ImageTokens, Selection, TowerStates, select_all
from llava.model.image_tokens import project_now, projects_late, tokens_in_order
from llava.model.multimodal_encoder.clip_encoder import cls_attention, middle_layer, received_attention
from llava.model.multimodal_encoder.clip_text_tower import ClipTextTower
from llava.model.processors import adopt_padding


class _Selects:
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
        self._text_tower_name = processor.settings_of_server(model_config).get("options", {}).get("text_tower")

    def embed_multimodal(self, **kwargs: object):
        """Return the LLM embeddings of each image, [K, D]."""
        pixels, requests = kwargs.pop(processor.PIXELS, None), kwargs.pop(processor.REQUEST, None)
        if requests is None:
            return super().embed_multimodal(**kwargs)
        if self._text_tower_name and self._text_tower is None:
            # vLLM's own trial of the largest image comes first, so a tower that cannot be loaded ends the start.
            tower = SimpleNamespace(config=self._tiling.vision, device=self.vision_tower.device)
            self._text_tower = ClipTextTower.load(self._text_tower_name, tower)
        requests = [ImageRequest.from_tensor(one) for one in requests]
        return [selection.features for selection in self._select(pixels, requests)]

    def _select(self, pixels: Sequence[Tensor], requests: list[ImageRequest]) -> list[Selection]:
        """Return the kept tokens of each request."""
        images, texts = self._image_tokens(pixels, requests), self._questions(requests)
        # All images with one method and its options are selected together, which greedy methods make use of.
        groups: dict[tuple, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault((request.method, request.budget, repr(request.options)), []).append(i)
        kept: dict[int, Selection] = {}
        for (method, budget, _), members in groups.items():
            own = ([values[i] for i in members] for values in (images, texts))
            kept.update(zip(members, select_all(method, *own, budget, **requests[members[0]].options), strict=True))
        return [kept[i] for i in range(len(requests))]

    # --- images -----------------------------------------------------------------------------------------------

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

    # --- questions --------------------------------------------------------------------------------------------

    def _questions(self, requests: list[ImageRequest]) -> list[Tensor]:
        """Return the word embeddings [m, D] of each request's question; m is 0 for methods that read none."""
        counts = [len(request.question or ()) for request in requests]
        # One copy and one lookup for the whole batch. Id 0 stands for an empty batch, as vLLM's lookup needs one.
        ids = [token for request in requests for token in request.question or ()]
        words = self.language_model.embed_input_ids(to_device(torch.tensor([*ids, 0]), self.vision_tower.device))
        return list(words[:-1].split(counts))


def _by_head(projected: Tensor, attention) -> list[Tensor]:
    """Return queries and keys [T, heads of this rank, 1 + P, d] from what qkv_proj of an `attention` returned."""
    heads = attention.num_heads_per_partition
    return [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in projected.chunk(3, dim=-1)[:2]]


@MULTIMODAL_REGISTRY.register_processor(
    processor.llava_processor, info=processor.llava_info, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class LlavaForConditionalGeneration(_Selects, llava.LlavaForConditionalGeneration):
    """LLaVA-1.5."""


@MULTIMODAL_REGISTRY.register_processor(
    processor.LlavaNextProcessor, info=processor.LlavaNextInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class LlavaNextForConditionalGeneration(_Selects, llava_next.LlavaNextForConditionalGeneration):
    """LLaVA-1.6."""

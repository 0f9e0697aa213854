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

from llava.common.errors import UserError
from llava.common.transfer import to_device
from llava.integrations.vllm import processor
from llava.integrations.vllm.image_request import ImageRequest
from llava.integrations.vllm.prompt_images import Tiling
from llava.integrations.vllm.settings import store_bytes
from llava.integrations.vllm.tower_store import TileStates, TowerStore
from llava.methods.before_llm import ImageTokens, Selection, TowerStates, select_all
from llava.model.image_tokens import project_now, projects_late, tokens_in_order
from llava.model.multimodal_encoder.clip_text_tower import ClipTextTower


class _Selects:
    """Mixin for vLLM's models of a LLaVA with a CLIP tower."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        model_config = vllm_config.model_config
        try:
            self._tiling = Tiling(self.config, model_config.model)
        except UserError:  # another tower; the processor refuses requests with settings
            return
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
                tower = TowerStates(self.multi_modal_projector, hidden=own.hidden, keys=own.keys)
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
        states = self._store.get(list(given))
        missing = [key for key in given if key not in states]
        if missing:
            found = self._run_tower(torch.cat([given[key] for key in missing]))
            for key, own in zip(missing, found.split([len(given[key]) for key in missing]), strict=True):
                states[key] = own
                self._store.put(key, own)
        return states

    def _run_tower(self, pixels: Tensor) -> TileStates:
        """Run vLLM's tower on tiles [T, 3, H, W]. vLLM's attention returns no weights, so a hook reads its inputs."""
        attention = self.vision_tower.vision_model.encoder.layers[-1].self_attn
        seen: list[Tensor] = []
        hook = attention.qkv_proj.register_forward_hook(lambda module, given, result: seen.append(result[0]))
        try:
            hidden = self.vision_tower(pixels, feature_select_strategy="full")
        finally:
            hook.remove()
        query, key, _ = seen[0].chunk(3, dim=-1)
        # [T, heads of this rank, tokens, d], in float32: saliencies in half precision would tie often.
        query, key = (
            part.float().unflatten(-1, (attention.num_heads_per_partition, -1)).transpose(1, 2)
            for part in (query[:, :1], key)
        )
        row = (query @ key.transpose(-1, -2) * attention.scale).softmax(dim=-1)[:, :, 0, 1:]
        if attention.tp_size == 1:
            return TileStates(hidden, row.mean(dim=1), key.mean(dim=1))
        # Each rank has some of the heads, and the mean is over all of them.
        tiles, rest = len(row), [row.shape[-1], key.shape[2] * key.shape[3]]
        sums = torch.cat([row.sum(dim=1), key.sum(dim=1).reshape(tiles, -1)], dim=1)
        row, key = (tensor_model_parallel_all_reduce(sums) / attention.num_heads).split(rest, dim=1)
        return TileStates(hidden, row, key.unflatten(-1, (-1, attention.head_dim)))

    # --- questions --------------------------------------------------------------------------------------------

    def _questions(self, requests: list[ImageRequest]) -> list[Tensor]:
        """Return the word embeddings [m, D] of each request's question; m is 0 for methods that read none."""
        counts = [len(request.question or ()) for request in requests]
        # One copy and one lookup for the whole batch. Id 0 stands for an empty batch, as vLLM's lookup needs one.
        ids = [token for request in requests for token in request.question or ()]
        words = self.language_model.embed_input_ids(to_device(torch.tensor([*ids, 0]), self.vision_tower.device))
        return list(words[:-1].split(counts))


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

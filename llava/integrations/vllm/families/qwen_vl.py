"""Qwen2.5-VL and Qwen3-VL (dense): images are grids of tokens with positions in three dimensions (M-RoPE).

A kept token has the position that it has in the whole prompt, and the text continues at the position that it has without
selection, as under `compress` for transformers' models. vLLM computes the positions of a prompt before the tower has seen
a pixel. So it is given the positions of the whole prompt, where each kept token has that of its image's first token. The
row and the column of a kept token travel in columns behind its embedding, and are added in `forward`.

vLLM has a hook for the positions of pruned video tokens, `recompute_mrope_positions`. It is not used here: vLLM calls it
only where --video-pruning-rate is set, and then for every prompt; it waits for the device, and it takes positions in the
dtype of the model, where bfloat16 holds no odd number above 256.

Videos are never selected from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import BatchFeature
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.rotary_embedding.mrope import MRotaryEmbedding
from vllm.model_executor.models import qwen2_5_vl, qwen3_vl
from vllm.model_executor.models.utils import _merge_multimodal_embeddings
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageProcessorItems

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.integrations.transformers.families.base import grid_layout
from llava.integrations.transformers.received_attention import last_full_block, mean_received
from llava.integrations.transformers.selectors import check_selector
from llava.integrations.vllm.engine_check import refused_because
from llava.integrations.vllm.grid_positions import PLACE, digits_of, places_of, whole_prompt
from llava.integrations.vllm.image_request import ImageRequest
from llava.integrations.vllm.processor import REQUEST, Info, Processor
from llava.integrations.vllm.prompt_images import GridImages
from llava.integrations.vllm.row_store import RowStore
from llava.integrations.vllm.selecting import Selecting
from llava.integrations.vllm.settings import check_engine, store_bytes
from llava.methods.before_llm import ImageTokens
from llava.methods.before_llm.scores import distance_from_mean


def _check(config: AdaVConfig) -> None:
    """Raise UserError for settings that vLLM cannot run with a Qwen-VL, or that no method can."""
    check_engine(config)
    check_selector(config, "Qwen-VL")


# --- processor ----------------------------------------------------------------------------------------------------


class _GridInfo(Info):
    """Of a Qwen-VL."""

    refuse = staticmethod(_check)

    def make_images(self) -> GridImages:
        config = self.get_hf_config()
        because = refused_because(config)
        if because is None and not self.ctx.model_config.uses_mrope:
            because = "its configuration has no mrope_section; allowed are positions in three dimensions"
        if because is not None:
            raise UserError(f'{self.model_id}: "adav" was asked for, but {because}')
        return GridImages(config, self.get_tokenizer())

    def size(self, items: ImageProcessorItems, index: int, hf_kwargs: Mapping[str, object]) -> tuple[int, int]:
        given, vision = items.get_image_size(index), self.get_hf_config().vision_config
        resized, _ = self._get_vision_info(
            image_width=given.width,
            image_height=given.height,
            num_frames=1,
            image_processor=self.get_image_processor(),
            mm_kwargs=hf_kwargs,
        )
        side = vision.patch_size * vision.spatial_merge_size
        return resized.width // side, resized.height // side


class Qwen25VLInfo(_GridInfo, qwen2_5_vl.Qwen2_5_VLProcessingInfo):
    """Of Qwen2.5-VL."""


class Qwen3VLInfo(_GridInfo, qwen3_vl.Qwen3VLProcessingInfo):
    """Of Qwen3-VL."""


class _GridProcessor(Processor):
    """Of a Qwen-VL. The model gets vLLM's own inputs and the requests."""

    def inputs(self, mm_items, hf_kwargs: Mapping[str, object], requests: Sequence[ImageRequest]) -> BatchFeature:
        return super(Processor, self)._apply_hf_processor_main(mm_items, hf_kwargs)

    def fields(self, hf_inputs: BatchFeature, hf_kwargs: Mapping[str, object]) -> dict[str, MultiModalFieldConfig]:
        return dict(super(Processor, self)._get_mm_fields_config(hf_inputs, hf_kwargs))

    def size(self, mm_items, hf_kwargs: Mapping[str, object], out_mm_kwargs, index: int) -> tuple[int, int]:
        # The grid itself: settings of the checkpoint's processor may change how an image is resized.
        _, height, width = out_mm_kwargs["image"][index]["image_grid_thw"].data.tolist()
        side = self.info.get_hf_config().vision_config.spatial_merge_size
        return width // side, height // side


class Qwen25VLProcessor(_GridProcessor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    """Of Qwen2.5-VL."""


class Qwen3VLProcessor(_GridProcessor, qwen3_vl.Qwen3VLMultiModalProcessor):
    """Of Qwen3-VL."""


# --- model --------------------------------------------------------------------------------------------------------


class _SelectsFromGrids(Selecting):
    """Mixin for vLLM's models of a Qwen-VL."""

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        device = vllm_config.device_config.device
        # One row per merged token. The tower appends DeepStack features, if there are any, to the features.
        features = (self.visual.out_hidden_size,), vllm_config.model_config.dtype
        capacity = store_bytes(vllm_config.additional_config)
        self._store = RowStore({"features": features, "saliency": ((), torch.float32)}, capacity, device)
        self._moved = 0  # columns of _moves that may not be zero
        if not vllm_config.model_config.uses_mrope:  # the processor refuses requests with settings
            return
        # CUDA graphs read fixed addresses. As in vLLM's own buffer of positions, one more column keeps the strides of a
        # part constant, which torch.compile relies on.
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self._moves = torch.zeros(3, tokens, dtype=torch.long, device=device)
        self._positions = torch.zeros(3, tokens + 1, dtype=torch.long, device=device)
        # vLLM makes its table of rotations for as many positions as a prompt has tokens. Dropped tokens keep theirs.
        rotary = next(one for one in self.language_model.modules() if isinstance(one, MRotaryEmbedding))
        self._last_position = rotary.cache_max_position_num - 1

    @property
    def tower_device(self) -> torch.device:
        return self.visual.device

    # --- tokens -----------------------------------------------------------------------------------------------

    def embed_kept(self, inputs: dict, requests: list[ImageRequest]) -> list[Tensor]:
        """Return [K, W + PLACE] of each image: what vLLM's tower gives for a token, and the token's place as digits."""
        grids = inputs["image_grid_thw"].tolist()
        states = self._tower_states(inputs["pixel_values"], grids, requests)
        images = [self._image_tokens(request, *one) for request, *one in zip(requests, grids, states, strict=True)]
        return [
            torch.cat([own["features"][kept.indices], digits_of(kept.row, kept.column, own["features"].dtype)], dim=1)
            for own, kept in zip(states, self._select(images, requests), strict=True)
        ]

    def _image_tokens(self, request: ImageRequest, grid: list[int], states: dict[str, Tensor]) -> ImageTokens:
        """Return the ImageTokens of one image. grid: patches in time, height and width."""
        side = self.visual.spatial_merge_size
        layout = grid_layout(grid[1] // side, grid[2] // side)
        # Columns behind these are DeepStack features.
        features, saliency = states["features"][:, : self.config.vision_config.out_hidden_size], states["saliency"]
        if request.saliency == "distance":
            saliency = distance_from_mean(features, layout.tile >= 0)
        return ImageTokens(features, saliency, layout.tile, layout.row, layout.column, key=request.key or 0)

    def _tower_states(
        self, pixels: Tensor, grids: list[list[int]], requests: list[ImageRequest]
    ) -> list[dict[str, Tensor]]:
        """Return the rows of `_store` of each image. pixels: patches of all images; grids: as in `_image_tokens`."""
        parts = pixels.split([height * width for _, height, width in grids])
        given = {request.tiles_key: own for request, *own in zip(requests, parts, grids, strict=True)}
        states = self._store.get(list(given))
        missing = [key for key in given if key not in states]
        if missing:
            found = self._run_tower(*zip(*(given[key] for key in missing), strict=True))
            encoded = dict(zip(missing, found, strict=True))
            states |= encoded
            self._store.put(encoded)
        return [states[request.tiles_key] for request in requests]

    def _run_tower(self, pixels: Sequence[Tensor], grids: Sequence[list[int]]) -> list[dict[str, Tensor]]:
        """Run vLLM's tower on the patches of some images. A hook reads queries and keys, because its attention is fused."""
        attention, seen = last_full_block(self.visual).attn, []
        hook = attention.attn.register_forward_pre_hook(
            lambda module, args, named: seen.append((named["query"], named["key"])), with_kwargs=True
        )
        metadata = self.visual.prepare_encoder_metadata(grids)
        try:
            features = self.visual(torch.cat(pixels), grids, encoder_metadata=metadata)
        finally:
            hook.remove()
        counts = [len(own) for own in pixels]
        # Queries and keys [S, heads of this rank, d] of each image. A patch attends to its own image alone.
        parts = zip(*(states[0].split(counts) for states in seen[0]), strict=True)
        received = torch.cat([mean_received(query, key, attention.attn.scale) for query, key in parts])
        if attention.tp_size > 1:
            # Each rank has the mean over its own heads, and all ranks have equally many.
            received = tensor_model_parallel_all_reduce(received) / attention.tp_size
        unit = self.visual.spatial_merge_size**2
        saliency = received.view(-1, unit).mean(dim=1)
        order = metadata.get("reverse_indices")  # Qwen2.5-VL orders merged tokens window by window until its output
        if order is not None:
            saliency = saliency[order]
        tokens = [count // unit for count in counts]
        rows = zip(features.split(tokens), saliency.split(tokens), strict=True)
        return [{"features": own, "saliency": score} for own, score in rows]

    # --- positions --------------------------------------------------------------------------------------------

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list) -> tuple[Tensor, int]:
        """Return the positions [3, L] of a prompt, where a kept token has that of its image's first token, and the
        distance from the number of a new token in the prompt to its position."""
        whole = whole_prompt(input_tokens, mm_features, self.visual.spatial_merge_size, REQUEST)
        positions, ahead = super().get_mrope_input_positions(whole.tokens, whole.features)
        return positions[:, whole.columns], ahead + len(whole.tokens) - len(input_tokens)

    def embed_input_ids(self, input_ids: Tensor, multimodal_embeddings=None, *, is_multimodal: Tensor | None = None):
        """Return the embeddings of a batch, and keep the places of its kept tokens for `forward`."""
        if self._moved:
            self._moves[:, : self._moved].zero_()
            self._moved = 0
        width, embeddings = self.visual.out_hidden_size, multimodal_embeddings
        if embeddings is not None and any(one.shape[1] > width for one in embeddings):
            self._moved = len(input_ids)
            # Images and videos that were not selected from have no digits, and need none.
            digits = [one[:, width:] if one.shape[1] > width else one.new_zeros(len(one), PLACE) for one in embeddings]
            merged = _merge_multimodal_embeddings(
                digits[0].new_zeros(self._moved, PLACE), digits, is_multimodal=is_multimodal
            )
            self._moves[1:, : self._moved] = places_of(merged)
            embeddings = [one[:, :width] for one in embeddings]
        return super().embed_input_ids(input_ids, embeddings, is_multimodal=is_multimodal)

    def forward(self, input_ids: Tensor | None, positions: Tensor, *args, **kwargs):
        """Run the LLM as vLLM does, with the whole positions of kept tokens."""
        if positions.dim() == 2:
            count = positions.shape[1]
            moved = torch.add(positions, self._moves[:, :count], out=self._positions[:, :count])
            positions = moved.clamp_(max=self._last_position)
        return super().forward(input_ids, positions, *args, **kwargs)


@MULTIMODAL_REGISTRY.register_processor(
    Qwen25VLProcessor, info=Qwen25VLInfo, dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder
)
class Qwen2_5_VLForConditionalGeneration(_SelectsFromGrids, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLProcessor, info=Qwen3VLInfo, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder
)
class Qwen3VLForConditionalGeneration(_SelectsFromGrids, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL, dense."""

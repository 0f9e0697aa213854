"""vLLM's CLIP tower, and what its attention does not return: the scores and keys that methods read."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce

from llava.integrations.vllm.tower_store import TileStates
from llava.model.multimodal_encoder.clip_encoder import cls_attention, middle_layer, received_attention


def run_tower(tower: torch.nn.Module, pixels: Tensor, maps: bool) -> TileStates:
    """Run vLLM's CLIPVisionModel on tiles [T, 3, H, W], which may be smaller than its own.

    maps: compute TileStates.received, too
    """
    vision = tower.vision_model
    layers = vision.encoder.layers
    middle, last = layers[middle_layer(len(layers)) - 1].self_attn, layers[-1].self_attn
    seen: dict[torch.nn.Module, Tensor] = {}

    def read(module, given, result):
        seen[module] = result[0]

    with contextlib.ExitStack() as hooks:
        for one in [middle, last] if maps else [last]:
            hooks.callback(one.qkv_proj.register_forward_hook(read).remove)
        side = pixels.shape[-1] // vision.embeddings.patch_size
        if side**2 != vision.embeddings.num_patches:
            positions = vision.embeddings.position_embedding
            hooks.callback(positions.register_forward_hook(lambda module, given, result: _resized(result, side)).remove)
        hidden = tower(pixels, feature_select_strategy="full")
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


def _resized(positions: Tensor, side: int) -> Tensor:
    """Return position embeddings [1, 1 + side**2, W] for a smaller grid, as transformers' CLIP interpolates them.

    positions [1, 1 + P, W]: [CLS] first
    """
    own = math.isqrt(positions.shape[1] - 1)
    grid = positions[:, 1:].unflatten(1, (own, own)).permute(0, 3, 1, 2)
    # In float32: half precision has no bicubic filter on a CPU.
    grid = torch.nn.functional.interpolate(grid.float(), size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)

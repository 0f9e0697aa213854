"""Saliency for a tower without a [CLS] token: the attention that the patches of a token receive from all patches.

With [CLS], saliency is the attention that [CLS] pays to a patch. Without it, the attention from all patches is
averaged. VisionZip (arXiv 2412.04467) defines saliency this way for towers without [CLS]. VisPruner (arXiv
2412.01818v2, the later version of FasterVLM) does the same, and also averages over the patches that a merger joins. The
quality of this choice has not been measured here: the tests run on random weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.common.errors import UserError

ENTRIES = 1 << 24  # attention weights in memory at a time: 64 MB in float32


def mean_received(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """The attention that each key receives: softmax(q k^T * scaling), mean over heads and queries. Returns [S] float32.

    query, key: [S, H, d] of one image, after rotary embedding. The attention matrix is computed a few rows at a time,
    as many as ENTRIES allows. The whole matrix has H x S x S entries, which is gigabytes for a large image.
    """
    query, key = query.float().transpose(0, 1), key.float().transpose(0, 1)
    heads, size, _ = query.shape
    received = query.new_zeros(size)
    for rows in query.split(max(1, ENTRIES // (heads * size)), dim=1):
        received += (rows @ key.mT * scaling).softmax(dim=-1).sum(dim=(0, 1))
    return received / (heads * size)


class QwenSaliency:
    """Context manager that records the saliency of every merged token in one pass of Qwen2.5-VL's tower.

        with QwenSaliency(model.model.visual) as saliency:
            features = model.get_image_features(pixel_values, image_grid_thw).pooler_output
        saliency.of(image_grid_thw)      # one [N] for each image, in the order of its features

    It reads the last full-attention block. Most blocks of this tower attend inside windows of 112 pixels (smaller at
    the right and lower edge), so they compare a patch with few neighbours. Only full-attention blocks compare all
    patches of an image, and the last of them is nearest to the features. Cost: a second projection of queries and keys,
    and their products. The block itself runs with whatever attention implementation the model has.
    """

    def __init__(self, tower):
        whole = [index for index in tower.fullatt_block_indexes if index < len(tower.blocks)]
        if not whole:
            raise UserError("the vision tower has no full-attention block, which saliency without [CLS] is read from")
        self._tower, self._attention = tower, tower.blocks[max(whole)].attn
        self._received: Tensor | None = None

    def __enter__(self):
        self._handle = self._attention.register_forward_pre_hook(self._read, with_kwargs=True)
        return self

    def __exit__(self, *exception) -> None:
        self._handle.remove()

    @torch.no_grad()
    def _read(self, attention, positional: tuple, named: dict) -> None:
        """Forward pre-hook of the attention module: computes the received attention from its inputs."""
        hidden = positional[0]
        query, key, _ = attention.qkv(hidden).view(len(hidden), 3, attention.num_heads, -1).unbind(1)
        cos, sin = named["position_embeddings"]
        query, key = (_rotated(states.float(), cos.float()[:, None], sin.float()[:, None]) for states in (query, key))
        # cu_seqlens has the ends of the images: patches of one image must not attend to another image.
        lengths = named["cu_seqlens"].diff().tolist()
        segments = zip(query.split(lengths), key.split(lengths), strict=True)
        self._received = torch.cat([mean_received(*states, attention.scaling) for states in segments])

    def of(self, grid: Tensor) -> list[Tensor]:
        """Saliency [N] float32 of each image, a mean over merged patches, in the order of the features.

        grid: [I, 3], patches in time, height and width of each of I images.
        """
        from transformers.vision_utils import get_vision_window_index

        tower, unit = self._tower, self._tower.spatial_merge_unit
        merged = self._received.view(-1, unit).mean(dim=1)
        window, _ = get_vision_window_index(
            grid,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        # The tower orders merged tokens window by window and restores the order only for its output.
        in_order = torch.empty_like(merged)
        in_order[window.to(merged.device)] = merged
        return list(in_order.split((grid.prod(dim=-1) // unit).tolist()))


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `states`. The two halves of a head are paired, as in transformers."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin

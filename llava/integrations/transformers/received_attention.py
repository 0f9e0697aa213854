"""How salient is a vision token where the tower has no [CLS] token? The attention that its patches receive from all patches.

With [CLS], saliency is the row of attention that [CLS] pays. Without it, every patch is asked, and what a patch gets from
all of them is averaged: VisionZip (arXiv 2412.04467) defines it so for towers without [CLS], and the authors of FasterVLM
do the same in their later version, VisPruner (arXiv 2412.01818v2), where the patches that a merger joins are averaged
as well. On random weights nothing can be said about how well it chooses.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava.common.errors import UserError

ENTRIES = 1 << 24  # attention weights held at once: 64 MB


def mean_received(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """[S] float32: what each key gets of softmax(q k^T * scaling), averaged over heads and queries.

    query, key: [S, H, d] of one image, after rotary embedding. The queries' weights are never held all at once: a few
    rows at a time, as many as fit into ENTRIES.
    """
    query, key = query.float().transpose(0, 1), key.float().transpose(0, 1)
    heads, size, _ = query.shape
    received = query.new_zeros(size)
    for rows in query.split(max(1, ENTRIES // (heads * size)), dim=1):
        received += (rows @ key.mT * scaling).softmax(dim=-1).sum(dim=(0, 1))
    return received / (heads * size)


class QwenSaliency:
    """Context: the saliency of every merged token of one pass of Qwen2.5-VL's tower, out of its last full-attention block.

        with QwenSaliency(model.model.visual) as saliency:
            features = model.get_image_features(pixel_values, image_grid_thw).pooler_output
        saliency.of(image_grid_thw)      # one [N] for each image, in the order of its features

    Most blocks of that tower attend inside windows of 112 pixels, smaller ones at the right and lower edge, so what a patch receives
    there says how it stands among few neighbours; only the full-attention blocks compare all patches of an image, and the last
    of them is nearest to the features. Queries and keys are projected once more, and that is what it costs,
    beside their products: the block itself goes on under whatever attention the model has.
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
        hidden = positional[0]
        query, key, _ = attention.qkv(hidden).view(len(hidden), 3, attention.num_heads, -1).unbind(1)
        cos, sin = named["position_embeddings"]
        query, key = (_rotated(states.float(), cos.float()[:, None], sin.float()[:, None]) for states in (query, key))
        lengths = named["cu_seqlens"].diff().tolist()
        segments = zip(query.split(lengths), key.split(lengths), strict=True)
        self._received = torch.cat([mean_received(*states, attention.scaling) for states in segments])

    def of(self, grid: Tensor) -> list[Tensor]:
        """grid [I, 3], patches in time, height and width of each image -> [N] float32 each, a mean over merged patches.

        Inside the tower the merged tokens lie window by window; here they are back in reading order, as the features.
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
        in_order = torch.empty_like(merged)
        in_order[window.to(merged.device)] = merged
        return list(in_order.split((grid.prod(dim=-1) // unit).tolist()))


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves paired."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin

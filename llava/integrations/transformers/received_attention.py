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


class _Recorder:
    """Context manager that records `received`, the attention that the patches receive, in one pass of the tower.

    attention: the attention module that is read. Its queries and keys are projected a second time. The module itself
    runs with whatever attention implementation the model has.
    """

    def __init__(self, attention):
        self._attention = attention
        self._received: Tensor | None = None

    def __enter__(self):
        self._handle = self._attention.register_forward_pre_hook(self._read, with_kwargs=True)
        return self

    def __exit__(self, *exception) -> None:
        self._handle.remove()

    @torch.no_grad()
    def _read(self, attention, positional: tuple, named: dict) -> None:
        """Forward pre-hook of the attention module: computes the received attention from its inputs."""
        hidden = positional[0] if positional else named["hidden_states"]
        self._received = self.received(attention, hidden, named)


def last_full_block(tower):
    """The last block of a Qwen-VL tower whose attention compares all patches of an image. UserError if there is none."""
    blocks = len(tower.blocks)
    whole = [index for index in getattr(tower, "fullatt_block_indexes", range(blocks)) if index < blocks]
    if not whole:
        raise UserError("the vision tower has no full-attention block, which saliency without [CLS] is read from")
    return tower.blocks[max(whole)]


class QwenSaliency(_Recorder):
    """Saliency of every merged token of a Qwen-VL tower.

        with QwenSaliency(model.model.visual) as saliency:
            features = model.get_image_features(pixel_values, image_grid_thw).pooler_output
        saliency.of(image_grid_thw)      # one [N] for each image, in the order of its features

    It reads the last full-attention block: the last block, except in Qwen2.5-VL. Most blocks of that tower attend inside
    windows of 112 pixels (smaller at the right and lower edge), so they compare a patch with few neighbours. Only
    full-attention blocks compare all patches of an image, and the last of them is nearest to the features.
    """

    def __init__(self, tower):
        super().__init__(last_full_block(tower).attn)
        self._tower = tower

    def received(self, attention, hidden: Tensor, named: dict) -> Tensor:
        """Received attention [S] of the S patches of all images."""
        query, key, _ = attention.qkv(hidden).view(len(hidden), 3, attention.num_heads, -1).unbind(1)
        cos, sin = named["position_embeddings"]
        query, key = (_rotated(states.float(), cos.float()[:, None], sin.float()[:, None]) for states in (query, key))
        # cu_seqlens has the ends of the images: patches of one image must not attend to another image.
        lengths = named["cu_seqlens"].diff().tolist()
        segments = zip(query.split(lengths), key.split(lengths), strict=True)
        return torch.cat([mean_received(*states, attention.scaling) for states in segments])

    def of(self, grid: Tensor) -> list[Tensor]:
        """Saliency [N] float32 of each image, a mean over merged patches, in the order of the features.

        grid: [I, 3], patches in time, height and width of each of I images.
        """
        tower = self._tower
        unit = tower.spatial_merge_size**2
        merged = self._received.view(-1, unit).mean(dim=1)
        if hasattr(tower, "window_size"):
            merged = self._out_of_windows(merged, grid)
        return list(merged.split((grid.prod(dim=-1) // unit).tolist()))

    def _out_of_windows(self, merged: Tensor, grid: Tensor) -> Tensor:
        """`merged` [N] in the order of the output. The tower orders merged tokens window by window until its output."""
        from transformers.vision_utils import get_vision_window_index

        tower = self._tower
        window, _ = get_vision_window_index(
            grid,
            spatial_merge_size=tower.spatial_merge_size,
            window_size=tower.window_size,
            patch_size=tower.patch_size,
        )
        in_order = torch.empty_like(merged)
        in_order[window.to(merged.device)] = merged
        return in_order


class TileSaliency(_Recorder):
    """Saliency of the patches of a tower for tiles of one size, with separate projections of queries and keys.

        with TileSaliency(attention, side=27) as saliency:
            ...                          # one pass of the tower over T tiles
        saliency.of_patches()            # [T, side, side] float32

    attention: the attention module of the layer that gave the features
    A [CLS] row is no patch: neither its query nor its key counts.
    """

    def __init__(self, attention, side: int):
        super().__init__(attention)
        self._side = side

    def received(self, attention, hidden: Tensor, named: dict) -> Tensor:
        """Received attention [T, side, side] of the patches of T tiles."""
        patches = hidden[:, -(self._side**2) :]
        query, key = attention.q_proj(patches), attention.k_proj(patches)
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        query, key = (states.unflatten(-1, (attention.num_heads, -1)) for states in (query, key))
        tiles = [mean_received(*states, attention.scale) for states in zip(query, key, strict=True)]
        return torch.stack(tiles).unflatten(1, (self._side, self._side))

    def of_patches(self) -> Tensor:
        return self._received


def layer_of(feature_layer: int | list[int], layers: int) -> int:
    """Index of the tower layer whose output is entry `feature_layer` of hidden_states; entry 0 is the layers' input.

    UserError where that is not the output of one layer.
    """
    layer = -1
    if isinstance(feature_layer, int):
        layer = feature_layer - 1 if feature_layer >= 0 else layers + feature_layer
    if not 0 <= layer < layers:
        raise UserError(
            f"vision_feature_layer is {feature_layer}, allowed under compress() is one layer of the tower, from "
            f"{-layers} to -1 or from 1 to {layers}"
        )
    return layer


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of `states`. The two halves of a head are paired, as in transformers."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin

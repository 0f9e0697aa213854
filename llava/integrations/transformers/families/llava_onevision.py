"""LLaVA-OneVision: a SigLIP tower, tiles joined to one grid, pooling of large grids, newline tokens (arXiv 2408.03326).

An image is the whole image as one tile, and behind it the grid of its crops: joined, unpadded, shrunk where it has more
tokens than nine tiles, with a newline token behind each row. An image of a prompt with several images is one tile and
one newline token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from llava.integrations.transformers.families.base import Family, Layout, VisionTokens
from llava.integrations.transformers.received_attention import TileSaliency, layer_of


class LlavaOnevision(Family):
    """The model's own pack_image_features joins, unpads and shrinks the saliency exactly as the features.

    The joined grid counts as one tile, because a shrunken grid has no tokens of a single crop.
    """

    name = "LLaVA-OneVision"
    model_classes = (LlavaOnevisionForConditionalGeneration,)
    image_inputs = ("pixel_values", "image_sizes")
    optional_inputs = ("batch_num_images",)
    videos = ("pixel_values_videos", "image_sizes_videos")
    adaptive_caches = True

    @property
    def marks(self) -> list[int]:
        return [self.image_token, self.model.config.video_token_id]

    @property
    def _side(self) -> int:
        """Patches along one side of a tile."""
        vision = self.model.config.vision_config
        return vision.image_size // vision.patch_size

    def _tiles(self, given: dict) -> list[int]:
        """Tiles of each image. Only the only image of a prompt is cut, which batch_num_images tells."""
        sizes, numbers = given["image_sizes"], given["batch_num_images"]
        numbers = [1] * len(sizes) if numbers is None else numbers
        cut = [number == 1 for number in numbers for _ in range(number)]
        config = self.model.config
        return [
            image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) if own else 1
            for size, own in zip(sizes, cut, strict=True)
        ]

    def _packed(self, tiles: list[Tensor], sizes: Tensor) -> list[Tensor]:
        """Values [T, side, side] of the patches of each image, packed to values [N] of its tokens; NaN for newlines."""
        packed, _ = self.model.model.pack_image_features(
            [values.flatten(1)[..., None] for values in tiles],
            sizes,
            image_newline=tiles[0].new_full((1,), float("nan")),
            vision_aspect_ratio=self.model.config.vision_aspect_ratio,
        )
        return [values[:, 0] for values in packed]

    def layouts(self, ids: Tensor, given: dict) -> list[Layout]:
        sizes = given["image_sizes"]
        patches = [torch.zeros(tiles, self._side, self._side) for tiles in self._tiles(given)]
        return [
            _layout(values, tuple(size), self._side)
            for values, size in zip(self._packed(patches, sizes), sizes.tolist(), strict=True)
        ]

    def encode(self, given: dict, layouts: list[Layout]) -> VisionTokens:
        config, layers = self.model.config, self.model.model.vision_tower.encoder.layers
        layer = layer_of(config.vision_feature_layer, len(layers))
        with TileSaliency(layers[layer].self_attn, self._side) as saliency:
            output = self.model.get_image_features(**given, return_dict=True)
        tiles = list(saliency.of_patches().split(self._tiles(given)))
        return VisionTokens(list(output.pooler_output), self._packed(tiles, given["image_sizes"]))


def _layout(values: Tensor, size: tuple[int, int], side: int) -> Layout:
    """The layout of one image. values [N]: NaN for newline tokens."""
    newline, number = values.isnan(), torch.arange(len(values))
    base = number < side * side
    behind = number - side * side
    # Rows of the joined grid are equally long; the newline token of an image of one tile ends its base tile.
    width = int(torch.nonzero(newline)[0]) + 1 - side * side
    row = torch.where(base, number // side, behind // width)
    column = torch.where(base, number % side, behind % width)
    tile = torch.where(base, 0, 1)
    return Layout(size, tile.masked_fill(newline, -1), row, column.masked_fill(newline, -1))

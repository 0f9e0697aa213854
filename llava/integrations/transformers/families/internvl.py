"""InternVL 2.5, 3 and 3.5 in transformers' format: tiles of one size, pixel shuffle, positions of one dimension.

The tower's patches are joined 2 x 2 before the projector (pixel shuffle, arXiv 2404.16821), so a tile of 448 pixels is
256 vision tokens. The processor puts the tiles of an image one after another, first the crops and then the thumbnail of
the whole image. The tower has a [CLS] token, but the features leave it out. Its attention is not used: scores of that
kind are reported to choose worse than chance on InternVL (https://github.com/Theia-4869/FasterVLM/issues/4). A frame of
a video comes as an image of one tile, and is treated as such.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import InternVLForConditionalGeneration

from llava.common.errors import UserError
from llava.integrations.transformers.families.base import Family, Layout, VisionTokens, runs
from llava.integrations.transformers.received_attention import TileSaliency, layer_of


class InternVL(Family):
    """An image is an unbroken run of placeholders: the arguments do not say which tile belongs to which image."""

    name = "InternVL"
    model_classes = (InternVLForConditionalGeneration,)
    image_inputs = ("pixel_values",)
    adaptive_caches = True

    def _sides(self) -> tuple[int, int]:
        """(patches, tokens) along one side of a tile."""
        vision = self.model.config.vision_config
        height, width = (pixels // patch for pixels, patch in zip(vision.image_size, vision.patch_size, strict=True))
        if height != width:
            raise UserError(f"a tile has {height} x {width} patches, allowed under compress() are square tiles")
        return height, int(height * self.model.config.downsample_ratio)

    def layouts(self, ids: Tensor, given: dict) -> list[Layout]:
        side = self._sides()[1]
        lengths = runs(ids, self.image_token)
        for image, length in enumerate(lengths):
            if length % side**2:
                raise UserError(
                    f"image {image} has {length} placeholders, allowed is a multiple of {side**2}, the tokens of a tile"
                )
        tiles = sum(lengths) // side**2
        if tiles != len(given["pixel_values"]):
            raise UserError(
                f"the prompts have {sum(lengths)} image placeholders, those of {tiles} tiles, but pixel_values has "
                f"{len(given['pixel_values'])} tiles"
            )
        return [_tiled(length // side**2, side) for length in lengths]

    def encode(self, given: dict, layouts: list[Layout]) -> VisionTokens:
        layers, config = self.model.model.vision_tower.encoder.layer, self.model.config
        patches, tokens = self._sides()
        layer = layer_of(config.vision_feature_layer, len(layers))
        with TileSaliency(layers[layer].attention, patches) as saliency:
            output = self.model.get_image_features(given["pixel_values"], return_dict=True)
        counts = [len(layout) for layout in layouts]
        # Pixel shuffle joins the patches of a square, so their saliency is averaged.
        joined = torch.nn.functional.avg_pool2d(saliency.of_patches()[:, None], patches // tokens)
        return VisionTokens(
            list(output.pooler_output.flatten(0, 1).split(counts)), list(joined.flatten().split(counts))
        )


def _tiled(tiles: int, side: int) -> Layout:
    """The layout of an image of `tiles` tiles. The thumbnail is the last of several, and gets number 0."""
    number = torch.arange(tiles * side * side)
    tile, place = number // side**2, number % side**2
    return Layout((side * tiles, side), (tile + 1) % tiles, place // side, place % side)

"""Qwen2-VL: a tower of patches of any number, a merger of 2 x 2 patches, and M-RoPE positions (arXiv 2409.12191).

Later generations of Qwen derive from this class.
"""

from __future__ import annotations

from torch import Tensor
from transformers import Qwen2VLForConditionalGeneration

from llava.common.errors import UserError
from llava.integrations.transformers.families.base import Family, Layout, VisionTokens, grid_layout
from llava.integrations.transformers.received_attention import QwenSaliency


class Qwen2VL(Family):
    """An image is one tile of merged tokens. The model keeps rope_deltas, the positions that a prompt uses beyond its
    length; a caller who continues from the cache by hand gets positions that count from the whole prompt."""

    name = "Qwen2-VL"
    model_classes = (Qwen2VLForConditionalGeneration,)
    image_inputs = ("pixel_values", "image_grid_thw")
    videos = ("pixel_values_videos", "video_grid_thw")

    @property
    def marks(self) -> list[int]:
        config = self.model.config
        return [
            config.image_token_id,
            config.video_token_id,
            config.vision_start_token_id,
            config.vision_end_token_id,
        ]

    def layouts(self, ids: Tensor, given: dict) -> list[Layout]:
        grid, side = given["image_grid_thw"], self.model.model.visual.spatial_merge_size
        if (grid[:, 0] != 1).any():
            raise UserError("image_grid_thw has several frames, allowed under compress() are images, and no videos")
        return [grid_layout(height // side, width // side) for _, height, width in grid.tolist()]

    def encode(self, given: dict, layouts: list[Layout]) -> VisionTokens:
        grid = given["image_grid_thw"]
        with QwenSaliency(self.model.model.visual) as saliency:
            output = self.model.get_image_features(given["pixel_values"], grid, return_dict=True)
        return VisionTokens(list(output.pooler_output), saliency.of(grid), self.beside(output))

    def beside(self, output) -> list[list[Tensor]]:
        """VisionTokens.beside, from what get_image_features returns."""
        return []

    def count_dropped(self, dropped: Tensor) -> None:
        inner = self.model.model
        inner.rope_deltas = inner.rope_deltas + dropped.to(inner.rope_deltas.device)

    def state(self):
        return self.model.model.rope_deltas

    def restore(self, state) -> None:
        self.model.model.rope_deltas = state

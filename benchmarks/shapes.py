"""Models with random weights in the sizes of real models, and prompts for them with images of noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.costs.model_shape import ImageCounts, ModelShape
from llava.costs.presets import PRESETS, Preset
from llava.mm_utils import tile_plan
from llava.model.builder import make_fast
from llava.model.language_model.llava_config import LlavaLlamaConfig
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM


def random_model(config: LlavaLlamaConfig, device: str, dtype: torch.dtype, seed: int) -> LlavaLlamaForCausalLM:
    """Model with random weights in evaluation mode, on `device` and in `dtype`."""
    # Made directly on the device and in its dtype, because the largest model in float32 would not fit. make_fast does
    # what loading a checkpoint also does for speed on a GPU.
    torch.manual_seed(seed)
    with torch.device(device):
        model = LlavaLlamaForCausalLM._from_config(config, dtype=dtype).eval()
    make_fast(model)
    return model


__all__ = ["PRESETS", "Preset", "Prompts", "random_model"]


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts of one length, each with its own words and its own image.

    ids: [B, S] with IMAGE_TOKEN_INDEX for the image. pixels: per row [T, 3, H, W]. sizes: (width, height) of each
    image. shape, image, text: the sizes that costs are computed from; text: tokens before and after the image.
    """

    ids: Tensor
    pixels: list[Tensor]
    sizes: list[tuple[int, int]]
    shape: ModelShape
    image: ImageCounts
    text: tuple[int, int]

    @classmethod
    def random(cls, preset: Preset, config: LlavaLlamaConfig, like: Tensor, batch: int, seed: int) -> Prompts:
        """Random prompts. like: a tensor with the device and dtype that the pixels get."""
        # Drawn on the CPU, so that all devices get the same numbers. Ids start at 3, after the special tokens.
        generator = torch.Generator().manual_seed(seed)
        shape, plan = ModelShape.from_config(config), tile_plan(preset.size, config)
        before, after = (torch.randint(3, preset.vocab, (batch, n), generator=generator) for n in preset.text)
        place = torch.full((batch, 1), IMAGE_TOKEN_INDEX)
        pixels = [torch.randn(plan.tiles, 3, preset.tile, preset.tile, generator=generator) for _ in range(batch)]
        return cls(
            torch.cat([before, place, after], dim=1).to(like.device),
            [image.to(like) for image in pixels],
            [preset.size] * batch,
            shape,
            ImageCounts.from_plan(plan, shape.side),
            preset.text,
        )

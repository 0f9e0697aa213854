"""Models with random weights in the sizes of real models, and prompts for them with images of noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llava.constants import IMAGE_TOKEN_INDEX
from llava.costs.model_shape import ImageCounts, ModelShape
from llava.mm_utils import tile_plan
from llava.model.builder import make_fast
from llava.model.language_model.llava_config import LlavaLlamaConfig
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM


@dataclass(frozen=True)
class Preset:
    """Sizes of a model and a prompt.

    tile: pixels per side. tower, llm: (width, layers, heads, MLP width). text: tokens before and after the image.
    anyres: True: five tiles, the whole image and 2 x 2 crops; False: one tile.
    """

    tile: int
    tower: tuple[int, int, int, int]
    llm: tuple[int, int, int, int]
    vocab: int
    text: tuple[int, int] = (35, 45)
    kv_heads: int | None = None
    anyres: bool = True

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of an image that fills its tiles, so that nothing is unpadded."""
        side = self.tile * (2 if self.anyres else 1)
        return side, side

    def model_config(self, newline: bool = False, layers: int | None = None) -> LlavaLlamaConfig:
        """Configuration of the model. newline: with newline tokens, as in LLaVA-1.6. layers: of the LLM."""
        width, depth, heads, mlp = self.tower
        vision = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
        vision |= {"intermediate_size": mlp, "image_size": self.tile, "patch_size": 14}
        width, depth, heads, mlp = self.llm
        return LlavaLlamaConfig(
            hidden_size=width,
            num_hidden_layers=layers or depth,
            num_attention_heads=heads,
            num_key_value_heads=self.kv_heads or heads,
            intermediate_size=mlp,
            vocab_size=self.vocab,
            max_position_embeddings=4096,
            bos_token_id=1,
            eos_token_id=None,  # no end token, so that answers are as long as asked for
            pad_token_id=0,
            mm_vision_config=vision,
            mm_hidden_size=vision["hidden_size"],
            mm_projector_type="mlp2x_gelu",
            mm_patch_merge_type=("spatial_unpad" if newline else "spatial") if self.anyres else "flat",
            image_aspect_ratio="anyres" if self.anyres else "pad",
            image_grid_pinpoints=[list(self.size)] if self.anyres else None,
        )


_CLIP_L = (1024, 24, 16, 4096)  # openai/clip-vit-large-patch14-336
_LLM_7B, _LLM_13B = (4096, 32, 32, 11008), (5120, 40, 40, 13824)  # Vicuna 1.5
PRESETS = {
    # LLaVA-1.6's image (5 tiles of 24 x 24 patches, 2,880 tokens) on a model with the proportions of the 7B, small
    # enough for two CPU cores.
    "cpu": Preset(336, (512, 12, 8, 2048), (1024, 16, 16, 2752), 32000),
    # Runs in seconds, to see that everything works.
    "tiny": Preset(56, (32, 3, 4, 64), (48, 4, 4, 80), 100, (5, 7)),
    "llava-v1.5-7b": Preset(336, _CLIP_L, _LLM_7B, 32000, anyres=False),
    "llava-v1.5-13b": Preset(336, _CLIP_L, _LLM_13B, 32000, anyres=False),
    "llava-v1.6-vicuna-7b": Preset(336, _CLIP_L, _LLM_7B, 32000),
    "llava-v1.6-vicuna-13b": Preset(336, _CLIP_L, _LLM_13B, 32000),
    "llava-v1.6-34b": Preset(336, _CLIP_L, (7168, 60, 56, 20480), 64000, kv_heads=8),  # Nous-Hermes-2-Yi-34B
}


def random_model(config: LlavaLlamaConfig, device: str, dtype: torch.dtype, seed: int) -> LlavaLlamaForCausalLM:
    """Model with random weights in evaluation mode, on `device` and in `dtype`."""
    # Made directly on the device and in its dtype, because the largest model in float32 would not fit. make_fast does
    # what loading a checkpoint also does for speed on a GPU.
    torch.manual_seed(seed)
    with torch.device(device):
        model = LlavaLlamaForCausalLM._from_config(config, dtype=dtype).eval()
    make_fast(model)
    return model


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

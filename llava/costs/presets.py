"""Presets: sizes of real models and of a prompt for them, so that costs and speed need no checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from llava.model.language_model.llava_config import LlavaLlamaConfig


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
            image_grid_pinpoints=[[w * self.tile, h * self.tile] for w, h in _GRIDS] if self.anyres else None,
        )


# LLaVA-1.6's grids of tiles, as (columns, rows).
_GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
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

"""The sizes that costs are counted from: of a model (from its configuration, no weights needed) and of one image."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llava.common.errors import UserError
from llava.common.hub import checkpoint_folder
from llava.mm_utils import NEWLINE, TilePlan, merge_order
from llava.model.checkpoint import Checkpoint
from llava.model.multimodal_encoder.clip_encoder import layers_used

# The tower that LLaVA 1.5 and 1.6 name (https://huggingface.co/openai/clip-vit-large-patch14-336, config.json,
# vision_config), so that a checkpoint of LLaVA's own format can be counted from its config.json alone.
PUBLISHED_TOWERS = {
    "openai/clip-vit-large-patch14-336": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }
}


def product(rows: int, inner: int, columns: int) -> int:
    """FLOPs of [rows, inner] @ [inner, columns]: two for each multiply-add."""
    return 2 * rows * inner * columns


@dataclass(frozen=True)
class ModelShape:
    """The sizes of one LLaVA.

    tower_layers   layers that run: up to the one whose features are used; tower_width, tower_mlp, tower_heads
    patch, side    pixels per patch side, patches per tile side
    projector      widths from the tower to the LLM: (1024, 4096) is one linear layer, (1024, 4096, 4096) two
    layers, width, mlp, heads, kv_heads, head, vocab   of the LLM; head is the size of one head
    """

    tower_layers: int
    tower_width: int
    tower_mlp: int
    tower_heads: int
    patch: int
    side: int
    projector: tuple[int, ...]
    layers: int
    width: int
    mlp: int
    heads: int
    kv_heads: int
    head: int
    vocab: int

    @classmethod
    def of(cls, config) -> ModelShape:
        """From `model.config`, the one configuration that both checkpoint formats are read into."""
        vision, kind = config.vision, config.mm_projector_type
        depth = 1 if kind == "linear" else int(kind.removeprefix("mlp").removesuffix("x_gelu"))
        return cls(
            tower_layers=layers_used(vision.num_hidden_layers, config.mm_vision_select_layer),
            tower_width=vision.hidden_size,
            tower_mlp=vision.intermediate_size,
            tower_heads=vision.num_attention_heads,
            patch=vision.patch_size,
            side=vision.image_size // vision.patch_size,
            projector=(vision.hidden_size, *[config.hidden_size] * depth),
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            mlp=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab=config.vocab_size,
        )

    @property
    def tile_patches(self) -> int:
        """Patches of one tile."""
        return self.side**2

    def projected(self, tokens: int) -> int:
        """FLOPs of `tokens` tower states through the projector."""
        return sum(product(tokens, a, b) for a, b in zip(self.projector, self.projector[1:], strict=False))

    def kv_entry(self, element_size: int) -> int:
        """Bytes of one token's keys and values in one layer, at `element_size` bytes per number."""
        return 2 * self.kv_heads * self.head * element_size


def read_config(checkpoint):
    """The configuration of a checkpoint (folder or hub name) of either format from its config.json; no weights needed.

    A tower that lies elsewhere is one of PUBLISHED_TOWERS or is looked for as when loading. UserError where there is no
    LLaVA.
    """
    folder = checkpoint_folder(checkpoint, weights=False)
    settings, hf = Checkpoint.read_settings(folder)
    tower = settings.get("mm_vision_tower")
    if tower in PUBLISHED_TOWERS and not settings.get("mm_vision_config") and not (folder / tower).is_dir():
        settings = {**settings, "mm_vision_config": PUBLISHED_TOWERS[tower]}
    return Checkpoint(folder, None, settings, "full", hf).model_config()


@dataclass(frozen=True)
class ImageCounts:
    """One image before selection.

    patches   per tile (the whole image first), how many of its patches the LLM could read: unpadding takes some away.
              The tower runs on whole tiles all the same.
    newlines  newline tokens among the image's tokens
    """

    patches: tuple[int, ...]
    newlines: int = 0

    @classmethod
    def of(cls, plan: TilePlan, side: int) -> ImageCounts:
        """From the image's tile plan; side: patches per tile side."""
        order = merge_order(plan, side)
        tiles = order[order != NEWLINE] // side**2
        return cls(tuple(torch.bincount(tiles, minlength=plan.tiles).tolist()), int((order == NEWLINE).sum()))

    @property
    def candidates(self) -> int:
        """P: patches that selection chooses from."""
        return sum(self.patches)

    @property
    def tokens(self) -> int:
        """N: what the LLM reads without selection."""
        return self.candidates + self.newlines

    def kept(self, budget: int) -> int:
        """Tokens that are left of a budget: everything, newline tokens included, where it reaches all patches."""
        if budget < 1:
            raise UserError(f"the budget is {budget}, allowed is a whole number of at least 1")
        return self.tokens if budget >= self.candidates else budget

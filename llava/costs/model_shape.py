"""Sizes that costs are computed from: those of a model (from its configuration, without weights) and of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llava.common.errors import UserError
from llava.common.hub import checkpoint_folder
from llava.methods.before_llm.downsample import smaller_side
from llava.mm_utils import NEWLINE, TilePlan, merge_order
from llava.model.checkpoint import Checkpoint
from llava.model.multimodal_encoder.clip_encoder import layers_used

# LLaVA-1.5 and 1.6 only name their tower. With its sizes here, a checkpoint in LLaVA's own format can be counted from
# its config.json alone. Source: https://huggingface.co/openai/clip-vit-large-patch14-336, config.json, vision_config.
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
    """FLOPs of [rows, inner] @ [inner, columns], at two per multiply-add."""
    return 2 * rows * inner * columns


@dataclass(frozen=True)
class ModelShape:
    """Sizes of one LLaVA model.

    tower_layers   layers of the tower that run, up to the layer whose features are used
    tower_width, tower_mlp, tower_heads   W, width of the MLP and heads of the tower
    patch, side    pixels per side of a patch; patches per side of a tile
    projector      widths from the tower to the LLM: (1024, 4096) is one linear layer, (1024, 4096, 4096) is two
    layers, width, mlp, heads, kv_heads, head, vocab   L, D, width of the MLP, H, G, d and V of the LLM
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
    def from_config(cls, config) -> ModelShape:
        """Sizes from `model.config`. Checkpoints of both formats are read into this one configuration."""
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
            # Older configurations have neither of the two keys, or have null there.
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            vocab=config.vocab_size,
        )

    @property
    def tile_patches(self) -> int:
        """Patches of one tile."""
        return self.side**2

    def projected(self, tokens: int) -> int:
        """FLOPs of the projector for `tokens` tower states."""
        return sum(product(tokens, a, b) for a, b in zip(self.projector, self.projector[1:], strict=False))

    def kv_entry(self, element_size: int) -> int:
        """Bytes of one entry: a token's key and value in one layer. element_size: bytes per number."""
        return 2 * self.kv_heads * self.head * element_size


def read_config(checkpoint):
    """Model configuration of a checkpoint (folder or hub name) of either format, read without weights.

    A tower outside the checkpoint is one of PUBLISHED_TOWERS, or is searched for as in loading. UserError if the
    checkpoint is not a LLaVA model.
    """
    folder = checkpoint_folder(checkpoint, weights=False)
    settings, hf = Checkpoint.read_settings(folder)
    # A tower folder inside the checkpoint, or its stored settings, may differ from the published one and has priority.
    tower = settings.get("mm_vision_tower")
    if tower in PUBLISHED_TOWERS and not settings.get("mm_vision_config") and not (folder / tower).is_dir():
        settings = {**settings, "mm_vision_config": PUBLISHED_TOWERS[tower]}
    return Checkpoint(folder, None, settings, "full", hf).model_config()


@dataclass(frozen=True)
class ImageCounts:
    """Token counts of one image before selection.

    patches   [T] patches of each tile that are left after unpadding; tile 0 is the whole image. The tower still runs on
              whole tiles.
    newlines  newline tokens of the image
    newlines_alone  newline tokens of the image where it is the only tile
    """

    patches: tuple[int, ...]
    newlines: int = 0
    newlines_alone: int = 0

    @classmethod
    def from_plan(cls, plan: TilePlan, side: int) -> ImageCounts:
        """Counts from the image's tile plan. side: patches per side of a tile."""
        order = merge_order(plan, side)
        tiles = order[order != NEWLINE] // side**2
        patches = tuple(torch.bincount(tiles, minlength=plan.tiles).tolist())
        return cls(patches, int((order == NEWLINE).sum()), plan.newlines_alone)

    @property
    def candidates(self) -> int:
        """P: patches that a selector chooses from."""
        return sum(self.patches)

    @property
    def tokens(self) -> int:
        """N: vision tokens that the LLM reads without selection."""
        return self.candidates + self.newlines

    def smaller(self, side: int, budget: int) -> ImageCounts:
        """Counts of the image as method `downsample` makes it smaller. side: patches per side of a whole tile."""
        if self.candidates <= budget:
            return self
        newlines = self.newlines_alone
        return ImageCounts((smaller_side(side, budget, newlines) ** 2,), newlines, newlines)

    def of_tiles(self, tiles: Sequence[int]) -> ImageCounts:
        """Counts of some tiles of the image. A newline token ends a whole row of crops, so it is there only with all."""
        left = [size for tile, size in enumerate(self.patches) if tile not in tiles]
        newlines = 0 if any(left) else self.newlines
        return ImageCounts(tuple(self.patches[tile] for tile in tiles), newlines, self.newlines_alone)

    def kept(self, budget: int) -> int:
        """Vision tokens after selection under a budget K. UserError for a budget below 1."""
        # A budget that reaches all patches means no selection, so the newline tokens stay, too.
        if budget < 1:
            raise UserError(f"the budget is {budget}, allowed is a whole number of at least 1")
        return self.tokens if budget >= self.candidates else budget

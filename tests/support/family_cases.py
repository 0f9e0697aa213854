"""Tiny random models of the families that compress() takes, prompts as their processors make them, and references.

A case makes its model with `model()`, and prompts with `prompt(pieces)`. A piece is a number of text tokens, or "large",
"tall" or "small", an image of the family.
"""

from dataclasses import dataclass

import pytest
import torch
import transformers

IMAGE, VIDEO, START, END, PAD = 90, 91, 92, 93, 0
PIXELS = 14  # side of a patch
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 99,
    "pad_token_id": PAD,
}
VISION = {"hidden_size": 32, "intermediate_size": 40, "initializer_range": 0.3}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def others_long(names, *quick):
    """`names` as parameters of a test; those that are not `quick` are run with the long tests."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.long) for name in names]


@dataclass(frozen=True)
class Case:
    """A family: the class of transformers and the parts of its configuration beside TEXT and VISION."""

    name: str
    stem: str
    text: dict
    vision: dict
    other: dict

    @property
    def model_class(self):
        return getattr(transformers, f"{self.stem}ForConditionalGeneration")

    def model(self):
        torch.manual_seed(3)
        config = getattr(transformers, f"{self.stem}Config")(
            text_config=TEXT | self.text, vision_config=VISION | self.vision, **self.other
        )
        model = self.model_class(config).eval()
        for weight in model.parameters():
            if weight.dim() < 3 and not weight.any():
                torch.nn.init.normal_(weight, std=0.3)  # zero at first: position embeddings, biases
        model.generation_config.eos_token_id = None  # answers of one length, whatever they are
        model.generation_config.pad_token_id = PAD
        return model

    def image(self, name, generator, alone):
        """(ids, arrays of the image, number of its vision tokens). alone: it is the only image of its prompt."""
        raise NotImplementedError

    def prompt(self, pieces, seed=0):
        """What the processor gives for one prompt."""
        generator = torch.Generator().manual_seed(seed)
        ids, arrays = [], {}
        images = [piece for piece in pieces if isinstance(piece, str)]
        for piece in pieces:
            if isinstance(piece, int):
                ids += torch.randint(5, 80, (piece,), generator=generator).tolist()
                continue
            own, parts = self.image(piece, generator, alone=len(images) == 1)
            ids += own
            for name, values in parts.items():
                arrays.setdefault(name, []).append(values)
        ids = torch.tensor([ids])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | self.types(ids)
        return inputs | ({name: self.join(name, values) for name, values in arrays.items()} | self.counts(images))

    def types(self, ids):
        return {}

    def counts(self, images):
        return {}

    def join(self, name, values):
        return torch.cat(values)

    def batch(self, prompts):
        """Prompts as one batch, padded left."""
        length = max(one["input_ids"].shape[1] for one in prompts)
        joined = {}
        for name in {name: None for one in prompts for name in one}:
            values = [one[name] for one in prompts if name in one]
            if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
                pad = torch.nn.functional.pad
                joined[name] = torch.cat([pad(value, (length - value.shape[1], 0)) for value in values])
            else:
                joined[name] = self.join(name, values)
        return joined


class Qwen(Case):
    """Images are grids of patches of any size."""

    GRIDS = {"large": (1, 6, 10), "tall": (1, 10, 6), "small": (1, 4, 4)}

    def image(self, name, generator, alone):
        grid = self.GRIDS[name]
        patches = grid[1] * grid[2]
        pixels = torch.randn(patches, 3 * 2 * PIXELS * PIXELS, generator=generator)
        ids = [START, *[IMAGE] * (patches // 4), END]
        return ids, {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid])}

    def types(self, ids):
        return {"mm_token_type_ids": (ids == IMAGE).int()}


class InternVL(Case):
    """Images are numbers of tiles of 4 x 4 patches, which are 2 x 2 tokens."""

    TILES = {"large": 4, "tall": 3, "small": 1}

    def image(self, name, generator, alone):
        tiles = self.TILES[name]
        pixels = torch.randn(tiles, 3, 4 * PIXELS, 4 * PIXELS, generator=generator)
        return [START, *[IMAGE] * (tiles * 4), END], {"pixel_values": pixels}


class Onevision(Case):
    """Images have sizes in pixels. The only image of a prompt is cut into tiles of 4 x 4 patches."""

    # Tokens of the only image of a prompt: 16 of the whole image, and rows of the joined grid with their newline tokens.
    SIZES = {"large": ((100, 112), 16 + 8 * 9), "tall": ((112, 40), 16 + 8 * (2 + 1)), "small": ((50, 56), 16 + 4 * 5)}
    TILES = {"large": 5, "tall": 3, "small": 2}

    def image(self, name, generator, alone):
        size, tokens = self.SIZES[name]
        tiles = self.TILES[name] if alone else 1
        pixels = torch.randn(1, tiles, 3, 4 * PIXELS, 4 * PIXELS, generator=generator)
        pixels = torch.nn.functional.pad(pixels, (0, 0) * 3 + (0, 5 - tiles))
        ids = [IMAGE] * (tokens if alone else 17)
        return ids, {"pixel_values": pixels, "image_sizes": torch.tensor([size])}

    def counts(self, images):
        return {"batch_num_images": torch.tensor([len(images)])} if images else {}


_QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
_TOWER = {"depth": 3, "num_heads": 2, "out_hidden_size": 48, "patch_size": PIXELS}
_QWEN3 = _TOWER | {"num_position_embeddings": 64}
_DEEP = _QWEN3 | {"deepstack_visual_indexes": [0, 2]}
_HEADS = {"head_dim": 12, "rope_parameters": MROPE | {"mrope_interleaved": True}}
_QWEN2 = {"model_type": "qwen2"}
_TILE = {"num_hidden_layers": 2, "num_attention_heads": 2}
_LINEAR = {
    "head_dim": 16,
    "rope_parameters": MROPE | {"mrope_interleaved": True, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25},
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention"],
}

CASES = {
    case.name: case
    for case in (
        Qwen(
            "qwen2_vl",
            "Qwen2VL",
            {"rope_parameters": MROPE},
            {"depth": 3, "num_heads": 2, "embed_dim": 32, "hidden_size": 48, "patch_size": PIXELS, "mlp_ratio": 2},
            _QWEN,
        ),
        Qwen(
            "qwen2_5_vl",
            "Qwen2_5_VL",
            {"rope_parameters": MROPE},
            _TOWER | {"window_size": 56, "fullatt_block_indexes": [0, 1]},
            _QWEN,
        ),
        Qwen("qwen3_vl", "Qwen3VL", _HEADS, _DEEP, _QWEN),
        Qwen("qwen3_vl_moe", "Qwen3VLMoe", _HEADS | MOE, _DEEP, _QWEN),
        Qwen("qwen3_5", "Qwen3_5", _LINEAR, _QWEN3, _QWEN),
        Qwen("qwen3_5_moe", "Qwen3_5Moe", _LINEAR | MOE | {"shared_expert_intermediate_size": 32}, _QWEN3, _QWEN),
        InternVL(
            "internvl",
            "InternVL",
            _QWEN2,
            _TILE | {"image_size": [56, 56], "patch_size": [PIXELS, PIXELS], "use_qk_norm": True},
            {"image_token_id": IMAGE, "image_seq_length": 4},
        ),
        Onevision(
            "llava_onevision",
            "LlavaOnevision",
            _QWEN2,
            _TILE
            | {"model_type": "siglip_vision_model", "image_size": 56, "patch_size": PIXELS, "vision_use_head": False},
            {
                "image_token_index": IMAGE,
                "video_token_index": VIDEO,
                "image_grid_pinpoints": [[56, 56], [56, 112], [112, 56], [112, 112]],
                "vision_aspect_ratio": "anyres_max_9",
            },
        ),
    )
}

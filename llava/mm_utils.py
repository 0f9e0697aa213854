"""Images before the vision tower (tiles and pixels) and prompts before the LLM (token ids).

Everything that depends on the shape of an image is decided in one place, `tile_plan`: which grid of tiles, where
the image lies in it, and in which order the LLM sees the patches. Each checkpoint format follows its own original
where the two differ: LLaVA's repository (arXiv 2310.03744) and transformers' LlavaNext processors.
"""

from __future__ import annotations

import ast
import math
import os
from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import Image
from torch import Tensor

from llava.common.errors import UserError
from llava.common.pictures import rgb
from llava.common.resampling import Axis, resized_part
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX

NEWLINE = -1  # in a merge order: the slot of the learned newline token
# Pixels of a padded or resized picture from which on it is not made where it is also so many times as large as the picture
# that it is made of. An ordinary photograph is below that.
LARGE, TIMES = 1 << 22, 4


@dataclass(frozen=True)
class TilePlan:
    """How one image becomes tiles. Sizes are (width, height) in pixels.

    image_size  the image itself
    tile_size   side of a tile = input side of the vision tower
    grid        (columns, rows) of crops; None where the whole image is the only tile
    canvas      the picture that is cut into crops; with one tile, the square that is scaled to it
    resized     size of the image inside the canvas
    offset      (x, y) of the image inside the canvas; negative where the canvas is a part cut out of the image
    merge       "flat" (tile after tile), "spatial" (crops as one raster), "spatial_unpad" (that, less the padding,
                with a newline token after each row)
    hf          transformers' arithmetic where it differs from LLaVA's
    """

    image_size: tuple[int, int]
    tile_size: int
    grid: tuple[int, int] | None
    canvas: tuple[int, int]
    resized: tuple[int, int]
    offset: tuple[int, int]
    merge: str = "flat"
    hf: bool = False

    @property
    def tiles(self) -> int:
        return 1 if self.grid is None else 1 + self.grid[0] * self.grid[1]


def grid_pinpoints(model_config) -> list[tuple[int, int]]:
    """The canvas sizes (width, height) that a checkpoint allows, in its own order (the first wins ties)."""
    value = model_config.image_grid_pinpoints
    if isinstance(value, str):
        value = ast.literal_eval(value)
    return [(int(w), int(h)) for w, h in value]


def select_best_resolution(image_size, pinpoints) -> tuple[int, int]:
    """LLaVA-1.6's rule: most usable pixels (upscaling adds none), then least waste; the first wins ties."""
    width, height = image_size
    best, best_rank = None, None
    for w, h in pinpoints:
        scale = min(w / width, h / height)
        usable = min(int(width * scale) * int(height * scale), width * height)
        rank = (usable, usable - w * h)
        if best_rank is None or rank > best_rank:
            best, best_rank = (w, h), rank
    return best


def select_fullest_resolution(image_size, pinpoints) -> tuple[int, int]:
    """FasterVLM's rule (arXiv 2412.01818): the canvas that the image fills best, upscaling allowed; first wins ties.

    The filled share of a canvas is the ratio of the two aspect ratios.
    """
    aspect = image_size[0] / image_size[1]
    return max(pinpoints, key=lambda p: min(aspect, p[0] / p[1]) / max(aspect, p[0] / p[1]))


def is_hf(model_config) -> bool:
    """True for a checkpoint in transformers' own LLaVA format, False for LLaVA's original one."""
    return getattr(model_config, "mm_checkpoint_format", "llava") == "llava_hf"


def tile_plan(image_size, model_config, anyres: str | None = None) -> TilePlan:
    """The plan for an image of `image_size` (width, height) under a checkpoint's configuration.

    anyres: "official" or "fastervlm" (design decision 9); None takes the model's own setting.
    """
    width, height = int(image_size[0]), int(image_size[1])
    if width < 1 or height < 1:
        raise UserError(f"an image of {width} x {height} pixels, allowed is at least 1 x 1")
    side = model_config.mm_tile_size
    ratio = model_config.image_aspect_ratio
    if ratio != "anyres":
        if ratio == "pad":
            square = max(width, height)
            offset = ((square - width) // 2, (square - height) // 2)
            return TilePlan((width, height), side, None, (square, square), (width, height), offset)
        # CLIP's own processor: the shorter side becomes a tile's side, and the middle is cut out.
        square = min(width, height)
        offset = (-((width - square) // 2), -((height - square) // 2))
        return TilePlan((width, height), side, None, (square, square), (width, height), offset)
    published = (anyres or getattr(model_config, "mm_anyres", "official")) == "fastervlm"
    choose = select_fullest_resolution if published else select_best_resolution
    canvas = choose((width, height), grid_pinpoints(model_config))
    scale_w, scale_h = canvas[0] / width, canvas[1] / height
    if scale_w < scale_h:
        resized = (canvas[0], min(math.ceil(height * scale_w), canvas[1]))
    else:
        resized = (min(math.ceil(width * scale_h), canvas[0]), canvas[1])
    return TilePlan(
        image_size=(width, height),
        tile_size=side,
        grid=(canvas[0] // side, canvas[1] // side),
        canvas=canvas,
        resized=resized,
        offset=((canvas[0] - resized[0]) // 2, (canvas[1] - resized[1]) // 2),
        merge="spatial" if published else getattr(model_config, "mm_patch_merge_type", "flat"),
        hf=is_hf(model_config),
    )


def unpadded_bounds(plan: TilePlan, rows: int, columns: int) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the part of a [rows, columns] patch grid that is image and not padding.

    LLaVA truncates the scaled size; transformers rounds it to seven digits first.
    """
    width, height = plan.image_size

    def scaled(length, factor):
        return int(round(length * factor, 7)) if plan.hf else int(length * factor)

    if width / height > columns / rows:
        margin = (rows - scaled(height, columns / width)) // 2
        return margin, rows - margin, 0, columns
    margin = (columns - scaled(width, rows / height)) // 2
    return 0, rows, margin, columns - margin


@lru_cache(maxsize=512)
def merge_order(plan: TilePlan, side: int, tiles: int | None = None) -> Tensor:
    """Which patch stands where in the sequence that the LLM sees: the one index map of the whole system.

    side: patches per tile side. tiles: how many tiles there really are; 1 stands for an image that was not cut.
    Returns int64 [N]: tile * side**2 + row * side + column, or NEWLINE.
    """
    per_tile = side * side
    whole = torch.arange(per_tile)
    if (tiles or plan.tiles) == 1:
        # An uncut image under `spatial_unpad` still ends with one newline token, in both originals.
        return torch.cat([whole, torch.tensor([NEWLINE])]) if plan.merge == "spatial_unpad" else whole
    across, down = plan.grid
    crops = torch.arange(per_tile, plan.tiles * per_tile)
    if plan.merge == "flat":
        return torch.cat([whole, crops])
    raster = crops.view(down, across, side, side).permute(0, 2, 1, 3).reshape(down * side, across * side)
    if plan.merge == "spatial_unpad":
        top, bottom, left, right = unpadded_bounds(plan, *raster.shape)
        raster = raster[top:bottom, left:right]
        raster = torch.cat([raster, torch.full((raster.shape[0], 1), NEWLINE)], dim=1)
    return torch.cat([whole, raster.flatten()])


def expand_to_square(image: Image.Image, color) -> Image.Image:
    """Pad an image to a square, itself in the middle (LLaVA-1.5's `pad`); odd paddings put the spare pixel last."""
    side = max(image.size)
    square = Image.new(image.mode, (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def cut_tiles(image: Image.Image, plan: TilePlan) -> list[Image.Image]:
    """The whole image squeezed into one tile, then the crops of the padded canvas in raster order."""
    canvas = Image.new("RGB", plan.canvas, (0, 0, 0))
    canvas.paste(image.resize(plan.resized), plan.offset)
    side = plan.tile_size
    across, down = plan.grid
    crops = [
        canvas.crop((x * side, y * side, (x + 1) * side, (y + 1) * side)) for y in range(down) for x in range(across)
    ]
    return [image.resize((side, side)), *crops]


def process_images(images, image_processor, model_config, anyres: str | None = None):
    """Pixels for the vision tower.

    images: PIL images. Returns [B, 3, H, W] (one tile each) or [B, T, 3, H, W] where all have as many tiles, else a
    list of [T, 3, H, W]. Follows the checkpoint's own processor: a llava-hf one gives what transformers gives.
    """
    images = [rgb(image) for image in images]
    published = (anyres or getattr(model_config, "mm_anyres", "official")) == "fastervlm"
    ratio = model_config.image_aspect_ratio
    if ratio == "anyres":
        if is_hf(model_config) and not published:
            pixels = [_hf_tiles(image, image_processor, model_config) for image in images]
        else:
            pixels = []
            for image in images:
                tiles = cut_tiles(image, tile_plan(image.size, model_config, anyres))
                pixels.append(_pixel_values(tiles, image_processor))
    else:
        pixels = [_one_tile(image, image_processor, model_config) for image in images]
    same = all(p.shape == pixels[0].shape for p in pixels)
    return torch.stack(pixels) if same else pixels


def _pixel_values(images, image_processor, **settings) -> Tensor:
    """[T, 3, H, W]: resize, crop and normalise PIL images as one tile each. settings: the processor's, for this call."""
    if hasattr(image_processor, "image_grid_pinpoints"):
        # transformers' anyres processor would cut each tile again; its settings, applied to a finished tile.
        image_processor = _single_tile_processor(image_processor)
    return image_processor(images, return_tensors="pt", **settings)["pixel_values"]


def _one_tile(image: Image.Image, image_processor, model_config) -> Tensor:
    """[3, H, W] of an RGB image that is padded to a square, or of which the middle is cut out."""
    pad = model_config.image_aspect_ratio == "pad"
    color = tuple(int(mean * 255) for mean in image_processor.image_mean)
    axes = _axes(image.size, image_processor, pad)
    if axes is not None:
        done = {"do_resize": False} | ({"do_pad": False} if pad else {})
        return _pixel_values([resized_part(image, *axes, color)], image_processor, **done)[0]
    if pad and not is_hf(model_config):
        image = expand_to_square(image, color)
    return _pixel_values([image], image_processor)[0]


def _axes(size: tuple[int, int], image_processor, pad: bool) -> tuple[Axis, Axis] | None:
    """What is left of an image's width and height once it is padded or resized, and cropped, as Axis has it.

    None where the padded or resized picture is not much larger than it has to be, or the processor does not resize to a
    shorter side with a bicubic filter and crop: the processor then does all of it.
    """
    settings = image_processor.to_dict()
    side, crop = (settings.get(key) or {} for key in ("size", "crop_size"))
    side, crop = side.get("shortest_edge"), (crop.get("width"), crop.get("height"))
    bicubic = settings.get("resample") == Image.Resampling.BICUBIC and settings.get("do_resize")
    if not (bicubic and side and all(crop) and settings.get("do_center_crop")):
        return None
    canvas = (max(size),) * 2 if pad else size
    resized = tuple(int(side * length / min(canvas)) for length in canvas)
    largest = max(math.prod(canvas), math.prod(resized))
    if largest < max(LARGE, TIMES * math.prod(size)):
        return None
    axes = []
    for length, whole, new, wanted in zip(size, canvas, resized, crop, strict=True):
        start = max(0, (new - wanted) // 2)
        axes.append(Axis(whole, new, start, min(new, start + wanted), (whole - length) // 2))
    return tuple(axes)


def _single_tile_processor(image_processor):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    settings = {k: v for k, v in image_processor.to_dict().items() if k in CLIPImageProcessorPil().to_dict()}
    settings.pop("image_processor_type", None)
    return CLIPImageProcessorPil(**settings)


def _hf_tiles(image: Image.Image, image_processor, model_config) -> Tensor:
    pixels = image_processor([image], return_tensors="pt")["pixel_values"][0]
    return pixels[: tile_plan(image.size, model_config).tiles]


def tokenizer_image_token(prompt: str, tokenizer, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors=None):
    """Token ids of a prompt, with `image_token_index` wherever it says <image>.

    The text between placeholders is tokenised piece by piece, with one BOS at the front (LLaVA's rule); a
    tokenizer that knows <image> as a token of its own (llava-hf) takes the prompt whole, as its processor does.
    Returns a list, or an int64 tensor [S] with return_tensors="pt".
    """
    if DEFAULT_IMAGE_TOKEN in tokenizer.get_added_vocab():
        placeholder = tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)
        ids = [image_token_index if i == placeholder else i for i in tokenizer(prompt).input_ids]
    else:
        pieces = [list(tokenizer(piece).input_ids) for piece in prompt.split(DEFAULT_IMAGE_TOKEN)]
        bos = int(bool(pieces[0]) and pieces[0][0] == tokenizer.bos_token_id)
        ids = pieces[0]
        for piece in pieces[1:]:
            ids = ids + [image_token_index] + piece[bos:]
    if return_tensors is None:
        return ids
    if return_tensors != "pt":
        raise ValueError(f'return_tensors is "{return_tensors}", allowed are None and "pt"')
    return torch.tensor(ids, dtype=torch.long)


def left_pad(rows, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Stack token id rows (tensors [S_i]) for generation: (input_ids [B, S], attention_mask [B, S]), padded left."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = row
        mask[i, length - len(row) :] = 1
    return ids, mask


def get_model_name_from_path(model_path: str) -> str:
    """The last part of a path or hub name; checkpoint-N folders keep their parent's name in front."""
    parts = os.fspath(model_path).rstrip("/").split("/")
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]

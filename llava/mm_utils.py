"""Images before the vision tower (tiles and pixels) and prompts before the LLM (token ids).

`tile_plan` makes all decisions that depend on the shape of an image: the grid of tiles, the place of the image in it,
and the order in which the LLM reads the patches. There are two originals: LLaVA's repository (arXiv 2310.03744) and the
LlavaNext processors of transformers. Where they differ, a checkpoint follows the original of its own format.
"""

from __future__ import annotations

import ast
import math
import os
import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria

from llava.common.errors import UserError
from llava.common.pictures import rgb
from llava.common.resampling import Axis, resized_part
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX

MAX_GRIDS = 10_000  # that a text like "(1x1),...,(6x6)" may stand for
NEWLINE = -1  # in a merge order: the slot of the learned newline token
# Pixels of a padded or resized picture from which on it is not made where it is also so many times as large as the picture
# that it is made of. An ordinary photograph is below that.
LARGE, TIMES = 1 << 22, 4


@dataclass(frozen=True)
class TilePlan:
    """Describes how one image becomes tiles. Sizes are (width, height) in pixels.

    image_size  size of the image
    tile_size   side of a tile, which is the input side of the vision tower
    grid        (columns, rows) of crops; None if the whole image is the only tile
    canvas      size of the picture that is cut into crops; with one tile, size of the square that is scaled to the tile
    resized     size of the image inside the canvas
    offset      (x, y) of the image inside the canvas; negative if the canvas is a part cut out of the image
    merge       order of the patches: "flat" (tile after tile), "spatial" (crops as one raster), "spatial_unpad" (crops
                as one raster without padding, and a newline token after each row)
    hf          True for the arithmetic of transformers where it differs from LLaVA's
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
    def newlines_alone(self) -> int:
        """Newline tokens of the whole image where it is the only tile. Both originals end it with one."""
        return int(self.merge == "spatial_unpad")

    @property
    def tiles(self) -> int:
        """Number of tiles: the whole image, and the crops of the grid."""
        return 1 if self.grid is None else 1 + self.grid[0] * self.grid[1]


def grid_pinpoints(model_config) -> list[tuple[int, int]]:
    """The canvas sizes (width, height) that a checkpoint allows, in its own order (the first wins ties)."""
    return [(w, h) for w, h in model_config.image_grid_pinpoints]


def read_pinpoints(value, side: int, name: str = "image_grid_pinpoints") -> list[list[int]]:
    """The canvas sizes [width, height] that `value` says, for tiles of `side` pixels.

    value: a list or its text, or LLaVA-NeXT's text "(1x1),...,(6x6)": all grids from the first to the last, in tiles.
    UserError for what cannot be read, and for a canvas that is not made of whole tiles.
    """
    try:
        if isinstance(value, str):
            sizes = _grids_between(value, side) if "x" in value else ast.literal_eval(value)
        else:
            sizes = value
        sizes = [[_whole(width), _whole(height)] for width, height in sizes]
    except (ValueError, SyntaxError, TypeError, OverflowError, RecursionError):
        sizes = []
    if not sizes or any(length < side or length % side for size in sizes for length in size):
        raise UserError(
            f"{name} is {str(value)[:80]}, allowed is a list of [width, height], each a multiple of the tower's {side} pixels"
        )
    return sizes


def _grids_between(text: str, side: int) -> list[tuple[int, int]]:
    ends = [(int(columns), int(rows)) for columns, rows in re.findall(r"\((\d+)x(\d+)\)", text)]
    if not ends or ends[-1][0] * ends[-1][1] > MAX_GRIDS:
        raise ValueError
    (left, top), (right, bottom) = ends[0], ends[-1]
    return [(side * x, side * y) for x in range(left, right + 1) for y in range(top, bottom + 1)]


def _whole(length) -> int:
    if int(length) != float(length):
        raise ValueError
    return int(length)


def select_best_resolution(image_size, pinpoints) -> tuple[int, int]:
    """The canvas (width, height) that LLaVA-1.6 takes for an image: most usable pixels, then least waste.

    Upscaling adds no usable pixels. The first of `pinpoints` wins ties.
    """
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
    """The canvas (width, height) that FasterVLM (arXiv 2412.01818) takes: the one that the image fills best.

    Upscaling is allowed. The first of `pinpoints` wins ties.
    """
    # The filled share of a canvas is the ratio of the two aspect ratios, the smaller one divided by the larger one.
    aspect = image_size[0] / image_size[1]
    return max(pinpoints, key=lambda p: min(aspect, p[0] / p[1]) / max(aspect, p[0] / p[1]))


def is_hf(model_config) -> bool:
    """True for a checkpoint in the format of transformers, False for one in LLaVA's original format."""
    return getattr(model_config, "mm_checkpoint_format", "llava") == "llava_hf"


def tile_plan(image_size, model_config, anyres: str | None = None) -> TilePlan:
    """The TilePlan of an image of `image_size` (width, height) under a checkpoint's configuration.

    anyres: "official" (the rule of the checkpoint's own format) or "fastervlm" (arXiv 2412.01818: another canvas, no
        unpadding and no newline tokens). None takes the model's own setting.
    Raises UserError for an image without pixels.
    """
    width, height = int(image_size[0]), int(image_size[1])
    if width < 1 or height < 1:
        raise UserError(f"an image of {width} x {height} pixels, allowed is at least 1 x 1")
    side = model_config.mm_tile_size
    ratio = model_config.image_aspect_ratio
    # 1. One tile (LLaVA-1.5).
    if ratio != "anyres":
        if ratio == "pad":
            square = max(width, height)
            offset = ((square - width) // 2, (square - height) // 2)
            return TilePlan((width, height), side, None, (square, square), (width, height), offset)
        # CLIP's own processor: the shorter side becomes a tile's side, and the middle is cut out. The offset is
        # negative, because the square lies inside the image.
        square = min(width, height)
        offset = (-((width - square) // 2), -((height - square) // 2))
        return TilePlan((width, height), side, None, (square, square), (width, height), offset)
    # 2. Several tiles (LLaVA-1.6): the canvas by the rule of the tile path.
    published = (anyres or getattr(model_config, "mm_anyres", "official")) == "fastervlm"
    choose = select_fullest_resolution if published else select_best_resolution
    canvas = choose((width, height), grid_pinpoints(model_config))
    # 3. The image fills the canvas in one direction. ceil may exceed the canvas by a pixel, hence min.
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
    """(top, bottom, left, right) of the part of a [rows, columns] patch grid that is image and not padding."""
    width, height = plan.image_size

    def scaled(length, factor):
        # transformers rounds to seven digits before it truncates. Otherwise 23.999999999 would give 23 here and 24
        # there, and the number of vision tokens would not match the placeholders of its processor.
        return int(round(length * factor, 7)) if plan.hf else int(length * factor)

    if width / height > columns / rows:
        margin = (rows - scaled(height, columns / width)) // 2
        return margin, rows - margin, 0, columns
    margin = (columns - scaled(width, rows / height)) // 2
    return 0, rows, margin, columns - margin


@lru_cache(maxsize=512)
def merge_order(plan: TilePlan, side: int, tiles: int | None = None) -> Tensor:
    """The order in which the LLM reads the tokens of an image. The whole code base uses this one index map.

    side: patches per tile side. tiles: the number of tiles that the tower got; 1 means that the image was not cut.
    Returns int64 [N]: tile * side**2 + row * side + column, or NEWLINE. The result is cached: do not write into it.
    """
    per_tile = side * side
    whole = torch.arange(per_tile)
    if (tiles or plan.tiles) == 1:
        return torch.cat([whole, torch.full((plan.newlines_alone,), NEWLINE)])
    across, down = plan.grid
    crops = torch.arange(per_tile, plan.tiles * per_tile)
    if plan.merge == "flat":
        return torch.cat([whole, crops])
    # [tile row, tile column, row, column] -> one raster over all crops, so that a patch stands beside its neighbours.
    raster = crops.view(down, across, side, side).permute(0, 2, 1, 3).reshape(down * side, across * side)
    if plan.merge == "spatial_unpad":
        top, bottom, left, right = unpadded_bounds(plan, *raster.shape)
        raster = raster[top:bottom, left:right]
        raster = torch.cat([raster, torch.full((raster.shape[0], 1), NEWLINE)], dim=1)
    return torch.cat([whole, raster.flatten()])


@lru_cache(maxsize=512)
def crop_overlap(plan: TilePlan, side: int) -> Tensor:
    """The share of each patch of tile 0 that lies in each crop: float64 [crops, side**2], crops in raster order.

    side: patches per tile side. Tile 0 is the whole image squeezed into a square, so its patches are rectangles on the
    canvas. Padding belongs to no patch, and the shares of a patch add up to 1. The result is cached: do not write into it.
    """
    shares = []
    for length, offset, crops in zip(plan.resized, plan.offset, plan.grid, strict=True):
        borders = offset + length / side * torch.arange(side + 1, dtype=torch.float64)
        start = plan.tile_size * torch.arange(crops, dtype=torch.float64)[:, None]
        inside = torch.minimum(torch.maximum(borders, start), start + plan.tile_size)
        shares.append(inside.diff(dim=1) / (length / side))
    across, down = shares  # [columns, side], [rows, side]
    return torch.einsum("yr,xc->yxrc", down, across).reshape(-1, side * side)


def blank_patches(plan: TilePlan, side: int) -> Tensor | None:
    """Which patches of a square tile show only padding of the image: bool [side**2]; None for an image without padding.

    side: patches per tile side. Patches that show a part of the image, however small, are not blank.
    """
    if plan.grid is not None or max(plan.offset) <= 0:
        return None
    patch = plan.tile_size // side
    inside = []
    for start, end in _inside_square(plan):
        place = torch.arange(side)
        inside.append((place >= start // patch) & (place < side - (plan.tile_size - end) // patch))
    columns, rows = inside
    return ~(rows[:, None] & columns).flatten()


def _inside_square(plan: TilePlan) -> list[tuple[int, int]]:
    """(start, end) of the image in a tile that is padded to a square: its columns, then its rows, in pixels."""
    found = []
    for length, square in zip(plan.resized, plan.canvas, strict=True):
        scaled = round(length * plan.tile_size / square)
        start = (plan.tile_size - scaled) // 2  # an odd pixel of padding goes last
        found.append((start, start + scaled))
    return found


def picture_bounds(plan: TilePlan, tiles: int | None = None) -> Tensor:
    """The part of each tile that shows the image and no padding: int64 [T, 4], top, bottom, left and right in pixels.

    tiles: as in merge_order. In a picture that is resized after it was padded, the pixels that the filter mixes with
    padding are left out.
    """
    side = plan.tile_size
    whole = [0, side, 0, side]
    if plan.grid is not None and (tiles or plan.tiles) > 1:
        across, down = plan.grid
        bounds = [whole]
        for tile in range(across * down):
            spans = []
            for at, offset, length in zip(divmod(tile, across), plan.offset[::-1], plan.resized[::-1], strict=True):
                start = offset - at * side
                spans += [min(max(0, start), side), min(max(0, start + length), side)]
            bounds.append(spans)
        return torch.tensor(bounds)
    if plan.grid is not None or max(plan.offset) <= 0:
        return torch.tensor([whole])
    # The bicubic filter reaches over two pixels of the larger of both pictures.
    reach = 2 * math.ceil(max(1.0, side / max(plan.canvas)))
    columns, rows = ([start + reach * (start > 0), end - reach * (end < side)] for start, end in _inside_square(plan))
    return torch.tensor([rows + columns])


def expand_to_square(image: Image.Image, color) -> Image.Image:
    """The image in the middle of a square of one colour (LLaVA-1.5's `pad`). An odd pixel of padding goes last."""
    side = max(image.size)
    square = Image.new(image.mode, (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def cut_tiles(image: Image.Image, plan: TilePlan) -> list[Image.Image]:
    """The tiles of an image: first the whole image squeezed into one tile, then the crops in raster order."""
    canvas = Image.new("RGB", plan.canvas, (0, 0, 0))
    canvas.paste(image.resize(plan.resized), plan.offset)
    side = plan.tile_size
    across, down = plan.grid
    crops = [
        canvas.crop((x * side, y * side, (x + 1) * side, (y + 1) * side)) for y in range(down) for x in range(across)
    ]
    return [image.resize((side, side)), *crops]


def process_images(images, image_processor, model_config, anyres: str | None = None):
    """Pixels of images for the vision tower, made as the checkpoint's own processor makes them.

    images: PIL images. anyres: see tile_plan.
    Returns [B, 3, H, W] for one tile each, [B, T, 3, H, W] if all images have the same number of tiles, else a list of
    [T, 3, H, W]. A llava-hf checkpoint gives the pixels that transformers gives.
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
        # transformers' anyres processor would cut each finished tile into tiles again.
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
    """Return the parts of an image's width and height that padding or resizing and cropping leave, as two Axis.

    The result is None where the processor does all of the work. This is so if the padded or resized picture is not much
    larger than needed, or if the processor does not resize the shorter side with a bicubic filter and crop.
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
    """A CLIP processor for one tile with the settings of an anyres processor."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    settings = {k: v for k, v in image_processor.to_dict().items() if k in CLIPImageProcessorPil().to_dict()}
    settings.pop("image_processor_type", None)
    return CLIPImageProcessorPil(**settings)


def _hf_tiles(image: Image.Image, image_processor, model_config) -> Tensor:
    """Pixels [T, 3, H, W] of one image, cut into tiles by transformers' own processor."""
    pixels = image_processor([image], return_tensors="pt")["pixel_values"][0]
    # The processor may pad the tiles of a batch to the largest number, so the count comes from the plan.
    return pixels[: tile_plan(image.size, model_config).tiles]


def tokenizer_image_token(prompt: str, tokenizer, image_token_index: int = IMAGE_TOKEN_INDEX, return_tensors=None):
    """Token ids of a prompt, with `image_token_index` in place of each <image>.

    LLaVA's rule: each piece of text between placeholders is tokenised by itself, and one BOS stays at the front.
    A tokenizer that has <image> as a token of its own (llava-hf) gets the whole prompt, as its processor does it.
    Returns a list, or an int64 tensor [S] with return_tensors="pt". ValueError for another value of return_tensors.
    """
    if DEFAULT_IMAGE_TOKEN in tokenizer.get_added_vocab():
        placeholder = tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)
        ids = [image_token_index if i == placeholder else i for i in tokenizer(prompt).input_ids]
    else:
        pieces = [list(tokenizer(piece).input_ids) for piece in prompt.split(DEFAULT_IMAGE_TOKEN)]
        # The tokenizer puts a BOS before every piece. Some tokenizers have none, hence the test.
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
    """(input_ids [B, S], attention_mask [B, S]) of token id rows (tensors [S_i]), padded left for generation."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :] = row
        mask[i, length - len(row) :] = 1
    return ids, mask


def get_model_name_from_path(model_path: str) -> str:
    """The last part of a path or hub name. A folder checkpoint-N keeps its parent's name in front, as in LLaVA."""
    parts = os.fspath(model_path).rstrip("/").split("/")
    return "_".join(parts[-2:]) if parts[-1].startswith("checkpoint-") else parts[-1]


class KeywordsStoppingCriteria(StoppingCriteria):
    """LLaVA's: generation of a row ends where a keyword stands in its answer. An empty keyword stops nothing.

    input_ids: the prompt [B, S], as generate() is given it; it does not count where it stands before the answer.
    """

    def __init__(self, keywords: list[str], tokenizer, input_ids: Tensor):
        self.keywords = [keyword for keyword in keywords if keyword]
        self.tokenizer, self.prompt = tokenizer, input_ids
        self.keyword_ids = []
        for keyword in self.keywords:
            ids = tokenizer(keyword).input_ids
            self.keyword_ids.append(ids[1:] if len(ids) > 1 and ids[0] == tokenizer.bos_token_id else ids)

    def __call__(self, output_ids: Tensor, scores: Tensor | None = None, **kwargs) -> Tensor:
        """Per row, whether it ends: bool [B]."""
        length = self.prompt.shape[1]
        starts = output_ids[:, :length]
        if starts.shape == self.prompt.shape and torch.equal(starts, self.prompt.to(output_ids.device)):
            output_ids = output_ids[:, length:]
        ends = [self._ends(row) for row in output_ids.tolist()]
        return torch.tensor(ends, dtype=torch.bool, device=output_ids.device)

    def _ends(self, answer: list[int]) -> bool:
        if any(answer[-len(ids) :] == ids for ids in self.keyword_ids):
            return True
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
        return any(keyword in text for keyword in self.keywords)

"""From an image file to pixels, and from patches to their place in the prompt.

`llava-hf` checkpoints: exactly what transformers' own processors give. Original checkpoints: cases worked out by hand
from LLaVA's rules. The order of the patches: features that say where they come from, sent through the model's own
merging code, against plain loops and against transformers' packing.
"""

import tracemalloc
import types

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from PIL import Image
from tiny_checkpoints import CLIP_MEAN, CLIP_STD, PATCH, PINPOINTS, SIDE, make_image
from transformers import (
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
)

from llava.mm_utils import merge_order, process_images, tile_plan, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.overlay.views import kept_at

TILE_PATCHES = SIDE // PATCH
SIZES = [(97, 61), (55, 107), (20, 33), (56, 56), (113, 112), (300, 9), (9, 300), (171, 43), (37, 167), (1, 1), (50, 3)]
BACKGROUND = (122, 116, 104)  # int(255 * mean) of CLIP: truncated, not rounded (the second is 116.7)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Name -> (folder, tokenizer, model, image_processor, transformers' model), built when first asked for."""
    built = {}

    def get(name: str):
        if name not in built:
            folder = tmp_path_factory.mktemp(name)
            kind = "llava_next" if "1.6" in name else "llava"
            reference = tiny.build_reference(kind, pinpoints=PINPOINTS)
            if name.startswith("hf"):
                tiny.save_llava_hf(reference, folder, "published" if "published" in name else "current")
            else:
                # The same list of numbers, which this format reads as (width, height).
                tower = tiny.save_clip_tower(reference, folder / "tower")
                changes = {"image_grid_pinpoints": PINPOINTS} if kind == "llava_next" else {}
                folder = tiny.save_original(reference, folder / "llava", tower, **changes)
            tokenizer, model, processor, _ = load_pretrained_model(str(folder), device_map="cpu")
            built[name] = (folder, tokenizer, model, processor, reference)
        return built[name]

    return get


def pixels(checkpoint, *images):
    _, _, model, processor, _ = checkpoint
    return process_images(list(images), processor, model.config)


def normalised(image: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, 3] -> [3, H, W] as CLIP sees it."""
    scaled = (image.astype(np.float64) / 255 - CLIP_MEAN) / CLIP_STD
    return torch.from_numpy(scaled.transpose(2, 0, 1)).float()


def colours(pixel_values: torch.Tensor) -> np.ndarray:
    """[3, H, W] -> uint8 [H, W, 3], the inverse of `normalised`."""
    image = pixel_values.double().permute(1, 2, 0).numpy() * CLIP_STD + CLIP_MEAN
    return np.rint(image * 255).astype(np.uint8)


def in_every_mode(width, height):
    image = make_image(width, height)
    alpha = image.convert("RGBA")
    alpha.putalpha(make_image(width, height, seed=1).convert("L"))
    return [image, image.convert("L"), alpha, image.convert("P"), image.convert("1"), image.convert("CMYK")]


# ------------------------------------------------------------------------------------------------------- llava-hf
@pytest.mark.parametrize("name", ["hf-1.5-current", "hf-1.5-published"])
def test_hf_1_5_is_transformers_centre_crop(checkpoints, name):
    folder = checkpoints(name)[0]
    theirs = CLIPImageProcessorPil.from_pretrained(folder)
    for size in SIZES:
        images = in_every_mode(*size)
        found = pixels(checkpoints(name), *images)
        assert found.shape == (len(images), 3, SIDE, SIDE)
        expected = theirs([image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
        assert torch.equal(found, expected)


THIN = [(8192, 1), (1, 8192), (20_000, 3), (3, 20_000), (5003, 4), (4, 5003)]


@pytest.fixture
def small_pictures_alone(monkeypatch):
    """Pillow makes no picture of more than 2^22 pixels."""

    def checked(function, size_of):
        def call(*args, **kwargs):
            size = size_of(*args)
            assert size[0] * size[1] <= 1 << 22, f"a picture of {size} was made"
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(Image.Image, "resize", checked(Image.Image.resize, lambda image, size, *_: size))
    monkeypatch.setattr(Image, "new", checked(Image.new, lambda mode, size, *_: size))


@pytest.mark.parametrize("size", [(1500, 1), (1, 1500), (2003, 2), (3, 5003)])
def test_the_middle_of_a_thin_picture_is_transformers(checkpoints, size):
    """Cut before it is resized, and the same tile to the last bit: transformers makes 84,000 x 56 pixels of 1,500 x 1."""
    folder = checkpoints("hf-1.5-current")[0]
    image = make_image(*size)
    expected = CLIPImageProcessorPil.from_pretrained(folder)([image], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels(checkpoints("hf-1.5-current"), image), expected)


@pytest.mark.parametrize("size", [(3001, 2), (2, 3001)])
def test_a_padded_thin_picture_is_transformers(checkpoints, size):
    folder = checkpoints("hf-1.5-current")[0]
    image = make_image(*size)
    settings = CLIPImageProcessorPil.from_pretrained(folder).to_dict()
    settings = {key: settings[key] for key in ("size", "crop_size", "image_mean", "image_std")}
    theirs = LlavaImageProcessorPil(**settings, do_pad=True)
    expected = theirs([image], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels(checkpoints("original-1.5"), image), expected)
    config = types.SimpleNamespace(image_aspect_ratio="pad", mm_checkpoint_format="llava_hf")
    assert torch.equal(process_images([image], theirs, config), expected)


@pytest.mark.parametrize("size", THIN)
def test_thin_pictures_take_no_memory(checkpoints, small_pictures_alone, size):
    """Under every image_aspect_ratio of one tile, and as they are shown."""
    image = Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8))
    for name, ratio in (("hf-1.5-current", "crop"), ("original-1.5", None), ("original-1.5", "pad")):
        processor = checkpoints(name)[3]
        config = types.SimpleNamespace(**vars(real_config("llava_hf")) | {"image_aspect_ratio": ratio})
        config.mm_checkpoint_format = "llava_hf" if ratio == "crop" else "llava"
        tracemalloc.start()
        found = process_images([image], processor, config)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert found.shape == (1, 3, SIDE, SIDE) and peak < 100 << 20
        ((_, view),) = kept_at(image, tile_plan(size, config), 4, [(0, 1, 1)])
        assert view.size == (384, 384)


@pytest.mark.parametrize("name", ["hf-1.6-current", "hf-1.6-published"])
def test_hf_1_6_is_transformers_tiles(checkpoints, name):
    folder = checkpoints(name)[0]
    theirs = LlavaNextImageProcessorPil.from_pretrained(folder)
    assert [list(p) for p in theirs.image_grid_pinpoints] == PINPOINTS
    for size in SIZES:
        images = in_every_mode(*size)
        found = pixels(checkpoints(name), *images)
        expected = theirs([image.convert("RGB") for image in images], return_tensors="pt")
        assert torch.equal(found, expected["pixel_values"])
        assert expected["image_sizes"].tolist() == [[size[1], size[0]]] * len(images)


@pytest.mark.parametrize(
    "kind,processor,changes",
    [
        ("llava", CLIPImageProcessorPil, {}),
        ("llava", LlavaImageProcessorPil, {"image_processor_type": "LlavaImageProcessor", "do_pad": True}),
        ("llava", CLIPImageProcessorPil, {"image_processor_type": "CLIPImageProcessorFast", "do_center_crop": False}),
        ("llava_next", LlavaNextImageProcessorPil, {"image_processor_type": "LlavaNextImageProcessorFast"}),
    ],
)
def test_hf_settings_as_transformers_5_saves_them(tmp_path, kind, processor, changes):
    """One processor_config.json, perhaps with other settings, a padding or a torchvision processor."""
    folder = tiny.nest_image_processor(tiny.save_llava_hf(tiny.build_reference(kind), tmp_path), **changes)
    _, model, image_processor, _ = load_pretrained_model(folder, device_map="cpu")
    images = [make_image(56, 56), make_image(56, 56, seed=1)]
    if changes.get("do_center_crop", True):
        images = [make_image(97, 61), make_image(100, 110)]
    found = process_images(images, image_processor, model.config)
    assert torch.equal(found, processor.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"])


def test_hf_images_of_different_tile_counts_come_as_a_list(checkpoints):
    folder = checkpoints("hf-1.6-current")[0]
    images = [make_image(*size) for size in [(97, 61), (171, 43), (55, 107)]]
    found = pixels(checkpoints("hf-1.6-current"), *images)
    batched = LlavaNextImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")["pixel_values"]
    assert isinstance(found, list) and [len(p) for p in found] == [5, 4, 3]
    for mine, theirs in zip(found, batched, strict=True):
        assert torch.equal(mine, theirs[: len(mine)]) and not theirs[len(mine) :].any()


@pytest.mark.parametrize("name", ["hf-1.5-current", "hf-1.6-current"])
def test_hf_prompt_is_the_processors(checkpoints, name):
    """Text ids, and how many image tokens stand where, are what transformers' processor makes of prompt and images."""
    folder, tokenizer, model, image_processor, _ = checkpoints(name)
    kind, image_kind = (LlavaNextProcessor, LlavaNextImageProcessorPil)
    if "1.5" in name:
        kind, image_kind = LlavaProcessor, CLIPImageProcessorPil
    processor = kind(
        image_processor=image_kind.from_pretrained(folder),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    for size in [(97, 61), (61, 107), (171, 43), (188, 47), (9, 300)]:
        images = [make_image(*size), make_image(31, 87)]
        prompt = "USER: <image>\nWhat colour? ASSISTANT: Yes</s>USER: <image>\nHow many digits? ASSISTANT:"
        theirs = processor(images=images, text=prompt, return_tensors="pt")["input_ids"][0]
        ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")
        prepared = model.prepare(ids, pixels(checkpoints(name), *images), [image.size for image in images])
        counts = iter(n for _, n in prepared.image_spans[0])
        mine = [[tiny.word_ids().image] * next(counts) if i == -200 else [i] for i in ids.tolist()]
        assert [i for piece in mine for i in piece] == theirs.tolist()


# ---------------------------------------------------------------------------------------------- original, LLaVA 1.5
def test_pad_puts_the_image_in_the_middle_of_its_background(checkpoints):
    """A 56 x 25 white image: no resizing, 31 rows of padding, 15 above and the odd one below."""
    found = pixels(checkpoints("original-1.5"), Image.new("RGB", (56, 25), (255, 255, 255)))
    assert found.shape == (1, 3, SIDE, SIDE)
    image = colours(found[0])
    assert (image[15:40] == 255).all()
    assert (image[:15] == BACKGROUND).all() and (image[40:] == BACKGROUND).all()


def test_pad_upright(checkpoints):
    """23 x 56: 33 columns of padding, 16 on the left, 17 on the right."""
    image = colours(pixels(checkpoints("original-1.5"), Image.new("RGB", (23, 56), (255, 0, 0)))[0])
    assert (image[:, 16:39] == (255, 0, 0)).all()
    assert (image[:, :16] == BACKGROUND).all() and (image[:, 39:] == BACKGROUND).all()


@pytest.mark.parametrize("size", [(97, 61), (31, 87), (20, 33), (56, 56), (13, 12), (300, 9), (1, 1)])
def test_pad_then_bicubic_then_normalise(checkpoints, size):
    """Padding first, in pixels of the image, then one bicubic step to the tower's side, up or down."""
    image = make_image(*size)
    side = max(size)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = BACKGROUND
    top, left = (side - size[1]) // 2, (side - size[0]) // 2
    square[top : top + size[1], left : left + size[0]] = np.asarray(image)
    expected = Image.fromarray(square).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    found = pixels(checkpoints("original-1.5"), image)[0]
    torch.testing.assert_close(found, normalised(np.asarray(expected)), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------- original, LLaVA 1.6
def test_small_image_takes_the_first_of_equal_grids(checkpoints):
    """30 x 20 fits every canvas (upscaling adds no usable pixels), so the least waste decides, and 56 x 112 and
    112 x 56 waste alike: the first listed wins. LLaVA reads it as 56 wide, Hugging Face as 56 high."""
    for name, grid in (("original-1.6", (1, 2)), ("hf-1.6-current", (2, 1))):
        model = checkpoints(name)[2]
        plan = tile_plan((30, 20), model.config)
        assert plan.grid == grid and plan.tiles == 3
    # Resized to 56 x ceil(20 * 56/30 = 37.3) = 56 x 38 in a canvas of 56 x 112: 37 black rows above and below.
    found = pixels(checkpoints("original-1.6"), Image.new("RGB", (30, 20), (200, 100, 50)))
    assert found.shape == (1, 3, 3, SIDE, SIDE)
    whole, upper, lower = (colours(tile) for tile in found[0])
    assert (whole == (200, 100, 50)).all()  # squeezed to a square, its shape ignored
    assert (upper[:37] == 0).all() and (upper[37:] == (200, 100, 50)).all()
    assert (lower[:19] == (200, 100, 50)).all() and (lower[19:] == 0).all()


def test_odd_canvas_padding_goes_below(checkpoints):
    """56 x 37 in 56 x 112: 75 rows to fill, 37 above and 38 below."""
    found = pixels(checkpoints("original-1.6"), Image.new("RGB", (56, 37), (255, 255, 255)))
    _, upper, lower = (colours(tile) for tile in found[0])
    canvas = np.concatenate([upper, lower])
    assert (canvas[37:74] == 255).all() and (canvas[:37] == 0).all() and (canvas[74:] == 0).all()


def test_crops_in_reading_order(checkpoints):
    """112 x 112 in four colours: crops are upper left, upper right, lower left, lower right, nothing resampled."""
    quarters = np.zeros((112, 112, 3), np.uint8)
    four = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]
    for number, colour in enumerate(four):
        y, x = divmod(number, 2)
        quarters[56 * y : 56 * y + 56, 56 * x : 56 * x + 56] = colour
    found = pixels(checkpoints("original-1.6"), Image.fromarray(quarters))[0]
    assert len(found) == 5
    for tile, colour in zip(found[1:], four, strict=True):
        assert (colours(tile) == colour).all()


@pytest.mark.parametrize(
    "size,grid", [((97, 61), (2, 2)), ((171, 43), (3, 1)), ((37, 167), (1, 3)), ((300, 9), (3, 1))]
)
def test_tiles_worked_out_again(checkpoints, size, grid):
    """Aspect-preserving bicubic resize rounded up, black padding, crops; the whole image squeezed into one tile."""
    image = make_image(*size)
    canvas_w, canvas_h = SIDE * grid[0], SIDE * grid[1]
    scale = min(canvas_w / size[0], canvas_h / size[1])
    wide, high = (min(int(-(-s * scale // 1)), c) for s, c in zip(size, (canvas_w, canvas_h), strict=True))
    canvas = np.zeros((canvas_h, canvas_w, 3), np.uint8)
    y, x = (canvas_h - high) // 2, (canvas_w - wide) // 2
    canvas[y : y + high, x : x + wide] = np.asarray(image.resize((wide, high), Image.Resampling.BICUBIC))
    expected = [np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC))]
    for row in range(grid[1]):
        expected += [canvas[SIDE * row : SIDE * (row + 1), SIDE * c : SIDE * (c + 1)] for c in range(grid[0])]
    found = pixels(checkpoints("original-1.6"), image)[0]
    assert found.shape[0] == len(expected)
    for mine, tile in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, normalised(tile), atol=1e-5, rtol=0)


def test_original_images_of_different_tile_counts_come_as_a_list(checkpoints):
    found = pixels(checkpoints("original-1.6"), make_image(97, 61), make_image(171, 43))
    assert isinstance(found, list) and [tuple(p.shape) for p in found] == [(5, 3, 56, 56), (4, 3, 56, 56)]


def test_grayscale_and_transparent_images_become_rgb(checkpoints):
    for name in ("original-1.5", "original-1.6"):
        for image in in_every_mode(61, 40):
            expected = pixels(checkpoints(name), image.convert("RGB"))
            assert torch.equal(pixels(checkpoints(name), image), expected)


# ------------------------------------------------------------------------------------- tiles and tokens of real sizes
def real_config(fmt: str):
    """What tile_plan reads of a LLaVA-1.6 checkpoint with 336-pixel tiles; the published list of pinpoints."""
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    if fmt == "llava_hf":
        pinpoints = [[w, h] for h, w in pinpoints]
    return types.SimpleNamespace(
        mm_tile_size=336,
        image_aspect_ratio="anyres",
        image_grid_pinpoints=pinpoints,
        mm_patch_merge_type="spatial_unpad",
        mm_checkpoint_format=fmt,
        mm_anyres="official",
    )


# image -> canvas under LLaVA's rule, canvas under FasterVLM's rule, both (width, height): methods.md 0.4
TILE_RULES = [
    ((640, 480), (672, 672), (672, 672)),
    ((640, 427), (672, 672), (672, 336)),
    ((1920, 1080), (672, 672), (672, 336)),
    ((640, 360), (672, 672), (672, 336)),
    ((336, 336), (336, 672), (672, 672)),
    ((224, 224), (336, 672), (672, 672)),
    ((300, 100), (336, 672), (1008, 336)),
]


@pytest.mark.parametrize("size,official,published", TILE_RULES)
def test_tile_rules(size, official, published):
    for rule, canvas in (("official", official), ("fastervlm", published)):
        plan = tile_plan(size, real_config("llava"), rule)
        assert plan.canvas == canvas
        assert plan.grid == (canvas[0] // 336, canvas[1] // 336)
        assert plan.tiles == 1 + (canvas[0] // 336) * (canvas[1] // 336)
        tokens = len(merge_order(plan, 24))
        assert rule == "official" or tokens == 576 * plan.tiles


def test_least_waste_decides_before_order():
    """A list that begins with the largest canvas: it holds a small image no better, and wastes more."""
    config = real_config("llava")
    config.image_grid_pinpoints = [[672, 672], [1008, 336], [672, 336], [336, 672]]
    assert tile_plan((300, 300), config).canvas == (672, 336)
    assert tile_plan((600, 600), config).canvas == (672, 672)


def test_fastervlm_tile_counts_by_aspect_ratio():
    """5 tiles up to sqrt(2), 3 up to sqrt(6), 4 beyond, whichever way the image lies."""
    for aspect, tiles in ((1, 5), (1.41, 5), (1.42, 3), (2.44, 3), (2.46, 4), (9, 4)):
        for size in ((round(1000 * aspect), 1000), (1000, round(1000 * aspect))):
            assert tile_plan(size, real_config("llava"), "fastervlm").tiles == tiles


# Tokens of the official path with 24 x 24 patches per tile: 576 + rows * columns left after unpadding + rows.
TOKEN_COUNTS = [
    ((640, 480), 576 + 36 * 48 + 36),  # 48 * 480/640 = 36 rows
    ((480, 640), 576 + 48 * 36 + 48),
    ((640, 427), 576 + 32 * 48 + 32),  # 32.03 rows
    ((672, 672), 576 + 48 * 48 + 48),
    ((1920, 1080), 576 + 28 * 48 + 28),  # 27 rows of 48: the odd one of 21 to cut stays
    ((336, 336), 576 + 24 * 24 + 24),  # 24 of 48 rows
]


@pytest.mark.parametrize("size,count", TOKEN_COUNTS)
def test_token_counts(size, count):
    for fmt in ("llava", "llava_hf"):
        plan = tile_plan(size, real_config(fmt))
        if size == (336, 336) and fmt == "llava_hf":  # Hugging Face ties to two crops side by side: 24 of 48 columns
            assert plan.grid == (2, 1)
        assert len(merge_order(plan, 24)) == count
    published = {(640, 480): 2340, (480, 640): 2352, (640, 427): 2144, (672, 672): 2928, (1920, 1080): 1948}
    assert count == published.get(size, count)


# (width, height) -> rows kept of the crops under LLaVA's and under transformers' arithmetic, 24 x 24 patches per tile.
# Exactly, the image covers `exact` rows; in floating point the product comes out a hair below.
ROUNDING = [
    ((176, 110), 15, 14, 16),  # one tile wide, 24 columns: 110 * 24/176 = 15 of 48 rows
    ((352, 110), 15, 14, 16),  # two wide: 110 * 48/352 = 15 of 24 rows
    ((176, 198), 27, 26, 28),
]


@pytest.mark.parametrize("size,exact,truncated,rounded", ROUNDING)
def test_unpadding_truncates_here_and_rounds_there(size, exact, truncated, rounded):
    """transformers rounds to seven digits before it truncates; LLaVA does not, and loses a row on each side.

    LLaVA cuts (rows - 14) // 2 = 17 (or 5) rows above and below, transformers (rows - 15) // 2 = 16 (or 4).
    """
    config = real_config("llava")
    if size == (352, 110):
        config.image_grid_pinpoints = [[672, 336]]
    else:
        config.image_grid_pinpoints = [[336, 672]]
    down, across = (1, 2) if size == (352, 110) else (2, 1)
    assert size[1] * 24 * across / size[0] == exact
    for fmt, kept in (("llava", truncated), ("llava_hf", rounded)):
        config.mm_checkpoint_format = fmt
        order = merge_order(tile_plan(size, config), 24)
        assert (24 * down - kept) % 2 == 0
        assert len(order) == 576 + kept * 24 * across + kept


def test_transformers_counts_the_same_tokens(checkpoints):
    """Over a thousand sizes, in transformers' own arithmetic for its own format."""
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(),
        tokenizer=checkpoints("hf-1.6-current")[1],
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    assert processor.image_processor.image_grid_pinpoints[0] == [336, 672]
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(10, 1500, (1000, 2), generator=generator).tolist()
    sizes += [(176, 110), (352, 110), (88, 99), (205, 656), (336, 336), (1, 1), (4000, 3), (3, 4000)]
    for width, height in sizes:
        expected = processor._get_num_multimodal_tokens([[height, width]], size={"shortest_edge": 336})
        assert (
            len(merge_order(tile_plan((width, height), real_config("llava_hf")), 24)) == expected["num_image_tokens"][0]
        )


# ------------------------------------------------------------------------------------------------------- index maps
def where_from(model, plan, tiles: int):
    """Features that say (tile, row, column), saliency that numbers the patches, through the model's merging code."""
    side, width = TILE_PATCHES, model.config.hidden_size
    t, r, c = torch.meshgrid(torch.arange(tiles), torch.arange(side), torch.arange(side), indexing="ij")
    features = torch.zeros(tiles, side * side, width)
    for channel, value in enumerate((t, r, c)):
        features[:, :, channel] = value.reshape(tiles, -1).float()
    saliency = torch.arange(tiles * side * side, dtype=torch.float32).view(tiles, -1)
    return features, model.image_tokens(features, saliency, plan)


def loops(grid, top=0, bottom=None, left=0, right=None, newline=True):
    """The order of the official path, written with loops: (tile, row, column), or None for a newline token."""
    across, down = grid
    side = TILE_PATCHES
    order = [(0, r, c) for r in range(side) for c in range(side)]
    for y in range(top, down * side if bottom is None else bottom):
        for x in range(left, across * side if right is None else right):
            order.append((1 + (y // side) * across + x // side, y % side, x % side))
        if newline:
            order.append(None)
    return order


def assert_order(model, tokens, expected):
    newline = getattr(model.model, "image_newline", None)
    assert len(tokens.features) == len(expected)
    ended = 0
    for i, place in enumerate(expected):
        if place is None:
            assert torch.equal(tokens.features[i], newline.detach())
            assert (tokens.tile[i], tokens.row[i], tokens.column[i]) == (-1, ended, -1)
            assert torch.isnan(tokens.saliency[i])
            ended += 1
        else:
            assert tuple(tokens.features[i, :3].int().tolist()) == place
            assert (tokens.tile[i], tokens.row[i], tokens.column[i]) == place
            tile, row, column = place
            assert tokens.saliency[i] == tile * TILE_PATCHES**2 + row * TILE_PATCHES + column


# (width, height) -> grid (across, down) and (top, bottom, left, right) of what unpadding leaves; 4 x 4 patches per tile.
# The comment has the patches that the image covers across the padding, whole ones counted; (free - covered) // 2 are cut.
UNPADDED = [
    ((55, 107), (1, 2), (0, 8, 0, 4)),  # 107 * 4/55 = 7.8 of 8 rows
    ((56, 70), (1, 2), (1, 7, 0, 4)),  # 70 * 4/56 = 5 of 8 rows
    ((109, 55), (2, 1), (0, 4, 0, 8)),  # 109 * 4/55 = 7.9 of 8 columns
    ((103, 97), (2, 2), (0, 8, 0, 8)),  # 97 * 8/103 = 7.5 of 8 rows
    ((110, 70), (2, 2), (1, 7, 0, 8)),  # 70 * 8/110 = 5.1 of 8 rows
    ((70, 110), (2, 2), (0, 8, 1, 7)),  # the same, upright
    ((171, 43), (3, 1), (0, 4, 0, 12)),  # 43 * 12/171 = 3.02 of 4 rows
    ((300, 50), (3, 1), (1, 3, 0, 12)),  # 50 * 12/300 = 2 of 4 rows
    ((37, 167), (1, 3), (0, 12, 1, 3)),  # 37 * 12/167 = 2.7 of 4 columns
    ((900, 10), (3, 1), (2, 2, 0, 12)),  # 10 * 12/900 = 0.1 of 4 rows: nothing is left but the whole image
]


@pytest.mark.parametrize("size,grid,bounds", UNPADDED)
@pytest.mark.parametrize("name", ["original-1.6", "hf-1.6-current"])
def test_index_map_of_the_official_path(checkpoints, name, size, grid, bounds):
    model = checkpoints(name)[2]
    plan = tile_plan(size, model.config)
    assert plan.grid == grid
    _, tokens = where_from(model, plan, plan.tiles)
    assert_order(model, tokens, loops(grid, *bounds))


@pytest.mark.parametrize("size", [size for size, _, _ in UNPADDED] + [(188, 47), (47, 188), (1, 1), (113, 112)])
def test_index_map_is_transformers_packing(checkpoints, size):
    """The same features through LlavaNextModel.pack_image_features."""
    _, _, model, _, reference = checkpoints("hf-1.6-current")
    plan = tile_plan(size, model.config)
    features, tokens = where_from(model, plan, plan.tiles)
    expected, lengths = reference.pack_image_features(
        [features],
        torch.tensor([[size[1], size[0]]]),
        vision_feature_select_strategy="default",
        image_newline=reference.model.image_newline,
    )
    assert lengths.tolist() == [len(tokens.features)]
    assert torch.equal(tokens.features, expected[0])


def test_tiny_tiles_show_both_roundings(checkpoints):
    """188 x 47 covers 47 * 12/188 = 3 of 4 rows; LLaVA's product is a hair below and truncates to 2, cutting one."""
    for name, rows in (("original-1.6", (1, 3)), ("hf-1.6-current", (0, 4))):
        model = checkpoints(name)[2]
        plan = tile_plan((188, 47), model.config)
        _, tokens = where_from(model, plan, plan.tiles)
        assert_order(model, tokens, loops((3, 1), *rows))


@pytest.mark.parametrize("grid", [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)])
@pytest.mark.parametrize("name", ["original-1.6", "hf-1.6-current"])
def test_index_map_of_the_published_path(checkpoints, name, grid):
    """FasterVLM's path: no unpadding, no newline token, index 16 + (4 tr + r) * 4 gw + 4 tc + c for crop (tr, tc)."""
    model = checkpoints(name)[2]
    across, down = grid
    plan = tile_plan((across * 90, down * 90 - 1), model.config, "fastervlm")
    assert plan.grid == grid
    _, tokens = where_from(model, plan, plan.tiles)
    assert_order(model, tokens, loops(grid, newline=False))
    side = TILE_PATCHES
    for i in range(side**2, len(tokens.tile)):
        crop, r, c = int(tokens.tile[i]) - 1, int(tokens.row[i]), int(tokens.column[i])
        tr, tc = divmod(crop, across)
        assert i == side**2 + (side * tr + r) * side * across + side * tc + c


def test_other_merge_types(checkpoints):
    """`flat`: tile after tile. `spatial`: crops as one raster, without unpadding and newline tokens."""
    model = checkpoints("original-1.6")[2]
    for merge, expected in (
        ("flat", [(t, r, c) for t in range(5) for r in range(4) for c in range(4)]),
        ("spatial", loops((2, 2), newline=False)),
    ):
        config = types.SimpleNamespace(**{k: getattr(model.config, k) for k in vars(real_config("llava"))})
        config.mm_patch_merge_type = merge
        _, tokens = where_from(model, tile_plan((110, 70), config), 5)
        assert_order(model, tokens, expected)


def test_an_image_left_whole_ends_with_a_newline_token(checkpoints):
    """One tile under `spatial_unpad`: both originals add one newline token."""
    for name in ("original-1.6", "hf-1.6-current"):
        model = checkpoints(name)[2]
        _, tokens = where_from(model, tile_plan((56, 56), model.config), 1)
        assert_order(model, tokens, [(0, r, c) for r in range(4) for c in range(4)] + [None])
    model = checkpoints("original-1.5")[2]
    _, tokens = where_from(model, tile_plan((97, 61), model.config), 1)
    assert_order(model, tokens, [(0, r, c) for r in range(4) for c in range(4)])


def test_the_published_path_of_a_checkpoint(checkpoints):
    """options.anyres = "fastervlm" changes pixels and tokens together, in either format."""
    from llava.config import AdaVConfig

    for name in ("original-1.6", "hf-1.6-current"):
        _, tokenizer, model, processor, _ = checkpoints(name)
        image = make_image(30, 20)  # 3 tiles by either official rule; aspect 1.5 lies nearest to 2 x 1
        found = process_images([image], processor, model.config, anyres="fastervlm")
        assert found.shape == (1, 3, 3, SIDE, SIDE)
        wide = process_images([make_image(40, 40)], processor, model.config, anyres="fastervlm")
        assert wide.shape == (1, 5, 3, SIDE, SIDE)
        config = AdaVConfig(method="none", options={"anyres": "fastervlm"})
        ids = tokenizer_image_token("<image>\nYes?", tokenizer, return_tensors="pt")
        prepared = model.prepare(ids, wide, [(40, 40)], config=config)
        assert prepared.image_spans[0] == [(1, 5 * 16)] and (prepared.selections[0][0].tile >= 0).all()

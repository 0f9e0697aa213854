"""`method: none` is transformers' own model: same weights, same pixels, same logits, same greedy tokens.

The reference is LlavaForConditionalGeneration (1.5) or LlavaNextForConditionalGeneration (1.6), built by
tiny_checkpoints and never loaded by our code. A `llava-hf` checkpoint is compared end to end: transformers' processor
makes the reference's pixels. An original one has no transformers processor, so both models see our pixels, and
only image sizes on which both unpadding rules agree; test_preprocessing.py works the others out by hand.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from tiny_checkpoints import QUESTIONS, make_image
from transformers import CLIPImageProcessorPil, LlavaNextImageProcessorPil
from transformers.image_processing_utils import select_best_resolution

from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import left_pad, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

LOGIT_TOLERANCE = 1e-4
NEW_TOKENS = 24
GREEDY = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}

# (width, height) for a tile of 56: one size per grid, in the order of tiny_checkpoints.GRIDS read as (wide, high).
GRID_SIZES = {(1, 2): (55, 107), (2, 1): (109, 55), (2, 2): (103, 97), (3, 1): (171, 43), (1, 3): (37, 167)}
# Odd, prime, smaller than a tile, square, and as thin as a line: (width, height).
ODD_SIZES = [(97, 61), (31, 87), (20, 33), (33, 20), (56, 56), (13, 13), (113, 112), (300, 9), (9, 300), (151, 149)]


@dataclass
class Pair:
    """Our model, loaded from files, beside the transformers model that the files were written from."""

    tokenizer: object
    model: torch.nn.Module
    image_processor: object
    reference: torch.nn.Module
    hf_processor: object  # transformers' own image processor; None for the original format

    @property
    def anyres(self) -> bool:
        return self.reference.config.model_type == "llava_next"

    def ours(self, rows):
        """rows: (prompt, images) each -> what our model takes for that batch, left-padded."""
        images = [image for _, of_row in rows for image in of_row]
        ids = [tokenizer_image_token(prompt, self.tokenizer, return_tensors="pt") for prompt, _ in rows]
        ids, mask = left_pad(ids, self.reference.config.pad_token_id)
        batch = {"input_ids": ids, "attention_mask": mask}
        if images:
            batch["images"] = process_images(images, self.image_processor, self.model.config)
            batch["image_sizes"] = [image.size for image in images]
        return batch

    def theirs(self, rows, ours):
        """The same batch as transformers takes it: one <image> id per image token, pixels padded to one shape."""
        images = [image for _, of_row in rows for image in of_row]
        batch = {}
        if images:
            if self.hf_processor is not None:
                batch["pixel_values"] = self.hf_processor(images, return_tensors="pt")["pixel_values"]
            else:
                batch["pixel_values"] = _same_tile_count(ours["images"])
            if self.anyres:
                batch["image_sizes"] = torch.tensor([(image.height, image.width) for image in images])
            with torch.no_grad():
                features = self.reference.get_image_features(**batch, return_dict=True).pooler_output
            counts = iter([len(f) for f in features])
        image_id = self.reference.config.image_token_index
        ids = [row[keep.bool()].tolist() for row, keep in zip(ours["input_ids"], ours["attention_mask"], strict=True)]
        spliced = []
        for row in ids:
            assert image_id not in row
            pieces = [[image_id] * next(counts) if i == IMAGE_TOKEN_INDEX else [i] for i in row]
            spliced.append(torch.tensor([i for piece in pieces for i in piece]))
        input_ids, mask = left_pad(spliced, self.reference.config.pad_token_id)
        return batch | {"input_ids": input_ids, "attention_mask": mask}

    def check_logits(self, rows):
        ours = self.ours(rows)
        theirs = self.theirs(rows, ours)
        with torch.no_grad():
            found = self.model(**ours).logits
            expected = self.reference(**theirs).logits
        assert found.shape == expected.shape
        real = theirs["attention_mask"].bool()
        assert expected[real].std() > 0.5, "logits too flat for an absolute tolerance to mean anything"
        torch.testing.assert_close(found[real], expected[real], atol=LOGIT_TOLERANCE, rtol=0)
        return found

    def greedy(self, batch, **kwargs):
        return self.model.generate(**batch, **(GREEDY | kwargs))

    def check_greedy(self, rows, **kwargs):
        ours = self.ours(rows)
        found = self.greedy(ours, **kwargs)
        theirs = self.theirs(rows, ours)
        kwargs = GREEDY | kwargs
        expected = self.reference.generate(**theirs, **kwargs)[:, theirs["input_ids"].shape[1] :]
        assert found.tolist() == expected.tolist()
        return found


def _same_tile_count(pixels):
    """[n, tiles, 3, H, W] padded with empty tiles, as transformers' processor does; a 4-D tensor as it is."""
    if isinstance(pixels, torch.Tensor):
        return pixels
    most = max(p.shape[0] for p in pixels)
    return torch.stack([torch.cat([p, p.new_zeros((most - p.shape[0], *p.shape[1:]))]) for p in pixels])


def _hf_pair(folder: Path, layout: str, **build) -> Pair:
    reference = tiny.build_reference(**build)
    tiny.save_llava_hf(reference, folder, layout)
    tokenizer, model, image_processor, _ = load_pretrained_model(str(folder), device_map="cpu")
    processor = LlavaNextImageProcessorPil if build["kind"] == "llava_next" else CLIPImageProcessorPil
    return Pair(tokenizer, model, image_processor, reference, processor.from_pretrained(folder))


def _original_pair(folder: Path, weights: str, **build) -> Pair:
    reference = tiny.build_reference(**build)
    tower_model = reference
    if build["kind"] == "llava_next":
        # LLaVA 1.6 trained its tower further: the named one must not win over the checkpoint's own weights.
        tower_model = tiny.build_reference(**(build | {"seed": 99}))
    tower = tiny.save_clip_tower(tower_model, folder / "tower")
    tiny.save_original(reference, folder / "llava", tower, weights)
    tokenizer, model, image_processor, _ = load_pretrained_model(folder / "llava", device_map="cpu")
    return Pair(tokenizer, model, image_processor, reference, None)


PAIRS = {
    "hf-1.5-llama-current": lambda d: _hf_pair(d, "current", kind="llava"),
    "hf-1.5-llama-published": lambda d: _hf_pair(d, "published", kind="llava", seed=1),
    "hf-1.6-llama-current": lambda d: _hf_pair(d, "current", kind="llava_next", seed=2),
    "hf-1.6-mistral-published": lambda d: _hf_pair(d, "published", kind="llava_next", text="mistral", seed=3),
    "original-1.5-llama": lambda d: _original_pair(d, "sharded_bin", kind="llava", seed=4),
    "original-1.6-llama": lambda d: _original_pair(d, "sharded_safetensors", kind="llava_next", seed=5),
    "original-1.6-mistral": lambda d: _original_pair(d, "bin", kind="llava_next", text="mistral", seed=6),
}
ANYRES_PAIRS = [name for name in PAIRS if "1.6" in name]
BATCH_PAIRS = [name for name in PAIRS if name != "hf-1.5-llama-published"]  # the same model in another file layout


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Name -> Pair, built when first asked for."""
    built = {}

    def get(name: str) -> Pair:
        if name not in built:
            built[name] = PAIRS[name](tmp_path_factory.mktemp(name))
        return built[name]

    return get


def prompt(question: str, images: int = 1) -> str:
    system = "A chat between a curious user and an artificial intelligence assistant."
    return f"{system} USER: {'<image>' * images}\n{question} ASSISTANT:"


def agreed(sizes):
    """Those (width, height) for which LLaVA's truncation and transformers' rounding unpad alike.

    Worked with the two formulas, not with our code; at least three quarters must be left.
    """
    side = tiny.SIDE // tiny.PATCH

    def covered(width, height, grid):
        rows, columns = side * grid[0], side * grid[1]
        return height * (columns / width) if width / height > columns / rows else width * (rows / height)

    lengths = {size: [covered(*size, grid) for grid in tiny.GRIDS] for size in sizes}
    kept = [size for size in sizes if all(int(x) == int(round(x, 7)) for x in lengths[size])]
    assert len(kept) >= 0.75 * len(sizes)
    return kept


# ------------------------------------------------------------------------------------------------------- batch 1
@pytest.mark.parametrize("name", PAIRS)
def test_one_image(pairs, name):
    rows = [(prompt(QUESTIONS[0]), [make_image(97, 61)])]
    logits = pairs(name).check_logits(rows)
    tokens = pairs(name).check_greedy(rows)
    assert tokens.shape == (1, NEW_TOKENS) and len(set(tokens[0].tolist())) > 3
    # The comparison would also pass if neither model looked at its image: another image must change the logits.
    other = pairs(name).check_logits([(prompt(QUESTIONS[0]), [make_image(97, 61, seed=1)])])
    assert (logits[0, -1] - other[0, -1]).abs().max() > 0.01


@pytest.mark.parametrize("name", ANYRES_PAIRS)
def test_all_five_grids(pairs, name):
    pair = pairs(name)
    assert agreed(GRID_SIZES.values()) == list(GRID_SIZES.values())
    for (across, down), size in GRID_SIZES.items():
        canvas = select_best_resolution((size[1], size[0]), pair.reference.config.image_grid_pinpoints)
        assert canvas == (tiny.SIDE * down, tiny.SIDE * across)
        rows = [(prompt(QUESTIONS[1]), [make_image(*size)])]
        assert len(pair.ours(rows)["images"][0]) == 1 + across * down
        pair.check_logits(rows)
        pair.check_greedy(rows, max_new_tokens=20, min_new_tokens=20)


@pytest.mark.parametrize("name", PAIRS)
def test_odd_sizes(pairs, name):
    pair = pairs(name)
    for size in agreed(ODD_SIZES) if name in ANYRES_PAIRS and "original" in name else ODD_SIZES:
        pair.check_logits([(prompt(QUESTIONS[2]), [make_image(*size)])])


def test_many_random_sizes(pairs):
    """transformers' rounding, on sizes that nobody picked: hf follows it everywhere."""
    pair = pairs("hf-1.6-llama-current")
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(7, 190, (24, 2), generator=generator).tolist()
    for width, height in sizes:
        pair.check_logits([("<image>\nYes?", [make_image(width, height)])])


@pytest.mark.parametrize("name", ["hf-1.5-llama-published", "original-1.6-mistral"])
def test_image_at_either_end_of_the_prompt(pairs, name):
    image = make_image(61, 107)
    pairs(name).check_logits([("<image>\nWhat colour is it?", [image])])
    pairs(name).check_greedy([("What colour is <image>", [image])])


# ------------------------------------------------------------------------------------------------------- batches
@pytest.mark.parametrize("name", BATCH_PAIRS)
def test_left_padded_batch_of_three(pairs, name):
    """Three prompts and three image sizes of different lengths; and each row is what it is alone."""
    pair = pairs(name)
    sizes = [(61, 107), (171, 43), (97, 61)]
    rows = [(prompt(q), [make_image(*s)]) for q, s in zip(QUESTIONS, sizes, strict=True)]
    assert len({len(pair.tokenizer(text).input_ids) for text, _ in rows}) == 3
    together = pair.check_logits(rows)
    tokens = pair.check_greedy(rows)
    for i, row in enumerate(rows):
        with torch.no_grad():
            alone = pair.model(**pair.ours([row])).logits[0]
        torch.testing.assert_close(together[i, -len(alone) :], alone, atol=LOGIT_TOLERANCE, rtol=0)
        assert pair.greedy(pair.ours([row]))[0].tolist() == tokens[i].tolist()


@pytest.mark.parametrize("name", BATCH_PAIRS)
def test_several_images_and_rows_without_any(pairs, name):
    """`images` is flat and consumed in reading order: 2 images, none, 1, 3."""
    pair = pairs(name)
    images = [make_image(*size, seed=i) for i, size in enumerate([(97, 61), (61, 107), (171, 43), (31, 87), (103, 97)])]
    rows = [
        ("USER: <image>\nand <image>\nWhat colour is the shape? ASSISTANT:", images[:2]),
        ("USER: How many digits? ASSISTANT:", []),
        (prompt(QUESTIONS[1]), images[2:3]),
        (prompt(QUESTIONS[2], images=3), [images[3], images[4], images[0]]),
    ]
    pair.check_logits(rows)
    pair.check_greedy(rows)


@pytest.mark.parametrize("name", ["hf-1.6-mistral-published", "original-1.6-llama"])
def test_pixels_padded_to_one_tile_count(pairs, name):
    """transformers' processor pads a batch to its largest number of tiles; our model takes such a tensor as well."""
    pair = pairs(name)
    rows = [(prompt(q), [make_image(*s)]) for q, s in zip(QUESTIONS, [(55, 107), (171, 43), (97, 61)], strict=True)]
    ours = pair.ours(rows)
    assert isinstance(ours["images"], list)
    padded = ours | {"images": _same_tile_count(ours["images"])}
    with torch.no_grad():
        assert torch.equal(pair.model(**padded).logits, pair.model(**ours).logits)


def test_rows_that_end_at_different_times(pairs):
    """A row that is done gives pad tokens, and its neighbours go on undisturbed."""
    pair = pairs("hf-1.6-llama-current")
    rows = [(prompt(q), [make_image(97, 61, seed=i)]) for i, q in enumerate(QUESTIONS)]
    free = pair.check_greedy(rows).tolist()
    stop = next(token for token in free[0][2:] if token not in free[1][:6] + free[0][:2])
    done = pair.check_greedy(rows, eos_token_id=stop, min_new_tokens=None).tolist()
    assert done != free and len({row.index(stop) if stop in row else NEW_TOKENS for row in done}) > 1


# ------------------------------------------------------------------------------------------------------- text only
@pytest.mark.parametrize("name", ["hf-1.5-llama-current", "hf-1.6-mistral-published", "original-1.6-llama"])
def test_text_only_is_the_plain_language_model(pairs, name):
    pair = pairs(name)
    plain = tiny.plain_llm(pair.reference)
    rows = [(question, []) for question in QUESTIONS]
    ours = pair.ours(rows)
    with torch.no_grad():
        found, expected = pair.model(**ours).logits, plain(**ours).logits
    real = ours["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], atol=LOGIT_TOLERANCE, rtol=0)
    tokens = pair.greedy(ours)
    assert tokens.tolist() == plain.generate(**ours, **GREEDY)[:, ours["input_ids"].shape[1] :].tolist()
    # One row as tokenizer_image_token gives it: one dimension, no mask.
    row = tokenizer_image_token(QUESTIONS[0], pair.tokenizer, return_tensors="pt")
    assert pair.model.generate(row, **GREEDY)[0].tolist() == tokens[0].tolist()


# ------------------------------------------------------------------------------------------------ other checkpoints
VARIANTS = {
    "grouped heads": {"num_key_value_heads": 1},
    "sliding window shorter than the prompt": {"text": "mistral", "sliding_window": 24},
    "another rope base": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "tied embeddings": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 20},
    "deeper tower, exact GELU": {"vision": {"num_hidden_layers": 5, "hidden_act": "gelu"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_the_architecture(tmp_path, variant):
    pair = _hf_pair(tmp_path, "current", kind="llava_next", seed=8, **VARIANTS[variant])
    rows = [(prompt(QUESTIONS[0]), [make_image(97, 61)]), (prompt(QUESTIONS[2]), [make_image(37, 167)])]
    pair.check_logits(rows)
    pair.check_greedy(rows)


def test_runtime_names(tmp_path):
    """Weights saved under the names that the modules have in memory load as well."""
    pair = _hf_pair(tmp_path, "runtime", kind="llava_next", seed=9)
    pair.check_logits([(prompt(QUESTIONS[0]), [make_image(97, 61)])])


# ------------------------------------------------------------------------------------------- a recorded reference
def test_recorded_logits_of_another_code_base():
    """Logits recorded from a transformers 4.39 fork: prefill, then 24 forced tokens, one by one through the cache."""
    folder = Path(__file__).parents[1] / "data" / "avl_public"
    cases = np.load(folder / "cases.npz")
    assert json.loads(str(cases["plain_settings"])) == {}
    tokenizer, model, image_processor, _ = load_pretrained_model(folder, device_map="cpu")
    assert tokenizer is None and image_processor is None
    ids = torch.from_numpy(cases["input_ids"])
    assert (ids == 4).sum() == 1
    ids = ids.masked_fill(ids == 4, IMAGE_TOKEN_INDEX)
    images = torch.from_numpy(cases["pixel_values"])
    prepared = model.prepare(ids, images)
    assert prepared.inputs_embeds.shape[1] == 33 - 1 + 64
    logits = []
    with torch.no_grad():
        out = model(
            inputs_embeds=prepared.inputs_embeds,
            attention_mask=prepared.attention_mask,
            position_ids=prepared.position_ids,
            use_cache=True,
        )
        for token in cases["forced"].tolist():
            logits.append(out.logits[0, -1])
            out = model(input_ids=torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.stack(logits), torch.from_numpy(cases["plain_logits"]), atol=1e-4, rtol=0)
    assert out.past_key_values.get_seq_length() == cases["plain_cache"][0] == 33 - 1 + 64 + 24

"""CDPruner's relevance in CLIP's joint space: the text tower beside a model, against transformers' own CLIP."""

import pytest
import torch
from tiny_checkpoints import VOCABULARY_TEXT, build_reference, make_image, randomise, save_llava_hf
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import left_pad, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.multimodal_encoder.clip_text_tower import ClipTextTower

CONTEXT = 8
SIZES = [(40, 30), (100, 50), (31, 90), (57, 57)]
QUESTIONS = [
    "<image> What colour is the shape on the left?",
    "<image>",
    "<image> Yes? " + "two red circle " * 5,
    "left <image> blue star",
]


def save_clip(folder, width=32, eos=None):
    """A random CLIP with a vision tower of `width`, a word tokenizer, and begin and end tokens at the end of the
    vocabulary, as in OpenAI's. eos: what config.json says of the end token, if not the truth."""
    words = dict.fromkeys(word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(VOCABULARY_TEXT.lower()))
    vocab = {word: number for number, word in enumerate(["<unk>", *words, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    common = {"intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1 if eos is None else eos}
    text = {"vocab_size": len(vocab), "hidden_size": 20, "max_position_embeddings": CONTEXT, **common, **ids}
    vision = {"hidden_size": width, "image_size": 56, "patch_size": 14, **common}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)).eval()
    randomise(clip, 7)
    clip.save_pretrained(folder)
    return clip


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def loaded(request, tmp_path_factory):
    """A LLaVA that was loaded with the text tower of `clip`."""
    folder, beside = tmp_path_factory.mktemp(request.param), tmp_path_factory.mktemp("clip")
    save_llava_hf(build_reference(request.param), folder)
    clip = save_clip(beside)
    config = setting(beside)
    tokenizer, model, processor, _ = load_pretrained_model(folder, config=config, device_map="cpu")
    return tokenizer, model, processor, clip, beside


def setting(folder, tokens=6, **options):
    return AdaVConfig(method="cdpruner", overall_tokens=tokens, options={"text_tower": str(folder), **options})


def naive_cosine(clip, tokenizer, hidden, question):
    """[T, P] by transformers' whole CLIP, part by part."""
    ids = tokenizer(question, add_special_tokens=False).input_ids
    parts = [ids[start : start + CONTEXT - 2] for start in range(0, len(ids), CONTEXT - 2)]
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    values = []
    with torch.no_grad():
        patches = clip.visual_projection(clip.vision_model.post_layernorm(hidden))
        for part in parts:
            text = clip.text_projection(clip.text_model(torch.tensor([[begin, *part, end]])).pooler_output)
            values.append(torch.cosine_similarity(patches, text[0], dim=-1))
    return torch.stack(values).mean(0), len(parts)


@pytest.mark.parametrize("eos", [None, 2], ids=["eos as it is", "eos as OpenAI's old files say"])
def test_cosine_is_that_of_the_whole_clip(loaded, tmp_path, eos):
    _, model, _, _, _ = loaded
    clip = save_clip(tmp_path, eos=eos)
    tower = ClipTextTower.load(str(tmp_path), model.get_vision_tower())
    assert not any("encoder" in name and "vision" in name for name, _ in tower.clip.named_parameters())
    hidden = torch.randn(3, 16, 32)
    for question, parts in (("yes", 1), ("what colour is the shape on the left ?", 2), ("two red circle " * 6, 3)):
        want, count = naive_cosine(clip, tower.tokenizer, hidden, question)
        assert count == parts
        torch.testing.assert_close(tower.cosine(hidden, question), want)
    assert torch.equal(tower.cosine(hidden.half(), ""), torch.zeros(3, 16))


def test_relevance_through_the_model(loaded):
    tokenizer, model, processor, clip, folder = loaded
    image = make_image(*SIZES[1])
    pixels = process_images([image], processor, model.config)
    ids = torch.tensor([tokenizer_image_token(QUESTIONS[0].lower(), tokenizer)])
    kept = model.prepare(ids, pixels, [image.size]).selections[0][0]
    assert len(kept.indices) == 6
    after = ids[0, ids[0].tolist().index(IMAGE_TOKEN_INDEX) + 1 :]
    tiles = pixels[0] if pixels[0].dim() == 4 else pixels[0][None]
    with torch.no_grad():
        hidden = model.get_vision_tower()(tiles, ("hidden",))[2]["hidden"][:, 1:]
    question = tokenizer.decode(after, skip_special_tokens=True)
    assert "left" in question
    relevance = -naive_cosine(clip, model.text_tower(str(folder)).tokenizer, hidden, question)[0]
    everything = model.prepare(ids, pixels, [image.size], config=AdaVConfig(method="none")).selections[0][0]
    patch = everything.tile >= 0
    tile, row, column = (getattr(everything, name)[patch] for name in ("tile", "row", "column"))
    relevance = relevance[tile, row * 4 + column]
    want = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    torch.testing.assert_close(kept.report["relevance"], want, rtol=0, atol=1e-5)


def test_batch_of_four_is_four_batches_of_one(loaded):
    tokenizer, model, processor, _, folder = loaded
    images = [make_image(*size, seed=i) for i, size in enumerate(SIZES)]
    pixels = list(process_images(images, processor, model.config))
    prompts = [torch.tensor(tokenizer_image_token(question, tokenizer)) for question in QUESTIONS]
    ids, mask = left_pad(prompts, 3)
    together = model.prepare(ids, pixels, SIZES, mask).selections
    by_embeddings = model.prepare(ids, pixels, SIZES, mask, config=setting(folder, relevance="embeddings")).selections
    for i, prompt in enumerate(prompts):
        alone = model.prepare(prompt[None], pixels[i : i + 1], SIZES[i : i + 1]).selections[0][0]
        assert torch.equal(alone.indices, together[i][0].indices)
        torch.testing.assert_close(alone.report["relevance"], together[i][0].report["relevance"])
        no_question = len(tokenizer(QUESTIONS[i].split("<image>")[1], add_special_tokens=False).input_ids) == 0
        assert no_question == bool((alone.report["relevance"] == 1).all())
        assert no_question == torch.equal(alone.report["relevance"], by_embeddings[i][0].report["relevance"])


def test_the_tower_is_loaded_once_and_is_no_part_of_the_model(loaded, monkeypatch):
    tokenizer, model, processor, _, folder = loaded
    calls = []
    load = ClipTextTower.load
    monkeypatch.setattr(ClipTextTower, "load", lambda *args: calls.append(args) or load(*args))
    image = make_image(*SIZES[0])
    pixels = process_images([image], processor, model.config)
    ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, 6, 7]])
    for config in (None, setting(folder, 3), AdaVConfig(method="cls")):
        model.prepare(ids, pixels, [image.size], config=config)
    assert calls == []
    assert not any("text_tower" in name for name in model.state_dict())


def test_what_cannot_be_read_is_a_sentence(loaded, tmp_path):
    _, model, _, _, _ = loaded
    with pytest.raises(UserError, match="no such folder"):
        ClipTextTower.load(str(tmp_path / "nowhere" / "clip"), model.get_vision_tower())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="cannot be loaded"):
        ClipTextTower.load(str(tmp_path / "empty"), model.get_vision_tower())
    save_clip(tmp_path / "wide", width=48)
    with pytest.raises(UserError, match="48, allowed is that of the vision tower, 32"):
        ClipTextTower.load(str(tmp_path / "wide"), model.get_vision_tower())


def test_a_checkpoint_without_tokenizer_has_no_question_to_read(loaded, tmp_path, monkeypatch):
    _, model, _, _, folder = loaded
    monkeypatch.setattr(model, "question_words", None)
    with pytest.raises(UserError, match="text_tower.*no tokenizer"):
        model.text_tower(str(folder))


def test_original_positions_are_refused_for_made_tokens_before_anything_is_loaded(tmp_path):
    config = AdaVConfig(method="visionzip", options={"positions": "original"})
    with pytest.raises(UserError, match='"original", but method "visionzip" makes tokens'):
        load_pretrained_model(tmp_path, config=config)

"""A tiny CLIP with its text tower, for tests of methods that read the question with it."""

from __future__ import annotations

from tiny_checkpoints import VOCABULARY_TEXT, randomise
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

CONTEXT = 8


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

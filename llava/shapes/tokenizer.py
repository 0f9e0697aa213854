"""The word-level tokenizer of the demo checkpoints, saved as the files that transformers' AutoTokenizer reads."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from llava.shapes.vocabulary import all_words

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
MAX_LENGTH = 2048


def vocabulary():
    """Word -> id. The four special tokens come first, then all words of the demo."""
    # The shipped checkpoints depend on this order.
    return {word: number for number, word in enumerate((*SPECIAL, *all_words()))}


def build_tokenizer():
    """A `tokenizers.Tokenizer` for lower case, which puts `<s>` in front.

    Each word, punctuation mark, digit and line feed is one token.
    """
    vocab = vocabulary()
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # The line feed is a token of LLaVA's prompt, so it is split off before other white space is removed.
            pre_tokenizers.Split(Regex(r"\n"), behavior="isolated"),
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), behavior="removed"),
            pre_tokenizers.Punctuation(behavior="isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def save_tokenizer(folder):
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json into `folder`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": MAX_LENGTH,
        # True would join "'" and "?" to the words before them when an answer is decoded.
        "clean_up_tokenization_spaces": False,
        "add_bos_token": True,
        **names,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")


def is_demo_vocabulary(tokenizer) -> bool:
    """True if a checkpoint's tokenizer has exactly the words of the demo."""
    return set(tokenizer.get_vocab()) == set(vocabulary())

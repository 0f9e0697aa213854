"""Prompts: the templates letter by letter, which one a checkpoint gets, and what tokenisation makes of <image>.

The strings are LLaVA's protocol; they are written out here in full, so that a change to a template shows.
"""

import types

import pytest
import tiny_checkpoints as tiny
import torch
from transformers import AutoTokenizer

from llava.common.errors import UserError
from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, conv_templates, default_conv_mode, get_conversation, single_turn
from llava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, left_pad, tokenizer_image_token

QUESTION = "<image>\nWhat colour is the shape?"
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
)
FIRST_TURN = {
    "vicuna_v1": VICUNA + "USER: <image>\nWhat colour is the shape? ASSISTANT:",
    "chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\n"
    "What colour is the shape?<|im_end|><|im_start|>assistant\n",
    "mistral_instruct": "[INST] <image>\nWhat colour is the shape? [/INST]",
    "plain": "<image>\nWhat colour is the shape?\n",
}
SECOND_TURN = {
    "vicuna_v1": VICUNA + "USER: <image>\nWhat colour is the shape? ASSISTANT: red</s>USER: Yes? ASSISTANT:",
    "chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\n"
    "What colour is the shape?<|im_end|><|im_start|>assistant\nred<|im_end|><|im_start|>user\nYes?<|im_end|>"
    "<|im_start|>assistant\n",
    "mistral_instruct": "[INST] <image>\nWhat colour is the shape? [/INST] red </s>[INST] Yes? [/INST]",
}


def test_the_four_templates_are_there():
    assert set(FIRST_TURN) <= set(conv_templates)


@pytest.mark.parametrize("name", FIRST_TURN)
def test_first_turn(name):
    """As LLaVA's own scripts build it."""
    conversation = conv_templates[name].copy()
    conversation.append_message(conversation.roles[0], QUESTION)
    conversation.append_message(conversation.roles[1], None)
    assert conversation.get_prompt() == FIRST_TURN[name] == single_turn(name, QUESTION)
    assert conv_templates[name].messages == [], "a copy's messages must not reach the template"


def test_llavas_other_names_of_vicunas_template():
    """llava_v1 is its own template: it speaks of a human, not of a user."""
    assert single_turn("v1", QUESTION) == FIRST_TURN["vicuna_v1"]
    assert single_turn("llava_v1", QUESTION) == (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the human's questions. USER: <image>\nWhat colour is the shape? ASSISTANT:"
    )


@pytest.mark.parametrize(
    "name, style, stop",
    [
        ("v1", "TWO", "</s>"),
        ("llava_v1", "TWO", "</s>"),
        ("chatml_direct", "MPT", "<|im_end|>"),
        ("mistral_instruct", "LLAMA_2", ""),
        ("plain", "PLAIN", "\n"),
    ],
)
def test_separators_as_llavas_scripts_ask_for_them(name, style, stop):
    conversation = conv_templates[name].copy()
    assert conversation.sep_style == SeparatorStyle[style]
    two = conversation.sep_style == SeparatorStyle.TWO
    assert (conversation.sep2 if two else conversation.sep) == stop


@pytest.mark.parametrize("name", SECOND_TURN)
def test_second_turn(name):
    conversation = get_conversation(name)
    for role, message in zip((0, 1, 0, 1), (QUESTION, "red", "Yes?", None), strict=True):
        conversation.append_message(conversation.roles[role], message)
    assert conversation.get_prompt() == SECOND_TURN[name]


def test_stop_strings():
    assert conv_templates["vicuna_v1"].stop == conv_templates["mistral_instruct"].stop == "</s>"
    assert conv_templates["chatml_direct"].stop == "<|im_end|>"


def test_unknown_template():
    with pytest.raises(UserError, match='"llama_4".*vicuna_v1'):
        get_conversation("llama_4")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny.write_word_tokenizer(folder / "words")
    tiny.write_word_tokenizer(folder / "chatml", chatml=True)
    tiny.write_word_tokenizer(folder / "hf", image_token=True)
    tiny.train_sentencepiece(folder / "sentencepiece")
    return {path.name: AutoTokenizer.from_pretrained(path) for path in folder.iterdir()}


def test_template_is_told_by_tokenizer_and_model_type(tokenizers):
    def mode(model_type, tokenizer):
        return default_conv_mode(types.SimpleNamespace(model_type=model_type), tokenizer)

    assert mode("llava_llama", tokenizers["words"]) == "vicuna_v1"
    assert mode("llava_llama", None) == "vicuna_v1"
    assert mode("llava_mistral", tokenizers["words"]) == "mistral_instruct"
    assert mode("llava_mistral", None) == "mistral_instruct"
    assert mode("llava_llama", tokenizers["chatml"]) == "chatml_direct"


# ------------------------------------------------------------------------------------------------------ token ids
def test_constants():
    assert (IMAGE_TOKEN_INDEX, IGNORE_INDEX, DEFAULT_IMAGE_TOKEN) == (-200, -100, "<image>")


@pytest.mark.parametrize("prompt", [*FIRST_TURN.values(), "<image><image>\nYes?", "Yes? <image>", "No"])
def test_sentencepiece_ids(tokenizers, prompt):
    """A bare tokenizer.model: one BOS, each piece between placeholders encoded by sentencepiece on its own."""
    import sentencepiece

    folder = tokenizers["sentencepiece"].name_or_path
    encoder = sentencepiece.SentencePieceProcessor(model_file=folder + "/tokenizer.model")
    expected = [encoder.bos_id()]
    for number, piece in enumerate(prompt.split("<image>")):
        expected += ([-200] if number else []) + encoder.encode(piece)
    found = tokenizer_image_token(prompt, tokenizers["sentencepiece"], IMAGE_TOKEN_INDEX)
    assert found == expected
    assert found.count(-200) == prompt.count("<image>")


def test_prefix_ends_with_a_lone_space_piece(tokenizers):
    """ "USER: <image>": the space before the placeholder is a piece of its own, as in the published prefix of 35."""
    tokenizer = tokenizers["sentencepiece"]
    ids = tokenizer_image_token(FIRST_TURN["vicuna_v1"], tokenizer)
    before = ids[: ids.index(-200)]
    assert tokenizer.convert_ids_to_tokens(before[-1]) == "▁"
    assert tokenizer.convert_ids_to_tokens(before[-2]) == ":"
    # After the placeholder: sentencepiece's own space before the text, then the line feed as a byte.
    assert tokenizer.convert_ids_to_tokens(ids[len(before) + 1 : len(before) + 3]) == ["▁", "<0x0A>"]


@pytest.mark.parametrize("name", ["words", "chatml", "hf"])
def test_one_placeholder_per_image_and_one_bos(tokenizers, name):
    tokenizer = tokenizers[name]
    text, image = tokenizer("Yes? No").input_ids, [IMAGE_TOKEN_INDEX]
    yes, no = tokenizer("Yes?").input_ids[1:], tokenizer("No").input_ids[1:]
    assert text == [tokenizer.bos_token_id, *yes, *no]
    bos = [tokenizer.bos_token_id]
    for prompt, expected in (
        ("Yes? No", text),
        ("<image>Yes?", bos + image + yes),
        ("Yes?<image>", bos + yes + image),
        ("Yes?<image>No<image><image>", bos + yes + image + no + image * 2),
        ("<image>", bos + image),
    ):
        assert tokenizer_image_token(prompt, tokenizer) == expected
        tensor = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")
        assert tensor.dtype == torch.long and tensor.tolist() == expected
    assert tokenizer_image_token("<image>Yes?", tokenizer, -7)[1] == -7


def test_tokenizer_without_bos(tokenizers):
    """LLaVA-1.6-34B's tokenizer adds no BOS: no piece loses its first token."""

    class WithoutBos:
        bos_token_id = 1

        def __call__(self, text):
            return types.SimpleNamespace(input_ids=tokenizers["words"](text, add_special_tokens=False).input_ids)

        def get_added_vocab(self):
            return {}

    yes = tokenizers["words"]("Yes?", add_special_tokens=False).input_ids
    assert tokenizer_image_token("Yes?<image>Yes?", WithoutBos()) == yes + [-200] + yes
    assert tokenizer_image_token("<image>Yes?", WithoutBos()) == [-200] + yes


def test_unknown_return_type(tokenizers):
    with pytest.raises(ValueError, match="np"):
        tokenizer_image_token("Yes?", tokenizers["words"], return_tensors="np")


def test_left_pad():
    ids, mask = left_pad([torch.tensor([1, -200, 5]), torch.tensor([1])], 9)
    assert ids.tolist() == [[1, -200, 5], [9, 9, 1]] and mask.tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    "path,name",
    [
        ("liuhaotian/llava-v1.5-7b", "llava-v1.5-7b"),
        ("/models/llava-tiny/", "llava-tiny"),
        ("runs/llava-lora/checkpoint-500", "llava-lora_checkpoint-500"),
    ],
)
def test_model_name(path, name):
    assert get_model_name_from_path(path) == name


def test_keywords_end_a_row(tokenizers):
    """LLaVA's stopping criterion, with generate() that returns the prompt's ids or the new ones alone."""
    tokenizer = tokenizers["words"]

    def ids(text):
        return tokenizer(text, add_special_tokens=False).input_ids

    prompt = torch.tensor([[1, *ids("two three"), IMAGE_TOKEN_INDEX]] * 2)
    ends = KeywordsStoppingCriteria(["</s>", "three", ""], tokenizer, prompt)
    for row, says in (
        ("red blue", False),
        ("red three", True),
        ("three red", True),
        ("red </s>", True),
        ("two", False),
    ):
        answer = torch.tensor([ids("red red"), ids(row + " two")[:2]])
        for given in (answer, torch.cat([prompt, answer], dim=1)):
            found = ends(given, None)
            assert found.dtype == torch.bool and found.tolist() == [False, says], row
    assert not KeywordsStoppingCriteria([""], tokenizer, prompt)(prompt, None).any()

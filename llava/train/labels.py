"""Token ids and labels of a conversation. Only the assistant's answers are learnt.

The prompt is what the conversation template makes of the turns, so training and evaluation see the same string. A token
is learnt if it covers a character behind the assistant's cue (an answer's leading space is generated too), up to the end of
the separator (`</s>`), which is where generation stops. An empty answer is read as its cue alone, as in LLaVA, and nothing
of it is learnt.
"""

from __future__ import annotations

import re

from llava.common.errors import UserError
from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import get_conversation

ROLES = ("human", "gpt")  # names of the two speakers in LLaVA's data files


def prompt_and_spans(turns: list[str], template: str) -> tuple[str, list[tuple[int, int]]]:
    """Prompt of `turns`, and the spans (start, end) in characters that are learnt.

    turns: texts of user and assistant in turn, the user first. A span starts at the end of the assistant's cue, where
    generation begins, and ends after the answer's separator.

    The template `plain` is LLaVA's pretraining format: the placeholder, followed directly by the caption and a newline.
    """
    conversation = get_conversation(template)
    if conversation.style == "plain":
        start = len(DEFAULT_IMAGE_TOKEN)
        prompt = DEFAULT_IMAGE_TOKEN + turns[1] + conversation.sep
        return prompt, [(start, len(prompt))] if turns[1] else []
    spans, prompt = [], conversation.system
    for number, text in enumerate(turns):
        role = conversation.roles[number % 2]
        if number % 2:
            # The template itself says where its cue ends, so no rule about separators is written twice.
            cued = conversation.copy()
            cued.append_message(role, None)
            start = len(cued.get_prompt())
        conversation.append_message(role, text)
        prompt = conversation.get_prompt()
        if number % 2 and text:
            spans.append((start, len(prompt)))
    return prompt, spans


def labelled_tokens(
    turns: list[str], template: str, tokenizer, with_images: bool = True
) -> tuple[list[int], list[int]]:
    """(ids [S], labels [S]) of a conversation: IMAGE_TOKEN_INDEX where an image goes, IGNORE_INDEX where nothing is learnt.

    The ids are those of `tokenizer_image_token` on the same prompt; without images <image> is text like any other.
    UserError for a tokenizer without offsets.
    """
    # A turn can have other tokens alone than within the prompt. LLaVA counts the tokens of single turns, and needs
    # corrections for some tokenizers. Offsets need none.
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} does not say where its tokens lie in the text, which training needs"
        )
    prompt, spans = prompt_and_spans(turns, template)
    ids, places = (_tokens_and_places if with_images else _text_tokens_and_places)(prompt, tokenizer)
    labels = [
        token
        if token != IMAGE_TOKEN_INDEX and any(end > first and start < last for first, last in spans)
        else IGNORE_INDEX
        for token, (start, end) in zip(ids, places, strict=True)
    ]
    return ids, labels


def _tokens_and_places(prompt: str, tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids as in `tokenizer_image_token`, and the characters (start, end) of each token. `<s>` has (0, 0)."""
    # llava-hf tokenizers have the placeholder as a token of their own, and then nothing is split.
    if DEFAULT_IMAGE_TOKEN in tokenizer.get_added_vocab():
        placeholder = tokenizer.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)
        found = tokenizer(prompt, return_offsets_mapping=True)
        ids = [IMAGE_TOKEN_INDEX if token == placeholder else token for token in found.input_ids]
        return ids, [tuple(place) for place in found.offset_mapping]
    ids, places, at = [], [], 0
    for number, piece in enumerate(prompt.split(DEFAULT_IMAGE_TOKEN)):
        found = tokenizer(piece, return_offsets_mapping=True)
        own, where = list(found.input_ids), [(at + a, at + b) if b else (0, 0) for a, b in found.offset_mapping]
        if number:
            ids.append(IMAGE_TOKEN_INDEX)
            places.append((at - len(DEFAULT_IMAGE_TOKEN), at))
            # The tokenizer starts every piece with <s>. Only the first one belongs to the prompt.
            bos = int(bool(own) and own[0] == tokenizer.bos_token_id)
            own, where = own[bos:], where[bos:]
        ids += own
        places += where
        at += len(piece) + len(DEFAULT_IMAGE_TOKEN)
    return ids, places


def _text_tokens_and_places(prompt: str, tokenizer) -> tuple[list[int], list[tuple[int, int]]]:
    """Return _tokens_and_places of a prompt in which <image> is text, also for a tokenizer that has it as a token."""
    if DEFAULT_IMAGE_TOKEN not in tokenizer.get_added_vocab():
        found = tokenizer(prompt, return_offsets_mapping=True)
        return list(found.input_ids), [tuple(place) for place in found.offset_mapping]
    ids, places, at = [], [], 0
    for number, piece in enumerate(re.split(f"({re.escape(DEFAULT_IMAGE_TOKEN)})", prompt)):
        found = tokenizer(
            piece,
            return_offsets_mapping=True,
            add_special_tokens=not number,
            split_special_tokens=piece == DEFAULT_IMAGE_TOKEN,
        )
        ids += found.input_ids
        places += [(at + start, at + end) if end else (0, 0) for start, end in found.offset_mapping]
        at += len(piece)
    return ids, places


def turns_of(sample: dict, where: str, images: int | None = None) -> list[str]:
    """The texts of a sample in LLaVA's format, the user's first; turns before that are left out, as LLaVA does.

    images: how many the sample has, by default as many as <image> in its turns. A turn with one <image> has it moved to its
    front, on a line of its own; so has a turn with several in a sample with one image; without images, <image> is text. An
    answer of blanks alone, or null, is empty. UserError, beginning with `where`, for turns that are none or do not alternate.
    """
    found = sample.get("conversations")
    wrong = "" if isinstance(found, list) else f"found {type(found).__name__}"
    wrong = wrong or next((f"turn {n} is none" for n, turn in enumerate(found, 1) if not _is_turn(turn)), "")
    if wrong:
        raise UserError(
            f'{where}: "conversations" is no list of turns, each with the texts "from" and "value" ({wrong})'
        )
    begin = next((i for i, turn in enumerate(found) if turn["from"] == ROLES[0]), len(found))
    turns = found[begin:]
    for number, turn in enumerate(turns):
        if turn["from"] != ROLES[number % 2]:
            raise UserError(
                f'{where}: turn {begin + number + 1} is from "{turn["from"]}", allowed there is "{ROLES[number % 2]}"'
            )
    texts = [turn["value"] or "" for turn in turns]
    texts[1::2] = [text if text.strip() else "" for text in texts[1::2]]
    return texts if images == 0 else [_image_first(text, images) for text in texts]


def _is_turn(turn) -> bool:
    """Return whether a turn has its texts. An answer may be null, which is an empty answer."""
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
        return False
    return isinstance(turn.get("value"), str) or (turn["from"] == ROLES[1] and turn.get("value", "") is None)


def _image_first(text: str, images: int | None) -> str:
    found = text.count(DEFAULT_IMAGE_TOKEN)
    if not found or (found > 1 and images != 1):
        return text
    rest = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
    return f"{DEFAULT_IMAGE_TOKEN}\n{rest}".strip()

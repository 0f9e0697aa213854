"""Token ids and labels of a conversation. Only the assistant's answers are learnt.

The conversation template makes the prompt from the turns, so training and evaluation see the same string. A token is
learnt if it covers a character between the end of the assistant's cue and the end of the separator (`</s>`). The span
starts at the cue, because the leading space of an answer is generated, too. It ends with the separator, because
generation stops there.
"""

from __future__ import annotations

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
        return prompt, [(start, len(prompt))]
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
        if number % 2:
            spans.append((start, len(prompt)))
    return prompt, spans


def labelled_tokens(turns: list[str], template: str, tokenizer) -> tuple[list[int], list[int]]:
    """(ids [S], labels [S]) of a conversation.

    ids: the same as those of `tokenizer_image_token` on the prompt, with IMAGE_TOKEN_INDEX for each image. labels:
    IGNORE_INDEX where nothing is learnt. UserError for a tokenizer without offsets.
    """
    # A turn can have other tokens alone than within the prompt. LLaVA counts the tokens of single turns, and needs
    # corrections for some tokenizers. Offsets need none.
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} does not say where its tokens lie in the text, which training needs"
        )
    prompt, spans = prompt_and_spans(turns, template)
    ids, places = _tokens_and_places(prompt, tokenizer)
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


def turns_of(sample: dict, where: str) -> list[str]:
    """Texts of a sample in LLaVA's format, from the user's first turn on. Earlier turns are left out, as in LLaVA.

    If a turn has exactly one <image>, the placeholder is moved to the front, on a line of its own. UserError, starting
    with `where`, if "conversations" is not a list of turns, if the speakers do not alternate, or if an answer is empty.
    """
    found = sample.get("conversations")
    if not isinstance(found, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)
        for turn in found
    ):
        raise UserError(f'{where}: "conversations" is no list of turns, each with "from" and "value"')
    begin = next((i for i, turn in enumerate(found) if turn["from"] == ROLES[0]), len(found))
    turns = found[begin:]
    for number, turn in enumerate(turns):
        if turn["from"] != ROLES[number % 2]:
            raise UserError(
                f'{where}: turn {begin + number + 1} is from "{turn["from"]}", allowed there is "{ROLES[number % 2]}"'
            )
        if number % 2 and not turn["value"].strip():
            raise UserError(f"{where}: turn {begin + number + 1}, an answer, is empty")
    if len(turns) < 2:
        raise UserError(f"{where}: no turn of the assistant follows one of the user, so there is nothing to learn")
    return [_image_first(turn["value"]) for turn in turns]


def _image_first(text: str) -> str:
    if text.count(DEFAULT_IMAGE_TOKEN) != 1:
        return text
    rest = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
    return f"{DEFAULT_IMAGE_TOKEN}\n{rest}".strip()

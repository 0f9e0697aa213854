"""Requests to the service: turns of a conversation, and the prompt that they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from PIL import Image

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, get_conversation
from llava.model.decoding.sampling import Sampling

# Text before the system text, per style of template. Other styles have no system text.
_SYSTEM = {"vicuna": "", "chatml": "<|im_start|>system\n"}
# Styles that have no cue for the assistant: an answer comes after a user's message, and nowhere else.
_USER_FIRST = ("mistral",)


class PromptTooLong(UserError):
    """Raised for a conversation that is longer than the model's context or than the service's limit."""


@dataclass(frozen=True)
class Turn:
    """One message. role: "system", "user" or "assistant"; images: of this turn, in their order, the user's alone.

    Images stand before the text, as LLaVA was trained, unless the text places them all with <image>. An assistant's text may
    be empty: so are some answers.
    """

    role: str
    text: str
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Request:
    """A conversation, to be answered. config: None takes the service's own."""

    turns: tuple[Turn, ...]
    config: AdaVConfig | None = None
    sampling: Sampling = field(default_factory=Sampling)


def chat_prompt(template: str, turns: Sequence[Turn]) -> str:
    """The prompt of a conversation under a template, up to the assistant's cue, with one <image> per image.

    All system turns together take the place of the template's own system text, wherever they stand. A template without a
    place for one has it before the first message. Turns of one role in a row are joined. The conversation may begin or end
    with the assistant where the template allows it; after an answer at its end another one follows. UserError where it does
    not, where a user's turn is empty, or where <image> and images do not match.
    """
    # 1. Lone surrogates, which JSON allows: the tokenizer would fail on them with an error that names no message.
    conversation = get_conversation(template)
    for turn in turns:
        try:
            turn.text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"a message of role {turn.role!r} has half a character (a lone surrogate)") from None
    texts = [(turn.role, _placed(turn, number)) for number, turn in enumerate(turns, 1)]
    system = [text for role, text in texts if role == "system"]
    messages = _joined([(role, text) for role, text in texts if role != "system"])
    if messages and messages[-1] == ("assistant", ""):  # a client's place for the answer that it asks for
        messages.pop()
    if ("user", "") in messages:
        raise UserError(f"message {texts.index(('user', '')) + 1} (user) is empty, allowed is text, or images")
    _check_order(conversation, messages)
    lead, instructions = "", _one(system)
    if system and conversation.style in _SYSTEM:
        conversation = replace(conversation, system=_SYSTEM[conversation.style] + instructions)
    elif instructions:
        lead = instructions + "\n\n"
    for role, text in messages:
        conversation.append_message(conversation.roles[role == "assistant"], lead + text)
        lead = ""
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def _check_order(conversation: Conversation, messages: list[tuple[str, str]]) -> None:
    """UserError for a conversation that is none, or that its template has no place for."""
    if not messages:
        raise UserError("there is no message of the user or the assistant, allowed are conversations with one")
    if conversation.style not in _USER_FIRST:
        return
    if messages[0][0] == "assistant":
        raise UserError(
            f"the first message is the assistant's, but the template {conversation.name} begins with the user's"
        )
    if messages[-1][0] == "assistant":
        raise UserError(
            f"the last message is the assistant's, but under the template {conversation.name} answers follow the user's"
        )


def _joined(messages: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Messages of one role in a row as one, so that user and assistant take turns."""
    return [(role, _one([text for _, text in group])) for role, group in groupby(messages, key=lambda one: one[0])]


def _one(texts: Sequence[str]) -> str:
    """Several texts as one, each on a line of its own; placeholders of images have their line feed already."""
    joined = ""
    for text in filter(None, texts):
        joined += text if not joined or joined.endswith("\n") else "\n" + text
    return joined


def _placed(turn: Turn, number: int) -> str:
    """The text of a turn with its placeholders."""
    if turn.role != "user":
        if turn.images:
            raise UserError(f"message {number} ({turn.role}) has an image, allowed are images of the user alone")
        # It is text there. Spaces keep tokenizers and templates from reading it as the placeholder.
        return turn.text.replace(DEFAULT_IMAGE_TOKEN, "< image >")
    placed = turn.text.count(DEFAULT_IMAGE_TOKEN)
    if placed not in (0, len(turn.images)):
        raise UserError(
            f"message {number} ({turn.role}) places {placed} images with {DEFAULT_IMAGE_TOKEN}, but {len(turn.images)} "
            "came with it"
        )
    return turn.text if placed else (DEFAULT_IMAGE_TOKEN + "\n") * len(turn.images) + turn.text

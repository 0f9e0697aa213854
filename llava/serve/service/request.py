"""Requests to the service: turns of a conversation, and the prompt that they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from PIL import Image

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import get_conversation
from llava.model.decoding.sampling import Sampling

# Text before the system text, per style of template. Other styles have no system text.
_SYSTEM = {"vicuna": "", "chatml": "<|im_start|>system\n"}


class PromptTooLong(UserError):
    """Raised for a conversation that is longer than the model's context or than the service's limit."""


@dataclass(frozen=True)
class Turn:
    """One message.

    role: "system" (only in the first turn), "user" or "assistant". images: of this turn, in their order. They come
    before the text, as in LLaVA's training, unless the text places all of them with <image>.
    """

    role: str
    text: str
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Request:
    """A conversation that ends with a user's turn. config: None takes the service's own configuration."""

    turns: tuple[Turn, ...]
    config: AdaVConfig | None = None
    sampling: Sampling = field(default_factory=Sampling)


def chat_prompt(template: str, turns: Sequence[Turn]) -> str:
    """The prompt of a conversation under a template, up to the assistant's cue, with one <image> per image.

    A system turn replaces the template's own system text. If the template has no system text, it goes before the first
    message. UserError for turns that are empty or out of order, and if <image> and images do not match.
    """
    # 1. Lone surrogates, which JSON allows: the tokenizer would fail on them with an error that names no message.
    conversation = get_conversation(template)
    turns = list(turns)
    for turn in turns:
        try:
            turn.text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"a message of role {turn.role!r} has half a character (a lone surrogate)") from None
    # 2. The system text.
    lead = ""
    if turns and turns[0].role == "system":
        system = turns.pop(0)
        if system.images or DEFAULT_IMAGE_TOKEN in system.text:
            raise UserError("the system message has an image, allowed is text alone")
        if conversation.style in _SYSTEM:
            conversation = replace(conversation, system=_SYSTEM[conversation.style] + system.text)
        elif system.text:
            lead = system.text + "\n\n"
    # 3. The messages. Roles must alternate, because the templates write them by position.
    if not turns or turns[-1].role != "user":
        raise UserError("the last message is not the user's, allowed are conversations that end with one")
    for at, turn in enumerate(turns):
        role = ("user", "assistant")[at % 2]
        if turn.role != role:
            raise UserError(
                f"message {at + 1} after the system text has the role {turn.role!r}, but user and assistant take turns "
                f"and it is the {role}'s"
            )
        text = _placed(turn, at + 1)
        conversation.append_message(conversation.roles[at % 2], lead + text if at == 0 else text)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def _placed(turn: Turn, number: int) -> str:
    """The text of a turn with one placeholder per image. number: of the message, for errors."""
    if not turn.text and not turn.images:
        raise UserError(f"message {number} ({turn.role}) is empty, allowed is text, or a user's images")
    if turn.images and turn.role != "user":
        raise UserError(f"message {number} ({turn.role}) has an image, allowed are images of the user alone")
    placed = turn.text.count(DEFAULT_IMAGE_TOKEN)
    if placed not in (0, len(turn.images)):
        raise UserError(
            f"message {number} ({turn.role}) places {placed} images with {DEFAULT_IMAGE_TOKEN}, but {len(turn.images)} "
            "came with it"
        )
    return turn.text if placed else (DEFAULT_IMAGE_TOKEN + "\n") * len(turn.images) + turn.text

"""What a front asks of the service: turns of a conversation, and the prompt that they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from PIL import Image

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import get_conversation
from llava.model.decoding.sampling import Sampling

# How a style of template opens its system text; others have no place for one.
_SYSTEM = {"vicuna": "", "chatml": "<|im_start|>system\n"}


class PromptTooLong(UserError):
    """A conversation that does not fit into the model's context, or into what the service allows of it."""


@dataclass(frozen=True)
class Turn:
    """One message. role: "system" (the first turn alone), "user" or "assistant"; images: of this turn, in their order.

    Images stand before the text, as LLaVA was trained, unless the text places them all with <image>.
    """

    role: str
    text: str
    images: tuple[Image.Image, ...] = ()


@dataclass(frozen=True)
class Request:
    """A conversation that ends with a user's turn, to be answered. config: None takes the service's own."""

    turns: tuple[Turn, ...]
    config: AdaVConfig | None = None
    sampling: Sampling = field(default_factory=Sampling)


def chat_prompt(template: str, turns: Sequence[Turn]) -> str:
    """The prompt of a conversation under a template, with one <image> per image, up to the assistant's cue.

    A system turn takes the place of the template's own system text; a template without a place for one has it before the
    first message. UserError where turns are out of order or empty, or <image> and images do not match.
    """
    conversation = get_conversation(template)
    turns = list(turns)
    for turn in turns:
        try:
            turn.text.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"a message of role {turn.role!r} has half a character (a lone surrogate)") from None
    lead = ""
    if turns and turns[0].role == "system":
        system = turns.pop(0)
        if system.images or DEFAULT_IMAGE_TOKEN in system.text:
            raise UserError("the system message has an image, allowed is text alone")
        if conversation.style in _SYSTEM:
            conversation = replace(conversation, system=_SYSTEM[conversation.style] + system.text)
        elif system.text:
            lead = system.text + "\n\n"
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
    """The text of a turn with its placeholders."""
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

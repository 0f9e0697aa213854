"""Conversation templates: they turn a question into the prompt that a checkpoint was trained on.

The strings are LLaVA's protocol (github.com/haotian-liu/LLaVA, conversation.py). The checkpoints were trained on these
strings, so they must not be reworded.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum, auto

from llava.common.errors import UserError

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class SeparatorStyle(Enum):
    """LLaVA's names of the styles, by which its scripts choose between sep and sep2. No template here is SINGLE."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()


_SEPARATOR_STYLES = {
    "vicuna": SeparatorStyle.TWO,
    "chatml": SeparatorStyle.MPT,
    "mistral": SeparatorStyle.LLAMA_2,
    "plain": SeparatorStyle.PLAIN,
}


@dataclass(frozen=True)
class Conversation:
    """A template and the messages so far. Call `append_message` on a `copy()`, because templates are shared.

    style: "vicuna" (ROLE: message), "chatml" (role tokens and end tokens), "mistral" ([INST] brackets), "plain".
    sep, sep2: end of a user's message, and of an assistant's. stop: the text at which an answer ends.
    """

    name: str
    style: str
    system: str
    roles: tuple[str, str]
    sep: str
    sep2: str
    stop: str
    messages: list = field(default_factory=list)

    @property
    def sep_style(self) -> SeparatorStyle:
        """The style as LLaVA's scripts ask for it."""
        return _SEPARATOR_STYLES[self.style]

    def copy(self) -> Conversation:
        """A conversation with its own list of messages."""
        return replace(self, messages=list(self.messages))

    def append_message(self, role: str, message: str | None) -> None:
        """Add a message. None, or an empty one, leaves the role's cue alone, as in LLaVA.

        After the cue of the last message the model writes its answer.
        """
        self.messages.append((role, message))

    def get_prompt(self) -> str:
        """The whole prompt as one string, the system text first."""
        return getattr(self, "_" + self.style)()

    def _separator(self, role: str) -> str:
        return self.sep if role == self.roles[0] else self.sep2

    def _vicuna(self) -> str:
        text = self.system + self.sep
        for role, message in self.messages:
            # No space after the colon of the cue: the model's first token brings its own.
            text += f"{role}: {message}{self._separator(role)}" if message else f"{role}:"
        return text

    def _chatml(self) -> str:
        text = self.system + self.sep
        for role, message in self.messages:
            text += role + (message + self.sep if message else "")
        return text

    def _mistral(self) -> str:
        text = ""  # this template has no system text, and the tokenizer adds the BOS
        for role, message in self.messages:
            if message:
                text += f"[INST] {message} [/INST]" if role == self.roles[0] else f" {message} {self.sep2}"
        return text

    def _plain(self) -> str:
        return "".join(message + self.sep for _, message in self.messages if message)


_VICUNA = Conversation("vicuna_v1", "vicuna", VICUNA_SYSTEM, ("USER", "ASSISTANT"), " ", "</s>", "</s>")
conv_templates = {
    "v1": _VICUNA,
    "vicuna_v1": _VICUNA,
    # The human instead of the user, as LLaVA's own run_llava asks version 1.
    "llava_v1": replace(_VICUNA, name="llava_v1", system=VICUNA_SYSTEM.replace("user", "human")),
    "chatml_direct": Conversation(
        "chatml_direct",
        "chatml",
        "<|im_start|>system\nAnswer the questions.",
        ("<|im_start|>user\n", "<|im_start|>assistant\n"),
        "<|im_end|>",
        "<|im_end|>",
        "<|im_end|>",
    ),
    "mistral_instruct": Conversation("mistral_instruct", "mistral", "", ("USER", "ASSISTANT"), "", "</s>", "</s>"),
    "plain": Conversation("plain", "plain", "", ("", ""), "\n", "\n", "\n"),
}

# Pieces of text that open or close a turn, per style. The text between two of them is one turn.
_TURN_MARKERS = {
    "vicuna": ("USER:", "ASSISTANT:", "</s>"),
    "chatml": ("<|im_start|>user", "<|im_start|>assistant", "<|im_end|>"),
    "mistral": ("[INST]", "[/INST]", "</s>"),
    "plain": (),
}


def get_conversation(name: str) -> Conversation:
    """An empty conversation of the template `name`. UserError for an unknown name lists the templates."""
    if name not in conv_templates:
        raise UserError(f'unknown conversation template "{name}", allowed are {", ".join(conv_templates)}')
    return conv_templates[name].copy()


def default_conv_mode(model_config, tokenizer=None) -> str:
    """Name of a checkpoint's template. It follows from tokenizer and model type, never from the name of a folder."""
    vocabulary = tokenizer.get_vocab() if tokenizer is not None else {}
    if "<|im_start|>" in vocabulary:
        return "chatml_direct"
    if "mistral" in model_config.model_type:
        return "mistral_instruct"
    return "vicuna_v1"


def single_turn(name: str, question: str) -> str:
    """Prompt of one question (with its <image> placeholders) under template `name`, up to the assistant's cue."""
    conversation = get_conversation(name)
    conversation.append_message(conversation.roles[0], question)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def turn_markers(name: str, tokenizer) -> tuple[tuple[int, ...], ...]:
    """Token ids of the turn markers of template `name`: alone, after a space and after a newline; longest first."""
    # SentencePiece gives "USER:" different ids at the start of a text than after a special token, a space or a newline.
    found = set()
    for marker in _TURN_MARKERS[get_conversation(name).style]:
        for text in (marker, " " + marker, "\n" + marker):
            ids = tuple(tokenizer(text, add_special_tokens=False).input_ids)
            lead = tuple(tokenizer(text[: -len(marker)], add_special_tokens=False).input_ids) if text != marker else ()
            ids = ids[len(lead) :] if lead and ids[: len(lead)] == lead else ids
            if ids:
                found.add(ids)
    return tuple(sorted(found, key=len, reverse=True))

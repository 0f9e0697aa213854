"""A chat about pictures: its turns, settings and commands. It knows nothing of the terminal.

    chat = Chat(service.config, read_picture)
    chat.command("/image cat.png")
    request = chat.request("What is on the mat?", sampling)      # for Service.submit
    chat.answered("A cat.")                                      # without this call the question is forgotten

Each answer is generated from the whole conversation, so that vision tokens are selected again for each question.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.methods.index import method_names

if TYPE_CHECKING:  # these import torch; a mistyped flag should be reported without that wait
    from llava.model.decoding.sampling import Sampling
    from llava.serve.service.request import Request, Turn

COMMANDS = {
    "/image": ("PATH", "show a picture with the next question; again for several"),
    "/method": ("NAME [TOKENS]", "how vision tokens are chosen"),
    "/tokens": ("N", "vision tokens kept per image, all tiles together"),
    "/config": ("[KEY VALUE]", "the configuration; with a key of adav_configs.json, change it"),
    "/history": ("", "what has been said"),
    "/reset": ("", "forget what has been said, and all pictures"),
    "/help": ("", "this list"),
    "/quit": ("", "leave"),
}


class Leave(Exception):
    """Raised by /quit."""


class Chat:
    """One conversation. read: a function that opens the picture at a path, or raises UserError."""

    def __init__(self, config: AdaVConfig, read: Callable[[Path], Image.Image]):
        self.config = config
        self.turns: list[Turn] = []
        self.pictures: list[Image.Image] = []  # for the next question
        self._names: list[tuple[str, ...]] = []  # per answered question: the files of its pictures
        self._next_names: list[str] = []
        self._read = read

    def command(self, line: str) -> str:
        """Carry out a line that begins with "/", and return the text to show. After a UserError nothing has changed."""
        name, _, rest = line.strip().partition(" ")
        if name not in COMMANDS:
            raise UserError(f"{name} is no command, allowed are {', '.join(COMMANDS)}")
        return getattr(self, "_" + name[1:])(rest.strip())  # only names of COMMANDS get here

    def request(self, text: str, sampling: Sampling) -> Request:
        """The whole conversation with `text` as its next question."""
        from llava.serve.service.request import Request, Turn

        self._asked = Turn("user", text, tuple(self.pictures))
        return Request((*self.turns, self._asked), self.config, sampling)

    def answered(self, text: str) -> bool:
        """The question of the last request and its answer are part of the conversation from now on; not so, and False,
        where the answer is empty: nothing was said."""
        from llava.serve.service.request import Turn

        if not text.strip():
            return False
        self.turns += [self._asked, Turn("assistant", text)]
        self._names.append(tuple(self._next_names))
        self.pictures, self._next_names = [], []
        return True

    def _image(self, rest: str) -> str:
        if not rest:
            raise UserError("/image needs the path of a picture, as in /image photo.jpg")
        path = Path(_unquoted(rest)).expanduser()
        picture = self._read(path)
        self.pictures.append(picture)
        self._next_names.append(path.name)
        return f"{path.name}: {picture.width} x {picture.height} pixels, with the next question"

    def _method(self, rest: str) -> str:
        name, _, tokens = rest.partition(" ")
        if not name:
            return f"{self._chosen()}; there are {', '.join(method_names())}"
        changes = {"method": name, **({"overall_tokens": _whole(tokens)} if tokens.strip() else {})}
        return self._change(changes)

    def _tokens(self, rest: str) -> str:
        if not rest:
            return f"{self.config.overall_tokens} tokens per image"
        return self._change({"overall_tokens": _whole(rest)})

    def _config(self, rest: str) -> str:
        if not rest:
            return str(self.config)
        key, _, value = rest.partition(" ")
        known = [field.name for field in fields(AdaVConfig)]
        if key not in known:
            raise UserError(f"/config: unknown key {key}, allowed are {', '.join(known)}")
        if not value.strip():
            return f"{key}: {json.dumps(getattr(self.config, key))}"
        self._change({key: _value(value.strip())})
        return f"{key}: {json.dumps(getattr(self.config, key))}"

    def _change(self, changes: dict) -> str:
        self.config = replace(self.config, **changes)
        return self._chosen()

    def _chosen(self) -> str:
        budget = (
            "" if self.config.method in ("none", "no_image") else f", {self.config.overall_tokens} tokens per image"
        )
        return f"method {self.config.method}{budget}"

    def _history(self, rest: str) -> str:
        _nothing("/history", rest)
        lines, names = [], iter(self._names)
        for turn in self.turns:
            shown = "".join(f"[{name}] " for name in next(names)) if turn.role == "user" else ""
            lines.append(f"{'you' if turn.role == 'user' else 'model'}: {shown}{turn.text}")
        lines += [f"with the next question: {name}" for name in self._next_names]
        return "\n".join(lines) or "nothing has been said yet"

    def _reset(self, rest: str) -> str:
        _nothing("/reset", rest)
        self.turns, self.pictures, self._names, self._next_names = [], [], [], []
        return "a new conversation"

    def _help(self, rest: str) -> str:
        usage = {f"{name} {arguments}".strip(): what for name, (arguments, what) in COMMANDS.items()}
        width = max(map(len, usage))
        return "\n".join(f"{left:<{width}}  {what}" for left, what in usage.items())

    def _quit(self, rest: str) -> str:
        raise Leave


def _nothing(name: str, rest: str) -> None:
    """Raise UserError if a command without arguments has one."""
    if rest:
        raise UserError(f'{name} takes nothing, but "{rest}" follows it')


def _unquoted(text: str) -> str:
    """A path without quotes and escapes. Terminals write them when a file is dropped on the window."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return text[1:-1]
    return text.replace("\\ ", " ")


def _whole(text: str):
    """The number in a text, or the text itself, which AdaVConfig then refuses with its own message."""
    return int(text) if text.strip().isdecimal() else text.strip()


def _value(text: str):
    """A value of the configuration: JSON, or a string if it is not JSON, as on the command line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text

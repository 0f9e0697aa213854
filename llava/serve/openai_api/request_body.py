"""OpenAI's chat completions: request bodies become requests of the service, and errors become OpenAI's error objects.

There are three kinds of fields. READ fields are supported. IGNORED fields do not change an answer. NEUTRAL fields would
change it and are not supported, so only values that change nothing are allowed. Every other field is refused. A field
that is null counts as absent.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.model.decoding.sampling import Sampling
from llava.serve.service.image_input import (
    ImageLimits,
    ImageRefused,
    picture_from_data_url,
    picture_from_folders,
)
from llava.serve.service.reply import Failed
from llava.serve.service.request import PromptTooLong, Request, Turn
from llava.serve.service.service import Busy, Closed

READ = (
    *("model", "messages", "stream", "stream_options", "temperature", "top_p", "max_tokens", "max_completion_tokens"),
    *("stop", "seed", "n", "adav"),
)
IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
# Field -> its allowed values; no value is allowed where the tuple is empty.
NEUTRAL = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
}
# EMPTY: fields of an assistant's message that clients send back as they received them. They must be empty.
MESSAGE = ("role", "content", "name")
EMPTY = ("refusal", "tool_calls", "function_call", "audio", "annotations")
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MAX_STOPS = 4  # OpenAI's limit
MAX_DEPTH = 32  # nested arrays and objects; recursive code may walk the body later


class Refused(UserError):
    """A request that is not answered. param: the field with the mistake; status: of HTTP; code: OpenAI's error code."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


@dataclass(frozen=True)
class Server:
    """Settings that requests are checked against.

    model         the served name
    limits        of images; max_pixels counts all images of a request together
    folders       folders from which requests may name image files
    max_tokens    new tokens of an answer if the request states no limit
    max_body      bytes of a request
    read_seconds  time that a client has to send a request
    """

    model: str
    limits: ImageLimits = ImageLimits()
    folders: tuple[Path, ...] = ()
    max_tokens: int = 512
    max_body: int = 32 << 20
    read_seconds: float = 30.0


@dataclass(frozen=True)
class Chat:
    """The form of the answer that a request asks for: a stream or one object, with or without usage."""

    config: AdaVConfig
    stream: bool
    include_usage: bool


def read_chat(body: bytes, server: Server, configure: Callable[[dict], AdaVConfig]) -> tuple[Request, Chat]:
    """The Request and Chat of a request body. Refused says in one sentence what is wrong with it.

    configure: turns the field `adav` into a configuration, see Service.configure.
    """
    # 1. Unknown fields, and fields that are not supported.
    fields = {name: value for name, value in read_json(body).items() if value is not None}
    for name in fields:
        if name not in (*READ, *IGNORED, *NEUTRAL):
            raise Refused(f"unknown field {_shown(name)}, allowed are {', '.join((*READ, *IGNORED, *NEUTRAL))}")
    for name, allowed in NEUTRAL.items():
        # The types are compared too, because False == 0 in Python. A penalty of 0.0 is allowed as well as 0.
        if name in fields and not any(fields[name] == one and type(fields[name]) is type(one) for one in allowed):
            if name.endswith("penalty") and fields[name] == 0:
                continue
            words = " or ".join(json.dumps(one) for one in allowed) or "leaving it out"
            raise Refused(f"{name} is not supported, allowed is {words}", name)
    # 2. Fields that choose the form of the answer.
    model = _typed(fields, "model", str, server.model)
    if model != server.model:
        raise Refused(
            f"there is no model {_shown(model)} here, allowed is {server.model}", "model", 404, "model_not_found"
        )
    if _whole(fields, "n", 1) != 1:
        raise Refused("n is not 1: each request gets one answer", "n")
    stream = _typed(fields, "stream", bool, False)
    options = _typed(fields, "stream_options", dict, {})
    if options and not stream:
        raise Refused("stream_options go with stream: true", "stream_options")
    for name in options:
        if name not in ("include_usage", "include_obfuscation"):
            raise Refused(f"unknown stream option {_shown(name)}, allowed is include_usage", "stream_options")
    if not isinstance(options.get("include_usage", False), bool):
        raise Refused("stream_options.include_usage is neither true nor false", "stream_options")
    # 3. The configuration and the conversation. Images are opened last, because they cost the most.
    try:
        config = configure(_typed(fields, "adav", dict, {}))
    except UserError as error:
        raise Refused(str(error)[:1000], "adav") from None
    request = Request(_turns(fields, server), config, _sampling(fields, server))
    return request, Chat(config, stream, options.get("include_usage", False))


def read_json(body: bytes) -> dict:
    """The JSON object of a body. Refused for anything else, and for more than MAX_DEPTH nested levels."""

    def no_constant(name):  # Python's parser accepts NaN and Infinity, which are no JSON
        raise ValueError(f"{name} is no JSON")

    try:
        value = json.loads(body.decode("utf-8"), parse_constant=no_constant)
    except UnicodeDecodeError as error:
        raise Refused(f"the body is not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise Refused(f"the body is not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise Refused(f"the body nests deeper than {MAX_DEPTH}") from None
    except ValueError as error:  # a constant, or a number with more digits than Python converts
        raise Refused(f"the body is not JSON ({str(error)[:100]})") from None
    if not isinstance(value, dict):
        raise Refused(f"the body is {_kind(value)}, allowed is a JSON object")
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
    if level:
        raise Refused(f"the body nests deeper than {MAX_DEPTH}")
    return value


# --- fields ----------------------------------------------------------------------------------------------------------


def _turns(fields: dict, server: Server) -> tuple[Turn, ...]:
    """The turns of a conversation with their opened images. max_pixels is shared by all images of the request."""
    messages = _typed(fields, "messages", list, [])
    if not messages:
        raise Refused("messages is missing or empty, allowed is a list of messages", "messages")
    left, turns = server.limits.max_pixels, []
    for at, message in enumerate(messages):
        where = f"messages[{at}]"
        if not isinstance(message, dict):
            raise Refused(f"{where} is {_kind(message)}, allowed is an object with role and content", where)
        for name, value in message.items():
            if name not in MESSAGE and (name not in EMPTY or value not in (None, [], {}, "")):
                raise Refused(f"{where} has the field {_shown(name)}, allowed are {', '.join(MESSAGE)}", where)
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise Refused(f"{where}.role is {_shown(role)}, allowed are {', '.join(ROLES)}", f"{where}.role")
        text, urls = _content(message.get("content"), f"{where}.content")
        images = []
        for url in urls:
            picture = _picture(url, server, left, f"{where}.content")
            left -= picture.width * picture.height
            images.append(picture)
        turns.append(Turn(ROLES[role], text, tuple(images)))
    return tuple(turns)


def _content(content, where: str) -> tuple[str, list[str]]:
    """(text of a message, URLs of its images in their order). Text parts are joined by newlines."""
    if isinstance(content, str) or content is None:
        return content or "", []
    if not isinstance(content, list):
        raise Refused(f"{where} is {_kind(content)}, allowed is a string or a list of parts", where)
    texts, urls = [], []
    for at, part in enumerate(content):
        place = f"{where}[{at}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url":
            image = part.get("image_url")
            url = image.get("url") if isinstance(image, dict) else image
            if not isinstance(url, str):
                raise Refused(f'{place}.image_url is {_kind(image)}, allowed is {{"url": a string}}', place)
            urls.append(url)
        else:
            raise Refused(f'{place} is no part of type "text" (with text) or "image_url" (with image_url)', place)
    return "\n".join(texts), urls


def _picture(url: str, server: Server, pixels_left: int, where: str) -> Image.Image:
    """The opened image of a URL. pixels_left: pixels that this request may still use."""
    # http(s) is never fetched: a request could otherwise reach hosts that only this server can reach.
    limits = replace(server.limits, max_pixels=pixels_left)
    url = url.strip()
    scheme = url[:16].partition(":")[0].lower()
    try:
        if scheme == "data":
            return picture_from_data_url(url, limits)
        if scheme in ("http", "https"):
            raise ImageRefused(f"{scheme} addresses are not fetched: send the image as a data URL")
        if not server.folders:
            raise ImageRefused("this server opens no image files: send the image as a data URL")
        return picture_from_folders(url, server.folders, limits)
    except ImageRefused as error:
        raise Refused(f"{where}: {error}", where, code="invalid_image") from None


def _sampling(fields: dict, server: Server) -> Sampling:
    """The Sampling of a request. Without a seed the draws are random, as with OpenAI. Temperature 0 is the default."""
    most = _whole(fields, "max_tokens", server.max_tokens)
    most = _whole(fields, "max_completion_tokens", most)
    temperature = _number(fields, "temperature", 0.0)
    if not 0 <= temperature <= 2:
        raise Refused(f"temperature is {_shown(temperature)}, allowed is a number from 0 to 2", "temperature")
    top_p = _number(fields, "top_p", 1.0)
    if not 0 <= top_p <= 1:
        raise Refused(f"top_p is {_shown(top_p)}, allowed is a number from 0 to 1", "top_p")
    if top_p == 0:  # of no share of the probability the most probable token is left
        temperature, top_p = 0.0, 1.0
    if most < 1:
        raise Refused(f"max_tokens is {_shown(most)}, allowed is a whole number of at least 1", "max_tokens")
    seed = _whole(fields, "seed", secrets.randbelow(2**63))
    if not -(2**63) <= seed < 2**63:
        raise Refused("seed is out of range, allowed are whole numbers of 64 bits", "seed")
    stop = fields.get("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > MAX_STOPS or not all(isinstance(s, str) and s for s in stop):
        raise Refused(f"stop is not a string or a list of up to {MAX_STOPS} strings, none of them empty", "stop")
    return Sampling(most, temperature, top_p, seed % 2**63, tuple(stop))


def _typed(fields: dict, name: str, kind: type, default):
    """A field of type `kind`, or its default. Refused for another type."""
    value = fields.get(name, default)
    if not isinstance(value, kind):
        words = {str: "a string", bool: "true or false", dict: "an object", list: "a list"}[kind]
        raise Refused(f"{name} is {_kind(value)}, allowed is {words}", name)
    return value


def _whole(fields: dict, name: str, default: int) -> int:
    value = fields.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool):
        raise Refused(f"{name} is {_kind(value)}, allowed is a whole number", name)
    return value


def _number(fields: dict, name: str, default: float) -> float:
    value = fields.get(name, default)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise Refused(f"{name} is {_kind(value)}, allowed is a number", name)
    return value


def _kind(value) -> str:
    """The kind of a JSON value in words, for an error message."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value)) or _shown(value)


def _shown(value) -> str:
    """A value in an error message, shortened to 80 characters."""
    # str() of a very long int raises ValueError.
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    text = json.dumps(value) if not isinstance(value, (dict, list)) else _kind(value)
    return text if len(text) <= 80 else text[:80] + "..."


# --- errors ---------------------------------------------------------------------------------------------------------


def error_of(error: Exception) -> tuple[int, dict]:
    """(HTTP status, OpenAI's error object) of an error. Any other UserError has status 400."""
    status, code, param = 400, None, None
    if isinstance(error, Refused):
        status, code, param = error.status, error.code, error.param
    elif isinstance(error, PromptTooLong):
        code, param = "context_length_exceeded", "messages"
    elif isinstance(error, Busy):
        status, code = 429, "queue_full"
    elif isinstance(error, Closed):
        status, code = 503, "shutting_down"
    elif isinstance(error, Failed):
        status, code = 500, "model_failed"
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return status, {"error": {"message": str(error), "type": kind, "param": param, "code": code}}

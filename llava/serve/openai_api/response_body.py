"""Answers in the form of OpenAI's chat completions, whole or as events of a stream, with measurements beside them."""

from __future__ import annotations

import secrets
import time

from llava.config import AdaVConfig
from llava.serve.service.cost_text import measured
from llava.serve.service.reply import Answered


def new_id() -> str:
    """A new id of a completion, in OpenAI's form."""
    return "chatcmpl-" + secrets.token_hex(12)


def completion(ident: str, model: str, answered: Answered, config: AdaVConfig) -> dict:
    """A finished answer as one chat.completion object."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answered.text, "refusal": None},
        "logprobs": None,
        "finish_reason": answered.finish,
    }
    head = {"id": ident, "object": "chat.completion", "created": int(time.time()), "model": model}
    return head | {"choices": [choice], "usage": usage(answered), "adav": measured(answered, config)}


def chunk(ident: str, created: int, model: str, delta: dict | None, finish: str | None = None, **more) -> dict:
    """One chat.completion.chunk object of a stream. delta None: without a choice, as for the usage at the end."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
    head = {"id": ident, "object": "chat.completion.chunk", "created": created, "model": model}
    return head | {"choices": choices} | more


def usage(answered: Answered) -> dict:
    """OpenAI's usage object. prompt_tokens counts tokens that entered the LLM, so not the dropped vision tokens."""
    prompt, new = answered.prompt_tokens, answered.new_tokens
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

"""Answers as OpenAI's chat completions have them, whole and as the events of a stream, and what is measured beside them."""

from __future__ import annotations

import secrets
import time

from llava.config import AdaVConfig
from llava.serve.service.cost_text import measured
from llava.serve.service.reply import Answered


def new_id() -> str:
    return "chatcmpl-" + secrets.token_hex(12)


def completion(ident: str, model: str, answered: Answered, config: AdaVConfig) -> dict:
    """The whole answer as one object."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answered.text, "refusal": None},
        "logprobs": None,
        "finish_reason": answered.finish,
    }
    head = {"id": ident, "object": "chat.completion", "created": int(time.time()), "model": model}
    return head | {"choices": [choice], "usage": usage(answered), "adav": measured(answered, config)}


def chunk(ident: str, created: int, model: str, delta: dict | None, finish: str | None = None, **more) -> dict:
    """One event of a streamed answer; delta None: an event without a choice."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
    head = {"id": ident, "object": "chat.completion.chunk", "created": created, "model": model}
    return head | {"choices": choices} | more


def usage(answered: Answered) -> dict:
    """prompt_tokens are those that entered the LLM: vision tokens that were not kept are not among them."""
    prompt, new = answered.prompt_tokens, answered.new_tokens
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

"""Costs of an answer: as the text that the page and the terminal show, and as JSON."""

from __future__ import annotations

from llava.config import AdaVConfig
from llava.serve.service.reply import Answered


def duration(seconds: float) -> str:
    """A duration in ms, or in s from ten seconds on."""
    return f"{1000 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"


def rate(per_second: float | None) -> str:
    """A rate as a number, "-" for None (an answer of one token has no rate)."""
    return "-" if per_second is None else f"{per_second:.0f}" if per_second >= 10 else f"{per_second:.1f}"


def size(count: int) -> str:
    """A number of bytes in decimal units (1 kB = 1,000 B)."""
    for unit, unit_bytes in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= unit_bytes:
            return f"{count / unit_bytes:.{0 if count >= 100 * unit_bytes else 1}f} {unit}"
    return f"{count} B"


def cost_line(answered: Answered) -> str:
    """One line: vision tokens, time to the first token, tokens per second where there is a rate, live bytes of the KV cache."""
    kept, total = answered.vision_tokens
    parts = [f"{kept:,} of {total:,} vision tokens", f"first token {duration(answered.seconds['first_token'])}"]
    if answered.tokens_per_second is not None:
        parts.append(f"{rate(answered.tokens_per_second)} tokens/s")
    return " | ".join([*parts, f"KV cache {size(answered.kv_bytes[0])}"])


def measured(answered: Answered, config: AdaVConfig) -> dict:
    """Return the measured costs of an answer as the API and `--json` of the terminal write them."""
    (kept, total), (live, allocated) = answered.vision_tokens, answered.kv_bytes
    return {
        "method": config.method,
        "overall_tokens": config.overall_tokens,
        "vision_tokens": {"kept": kept, "of": total},
        "seconds": {name: round(value, 6) for name, value in answered.seconds.items()},
        "tokens_per_second": answered.tokens_per_second and round(answered.tokens_per_second, 3),
        "kv_bytes": {"live": live, "allocated": allocated},
        "prefill_flops": answered.prefill_flops,
        "batch": answered.batch,
        "images_reused": answered.images_reused,
    }

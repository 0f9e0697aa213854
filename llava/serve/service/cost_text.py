"""The cost of an answer as text, in the words and units that page and terminal show."""

from __future__ import annotations

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
    """One line: vision tokens, time to the first token, tokens per second, live bytes of the KV cache."""
    kept, total = answered.vision_tokens
    return (
        f"{kept:,} of {total:,} vision tokens | first token {duration(answered.seconds['first_token'])} | "
        f"{rate(answered.tokens_per_second)} tokens/s | KV cache {size(answered.kv_bytes[0])}"
    )

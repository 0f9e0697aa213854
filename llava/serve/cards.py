"""What the page shows of one answer, as HTML: the text as it comes, what it cost, and which patches it was read from."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from llava.serve.costs import duration, rate, size
from llava.serve.overlay import kept_views
from llava.serve.reply import Answered

LONG = 60  # letters from which on an answer is set as text, not as a headline


def escaped(text: str) -> str:
    """Text for HTML that goes through gradio's templates: their marks (${...}, {{...}}) must not survive either."""
    return html.escape(text).replace("{", "&#123;").replace("$", "&#36;").replace("\\", "&#92;")


def example_strip(examples: Sequence[tuple[str, str]]) -> str:
    """Buttons with a picture and its question; examples: (path, question) each."""
    buttons = []
    for nth, (path, question) in enumerate(examples):
        with Image.open(path) as picture:
            picture.thumbnail((240, 240))
            shown = f'<img alt="" src="{data_url(picture)}">'
        buttons.append(f'<button type="button" data-nth="{nth}">{shown}<span>{escaped(question)}</span></button>')
    return f'<div class="label">Examples</div><div class="strip">{"".join(buttons)}</div>'


def empty_card(hint: str) -> str:
    return f'<div class="card"><div class="answer empty">{escaped(hint)}</div></div>'


def sentence(text: str) -> str:
    """What went wrong."""
    return f'<div class="sentence" role="alert">{escaped(text)}</div>'


def failed_card(text: str) -> str:
    return f'<div class="card">{sentence(text)}</div>'


def running_card(text: str) -> str:
    """An answer on its way."""
    return f'<div class="card">{_answer(text, cursor=True)}</div>'


def answered_card(answered: Answered, image: Image.Image) -> str:
    """A finished answer: its text, vision tokens kept, time to the first token, tokens per second, bytes of the KV cache,
    and the image with its kept patches."""
    if not answered.seconds:  # withdrawn before its turn came
        return empty_card("stopped")
    kept, total = answered.vision_tokens
    notes = {"length": "the limit of new tokens ended it", "cancelled": "stopped"}
    note = notes.get(answered.finish)
    cost = [
        ("first token", duration(answered.seconds["first_token"])),
        ("tokens/s", rate(answered.tokens_per_second)),
        ("KV cache", size(answered.kv_bytes[0])),
    ]
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in cost)
    share = kept / total if total else 0.0
    return (
        '<div class="card" data-state="done">'
        + _answer(answered.text.strip() or "(an empty answer)")
        + (f'<div class="kept"><span>{note}</span></div>' if note else "")
        + f'<div class="kept"><span><b>{kept:,}</b> of {total:,} vision tokens</span><span>{share:.0%}</span></div>'
        + f'<div class="bar"><i style="width:{100 * share:.1f}%"></i></div>'
        + f"<dl>{cells}</dl>"
        + "".join(_views(image, answered.side, seen) for seen in answered.images)
        + "</div>"
    )


def _answer(text: str, cursor: bool = False) -> str:
    size = " long" if len(text) > LONG else ""
    return f'<div class="answer{size}" aria-live="polite">{escaped(text)}{"<span class=cursor></span>" * cursor}</div>'


def _views(image: Image.Image, side: int, seen) -> str:
    """The picture as one tile or as crops, with what is not kept dark; nothing of it becomes a file on the server."""
    views = kept_views(image.convert("RGB"), seen.plan, side, seen.selection)
    figures = []
    for label, view in reversed(views):  # crops first: they are what most tokens come from
        caption = escaped(label or "patches that were kept")
        figures.append(
            f'<figure><figcaption>{caption}</figcaption><img alt="{caption}" src="{data_url(view)}"></figure>'
        )
    return f'<div class="views">{"".join(figures)}</div>'


def data_url(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()

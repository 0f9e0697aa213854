"""What the page shows of one answer, as HTML: the text as it comes, what it cost, and which patches it was read from."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from PIL import Image

from llava.overlay.page import draw_stages, has_scores, score_maps
from llava.overlay.views import kept_views
from llava.serve.service.cost_text import duration, rate, size
from llava.serve.service.reply import Answered, KeptTokens

MOST = 3  # configurations beside each other
FOLD = 600  # pixels: width of a row of stages
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


def running_card(text: str, question: str) -> str:
    """An answer on its way."""
    return f'<div class="card">{_answer(text, question, cursor=True)}</div>'


def answered_card(answered: Answered, image: Image.Image, question: str) -> str:
    """A finished answer: its question and text, vision tokens kept, time to the first token, tokens per second, bytes of the KV cache,
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
        + _answer(answered.text.strip() or "(an empty answer)", question)
        + (f'<div class="kept"><span>{note}</span></div>' if note else "")
        + f'<div class="kept"><span><b>{kept:,}</b> of {total:,} vision tokens</span><span>{share:.0%}</span></div>'
        + f'<div class="bar"><i style="width:{100 * share:.1f}%"></i></div>'
        + f"<dl>{cells}</dl>"
        + "".join(_views(image, answered.side, seen) for seen in answered.images)
        + "</div>"
    )


def _answer(text: str, question: str, cursor: bool = False) -> str:
    """An answer below the question that it answers, which need not be the one that is being written."""
    asked = f'<div class="asked">{escaped(question)}</div>'
    size = " long" if len(text) > LONG else ""
    end = "<span class=cursor></span>" * cursor
    return f'{asked}<div class="answer{size}" aria-live="polite">{escaped(text)}{end}</div>'


def _views(image: Image.Image, side: int, seen: KeptTokens) -> str:
    """The picture as one tile or as crops, with what is not kept dark, and below it, folded, why. Nothing of it becomes a
    file on the server."""
    figures = []
    for label, view in reversed(
        kept_views(image, seen.plan, side, seen.selection)
    ):  # crops first: most tokens are theirs
        caption = escaped(label or "patches that were kept")
        figures.append(f"<figure><figcaption>{caption}</figcaption>{_picture(view, caption)}</figure>")
    report, folds = seen.selection.report, ""
    if has_scores(seen.selection):
        split = f"Why these tokens: {report['k_text']} by the question, {report['k_saliency']} by saliency"
        folds += _fold(split, score_maps(image, seen.plan, side, seen.selection))
    if report.get("survivors"):
        folds += _fold("What is left inside the LLM", [draw_stages(image, seen.plan, side, seen.selection, FOLD)])
    return f'<div class="views">{"".join(figures)}</div>{folds}'


def _fold(title: str, pictures: Sequence[Image.Image]) -> str:
    shown = "".join(_picture(picture, title) for picture in pictures)
    return f"<details><summary>{title}</summary><div>{shown}</div></details>"


def _picture(picture: Image.Image, alt: str) -> str:
    return f'<img alt="{alt}" src="{data_url(picture)}">'


def data_url(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()

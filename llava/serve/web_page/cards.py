"""HTML of one answer on the page: its text while it is generated, its cost, and the patches that were kept."""

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

MOST = 3  # configurations side by side
FOLD = 600  # width in pixels of a row of stages
LONG = 60  # letters; a longer answer has the size of text and not of a headline


def escaped(text: str) -> str:
    """Text as HTML. It also escapes ${...} and {{...}}, which gradio's templates would evaluate."""
    return html.escape(text).replace("{", "&#123;").replace("$", "&#36;").replace("\\", "&#92;")


def example_strip(examples: Sequence[tuple[str, str]]) -> str:
    """A row of buttons, each with a picture and its question. examples: (path, question) of each."""
    buttons = []
    for nth, (path, question) in enumerate(examples):
        with Image.open(path) as picture:
            picture.thumbnail((240, 240))
            shown = f'<img alt="" src="{data_url(picture)}">'
        buttons.append(f'<button type="button" data-nth="{nth}">{shown}<span>{escaped(question)}</span></button>')
    return f'<div class="label">Examples</div><div class="strip">{"".join(buttons)}</div>'


def empty_card(hint: str) -> str:
    """A card without an answer. hint: the text in its place."""
    return f'<div class="card"><div class="answer empty">{escaped(hint)}</div></div>'


def sentence(text: str) -> str:
    """An error message."""
    return f'<div class="sentence" role="alert">{escaped(text)}</div>'


def failed_card(text: str) -> str:
    """A card with an error message."""
    return f'<div class="card">{sentence(text)}</div>'


def running_card(text: str, question: str) -> str:
    """A card with the text of an unfinished answer."""
    return f'<div class="card">{_answer(text, question, cursor=True)}</div>'


def answered_card(answered: Answered, image: Image.Image, question: str) -> str:
    """A card with a finished answer.

    It shows question and text, vision tokens kept, time to the first token, tokens per second, live bytes of the KV
    cache, and the image with its kept patches.
    """
    if not answered.seconds:  # cancelled while it waited, so nothing was measured
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
    """A question and its answer. The question is shown because the user may already be writing another one."""
    asked = f'<div class="asked">{escaped(question)}</div>'
    size = " long" if len(text) > LONG else ""
    end = "<span class=cursor></span>" * cursor
    return f'{asked}<div class="answer{size}" aria-live="polite">{escaped(text)}{end}</div>'


def _views(image: Image.Image, side: int, seen: KeptTokens) -> str:
    """The picture with its dropped patches dark, and below it, folded, the scores and the cuts inside the LLM."""
    # All pictures are data URLs: a file on the server would have to be served, guarded and deleted.
    figures = []
    # Crops first, because they have most of the tokens.
    for label, view in reversed(kept_views(image, seen.plan, side, seen.selection)):
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
    """Pictures that are hidden until the title is clicked. title: HTML."""
    shown = "".join(_picture(picture, title) for picture in pictures)
    return f"<details><summary>{title}</summary><div>{shown}</div></details>"


def _picture(picture: Image.Image, alt: str) -> str:
    return f'<img alt="{alt}" src="{data_url(picture)}">'


def data_url(picture: Image.Image) -> str:
    """A picture as a data URL (PNG)."""
    data = io.BytesIO()
    picture.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()

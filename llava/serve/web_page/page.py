"""The page: a picture, a question, and up to three configurations that answer side by side.

    blocks = build_page(service, limits, Sampling(), name="llava-1.5-7b", examples=[(path, question)], ...)

The state of a question lives in the call that answers it. Of a session the page keeps only the replies that it may have
to stop.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import gradio as gr
from PIL import Image

from llava.common.errors import UserError, first_line
from llava.config import AdaVConfig
from llava.methods.index import method_names
from llava.model.decoding.sampling import Sampling
from llava.serve.service.image_input import ImageLimits, picture_from_file
from llava.serve.service.reply import Reply
from llava.serve.service.service import Request, Service, Turn
from llava.serve.web_page.cards import (
    MOST,
    answered_card,
    empty_card,
    escaped,
    example_strip,
    failed_card,
    running_card,
    sentence,
)

NAMES = "ABC"[:MOST]  # of the configurations side by side
REFRESH = 0.1  # seconds between two updates of an unfinished answer
WHOLE = ("none", "no_image")  # methods without a budget
# Keys that the controls of a column set, in the order in which the handler receives their values.
KEYS = (
    "method",
    "overall_tokens",
    "vision_adaptive_attention",
    "vision_adaptive_attention_rate",
    "vision_adaptive_attention_compute_rate",
    "vision_adaptive_attention_update_interval",
    "text_pruning_flag",
    "text_pruning_rate",
)
HEAD = """<h1>LLaVA with fewer vision tokens</h1>
<p>Ask about a picture, and see which of its patches each method lets the language model read, what it answers from them,
and what that costs. Answers are those of <b>{name}</b>.</p>"""
HINT = "The answer comes here."
# Empties the cards. It runs in the browser, so that it is done before the user can ask again; otherwise an answer could
# stand below another picture.
CLEAR = f"() => Array({MOST}).fill({json.dumps(empty_card(HINT))})"
# Runs in the browser: sends the number of the example that was clicked.
PICK = """element.addEventListener("click", event => {
  const button = event.target.closest("button[data-nth]");
  if (button) trigger("click", {nth: Number(button.dataset.nth)});
});"""


def build_page(
    service: Service,
    limits: ImageLimits,
    sampling: Sampling,
    *,
    name: str,
    caveat: str,
    most_tokens: int,
    examples: Sequence[Sequence[str]],
    users: int,
    queue: int,
) -> gr.Blocks:
    """The page of one service.

    limits: of uploaded pictures. sampling: decoding of all answers.
    name: of the checkpoint. caveat: text about the worth of its answers, or "".
    most_tokens: upper end of the slider of vision tokens. examples: (path of a picture, question) of each.
    users: questions that are answered at the same time. queue: further questions that may wait.
    """
    # 1. The layout. delete_cache: seconds between two clean-ups, and age at which an upload is deleted.
    with gr.Blocks(title="AdaV", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        # The replies of a session. When its visitor leaves, gradio deletes the state, which stops them.
        running = gr.State((), delete_callback=stop)
        gr.HTML(HEAD.format(name=escaped(name)), elem_id="head")
        if caveat:
            gr.HTML(escaped(caveat), elem_id="limits")
        with gr.Row(elem_id="top"):
            with gr.Column(scale=4, min_width=280):
                picture = gr.Image(
                    label="Picture", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=320,
                    buttons=[], elem_id="picture",
                )  # fmt: skip
            with gr.Column(scale=6, min_width=280):
                # Of one line at first: with more, gradio sends at Shift+Enter and breaks the line at Enter.
                question = gr.Textbox(
                    label="Question", placeholder="What would you like to know?", lines=1, max_lines=6,
                    max_length=4000, elem_id="question",
                )  # fmt: skip
                with gr.Row(elem_id="start"):
                    ask = gr.Button("Ask", variant="primary", elem_id="ask", scale=0, min_width=130)
                    end = gr.Button("Stop", elem_id="stop", scale=0, min_width=80)
                    count = gr.Radio(
                        [("one", 1), ("two", 2), ("three", 3)], value=3, label="Configurations side by side",
                        elem_id="count", min_width=220,
                    )  # fmt: skip
                sample = gr.HTML(example_strip(examples), js_on_load=PICK, elem_id="examples")
        note = gr.HTML(elem_id="note")
        columns, controls, cards = [], [], []
        with gr.Row(equal_height=False):
            for letter, start in zip(NAMES, first_choices(service.config), strict=True):
                with gr.Column(min_width=280, elem_classes="configuration", elem_id=f"column-{letter}") as column:
                    controls.append(_controls(letter, start, most_tokens))
                    cards.append(gr.HTML(empty_card(HINT), elem_id=f"card-{letter}"))
                columns.append(column)

        # 2. The handlers.
        def pick(event: gr.EventData) -> Sequence[str]:
            """(picture, question) of the example that was clicked."""
            return examples[event.nth]

        def check(upload: dict | None) -> str:
            """An error message for a picture that cannot be used, shown as soon as it is uploaded; else ""."""
            try:
                _open(upload, limits)
            except UserError as error:
                return sentence(str(error))
            return ""

        def answer(upload: dict | None, text: str, shown: int, *values) -> Iterator[tuple]:
            """Yields (replies, note, card A, card B, card C) while the answers are generated."""
            nothing = tuple(gr.skip() for _ in NAMES)
            try:
                image, text = _open(upload, limits), (text or "").strip()
                if not text:
                    raise UserError("there is no question yet; write one, or take an example")
            except UserError as error:
                yield ((), sentence(str(error)), *nothing)
                return
            replies = {}
            shown_cards = {name: empty_card(HINT) for name in NAMES}
            try:
                for at, name in enumerate(NAMES[:shown]):
                    chosen = dict(zip(KEYS, values[at * len(KEYS) : (at + 1) * len(KEYS)], strict=True))
                    try:
                        config = service.configure(chosen)
                        turn = Turn("user", text, (image,))
                        replies[name] = service.submit(Request((turn,), config, sampling))
                        shown_cards[name] = running_card("", text)
                    except UserError as error:
                        shown_cards[name] = failed_card(str(error))
                yield (tuple(replies.values()), "", *shown_cards.values())
                for name, reply in replies.items():
                    for shown_cards[name] in _follow(reply, image, text):
                        yield (gr.skip(), gr.skip(), *shown_cards.values())
            finally:  # also when gradio closes this generator, because the visitor has left or asked again
                stop(replies.values())

        # 3. The events.
        inputs = [picture, question, count, *(control for column in controls for control in column)]
        # preprocess=False: gradio would open pictures itself, without limits. AdaVConfig checks the values of controls.
        sent = {"preprocess": False, "show_progress": "hidden", "api_visibility": "private"}
        for trigger in (ask.click, question.submit):
            trigger(answer, inputs, [running, note, *cards], concurrency_limit=users, concurrency_id="answer", **sent)
        quick = {**sent, "concurrency_limit": None}
        end.click(stop, running, None, **quick)
        sample.click(pick, None, [picture, question], **quick)
        # Only in the browser: a cancel on the server could end an answer that was requested right after the change.
        picture.change(None, None, cards, js=CLEAR, **quick)
        picture.change(check, picture, note, **quick)
        count.change(lambda n: [gr.update(visible=at < n) for at in range(len(NAMES))], count, columns, **quick)
        for method, tokens, *_ in controls:
            method.change(lambda name: gr.update(elem_classes=_budget(name)), method, tokens, **quick)
    blocks.queue(max_size=queue)
    return blocks


def first_choices(config: AdaVConfig) -> list[AdaVConfig]:
    """The initial configurations of the columns: the service's own, another method with its budget, all tokens."""
    rival = "fastervlm" if config.method == "adav" else "adav"
    return [config, replace(config, method=rival), replace(config, method="none")]


def stop(replies) -> None:
    """Cancel the replies that have not ended."""
    for reply in replies:
        if not reply.over:
            reply.cancel()


def _follow(reply: Reply, image: Image.Image, question: str) -> Iterator[str]:
    """Yields the card of one answer every REFRESH seconds until it ends.

    It yields even if there is no new text: gradio can end a generator (its visitor has left) only at a yield.
    """
    try:
        while not reply.over:
            try:
                reply.result(REFRESH)
            except TimeoutError:
                yield running_card(reply.text, question)
        yield answered_card(reply.result(), image, question)
    except Exception as error:  # a failed request must not stop the other columns
        yield failed_card(first_line(error))


def _open(upload: dict | None, limits: ImageLimits) -> Image.Image:
    """The uploaded picture. upload: gradio's FileData; the guard has checked that its path is an upload."""
    if not upload:
        raise UserError("there is no picture yet; drop one on the page, or take an example")
    path = Path(upload["path"])
    try:
        return picture_from_file(path, limits)
    except UserError as error:  # the message must have the name that the user knows, not a path of the server
        raise UserError(str(error).replace(str(path), path.name)) from None


def _budget(method: str) -> list[str]:
    """CSS classes of the slider of vision tokens. It is hidden for a method without a budget.

    Its place stays empty, so that the answers of all columns begin at the same height.
    """
    return ["no-budget"] if method in WHOLE else []


def _controls(name: str, start: AdaVConfig, most_tokens: int) -> list:
    """The controls of one configuration, in the order of KEYS."""
    method = gr.Dropdown(
        list(method_names()), value=start.method, label=f"Configuration {name}: method", elem_id=f"method-{name}"
    )
    tokens = gr.Slider(
        1, most_tokens, value=min(start.overall_tokens, most_tokens), step=1,
        label=f"Vision tokens kept, 1 to {most_tokens}", elem_classes=_budget(start.method), elem_id=f"tokens-{name}", buttons=[],
    )  # fmt: skip
    with gr.Accordion("Advanced: adaptive KV cache", open=False, elem_id=f"advanced-{name}"):
        adaptive = gr.Checkbox(start.vision_adaptive_attention, label="A-VL on the image's part of the cache")
        rates = [
            gr.Slider(0, 0.95, value=getattr(start, key), step=0.05, label=label, buttons=[])
            for key, label in (
                ("vision_adaptive_attention_rate", "evicted after prefill"),
                ("vision_adaptive_attention_compute_rate", "not read at a step (evicted ones included)"),
            )
        ]
        interval = gr.Number(
            start.vision_adaptive_attention_update_interval, label="steps between re-rankings (-1: never)", precision=0
        )
        text = gr.Checkbox(start.text_pruning_flag, label="prune the text part")
        text_rate = gr.Slider(0, 0.95, value=start.text_pruning_rate, step=0.05, label="text pruned", buttons=[])
    return [method, tokens, adaptive, *rates, interval, text, text_rate]


def page_theme() -> gr.themes.Base:
    """The theme of the page. Its fonts are those of the reader's system: gradio's own would be fetched from the web."""
    theme = gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="md",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "monospace"],
    )
    return theme.set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_border_width_dark="0px",
        block_shadow="none",
        block_padding="0",
        block_title_text_weight="500",
        block_title_text_size="*text_sm",
        panel_border_width="0",
    )

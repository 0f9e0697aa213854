"""The result of a request: a Reply that grows while the model answers, and at its end an Answered with measurements."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava.methods.before_llm import Selection
    from llava.mm_utils import TilePlan


class Failed(Exception):
    """Raised if the model failed on a request in which no mistake was found. The message is one sentence."""


@dataclass(frozen=True)
class KeptTokens:
    """One image of a request: its tiles, and the Selection of its vision tokens (on the CPU, without features)."""

    plan: TilePlan
    selection: Selection


@dataclass(frozen=True)
class Answered:
    """A finished answer.

    text                the whole decoded text, cut before the stop string, without special tokens
    finish              "stop" (end token or stop string), "length" or "cancelled"
    prompt_tokens       tokens that entered the LLM: text and kept vision tokens
    new_tokens          generated tokens, with the end token
    images              per image of the conversation, in order; llava.overlay.page draws them with
                        draw_overlay(picture, images[i].plan, side, {name: images[i].selection})
    side                patches per tile side
    vision_tokens       (after the last cut, before selection), all images together
    seconds             waited: from submit to the start of the batch, with the cutting of images into tiles;
                        first_token: from there to the first token (tower, selection and prefill of the whole batch);
                        decode: from there to the last token of the row
    tokens_per_second   of decoding, without the first token; None for an answer of one token
    kv_bytes            (live: entries of the row's own tokens, allocated: its share of the storage), at its end
    prefill_flops       predicted for this request alone
    batch               requests that were answered together
    images_reused       images that an earlier request had encoded
    """

    text: str
    finish: str
    prompt_tokens: int = 0
    new_tokens: int = 0
    images: tuple[KeptTokens, ...] = ()
    side: int = 0
    vision_tokens: tuple[int, int] = (0, 0)
    seconds: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float | None = None
    kv_bytes: tuple[int, int] = (0, 0)
    prefill_flops: int = 0
    batch: int = 0
    images_reused: int = 0


class Reply:
    """The answer to one request while it is generated. It is for one consumer, in any thread.

    Iteration gives pieces of text as soon as they cannot change any more. result() waits for the end. Both raise the
    error of the request, a UserError or Failed.
    """

    def __init__(
        self,
        listener: Callable[[str | None], None] | None = None,
        on_cancel: Callable[[Reply], None] | None = None,
        on_end: Callable[[Answered | None], None] | None = None,
    ):
        """Make a reply without text.

        listener: called in the service's thread with each piece, and with None at the end.
        on_cancel: called when the consumer cancels.
        on_end: called once, with the finished answer, or with None if the request failed.
        """
        self._pieces: SimpleQueue[str | None] = SimpleQueue()
        self._text: list[str] = []
        self._over = threading.Event()
        self._answered: Answered | None = None
        self._error: Exception | None = None
        self._listener, self._on_cancel, self._on_end = listener, on_cancel, on_end
        self.cancelled = False

    def __iter__(self) -> Iterator[str]:
        """Pieces of text until the end of the answer. Raises the error of the request at the end."""
        while (piece := self._pieces.get()) is not None:
            yield piece
        self._pieces.put(None)  # a second iteration finds the end at once, and does not block
        self.result()

    def result(self, timeout: float | None = None) -> Answered:
        """The finished answer. TimeoutError if it is not there after `timeout` seconds; None waits without limit."""
        if not self._over.wait(timeout):
            raise TimeoutError(f"no answer within {timeout} seconds")
        if self._error is not None:
            # Without the old traceback: each raise would lengthen it, and its frames keep their variables alive.
            raise self._error.with_traceback(None)
        return self._answered

    def cancel(self) -> None:
        """Cancel the request. A waiting request leaves the queue; a running one ends before the next decode step."""
        self.cancelled = True
        on_cancel = self._on_cancel  # a local name, because the service's thread may set the attribute to None
        if on_cancel is not None:
            on_cancel(self)

    @property
    def over(self) -> bool:
        """True if the answer has ended: finished, cancelled or failed."""
        return self._over.is_set()

    @property
    def text(self) -> str:
        """The text so far, without parts that may still change."""
        return "".join(self._text)

    # --- for the service ------------------------------------------------------------------------------------------

    def add(self, piece: str) -> None:
        """Append a piece of text."""
        if piece:
            self._text.append(piece)
            self._tell(piece)

    def finish(self, answered: Answered) -> None:
        """End with an answer."""
        self._answered = answered
        self._end()

    def fail(self, error: Exception) -> None:
        """End with an error, which result() and iteration raise."""
        self._error = error
        self._end()

    def _end(self) -> None:
        # Counted first: whoever waits for the end may read the service's counts at once.
        if self._on_end is not None:
            self._on_end(self._answered)
        self._over.set()
        self._tell(None)
        # A client may keep its Reply. Without this it would keep the service, and with it the model, alive.
        self._listener = self._on_cancel = self._on_end = None

    def _tell(self, piece: str | None) -> None:
        self._pieces.put(piece)
        if self._listener is None:
            return
        try:
            self._listener(piece)
        except Exception:  # the listener's side is gone, for example a closed event loop; the batch must go on
            self.cancelled = True

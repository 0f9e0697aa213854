"""What a front gets back: a Reply that fills while the model answers, and at its end an Answered with what was measured."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llava.methods.before_llm import Selection
    from llava.mm_utils import TilePlan
    from llava.serve.service.service import Service


class Failed(Exception):
    """The model failed on a request that was good as far as could be told; the message is one sentence."""


@dataclass(frozen=True)
class KeptTokens:
    """One image of a request: how it was cut into tiles, and what was kept of it (on the CPU, without features)."""

    plan: TilePlan
    selection: Selection


@dataclass(frozen=True)
class Answered:
    """A finished answer.

    text                all of it, without special tokens and from the stop string on
    finish              "stop" (end token or stop string), "length" or "cancelled"
    prompt_tokens       that entered the LLM: text and kept vision tokens; new_tokens: generated, the end token included
    images              per image of the conversation, in order; side: patches per tile side. llava.serve.overlay draws
                        draw_overlay(picture, images[i].plan, side, {name: images[i].selection})
    vision_tokens       (left after the last cut, before selection), all images together
    seconds             waited: from submit to the start of its batch, cutting images into tiles included; first_token: from
                        there to the first token (tower, selection and prefill of the whole batch); decode: from there
                        to the row's last token
    tokens_per_second   of decoding, the first token excluded; None where there was but one
    kv_bytes            (live: entries of the row's own tokens, allocated: its share of the storage), at its end
    prefill_flops       predicted for this request alone
    batch               requests that were answered together
    images_reused       images whose way through the vision tower an earlier request had paid for
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
    """The answer to one request while it is being made. For one consumer, in any thread.

    Iterating gives pieces of text as they become certain; result() waits for the end. Both raise what went wrong with
    the request: a UserError, or Failed.
    """

    def __init__(self, listener: Callable[[str | None], None] | None = None, service: Service | None = None):
        """listener is called in the service's thread with each piece, and with None at the end."""
        self._pieces: SimpleQueue[str | None] = SimpleQueue()
        self._text: list[str] = []
        self._over = threading.Event()
        self._answered: Answered | None = None
        self._error: Exception | None = None
        self._listener, self._service = listener, service
        self.cancelled = False

    def __iter__(self) -> Iterator[str]:
        while (piece := self._pieces.get()) is not None:
            yield piece
        self._pieces.put(None)  # for whoever iterates again
        self.result()

    def result(self, timeout: float | None = None) -> Answered:
        """The finished answer. TimeoutError where there is none after `timeout` seconds."""
        if not self._over.wait(timeout):
            raise TimeoutError(f"no answer within {timeout} seconds")
        if self._error is not None:
            raise self._error.with_traceback(None)
        return self._answered

    def cancel(self) -> None:
        """The answer is no longer wanted: a request that waits is withdrawn, one that runs ends at the next step."""
        self.cancelled = True
        service = self._service
        if service is not None:
            service.withdraw(self)

    @property
    def over(self) -> bool:
        """Whether there is nothing more to come."""
        return self._over.is_set()

    @property
    def text(self) -> str:
        """What is certain by now."""
        return "".join(self._text)

    # --- for the service ------------------------------------------------------------------------------------------

    def add(self, piece: str) -> None:
        if piece:
            self._text.append(piece)
            self._tell(piece)

    def finish(self, answered: Answered) -> None:
        self._answered = answered
        self._end()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._end()

    def _end(self) -> None:
        if self._service is not None:
            self._service.count(self._answered)
        self._over.set()
        self._tell(None)
        self._listener = self._service = None

    def _tell(self, piece: str | None) -> None:
        self._pieces.put(piece)
        if self._listener is None:
            return
        try:
            self._listener(piece)
        except Exception:  # whoever listened is gone
            self.cancelled = True

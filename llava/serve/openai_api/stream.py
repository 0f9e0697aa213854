"""One chat request on the event loop: reads its body within limits, and sends its answer whole or as a stream."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect

from llava.common.errors import UserError
from llava.serve.openai_api.metrics import Metrics
from llava.serve.openai_api.request_body import Chat, Refused, error_of
from llava.serve.openai_api.response_body import chunk, completion, new_id, usage
from llava.serve.service.cost_text import measured
from llava.serve.service.reply import Answered, Failed, Reply
from llava.serve.service.service import Closed


async def read_body(request: Request, most: int, seconds: float) -> bytes:
    """The body of a request. Refused with status 413 for more than `most` bytes, with 408 after `seconds`."""
    too_large = Refused(f"the request has more than {most:,} bytes, which is what is allowed", status=413)
    declared = request.headers.get("content-length", "")
    # The length of the number is tested first, because int() of a very long string is slow or raises.
    if declared.isdigit() and (len(declared) > 18 or int(declared) > most):
        raise too_large

    async def read() -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise too_large
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError:
        raise Refused(f"the request did not come within {seconds:g} seconds", status=408) from None


class Pieces:
    """Carries pieces of an answer from the service's thread to the event loop. Create it on the event loop."""

    def __init__(self):
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue()

    def put(self, piece: str | None) -> None:
        """Add a piece from any thread; None is the end. RuntimeError if the loop is closed."""
        # asyncio.Queue is not thread-safe, so the loop itself puts the piece into it.
        self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)

    async def get(self) -> str | None:
        """The next piece; None at the end."""
        return await self._queue.get()


class Answer:
    """An answer that is being sent to one client. Its creator must call end() in every case, which frees the row."""

    def __init__(self, model: str, chat: Chat, reply: Reply, pieces: Pieces, metrics: Metrics, arrived: float):
        self.stream, self.config = chat.stream, chat.config
        self._include_usage, self._model, self._reply, self._pieces = chat.include_usage, model, reply, pieces
        self._metrics, self._arrived, self._ended = metrics, arrived, False

    async def first(self, request: Request) -> str | None:
        """The first piece, or None for an empty answer. Raises the error of the request, or ClientDisconnect."""
        piece = await self._while_connected(request, self._pieces.get())
        if piece is None:
            self._result()
        return piece

    async def whole(self, request: Request, first: str | None) -> dict:
        """The finished answer as a chat.completion object. first: the piece that `first` returned."""

        async def rest():  # the reply keeps the text, so the pieces only tell when it ends
            piece = first
            while piece is not None:
                piece = await self._pieces.get()

        await self._while_connected(request, rest())
        return completion(new_id(), self._model, self._result(), self.config)

    async def events(self, first: str | None) -> AsyncIterator[str]:
        """The answer as server-sent events, one per piece. first: the piece that `first` returned."""
        head = (new_id(), int(time.time()), self._model)
        none_yet = {"usage": None} if self._include_usage else {}
        yield _event(chunk(*head, {"role": "assistant", "content": ""}, **none_yet))
        piece = first
        while piece is not None:
            yield _event(chunk(*head, {"content": piece}, **none_yet))
            piece = await self._pieces.get()
        try:
            answered = self._result()
        except (UserError, Failed) as error:
            # The status 200 is sent already, so the error is an event. No [DONE] follows it.
            yield _event(error_of(error)[1])
            return
        yield _event(chunk(*head, {}, answered.finish, adav=measured(answered, self.config), **none_yet))
        if self._include_usage:
            yield _event(chunk(*head, None, usage=usage(answered)))
        yield "data: [DONE]\n\n"

    def end(self) -> None:
        """End the answer: record it, or cancel it if it is not finished. Further calls do nothing."""
        if self._ended:
            return
        self._ended = True
        if not self._reply.over:
            self._reply.cancel()
            self._metrics.disconnected()
            return
        with suppress(UserError, Failed):
            self._metrics.answered(self._reply.result(0), time.perf_counter() - self._arrived)

    def _result(self) -> Answered:
        """The finished answer. Closed if the server ended it before it was complete."""
        answered = self._reply.result(0)
        if answered.finish == "cancelled":
            raise Closed("the server was closed before the answer was complete")
        return answered

    async def _while_connected(self, request: Request, work):
        """The result of the awaitable `work`. ClientDisconnect as soon as the client disconnects."""
        work, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise ClientDisconnect
        finally:
            for task in (work, gone):
                task.cancel()
            # Waits until both have ended: otherwise asyncio reports exceptions that were never retrieved.
            await asyncio.gather(work, gone, return_exceptions=True)


class Events(StreamingResponse):
    """A response that streams an Answer, and ends it however the stream ends."""

    def __init__(self, answer: Answer, first: str | None):
        super().__init__(answer.events(first), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answer = answer

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.end()


async def _disconnected(request: Request) -> None:
    """Returns when the client has disconnected. The body has been read, so no other message matters."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(content: dict) -> str:
    """A server-sent event with JSON data. json.dumps writes ASCII without line breaks, which would end the event."""
    return f"data: {json.dumps(content)}\n\n"

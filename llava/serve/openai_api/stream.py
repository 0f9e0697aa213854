"""One chat request on the event loop: its body within limits, the pieces of its answer, whole or as server-sent events."""

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
    """A body of at most `most` bytes that comes within `seconds`; Refused with 413 or 408 otherwise, at once."""
    too_large = Refused(f"the request has more than {most:,} bytes, which is what is allowed", status=413)
    declared = request.headers.get("content-length", "")
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
    """Carries an answer's pieces from the service's thread to the event loop. Made on the loop."""

    def __init__(self):
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue()

    def put(self, piece: str | None) -> None:
        self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)

    async def get(self) -> str | None:
        """The next piece; None at the end."""
        return await self._queue.get()


class Answer:
    """An answer on its way to one client. Whoever makes it calls end(), come what may: the row is then free."""

    def __init__(self, model: str, chat: Chat, reply: Reply, pieces: Pieces, metrics: Metrics, arrived: float):
        self.stream, self.config = chat.stream, chat.config
        self._include_usage, self._model, self._reply, self._pieces = chat.include_usage, model, reply, pieces
        self._metrics, self._arrived, self._ended = metrics, arrived, False

    async def first(self, request: Request) -> str | None:
        """The first piece, None where the answer has none. Raises what is wrong with the request, ClientDisconnect too."""
        piece = await self._while_connected(request, self._pieces.get())
        if piece is None:
            self._result()
        return piece

    async def whole(self, request: Request, first: str | None) -> dict:
        """The finished answer as OpenAI's object."""

        async def rest():
            piece = first
            while piece is not None:
                piece = await self._pieces.get()

        await self._while_connected(request, rest())
        return completion(new_id(), self._model, self._result(), self.config)

    async def events(self, first: str | None) -> AsyncIterator[str]:
        """The answer as server-sent events, piece by piece."""
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
            yield _event(error_of(error)[1])
            return
        yield _event(chunk(*head, {}, answered.finish, adav=measured(answered, self.config), **none_yet))
        if self._include_usage:
            yield _event(chunk(*head, None, usage=usage(answered)))
        yield "data: [DONE]\n\n"

    def end(self) -> None:
        """The client has its answer, or is gone."""
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
        answered = self._reply.result(0)
        if answered.finish == "cancelled":
            raise Closed("the server was closed before the answer was complete")
        return answered

    async def _while_connected(self, request: Request, work):
        """The result of `work`; ClientDisconnect as soon as the client is gone."""
        work, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return work.result()
            raise ClientDisconnect
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


class Events(StreamingResponse):
    """An Answer as a stream, which ends it however the stream ends."""

    def __init__(self, answer: Answer, first: str | None):
        super().__init__(answer.events(first), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._answer = answer

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.end()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"

"""The routes of the API, and the HTTP status of each error.

    app = make_app(service, Server("llava-shapes-v1.5", ImageLimits()), key=None)

A few threads of the app read requests and open their images. The model runs in the service's thread. The event loop
only passes pieces of answers on (stream.py).
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from llava.common.errors import UserError
from llava.serve.openai_api.metrics import Metrics
from llava.serve.openai_api.request_body import Refused, Server, error_of, read_chat
from llava.serve.openai_api.stream import Answer, Events, Pieces, read_body
from llava.serve.service.reply import Failed
from llava.serve.service.service import Busy, Closed, Service

# Threads that read requests and open images. Each may hold the largest picture that is allowed, so they are few.
READERS = 2
RETRY_AFTER = 1  # seconds; a header of the answer that says that the queue is full
GONE = 499  # status for a client that has disconnected, as nginx counts it; it appears only in the metrics
log = logging.getLogger("llava.serve")


class JSON(Response):
    """A JSON response in ASCII. A lone surrogate in a request may come back in an error, and UTF-8 cannot encode it."""

    media_type = "application/json"

    def render(self, content) -> bytes:
        return json.dumps(content).encode("ascii")


def make_app(service: Service, server: Server, key: str | None = None) -> FastAPI:
    """The ASGI app of a service. When it shuts down, it closes the service.

    key: the bearer token that every request needs, except for /health. None: no token is needed.
    """
    api = Api(service, server, key)

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        # uvicorn has given running answers their time by now. close() joins a thread, so it must not block the loop.
        await asyncio.to_thread(service.close, False)
        api.readers.shutdown(wait=True)

    app = FastAPI(
        title="AdaV", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    for path, route in (("/v1/models", api.models), ("/v1/models/{name:path}", api.model), ("/metrics", api.counts)):
        app.get(path)(route)
    app.get("/health")(api.health)
    app.post("/v1/chat/completions")(api.chat)

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> Response:
        return failed(
            Refused(f"{request.method} {request.scope['path'][:200]}: {error.detail}", None, error.status_code)
        )

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return failed(Failed("the server failed on this request"))

    return app


def failed(error: Exception) -> JSON:
    """The JSON response for an error."""
    status, body = error_of(error)
    headers = {429: {"Retry-After": str(RETRY_AFTER)}, 401: {"WWW-Authenticate": "Bearer"}}.get(status)
    return JSON(body, status, headers)


class Api:
    """The routes of one service. All methods run on the event loop, except `submit`."""

    def __init__(self, service: Service, server: Server, key: str | None):
        self.service, self.server = service, server
        self.key = None if key is None else key.encode()
        self.metrics, self.created = Metrics(service), int(time.time())
        self.readers = ThreadPoolExecutor(READERS, thread_name_prefix="llava-reader")
        self.coming = 0  # requests that are being read; they are in no queue yet, so Service cannot limit them

    async def health(self) -> Response:
        """GET /health. live: the process answers. ready: the service takes requests; status 503 if not."""
        stats, ready = self.service.stats(), self.service.alive
        content = {"live": True, "ready": ready, "waiting": stats["waiting"], "running": stats["running"]}
        return JSON(content, 200 if ready else 503)

    async def counts(self, request: Request) -> Response:
        """GET /metrics"""
        return self.unauthorised(request) or Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def models(self, request: Request) -> Response:
        """GET /v1/models"""
        return self.unauthorised(request) or JSON({"object": "list", "data": [self.card()]})

    async def model(self, request: Request, name: str) -> Response:
        """GET /v1/models/NAME"""
        if refusal := self.unauthorised(request):
            return refusal
        if name == self.server.model:
            return JSON(self.card())
        words = f"there is no such model here, allowed is {self.server.model}"
        return failed(Refused(words, "model", 404, "model_not_found"))

    def card(self) -> dict:
        """The model as OpenAI's model object."""
        return {"id": self.server.model, "object": "model", "created": self.created, "owned_by": "adav"}

    def unauthorised(self, request: Request) -> Response | None:
        """The refusal of a request whose key is missing or wrong; None for a request that may pass."""
        if self.key is None:
            return None
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self.key):
            return None
        words = "the API key is missing or wrong, allowed is Authorization: Bearer KEY"
        return failed(Refused(words, None, 401, "invalid_api_key"))

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        try:
            response = self.unauthorised(request) or await self.answer(request)
        except ClientDisconnect:
            response = Response(status_code=GONE)
        except (UserError, Failed) as error:
            response = failed(error)
        self.metrics.responded(response.status_code)
        return response

    async def answer(self, request: Request) -> Response:
        """The response to a chat request. Raises Refused, Busy, Closed, Failed or ClientDisconnect."""
        # 1. Refuse what can be refused without reading the body.
        arrived = time.perf_counter()
        if not self.service.alive:
            raise Closed("the service has been closed")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        # Another site's page can send other types without a CORS preflight, so they would allow cross-site requests.
        if kind != "application/json":
            raise Refused(f"the body is of type {kind[:80]!r}, allowed is application/json", status=415)
        if self.coming >= self.service.max_waiting + self.service.max_batch:
            raise Busy(f"{self.coming} requests are being read, which is as many as may be; try again later")
        # 2. Read the body, and submit the request in a reader thread.
        pieces = Pieces()
        self.coming += 1
        try:
            body = await read_body(request, self.server.max_body, self.server.read_seconds)
            reading = asyncio.get_running_loop().run_in_executor(self.readers, self.submit, body, pieces, arrived)
            del body  # it may hold megabytes of images, which this frame would keep until the answer ends
            answer = await reading
        finally:
            self.coming -= 1
        # 3. Answer. After the first piece the status is sent, so an error before it still has its own status.
        try:
            first = await answer.first(request)
            if answer.stream:
                return Events(answer, first)
            response = JSON(await answer.whole(request, first))
        except BaseException:  # CancelledError too: the row must be freed in every case
            answer.end()
            raise
        answer.end()
        return response

    def submit(self, body: bytes, pieces: Pieces, arrived: float) -> Answer:
        """Read a request and queue it. Runs in a reader thread: decoding images would block the event loop."""
        request, chat = read_chat(body, self.server, self.service.configure)
        reply = self.service.submit(request, pieces.put)
        return Answer(self.server.model, chat, reply, pieces, self.metrics, arrived)

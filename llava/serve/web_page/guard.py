"""ASGI middleware that passes only requests of the page itself to the page's server.

Gradio's server has many more routes than one page needs: files by path or by URL, proxies, recordings, an API. A
request passes only if its method and path are in ROUTES, its body is not larger than necessary, and every file that it
names is in the folder of uploads.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

GET, POST = ("GET", "HEAD"), ("POST",)
FILE = "/gradio_api/file="
JOIN, UPLOAD = "/gradio_api/queue/join", "/gradio_api/upload"
ROUTES = [
    (GET, r"/"),
    (GET, r"/(config|theme\.css|favicon\.ico|robots\.txt)"),
    (GET, r"/(assets|static|svelte)/.+"),
    (GET, re.escape(FILE) + r".+"),
    (GET, r"/gradio_api/(queue/data|upload_progress|heartbeat/\w+)"),
    (POST, re.escape(JOIN)),
    (POST, re.escape(UPLOAD)),
    (POST, r"/gradio_api/(cancel|reset)"),
]
ENVELOPE = 64 << 10  # bytes of a request besides the upload: the form around it, or the fields of an event


class Guard:
    """The middleware.

    app: the ASGI application behind it. uploads: folder whose files a request may name. max_bytes: of one upload.
    """

    def __init__(self, app, uploads: Path, max_bytes: int):
        self.app, self.uploads, self.max_bytes = app, uploads.resolve(), max_bytes

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})
        if refused := self._refused(scope):
            return await _answer(send, *refused)
        if scope["path"] == JOIN:
            body = await _whole(receive)
            if not self._names_uploads_alone(body):
                return await _answer(send, 403, "a request may name no files but those that were uploaded here")
            receive = _replay(body, receive)  # a body can be received only once
        await self.app(scope, receive, send)

    def _refused(self, scope) -> tuple[int, str] | None:
        """(status, message) for a request that must not pass, judged by path and headers; None if it may pass."""
        method, path = scope["method"], scope["path"]
        if not any(method in methods and re.fullmatch(pattern, path) for methods, pattern in ROUTES):
            return 404, "nothing is here"
        if path.startswith(FILE):
            return None if self._is_upload(path[len(FILE) :]) else (403, "no file of this server can be read")
        if ".." in path.split("/"):
            return 404, "nothing is here"
        if method == "POST":
            headers = dict(scope["headers"])
            length = headers.get(b"content-length", b"")
            allowed = ENVELOPE + (self.max_bytes if path == UPLOAD else 0)
            # A chunked body has no length, so it could be of any size.
            if not length.isdigit() or b"transfer-encoding" in headers:
                return 411, "the request does not say how long it is"
            if int(length) > allowed:
                return 413, f"the request has {int(length):,} bytes, allowed are {allowed:,}"
        return None

    def _is_upload(self, name) -> bool:
        """True for a path inside the folder of uploads, after links and `..` are resolved."""
        try:
            return isinstance(name, str) and Path(name).resolve().is_relative_to(self.uploads)
        except (OSError, ValueError):  # a path that is too long, or has a null byte
            return False

    def _names_uploads_alone(self, body: bytes) -> bool:
        """True if every "path" in a JSON body is an upload. Gradio takes any object with a "path" for a file."""
        try:
            waiting = [json.loads(body)]
        except (ValueError, RecursionError):
            return False
        while waiting:  # a loop and no recursion: a client chooses the depth
            value = waiting.pop()
            if isinstance(value, dict):
                if value.get("path") is not None and not self._is_upload(value["path"]):
                    return False
                waiting.extend(value.values())
            elif isinstance(value, list):
                waiting.extend(value)
        return True


async def _whole(receive) -> bytes:
    """The body of a request. Its declared length has been checked, and the server reads no more than that."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


def _replay(body: bytes, receive):
    """An ASGI receive function that gives the body again, and then the later messages (such as a disconnect)."""
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def again():
        return first.pop() if first else await receive()

    return again


async def _answer(send, status: int, sentence: str) -> None:
    """Send a response of one line of text."""
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": sentence.encode()})

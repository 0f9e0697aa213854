"""What reaches the page's server: the routes and files that the page needs, and nothing else."""

import asyncio
import json

import pytest

from llava.serve.web_page.guard import Guard


@pytest.fixture
def uploads(tmp_path):
    folder = tmp_path / "uploads"
    (folder / "abc").mkdir(parents=True)
    (folder / "abc" / "cat.png").write_bytes(b"picture")
    (tmp_path / "secret.txt").write_text("secret")
    (folder / "link.png").symlink_to(tmp_path / "secret.txt")
    return folder


def ask(uploads, method, path, body=b"", headers=None):
    """(status, what the application behind the guard got to read, or None where it was not asked)."""
    seen, sent = [], []

    async def application(scope, receive, send):
        seen.append((await receive()).get("body", b""))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    pieces = [
        {"type": "http.request", "body": body[:10], "more_body": True},
        {"type": "http.request", "body": body[10:], "more_body": False},
    ]

    async def receive():
        return pieces.pop(0)

    async def send(message):
        sent.append(message)

    if headers is None:
        headers = [(b"content-length", str(len(body)).encode())] if method == "POST" else []
    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(Guard(application, uploads, max_bytes=100_000)(scope, receive, send))
    return sent[0]["status"], seen[0] if seen else None


@pytest.mark.parametrize(
    "path", ["/", "/config", "/theme.css", "/assets/index.js", "/static/img/x.svg", "/gradio_api/heartbeat/abc"]
)
def test_the_page_itself_passes(uploads, path):
    assert ask(uploads, "GET", path)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/proxy=http://127.0.0.1:80/",
        "/gradio_api/run/predict",
        "/gradio_api/call/answer",
        "/gradio_api/info",
        "/gradio_api/startup-events",
        "/gradio_api/deep_link",
        "/monitoring",
        "/login",
        "/docs",
        "/file=/etc/passwd",
        "/assets/../../../../etc/passwd",
        "/static/a/../../x",
    ],
)
def test_nothing_else_does(uploads, path):
    for method in ("GET", "POST", "PUT", "DELETE"):
        assert ask(uploads, method, path) == (404, None)


def test_files_are_uploads_alone(uploads):
    there = f"/gradio_api/file={uploads}/abc/cat.png"
    assert ask(uploads, "GET", there)[0] == 200
    for name in (
        "/etc/passwd",
        f"{uploads}/../secret.txt",
        f"{uploads}/link.png",
        "http://127.0.0.1/cat.png",
        "adav_configs.json",
        "../adav_configs.json",
        "a\0b",
        "x" * 5000,
    ):
        assert ask(uploads, "GET", f"/gradio_api/file={name}") == (403, None), name


def test_a_request_names_uploads_alone(uploads):
    def join(data):
        return ask(uploads, "POST", "/gradio_api/queue/join", json.dumps({"data": data}).encode())

    good = [{"path": f"{uploads}/abc/cat.png", "meta": {"_type": "gradio.FileData"}}, "a path", 58, None]
    assert join(good) == (200, json.dumps({"data": good}).encode())  # whole, though it came in pieces
    for path in (
        "/etc/passwd",
        "http://example.org/cat.png",
        f"{uploads}/../secret.txt",
        f"{uploads}/link.png",
        7,
        ["x"],
    ):
        assert join([{"path": path, "meta": {"_type": "gradio.FileData"}}]) == (403, None), path
        assert join([[{"deep": [{"path": path}]}]]) == (403, None), path
    assert ask(uploads, "POST", "/gradio_api/queue/join", b"no json") == (403, None)


def test_bodies_are_no_larger_than_they_need_to_be(uploads):
    def post(path, length, more=()):
        return ask(uploads, "POST", path, headers=[(b"content-length", str(length).encode()), *more])[0]

    assert post("/gradio_api/upload", 150_000) == 200
    assert post("/gradio_api/upload", 200_000) == 413
    assert post("/gradio_api/queue/join", 150_000) == 413
    assert ask(uploads, "POST", "/gradio_api/upload", headers=[])[0] == 411
    assert post("/gradio_api/upload", 10, [(b"transfer-encoding", b"chunked")]) == 411


def test_no_websockets(uploads):
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(None, uploads, 1)({"type": "websocket", "path": "/"}, None, send))
    assert sent == [{"type": "websocket.close"}]

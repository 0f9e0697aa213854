"""An API server of a tiny model in this process, its clients, and requests for it. Skips where the extras are missing."""

import base64
import json
import threading
from io import BytesIO
from pathlib import Path

import pytest
from serve_cases import wait_for
from tiny_checkpoints import build_reference, make_image, save_llava_hf

from llava.config import AdaVConfig
from llava.serve.service.image_input import ImageLimits
from llava.serve.service.service import Service

EXTRA = "needs the extras of make test-all"
pytest.importorskip("fastapi", reason=EXTRA)
uvicorn = pytest.importorskip("uvicorn", reason=EXTRA)
openai = pytest.importorskip("openai", reason=EXTRA)
httpx = pytest.importorskip("httpx", reason=EXTRA)

from llava.serve.api import listen  # noqa: E402
from llava.serve.openai_api.app import make_app  # noqa: E402
from llava.serve.openai_api.request_body import Server  # noqa: E402

CONFIG = AdaVConfig(method="adav", overall_tokens=20)
MODEL = "tiny"


class Running:
    """A server in this process, on a free port."""

    def __init__(self, service, server, key=None):
        self.service = service
        self.socket = listen("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        app = make_app(service, server, key)
        settings = uvicorn.Config(app, http="h11", ws="none", lifespan="on", log_level="warning", access_log=False)
        self.server = uvicorn.Server(settings)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],), daemon=True)
        self.thread.start()
        wait_for(lambda: self.server.started)
        self.key = key or "none"
        self.connect()

    def connect(self):
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.client = openai.OpenAI(base_url=self.url + "/v1", api_key=self.key, max_retries=0, timeout=60)

    def close(self):
        self.client.close()
        self.http.close()
        self.server.should_exit = True
        self.thread.join(30)
        assert not self.thread.is_alive() and not self.service.alive

    def post(self, body, **options):
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        options = {"headers": {"Content-Type": "application/json"}} | options
        return self.http.post("/v1/chat/completions", content=content, **options)


def make_checkpoint(folder):
    """A random one that never says its end token, so that answers are as long as is asked for."""
    reference = build_reference("llava_next", seed=3)
    reference.lm_head.weight.data[reference.generation_config.eos_token_id] = 0  # some other logit is above 0
    return save_llava_hf(reference, folder / MODEL)


def serve(checkpoint, **settings):
    return Service.load(checkpoint, config=CONFIG, device_map="cpu", **settings)


def run_tiny(folder):
    """A server of a tiny checkpoint, with small limits; images may come from its `folder`, in which a link leads out of it."""
    images = folder / "images"
    images.mkdir()
    make_image(97, 61).save(images / "a.png")
    (images / "out.png").symlink_to(Path(__file__).resolve())
    limits = ImageLimits(max_bytes=100_000, max_pixels=200_000)
    server = Server(MODEL, limits, (images,), max_tokens=6, max_body=400_000, read_seconds=4.0)
    running = Running(serve(make_checkpoint(folder)), server)
    running.folder = images
    yield running
    running.close()


def written(image, kind="PNG"):
    stream = BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def data_url(image):
    return "data:image/png;base64," + base64.b64encode(written(image)).decode()


def user(text, *pictures):
    parts = [{"type": "image_url", "image_url": {"url": data_url(picture)}} for picture in pictures]
    return {"role": "user", "content": [{"type": "text", "text": text}, *parts]}


def body(**changes):
    return {"model": MODEL, "messages": [{"role": "user", "content": "Why?"}], "max_tokens": 3} | changes

"""Hub names where no hub answers: said at once, ended in seconds, and the ways out named; the cache is used where it has them."""

import http.server
import json
import socket
import threading
from contextlib import contextmanager

import pytest
from huggingface_hub import constants

from llava.common import hub
from llava.common.errors import UserError
from llava.common.find_checkpoint import find_checkpoint


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub's library, and no folder that a name could mean."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_ETAG_TIMEOUT", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@contextmanager
def silent_port():
    """An address that takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def refused(name: str) -> str:
    with pytest.raises(UserError) as error:
        find_checkpoint(name)
    return str(error.value)


@pytest.mark.parametrize("endpoint", ["silent", "closed"])
def test_no_answer(cache, monkeypatch, capsys, endpoint):
    monkeypatch.setattr(hub, "PATIENCE", 0.5)
    with silent_port() as silent:
        monkeypatch.setattr(constants, "ENDPOINT", silent if endpoint == "silent" else closed_port())
        said = refused("someone/some-llava")
    assert said.startswith("someone/some-llava: no such folder here") and "cannot be reached" in said
    assert all(way in said for way in ("HF_HUB_OFFLINE=1", "HF_ENDPOINT=", "the path of a folder"))
    assert capsys.readouterr().err == f"someone/some-llava: asking {constants.ENDPOINT} ...\n"


def test_patience_is_a_few_seconds():
    assert hub.PATIENCE <= 3


def test_offline_asks_nobody(cache, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused("someone/some-llava")
    assert capsys.readouterr().err == ""


def test_the_cache_answers_for_a_silent_hub(cache, monkeypatch, capsys):
    snapshot = cache / "models--someone--some-llava" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "llava"}))
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "ENDPOINT", closed_port())
    assert find_checkpoint("someone/some-llava").settings == {"model_type": "llava"}
    assert "the copy in the hub's cache is used" in capsys.readouterr().err


class _NothingHere(http.server.BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802 (the library's name)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


def test_a_hub_that_answers_says_what_is_wrong(cache, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _NothingHere)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert "the hub did not give it" in refused("someone/some-llava")
    finally:
        server.shutdown()


def test_no_name_of_the_hub(cache, capsys):
    assert "no name that the hub can have" in refused("some one/llava--7b")
    assert capsys.readouterr().err == ""


def test_demo_checkpoints_come_with_the_package(cache):
    assert (hub.checkpoint_folder("playground/llava-shapes-v1.5") / "model.safetensors").is_file()

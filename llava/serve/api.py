"""An OpenAI-compatible server for one checkpoint: POST /v1/chat/completions, GET /v1/models, /health and /metrics.

    python -m llava.serve.api --model-path M [--host 127.0.0.1 --port 8000] [--config adav_configs.json] [--method ...]
        [--image-folder DIR ...] [--max-batch 8] [--max-waiting 64] [--max-image-bytes N] [--max-pixels N]
        [--max-body-bytes N] [--api-key-env NAME]

SIGTERM and Ctrl-C finish what is running, refuse what is new, and exit with 0. A second signal, or --shutdown-seconds, ends
the running answers with status 503. Port 0 takes a free one. What is not said by flags or by a request is as in
adav_configs.json.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import sys
import threading
from pathlib import Path

from llava.common.command_line import Parser, add_checkpoint_flags, positive
from llava.common.errors import UserError, exits_cleanly
from llava.common.threads import wait_passively
from llava.config import add_config_flags, config_of_flags
from llava.serve.service.image_input import ImageLimits
from llava.serve.service.listening import listen, port_number, shown_host

LIMITS = (
    "They bound memory and waiting time. --max-batch + --max-waiting requests are accepted at a time: of a hundred at once, the "
    "defaults answer 72 and refuse 28 with status 429, after which a client may try again. --max-batch needs GPU memory for as "
    "many KV caches. The last request that waits does so for --max-waiting / --max-batch batches. If one machine is not enough, "
    "use vLLM. docs/serving.md says how to choose."
)
GRACE = 10  # seconds that connections have to end after their answers were ended


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The parsed command line. UserError for arguments that cannot be used."""
    parser = Parser(prog="python -m llava.serve.api", description=__doc__.split("\n")[0])
    parser.add_argument("--model-path", required=True, help="folder or hub name of a checkpoint")
    add_checkpoint_flags(parser, conversation=False)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=port_number, default=8000)
    parser.add_argument(
        "--image-folder", action="append", default=[], help="requests may name images below it; repeatable"
    )
    limits = parser.add_argument_group("limits", LIMITS)
    limits.add_argument("--max-batch", type=positive, default=8, help="requests that are answered together (8)")
    limits.add_argument("--max-waiting", type=positive, default=64, help="requests that may wait (64); 429 beyond")
    limits.add_argument(
        "--max-tokens", type=positive, default=512, help="of an answer whose request does not say (512)"
    )
    limits.add_argument("--max-prompt-tokens", type=positive, help="of a request (what the model's context holds)")
    limits.add_argument("--max-image-bytes", type=positive, default=ImageLimits().max_bytes)
    limits.add_argument("--max-pixels", type=positive, default=ImageLimits().max_pixels, help="of a request's images")
    limits.add_argument("--max-body-bytes", type=positive, default=32 << 20, help="of a request")
    limits.add_argument(
        "--image-cache-bytes", type=_count, default=256 << 20, help="of encoded images for later requests"
    )
    limits.add_argument("--shutdown-seconds", type=positive, default=60, help="that running answers get to finish (60)")
    parser.add_argument("--api-key-env", help="environment variable with the key that requests must bring")
    add_config_flags(parser)
    return parser.parse_args(argv)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Load the checkpoint and serve it until a signal comes."""
    # 1. Everything that can fail without the checkpoint fails first: loading it may take minutes.
    args = parse(argv)
    wait_passively()
    try:
        serve(args)
    except KeyboardInterrupt:  # while it loads
        sys.exit(130)


def serve(args: argparse.Namespace) -> None:
    """Load the checkpoint and answer requests until a signal ends it."""
    try:
        import uvicorn

        from llava.serve.openai_api.app import make_app
        from llava.serve.openai_api.request_body import Server
    except ImportError as error:
        raise UserError(f"the API needs what `pip install -e .[serve]` installs ({error})") from None
    from llava.mm_utils import get_model_name_from_path
    from llava.serve.service.service import Service

    config = config_of_flags(args)
    folders, key = tuple(map(_folder, args.image_folder)), _key(args.api_key_env)
    # Bound before the checkpoint is loaded, so that a port in use is an error at once.
    listening = listen(args.host, args.port)
    # 2. The service and the app.
    name = get_model_name_from_path(args.model_path)
    service = Service.load(
        args.model_path,
        model_base=args.model_base,
        config=config,
        dtype=args.dtype,
        threads=args.threads,
        max_batch=args.max_batch,
        max_waiting=args.max_waiting,
        max_prompt_tokens=args.max_prompt_tokens,
        image_cache=args.image_cache_bytes,
    )
    limits = ImageLimits(args.max_image_bytes, args.max_pixels)
    app = make_app(service, Server(name, limits, folders, args.max_tokens, args.max_body_bytes), key)

    class Stopping(uvicorn.Server):
        """Tells the service at the first signal, so that what waits is refused while what runs is finished.

        What still runs at the second signal, or when the time is over, ends with an error in the client's shape. uvicorn
        would cancel it in the middle, which gives a traceback here and status 500 there.
        """

        def handle_exit(self, sig, frame) -> None:
            again = self.should_exit
            threading.Thread(target=service.close, args=(not again,), name="llava-closing").start()
            if not again:
                late = threading.Timer(args.shutdown_seconds, service.close, args=(False,))
                late.daemon = True
                late.start()
                super().handle_exit(sig, frame)

    # 3. The server. proxy_headers=False: a client could otherwise claim any address. h11 is the pure Python parser.
    settings = uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=args.shutdown_seconds + GRACE,
    )
    # uvicorn installs its own handlers while it runs, and raises the signals again when it has stopped. These handlers
    # ignore them then, so that the exit code is 0.
    for name_of in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name_of, lambda *_: None)
    host, port = listening.getsockname()[:2]
    print(
        f"{name} ({config.method}, {config.overall_tokens} tokens per image) on http://{shown_host(host)}:{port}/v1",
        flush=True,
    )
    if key is None and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        print("warning: anyone who reaches this address may ask; --api-key-env asks for a key", file=sys.stderr)
    Stopping(settings).run(sockets=[listening])


def _count(text: str) -> int:
    """argparse type of a whole number of at least 0."""
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}, allowed is a whole number of at least 0")
    return int(text)


def _folder(name: str) -> Path:
    """An existing folder as an absolute path without links. Image paths are compared with it in this form."""
    if not Path(name).is_dir():
        raise UserError(f"--image-folder {name}: is no folder")
    return Path(name).resolve()


def _key(variable: str | None) -> str | None:
    """The API key in an environment variable, or None without one. UserError for an empty or non-ASCII key."""
    if variable is None:
        return None
    # From the environment, because arguments of a process are visible to every user of the machine.
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii():
        raise UserError(
            f"--api-key-env {variable}: the environment variable holds no key, allowed are ASCII characters"
        )
    return key


if __name__ == "__main__":
    main()

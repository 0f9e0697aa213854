"""A web page on which pruning can be looked at: answers, kept patches and costs of up to three configurations.

    python -m llava.serve.web [--model-path M] [--port 7860] [limits] [flags of adav_configs.json]

Without --model-path it shows the demo checkpoint. The server listens on 127.0.0.1 unless --host names another address.
Anyone who reaches the port can use it. It needs pip install -e ".[serve]". Ctrl-C or SIGTERM ends it, and deletes the
uploaded files.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

from llava.common.command_line import Parser, positive
from llava.common.errors import UserError, exits_cleanly
from llava.common.threads import wait_passively
from llava.serve.service.image_input import ImageLimits, picture_from_file
from llava.serve.service.listening import listen, port_number, shown_host
from llava.serve.service.start import add_model_flags, checkpoint_of, configuration, limits_of, load, sampling
from llava.serve.web_page.cards import MOST

EXAMPLES = 6
GRACE = 2  # seconds that open connections get when the server ends


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The parsed command line. UserError for arguments that cannot be used."""
    parser = Parser(prog="python -m llava.serve.web", description=__doc__.split("\n")[0])
    add_model_flags(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=port_number, default=7860, help="0 takes a free one (7860)")
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-image-bytes", type=positive, default=ImageLimits.max_bytes, help="(%(default)s)")
    limits.add_argument("--max-image-pixels", type=positive, default=ImageLimits.max_pixels, help="(%(default)s)")
    limits.add_argument("--users", type=positive, default=8, help="questions that are answered at a time (8)")
    limits.add_argument("--queue", type=positive, default=32, help="questions that may wait for that (32)")
    return parser.parse_args(argv)


def draw_examples(several_tiles: bool, folder: Path) -> list[tuple[str, str]]:
    """Draw the first pictures of the demo's test split into a new folder. Returns (path, question) of each.

    The kinds of questions take turns. several_tiles: scenes of the LLaVA-1.6 demo, else of the LLaVA-1.5 demo.
    """
    from PIL import Image

    from llava.shapes.dataset import scene_questions

    folder.mkdir()
    examples = []
    for nth in range(EXAMPLES):
        scene, questions = scene_questions("v1.6" if several_tiles else "v1.5", "test", nth)
        path = folder / f"example-{nth + 1}.png"
        Image.fromarray(scene.pixels).save(path)
        examples.append((str(path), questions[nth % len(questions)].text))
    return examples


def most_tokens(service) -> int:
    """Number of patches of the largest image, which is the largest useful budget."""
    from llava.mm_utils import grid_pinpoints

    config, patches = service.model.model.config, service.model.shape.tile_patches
    if config.image_aspect_ratio != "anyres":
        return patches
    tile = config.mm_tile_size
    return patches * (1 + max((w // tile) * (h // tile) for w, h in grid_pinpoints(config)))


def warm_up(service, example: tuple[str, str], limits: ImageLimits) -> None:
    """Answer one question before the page is open. Otherwise the first visitor's times would include the set-up."""
    from llava.model.decoding.sampling import Sampling
    from llava.serve.service.request import Request, Turn

    path, question = example
    turn = Turn("user", question, (picture_from_file(path, limits),))
    service.submit(Request((turn,), sampling=Sampling(2))).result()


def application(service, args: argparse.Namespace, name: str, several_tiles: bool, uploads: Path):
    """(the ASGI application, which is gradio's behind the guard; the event that ends gradio's open streams).

    uploads: folder of uploaded files; the examples are drawn into it. several_tiles: see draw_examples.
    """
    # 1. The page.
    import gradio
    from fastapi import FastAPI

    from llava.serve.web_page.guard import Guard
    from llava.serve.web_page.page import build_page, page_theme

    limits = ImageLimits(args.max_image_bytes, args.max_image_pixels)
    examples = draw_examples(several_tiles, uploads / "examples")
    warm_up(service, examples[0], limits)
    blocks = build_page(
        service,
        limits,
        sampling(args),
        name=name,
        caveat=limits_of(service.model.tokenizer),
        most_tokens=most_tokens(service),
        examples=examples,
        users=args.users,
        queue=args.queue,
    )
    # 2. The server. What the page does not need is off: API pages, server-side rendering, MCP, PWA.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    gradio.mount_gradio_app(
        app,
        blocks,
        "/",
        footer_links=[],
        run_history=False,
        max_file_size=limits.max_bytes,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        theme=page_theme(),
        css_paths=[Path(__file__).parent / "web_page" / "page.css"],
    )
    # gradio.mount_gradio_app returns the outer app; its own app, with the event, is the route that was added last.
    return Guard(app, uploads, limits.max_bytes), app.routes[-1].app.stop_event


def serve(app, streams, service, bound: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM. Both raise KeyboardInterrupt at the end, so that the caller can clean up.

    streams: the event that ends gradio's open streams. bound: a listening socket.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets=None):
            # Running answers and gradio's streams keep connections open, and uvicorn waits for connections. So both
            # end before uvicorn's own shutdown. close() joins a thread, so it must not run on the event loop.
            await asyncio.to_thread(service.close, finish=False)
            streams.set()
            await super().shutdown(sockets)

    Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE)).run(sockets=[bound])


def _interrupt(*_):
    raise KeyboardInterrupt


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Load the checkpoint and serve the page until a signal comes."""
    # 1. Everything that can fail without the checkpoint fails first.
    args = parse(argv)
    wait_passively()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        run(args)
    except KeyboardInterrupt:
        print("ended", file=sys.stderr)


def run(args: argparse.Namespace) -> None:
    """Load the checkpoint and serve the page until it is interrupted."""
    missing = [name for name in ("gradio", "fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'the page needs {", ".join(missing)}: pip install -e ".[serve]"')
    config, checkpoint = configuration(args), checkpoint_of(args)
    sampling(args)
    bound = listen(args.host, args.port)
    with tempfile.TemporaryDirectory(prefix="adav-page-") as folder:
        # Read by gradio when it is imported: no telemetry, and no file of it outside this folder.
        os.environ.update(
            GRADIO_ANALYTICS_ENABLED="False",
            HF_HUB_DISABLE_TELEMETRY="1",
            GRADIO_TEMP_DIR=folder,
            GRADIO_EXAMPLES_CACHE=folder,
        )
        with load(checkpoint, args, config, max_waiting=MOST * args.users) as service:
            app, streams = application(service, args, checkpoint.short_name, checkpoint.anyres, Path(folder))
            host, port = bound.getsockname()[:2]
            print(f"{checkpoint.short_name} on http://{shown_host(host)}:{port}/ (Ctrl-C ends it)", flush=True)
            serve(app, streams, service, bound)


if __name__ == "__main__":
    main()

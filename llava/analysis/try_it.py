"""Does pruning help me? All methods at three budgets, on your checkpoint, your pictures and your device.

    python -m llava.analysis.try_it --model-path CHECKPOINT --images DIR [--questions FILE] [--budgets 50,25,10]

Per method and budget: how often the answer is the one of all vision tokens, the time to the first token, tokens per
second, and memory. Agreement is no accuracy: an answer that differs may be right. FILE has one question per line, and
each is asked about each picture. The command prints a table and one recommendation, and writes one JSON file to attach
to a bug report. That file has the names of the pictures, the questions and the answers.
Exit codes: 0 done, 1 the decode kernel differs from its reference, 2 bad input (one sentence).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from PIL import Image

from llava.common.command_line import (
    Parser,
    add_checkpoint_flags,
    existing_file,
    existing_folder,
    names,
    percents,
    positive,
)
from llava.common.errors import UserError, exits_cleanly
from llava.common.files import as_user_error_on_write, write_json
from llava.common.machine import code_digest, commit, environment
from llava.common.progress import progress_bar
from llava.common.rounding import floor_share
from llava.common.scatter import REASON, scatters, spread
from llava.common.text_table import markdown_table
from llava.config import AdaVConfig, add_plugin_flag
from llava.conversation import get_conversation
from llava.costs.measure import kv_bytes, predicted
from llava.costs.model_shape import ImageCounts, ModelShape
from llava.eval.runs.image_reader import UnreadableImage, read_image
from llava.eval.scoring.metrics import normal_form
from llava.inference.loaded_checkpoint import LoadedCheckpoint
from llava.kernels.backend import backend_for
from llava.kernels.decode_attention import decode_attention
from llava.methods.index import method_names
from llava.mm_utils import tile_plan
from llava.model.decoding.sampling import Sampling
from llava.model.encoded_images import EncodedImage

QUESTIONS = (
    "What is in the picture? Answer the question using a single word or phrase.",
    "Describe the picture in one sentence.",
)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# A method is recommended if it answers at least this share of the questions as all tokens do.
ENOUGH = 0.9
# max |difference| / max |reference| of the kernel's output, by the dtype of what it reads.
KERNEL_LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@dataclass
class Trial:
    """One configuration over all questions. first: seconds from ready tiles to the first token, per question. rates:
    tokens per second after it, of answers of two tokens or more. kv: bytes of the KV cache at the end. peak: bytes of
    GPU memory, weights included, 0 on a CPU. flops: predicted, to the first token."""

    method: str
    percent: float | None
    config: AdaVConfig
    answers: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    kv: list[int] = field(default_factory=list)
    flops: list[int] = field(default_factory=list)
    peak: int = 0

    def agreement(self, whole: Trial) -> float:
        """Return the share of questions with the same answer as `whole`, in EvalAI's normal form."""
        pairs = zip(self.answers, whole.answers, strict=True)
        return statistics.mean(normal_form(a) == normal_form(b) for a, b in pairs)

    @property
    def first_token(self) -> float:
        return statistics.median(self.first)

    def record(self, whole: Trial) -> dict:
        """Return the trial as it stands in the JSON file."""
        return {
            "method": self.method,
            "budget_percent": self.percent,
            "overall_tokens": self.config.overall_tokens if self.percent else None,
            "agreement": self.agreement(whole),
            "first_token_seconds": self.first_token,
            "first_token_spread": spread([a / b for a, b in zip(self.first, whole.first, strict=True)]),
            "tokens_per_second": statistics.median(self.rates) if self.rates else None,
            "kv_bytes": statistics.mean(self.kv),
            "peak_gpu_bytes": self.peak or None,
            "predicted_flops": statistics.mean(self.flops),
            "answers": self.answers,
        }


def pictures(folder: Path, limit: int) -> list[tuple[str, Image.Image]]:
    """Return (name, picture) of the first readable pictures of a folder. UserError where there is none."""
    found, reason = [], "no file with " + ", ".join(SUFFIXES)
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES):
        if len(found) == limit:
            break
        try:
            found.append((path.name, read_image(path)))
        except UnreadableImage as error:
            reason = f'"{path.name}" cannot be read ({error})'
    if not found:
        raise UserError(f"{folder}: has no picture that can be read, {reason}")
    return found


def questions(path: Path | None) -> list[str]:
    """Return the lines of a question file without blank ones, or two questions that fit every picture."""
    if path is None:
        return list(QUESTIONS)
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a text file ({error})") from None
    if not any(lines):
        raise UserError(f"{path}: holds no question, allowed is one question per line")
    return [line for line in lines if line]


class TryOut:
    """A loaded checkpoint that answers each question under each configuration, in turn."""

    def __init__(self, args: argparse.Namespace, device: str):
        config = AdaVConfig(method="none")
        self.loaded = LoadedCheckpoint(
            args.model_path,
            args.model_base,
            config,
            device=device,
            dtype=args.dtype,
            threads=args.threads,
            purpose="a try-out",
        )
        self.conversation, self.longest = args.conv_mode, args.max_new_tokens
        self.shape = ModelShape.from_config(self.loaded.model.config)

    def full(self, images: list[Image.Image]) -> float:
        """Return the vision tokens of a picture without selection, mean over pictures."""
        return statistics.mean(self._counts(image, AdaVConfig(method="none")).tokens for image in images)

    def _counts(self, image: Image.Image, config: AdaVConfig) -> ImageCounts:
        plan = tile_plan(image.size, self.loaded.model.config, config.option("anyres"))
        return ImageCounts.from_plan(plan, self.shape.side)

    def run(self, trials: list[Trial], asked: list[tuple[Image.Image, str]]) -> None:
        """Answer all questions under all trials. Trials take turns, so that a busy machine slows all of them down."""
        with progress_bar("trials", total=len(trials) * (len(asked) + 1), unit=" answers") as shown:
            for n, (image, question) in enumerate(asked):
                for trial in trials:
                    if n == 0:  # a warm-up that does not count: allocations, kernels and captured graphs
                        self._answer(trial.config, image, question)
                        shown.update()
                    self._note(trial, image, question)
                    shown.update()

    def _note(self, trial: Trial, image: Image.Image, question: str) -> None:
        on_gpu = self.loaded.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.loaded.device)
        prepared, generated, first, rest = self._answer(trial.config, image, question)
        (answer,) = generated.answers
        costs = predicted(
            prepared, [self._counts(image, trial.config)] * len(prepared.image_spans[0]), self.shape, trial.config
        )
        (memory,) = kv_bytes(generated.cache, costs, [len(answer.tokens)])
        trial.answers.append(answer.text.strip())
        trial.first.append(first)
        trial.kv.append(memory["kv_bytes_live"])
        trial.flops.append(costs[0].total)
        if len(answer.tokens) > 1 and rest > 0:
            trial.rates.append((len(answer.tokens) - 1) / rest)
        if on_gpu:
            trial.peak = max(trial.peak, torch.cuda.max_memory_allocated(self.loaded.device))

    @torch.inference_mode()
    def _answer(self, config: AdaVConfig, image: Image.Image, question: str):
        """Return (prompt, generation, seconds from ready tiles to the first token, seconds of all further tokens)."""
        pixels = self.loaded.pixels(image, config)
        start = self._now()
        encoded: list[EncodedImage] = self.loaded.encode([pixels], config)
        prepared = self.loaded.splice([question], [encoded], config, self.conversation)
        generation = self.loaded.engine.stream(prepared, Sampling(self.longest))
        next(generation)
        first = self._now()
        for _ in generation:
            pass
        return prepared, generation.result(), first - start, self._now() - first

    def _now(self) -> float:
        """The time in seconds after all work on the device has finished. CUDA kernels run asynchronously."""
        if self.loaded.device.type == "cuda":
            torch.cuda.synchronize(self.loaded.device)
        return time.perf_counter()

    def kernel(self) -> dict:
        """Return the decode kernel's largest error against its reference in float32, at the sizes of this model."""
        dtype, device = self.loaded.model.dtype, self.loaded.device
        draw = torch.Generator().manual_seed(0)
        heads, groups, width, slots = self.shape.heads, self.shape.kv_heads, self.shape.head, 700
        q = torch.randn(1, heads, width, generator=draw).to(device, dtype)
        k, v = (torch.randn(1, groups, slots, width, generator=draw).to(device, dtype) for _ in range(2))
        free = 35 + torch.randperm(slots - 35, generator=draw).int().to(device)
        core, text = free[None, :200].contiguous(), free[200:260].expand(1, groups, 60).contiguous()
        lengths = (torch.tensor([35]), torch.tensor([200]), torch.full((1, groups), 60))
        prefix_len, core_len, text_len = (length.int().to(device) for length in lengths)
        listed = (prefix_len, core, core_len, text, text_len)
        # On a CPU the reference itself runs, and the check says nothing; the JSON file names the implementation.
        ours = decode_attention(q, k, v, *listed).out.float()
        right = decode_attention(q.float(), k.float(), v.float(), *listed, backend="reference").out
        error = float((ours - right).abs().max() / right.abs().max())
        limit = KERNEL_LIMITS[dtype]
        return {"backend": backend_for(q), "error": error, "limit": limit, "passed": error <= limit}


def trials(methods: list[str], budgets: list[float], full: float) -> list[Trial]:
    """Return all trials: `none` first, then every method at every budget."""
    found = [Trial("none", None, AdaVConfig(method="none"))]
    for method in methods:
        for percent in budgets:
            tokens = max(1, floor_share(percent / 100, full))
            found.append(Trial(method, percent, AdaVConfig(method=method, overall_tokens=tokens)))
    return found


def recommendation(done: list[Trial]) -> str:
    """Return one sentence: the fastest trial that agrees often enough with all tokens and is faster than they are."""
    whole, asked = done[0], len(done[0].answers)
    faster = [t for t in done[1:] if t.first_token < whole.first_token]
    good = [t for t in faster if t.agreement(whole) >= ENOUGH]
    if good:
        best = min(good, key=lambda t: t.first_token)
        gain = whole.first_token / best.first_token
        return (
            f"Recommended: --method {best.method} --overall-tokens {best.config.overall_tokens}: the same answer as all tokens "
            f"on {100 * best.agreement(whole):.0f} % of {asked} questions, the first token {gain:.1f} times as fast."
        )
    if not faster:
        return "Recommended: --method none: no method gave the first token sooner on this device."
    best = max(faster, key=lambda t: (t.agreement(whole), -t.first_token))
    return (
        f"Recommended: --method none: no faster method gave the answer of all tokens on {100 * ENOUGH:.0f} % of {asked} "
        f"questions (the nearest: {best.method} at {best.percent:g} %, {100 * best.agreement(whole):.0f} %)."
    )


def lines_of(records: list[dict]) -> Iterator[tuple[str, ...]]:
    """Yield the lines of the table."""
    yield ("method", "budget", "same answer", "first token", "tokens/s", "KV cache", "GPU memory", "GFLOPs")
    for row in records:
        mark = " *" if scatters(row["first_token_spread"]) else ""
        rate, peak = row["tokens_per_second"], row["peak_gpu_bytes"]
        yield (
            row["method"],
            "all" if row["budget_percent"] is None else f"{row['budget_percent']:g} %",
            f"{100 * row['agreement']:.0f} %",
            f"{1000 * row['first_token_seconds']:.1f} ms{mark}",
            "-" if rate is None else f"{rate:.1f}",
            f"{row['kv_bytes'] / 1e6:.2f} MB",
            "-" if peak is None else f"{peak / 1e9:.2f} GB",
            f"{row['predicted_flops'] / 1e9:,.1f}",
        )


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava.analysis.try_it", description=__doc__.split("\n")[0])
    parser.add_argument("--model-path", required=True, help="folder or hub name, in either format")
    add_checkpoint_flags(parser)
    parser.add_argument("--images", type=existing_folder, required=True, help="folder of pictures")
    parser.add_argument("--questions", type=existing_file, help="one question per line (default: two general ones)")
    parser.add_argument("--limit", type=positive, default=8, help="only the first N pictures (8)")
    parser.add_argument("--methods", type=names, help="default: all that have a budget")
    parser.add_argument("--budgets", type=percents, default="50,25,10", help="%% of the vision tokens (50,25,10)")
    parser.add_argument("--max-new-tokens", type=positive, default=32, help="limit of an answer (32)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--output", type=Path, default=Path("try_it.json"), help="the JSON file (try_it.json)")
    add_plugin_flag(parser)
    args = parser.parse_args(argv)
    known = [name for name in method_names() if name not in ("none", "no_image")]
    for name in args.methods or []:
        if name not in known:
            raise UserError(f'--methods: "{name}" is no method with a budget, allowed are {", ".join(known)}')
    args.methods = args.methods or known
    if args.conv_mode is not None:
        get_conversation(args.conv_mode)
    return args


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    transformers.logging.set_verbosity_error()
    # 1. Input, before the checkpoint is loaded.
    shown, texts = pictures(args.images, args.limit), questions(args.questions)
    asked = [(image, text) for _, image in shown for text in texts]
    # 2. All trials.
    out = TryOut(args, args.device)
    done = trials(args.methods, args.budgets, out.full([image for _, image in shown]))
    kernel = out.kernel()
    out.run(done, asked)
    # 3. The result.
    records, said = [trial.record(done[0]) for trial in done], recommendation(done)
    print(
        f"{args.model_path}, {len(shown)} pictures x {len(texts)} questions\n\n{markdown_table(list(lines_of(records)))}\n"
    )
    if any(scatters(row["first_token_spread"]) for row in records):
        print(f"* {REASON}.")
    checked = (
        f"largest error {kernel['error']:.1e}, allowed is {kernel['limit']:g}: {'PASS' if kernel['passed'] else 'FAIL'}"
    )
    print(f"Decode kernel ({kernel['backend']}): {checked}")
    print("The times are from ready tiles on, one request at a time. GFLOPs are predicted. Agreement is no accuracy.")
    print(said)
    with as_user_error_on_write(args.output):
        write_json(
            args.output,
            {
                "checkpoint": args.model_path,
                "model": asdict(out.shape),
                "device": str(out.loaded.device),
                "gpu": torch.cuda.get_device_name(out.loaded.device) if out.loaded.device.type == "cuda" else None,
                "dtype": str(out.loaded.model.dtype).removeprefix("torch."),
                "environment": environment(),
                "commit": commit(),
                "code": code_digest(),
                "pictures": [{"name": name, "size": image.size} for name, image in shown],
                "questions": texts,
                "kernel": kernel,
                "trials": records,
                "recommendation": said,
            },
        )
    print(args.output)
    return 0 if kernel["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())

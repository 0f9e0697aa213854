"""Questions per second of an evaluation: this repository's engine, vLLM, and the loop that forks of LLaVA are made of.

    python benchmarks/eval_throughput.py [--checkpoint playground/llava-shapes-v1.6] [--tokens 58] [--each 1 4 8 16]
        [--providers upstream,plain,own_adav] [--pictures 16] [--repeats 5] [--threads 1] [--device cuda] [--output FILE.csv]
    python benchmarks/eval_throughput.py --table FILE.csv [FILE.csv ...]      # put tables of results into docs/serving.md

All providers run in one process. With vLLM among them that is the Python of vLLM's workers ($VLLM_PYTHON, else .venv-vllm,
`make vllm`), which the command changes to by itself; without such a Python, vLLM is left out. `own` and `vllm` are the
workers llava.eval.runs.answer_shard and answer_on_vllm, as the launcher starts them, at their default batch sizes. vLLM with
all tokens is the worker with the method `none`.

The upstream loop is our own code that does the same work as the published one. It takes one question at a time. It decodes
the image and cuts it into tiles. The vision tower runs all of its layers with eager attention and returns the attention map
of each layer (`output_attentions=True`). Then `generate` runs at batch 1. It chooses tokens by our selectors.

The pictures are the demo's, with some questions each (POPE has 18 per picture, GQA 30, MME 2). Loading is not counted. The
providers take turns in every repetition, so that a machine that slows down slows all of them. All stores are empty at the
start of each repetition, so a repetition shares what its own questions share. Figures are medians. A provider whose answers
differ from one repetition to the next gives no figure, nor do upstream and own_adav where theirs differ from each other (in
half precision, in more than 5 % of the answers).
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import replace
from importlib.metadata import packages_distributions, version
from pathlib import Path

import torch
from page import made, number, put_results, share
from PIL import Image
from questions import make_questions
from record import RESULTS, how, pick, write_csv
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers import logging as transformers_logging

from llava.common.command_line import Parser, names, positive
from llava.common.errors import UserError, exits_cleanly
from llava.common.files import REPOSITORY
from llava.common.find_checkpoint import EvalCheckpoint, find_checkpoint
from llava.common.progress import progress_bar
from llava.common.text_table import columns, markdown_table
from llava.common.threads import is_small, wait_policy
from llava.config import AdaVConfig
from llava.conversation import default_conv_mode, single_turn
from llava.eval.runs.answer_shard import ShardAnswerer
from llava.eval.runs.answerer import Answerer
from llava.eval.runs.engines import worker_python
from llava.eval.runs.exported import Exported
from llava.eval.runs.run import BATCH_SIZES
from llava.eval.runs.shard_count import default_batch_size
from llava.eval.runs.work_order import Generation, OrderedSample, WorkOrder
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

DOCUMENT = REPOSITORY / "docs" / "serving.md"
CHECKPOINT = REPOSITORY / "playground" / "llava-shapes-v1.6"
MAX_NEW_TOKENS = 8
# name -> (what tables call it, engine, method)
PROVIDERS = {
    "upstream": ("upstream loop, adav", "upstream", "adav"),
    "plain": ("vLLM", "vllm", "none"),
    "vllm_fastervlm": ("vLLM + fastervlm", "vllm", "fastervlm"),
    "vllm_adav": ("vLLM + adav", "vllm", "adav"),
    "vllm_zoom": ("vLLM + adav_zoom", "vllm", "adav_zoom"),
    "own_none": ("own engine", "llava", "none"),
    "own_fastervlm": ("own engine + fastervlm", "llava", "fastervlm"),
    "own_adav": ("own engine + adav", "llava", "adav"),
}
# Share of answers that may differ in half precision, because a batch sums in another order than a single question.
OTHER_ANSWERS = 0.05


class EagerTower(torch.nn.Module):
    """The vision tower as upstream runs it: all layers, eager attention, all maps returned.

    It has the weights of `tower`. Our tower has no layers after the one whose features are used, so the later layers
    here have random weights. Their output is not used, here and upstream.
    """

    def __init__(self, tower: CLIPVisionTower, whole: CLIPVisionConfig):
        super().__init__()
        config = copy.deepcopy(whole)
        config._attn_implementation = "eager"
        self.model = CLIPVisionModel(config).eval()
        missing, unexpected = self.model.load_state_dict(tower.vision_tower.state_dict(), strict=False)
        above = f"encoder.layers.{tower.config.num_hidden_layers}."
        assert not unexpected and all(name.startswith(above) or "post_layernorm" in name for name in missing), missing
        self.num_patches_per_side, self.layer = tower.num_patches_per_side, tower.config.num_hidden_layers

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, pixel_values, wanted=()):
        out = self.model(pixel_values, output_hidden_states=True, output_attentions=True)
        assert len(out.attentions) == self.model.config.num_hidden_layers
        rows = out.attentions[self.layer - 1][:, :, 0, 1:].float()
        return out.hidden_states[self.layer][:, 1:], rows.mean(dim=1), {}


class Upstream:
    """The upstream loop: one question at a time, and nothing is shared between questions."""

    def __init__(self, spec: WorkOrder):
        self.shard, self.spec, self.config = ShardAnswerer(spec), spec, spec.config
        self.tower = EagerTower(self.shard.model.get_vision_tower(), self.shard.model.config.vision)
        self.tower.to(self.shard.device, self.shard.model.dtype)
        self.llm_seconds = 0.0

    @contextlib.contextmanager
    def _eager(self):
        model = self.shard.model.model
        ours, model.vision_tower = model.vision_tower, self.tower
        try:
            yield
        finally:
            model.vision_tower = ours

    @torch.inference_mode()
    def run(self, file: Path) -> list[str]:
        shard, answers = self.shard, []
        conversation = default_conv_mode(shard.model.config, shard.tokenizer)
        with self._eager(), open(file, "w") as out:
            for sample in self.spec.samples:
                image = Image.open(self.spec.image_folder / sample.images[0]).convert("RGB")
                pixels = process_images([image], shard.image_processor, shard.model.config)
                pixels = [one.to(shard.device, shard.model.dtype) for one in pixels]
                prompt = single_turn(conversation, "<image>\n" + sample.prompt)
                ids = tokenizer_image_token(prompt, shard.tokenizer, return_tensors="pt")[None].to(shard.device)
                prepared = shard.model.prepare(ids, pixels, [image.size], config=self.config)
                # Only generate() is the LLM's time: prepare() has the tower and the selection.
                start = time.perf_counter()
                output = shard.model.generate(
                    prepared=prepared,
                    do_sample=False,
                    num_beams=1,
                    max_new_tokens=self.spec.generation.max_new_tokens,
                    pad_token_id=shard.engine.pad,
                )
                self.llm_seconds += time.perf_counter() - start
                answers.append(shard.tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip())
                out.write(json.dumps({"key": list(sample.key), "text": answers[-1]}) + "\n")
                out.flush()  # after every question, so that a stopped run keeps its answers
        return answers


class Worker:
    """A worker of this repository's evaluation. llm_seconds: None where the worker does not measure them (vLLM)."""

    def __init__(self, answerer: Answerer, spec: WorkOrder):
        self.answerer, self.spec = answerer, spec
        self.llm_seconds: float | None = 0.0

    def run(self, file: Path) -> list[str]:
        self.answerer.run(replace(self.spec, answers=file), threading.Event())
        rows = {tuple(row["key"]): row for row in map(json.loads, file.read_text().splitlines())}
        if all("seconds" in row for row in rows.values()):
            self.llm_seconds += sum(row["seconds"][stage] for row in rows.values() for stage in ("prefill", "decode"))
        else:
            self.llm_seconds = None
        return [rows[sample.key]["answer"] for sample in self.spec.samples]


def load(name: str, checkpoint: EvalCheckpoint, order: WorkOrder, budget: dict) -> Upstream | Worker:
    """Start a provider. order: its samples and settings, without configuration, batch size and vLLM's folder."""
    _, engine, method = PROVIDERS[name]
    order = replace(order, config=AdaVConfig(method=method, **budget))
    if engine == "upstream":
        return Upstream(order)
    if engine == "llava":
        small = order.generation.device == "cpu" and is_small(checkpoint.parameters)
        order = replace(order, batch_size=default_batch_size(engine, small, checkpoint.anyres, order.config))
        return Worker(ShardAnswerer(order), order)
    from llava.eval.runs.answer_on_vllm import VllmAnswerer

    exported = Exported(checkpoint, None, RESULTS.parent)
    exported.write()
    order = replace(order, batch_size=BATCH_SIZES[engine], for_vllm=str(exported.folder))
    return Worker(VllmAnswerer(order), order)


def measure(loops: dict, repeats: int, folder: Path, may_differ: float = 0.0) -> dict[str, list[float]]:
    """Seconds of every repetition per provider, after one repetition that warms up.

    Exits if more than the share `may_differ` of the answers differ where they should be the same (see above).
    """

    def check(one: list[str], other: list[str], what: str) -> None:
        differ = sum(a != b for a, b in zip(one, other, strict=True))
        if differ > may_differ * len(one):
            sys.exit(f"{differ} of {len(one)} answers differ between {what}, so no figure is given")

    warm = progress_bar("warming up", loops.items(), unit=" providers")
    answers = {name: loop.run(folder / f"{name}-warm.jsonl") for name, loop in warm}
    if {"upstream", "own_adav"} <= answers.keys():
        check(answers["upstream"], answers["own_adav"], "upstream and own_adav")
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop.llm_seconds = 0.0
    for repeat in progress_bar("measuring", range(repeats), unit=" repetitions"):
        for name, loop in loops.items():
            start = time.perf_counter()
            again = loop.run(folder / f"{name}-{repeat}.jsonl")
            seconds[name].append(time.perf_counter() - start)
            check(again, answers[name], f"two repetitions of {name}")
    return seconds


def rows_of(seconds: dict[str, list[float]], loops: dict, questions: int) -> list[dict]:
    """One row per provider. of_plain, of_upstream: ratios of the medians. llm_share: the LLM's share of the time."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = []
    for name, times in seconds.items():
        what, _, method = PROVIDERS[name]
        row = {
            "provider": name,
            "what": what,
            "overall_tokens": None if method == "none" else loops[name].spec.config.overall_tokens,
            "batch_size": loops[name].spec.batch_size,
            "questions_per_second": round(questions / medians[name], 3),
            "questions_per_second_min": round(questions / max(times), 3),
            "questions_per_second_max": round(questions / min(times), 3),
        }
        for base in ("plain", "upstream"):
            row[f"of_{base}"] = round(medians[base] / medians[name], 3) if base in medians else None
        llm = loops[name].llm_seconds
        rows.append(row | {"llm_share": None if llm is None else round(llm / sum(times), 3)})
    return rows


def lines_of(rows: list[dict]) -> list[tuple[str, ...]]:
    head = ("provider", "vision tokens", "questions/s", "slowest", "fastest", "of vLLM", "of upstream", "in the LLM")
    lines = [("questions per picture", *head)]
    for row in rows:
        tokens = "all" if row["overall_tokens"] is None else number(row["overall_tokens"])
        speeds = (number(row[f"questions_per_second{end}"], 1) for end in ("", "_min", "_max"))
        ratios = (number(row[name], 2) for name in ("of_plain", "of_upstream"))
        each = number(row["questions_per_picture"])
        lines.append((each, row["what"], tokens, *speeds, *ratios, share(row["llm_share"])))
    return lines


def fill(document: Path, results: list[Path]) -> None:
    """Put the tables of `results` into `document`, one after another, between the marks `eval_throughput`."""

    def table(rows: list[dict]) -> str:
        return f"{rows[0]['preset']}. {made(rows)}.\n\n{markdown_table(lines_of(rows))}"

    put_results(document, "eval_throughput", results, "of_plain", table)


def chosen(asked: list[str] | None, argv: list[str]) -> list[str]:
    """Return the providers to measure. Changes to the Python that has vLLM, if one is asked for and this has none."""
    if unknown := set(asked or []) - set(PROVIDERS):
        raise UserError(f'--providers has "{min(unknown)}", allowed are {", ".join(PROVIDERS)}')
    wanted = [name for name in PROVIDERS if asked is None or name in asked]
    if "vllm" in packages_distributions() or not any(PROVIDERS[name][1] == "vllm" for name in wanted):
        return wanted
    python = worker_python("vllm")
    if python != sys.executable:
        paths = filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")])
        os.execve(python, [python, __file__, *argv], os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
    if asked is not None:
        raise UserError(f"{python}: has no vLLM, which --providers asks for; make vllm installs it into .venv-vllm")
    print("note: no Python with vLLM is there (make vllm), so vLLM is left out", file=sys.stderr)
    return [name for name in wanted if PROVIDERS[name][1] != "vllm"]


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python benchmarks/eval_throughput.py", description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", default=str(CHECKPOINT), help="folder or hub name (the demo's v1.6)")
    parser.add_argument("--tokens", type=positive, help="vision tokens per image; default: that of adav_configs.json")
    parser.add_argument("--providers", type=names, help=f"of {', '.join(PROVIDERS)} (all)")
    parser.add_argument("--pictures", type=positive, default=16)
    parser.add_argument(
        "--each", type=positive, nargs="+", default=[1, 4, 8, 16], help="questions per picture (1 4 8 16)"
    )
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--threads", type=positive, default=1, help="CPU threads of every provider (1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on a GPU")
    parser.add_argument(
        "--output", type=Path, help="default: runs/benchmarks/eval_throughput-<checkpoint>-<device>.csv"
    )
    parser.add_argument("--table", type=Path, nargs="+", metavar="CSV", help="measure nothing: fill --document")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="default: docs/serving.md")
    args = parser.parse_args(argv)
    if args.table:
        fill(args.document, args.table)
        return
    args.given = sys.argv[1:] if argv is None else argv
    providers = chosen(args.providers, args.given)
    # 1. The same number of threads for all. vLLM and LoadedCheckpoint read the variable.
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "OMP_WAIT_POLICY": wait_policy()}
    torch.set_num_threads(args.threads)
    args.device, args.dtype = pick(args.device, args.dtype)
    transformers_logging.set_verbosity_error()
    checkpoint = find_checkpoint(args.checkpoint)
    args.preset = checkpoint.short_name
    args.output = args.output or RESULTS / f"eval_throughput-{args.preset}-{args.device}.csv"
    # 2. Pictures and providers, in a folder that is removed afterwards. The first set of questions loads the providers.
    budget = {"overall_tokens": args.tokens} if args.tokens else {}
    facts = {"pictures": args.pictures, "vllm": None, **how(args, "eval_throughput.py", args.device)}
    if vllm := packages_distributions().get("vllm"):
        facts["vllm"] = version(vllm[0])  # its package may have another name
    rows, loops = [], {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for each in args.each:
            samples = _questions(folder, checkpoint, args.pictures, each)
            if not loops:
                generation = Generation(MAX_NEW_TOKENS, dtype=args.dtype, device=args.device)
                order = WorkOrder(
                    *(str(checkpoint.folder), None, AdaVConfig(), generation, 1, folder),
                    *(folder / "answers.jsonl", samples),
                )
                loops = {one: load(one, checkpoint, order, budget) for one in providers}
            for loop in loops.values():
                loop.spec = replace(loop.spec, samples=samples)
            seconds = measure(loops, args.repeats, folder, 0.0 if args.dtype == "float32" else OTHER_ANSWERS)
            counts = {"questions_per_picture": each, "questions": len(samples)}
            rows += [{**counts, **row} for row in rows_of(seconds, loops, len(samples))]
            # Written after each number of questions, so that an interruption keeps the finished ones.
            write_csv(args.output, rows, facts)
    print(
        f"{columns(lines_of(rows))}\n\n{facts['device']}, {facts['threads']} threads, medians of {args.repeats}; {args.output}"
    )


def _questions(folder: Path, checkpoint: EvalCheckpoint, pictures: int, each: int) -> tuple[OrderedSample, ...]:
    """Draw the pictures into `folder` and return the samples about them."""
    return tuple(make_questions(folder, "v1.6" if checkpoint.anyres else "v1.5", pictures, each))


if __name__ == "__main__":
    main()

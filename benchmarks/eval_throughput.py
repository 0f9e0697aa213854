"""Questions per second: the worker at its defaults against the loop that evaluations of LLaVA forks are made of.

    python benchmarks/eval_throughput.py [--pictures 8] [--tokens K] [--repeats 5] [--device cuda] [--output FILE.csv]

The upstream loop here is our own code that does the same work. It takes one question at a time. It decodes the image
and cuts it into tiles. The vision tower runs all of its layers with eager attention and returns the attention map of
each layer (`output_attentions=True`). Then `generate` runs at batch 1. The worker is llava.eval.runs.answer_shard as
the launcher starts it: batches, each picture decoded and encoded once for all its questions, SDPA, and one [CLS] row.
Both loops choose tokens by the same code and configuration, both write one answer line per question, and neither counts
loading.

The pictures are the demo's, with eight questions each (POPE has 18 per picture, GQA 30, MME 2). The answers must be the
same (in half precision, 95 % of them), else no figure is given. The loops take turns in every repetition, so that a
machine that slows down slows both. Figures are medians.

What limits the ratio: tokens are selected per question, so questions cannot share the LLM's prefill. They share only
the work before it. On a CPU, matrix products are at full speed at batch 1 already, so a batch does not make prefill
cheaper. llm_share is the LLM's share of a loop's time.
"""

from __future__ import annotations

import contextlib
import copy
import json
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from questions import make_questions
from record import RESULTS, how, pick, write_csv
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers import logging as transformers_logging

from llava.common.command_line import Parser, positive
from llava.common.errors import exits_cleanly
from llava.common.files import REPOSITORY
from llava.common.progress import progress_bar
from llava.common.text_table import columns
from llava.config import AdaVConfig
from llava.conversation import default_conv_mode, single_turn
from llava.eval.runs.answer_shard import ShardAnswerer
from llava.eval.runs.run import BATCH_SIZE
from llava.eval.runs.work_order import Generation, WorkOrder
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

CHECKPOINT = REPOSITORY / "playground" / "llava-shapes-v1.6"
FAMILY, PER_PICTURE, MAX_NEW_TOKENS = "v1.6", 8, 2
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

    def __init__(self, shard: ShardAnswerer, tower: EagerTower, spec: WorkOrder):
        self.shard, self.tower, self.spec = shard, tower, spec
        self.config = spec.config
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
                image = Image.open(self.spec.image_folder / sample.image).convert("RGB")
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
    """The worker of this repository's evaluation."""

    def __init__(self, shard: ShardAnswerer, spec: WorkOrder):
        self.shard, self.spec = shard, spec
        self.llm_seconds = 0.0

    def run(self, file: Path) -> list[str]:
        self.shard.run(replace(self.spec, answers=file), threading.Event())
        rows = {tuple(row["key"]): row for row in map(json.loads, file.read_text().splitlines())}
        self.llm_seconds += sum(row["seconds"][stage] for row in rows.values() for stage in ("prefill", "decode"))
        return [rows[sample.key]["answer"] for sample in self.spec.samples]


def measure(loops: dict, repeats: int, folder: Path, may_differ: float = 0.0) -> dict[str, list[float]]:
    """Seconds of every repetition per loop, after one repetition that warms up.

    Exits if more than the share `may_differ` of the answers differ, because the loops would not do the same work.
    """
    warm = progress_bar("warming up", loops.items(), unit=" loops")
    answers = {name: loop.run(folder / f"{name}-warm.jsonl") for name, loop in warm}
    first, *others = answers.values()
    for other in others:
        differ = sum(a != b for a, b in zip(first, other, strict=True))
        if differ > may_differ * len(first):
            sys.exit(f"{differ} of {len(first)} answers differ between {' and '.join(answers)}, so no figure is given")
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop.llm_seconds = 0.0
    for repeat in progress_bar("measuring", range(repeats), unit=" repetitions"):
        for name, loop in loops.items():
            start = time.perf_counter()
            again = loop.run(folder / f"{name}-{repeat}.jsonl")
            seconds[name].append(time.perf_counter() - start)
            differ = sum(a != b for a, b in zip(again, first, strict=True))
            if differ > may_differ * len(first):
                sys.exit(f"{name} answers otherwise in repetition {repeat + 1}, so no figure is given")
    return seconds


def rows_of(seconds: dict[str, list[float]], loops: dict, questions: int) -> list[dict]:
    """One row per loop, `upstream` first. of_upstream: ratio of the medians. llm_share: the LLM's share of the time."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        {
            "loop": name,
            "questions_per_second": round(questions / medians[name], 3),
            "questions_per_second_min": round(questions / max(times), 3),
            "questions_per_second_max": round(questions / min(times), 3),
            "of_upstream": round(medians["upstream"] / medians[name], 3),
            "llm_share": round(loops[name].llm_seconds / sum(times), 3),
        }
        for name, times in seconds.items()
    ]


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python benchmarks/eval_throughput.py", description=__doc__.split("\n")[0])
    parser.add_argument("--pictures", type=positive, default=8, help=f"{PER_PICTURE} questions each (8)")
    parser.add_argument("--tokens", type=positive, help="vision tokens per image; default: that of adav_configs.json")
    parser.add_argument("--repeats", type=positive, default=5)
    parser.add_argument("--batch-size", type=positive, default=BATCH_SIZE, help=f"of the worker ({BATCH_SIZE})")
    parser.add_argument("--threads", type=positive, help="CPU threads; default: torch's own choice")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the GPU where there is one")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on a GPU")
    parser.add_argument("--output", type=Path, help="default: runs/benchmarks/eval_throughput-<device>.csv")
    args = parser.parse_args(argv)
    args.given, args.preset = sys.argv[1:] if argv is None else argv, CHECKPOINT.name
    args.device, args.dtype = pick(args.device, args.dtype)
    args.output = args.output or RESULTS / f"eval_throughput-{args.device}.csv"
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    # 2. Pictures, model and both loops, in a folder that is removed afterwards.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = make_questions(folder, FAMILY, args.pictures, PER_PICTURE)
        budget = {"overall_tokens": args.tokens} if args.tokens else {}
        config = AdaVConfig.load(REPOSITORY / "adav_configs.json", **budget)
        generation = Generation(MAX_NEW_TOKENS, dtype=args.dtype, device=args.device)
        answers = folder / "answers.jsonl"
        spec = WorkOrder(str(CHECKPOINT), None, config, generation, args.batch_size, folder, answers, tuple(samples))
        shard = ShardAnswerer(spec)
        tower = EagerTower(shard.model.get_vision_tower(), shard.model.config.vision)
        tower.to(shard.device, shard.model.dtype)
        loops = {"upstream": Upstream(shard, tower, spec), "worker": Worker(shard, spec)}
        seconds = measure(loops, args.repeats, folder, 0.0 if args.dtype == "float32" else OTHER_ANSWERS)
        rows = rows_of(seconds, loops, len(samples))
    # 3. Write and print.
    made = {
        "checkpoint": CHECKPOINT.name,
        "method": config.method,
        "overall_tokens": config.overall_tokens,
        "pictures": args.pictures,
        "questions": len(samples),
        "batch_size": args.batch_size,
        **how(args, "eval_throughput.py", args.device),
    }
    write_csv(args.output, rows, made)
    lines = [("loop", "questions/s", "slowest", "fastest", "of upstream", "in the LLM")]
    for row in rows:
        speeds = (f"{row[f'questions_per_second{end}']:.1f}" for end in ("", "_min", "_max"))
        lines.append((row["loop"], *speeds, f"{row['of_upstream']:.2f}", f"{row['llm_share']:.0%}"))
    print(f"{columns(lines)}\n\n{made['device']}, {made['threads']} threads, medians of {args.repeats}; {args.output}")


if __name__ == "__main__":
    main()

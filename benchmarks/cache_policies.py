"""What the cache policies change on the demo checkpoints, alone and behind AdaV.

    python benchmarks/cache_policies.py [--questions 200]

An answer of the demo benchmark is one token, and the first token comes out of prefill, where a cache policy has no say:
the benchmark's own accuracy is the same under every policy. Measured instead, on the same questions:

accuracy_fed   the prompt up to the end of its image is prefilled, the question and the assistant's cue are fed token by
               token through the cache, and the answer is read after the last of them. Under `full` that is the benchmark's
               accuracy. The policy has to choose what to evict before it has seen a word of the question: the hardest case.
changed_fed    share of those answers that are not the answer under `full`
agreement      the whole prompt is prefilled, and 64 tokens that `full` generated, past the end of the answer, are fed
               whatever the policy would have said: share of steps at which it would have said the same
kl             mean over those steps of the Kullback-Leibler divergence from `full`'s distribution, in nats
kv_stored, kv_read  bytes after the 64 steps, and read per step in the mean, as shares of `full`'s

Writes benchmarks/results/cache-policies-demo.csv and prints it as a table.
"""

import argparse
import csv
import dataclasses
import platform
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from record import RESULTS
from torch.nn.functional import kl_div, log_softmax

from llava.common.command_line import positive
from llava.common.errors import UserError, exits_cleanly
from llava.common.find_checkpoint import find_checkpoint
from llava.common.machine import commit
from llava.common.progress import progress_bar
from llava.common.text_table import markdown_table
from llava.config import AdaVConfig
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.runs.image_reader import read_image
from llava.eval.runs.run import DATA_ROOT, Run
from llava.eval.runs.work_order import Generation
from llava.inference.loaded_checkpoint import LoadedCheckpoint
from llava.methods.kv_cache.base import RowSpans
from llava.model.decoding.adaptive_cache import Caching
from llava.model.decoding.cache_argument import CACHE
from llava.model.decoding.prepared import PreparedPrompt

ROOT = Path(__file__).resolve().parent.parent
STEPS, BATCH = 64, 20
# AdaV keeps a quarter of the tokens.
CHECKPOINTS = {"playground/llava-shapes-v1.5": 36, "playground/llava-shapes-v1.6": 135}


def avl(rate, compute_rate):
    """Configuration keys of A-VL with these shares of vision entries that are stored and read."""
    return {
        "vision_adaptive_attention": True,
        "vision_adaptive_attention_rate": rate,
        "vision_adaptive_attention_compute_rate": compute_rate,
        "text_pruning_flag": True,
    }


POLICIES = {
    "full": {},
    "avl 0.5 / 0.7": avl(0.5, 0.7),
    "avl 0.8 / 0.9": avl(0.8, 0.9),
    "h2o 50 %": {"all_use_h2o": True},
    "h2o 20 %": {"h2o_heavy_share": 0.1, "h2o_recent_share": 0.1},
}


def up_to_the_image(prepared: PreparedPrompt) -> tuple[PreparedPrompt, torch.Tensor, torch.Tensor]:
    """Prompts that are cut behind their images: (cut prompts, rest [B, R, D] right-padded, lengths of the rest [B]).

    R is the length of the longest rest. Each row must have exactly one image.
    """
    # Rows are left-padded to the longest cut prompt, which differs from the longest whole prompt, so all spans move.
    spans, behind = prepared.image_spans, []
    ends = [start + count for ((start, count),) in spans]
    first = [prepared.inputs_embeds.shape[1] - length for length in prepared.lengths]
    longest = max(end - begin for begin, end in zip(first, ends, strict=True))
    embeds = prepared.inputs_embeds.new_zeros(len(ends), longest, prepared.inputs_embeds.shape[-1])
    mask = torch.zeros(embeds.shape[:2], dtype=torch.long)
    positions, moved = mask.clone(), []
    for row, (begin, end) in enumerate(zip(first, ends, strict=True)):
        at = longest - (end - begin)
        embeds[row, at:] = prepared.inputs_embeds[row, begin:end]
        positions[row, at:], mask[row, at:] = prepared.position_ids[row, begin:end], 1
        behind.append(prepared.inputs_embeds[row, end:])
        moved.append([(spans[row][0][0] - begin + at, spans[row][0][1])])
    cut = dataclasses.replace(
        prepared,
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions,
        image_spans=moved,
        lengths=[end - begin for begin, end in zip(first, ends, strict=True)],
    )
    return cut, torch.nn.utils.rnn.pad_sequence(behind, batch_first=True), torch.tensor([len(rest) for rest in behind])


@torch.inference_mode()
def decode(model, prepared: PreparedPrompt, config: AdaVConfig, embeds: torch.Tensor):
    """(logits [B, 1 + R, V] of prefill and of decode steps that are fed `embeds` [B, R, D], their KV cache)."""
    # Spans are slots of the padded batch. A cache policy counts from each row's first real token.
    length = prepared.inputs_embeds.shape[1]
    spans = [
        RowSpans(own, [(start - length + own, count) for start, count in images])
        for own, images in zip(prepared.lengths, prepared.image_spans, strict=True)
    ]
    policy, layers = config.make_cache_policy(), model.config.num_hidden_layers
    caching = Caching(policy, layers, spans, prepared.position_ids[:, -1:] + 1)
    cache = caching.cache(embeds.shape[1])
    inputs = {CACHE: cache, "caching": caching}
    out = model(
        inputs_embeds=prepared.inputs_embeds,
        attention_mask=prepared.attention_mask,
        position_ids=prepared.position_ids,
        logits_to_keep=1,
        **inputs,
    )
    logits = [out.logits[:, -1]]
    for step in embeds.split(1, dim=1):
        logits.append(model(inputs_embeds=step, **inputs).logits[:, -1])
    return torch.stack(logits, dim=1), cache


def entries(cache, steps: int) -> tuple[int, int]:
    """(entries stored after `steps` decode steps, entries read in all these steps), over all layers and rows."""
    plans = [plan for layer in cache.layers for plan in layer.plans]
    return sum(plan.stored(steps) for plan in plans), sum(plan.read(s) for plan in plans for s in range(1, steps + 1))


def measure(loaded: LoadedCheckpoint, run: Run, method: dict, questions: int) -> list[dict]:
    """One row per policy, on the same prompts of one method. UserError if our steps differ from generate()."""
    benchmark, found = run.benchmark, {name: [] for name in POLICIES}
    model, embed = loaded.model, loaded.model.get_input_embeddings()
    for start in progress_bar(f"{method['method']}", range(0, questions, BATCH), unit=" batches"):
        # 1. Prompts, and the tokens that `full` generates. No end token, so that all rows have STEPS tokens.
        samples = run.samples[start : start + BATCH]
        images = [read_image(Path(benchmark.image_folder) / sample.image) for sample in samples]
        prepared = loaded.prepare([sample.prompt for sample in samples], images, AdaVConfig(**method))
        cut, behind, sizes = up_to_the_image(prepared)
        said = model.generate(
            prepared=prepared,
            max_new_tokens=STEPS + 1,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=loaded.engine.pad,
        )
        # 2. Each policy on both kinds of prompts. `full` comes first, and the others are compared with it.
        first = None
        for name, keys in POLICIES.items():
            config = AdaVConfig(**method, **keys)
            fed, _ = decode(model, cut, config, behind)
            answers = fed[torch.arange(len(sizes)), sizes].argmax(dim=-1)
            forced, cache = decode(model, prepared, config, embed(said[:, :STEPS]))
            odds = log_softmax(forced[:, 1:].float(), dim=-1)
            if first is None:
                first, full, sizes_of_full = answers, odds, entries(cache, STEPS)
                # decode() is a loop of its own. If it were wrong, all figures below would be.
                if not torch.equal(forced.argmax(dim=-1), said):
                    raise UserError("full: steps by hand say other tokens than generate(), so nothing is measured")
            texts = [{"text": loaded.tokenizer.decode([token])} for token in answers.tolist()]
            stored, read = entries(cache, STEPS)
            found[name].append(
                {
                    "accuracy_fed": sum(benchmark.right(samples, texts)),
                    "changed_fed": int((answers != first).sum()),
                    "agreement": (odds.argmax(dim=-1) == full.argmax(dim=-1)).float().mean(dim=1).sum().item(),
                    "kl": kl_div(odds, full, log_target=True, reduction="none").sum(-1).mean(dim=1).sum().item(),
                    "kv_stored": len(samples) * stored / sizes_of_full[0],
                    "kv_read": len(samples) * read / sizes_of_full[1],
                }
            )
    # 3. Every figure is a sum over samples, also in the last, smaller batch.
    return [
        {"policy": name} | {key: round(sum(part[key] for part in parts) / questions, 4) for key in parts[0]}
        for name, parts in found.items()
    ]


@exits_cleanly
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=positive, default=200, help="per checkpoint (default 200)")
    parser.add_argument("--out", type=Path, default=RESULTS / "cache-policies-demo.csv")
    args = parser.parse_args()
    # 1. How the rows are made. One thread, so that a rerun sums in the same order.
    torch.set_num_threads(1)
    made_with = {
        "command": " ".join(["python", "benchmarks/cache_policies.py", *sys.argv[1:]]),
        "hardware": f"{platform.machine()} CPU, 1 thread, float32",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}",
        "commit": commit(),
    }
    # 2. Every policy, alone and behind AdaV.
    rows = []
    for folder, tokens in CHECKPOINTS.items():
        checkpoint = find_checkpoint(str(ROOT / folder))
        benchmark = BENCHMARKS["shapes"](DATA_ROOT, checkpoint)
        # A Run brings the samples in order. Its folder is not needed: nothing is answered through it.
        with tempfile.TemporaryDirectory() as scratch:
            generation = Generation(benchmark.max_new_tokens)
            run = Run(benchmark, AdaVConfig(method="none"), checkpoint, generation, Path(scratch), limit=args.questions)
            loaded = LoadedCheckpoint(str(checkpoint.folder), device="cpu")
        for method in ({"method": "none"}, {"method": "adav", "overall_tokens": tokens}):
            facts = {"checkpoint": checkpoint.short_name, "method": method["method"]}
            facts |= {"overall_tokens": method.get("overall_tokens", ""), "questions": len(run.samples)}
            for row in measure(loaded, run, method, len(run.samples)):
                rows.append(facts | row | made_with)
                print(*list(rows[-1].values())[:-4], flush=True)
    # 3. Write and print. The columns about how the rows were made are the same in every row, so they are not printed.
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    shown = [name for name in rows[0] if name not in made_with]
    print(markdown_table([shown, *([str(row[name]) for name in shown] for row in rows)]))
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()

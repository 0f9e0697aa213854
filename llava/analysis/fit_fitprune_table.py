"""Fit a FitPrune table to a checkpoint: how many image tokens each layer can drop for a given FLOPs reduction.

    python -m llava.analysis.fit_fitprune_table CHECKPOINT --questions FILE --images DIR --ratio 60 --out TABLE.json

The rule is that of FitPrune (arXiv 2409.10197). FILE holds questions in LLaVA's format. About sixty questions with an
image are enough: the authors take 0.01 % of LLaVA's 665 k training samples. The batch size is 1.

1. Each question's prefill without dropping gives two sums per layer: the attention that the vision tokens receive from
   each other, and from the text, each as a mean over queries (llava.methods.inside_llm.fitprune.shares).
2. For a tolerance alpha, prefill drops tokens in each layer. A token is dropped if it is among the lowest by both
   measures, while the other tokens keep 1 - alpha of both sums.
3. Once the FLOPs target is reached, later layers drop nothing.
4. Bisection finds the smallest alpha that reaches the target, to 0.01. The table has the mean number of dropped tokens
   per layer, rounded down.

The table is written to TABLE.json, next to the tables of the same model that are there already. `options.table` names
this file. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from llava.common.command_line import Parser, add_checkpoint_flags
from llava.common.errors import UserError, exits_cleanly
from llava.common.find_checkpoint import find_checkpoint
from llava.common.progress import progress_bar
from llava.config import AdaVConfig
from llava.eval.benchmarks.questions import check_images, read_questions
from llava.eval.runs.image_reader import UnreadableImage, read_image
from llava.inference.loaded_checkpoint import LoadedCheckpoint
from llava.methods.attention_rows import RowAttention
from llava.methods.inside_llm.base import Choice, Dropper, ImageSlots
from llava.methods.inside_llm.fitprune import shares
from llava.methods.inside_llm.fitprune_tables import Table, write_table
from llava.methods.inside_llm.plan import INSIDE, Cut
from llava.model.decoding.dropping import Dropping

WIDTH = 0.01  # bisection stops when the bracket around alpha is this narrow


@dataclass(frozen=True, eq=False)
class Walk(Dropper):
    """Dropper for one prefill of one question, which fills `sums` and `dropped` layer by layer.

    alpha: tolerance. whole: the (within, across) sums of each layer without dropping; None: measure them, drop nothing.
    """

    alpha: float = 0.0
    whole: list[tuple[float, float]] | None = None
    sums: list[tuple[float, float]] = field(default_factory=list)
    dropped: list[int] = field(default_factory=list)

    place = INSIDE

    def plan(self, n: int, k: int, layers: int) -> tuple[Cut, ...]:
        # The numbers of a cut are not known in advance here, so select() ignores them.
        return tuple(Cut(layer, n) for layer in range(layers))

    def score(self, attention: RowAttention, image: ImageSlots) -> Tensor:
        within, across = shares(attention, image)
        return torch.stack([within, across / len(image.queries)])

    def select(self, attention: RowAttention, cut: Cut, image: ImageSlots, hidden: Tensor) -> Choice:
        scores = self.score(attention, image)
        self.sums.append(tuple(scores.sum(dim=1).tolist()))
        stays = torch.ones(image.count, dtype=torch.bool, device=scores.device)
        if self.whole is not None:
            floors = [(1 - self.alpha) * mass for mass in self.whole[len(self.sums) - 1]]
            stays = ~(spare(scores[0], floors[0]) & spare(scores[1], floors[1]))
            # At alpha = 1 both floors are 0 and every token could go, but later layers need at least one.
            if not stays.any():
                stays[scores[1].argmax()] = True
        kept = torch.nonzero(stays).flatten()
        self.dropped.append(image.count - len(kept))
        return Choice(kept)


def spare(scores: Tensor, floor: float) -> Tensor:
    """[n] bool: the lowest of `scores` [n], as many as can be dropped while the others sum to `floor` or more."""
    values, order = torch.sort(scores, stable=True)
    left = scores.sum() - values.cumsum(dim=0)
    # cumprod makes the mask a prefix of the order: float rounding could otherwise leave a hole in it.
    enough = (left >= floor).cumprod(dim=0).bool()
    out = torch.zeros_like(enough)
    out[order[enough]] = True
    return out


def vision_flops(n: int, dropped: list[int], config) -> int:
    """FLOPs (2 per multiply-add) of n vision tokens in prefill. Layer l drops dropped[l] of them after its attention.

    Only the matrix products of the vision tokens count: projections, attention to each other, and MLP.
    """
    heads = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query, grouped = config.num_attention_heads * heads, 2 * config.num_key_value_heads * heads
    total = 0
    for drop in dropped:
        total += n * config.hidden_size * (query + grouped) + 2 * n * n * query
        n -= drop
        total += n * query * config.hidden_size + 3 * n * config.hidden_size * config.intermediate_size
    return 2 * total


def until_reached(counts: list[int], walks: list[list[int]], target: float, config) -> int | None:
    """Smallest number of layers that must drop tokens for mean FLOPs of at most `target`; None if all are too few.

    counts: vision tokens of each sample. walks: per sample, the number of tokens that each layer dropped.
    """
    layers = len(walks[0])
    for used in range(layers + 1):
        spent = sum(
            vision_flops(n, [*dropped[:used], *[0] * (layers - used)], config)
            for n, dropped in zip(counts, walks, strict=True)
        )
        if spent / len(counts) <= target:
            return used
    return None


def fit(model, prompts: list, ratio: float, progress) -> tuple[tuple[int, ...], int, float]:
    """Fit a table on prepared prompts with one image each. Returns (drops per layer [L], vision tokens, alpha).

    ratio: FLOPs reduction in percent. UserError if no tolerance reaches it.
    """
    # 1. The FLOPs to reach.
    config = model.config
    layers = config.num_hidden_layers
    counts = [prompt.dropping.prompts[0].images[0][1] for prompt in prompts]
    full = sum(vision_flops(n, [0] * layers, config) for n in counts) / len(counts)
    target = full * (1 - ratio / 100)

    # 2. Sums of attention per layer without dropping.
    def walk(prompt, **options) -> Walk:
        walk = Walk(**options)
        dropping = Dropping(walk, 0, layers, prompt.dropping.prompts)
        model.model(  # without the LM head and without a KV cache: only the attention is read
            inputs_embeds=prompt.inputs_embeds, position_ids=prompt.position_ids, use_cache=False, dropping=dropping
        )
        progress.update()
        return walk

    whole = [walk(prompt).sums for prompt in prompts]

    # 3. Bisection over alpha. A larger alpha drops more; `found` always belongs to `high`, which reaches the target.
    def at(alpha: float) -> tuple[list[list[int]], int | None]:
        walks = [walk(prompt, alpha=alpha, whole=sums).dropped for prompt, sums in zip(prompts, whole, strict=True)]
        return walks, until_reached(counts, walks, target, config)

    low, high = 0.0, 1.0
    found = at(high)
    if found[1] is None:
        least = sum(vision_flops(n, dropped, config) for n, dropped in zip(counts, found[0], strict=True)) / len(counts)
        raise UserError(
            f"--ratio is {ratio:g}, but with all but one token dropped in the first layer this model still saves only "
            f"{100 * (1 - least / full):.1f} % of these images' FLOPs"
        )
    while high - low > WIDTH:
        middle = (low + high) / 2
        tried = at(middle)
        if tried[1] is None:
            low = middle
        else:
            high, found = middle, tried
    # 4. Mean drops per layer, scaled to the largest image. 1e-6: float error must not round a whole number down by one.
    walks, used = found
    tokens = max(counts)
    drops = [
        math.floor(
            sum(dropped[layer] * tokens / n for dropped, n in zip(walks, counts, strict=True)) / len(counts) + 1e-6
        )
        if layer < used
        else 0
        for layer in range(layers)
    ]
    return tuple(drops), tokens, high


def passes() -> int:
    """Number of prefills per question in a fit."""
    # One without dropping, one at alpha = 1, and one per halving of the bracket.
    return 2 + math.ceil(math.log2(1 / WIDTH))


def prepare(loaded: LoadedCheckpoint, args: argparse.Namespace) -> list:
    """Prepared prompts of the questions with an image, with all vision tokens. UserError for bad files."""
    path = Path(args.questions)
    samples = [sample for sample in read_questions(path) if sample.image is not None][: args.limit]
    if not samples:
        raise UserError(f"{path}: holds no question with an image")
    check_images(samples, Path(args.images), path)
    # Any dropper works here: prepare() then records where images and their text are, and only that is used.
    whole = AdaVConfig(method="fastv", options={"layer": 1})
    prompts = []
    for sample in progress_bar("encoding", samples, unit=" questions"):
        try:
            image = read_image(Path(args.images) / sample.image)
        except UnreadableImage as error:
            raise UserError(f'{path}, line {sample.line}: image "{sample.image}" cannot be read ({error})') from None
        prompts.append(loaded.prepare([sample.prompt], [image], whole, args.conv_mode))
    return prompts


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m llava.analysis.fit_fitprune_table", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="folder or hub name, in either format")
    add_checkpoint_flags(parser)
    parser.add_argument("--questions", required=True, help="question file, one JSON object per line")
    parser.add_argument("--images", required=True, help="folder that their images lie in")
    parser.add_argument("--ratio", required=True, type=float, help="FLOPs reduction in percent, above 0 and below 100")
    parser.add_argument("--out", required=True, type=Path, help="table file to write or add to")
    parser.add_argument("--limit", type=int, default=64, help="use the first N questions with an image (default 64)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    return parser


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    # 1. Arguments and model.
    if not 0 < args.ratio < 100:
        raise UserError(f"--ratio is {args.ratio:g}, allowed is a percentage above 0 and below 100")
    if args.limit < 1:
        raise UserError(f"--limit is {args.limit}, allowed is a whole number of at least 1")
    checkpoint = find_checkpoint(args.checkpoint)
    base = find_checkpoint(args.model_base) if args.model_base else None
    loaded = LoadedCheckpoint(
        str(checkpoint.folder),
        base and str(base.folder),
        AdaVConfig(method="none"),
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
        purpose="a fit",
    )
    # 2. Fit.
    prompts = prepare(loaded, args)
    config = loaded.model.config
    with torch.inference_mode(), progress_bar("prefills", total=passes() * len(prompts)) as progress:
        drops, tokens, alpha = fit(loaded.model, prompts, args.ratio, progress)
    # 3. Write the table. `sizes` tell later which LLM it was fitted on.
    sizes = (config.num_hidden_layers, config.hidden_size, config.intermediate_size)
    table = Table(checkpoint.short_name, args.ratio, tokens, sizes, drops)
    if not 0 < sum(drops) < tokens:
        raise UserError(
            f"--ratio is {args.ratio:g}, for which the layers drop {sum(drops)} of {tokens} tokens in the rounded mean, "
            "which is no table; use another ratio or more questions"
        )
    write_table(
        args.out, table, f"llava.analysis.fit_fitprune_table, {len(prompts)} questions of {Path(args.questions).name}"
    )
    # 4. Report what the rounded table saves, which is less than was asked for.
    saved = 1 - vision_flops(tokens, list(drops), config) / vision_flops(tokens, [0] * len(drops), config)
    print(f"alpha {alpha:.4f}, {len(prompts)} questions: {sum(drops)} of {tokens} image tokens go, layer by layer")
    print(" ".join(map(str, drops)))
    print(f"rounded down, the table saves {100 * saved:.1f} % of the image tokens' FLOPs; written to {args.out}")


if __name__ == "__main__":
    main()

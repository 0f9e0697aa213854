"""Costs of a sample: FLOPs of prefill and of a decode step, and bytes of KV cache, for every method.

    python -m llava.costs.flops CHECKPOINT|PRESET [--method adav --overall-tokens 144] [--image-size 672 672]

prints the parts for one image. A config.json is enough; no weights are read. A preset (llava.costs.presets) is the name of
a model whose sizes are known, and needs no file at all.

The count has matrix products and the patch convolution, at 2 FLOPs per multiply-add, for one sample without the padding
of a batch. Attention counts queries x keys in full, S x S, although it is causal: papers quote this number, and torch's
flop counter sees it under the MATH backend. A causal kernel does about half of the part `attention`. With grouped
heads, keys and values are projected for the KV heads, and all query heads attend to them. Norms, activations, softmax
and RoPE are not counted, because they are not matrix products. Such work of a method is listed separately, in elements
(method_costs.py). A sliding window is assumed to be longer than the prompt.

    shape = ModelShape.from_config(model.config)
    cost = predict(shape, config, [ImageCounts.from_plan(plan, shape.side)], text_tokens=80, words=[45])
    cost.parts, cost.total, cost.layer_mean
    cost.decode(step=1), cost.kv_bytes(element_size=2), cost.read_bytes(element_size=2, step=1)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from llava.common.command_line import Parser, positive
from llava.common.errors import UserError, exits_cleanly
from llava.common.text_table import columns
from llava.config import AdaVConfig, add_config_flags, config_of_flags
from llava.costs.method_costs import (
    DROPPER_COSTS,
    SELECTOR_COSTS,
    DropperCase,
    MethodCost,
    SelectorCase,
    apet_stage,
    cache_cost,
    look_cost,
    together,
)
from llava.costs.model_shape import ImageCounts, ModelShape, product, read_config
from llava.costs.presets import PRESETS
from llava.methods.inside_llm import DROPPERS, Dropper
from llava.methods.inside_llm.apet_stage import ApETStage
from llava.methods.kv_cache.base import Counts, LayerPlan, rounded_up
from llava.mm_utils import tile_plan


@dataclass(frozen=True)
class Cost:
    """Cost of one sample: prefill, decode steps and KV cache.

    parts       FLOPs of prefill: vision_tower, cls_row, projector, method (selection or dropping of tokens),
                projections (q, k, v and output), attention (scores and weighted sum), mlp, cache (attention rows that
                the cache policy reads to choose entries), lm_head
    elements    work of the method and the cache policy beside matrix products: kind -> elements
    plans       [L] the cache policy's plan for each layer (llava.methods.kv_cache)
    layer_mean  vision tokens in a layer's attention, mean over layers
    """

    shape: ModelShape
    parts: dict[str, int]
    plans: tuple[LayerPlan, ...]
    layer_mean: float
    elements: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """FLOPs from pixels to the first token."""
        return sum(self.parts.values())

    @property
    def cached(self) -> tuple[int, ...]:
        """[L] entries of each layer's KV cache after prefill."""
        return tuple(plan.stored() for plan in self.plans)

    def decode(self, step: int = 1) -> dict[str, int]:
        """FLOPs of one decode step by part. step: counted from 1."""
        # plan.read counts the new token's own entry, and decode() below adds it again.
        return decode(self.shape, [plan.read(step) - 1 for plan in self.plans])

    def read_bytes(self, element_size: int, step: int = 1) -> int:
        """Bytes of keys and values that one decode step reads, including those of its own token. step: from 1."""
        return sum(plan.read(step) for plan in self.plans) * self.shape.kv_entry(element_size)

    def kv_bytes(self, element_size: int, steps: int = 0) -> int:
        """Bytes of the sample's own KV entries after prefill and `steps` decode steps, without padding."""
        return sum(plan.stored(steps) for plan in self.plans) * self.shape.kv_entry(element_size)


def allocated_kv_bytes(costs: Sequence[Cost], element_size: int, steps: int = 0, multiple: int = 1) -> int:
    """Bytes that the KV cache of a batch occupies. In each layer, every row has as many slots as the longest row.

    costs: one per row. element_size: bytes per number. steps: largest number of decode steps; storage is allocated
    once, before prefill. multiple: steps and slots are rounded up to a multiple of this, as the engine does when it
    captures steps (llava.model.decoding.engine.capacity_multiple).
    """
    # The order is the engine's: it rounds the steps, asks the plan for slots, and rounds the slots.
    room = rounded_up(steps, multiple)
    slots = (max(cost.plans[layer].slots(room) for cost in costs) for layer in range(costs[0].shape.layers))
    longest = [rounded_up(count, multiple) for count in slots]
    return len(costs) * sum(longest) * costs[0].shape.kv_entry(element_size)


def vision(shape: ModelShape, tiles: int, projected: int) -> dict[str, int]:
    """FLOPs of the tower up to the layer whose features are used, of the [CLS] attention row, and of the projector.

    tiles: T, of all images. projected: tower states that go through the projector. Padding does not. If the method
    chooses without reading projected features, dropped patches do not either.
    """
    # The + 1 is [CLS]. A layer: four projections, scores and weighted sum, and the two products of the MLP.
    tokens, width = shape.tile_patches + 1, shape.tower_width
    layer = 4 * product(tokens, width, width) + 2 * product(tokens, width, tokens)
    layer += 2 * product(tokens, width, shape.tower_mlp)
    # The patch convolution: its stride equals its kernel, so it is one product per patch of 3 x patch x patch numbers.
    patches = product(shape.tile_patches, 3 * shape.patch**2, width)
    return {
        "vision_tower": tiles * (patches + shape.tower_layers * layer),
        "cls_row": tiles * product(1, width, tokens),
        "projector": shape.projected(projected),
    }


def language_model(
    shape: ModelShape, text_tokens: int, seen: Sequence[tuple[int, int]], logits: int = 1
) -> dict[str, int]:
    """FLOPs of the LLM's prefill by part.

    text_tokens: text tokens of the prompt. seen: per layer, vision tokens in its attention (as queries, keys and
    values) and in its MLP. The second number is smaller if a method cuts inside the layer. logits: positions that the
    LM head is computed for; generate() needs only the last one. ValueError if `seen` does not have one pair per layer.
    """
    if len(seen) != shape.layers:
        raise ValueError(f"token counts of {len(seen)} layers for an LLM of {shape.layers}")
    parts = [
        _layer(shape, text_tokens + attended, text_tokens + attended, text_tokens + left) for attended, left in seen
    ]
    return _sum(parts) | {"lm_head": product(logits, shape.width, shape.vocab)}


def decode(shape: ModelShape, cached: Sequence[int]) -> dict[str, int]:
    """FLOPs of one decode step by part. cached: [L] entries that the new token reads in each layer, without its own."""
    return _sum([_layer(shape, 1, entries + 1, 1) for entries in cached]) | {
        "lm_head": product(1, shape.width, shape.vocab)
    }


def _layer(shape: ModelShape, queries: int, keys: int, left: int) -> dict[str, int]:
    """FLOPs of one LLM layer: `queries` tokens enter and attend to `keys` entries; `left` tokens enter the MLP."""
    # H x d can differ from the width (Mistral-Nemo: 4096 and 5120), so it is not taken from the width.
    inner = shape.heads * shape.head
    return {
        "projections": product(queries, shape.width, 2 * inner + 2 * shape.kv_heads * shape.head),
        "attention": 2 * product(queries, inner, keys),
        "mlp": 3 * product(left, shape.width, shape.mlp),
    }


def _sum(parts: list[dict[str, int]]) -> dict[str, int]:
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def predict(
    shape: ModelShape,
    config: AdaVConfig,
    images: Sequence[ImageCounts],
    text_tokens: int,
    words: Sequence[int],
    kept: Sequence[int] | None = None,
    logits: int = 1,
    tiles: Sequence[Sequence[int] | None] | None = None,
) -> Cost:
    """Predicted cost of one sample under a configuration.

    images: each image before selection. text_tokens: text tokens of the prompt. words: per image, how many text tokens
    the method may read. kept: per image, vision tokens that enter the LLM; None: as many as the configuration asks for.
    logits: see language_model. tiles: where the method zooms, per image, the tiles that were encoded; None: as many as for
    an image whose importance is spread evenly, which is exact for options.crops where all crops have equally many patches.
    """
    # 1. How many vision tokens enter the LLM.
    drops = config.method in DROPPERS
    method, options = config.make_method(), config.method_options
    if method.resizes:
        images = [image.smaller(shape.side, config.overall_tokens) for image in images]
    if kept is None:
        kept = [image.tokens if drops else _kept(method, config.overall_tokens, image) for image in images]
    looks = []
    if method.zooms:
        looks = [_look(shape, method, config.overall_tokens, *own, options) for own in zip(images, words, strict=True)]
        images = _encoded(method, config.overall_tokens, images, tiles)
    # 2. What the method costs. A prefill filter makes FastV's cut after a selector, so it has FastV's cost.
    dropper = config.make_dropper()
    if drops:
        price, costs = _listed(DROPPER_COSTS, "DROPPER_COSTS", config), []
    else:
        price = apet_stage if isinstance(dropper, ApETStage) else DROPPER_COSTS["fastv"]
        cases = [SelectorCase(shape, *case, options) for case in zip(images, words, kept, strict=True)]
        # If the budget reaches all patches, prepare() does not run the method.
        asked = [case for case in cases if not method.uses_budget or case.kept < case.image.candidates]
        cost = _listed(SELECTOR_COSTS, "SELECTOR_COSTS", config)
        costs = [*looks, *(cost(case) for case in asked)]
    # 3. What each layer sees, and what dropping inside the LLM costs.
    seen = [(sum(kept), sum(kept))] * shape.layers
    if dropper is not None:
        cuts = [dropper.cuts(n, config.overall_tokens, shape.layers) for n in kept]
        seen = _seen(dropper, config.overall_tokens, kept, shape.layers)
        costs.append(price(DropperCase(shape, text_tokens, words, kept, cuts, seen)))
    # 4. Tiles of the tower, and tower states that are projected: only the kept ones, if the method reads no features.
    extra = together(costs)
    passes = [(len(image.patches), _side(image, shape, method)) for image in images] if method.needs_image else []
    late = not method.reads_features
    rows = [n if late and n < image.candidates else image.candidates for image, n in zip(images, kept, strict=True)]
    projected = sum(rows) if method.needs_image else 0
    # 5. What the cache policy stores and reads in each layer.
    policy = config.make_cache_policy()
    behind = words[0] if images else 0  # text after the first image's start
    held = [Counts(text_tokens - behind, attended, behind, sum(kept)) for attended, _ in seen]
    choosing = together(cache_cost(shape, policy, counts) for counts in held)
    both = together([extra, choosing])
    return Cost(
        shape,
        _vision(shape, passes, projected)
        | {"method": extra.flops, "cache": choosing.flops}
        | language_model(shape, text_tokens, seen, logits),
        plans=tuple(policy.plan(counts) for counts in held),
        layer_mean=sum(attended for attended, _ in seen) / shape.layers,
        elements=both.elements,
    )


def _look(shape: ModelShape, method, budget: int, image: ImageCounts, words: int, options: dict) -> MethodCost:
    """What a method that zooms needs to rank the crops of an image; nothing where all crops are encoded anyway."""
    if len(image.patches) == 1 or method.needs_every_crop(image.patches, budget):
        return MethodCost()
    case = SelectorCase(shape, image.of_tiles((0,)), words, 0, options)
    return look_cost(case, len(image.patches) - 1, method.reads_text)


def _encoded(
    method, budget: int, images: Sequence[ImageCounts], tiles: Sequence[Sequence[int] | None] | None
) -> list[ImageCounts]:
    """Counts of the tiles of each image that a method that zooms encodes. tiles: see `predict`."""
    # Importance that is spread evenly over an image is shared among its crops as its patches are.
    chosen = tiles or [method.tiles(image.patches, image.patches[1:], budget) for image in images]
    return [image if own is None else image.of_tiles(own) for image, own in zip(images, chosen, strict=True)]


def _side(image: ImageCounts, shape: ModelShape, method) -> int:
    """Patches per side of the image's tiles as the tower gets them. Unpadding comes after the tower."""
    return min(shape.side, math.isqrt(image.patches[0])) if method.resizes else shape.side


def _vision(shape: ModelShape, tiles: Sequence[tuple[int, int]], projected: int) -> dict[str, int]:
    """As `vision`, for tiles of several sizes: (how many, patches per side)."""
    parts = [vision(replace(shape, side=side), count, 0) for count, side in tiles]
    return _sum([vision(shape, 0, projected), *parts])


def _listed(costs: dict, name: str, config: AdaVConfig):
    """The cost of a method's choice. UserError for a new method of the package whose line is still missing.

    A method from outside the package states its cost itself, as a static method `cost` that takes the same case. Without
    it, the choice counts as nothing, with a warning.
    """
    method, kind = config.method, config.method_class
    if method in costs:
        return costs[method]
    if kind.__module__.partition(".")[0] == "llava":
        raise UserError(f'method "{method}" has no cost: it needs a line in {name} of llava/costs/method_costs.py')
    if not hasattr(kind, "cost"):
        warnings.warn(
            f'predicted FLOPs leave out what method "{method}" needs to choose: {kind.__name__} defines no static method cost',
            stacklevel=3,
        )
        return lambda case: MethodCost()
    return kind.cost


def _kept(method: type, budget: int, image: ImageCounts) -> int:
    """Tokens of one image that a selector keeps, if none of its options changes the budget."""
    if method.uses_budget:
        return image.kept(budget)
    return image.tokens if method.needs_image else 0


def _seen(dropper: Dropper, overall_tokens: int, tokens: Sequence[int], layers: int) -> list[tuple[int, int]]:
    """Per layer, vision tokens of all images (in attention, in the MLP) under a method inside the LLM.

    The numbers come from the method's plan, which the layer loop obeys, so no request has to run.
    """
    of_images = [dropper.schedule(n, overall_tokens, layers) for n in tokens]
    return [
        (sum(image[layer].attention for image in of_images), sum(image[layer].mlp for image in of_images))
        for layer in range(layers)
    ]


def steps_shown(cost: Cost) -> list[int]:
    """Decode steps that differ in kind: the first step and, if the policy ranks a core anew, the first update step."""
    interval = cost.plans[0].policy.interval
    return [1, interval] if interval > 1 else [1]


def table(cost: Cost, plain: Cost) -> str:
    """Text table of a cost's parts in GFLOPs, next to those of the model without a method. plain: the latter's cost."""
    lines = [("part", "GFLOPs", "share", "none", "of none")]
    rows = [*((name, flops, plain.parts[name]) for name, flops in cost.parts.items())]
    rows.append(("prefill, all", cost.total, plain.total))
    for step in steps_shown(cost):
        name = "a decode step" if len(steps_shown(cost)) == 1 else f"decode step {step}"
        rows.append((name, sum(cost.decode(step).values()), sum(plain.decode(step).values())))
    for name, flops, before in rows:
        share = f"{flops / cost.total:.1%}" if name in cost.parts else ""
        of_none = f"{flops / before:.1%}" if before else ""
        lines.append((name, f"{flops / 1e9:,.3f}", share, f"{before / 1e9:,.3f}", of_none))
    return columns(lines)


def config_of(name: str):
    """Return the model configuration of a checkpoint, or of a preset where no folder has its name."""
    if name in PRESETS and not Path(name).is_dir():
        return PRESETS[name].model_config(newline=True)
    return read_config(name)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m llava.costs.flops", description=__doc__.split("\n")[0])
    parser.add_argument(
        "checkpoint",
        help=f"folder or hub name; of a folder, config.json is enough; or a preset: {', '.join(PRESETS)}",
    )
    parser.add_argument("--image-size", type=int, nargs=2, default=(672, 672), metavar=("W", "H"), help="in pixels")
    parser.add_argument("--text-tokens", type=int, default=80, help="tokens of the prompt beside the image (80)")
    parser.add_argument("--question-tokens", type=int, help="how many of them follow the image (half)")
    parser.add_argument("--element-size", type=int, default=2, help="bytes per number of the KV cache (2)")
    parser.add_argument("--steps", type=positive, default=64, help="decode steps that KV bytes are given after (64)")
    add_config_flags(parser)
    args = parser.parse_args(argv)
    # 1. Arguments, configuration and sizes.
    words = args.text_tokens // 2 if args.question_tokens is None else args.question_tokens
    if not 0 <= words <= args.text_tokens:
        raise UserError(f"--question-tokens is {words}, allowed is 0 to the {args.text_tokens} of --text-tokens")
    config = config_of_flags(args)
    model_config = config_of(args.checkpoint)
    shape = ModelShape.from_config(model_config)
    plan = tile_plan(args.image_size, model_config, config.option("anyres"))
    image = ImageCounts.from_plan(plan, shape.side)
    # 2. FLOPs of prefill and of a decode step.
    plain, cost = (
        predict(shape, asked, [image], args.text_tokens, [words]) for asked in (AdaVConfig(method="none"), config)
    )
    print(
        f"{args.checkpoint}, method {config.method}: {image.tokens:,} vision tokens of {plan.tiles} tiles -> "
        f"{cost.layer_mean:,.1f} in the mean layer, {args.text_tokens} text tokens\n\n{table(cost, plain)}\n"
    )
    print("2 FLOPs per multiply-add; attention in full, S x S: a causal kernel does about half of that part")
    # 3. Bytes of the KV cache, stored and read.
    size, policy = args.element_size, config.cache_policy
    for steps, when in ((0, "after prefill"), (args.steps, f"after {args.steps} decode steps")):
        kept, before = (of.kv_bytes(size, steps) for of in (cost, plain))
        print(f"KV cache ({policy}) {when}: {kept / 1e6:,.1f} MB, {before / 1e6:,.1f} MB with none")
    print(f"its storage for {args.steps} decode steps: {allocated_kv_bytes([cost], size, args.steps) / 1e6:,.1f} MB")
    for step in steps_shown(cost):
        read, before = (of.read_bytes(size, step) for of in (cost, plain))
        print(f"decode step {step} reads {read / 1e6:,.1f} MB of it, {before / 1e6:,.1f} MB with none")
    if cost.elements:
        others = ", ".join(f"{kind} over {n:,} elements" for kind, n in cost.elements.items())
        print(f"beside matrix products: {others}")


if __name__ == "__main__":
    main()

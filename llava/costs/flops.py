"""What a sample costs: FLOPs of prefill and of a decode step, and bytes of KV cache, for every method.

    python -m llava.costs.flops CHECKPOINT [--method adav --overall-tokens 144] [--image-size 672 672] [--text-tokens 80]

prints the parts for one image; a config.json is enough, no weights are read.

What is counted: matrix products and the patch convolution, 2 FLOPs for each multiply-add, for one sample by itself
(padding of a batch excluded). Attention counts queries x keys in full, S x S, although it is causal: that is what
papers quote and what torch's flop counter sees under the MATH backend; a causal kernel does about half of the part
`attention`. Grouped heads: keys and values are projected for the KV heads, and attended by all query heads. What is not
a matrix product is not counted (norms, activations, softmax, RoPE); what a method does of that kind is listed apart,
in elements (method_costs.py). A sliding window is taken to be longer than the prompt.

    cost = predict(ModelShape.from_config(model.config), config, [ImageCounts.from_plan(plan, side)], text_tokens=80, words=[45])
    cost.parts, cost.total, cost.layer_mean, cost.decode(step=1), cost.kv_bytes(element_size=2), cost.read_bytes(2, step=1)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from llava.common.command_line import Parser, positive
from llava.common.errors import UserError, exits_cleanly
from llava.common.text_table import columns
from llava.config import AdaVConfig, add_config_flags, config_of_flags
from llava.costs.method_costs import DROPPER_COSTS, SELECTOR_COSTS, DropperCase, SelectorCase, cache_cost, together
from llava.costs.model_shape import ImageCounts, ModelShape, product, read_config
from llava.methods.inside_llm import DROPPERS, Dropper
from llava.methods.inside_llm.prefill_filter import PrefillFilter
from llava.methods.kv_cache.base import Counts, LayerPlan, rounded_up
from llava.mm_utils import tile_plan


@dataclass(frozen=True)
class Cost:
    """One sample's prefill.

    parts       FLOPs: vision_tower, cls_row, projector, method (what selects or drops tokens), projections (q, k, v and
                output), attention (scores and weighted sum), mlp, cache (what the cache policy reads to choose), lm_head
    elements    what the method does beside matrix products: kind -> elements
    plans       [L] what the cache policy makes of each layer's entries (llava.methods.kv_cache)
    layer_mean  image tokens in a layer's attention, mean over layers
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
        """FLOPs of the step-th decode step by part, counted from 1: one token reads what its step reads, and itself."""
        return decode(self.shape, [plan.read(step) - 1 for plan in self.plans])

    def read_bytes(self, element_size: int, step: int = 1) -> int:
        """Bytes of keys and values that the step-th decode step reads, its own among them."""
        return sum(plan.read(step) for plan in self.plans) * self.shape.kv_entry(element_size)

    def kv_bytes(self, element_size: int, steps: int = 0) -> int:
        """Bytes of the sample's own KV entries after prefill and `steps` decode steps, without padding."""
        return sum(plan.stored(steps) for plan in self.plans) * self.shape.kv_entry(element_size)


def allocated_kv_bytes(costs: Sequence[Cost], element_size: int, steps: int = 0, multiple: int = 1) -> int:
    """Bytes that the cache of a batch occupies: in each layer every row has as many slots as the longest one.

    steps: that there may be; storage is allocated once, before prefill. multiple: what steps and slots are rounded up by
    (rounded_up), as by the engine where it captures steps (llava.model.decoding.engine.CAPACITY_MULTIPLE).
    """
    room = rounded_up(steps, multiple)
    slots = (max(cost.plans[layer].slots(room) for cost in costs) for layer in range(costs[0].shape.layers))
    longest = [rounded_up(count, multiple) for count in slots]
    return len(costs) * sum(longest) * costs[0].shape.kv_entry(element_size)


def vision(shape: ModelShape, tiles: int, projected: int) -> dict[str, int]:
    """FLOPs of the tower up to the layer whose features are used, of its one [CLS] row, and of the projector.

    projected: rows that go through the projector, which padding does not and, under a method that chooses without
    looking at them, what is dropped does not either.
    """
    tokens, width = shape.tile_patches + 1, shape.tower_width
    layer = 4 * product(tokens, width, width) + 2 * product(tokens, width, tokens)
    layer += 2 * product(tokens, width, shape.tower_mlp)
    patches = product(shape.tile_patches, 3 * shape.patch**2, width)
    return {
        "vision_tower": tiles * (patches + shape.tower_layers * layer),
        "cls_row": tiles * product(1, width, tokens),
        "projector": shape.projected(projected),
    }


def language_model(
    shape: ModelShape, text_tokens: int, seen: Sequence[tuple[int, int]], logits: int = 1
) -> dict[str, int]:
    """FLOPs of the LLM's prefill.

    seen: per layer, image tokens in its attention (as queries, keys and values) and in its MLP, which are fewer where a
    method cuts inside the layer. logits: positions that the head is computed for; generate() asks for the last one.
    """
    if len(seen) != shape.layers:
        raise ValueError(f"token counts of {len(seen)} layers for an LLM of {shape.layers}")
    parts = [
        _layer(shape, text_tokens + attended, text_tokens + attended, text_tokens + left) for attended, left in seen
    ]
    return _sum(parts) | {"lm_head": product(logits, shape.width, shape.vocab)}


def decode(shape: ModelShape, cached: Sequence[int]) -> dict[str, int]:
    """FLOPs of one decode step by part. cached: [L] entries that the new token reads beside its own, in each layer."""
    return _sum([_layer(shape, 1, entries + 1, 1) for entries in cached]) | {
        "lm_head": product(1, shape.width, shape.vocab)
    }


def _layer(shape: ModelShape, queries: int, keys: int, left: int) -> dict[str, int]:
    """One LLM layer: `queries` tokens enter and attend to `keys` entries, `left` of them go on to the MLP."""
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
) -> Cost:
    """The cost of one sample under a configuration.

    images: each as it is before selection. text_tokens: the prompt's tokens that are no image tokens.
    words: per image, how many of those the method may read. kept: per image, tokens that enter the LLM; None takes what
    the configuration asks for. logits: see language_model.
    """
    drops = config.method in DROPPERS
    method, options = config.make_method(), config.method_options
    if kept is None:
        kept = [image.tokens if drops else _kept(method, config.overall_tokens, image) for image in images]
    if drops:
        dropper, price, costs = method, DROPPER_COSTS[config.method], []
    else:
        dropper, price = PrefillFilter.from_config(config), DROPPER_COSTS["fastv"]
        cases = [SelectorCase(shape, *case, options) for case in zip(images, words, kept, strict=True)]
        # Where everything is kept, no method is asked.
        asked = [case for case in cases if not method.uses_budget or case.kept < case.image.candidates]
        costs = [SELECTOR_COSTS[config.method](case) for case in asked]
    seen = [(sum(kept), sum(kept))] * shape.layers
    if dropper is not None:
        cuts = [dropper.cuts(n, config.overall_tokens, shape.layers) for n in kept]
        seen = _seen(dropper, config.overall_tokens, kept, shape.layers)
        costs.append(price(DropperCase(shape, text_tokens, words, kept, cuts, seen)))
    extra = together(costs)
    tiles = sum(len(image.patches) for image in images) if method.needs_image else 0
    late = not method.reads_features
    rows = [n if late and n < image.candidates else image.candidates for image, n in zip(images, kept, strict=True)]
    projected = sum(rows) if method.needs_image else 0
    policy = config.make_cache_policy()
    behind = words[0] if images else 0  # text behind the first image's start
    held = [Counts(text_tokens - behind, attended, behind, sum(kept)) for attended, _ in seen]
    choosing = together(cache_cost(shape, policy, counts) for counts in held)
    both = together([extra, choosing])
    return Cost(
        shape,
        vision(shape, tiles, projected)
        | {"method": extra.flops, "cache": choosing.flops}
        | language_model(shape, text_tokens, seen, logits),
        plans=tuple(policy.plan(counts) for counts in held),
        layer_mean=sum(attended for attended, _ in seen) / shape.layers,
        elements=both.elements,
    )


def _kept(method: type, budget: int, image: ImageCounts) -> int:
    """Tokens of one image that a selector keeps which has no option that says otherwise."""
    if method.uses_budget:
        return image.kept(budget)
    return image.tokens if method.needs_image else 0


def _seen(dropper: Dropper, overall_tokens: int, tokens: Sequence[int], layers: int) -> list[tuple[int, int]]:
    """What each layer sees of all images together under a method inside the LLM: (in attention, in the MLP).

    The method's own plan says it, which the decoder loop obeys: no request has to run for it.
    """
    of_images = [dropper.schedule(n, overall_tokens, layers) for n in tokens]
    return [
        (sum(image[layer].attention for image in of_images), sum(image[layer].mlp for image in of_images))
        for layer in range(layers)
    ]


def steps_shown(cost: Cost) -> list[int]:
    """Decode steps that differ in kind: the first, and under a policy that re-ranks a core, the first that does so."""
    interval = cost.plans[0].policy.interval
    return [1, interval] if interval > 1 else [1]


def table(cost: Cost, plain: Cost) -> str:
    """The parts of a cost beside those of the plain model, in GFLOPs."""
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


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m llava.costs.flops", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="folder or hub name; of a folder, config.json is enough")
    parser.add_argument("--image-size", type=int, nargs=2, default=(672, 672), metavar=("W", "H"), help="in pixels")
    parser.add_argument("--text-tokens", type=int, default=80, help="tokens of the prompt beside the image (80)")
    parser.add_argument("--question-tokens", type=int, help="how many of them follow the image (half)")
    parser.add_argument("--element-size", type=int, default=2, help="bytes per number of the KV cache (2)")
    parser.add_argument("--steps", type=positive, default=64, help="decode steps that KV bytes are given after (64)")
    add_config_flags(parser)
    args = parser.parse_args(argv)
    words = args.text_tokens // 2 if args.question_tokens is None else args.question_tokens
    if not 0 <= words <= args.text_tokens:
        raise UserError(f"--question-tokens is {words}, allowed is 0 to the {args.text_tokens} of --text-tokens")
    config = config_of_flags(args)
    model_config = read_config(args.checkpoint)
    shape = ModelShape.from_config(model_config)
    plan = tile_plan(args.image_size, model_config, config.option("anyres"))
    image = ImageCounts.from_plan(plan, shape.side)
    plain, cost = (
        predict(shape, asked, [image], args.text_tokens, [words]) for asked in (AdaVConfig(method="none"), config)
    )
    print(
        f"{args.checkpoint}, method {config.method}: {image.tokens:,} vision tokens of {plan.tiles} tiles -> "
        f"{cost.layer_mean:,.1f} in the mean layer, {args.text_tokens} text tokens\n\n{table(cost, plain)}\n"
    )
    print("2 FLOPs per multiply-add; attention in full, S x S: a causal kernel does about half of that part")
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

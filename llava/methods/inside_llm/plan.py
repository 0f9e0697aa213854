"""How many image tokens each LLM layer sees under a method that drops them inside the LLM. Imports no torch.

A plan is a list of cuts, for one image of n tokens; it does not depend on what the tokens are. The decoder loop obeys
it, and whoever counts FLOPs or cache bytes reads it through `Dropper.schedule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llava.common.errors import UserError

# Where in its layer a cut happens: AFTER the whole layer; BEFORE it; INSIDE it, between attention and MLP.
AFTER, BEFORE, INSIDE = "after", "before", "inside"


class Cut(NamedTuple):
    """One cut of one image. layer: 0-based; keep: slots that stay; made: tokens made of the dropped ones, on top."""

    layer: int
    keep: int
    made: int = 0


class LayerTokens(NamedTuple):
    """Image tokens that one layer computes on. `attention` is also what the layer's KV cache holds afterwards."""

    attention: int
    mlp: int


def layer_tokens(n: int, cuts: Sequence[Cut], place: str, layers: int) -> list[LayerTokens]:
    """What each of `layers` layers sees of an image of n tokens under `cuts` (at most one per layer)."""
    at, now, seen = {cut.layer: cut for cut in cuts}, n, []
    for layer in range(layers):
        left = at[layer].keep + at[layer].made if layer in at else now
        seen.append(LayerTokens(left if place == BEFORE else now, now if place == AFTER else left))
        now = left
    return seen


def layer_mean(tokens: Sequence[LayerTokens]) -> float:
    """Mean over layers of the image tokens that attention sees: the layer mean that comparisons are plotted over."""
    return sum(layer.attention for layer in tokens) / len(tokens)


def scaled_layer(published: int, layers: int, last: int) -> int:
    """The layer number of a 32-layer model in a model of `layers` layers, from 1 to `last` (0 where last is 0)."""
    return min(max(1, round(published * layers / 32)), last)


def one_per_layer(cuts: Sequence[Cut], n: int) -> tuple[Cut, ...]:
    """Cuts of a shallow model: of those that fall on one layer the last holds. What cuts nothing is left out."""
    at = {cut.layer: cut for cut in cuts}
    kept, now = [], n
    for layer in sorted(at):
        if at[layer].keep < now:
            kept.append(at[layer])
            now = at[layer].keep + at[layer].made
    return tuple(kept)


def largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to `weights` that sum to `total`; what rounding leaves goes to the largest rests.

    Equal rests: the lowest index first.
    """
    whole = sum(weights)
    exact = [weight * total / whole for weight in weights]
    counts = [math.floor(value + 1e-9) for value in exact]
    rests = sorted(range(len(exact)), key=lambda i: (-round(exact[i] - counts[i], 9), i))
    for i in rests[: total - sum(counts)]:
        counts[i] += 1
    return counts


def budget_for_mean(mean_of: Callable[[int], float], n: int, target: int, method: str) -> int:
    """The budget K below n whose layer mean comes closest to `target` without passing it; ties to the larger K.

    mean_of: K -> layer mean. Raises UserError, naming the smallest reachable mean, where `target` is out of reach.
    """
    means = [(mean_of(k), k) for k in range(1, n)]
    reachable = [pair for pair in means if pair[0] <= target]
    if not reachable:
        smallest = min(means)[0]
        raise UserError(
            f'options.budget is "mean" and overall_tokens is {target}, but under method "{method}" the layers see at '
            f"least {smallest:.1f} of an image's {n} tokens in the mean, so at least {math.ceil(smallest)} is allowed"
        )
    return max(reachable)[1]


def counts_of(keep: Sequence[float], n: int) -> list[int]:
    """An explicit list as counts for an image of n tokens: whole numbers are counts, numbers below 1 shares of n.

    At least one token stays.
    """
    counts = [math.floor(value * n + 1e-6) if isinstance(value, float) else value for value in keep]
    return [max(1, min(count, n)) for count in counts]

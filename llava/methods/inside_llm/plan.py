"""Plans: how many vision tokens each LLM layer sees under a method that drops them inside the LLM.

A plan is a list of cuts for one image of n tokens. It depends on numbers only, never on the content of the tokens. The
decoder loop obeys it. Code that counts FLOPs or cache bytes reads it through `Dropper.schedule`. This file imports no
torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from llava.common.errors import UserError
from llava.common.rounding import floor_share

# Where a cut happens: AFTER its layer, BEFORE its layer, or INSIDE it, between attention and MLP.
AFTER, BEFORE, INSIDE = "after", "before", "inside"


class Cut(NamedTuple):
    """One cut of one image. layer: 0-based; keep: slots that stay; made: merged tokens that are added to them."""

    layer: int
    keep: int
    made: int = 0


class LayerTokens(NamedTuple):
    """Vision tokens that one layer computes on. `attention` is also what its KV cache holds after prefill."""

    attention: int
    mlp: int


def layer_tokens(n: int, cuts: Sequence[Cut], place: str, layers: int) -> list[LayerTokens]:
    """Return what each of `layers` layers sees of an image of n tokens under `cuts` (at most one per layer)."""
    at, now, seen = {cut.layer: cut for cut in cuts}, n, []
    for layer in range(layers):
        left = at[layer].keep + at[layer].made if layer in at else now
        # Only a cut BEFORE the layer changes its own attention; only a cut AFTER it leaves its own MLP unchanged.
        seen.append(LayerTokens(left if place == BEFORE else now, now if place == AFTER else left))
        now = left
    return seen


def layer_mean(tokens: Sequence[LayerTokens]) -> float:
    """Return the layer mean: vision tokens that attention sees, mean over layers. Comparisons are plotted over it."""
    return sum(layer.attention for layer in tokens) / len(tokens)


def scaled_layer(published: int, layers: int, last: int) -> int:
    """Scale a layer number of a 32-layer model to `layers` layers; the result is in 1 .. last (0 where last is 0)."""
    return min(max(1, round(published * layers / 32)), last)


def one_per_layer(cuts: Sequence[Cut], n: int) -> tuple[Cut, ...]:
    """Return `cuts` with at most one per layer, without cuts that drop nothing.

    In a shallow model several published layers scale to the same one. The last cut of a layer counts.
    """
    at = {cut.layer: cut for cut in cuts}
    kept, now = [], n
    for layer in sorted(at):
        if at[layer].keep < now:
            kept.append(at[layer])
            now = at[layer].keep + at[layer].made
    return tuple(kept)


def largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    """Return whole numbers in proportion to `weights` that sum to `total`, by the largest-remainder method.

    Each number is first rounded down. The units that are missing go to the largest remainders, ties to the lowest
    index.
    """
    whole = sum(weights)
    exact = [weight * total / whole for weight in weights]
    # The tolerances 1e-9 hide floating-point noise: whole numbers stay whole, and equal remainders compare as equal.
    counts = [math.floor(value + 1e-9) for value in exact]
    rests = sorted(range(len(exact)), key=lambda i: (-round(exact[i] - counts[i], 9), i))
    for i in rests[: total - sum(counts)]:
        counts[i] += 1
    return counts


def budget_for_mean(mean_of: Callable[[int], float], n: int, target: int, method: str) -> int:
    """Return the budget K below n whose layer mean is closest to `target` without exceeding it; ties to the larger K.

    mean_of: K -> layer mean. Raises UserError, which names the smallest reachable mean, where every mean is larger.
    """
    # Every K is tried: the mean need not rise with K. SparseVLM, for example, changes its list from one K to the next.
    means = [(mean_of(k), k) for k in range(1, n)]
    reachable = [pair for pair in means if pair[0] <= target]
    if not reachable:
        smallest = min(means)[0]
        raise UserError(
            f'options.budget is "mean" and overall_tokens is {target}, but under method "{method}" the layers see at '
            f"least {smallest:.1f} of an image's {n} tokens in the mean, so at least {math.ceil(smallest)} is allowed"
        )
    return max(reachable)[1]  # pairs compare by mean first, then by K


def counts_of(keep: Sequence[float], n: int) -> list[int]:
    """Return an explicit list as counts for an image of n tokens, each from 1 to n.

    Whole numbers are counts. Floats, which lie below 1, are shares of n and are rounded down.
    """
    counts = [floor_share(value, n) if isinstance(value, float) else value for value in keep]
    return [max(1, min(count, n)) for count in counts]

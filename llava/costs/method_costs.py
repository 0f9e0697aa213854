"""Costs of each method: its matrix products in FLOPs, and the rest of its work in elements.

The costs stand in one table and not in the classes of the methods. This keeps the rules free of bookkeeping, and the
entries can be compared. A test runs every method under torch's flop counter, so an entry cannot drift from its rule
unnoticed. A new method needs one function and one line of SELECTOR_COSTS or DROPPER_COSTS. Cache policies share one
function, because their plans say what they read.

Work that is not a matrix product has no agreed price in FLOPs. It is listed separately, as elements that pass through
  softmax     exponentials
  sort        a sort or top-k
  greedy      rounds of a greedy choice x candidates per round (an argmax and an update)
  distance    pairs x width of states whose distances are summed without a matrix product
  eigen       rows ** 3 of symmetric matrices whose eigenvectors are found
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from llava.common.rounding import floor_share
from llava.costs.model_shape import ImageCounts, ModelShape, product
from llava.methods.before_llm.apet import basis_size
from llava.methods.before_llm.similarity import BLOCK
from llava.methods.before_llm.tiles import split_evenly
from llava.methods.before_llm.visionzip import PUBLISHED
from llava.methods.before_llm.vispruner import list_lengths
from llava.methods.inside_llm.dart import PIVOTS
from llava.methods.kv_cache.base import CachePolicy, Counts


@dataclass(frozen=True)
class MethodCost:
    """Cost of one method. flops: 2 x multiply-adds of matrix products. elements: kind of other work -> elements."""

    flops: int = 0
    elements: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SelectorCase:
    """The numbers that the cost of a selector depends on.

    image: one image before selection. words: m, text tokens that the method may read. kept: K. options: the method's.
    """

    shape: ModelShape
    image: ImageCounts
    words: int
    kept: int
    options: dict

    @property
    def quotas(self) -> list[int]:
        """[T] tokens of each tile that are kept by a method which selects tile by tile."""
        return split_evenly(self.kept, list(self.image.patches))

    def cosines_with_words(self) -> int:
        return product(self.words, self.shape.width, self.image.candidates)


def cosines_of_pairs(count: int, width: int) -> int:
    """FLOPs of similarity.cosine_matrix on [count, width], which computes the upper half in blocks and copies it."""
    return sum(product(min(BLOCK, count - start), width, count - start) for start in range(0, count, BLOCK))


def coverage_updates(candidates: int, tiles: int, largest: int, rounds: int) -> int:
    """FLOPs of the gain updates in coverage.py: products [tiles, rows] @ [rows, 1 + largest].

    candidates: what is covered, usually P. largest: M, patches of the largest tile. rounds: rounds of the greedy choice.

    `rows` are the patches whose nearest chosen patch has changed. Their number depends on the image, so this is an
    estimate. It assumes a random order of choice: the n-th chosen patch is then the nearest so far for one patch in n.
    A greedy choice changes fewer rows, because its first picks cover much: 0.7 times as many on the features of the
    demo's tower.
    """
    rows = round(candidates * sum(1 / n for n in range(1, rounds + 1)))
    return product(tiles, rows, 1 + largest)


def _nothing(case: SelectorCase) -> MethodCost:
    return MethodCost()


def _random(case: SelectorCase) -> MethodCost:
    return MethodCost(elements={"sort": case.image.candidates})  # a permutation, counted as a sort


def _saliency(case: SelectorCase) -> MethodCost:
    """cls, fastervlm and holov: a sort of the saliency. The tower's part `cls_row` has the attention row itself."""
    return MethodCost(elements={"sort": case.image.candidates})


def _words(case: SelectorCase) -> MethodCost:
    """t2i: cosines [m, P], a softmax of each row, and a sort."""
    elements = {"softmax": case.words * case.image.candidates, "sort": case.image.candidates}
    return MethodCost(case.cosines_with_words(), elements)


def _mix(case: SelectorCase) -> MethodCost:
    """mix: cosines [m, P] without a softmax, and a sort of each list. Without words, there is one list."""
    return MethodCost(case.cosines_with_words(), {"sort": case.image.candidates * (2 if case.words else 1)})


def _adav(case: SelectorCase) -> MethodCost:
    """adav: the cosines and softmax of t2i, and a sort of each list. The search over splits is only K + 1 products."""
    elements = {"softmax": case.words * case.image.candidates}
    return MethodCost(case.cosines_with_words(), elements | {"sort": case.image.candidates * (2 if case.words else 1)})


def look_cost(case: SelectorCase, crops: int, reads_text: bool) -> MethodCost:
    """Ranking of `crops` crops by the patches of tile 0 (zoom.py): their overlap times the importance of the patches.

    case: of tile 0 alone. reads_text: the importance has a text score beside saliency; then the split sorts both.
    """
    overlap = MethodCost(product(crops, case.image.candidates, 1))
    return together([overlap, _adav(case)]) if reads_text else overlap


def _adav_cover(case: SelectorCase) -> MethodCost:
    """adav_cover: the cost of adav, and coverage over cosines [P, P]."""
    adav, patches = _adav(case), case.image.candidates
    coverage = cosines_of_pairs(patches, case.shape.width) + coverage_updates(patches, 1, patches, case.kept)
    return MethodCost(adav.flops + coverage, adav.elements | {"greedy": case.kept * patches})


def _divprune(case: SelectorCase) -> MethodCost:
    """divprune: cosines [P, P], and K rounds over one row of them."""
    pairs = cosines_of_pairs(case.image.candidates, case.shape.width)
    return MethodCost(pairs, {"greedy": case.kept * case.image.candidates})


def _cdpruner(case: SelectorCase) -> MethodCost:
    """cdpruner: cosines [M, M] of each tile, padded to the largest. Round n of the greedy choice multiplies n columns.

    Relevance from word embeddings is a cosine matrix [m, P]. CLIP's text tower, which an option can ask for, is a
    separate model and is not counted.
    """
    tiles, largest, rounds = len(case.image.patches), max(case.image.patches), max(case.quotas)
    pairs = tiles * cosines_of_pairs(largest, case.shape.width)
    explained = sum(tiles * product(largest, n, 1) for n in range(rounds))
    default = "clip" if case.options.get("text_tower") else "embeddings"
    # The same default as in the selector: CLIP's text tower if one is given, else word embeddings.
    by_words = (case.options.get("relevance") or default) == "embeddings"
    relevance = case.cosines_with_words() if by_words else 0
    return MethodCost(pairs + explained + relevance, {"greedy": rounds * tiles * largest})


def _scope(case: SelectorCase) -> MethodCost:
    """scope: cosines [M, M] of each tile's tower states, padded to the largest tile, and the coverage of each tile."""
    tiles, largest, rounds = len(case.image.patches), max(case.image.patches), max(case.quotas)
    pairs = tiles * cosines_of_pairs(largest, case.shape.tower_width)
    updates = coverage_updates(case.image.candidates, tiles, largest, rounds)
    return MethodCost(pairs + updates, {"greedy": rounds * tiles * largest})


def _mmtok(case: SelectorCase) -> MethodCost:
    """mmtok: per tile, padded to the largest: cosines [M, M] of tower states and [m, M] of words, and their coverage.

    The words of a question are fewer where the checkpoint has a tokenizer, because stop words are left out. All of them
    are counted here.
    """
    tiles, largest, rounds = len(case.image.patches), max(case.image.patches), max(case.quotas)
    pairs = cosines_of_pairs(largest, case.shape.tower_width) + product(case.words, case.shape.width, largest)
    updates = coverage_updates(case.image.candidates + tiles * case.words, tiles, largest, rounds)
    elements = {"softmax": tiles * (case.words + largest) * largest, "greedy": rounds * tiles * largest}
    return MethodCost(tiles * pairs + updates, elements)


def _vispruner(case: SelectorCase) -> MethodCost:
    """vispruner: cosines [M, M] of each tile's tower states, padded to the largest tile; each round compares two halves."""
    tiles, largest = len(case.image.patches), max(case.image.patches)
    share, fewest = case.options.get("salient_share", 0.5), min(case.quotas)
    salient = floor_share(share, fewest)
    pairs = sum((n + 1) // 2 * (n // 2) for n in list_lengths(largest - salient, max(1, fewest - salient)))
    flops = tiles * cosines_of_pairs(largest, case.shape.tower_width)
    return MethodCost(flops, {"sort": case.image.candidates, "greedy": tiles * pairs})


def _prunesid(case: SelectorCase) -> MethodCost:
    """prunesid: per tile, padded to the largest: cosines and a Gram matrix of the tower states, both [M, M].

    The eigenvectors of the Gram matrix are listed as elements. M steps find the near duplicates of M patches.
    """
    tiles, largest, width = len(case.image.patches), max(case.image.patches), case.shape.tower_width
    flops = tiles * (cosines_of_pairs(largest, width) + product(largest, width, largest))
    elements = {"sort": case.image.candidates, "greedy": tiles * largest**2, "eigen": tiles * largest**3}
    return MethodCost(flops, elements)


def _visionzip(case: SelectorCase) -> MethodCost:
    """visionzip: per tile, cosines of the keys of n other patches with c targets, and merging as [c, n] @ [n, W]."""
    # The paper states how many tokens are dominant and contextual. Other budgets are split in the same ratio.
    dominant, contextual = PUBLISHED
    if case.options.get("dominant") is not None:
        dominant, contextual = case.options["dominant"], case.options["contextual"]
    width, flops, compared = case.shape.tower_width, 0, 0
    for patches, quota in zip(case.image.patches, case.quotas, strict=True):
        if quota:
            merged = quota * contextual // (dominant + contextual)
            others = patches - (quota - merged - 1)  # [CLS] counts as one of the dominant tokens, but it is no patch
            flops += product(others, width // case.shape.tower_heads, merged) + product(merged, others, width)
            compared += others * merged
    return MethodCost(flops, {"sort": case.image.candidates, "greedy": compared})


def _hiprune(case: SelectorCase) -> MethodCost:
    """hiprune: in two layers of the tower, the attention rows of all tokens of each tile; three sorts of the patches.

    A tower of one layer has them once.
    """
    tiles, tokens, layers = len(case.image.patches), case.shape.tile_patches + 1, min(2, case.shape.tower_layers)
    maps = layers * tiles * product(tokens, case.shape.tower_width, tokens)
    softmax = layers * tiles * case.shape.tower_heads * tokens**2
    return MethodCost(maps, {"softmax": softmax, "sort": 3 * case.image.candidates})


def _apet(case: SelectorCase) -> MethodCost:
    """apet: per tile, distances to b basis patches, errors by products of b with all patches, and merging.

    The solution of b equations, at most 10, is not counted.
    """
    shares = zip(case.image.patches, case.quotas, strict=True)
    return together(_division(patches, quota, case.shape.tower_width) for patches, quota in shares if quota)


def _division(tokens: int, quota: int, width: int) -> MethodCost:
    """The rule of ApET on `tokens` states of `width` numbers of which `quota` stay."""
    basis = basis_size(quota)
    absorbing, absorbed = quota - basis, tokens - quota
    flops = product(basis, width, basis) + 2 * product(basis, width, tokens)
    if absorbing:
        flops += 2 * product(absorbing, absorbed, width)
    elements = {"sort": 2 * tokens, "greedy": absorbing * absorbed, "distance": basis * tokens * width}
    return MethodCost(flops, elements)


SELECTOR_COSTS: dict[str, Callable[[SelectorCase], MethodCost]] = {
    "none": _nothing,
    "no_image": _nothing,
    "downsample": _nothing,
    "random": _random,
    "cls": _saliency,
    "t2i": _words,
    "mix": _mix,
    "fastervlm": _saliency,
    "visionzip": _visionzip,
    "divprune": _divprune,
    "hiprune": _hiprune,
    "apet": _apet,
    "cdpruner": _cdpruner,
    "scope": _scope,
    "mmtok": _mmtok,
    "vispruner": _vispruner,
    "holov": _saliency,
    "prunesid": _prunesid,
    "adav": _adav,
    "adav_cover": _adav_cover,
    "adav_zoom": _adav,
}


# ------------------------------------------------------------------------------------------- methods inside the LLM
@dataclass(frozen=True)
class DropperCase:
    """The numbers that the cost of dropping inside the LLM depends on: one sample with its images.

    text_tokens     text tokens of the prompt
    words           per image, how many text tokens the method may read; 0: it reads the prompt's last token
    tokens          per image, vision tokens that enter the LLM
    cuts            per image, its cuts: (layer, tokens kept, merged tokens made)
    seen            per layer, vision tokens of all images: (in attention, in the MLP)
    """

    shape: ModelShape
    text_tokens: int
    words: Sequence[int]
    tokens: Sequence[int]
    cuts: Sequence[Sequence[tuple[int, int, int]]]
    seen: Sequence[tuple[int, int]]

    def all_cuts(self) -> Iterator[tuple[int, int, int, int]]:
        """Each cut as (layer, image, tokens of the image before the cut, keys of the layer's attention with text)."""
        for image, cuts in enumerate(self.cuts):
            before = self.tokens[image]
            for layer, kept, made in cuts:
                yield layer, image, before, self.text_tokens + self.seen[layer][0]
                before = kept + made

    def rows(self, queries: int, keys: int) -> MethodCost:
        """Cost of the attention rows of `queries` tokens over `keys` tokens, in all heads."""
        flops = product(queries, self.shape.heads * self.shape.head, keys)
        return MethodCost(flops, {"softmax": self.shape.heads * queries * keys})


def together(costs: Iterable[MethodCost]) -> MethodCost:
    """The sum of several costs."""
    flops, elements = 0, {}
    for cost in costs:
        flops += cost.flops
        for kind, count in cost.elements.items():
            elements[kind] = elements.get(kind, 0) + count
    return MethodCost(flops, elements)


def _fastv(case: DropperCase) -> MethodCost:
    """fastv: the attention row of the last token, and a sort."""
    cuts = list(case.all_cuts())
    sorts = MethodCost(elements={"sort": sum(before for _, _, before, _ in cuts)})
    return together([*(case.rows(1, keys) for _, _, _, keys in cuts), sorts])


def _pyramiddrop(case: DropperCase) -> MethodCost:
    """pyramiddrop: before each layer that cuts, key projections of all tokens, and the last token's query and row.

    The layer computes these projections again afterwards, so they are an extra cost.
    """
    shape, costs, projected = case.shape, [], {}
    for layer, _, before, _ in case.all_cuts():
        keys = case.text_tokens + case.seen[layer - 1][0]
        costs += [case.rows(1, keys), MethodCost(elements={"sort": before})]
        # By layer, not added up: images that are cut in one layer share its projections.
        projected[layer] = product(1, shape.width, shape.heads * shape.head)
        projected[layer] += product(keys, shape.width, shape.kv_heads * shape.head)
    return together([*costs, MethodCost(sum(projected.values()))])


def _fitprune(case: DropperCase) -> MethodCost:
    """fitprune: in every layer that cuts, the attention rows of all vision tokens and all words, and a sort."""
    costs = []
    for _, image, before, keys in case.all_cuts():
        rows = case.rows(before + max(1, case.words[image]), keys)
        costs += [rows, MethodCost(elements={"sort": before})]
    return together(costs)


def _sparsevlm(case: DropperCase) -> MethodCost:
    """sparsevlm: one product [n, D] @ [D, m] finds the raters. Each cut has their rows, a sort, and distances.

    Which words are raters depends on the sample. All words are counted, so this is an upper bound.
    """
    costs = [
        MethodCost(product(n, case.shape.width, words), {"softmax": n * words})
        for n, words in zip(case.tokens, case.words, strict=True)
    ]
    kept = {(layer, image): cut for image, cuts in enumerate(case.cuts) for layer, *cut in cuts}
    for layer, image, before, keys in case.all_cuts():
        keep, made = kept[layer, image]
        # As sparsevlm.recycled: 30 % of the dropped tokens, rounded down, plus one. Their distances form the clusters.
        members = (before - keep) * 3 // 10 + 1 if made else 0
        elements = {"sort": before, "distance": members**2 * case.shape.width}
        costs += [case.rows(max(1, case.words[image]), keys), MethodCost(elements=elements)]
    return together(costs)


def _dart(case: DropperCase) -> MethodCost:
    """dart: cosines of the pivots with the vision tokens, and a sort of these for each pivot and for the norms.

    An image that ends the prompt has no text pivot. It is counted with one, as an image with no text behind it.
    """
    costs = []
    for image, cuts in enumerate(case.cuts):
        for _, kept, _ in cuts:
            before, pivots = case.tokens[image], min(PIVOTS, kept) + min(PIVOTS, max(1, case.words[image]))
            costs.append(MethodCost(product(pivots, case.shape.width, before), {"sort": (pivots + 2) * before}))
    return together(costs)


def apet_stage(case: DropperCase) -> MethodCost:
    """The second stage of apet: its rule on the states of all tokens of an image together."""
    sizes = [(case.tokens[image], kept + made) for image, cuts in enumerate(case.cuts) for _, kept, made in cuts]
    return together(_division(before, left, case.shape.width) for before, left in sizes)


DROPPER_COSTS: dict[str, Callable[[DropperCase], MethodCost]] = {
    "fastv": _fastv,
    "fitprune": _fitprune,
    "sparsevlm": _sparsevlm,
    "pyramiddrop": _pyramiddrop,
    "dart": _dart,
}


# -------------------------------------------------------------------------------------------------- cache policies
def cache_cost(shape: ModelShape, policy: CachePolicy, counts: Counts) -> MethodCost:
    """Cost of a cache policy in one layer after prefill: attention rows over all keys, and sorts."""
    keys, plan = counts.before + counts.image + counts.after, policy.plan(counts)
    rows, sorts = 0, 0
    # Vision entries are ranked only if some of them are evicted or stay outside the core.
    stay, _ = policy.image(counts.entered, counts.image)
    if not policy.whole and (stay < counts.image or plan.core < plan.image):
        rows, sorts = 1, counts.image
    if policy.scorer is not None:
        rows += policy.scorer.rows(plan.prompt)
        if plan.text(0) < plan.prompt:
            sorts += shape.kv_heads * plan.prompt
    if not rows:
        return MethodCost()
    elements = {"softmax": shape.heads * rows * keys} | ({"sort": sorts} if sorts else {})
    return MethodCost(product(rows, shape.heads * shape.head, keys), elements)

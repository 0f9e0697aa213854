"""ApET (arXiv 2602.19870): patches that a few basis patches cannot express stay, and absorb what is like them.

The rule is in functions of states alone. The second stage, inside the LLM, uses them too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llava.common.errors import UserError
from llava.common.transfer import to_host
from llava.methods.before_llm.base import ImageTokens, Selection, Selector
from llava.methods.before_llm.similarity import unit_rows
from llava.methods.before_llm.tiles import members_of_tiles, split_evenly
from llava.methods.ranking import lowest_index_topk

BASIS = 10  # patches of the basis of a tile
RIDGE = 1e-5  # added to the diagonal of the basis' Gram matrix


def basis_size(quota: int) -> int:
    """Return how many of a tile's `quota` tokens are basis patches: BASIS, but at most half of them, at least one."""
    return max(1, min(BASIS, quota // 2))


def farthest_from_mean(states: Tensor) -> Tensor:
    """Return the index [1] of the one of `states` [n, W] that is farthest from their mean."""
    return (states - states.mean(dim=0)).square().sum(dim=1).argmax(dim=0, keepdim=True)


def farthest_states(states: Tensor, count: int, start: Tensor) -> Tensor:
    """Return `count` of `states` [n, W] by farthest-point sampling under the squared L2 distance: indices [count].

    start [1]: the first one. Each later one is farthest from those before it, the lowest index of equals.
    """
    picks, nearest = [start], torch.full_like(states[:, 0], float("inf"))
    gone = torch.zeros(len(states), dtype=torch.bool, device=states.device)
    for _ in range(count - 1):
        nearest = torch.minimum(nearest, (states - states[picks[-1]]).square().sum(dim=1))
        gone = gone.index_fill(0, picks[-1], True)
        picks.append(nearest.masked_fill(gone, -1.0).argmax(dim=0, keepdim=True))
    return torch.cat(picks)


def approximation_errors(states: Tensor, basis: Tensor) -> Tensor:
    """Return the distance [n] of each of `states` [n, W] from its best combination of `basis` [b, W], float64.

    The coefficients are (S S' + RIDGE I)^-1 S x for the basis S.
    """
    # In float64: equal basis patches leave a Gram matrix whose inverse float32 cannot hold. solve_ex does not check for
    # a singular matrix, which would wait for the device; the ridge prevents one.
    states, basis = states.double(), basis.double()
    gram = basis @ basis.T + RIDGE * torch.eye(len(basis), dtype=basis.dtype, device=basis.device)
    coefficients = torch.linalg.solve_ex(gram, basis @ states.T).result
    return torch.linalg.vector_norm(states - coefficients.T @ basis, dim=1)


class Parts(NamedTuple):
    """The division of n tokens into those that stay and those that are absorbed. All are indices of tokens.

    absorbing [a]: tokens that stay and absorb others, ascending; absorbed [n - a - b]: all others, ascending
    basis [b]: basis tokens, in the order of choice; seats [b]: the tokens in whose places they stand
    """

    absorbing: Tensor
    absorbed: Tensor
    basis: Tensor
    seats: Tensor


def divide(states: Tensor, quota: int, start: Tensor, compat: str | None = None) -> Parts:
    """Return what becomes of each of `states` [n, W], float32, if `quota` of them are to stay.

    start [1]: the first basis token; compat: see ApET
    """
    count = basis_size(quota)
    basis = farthest_states(states, count, start)
    errors = approximation_errors(states, states[basis])
    # 1. The tokens that stay, by error. The basis is no candidate, except in the public code, where it stands in the
    # places of other tokens.
    if compat != "public":
        errors = errors.index_fill(0, basis, -1.0)
    ranked = lowest_index_topk(errors, quota)
    absorbing = torch.sort(ranked[: quota - count]).values
    seats = torch.sort(ranked[quota - count :]).values if compat == "public" else basis
    # 2. All others are absorbed. Their number is known, so nothing waits for the device.
    stays = torch.zeros(len(states), dtype=torch.int8, device=states.device)
    stays = stays.index_fill(0, absorbing, 1).index_fill(0, seats, 1)
    absorbed = stays.sort(stable=True).indices[: len(states) - quota if quota > count else 0]
    return Parts(absorbing, absorbed, basis, seats)


@dataclass
class ApET(Selector):
    """Keeps per tile 10 basis patches and the patches with the largest approximation error; these absorb all others.

    Of a tile's share q, 10 tokens (at most half of q, at least one) are the basis: farthest-point sampling of the
    tower's states under the squared L2 distance. The error of a patch is its distance from the best linear combination
    of the basis, least squares with a ridge of 1e-5. The q - 10 patches with the largest errors stay; each of the other
    patches is added to the one with the most similar state by cosine, and the sum is divided by its number of patches.
    Basis patches stay as they are. Merging is in float32, and merged states go through the projector. All tokens stay
    in raster order. Neither saliency nor question is read, and no attention.

    start   the first basis patch, as its number in the raster of its tile; by default the one that is farthest from the
            mean of its tile. In the authors' code it is drawn at random.
    compat  "public": the basis patches stand in the places of the q - 10 th to q th largest errors, in the order of
            their choice, and are absorbed like all others; the patches in whose places they stand are lost. In
            LLaVA-1.6 the authors' code keeps K tokens per tile and all newline tokens; here K stays K.
    second_stage  true: the method's second stage follows inside the LLM (llava/methods/inside_llm/apet_stage.py). It
            leaves a third of the K tokens after half of the layers.
    """

    reads_text = False
    reads_features = False
    makes_tokens = True
    tower_states = ("hidden",)

    start: int | None = None
    compat: str | None = None
    second_stage: bool = False

    def num_kept(self, image: ImageTokens, budget: int) -> int:
        smallest = min(image.on_host.sizes)
        if self.start is not None and self.start >= smallest and budget < len(image.patches):
            raise UserError(f"option 'start' is {self.start}, but a tile has {smallest} patches, counted from 0")
        return budget

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        return self.keep_all([image], [text], [budget])[0]

    def keep_all(self, images: list[ImageTokens], texts: list[Tensor], budgets: list[int]) -> list[Selection]:
        tiles = [self._tiles(image, budget) for image, budget in zip(images, budgets, strict=True)]
        # `sources` are lists of Python numbers. The numbers of a whole batch come to the host in one copy.
        parts = [part for own in tiles for tile in own for part in (tile.absorbing, tile.absorbed, tile.group)]
        numbers = iter(to_host(torch.cat(parts)).split([len(part) for part in parts]))
        sources = [[group for _ in own for group in sources_of(*(next(numbers) for _ in range(3)))] for own in tiles]
        return [_in_order(*one) for one in zip(images, tiles, sources, strict=True)]

    def _tiles(self, image: ImageTokens, budget: int) -> list[_Tile]:
        """Return the kept tokens of each tile that has a share of the budget."""
        members, _, sizes = members_of_tiles(image)
        # Broken states count as zeros, so that they spoil neither scores nor the tokens that absorb them.
        hidden = image.of_patches(image.tower.hidden[:, 1:]).float()
        hidden, patches = torch.nan_to_num(hidden, nan=0.0, posinf=0.0, neginf=0.0), image.patches
        tiles = []
        for tile, quota in enumerate(split_evenly(budget, sizes)):
            if quota:
                rows = members[tile, : sizes[tile]]
                tiles.append(self._tile(hidden[rows], patches[rows], quota))
        return tiles

    def _tile(self, states: Tensor, patches: Tensor, quota: int) -> _Tile:
        """Return the kept tokens of a tile, from the states [n, W] of its patches; patches [n]: their token indices."""
        given = self.start is not None
        start = torch.full((1,), self.start, device=states.device) if given else farthest_from_mean(states)
        parts = divide(states, quota, start, self.compat)
        made, group = absorb(states, parts.absorbing, parts.absorbed)
        return _Tile(*(patches[part] for part in parts), made, group)


class _Tile(NamedTuple):
    """The kept tokens of one tile: its Parts as token indices of the image, and the tokens made of them.

    made [a, W]: states of the absorbing tokens; group: the number of the token that each absorbed patch goes into
    """

    absorbing: Tensor
    absorbed: Tensor
    basis: Tensor
    seats: Tensor
    made: Tensor
    group: Tensor


def absorb(states: Tensor, absorbing: Tensor, absorbed: Tensor) -> tuple[Tensor, Tensor]:
    """Return (tokens [a, W], group [n]): each of the patches `absorbed` [n] goes to the most similar of `absorbing` [a].

    A token is the mean of its own state and of those that it absorbs. group: the number of the token that each absorbed
    patch goes into, by cosine, the first of equals. states: those of all patches, float32.
    """
    if not len(absorbed):
        return states[absorbing], absorbed
    unit = unit_rows(states)
    group = (unit[absorbed] @ unit[absorbing].T).argmax(dim=1)
    joined = torch.nn.functional.one_hot(group, len(absorbing)).float()
    total = states[absorbing] + joined.T @ states[absorbed]
    return total / (1 + joined.sum(dim=0))[:, None], group


def sources_of(absorbing: Tensor, absorbed: Tensor, group: Tensor) -> list[tuple[int, list[int]]]:
    """Return, for each of the patches `absorbing` [a], (it, the patches of its token in order), from tensors on the host."""
    groups = [[own] for own in absorbing.tolist()]
    for patch, number in zip(absorbed.tolist(), group.tolist(), strict=True):
        groups[number].append(patch)
    return [(members[0], sorted(members)) for members in groups]


def _in_order(image: ImageTokens, tiles: list[_Tile], sources: list[tuple[int, list[int]]]) -> Selection:
    """Return the Selection of an image: the tokens of all tiles in LLM order, each at the place of its patch."""
    absorbing, made, basis, seats = (
        torch.cat([getattr(tile, name) for tile in tiles]) for name in ("absorbing", "made", "basis", "seats")
    )
    order = torch.argsort(torch.cat([absorbing, seats]))
    kept = image.read(basis)
    features = torch.cat([image.tower.project(made).to(kept), kept])
    return Selection(
        indices=torch.cat([torch.full_like(absorbing, -1), basis])[order],
        features=features[order],
        sources=[members for _, members in sorted(sources)],
    )

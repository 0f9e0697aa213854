"""The rule of ApET with plain loops, and images whose states a test gives."""

import math

import numpy as np
import torch

from llava.methods.before_llm import ImageTokens, TowerStates
from llava.methods.before_llm.tiles import split_evenly


def one_tile(states):
    """A tile whose projector changes nothing, so that a made token shows its state. [CLS] is zero."""
    count, side = len(states), round(len(states) ** 0.5)
    patch = torch.arange(count)
    hidden = torch.cat([states[:1] * 0, states])[None]
    tower = TowerStates(lambda made: made, hidden)
    return ImageTokens(states, torch.zeros(count), patch * 0, patch // side, patch % side, tower=tower)


def naive_apet(image, budget, start=None):
    """(indices, states of the made tokens, sources) in LLM order, with plain loops and least squares in numpy.

    start: the first basis patch of every tile; None: the one farthest from the mean of its tile.
    """
    places = list(zip(image.tile.tolist(), image.row.tolist(), image.column.tolist(), strict=True))
    tiles = sorted({tile for tile, _, _ in places if tile >= 0})
    members = [sorted((i for i, p in enumerate(places) if p[0] == tile), key=lambda i: places[i]) for tile in tiles]
    side = math.isqrt(image.tower.hidden.shape[1] - 1)
    state = {
        i: image.tower.hidden[t, 1 + r * side + c].double().numpy() for i, (t, r, c) in enumerate(places) if t >= 0
    }
    tokens = {}
    for tile, quota in zip(members, split_evenly(budget, [len(tile) for tile in members]), strict=True):
        if not quota:
            continue
        mean = sum(state[i] for i in tile) / len(tile)
        basis = [max(tile, key=lambda i: ((state[i] - mean) ** 2).sum()) if start is None else start]
        while len(basis) < max(1, min(10, quota // 2)):
            rest = [i for i in tile if i not in basis]
            basis.append(max(rest, key=lambda i: min(((state[i] - state[b]) ** 2).sum() for b in basis)))
        spanned = np.stack([state[b] for b in basis])
        # The ridge as more equations: |x - S'c|^2 + 1e-5 |c|^2.
        left = np.concatenate([spanned.T, math.sqrt(1e-5) * np.eye(len(basis))])
        error = {}
        for i in tile:
            best = np.linalg.lstsq(left, np.concatenate([state[i], np.zeros(len(basis))]), rcond=None)[0]
            error[i] = np.linalg.norm(state[i] - spanned.T @ best)
        rest = sorted((i for i in tile if i not in basis), key=lambda i: -error[i])
        absorbing, others = rest[: quota - len(basis)], rest[quota - len(basis) :]
        groups = {i: [i] for i in absorbing}
        for i in others if absorbing else []:
            cosine = [state[i] @ state[a] / np.linalg.norm(state[i]) / np.linalg.norm(state[a]) for a in absorbing]
            groups[absorbing[int(np.argmax(cosine))]].append(i)
        tokens |= dict.fromkeys(basis) | groups
    order = sorted(tokens)
    made = [tokens[i] for i in order if tokens[i]]
    states = [np.mean([state[i] for i in group], axis=0) for group in made]
    return [-1 if tokens[i] else i for i in order], states, [sorted(group) for group in made]

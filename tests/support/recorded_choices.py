"""Choices of the authors' code of MMTok, VisPruner, HoloV and PruneSID on three random tiles.

tests/data/newer_selector_choices.npz has, for tile i = 1, 2, 3 with K = 64, 128, 192 tokens:
  i_hidden [577, 64]       states of the tower, [CLS] first; i_prunesid_hidden: with exactly K // 4 principal components
  i_features, i_text       projected patches [576, m + 1] and m words. Only their cosines matter, so both are coordinates in
                           the span of the words; the last coordinate of a patch is the length of the rest of its vector.
  i_saliency, i_peaked     [576]; `peaked` lets chunks of HoloV overflow
  i_barred                 patches of padding
  i_METHOD_K...            what the code kept, in its order
  i_prunesid_K_random_groups [576]   group of each patch, from the randomised PCA of the recorded run
  mmtok_words, mmtok_padding         JSON: [question, its words], and [width, height, patches of padding]
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from llava.methods.before_llm import ImageTokens, TowerStates

RECORDED = dict(np.load(Path(__file__).parents[1] / "data/newer_selector_choices.npz"))
CASES = [(1, 64), (2, 128), (3, 192)]


def recorded(name: str) -> torch.Tensor:
    return torch.tensor(RECORDED[name])


def recorded_tile(case: int, count: int = 576, saliency: str = "saliency", hidden: str = "hidden") -> ImageTokens:
    """The first `count` patches of a recorded tile; the projector only adds zeros."""
    features, patch = recorded(f"{case}_features")[:count], torch.arange(count)
    width = features.shape[1]
    states = recorded(f"{case}_{hidden}")[None]
    tower = TowerStates(lambda rows: torch.nn.functional.pad(rows, (0, max(0, width - 64)))[:, :width], states)
    return ImageTokens(
        features, recorded(f"{case}_{saliency}")[:count], patch * 0, patch // 24, patch % 24, tower=tower
    )

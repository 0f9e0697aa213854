"""Batches of a PictureSet as tensors."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llava.mm_utils import NEWLINE, merge_order, tile_plan
from llava.shapes.training.data import anyres_config, with_suffix, word_id

_WINDOW = 16  # pictures of so many batches are sorted by length together, so that batches have little padding


@dataclass
class Batch:
    """B pictures with T tiles in all, and Q questions of L tokens about each picture.

    tiles uint8 [T, 96, 96, 3]; owners int64 [T, P], index of the object that a patch shows, or -1; kinds, colors int64
    [T, 6], -1 for objects that the tile does not show. order int64 [B, N]: index of each vision token among the flat
    patches of all tiles; T * P is the newline token, T * P + 1 is padding. lengths int64 [B]: vision tokens without
    padding. questions int64 [B, Q, L]; cue, category int64 [B, Q].
    """

    tiles: Tensor
    owners: Tensor
    kinds: Tensor
    colors: Tensor
    order: Tensor
    lengths: Tensor
    questions: Tensor
    cue: Tensor
    category: Tensor


def image_order(size, pinpoints, side):
    """int64 [N]: LLM order of the patches of a picture of `size` (width, height), with NEWLINE, as in evaluation."""
    width, height = (int(value) for value in size)
    return merge_order(tile_plan((width, height), anyres_config(pinpoints)), side)


def batches(pictures, batch, pinpoints, side, seed=0, suffix_every=0, part=(0, 1)):
    """Yield every full batch of the set once, in an order that depends on `seed` only.

    seed: 0 is for validation: the order is not shuffled, and an incomplete batch is yielded, too.
    suffix_every: one batch of so many has LLaVA's "Answer the question using a single word or phrase." (0: none).
    part: (i, n) yields only the i-th of n equal parts of each batch.
    """
    orders = [image_order(size, pinpoints, side) for size in pictures.sizes]
    tokens = np.array([len(order) for order in orders])
    if pictures.captions:  # questions are all about equally long
        tokens += (pictures.questions[:, 0] != word_id("<pad>")).sum(1)
    rng = np.random.default_rng([99, seed])
    rows = np.arange(len(pictures))
    groups = []
    for start in range(0, len(rows), batch * _WINDOW):
        window = rows[start : start + batch * _WINDOW]
        # Pictures with similar numbers of tokens share a batch, which saves padding.
        window = window[np.argsort(tokens[window], kind="stable")]
        groups += [window[i : i + batch] for i in range(0, len(window), batch)]
    shuffled = rng.permutation(len(groups)) if seed else np.arange(len(groups))
    for number, group in enumerate(groups[i] for i in shuffled):
        if len(group) == batch or not seed:
            yield _collate(
                pictures, group[part[0] :: part[1]], orders, suffix_every and number % suffix_every == suffix_every - 1
            )


def _collate(pictures, group, orders, suffix):
    tiles, owners, kinds, colors, index, offset = [], [], [], [], [], 0
    for i in group:
        span = slice(int(pictures.first_tile[i]), int(pictures.first_tile[i + 1]))
        owner = np.asarray(pictures.tile_objects[span], dtype=np.int64)
        tiles.append(pictures.tiles[span])
        owners.append(owner)
        # A crop shows only some of the picture's objects, and the losses per tile must not ask for the others.
        shown = (owner[:, None, :] == np.arange(pictures.kinds.shape[1])[None, :, None]).any(-1)
        kinds.append(np.where(shown, pictures.kinds[i], -1))
        colors.append(np.where(shown, pictures.colors[i], -1))
        index.append(torch.where(orders[i] == NEWLINE, NEWLINE, orders[i] + offset))
        offset += owner.size
    lengths = torch.tensor([len(rows) for rows in index])
    order = torch.nn.utils.rnn.pad_sequence(index, batch_first=True, padding_value=offset + 1)
    order = torch.where(order == NEWLINE, offset, order)  # only now: the newline's index follows all tiles of the batch
    blocks, cue = pictures.questions[group], np.asarray(pictures.cue[group])
    if pictures.captions:
        blocks = blocks[..., : int((blocks != word_id("<pad>")).sum(-1).max())]
    if suffix:
        blocks, cue = with_suffix(blocks, cue)
    ints = [torch.from_numpy(np.concatenate(part).astype(np.int64)) for part in (owners, kinds, colors)]
    rows = [torch.from_numpy(np.asarray(part).astype(np.int64)) for part in (blocks, cue, pictures.category[group])]
    return Batch(torch.from_numpy(np.concatenate(tiles)), *ints, order, lengths, *rows)


def image_embeddings(projected, newline, order):
    """[B, N, D]: projected patches [T, P, D] in LLM order, with newline tokens. Padding is zero."""
    flat = projected.flatten(0, 1)
    return torch.cat([flat, newline[None], torch.zeros_like(newline)[None]])[order]


def jittered_positions(lengths, n, share, generator):
    """int64 [B, N + 1]: compressed positions of the vision tokens, then the first position after the image.

    A share `share` of the pictures gets a rate r (log-uniform, 0.03 to 1). Each token advances the position by one with
    probability r. No token is dropped, but neighbours share positions. The LLM thus gets used to images that span few
    positions, as after selection with new positions.
    """
    b = len(lengths)
    rate = torch.exp(torch.rand(b, 1, generator=generator) * float(np.log(0.03)))
    rate = torch.where(torch.rand(b, 1, generator=generator) < share, rate, torch.ones(b, 1))
    steps = (torch.rand(b, n, generator=generator) < rate).long()
    steps = steps * (torch.arange(n) < lengths[:, None])
    ends = steps.cumsum(1)
    return torch.cat([ends - steps, ends[:, -1:].clamp_min(1)], dim=1)  # the text never starts on the image's position


def sparse_order(batch, share, generator, least=0.0):
    """(order, lengths) as in Batch, after a share `share` of the pictures has lost background patches.

    The rate is drawn per picture, from `least` to 1. Patches that show an object stay, and newline tokens stay. The LLM thus
    does not rely on a fixed number of background tokens, and it never learns to answer without the object in question.
    """
    patches = batch.owners.numel()
    # The two extra entries are the newline token, which stays, and padding.
    shows = torch.cat([batch.owners.flatten() >= 0, torch.tensor([True, False])])[batch.order]
    rate = least + (1 - least) * torch.rand(len(batch.order), 1, generator=generator)
    rate = torch.where(torch.rand(len(batch.order), 1, generator=generator) < share, rate, torch.zeros_like(rate))
    keep = shows | (torch.rand(batch.order.shape, generator=generator) >= rate)
    keep &= torch.arange(batch.order.shape[1]) < batch.lengths[:, None]
    rows = [order[kept] for order, kept in zip(batch.order, keep, strict=True)]
    order = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=patches + 1)
    return order, keep.sum(1)

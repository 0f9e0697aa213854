"""Prefill of a batch whose rows begin alike: each shared beginning (prefix) is prefilled once.

All prompts of a run have the same text before the image. Questions about one image also share its vision tokens, if the
method does not read the question. The prefixes are prefilled from the shortest to the longest, and then the rest of each
row: every pass attends to the keys and values of the pass before it and to its own. The cache gets the same entries as from
a prefill of whole rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava.common.transfer import to_device
from llava.model.decoding.adaptive_cache import AdaptiveCache
from llava.model.decoding.decode_step import Stepper
from llava.model.decoding.prefill import right_padded, run_layers
from llava.model.decoding.prepared import PreparedPrompt


@torch.inference_mode()
def prefill_shared(model, prepared: PreparedPrompt, cache: AdaptiveCache, stepper: Stepper | None = None) -> Tensor:
    """Prefill a batch with `prefixes` into an empty cache that keeps all entries; return the float32 logits [B, V].

    stepper: runs the fused layers of the model; None calls the layers as modules
    """
    hidden, positions = (right_padded(part, prepared) for part in (prepared.inputs_embeds, prepared.position_ids))
    device, batch = hidden.device, len(prepared.lengths)
    # What is prefilled already: the entries of some prefixes, and of each row the number of its prefix and its tokens.
    entries, groups, starts = _Entries(), [0] * batch, [0] * batch

    def run(rows: list[int], ends: list[int], store: _Entries | _Cached) -> Tensor:
        """Run `rows` from where their prefix ends up to `ends`; return their logits."""
        begins = [starts[row] for row in rows]
        own = [end - begin for begin, end in zip(begins, ends, strict=True)]
        # 1. The tokens. Those behind a short row's own are tokens of any kind, which no result reads.
        at = torch.arange(max(own))
        index = (torch.tensor(begins)[:, None] + at).clamp(max=hidden.shape[1] - 1)
        picked, index = to_device(torch.tensor(rows)[:, None], device), to_device(index, device)
        last = to_device(torch.tensor(own).clamp(min=1) - 1, device)
        # 2. Of the earlier entries, a row sees those of its own prefix, without padding.
        mask = None
        if entries.length:
            before = (torch.arange(entries.length) < torch.tensor(begins)[:, None])[:, None].expand(-1, len(at), -1)
            behind = (at <= at[:, None]).expand(len(rows), -1, -1)
            mask = to_device(torch.cat([before, behind], dim=2)[:, None], device)
        # 3. The layers.
        sink = _WithEarlier(entries, [groups[row] for row in rows], begins, own, store)
        return run_layers(model, stepper, hidden[picked, index], positions[picked, index], last, sink, mask)

    for level in prepared.prefixes:
        found = _Entries()
        run([level.groups.index(n) for n in range(len(level.lengths))], list(level.lengths), found)
        entries, groups, starts = found, list(level.groups), [level.lengths[n] for n in level.groups]
    cache.begin_prefill(batch, max(prepared.lengths), right=True)
    return run(list(range(batch)), prepared.lengths, _Cached(cache))


class _Entries:
    """Keys and values of prefixes: per layer a pair of [U, G, P, d], the entries of each prefix at its begin."""

    def __init__(self):
        self._layers: list[tuple[Tensor, Tensor]] = []

    @property
    def length(self) -> int:
        """P, the entries of the longest prefix; 0 where no layer has run."""
        return self._layers[0][0].shape[2] if self._layers else 0

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._layers[layer]

    def put(self, layer: int, states: tuple[Tensor, Tensor], earlier: int, starts: list[int], own: list[int]) -> None:
        """Take the entries of a layer, as `_WithEarlier` has them."""
        longest = max(map(sum, zip(starts, own, strict=True)))
        # Zeros: what lies behind a short prefix is masked, but has to be finite, because it is multiplied with zero.
        made = [one.new_zeros(*one.shape[:2], longest, one.shape[3]) for one in states]
        for storage, one in zip(made, states, strict=True):
            _close_gaps(storage, one, earlier, starts, own)
        self._layers.append(tuple(made))


class _Cached:
    """Stores the entries of whole rows in a cache."""

    def __init__(self, cache: AdaptiveCache):
        self._cache = cache

    def put(self, layer: int, states: tuple[Tensor, Tensor], earlier: int, starts: list[int], own: list[int]) -> None:
        self._cache.room(states[0])
        target = self._cache.layers[layer]
        for storage, one in zip((target.keys, target.values), states, strict=True):
            _close_gaps(storage, one, earlier, starts, own)
        target.is_initialized = True


def _close_gaps(storage: Tensor, states: Tensor, earlier: int, starts: Sequence[int], own: Sequence[int]) -> None:
    """Copy the entries of rows to the begin of `storage` [B, G, >= start + own, d].

    states [B, G, earlier + S, d]: of each row its `start` earlier entries, padding up to `earlier`, then its `own` entries
    """
    if min(starts) == earlier:
        slots = min(storage.shape[2], states.shape[2])
        storage[:, :, :slots] = states[:, :, :slots]
        return
    for row, (start, count) in enumerate(zip(starts, own, strict=True)):
        storage[row, :, :start] = states[row, :, :start]
        storage[row, :, start : start + count] = states[row, :, earlier : earlier + count]


class _WithEarlier:
    """Takes the place of the cache while rows run: puts the entries of their prefixes before their own, and stores both.

    earlier: entries of prefixes; groups: prefix of each row; starts, own: tokens of each row's prefix and of its own
    """

    steps = 0

    def __init__(
        self, earlier: _Entries, groups: list[int], starts: list[int], own: list[int], store: _Entries | _Cached
    ):
        self._earlier, self._groups, self._starts, self._own, self._store = earlier, groups, starts, own, store
        self._whole: Tensor | None = None  # [2, B, G, P + S, d] of the layer that runs

    def update(self, key: Tensor, value: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Return the prefixes' keys and values of a layer with its own [B, G, S, d] behind them."""
        keys, values = self.room_for(layer, key.transpose(1, 2))
        keys.copy_(key)
        values.copy_(value)
        return self.seen()

    def room_for(self, layer: int, key: Tensor) -> tuple[Tensor, Tensor]:
        """Return room [B, G, S, d] for the rotated keys and the values of a layer. key [B, S, G, d]: before rotation."""
        batch, length, heads, size = key.shape
        longest = self._earlier.length
        self._whole = key.new_empty(2, batch, heads, longest + length, size)
        if longest:
            for whole, part in zip(self._whole, self._earlier.of(layer), strict=True):
                whole[:, :, :longest] = part[self._groups]
        return self._whole[0][:, :, longest:], self._whole[1][:, :, longest:]

    def seen(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values that the layer attends to, [B, G, P + S, d]."""
        return self._whole[0], self._whole[1]

    def fill(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        """Store the entries of a layer."""
        self._store.put(layer, (key, value), self._earlier.length, self._starts, self._own)

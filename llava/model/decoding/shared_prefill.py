"""Prefill of a batch whose rows begin alike: questions about one image under a method that does not read the question.

The prompt up to the end of the image is then the same for all of them. It is prefilled once per image. The rest of each
row is prefilled as a batch, and attends to the shared keys and values and to its own. The cache gets the same entries as
from a prefill of whole rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava.common.transfer import to_device
from llava.model.decoding.adaptive_cache import AdaptiveCache
from llava.model.decoding.decode_step import Stepper
from llava.model.decoding.prefill import RecordedLayers, right_padded, run_layers
from llava.model.decoding.prepared import PreparedPrompt


@torch.inference_mode()
def prefill_shared(model, prepared: PreparedPrompt, cache: AdaptiveCache, stepper: Stepper | None = None) -> Tensor:
    """Prefill a batch with `prefixes` into an empty cache that keeps all entries; return the float32 logits [B, V].

    stepper: runs the fused layers of the model; None calls the layers as modules
    """
    # 1. One row per prefix. Shorter ones are followed by tokens of their row, which no result reads.
    hidden, positions = (right_padded(part, prepared) for part in (prepared.inputs_embeds, prepared.position_ids))
    groups, lengths = prepared.prefixes.groups, prepared.prefixes.lengths
    longest, first = max(lengths), [groups.index(n) for n in range(len(lengths))]
    prefixes = RecordedLayers(len(model.model.layers))
    device = hidden.device
    if longest:
        rows = to_device(torch.tensor(first), device)
        last = to_device(torch.tensor(lengths).clamp(min=1) - 1, device)
        run_layers(model, stepper, hidden[rows, :longest], positions[rows, :longest], last, prefixes)
    # 2. What is left of each row, padded on the right.
    starts = torch.tensor([lengths[n] for n in groups])
    own = torch.tensor(prepared.lengths) - starts
    index = (starts[:, None] + torch.arange(int(own.max()))).clamp(max=hidden.shape[1] - 1)
    at = torch.arange(index.shape[1])
    before = (torch.arange(longest) < starts[:, None])[:, None].expand(-1, len(at), -1)
    behind = (at <= at[:, None]).expand(len(starts), -1, -1)
    mask = to_device(torch.cat([before, behind], dim=2)[:, None], device)
    rows, index = torch.arange(len(index), device=device)[:, None], to_device(index, device)
    # 3. Their layers, which see the prefixes before them and fill the cache.
    cache.begin_prefill(len(starts), max(prepared.lengths), right=True)
    sink = _Rests(prefixes, groups, starts.tolist(), own.tolist(), cache)
    return run_layers(
        model, stepper, hidden[rows, index], positions[rows, index], to_device(own - 1, device), sink, mask
    )


class _Rests:
    """Takes the place of the cache while the rests of rows run: adds the prefixes' entries, and stores whole rows.

    prefixes: entries of each prefix; groups: prefix of each row; starts, own: tokens of each row's prefix and of its rest
    """

    steps = 0

    def __init__(
        self, prefixes: RecordedLayers, groups: Sequence[int], starts: list[int], own: list[int], cache: AdaptiveCache
    ):
        self._prefixes, self._groups, self._cache = prefixes, list(groups), cache
        self._starts, self._own = starts, own
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
        longest = self._prefixes.length
        self._whole = key.new_empty(2, batch, heads, longest + length, size)
        if longest:
            for whole, part in zip(self._whole, self._prefixes.entries(layer), strict=True):
                whole[:, :, :longest] = part[self._groups]
        return self._whole[0][:, :, longest:], self._whole[1][:, :, longest:]

    def seen(self) -> tuple[Tensor, Tensor]:
        """Return all keys and values that the layer attends to, [B, G, P + S, d]."""
        return self._whole[0], self._whole[1]

    def fill(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        """Store the entries of whole rows, prefix and rest, without the padding between them."""
        self._cache.room(key)
        target, longest = self._cache.layers[layer], self._prefixes.length
        for storage, states in ((target.keys, key), (target.values, value)):
            if min(self._starts) == longest:
                slots = min(storage.shape[2], states.shape[2])
                storage[:, :, :slots] = states[:, :, :slots]
                continue
            for row, (start, own) in enumerate(zip(self._starts, self._own, strict=True)):
                storage[row, :, :start] = states[row, :, :start]
                storage[row, :, start : start + own] = states[row, :, longest : longest + own]
        target.is_initialized = True

"""Prefill of whole prompts: rows padded on the right, so that causal attention needs no mask and padding costs no rule.

What stands behind a row's last token is seen by nobody before it. A batch of rows of any lengths thus takes the fast
path of SDPA, and a prompt may be padded to one of few lengths, for which prefill is captured as a CUDA graph: at a few
hundred tokens a GPU waits for Python between the kernels of a layer. Prompts whose vision tokens go between layers have
their own loop (decoder.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from llava.model.kv_cache.cache import AdaptiveCache
from llava.model.prepared import PreparedPrompt

# Where prefill is captured, prompts are padded to a multiple of this: at a fixed budget of vision tokens lengths differ by
# the question's words alone, so that a few lengths are enough for all.
MULTIPLE = 64
# Tokens of a padded batch up to which prefill is captured. The buffers of a graph hold queries, keys and values of all layers:
# 0.8 GB for a 7B in 16 bits; and with more tokens the kernels take longer than Python does to launch them.
CAPTURED = 1024
# Captured lengths that are kept.
KEPT = 4


@torch.inference_mode()
def prefill(model, prepared: PreparedPrompt, cache: AdaptiveCache) -> Tensor:
    """Run a batch without `dropping` through the LLM into an empty cache. Returns [B, V] float32 logits of each row's
    first new token."""
    hidden, positions = _right(prepared.inputs_embeds, prepared), _right(prepared.position_ids, prepared)
    cache.begin_prefill(*hidden.shape[:2], right=True)
    return _run(model, hidden, positions, _last(prepared, hidden.device), cache)


class StaticPrefill:
    """prefill() in buffers of one shape: batch rows, padded to `length` tokens.

    capture: as a CUDA graph. The first call then runs plainly (it sets up libraries, which must not happen under
    capture), the second captures, and from there on the graph is replayed.
    """

    def __init__(self, model, batch: int, length: int, capture: bool):
        embedding = model.get_input_embeddings().weight
        self.model, self._capture, self._calls = model, capture, 0
        self._hidden = embedding.new_zeros(batch, length, embedding.shape[1])
        self._positions = torch.zeros(batch, length, dtype=torch.long, device=embedding.device)
        self._last = torch.zeros(batch, dtype=torch.long, device=embedding.device)
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def __call__(self, prepared: PreparedPrompt, cache: AdaptiveCache) -> Tensor:
        """As prefill(); no row is longer than the buffers. The logits are valid until the next call."""
        _right(prepared.inputs_embeds, prepared, self._hidden)
        _right(prepared.position_ids, prepared, self._positions)
        self._last.copy_(_last(prepared, self._last.device))
        self._calls += 1
        if self._graph is not None:
            self._graph.replay()
        elif self._capture and self._calls > 1:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._run()
            self._graph.replay()  # capturing runs nothing
        else:
            self._run()
        cache.begin_prefill(len(self._hidden), max(prepared.lengths), right=True)
        for layer, seen in enumerate(self._seen.layers):
            cache.fill(layer, *seen)
        if self._graph is None:
            del self._seen
        return self._logits

    def _run(self) -> None:
        self._seen = _Seen()
        self._logits = _run(self.model, self._hidden, self._positions, self._last, self._seen)


class StaticPrefills:
    """A StaticPrefill for every shape that comes again, the latest few."""

    def __init__(self, model, capture: bool = True):
        self._model, self._capture = model, capture
        self._kept: OrderedDict[tuple[int, int], StaticPrefill] = OrderedDict()

    def shapes(self) -> list[tuple[int, int]]:
        """(batch, length) of those that are kept, the latest last."""
        return list(self._kept)

    def __call__(self, prepared: PreparedPrompt, cache: AdaptiveCache) -> Tensor | None:
        """None where the prompts are not for it: tokens go between layers, or there are too many to gain by it."""
        shape = len(prepared.lengths), padded(prepared.lengths)
        if prepared.dropping is not None or shape[0] * shape[1] > CAPTURED:
            return None
        if shape not in self._kept:
            while len(self._kept) >= KEPT:
                self._kept.popitem(last=False)
            self._kept[shape] = StaticPrefill(self._model, *shape, self._capture)
        self._kept.move_to_end(shape)
        return self._kept[shape](prepared, cache)


def padded(lengths: Sequence[int]) -> int:
    """Tokens that rows of these lengths are padded to where prefill is captured."""
    return -(-max(lengths) // MULTIPLE) * MULTIPLE


class _Seen:
    """Takes the place of a cache while layers run: notes what each one's attention saw, for a cache to be filled with."""

    steps = 0

    def __init__(self):
        self.layers: list[tuple[Tensor, Tensor, Tensor, float]] = []

    def update(self, key: Tensor, value: Tensor, *_) -> tuple[Tensor, Tensor]:
        return key, value

    def fill(self, layer: int, *seen) -> None:
        self.layers.append(seen)


def _run(model, hidden: Tensor, positions: Tensor, last: Tensor, cache) -> Tensor:
    """hidden [B, S, D], positions [B, S], last [B]: slot of each row's last token -> its logits [B, V]."""
    base = model.model
    base.refuse_attention(hidden.shape[1])
    rope = base.rotary_emb(hidden, position_ids=positions)
    for layer in base.layers:
        hidden = layer(
            hidden,
            attention_mask=None,
            position_embeddings=rope,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            adaptive=cache,
        )
    rows = torch.arange(len(hidden), device=hidden.device)
    return model.lm_head(base.norm(hidden[rows, last.to(hidden.device)])).float()


def _right(padded_left: Tensor, prepared: PreparedPrompt, out: Tensor | None = None) -> Tensor:
    """[B, S, ...], padded on the left -> on the right, into `out` where it is given."""
    total = padded_left.shape[1]
    if out is None:
        if min(prepared.lengths) == total:
            return padded_left
        out = torch.zeros_like(padded_left)
    for row, length in enumerate(prepared.lengths):
        out[row, :length] = padded_left[row, total - length :]
    return out


def _last(prepared: PreparedPrompt, device: torch.device) -> Tensor:
    return torch.tensor(prepared.lengths, device=device) - 1

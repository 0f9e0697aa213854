"""Prefill of whole prompts. Rows are padded on the right, so causal attention needs no mask.

Causal attention never reads tokens behind the current one, so no real token sees the padding. Batches of rows of any
lengths therefore take the fast path of SDPA. Prompts can also be padded to one of few lengths, for which prefill is
captured as a CUDA graph: at a few hundred tokens a GPU waits for Python between the kernels of a layer. Prompts with
droppers have their own loop (layer_loop.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava.model.decoding.adaptive_cache import AdaptiveCache
from llava.model.decoding.cache_argument import CACHE
from llava.model.decoding.decode_step import Stepper
from llava.model.decoding.prepared import PreparedPrompt
from llava.model.graphs import Pool, Store, capture

# Where prefill is captured, prompts are padded to a multiple of this. At a fixed budget of vision tokens, lengths
# differ only by the words of the question, so a few lengths are enough.
GRAPH_LENGTH_MULTIPLE = 64
# Most tokens of a padded batch for which prefill is captured. The buffers of a graph hold queries, keys and values of
# all layers: 0.8 GB for a 7B model in 16 bits. With more tokens, kernels run longer than Python needs to launch them.
MAX_CAPTURED_TOKENS = 1024


@torch.inference_mode()
def prefill(model, prepared: PreparedPrompt, cache: AdaptiveCache, stepper: Stepper | None = None) -> Tensor:
    """Prefill a batch without `dropping` into an empty cache; return the float32 logits [B, V] of the first new tokens.

    stepper: runs the fused layers of the model; None calls the layers as modules
    """
    hidden, positions = right_padded(prepared.inputs_embeds, prepared), right_padded(prepared.position_ids, prepared)
    cache.begin_prefill(*hidden.shape[:2], right=True)
    return run_layers(model, stepper, hidden, positions, _last(prepared, hidden.device), cache)


class StaticPrefill:
    """prefill() in buffers of one shape: `batch` rows, padded to `length` tokens.

    captures: whether to capture a CUDA graph. The first call then runs without one: it compiles kernels and sets up
        libraries, which must not happen during a capture. The second call captures, and all calls from then on replay.
    """

    busy = False

    def __init__(
        self, model, batch: int, length: int, stepper: Stepper | None = None, captures=True, pool: Pool | None = None
    ):
        self._stepper = stepper
        embedding = model.get_input_embeddings().weight
        self.model, self._captures, self._pool, self._calls = model, captures, pool, 0
        self._hidden = embedding.new_zeros(batch, length, embedding.shape[1])
        self._positions = torch.zeros(batch, length, dtype=torch.long, device=embedding.device)
        self._last = torch.zeros(batch, dtype=torch.long, device=embedding.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._seen: RecordedLayers | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, length) of the buffers."""
        return tuple(self._positions.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the input buffers and of the graph's output buffers."""
        return self._hidden.nbytes + self._positions.nbytes + (0 if self._seen is None else self._seen.nbytes)

    @torch.inference_mode()
    def __call__(self, prepared: PreparedPrompt, cache: AdaptiveCache) -> Tensor:
        """Prefill as prefill() does; no row may be longer than the buffers. Logits are valid until the next call."""
        # 1. The inputs, into the buffers.
        right_padded(prepared.inputs_embeds, prepared, self._hidden)
        right_padded(prepared.position_ids, prepared, self._positions)
        self._last.copy_(_last(prepared, self._last.device))
        # 2. The layers.
        self._calls += 1
        if self._graph is None and self._captures and self._calls > 1:
            self._graph = capture(self._run, self._pool)
            self._captures = self._graph is not None
        if self._graph is not None:
            self._graph.replay()
        else:
            self._run()
        # 3. Keys and values from the graph's buffers, which the next call overwrites, into the cache.
        cache.begin_prefill(len(self._hidden), max(prepared.lengths), right=True)
        self._seen.give(cache)
        if self._graph is None:
            self._seen = None
        return self._logits

    def _run(self) -> None:
        self._seen = RecordedLayers(len(self.model.model.layers))
        self._logits = run_layers(self.model, self._stepper, self._hidden, self._positions, self._last, self._seen)


class StaticPrefills:
    """A StaticPrefill for every shape, in a Store that limits their bytes."""

    def __init__(
        self, model, store: Store, stepper: Stepper | None = None, captures: bool = True, pool: Pool | None = None
    ):
        self._model, self._store, self._how = model, store, (stepper, captures, pool)

    def __call__(self, prepared: PreparedPrompt, cache: AdaptiveCache) -> Tensor | None:
        """Prefill and return the logits; return None, and do nothing, for prompts that are not captured.

        These are prompts with a dropper, and prompts with too many tokens to gain from it.
        """
        shape = len(prepared.lengths), padded(prepared.lengths)
        if prepared.dropping is not None or shape[0] * shape[1] > MAX_CAPTURED_TOKENS:
            return None
        kept = self._store.get(("prefill", *shape))
        if kept is None:
            kept = StaticPrefill(self._model, *shape, *self._how)
            self._store.put(("prefill", *shape), kept)
        return kept(prepared, cache)


def padded(lengths: Sequence[int]) -> int:
    """Return the number of tokens to which rows of these lengths are padded where prefill is captured."""
    return -(-max(lengths) // GRAPH_LENGTH_MULTIPLE) * GRAPH_LENGTH_MULTIPLE


class RecordedLayers:
    """Replaces the cache while layers run: records the entries of each layer, from which a cache is filled later.

    A captured prefill cannot write into the cache of a request, because a graph writes to fixed addresses.
    """

    steps = 0

    def __init__(self, layers: int):
        self._count = layers
        self._kv: Tensor | None = None  # [2, L, B, G, S, d]; None where layers do not ask for room_for
        self._layers: list[tuple[Tensor, Tensor, Tensor, float]] = []

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for query, key, value, _ in self._layers for tensor in (query, key, value))

    def update(self, key: Tensor, value: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        return key, value

    def room_for(self, layer: int, key: Tensor) -> Tensor:
        """Return room [2, B, G, S, d] for a layer's keys and values. key [B, S, G, d]: its keys before rotation."""
        if self._kv is None:
            batch, length, heads, size = key.shape
            self._kv = key.new_empty(2, self._count, batch, heads, length, size)
        return self._kv[:, layer]

    def fill(self, layer: int, *seen) -> None:
        self._layers.append(seen)

    def give(self, cache: AdaptiveCache) -> None:
        """Fill an empty cache whose begin_prefill has been called."""
        if self._kv is not None and cache.fill_all(self._kv):
            return
        for number, seen in enumerate(self._layers):
            cache.fill(number, *seen)


def run_layers(
    model, stepper: Stepper | None, hidden: Tensor, positions: Tensor, last: Tensor, cache, mask: Tensor | None = None
) -> Tensor:
    """Return the logits [B, V] behind each row's last token.

    hidden [B, S, D]; positions [B, S]; last [B]: slot of each row's last token
    cache: takes the entries of each layer
    mask: bool [B, 1, S, P + S] where the cache puts P earlier entries before the own ones; None is plain causal attention
    """
    base = model.model
    base.refuse_attention(hidden.shape[1] if mask is None else mask.shape[-1])
    if stepper is not None and stepper.fused:
        return stepper.prefill(hidden, positions, last, cache, mask)
    rope = base.rotary_emb(hidden, position_ids=positions)
    for layer in base.layers:
        hidden = layer(
            hidden,
            attention_mask=mask,
            position_embeddings=rope,
            position_ids=positions,
            use_cache=True,
            adaptive=cache,
            **{CACHE: cache},
        )
    rows = torch.arange(len(hidden), device=hidden.device)
    return model.lm_head(base.norm(hidden[rows, last.to(hidden.device)])).float()


def right_padded(padded_left: Tensor, prepared: PreparedPrompt, out: Tensor | None = None) -> Tensor:
    """Return a left-padded batch [B, S, ...] padded on the right, in `out` [B, >= S, ...] where it is given.

    The padding behind a row's last token has arbitrary content, which no result depends on.
    """
    total = padded_left.shape[1]
    if min(prepared.lengths) < total:
        at = torch.arange(total).expand(len(prepared.lengths), -1)
        index = (at + total - torch.tensor(prepared.lengths)[:, None]) % total
        index = _to(index, padded_left.device)
        rows = torch.arange(len(index), device=index.device)[:, None]
        padded_left = padded_left[rows, index]
    if out is None:
        return padded_left
    out[:, :total] = padded_left
    return out


def _last(prepared: PreparedPrompt, device: torch.device) -> Tensor:
    return _to(torch.tensor(prepared.lengths) - 1, device)


def _to(numbers: Tensor, device: torch.device) -> Tensor:
    """Return numbers of the host on the device. From pinned memory the copy does not wait for the device."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers

"""What a worker measures beside its answers: when the first token came, how many bytes the KV cache takes, peak memory."""

from __future__ import annotations

import resource
import sys
import time

import torch
from torch import Tensor
from transformers import StoppingCriteria


class FirstToken(StoppingCriteria):
    """Notes when generate() has its first token, which ends prefill; stops nothing."""

    def __init__(self, device: torch.device):
        self._device = device
        self._start = self._now()
        self._first: float | None = None

    def __call__(self, input_ids, scores, **kwargs) -> Tensor:
        if self._first is None:
            self._first = self._now()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def split(self) -> tuple[float, float]:
        """(prefill, decode) in seconds, up to now."""
        end = self._now()
        first = self._first if self._first is not None else end
        return first - self._start, end - first

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def kv_bytes(cache, config, attention_mask: Tensor, new_tokens: list[int], dropping=None) -> list[dict[str, int]]:
    """Per row of a batch, at the end of generation: bytes of its KV cache.

    attention_mask: [B, S] of the prompt that entered the LLM. new_tokens: tokens that each row generated.
    dropping: the prompt's, where its vision tokens went between layers: caches then differ from layer to layer.
    kv_bytes_live       entries of the row's own tokens, measured on the cache; padding excluded
    kv_bytes_allocated  the row's share of what the cache's tensors occupy
    kv_bytes_predicted  live, from the configuration alone: KV heads x head size x 2 x bytes x tokens, over all layers
    """
    rows, layers = attention_mask.shape[0], config.num_hidden_layers
    whole = attention_mask.sum(dim=1).tolist()
    prompts = [[n] * layers for n in whole] if dropping is None else [dropping.cached(row) for row in range(rows)]
    # The last new token is never fed back, and what a batch feeds a row after its end is padding.
    tokens = [[n + max(new - 1, 0) for n in prompt] for prompt, new in zip(prompts, new_tokens, strict=True)]
    live, allocated = [0] * rows, 0
    for number, layer in enumerate(cache.layers):
        for tensor in (layer.keys, layer.values):
            allocated += tensor.untyped_storage().nbytes()
            entry = tensor.nbytes // (rows * tensor.shape[-2])
            live = [bytes_ + entry * n[number] for bytes_, n in zip(live, tokens, strict=True)]
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_entry = heads * head * 2 * cache.layers[0].keys.element_size()
    return [
        {
            "kv_bytes_live": live[i],
            "kv_bytes_allocated": allocated // rows,
            "kv_bytes_predicted": per_entry * sum(tokens[i]),
        }
        for i in range(rows)
    ]


def peak_memory() -> dict[str, int]:
    """Largest resident memory of this process so far, and of its GPUs, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        found["peak_cuda"] = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return found

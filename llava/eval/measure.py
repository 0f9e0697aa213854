"""What a worker measures beside its answers: when the first token came, how many bytes the KV cache takes, peak memory,
and what the batch should have cost."""

from __future__ import annotations

import resource
import sys
import time

import torch
from torch import Tensor
from transformers import StoppingCriteria

from llava.config import AdaVConfig
from llava.eval.flops import Cost, predict
from llava.eval.model_shape import ImageCounts, ModelShape
from llava.model.kv_cache.cache import AdaptiveCache
from llava.model.prepared import PreparedPrompt


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


def predicted(prepared: PreparedPrompt, images: list[ImageCounts], shape: ModelShape, config: AdaVConfig) -> list[Cost]:
    """What each row of a batch costs by itself. images: of the batch in reading order, as they were before selection."""
    costs, images, length = [], iter(images), prepared.inputs_embeds.shape[1]
    for row, spans in enumerate(prepared.image_spans):
        kept = [n for _, n in spans]
        text = prepared.lengths[row] - sum(kept)
        # Text after an image is what is not a token of it or of a later one. (text_scope="turn" may read less of it.)
        words = [length - start - sum(kept[i:]) for i, (start, _) in enumerate(spans)]
        costs.append(predict(shape, config, [next(images) for _ in spans], text, words, kept))
    return costs


def kv_bytes(cache, costs: list[Cost], prepared: PreparedPrompt, new_tokens: list[int]) -> list[dict[str, int]]:
    """Per row of a batch, at the end of generation: bytes of its KV cache.

    costs: of each row, as predicted. prepared: what entered the LLM. new_tokens: tokens that each row generated.
    kv_bytes_live       entries of the row's own tokens, measured on the cache; padding excluded
    kv_bytes_allocated  the row's share of what the cache's tensors occupy
    kv_bytes_predicted  live, from the configuration alone (llava.eval.flops)
    """
    rows, size = len(new_tokens), cache.layers[0].keys.element_size()
    # The last new token is never fed back, and what a batch feeds a row after its end is padding.
    steps = [max(new - 1, 0) for new in new_tokens]
    live, allocated = [0] * rows, 0
    for layer, entries in zip(cache.layers, _entries(cache, prepared, steps), strict=True):
        for tensor in (layer.keys, layer.values):
            allocated += tensor.untyped_storage().nbytes()
            entry = tensor.nbytes // (rows * tensor.shape[-2])
            live = [bytes_ + entry * n for bytes_, n in zip(live, entries, strict=True)]
    return [
        {
            "kv_bytes_live": live[i],
            "kv_bytes_allocated": allocated // rows,
            "kv_bytes_predicted": costs[i].kv_bytes(size, steps[i]),
        }
        for i in range(rows)
    ]


def _entries(cache, prepared: PreparedPrompt, steps: list[int]) -> list[list[int]]:
    """Per layer, per row: entries of its own that the cache holds after so many decode steps of that row."""
    if isinstance(cache, AdaptiveCache):
        return [[layer.stored(row, fed) for row, fed in enumerate(steps)] for layer in cache.layers]
    if prepared.dropping is None:
        prompts = [prepared.attention_mask.sum(dim=1).tolist()] * len(cache.layers)
    else:
        prompts = [prepared.dropping.stages[stage].lengths for stage in prepared.dropping.stage_of]
    return [[n + fed for n, fed in zip(layer, steps, strict=True)] for layer in prompts]


def peak_memory() -> dict[str, int]:
    """Largest resident memory of this process so far, and of its GPUs, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        found["peak_cuda"] = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return found

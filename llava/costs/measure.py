"""Measurements of a worker: bytes of the KV cache, peak memory, and the predicted cost of a batch."""

from __future__ import annotations

import resource
import sys

import torch

from llava.config import AdaVConfig
from llava.costs.flops import Cost, predict
from llava.costs.model_shape import ImageCounts, ModelShape
from llava.methods.inside_llm.plan import layer_mean
from llava.model.decoding.adaptive_cache import AdaptiveCache
from llava.model.decoding.prepared import PreparedPrompt


def predicted(prepared: PreparedPrompt, images: list[ImageCounts], shape: ModelShape, config: AdaVConfig) -> list[Cost]:
    """Predicted cost of each row of a batch, as if the row ran alone.

    images: all images of the batch in reading order, before selection.
    """
    costs, images, length = [], iter(images), prepared.inputs_embeds.shape[1]
    for row, spans in enumerate(prepared.image_spans):
        kept = [n for _, n in spans]
        text = prepared.lengths[row] - sum(kept)
        # Text after an image: the slots from its start on, without its own tokens and those of later images. With
        # text_scope="turn", the method may read less of it.
        words = [length - start - sum(kept[i:]) for i, (start, _) in enumerate(spans)]
        tiles = [selection.tiles for selection in prepared.selections[row]]
        costs.append(predict(shape, config, [next(images) for _ in spans], text, words, kept, tiles=tiles))
    return costs


def kv_bytes(cache: AdaptiveCache, costs: list[Cost], new_tokens: list[int]) -> list[dict[str, int]]:
    """Bytes of each row's KV cache at the end of generation.

    costs: predicted cost of each row. new_tokens: how many tokens each row generated.

    kv_bytes_live       entries of the row's own tokens, measured on the cache, without padding
    kv_bytes_allocated  the row's share of what the cache's tensors occupy
    kv_bytes_predicted  prediction of the live bytes from the configuration alone (llava.costs.flops)
    kv_bytes_read       bytes that a decode step reads, mean over the row's steps, predicted as well; 0 without steps
    """
    rows, size = len(new_tokens), cache.layers[0].keys.element_size()
    # The last new token is never fed back, so it has no entry. After a row's end, the batch feeds it padding.
    steps = [max(new - 1, 0) for new in new_tokens]
    live, allocated = [0] * rows, cache.kv_nbytes
    for layer in cache.layers:
        entries = [layer.stored(row, fed) for row, fed in enumerate(steps)]
        for tensor in (layer.keys, layer.values):
            entry = tensor.nbytes // max(1, rows * tensor.shape[-2])  # a policy may keep nothing
            live = [bytes_ + entry * n for bytes_, n in zip(live, entries, strict=True)]
    return [
        {
            "kv_bytes_live": live[i],
            "kv_bytes_allocated": allocated // rows,
            "kv_bytes_predicted": costs[i].kv_bytes(size, steps[i]),
            "kv_bytes_read": sum(costs[i].read_bytes(size, step + 1) for step in range(steps[i])) // max(steps[i], 1),
        }
        for i in range(rows)
    ]


def peak_memory() -> dict[str, int]:
    """Largest memory so far in bytes: resident memory of this process, and allocated memory summed over its GPUs."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS and KiB on Linux
    found = {"peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        found["peak_cuda"] = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return found


def vision_tokens(prepared: PreparedPrompt, row: int) -> dict[str, list]:
    """Vision tokens of each image of a row: the last count, and the layer mean."""
    dropping, selections = prepared.dropping, prepared.selections[row]
    if dropping is None:
        kept = [len(selection.indices) for selection in selections]
        return {"kept": kept, "layer_mean": kept}
    return {
        "kept": [dropping.left(row, image) for image in range(len(selections))],
        "layer_mean": [round(layer_mean(dropping.schedule(row, image)), 4) for image in range(len(selections))],
    }

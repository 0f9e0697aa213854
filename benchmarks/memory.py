"""Memory: how fast it is here, how much of it was in use, and the ceiling that its speed sets to decoding."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch


def cache_bytes(device: str) -> int:
    """The last level of the processor's cache."""
    if device == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        return 1024 * int(Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip().rstrip("K"))
    except (OSError, ValueError):
        return 32 << 20


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read plus written, of copying four times what the processor's cache holds, at least 256 MiB.

    The fastest of ten: a ceiling is what memory can do when nobody else asks it. (A CPU may also read what it is about
    to overwrite; that is not counted, so one that only reads can pass this speed.)
    """
    source = torch.ones(max(256 << 20, 4 * cache_bytes(device)), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    samples = []
    for _ in range(10):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return 2 * source.numel() / min(samples)


class Peak:
    """The most memory in use since it was made, weights included: the device's, or this process's where that is the CPU."""

    def __init__(self, device: str):
        self.cuda, self.known = device == "cuda", True
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self.known = False
            with suppress(OSError):  # Linux alone forgets an earlier peak; elsewhere none is told
                Path("/proc/self/clear_refs").write_text("5")
                self.known = True

    def bytes(self) -> int | None:
        """None where the system does not tell."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        if self.known:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return 1024 * int(line.split()[1])
        return None


def decode_weight_bytes(model) -> int:
    """Bytes of the weights that a decode step reads whole: the decoder's layers, its norm and the head. Of the word
    embeddings it reads a row per token."""
    parts = (model.model.layers, model.model.norm, model.lm_head)
    return sum(weight.nbytes for part in parts for weight in part.parameters())


@torch.inference_mode()
def bare_step(model, batch: int) -> float:
    """Seconds of a decode step's products with weights alone, no attention and nothing between them: the fastest of ten.

    What a step takes beyond it is the overhead: KV cache, norms, rotation, and the host where it is waited for.
    """
    parts = (model.model.layers, model.lm_head)
    weights = [linear.weight for part in parts for linear in part.modules() if isinstance(linear, torch.nn.Linear)]
    inputs = {weight.shape[1]: weight.new_ones(batch, weight.shape[1]) for weight in weights}
    cuda, samples = weights[0].is_cuda, []
    for _ in range(10):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        if cuda:
            torch.cuda.synchronize()
        samples.append(time.perf_counter() - start)
    return min(samples)


def step_bytes(weights: int, kv: Sequence[int], batch: int) -> float:
    """Bytes that a decode step reads in the mean: the weights once, and every row's KV entries.

    kv: per step, bytes of the entries that one row reads
    """
    return weights + batch * sum(kv) / len(kv)


def ceiling(bytes_per_step: float, bandwidth: float, batch: int) -> float:
    """Tokens per second of a batch whose steps did nothing but read what they have to."""
    return batch * bandwidth / bytes_per_step

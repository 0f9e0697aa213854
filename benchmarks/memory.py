"""Memory bandwidth, peak memory, and the ceiling that bandwidth sets for decoding."""

from __future__ import annotations

import gc
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import torch

from llava.common.errors import UserError

T = TypeVar("T")
OUT_OF_MEMORY = "out of memory"


def cache_bytes(device: str) -> int:
    """Bytes of the last level of the processor's cache: the L2 of a GPU, the L3 of a CPU, or 32 MiB if unknown."""
    if device == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        return 1024 * int(Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip().rstrip("K"))
    except (OSError, ValueError):
        return 32 << 20


def fastest(run: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of ten calls: by the clock on a CPU; on a GPU between two events, without launch time."""
    if device != "cuda":
        samples = []
        for _ in range(10):
            start = time.perf_counter()
            run()
            samples.append(time.perf_counter() - start)
        return min(samples)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(10)]
    for start, end in pairs:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return min(start.elapsed_time(end) for start, end in pairs) / 1e3


def _block(device: str) -> torch.Tensor:
    """float32 tensor of 2 GiB on a GPU, or of four times the cache but at least 256 MiB on a CPU."""
    # Much larger than the cache, or the bandwidth of the cache would be measured.
    size = 2 << 30 if device == "cuda" else max(256 << 20, 4 * cache_bytes(device))
    return torch.ones(size // 4, dtype=torch.float32, device=device)


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a copy, read plus written: the fastest of ten.

    The fastest counts, because a ceiling is what memory can do without other work. A CPU may also read the memory that
    it is about to overwrite. This is not counted, so code that only reads can be faster than this speed.
    """
    source = _block(device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source), device)


def read_bandwidth(device: str) -> float:
    """Bytes per second of reading alone, as decoding does: a sum over the block, the fastest of ten."""
    source = _block(device)
    return source.nbytes / fastest(source.sum, device)


def free_memory(device: str) -> None:
    """Free unused tensors, and give their memory back to the device."""
    # Models and graphs can be in reference cycles, which only gc frees; empty_cache returns only what is free already.
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def attempt(run: Callable[[], T]) -> tuple[T | None, str]:
    """(result of `run`, ""), or (None, reason) if it fails. The reason is OUT_OF_MEMORY or the error.

    Errors of all types are caught, because one failed measurement must not lose the others' figures. Their traceback is
    printed. Bad input (UserError) is raised. The tensors of a failed run are not referenced any more, so free_memory()
    frees them.
    """
    try:
        return run(), ""
    except UserError:
        raise
    except Exception as error:
        # PyTorch's allocator raises a class of its own. CUDA itself and Triton's launcher raise a RuntimeError.
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
            return None, OUT_OF_MEMORY
        traceback.print_exc(file=sys.stderr)
        return None, "".join(traceback.format_exception_only(error)).strip().partition("\n")[0]


class Peak:
    """Peak memory since this object was made, weights included: of the GPU, or of this process on a CPU."""

    def __init__(self, device: str):
        self.cuda, self.known = device == "cuda", True
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            self.known = False
            with suppress(OSError):  # only Linux can reset the peak ("5" resets VmHWM); elsewhere it stays unknown
                Path("/proc/self/clear_refs").write_text("5")
                self.known = True

    def bytes(self) -> int | None:
        """Peak in bytes, None if the system does not report it."""
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        if self.known:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return 1024 * int(line.split()[1])
        return None


def decode_weight_bytes(model) -> int:
    """Bytes of the weights that a decode step reads: the decoder layers, the final norm and the LM head.

    The word embeddings are left out, because a step reads only one row of them per token.
    """
    parts = (model.model.layers, model.model.norm, model.lm_head)
    return sum(weight.nbytes for part in parts for weight in part.parameters())


@torch.inference_mode()
def bare_step(model, batch: int) -> float:
    """Seconds of the products with weights of a decode step, without attention and all else: the fastest of ten.

    The rest of a step's time is the overhead: KV cache, norms, rotation, and waiting for the host. On a GPU, the
    products are one CUDA graph, as in the engine's steps.
    """
    weights = _products(model)
    inputs = {weight.shape[1]: weight.new_ones(batch, weight.shape[1]) for weight in weights}

    def step():
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    if not weights[0].is_cuda:
        return fastest(step, "cpu")
    step()  # sets up cuBLAS, which is not allowed during capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return fastest(graph.replay, "cuda")


def _products(model) -> list[torch.Tensor]:
    """Weights of a decode step's products, in order.

    Weights that are adjacent in one allocation (merge_projections) are joined, because a step computes them as one
    product.
    """
    joined: list[torch.Tensor] = []
    for part in (model.model.layers, model.lm_head):
        for linear in part.modules():
            if isinstance(linear, torch.nn.Linear):
                weight = linear.weight.detach()
                if joined and _follows(joined[-1], weight):
                    last = joined.pop()
                    shape = (len(last) + len(weight), weight.shape[1])
                    weight = last.as_strided(shape, last.stride(), last.storage_offset())
                joined.append(weight)
    return joined


def _follows(first: torch.Tensor, second: torch.Tensor) -> bool:
    same = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    return same and first.stride() == second.stride() and second.data_ptr() == first.data_ptr() + first.nbytes


def step_bytes(weights: int, kv: Sequence[int], batch: int) -> float:
    """Mean bytes that a decode step reads: the weights once, and the KV entries of every row.

    kv: per step, bytes of the entries that one row reads.
    """
    return weights + batch * sum(kv) / len(kv)


def ceiling(bytes_per_step: float, bandwidth: float, batch: int) -> float:
    """Tokens per second of a batch whose steps only read their bytes, at `bandwidth` bytes per second."""
    return batch * bandwidth / bytes_per_step

"""Memory: how fast it is here, how much of it was in use, and the ceiling that its speed sets to decoding."""

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
    """The last level of the processor's cache."""
    if device == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        return 1024 * int(Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip().rstrip("K"))
    except (OSError, ValueError):
        return 32 << 20


def fastest(run: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of ten calls: between two events on a GPU, which leaves launching out, else by the clock."""
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
    """float32 numbers that fill 2 GiB of a GPU; of a CPU four times its cache, at least 256 MiB."""
    size = 2 << 30 if device == "cuda" else max(256 << 20, 4 * cache_bytes(device))
    return torch.ones(size // 4, dtype=torch.float32, device=device)


def copy_bandwidth(device: str) -> float:
    """Bytes per second, read plus written, of a copy: the fastest of ten.

    A ceiling is what memory can do when nobody else asks it. (A CPU may also read what it is about to overwrite; that is
    not counted, so one that only reads can pass this speed.)
    """
    source = _block(device)
    target = torch.zeros_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source), device)


def read_bandwidth(device: str) -> float:
    """Bytes per second of reading alone, which is what decoding does: a sum over the block, the fastest of ten."""
    source = _block(device)
    return source.nbytes / fastest(source.sum, device)


def free_memory(device: str) -> None:
    """Collect what nobody holds any more, and give its memory back to the device."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def attempt(run: Callable[[], T]) -> tuple[T | None, str]:
    """(what `run` returns, ""), or (None, why it returned nothing): OUT_OF_MEMORY, or the error, whose traceback is printed.

    Errors of any kind: one measurement that breaks must not take the others' figures with it. Bad input (UserError) is
    raised. Tensors of a failed run are not held any more: free_memory() then frees them.
    """
    try:
        return run(), ""
    except UserError:
        raise
    except Exception as error:
        # PyTorch's allocator has a class for it; CUDA itself and Triton's launcher say it in a RuntimeError.
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
            return None, OUT_OF_MEMORY
        traceback.print_exc(file=sys.stderr)
        return None, "".join(traceback.format_exception_only(error)).strip().partition("\n")[0]


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

    What a step takes beyond it is the overhead: KV cache, norms, rotation, and the host where it is waited for. On a GPU the
    products are one CUDA graph, as the engine's steps are.
    """
    weights = _products(model)
    inputs = {weight.shape[1]: weight.new_ones(batch, weight.shape[1]) for weight in weights}

    def step():
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    if not weights[0].is_cuda:
        return fastest(step, "cpu")
    step()  # sets up cuBLAS, which must not happen under capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return fastest(graph.replay, "cuda")


def _products(model) -> list[torch.Tensor]:
    """Weights that a decode step multiplies with, in their order. Those that lie behind one another in one allocation and
    read the same input (merge_projections) are one: a step takes one product for them."""
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
    """Bytes that a decode step reads in the mean: the weights once, and every row's KV entries.

    kv: per step, bytes of the entries that one row reads
    """
    return weights + batch * sum(kv) / len(kv)


def ceiling(bytes_per_step: float, bandwidth: float, batch: int) -> float:
    """Tokens per second of a batch whose steps did nothing but read what they have to."""
    return batch * bandwidth / bytes_per_step

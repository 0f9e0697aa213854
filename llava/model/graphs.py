"""CUDA graphs: the one place that captures, and how many bytes of captured things are kept.

A graph replays kernels over buffers that stay where they are, without Python between them. Capturing costs about a tenth of
a second and the buffers stay allocated, so that it pays only for work that comes again in the same shapes.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Protocol

import torch


def available(device: torch.device) -> bool:
    """Whether work on `device` can be captured."""
    return device.type == "cuda"


def new_pool():
    """A memory pool for the graphs of one engine. They are never replayed at the same time, so they may share one."""
    return torch.cuda.graph_pool_handle()


def capture(run: Callable[[], object], pool=None) -> torch.cuda.CUDAGraph | None:
    """Capture `run`, which must need nothing of the host. Capturing runs nothing: replay the graph for its results.

    None where the capture failed, for want of memory above all: nothing of it is left, and whoever asked goes on without a
    graph. capture_error_mode: calls of other threads (a data loader that pins memory) must not break a capture.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            run()
        return graph
    except RuntimeError as error:  # torch.OutOfMemoryError, and what CUDA says of a capture that was cut off, are such
        reason = str(error).strip().splitlines() or [type(error).__name__]
    finally:
        torch.cuda.set_stream(stream)  # torch leaves the capture's stream current where its end fails
    # The error's traceback held what the capture had allocated; only now is it gone.
    del graph
    torch.cuda.empty_cache()
    warnings.warn(f"a CUDA graph could not be captured ({reason[0]}); going on without it", stacklevel=2)
    return None


class Kept(Protocol):
    """What a Store keeps: something of so many bytes that may be in use right now."""

    nbytes: int
    busy: bool


class Store:
    """Captured things by shape, those used last kept longest, within a bound of bytes.

    limit: bytes of all that are not in use.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._held: OrderedDict[Hashable, Kept] = OrderedDict()

    def get(self, shape: Hashable):
        """None where nothing is kept for the shape."""
        if shape in self._held:
            self._held.move_to_end(shape)
        return self._held.get(shape)

    def put(self, shape: Hashable, kept: Kept) -> None:
        self._held[shape] = kept

    def drop(self, shape: Hashable) -> None:
        self._held.pop(shape, None)

    def evict(self, spare: Hashable = None) -> None:
        """Let go of what was used longest ago until what is idle fits; what `spare` names stays."""
        idle = [shape for shape, kept in self._held.items() if shape != spare and not kept.busy]
        total = sum(self._held[shape].nbytes for shape in idle)
        for shape in idle:
            if total <= self.limit:
                return
            total -= self._held.pop(shape).nbytes

    def clear(self) -> None:
        """Let go of everything that is not in use."""
        self._held = OrderedDict((shape, kept) for shape, kept in self._held.items() if kept.busy)

    def all(self) -> list:
        """Everything that is kept, that used last at the end."""
        return list(self._held.values())

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in self._held.values())

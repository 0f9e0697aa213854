"""CUDA graphs: the one function that captures, and a store that limits the bytes of captured work.

A graph replays kernels over buffers at fixed addresses, without Python between them. A capture costs about a tenth of a
second, and its buffers stay allocated. It therefore pays only for work that repeats in the same shapes.
"""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Protocol

import torch


def available(device: torch.device) -> bool:
    """Return whether work on `device` can be captured."""
    return device.type == "cuda"


class Pool:
    """The memory pool of all graphs of one engine. They never replay at the same time, so they may share it."""

    def __init__(self):
        self._handle = None
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def handle(self):
        """Return the handle to capture with."""
        # torch ends a pool with its last graph, and a capture with the handle of an ended pool fails.
        if not self._graphs:
            self._handle = torch.cuda.graph_pool_handle()
        return self._handle

    def add(self, graph: torch.cuda.CUDAGraph) -> None:
        """Note a graph that was captured with the current handle."""
        self._graphs.add(graph)


def capture(run: Callable[[], object], pool: Pool | None = None) -> torch.cuda.CUDAGraph | None:
    """Capture `run`, which must never wait for the host, and return the graph.

    pool: shared with other graphs; None gives the graph a pool of its own
    A capture executes nothing: replay the graph for its results. The result is None, with a warning, where the capture
    fails, mostly for lack of memory. All of its memory is then free again, and the caller continues without a graph.
    """
    pool = Pool() if pool is None else pool
    # "thread_local": a call of another thread (a data loader that pins memory) must not break the capture.
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool.handle(), capture_error_mode="thread_local"):
            run()
        pool.add(graph)
        return graph
    except RuntimeError as error:  # the class of torch.OutOfMemoryError and of CUDA's error for an invalidated capture
        reason = str(error).strip().splitlines() or [type(error).__name__]
    finally:
        # Where CUDA refuses to end a capture, torch leaves the capture's stream current.
        refused = torch.cuda.current_stream() != stream
        torch.cuda.set_stream(stream)
    # Not inside the except block: there the error's traceback still holds the tensors of the capture.
    del graph
    if refused:
        _capture_nothing()
    torch.cuda.empty_cache()
    warnings.warn(f"a CUDA graph could not be captured ({reason[0]}); going on without it", stacklevel=2)
    return None


def _capture_nothing() -> None:
    """Capture a graph without work, and drop it.

    torch notes in its random generator that a capture is open. A capture that CUDA refuses to end leaves this note, and
    random numbers on the device then fail for the rest of the process. The next capture that ends removes the note.
    """
    with warnings.catch_warnings(), suppress(RuntimeError):
        warnings.simplefilter("ignore")  # torch warns that the graph is empty
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            pass


class Kept(Protocol):
    """An object that a Store keeps. nbytes: its size; busy: whether it is in use and must not be freed."""

    nbytes: int
    busy: bool


class Store:
    """Captured work by shape. `evict` frees the least recently used objects beyond a limit.

    limit: the most bytes of all objects that are not in use
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._held: OrderedDict[Hashable, Kept] = OrderedDict()

    def get(self, shape: Hashable):
        """Return the object of a shape and mark it as used; None where there is none."""
        if shape in self._held:
            self._held.move_to_end(shape)
        return self._held.get(shape)

    def put(self, shape: Hashable, kept: Kept) -> None:
        """Store an object under its shape. The limit is applied by the next `evict`."""
        self._held[shape] = kept

    def drop(self, shape: Hashable) -> None:
        """Remove the object of a shape, if there is one."""
        self._held.pop(shape, None)

    def evict(self, spare: Hashable = None) -> None:
        """Free idle objects, the least recently used first, until the others fit; the shape `spare` stays."""
        idle = [shape for shape, kept in self._held.items() if shape != spare and not kept.busy]
        total = sum(self._held[shape].nbytes for shape in idle)
        for shape in idle:
            if total <= self.limit:
                return
            total -= self._held.pop(shape).nbytes

    def clear(self) -> None:
        """Free every object that is not in use."""
        self._held = OrderedDict((shape, kept) for shape, kept in self._held.items() if kept.busy)

    def all(self) -> list:
        """Return all objects, the most recently used last."""
        return list(self._held.values())

    @property
    def nbytes(self) -> int:
        return sum(kept.nbytes for kept in self._held.values())

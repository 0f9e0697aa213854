"""CUDA graphs on a CPU, for tests of what is captured and replayed.

    with pytest.MonkeyPatch.context() as patch:
        install(patch)                     # torch.cuda's graph API and the launches of Triton kernels, until the block ends
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()                     # the same operations, on the very same tensors
        graph.nodes                        # names of what a GPU would launch

The rules are a GPU's. Capturing runs nothing: what it computed is poison afterwards (NaN, or the lowest integer), and what it
changed is as before. A replay re-executes each operation into the tensors of the capture and knows nothing else: whatever
the host decided at capture time stays as it was. Reading a tensor on the host, shapes that depend on values, and new
tensors from the host's numbers are refused and end the capture, whose graph then cannot be replayed. So are operations
on a stream that has not waited for the capture's, and a side stream that the capture's has not waited for in the end. A
replay is refused where input tensors from before the capture have been freed since: on a GPU their memory would belong to
something else.

What it cannot show: timing, what streams do at the same time (operations run in the order of the calls), memory that
graphs of one pool share, and whatever differs between a kernel and its reference (tests/kernels/test_fused_kernels.py is there for that).
"""

from __future__ import annotations

import importlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from llava.kernels import backend
from llava.model import graphs

NOT_PERMITTED = "CUDA error: operation not permitted when stream is capturing"
INVALIDATED = "CUDA error: operation failed due to a previous error during capture"
UNJOINED = "CUDA error: capturing stream has unjoined work"
POOL_ENDED = "use_count > 0 INTERNAL ASSERT FAILED: the pool has ended with its last graph"
NOT_CAPTURED = "Called CUDAGraph::replay without a preceding successful capture."

# Operations that wait for the device without being tagged for it: of the host's numbers a tensor is made.
FROM_HOST = {torch.ops.aten.lift_fresh.default}
# Methods that read a CPU tensor's memory without an operation.
TO_HOST = {Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu}
# Made of other operations on a CPU, but one kernel on a GPU.
ONE_KERNEL = {torch.ops.aten.rms_norm.default, torch.ops.aten.scaled_dot_product_attention.default}
# Operations that allocate and launch nothing.
ALLOCATIONS = ("empty", "new_empty")


@dataclass(frozen=True)
class Node:
    """Part of a graph. names: of what a GPU launches for it; run: does it with the operands."""

    names: tuple[str, ...]
    run: Callable[..., None]
    operands: tuple


class CUDAGraph:
    """torch.cuda.CUDAGraph, over the Nodes that a capture records."""

    def __init__(self, keep_graph: bool = False):
        self._pool = None
        self.reset()

    def reset(self) -> None:
        self._captured = False
        self._nodes: list[Node] = []
        # Tensors from before the capture, and how many of this graph's hold the memory of each.
        self._inputs: list[tuple[Tensor, int]] = []

    @property
    def nodes(self) -> list[str]:
        """The names of all nodes in order."""
        return [name for node in self._nodes for name in node.names]

    def pool(self):
        return self._pool

    def replay(self) -> None:
        if not self._captured:
            raise RuntimeError(NOT_CAPTURED)
        for tensor, own in self._inputs:
            if _references(tensor) <= own:
                raise RuntimeError(
                    f"a captured graph reads a tensor {[*tensor.shape]} that was freed after the capture: on a GPU its memory "
                    "would belong to something else by now"
                )
        with torch.inference_mode():  # buffers may be inference tensors, which are only written there
            for node in self._nodes:
                node.run(*node.operands)

    def _end_capture(self, nodes: list[Node], fresh: dict[int, Tensor]) -> None:
        """The capture went well. fresh: tensors that it has made, by memory."""
        self._captured, self._nodes = True, nodes
        inputs = [tensor for node in nodes for tensor in _tensors(node.operands) if _memory(tensor) not in fresh]
        own = Counter(_memory(tensor) for tensor in inputs)
        self._inputs = [(tensor, own[memory]) for memory, tensor in {_memory(t): t for t in inputs}.items()]


class PoolHandle:
    """torch.cuda.graph_pool_handle(). A pool ends with its last graph; later captures with its handle fail."""

    def __init__(self):
        self.used = False
        self.graphs: weakref.WeakSet[CUDAGraph] = weakref.WeakSet()

    @property
    def ended(self) -> bool:
        return self.used and not self.graphs


class Stream:
    """torch.cuda.Stream. Work is done when it is launched; only a capture cares which stream waits for which."""

    def __init__(self, emulation: Emulation, device=None, priority: int = 0):
        self._emulation = emulation

    def wait_stream(self, stream: Stream) -> None:
        if self._emulation.recorder is not None:
            self._emulation.recorder.order(stream, self)

    def synchronize(self) -> None:
        self._emulation.wait_on_host("Stream.synchronize")


class Event:
    """torch.cuda.Event: a stream that does nothing but wait and be waited for."""

    def __init__(self, emulation: Emulation, enable_timing: bool = False, blocking: bool = False):
        self._emulation, self._point = emulation, Stream(emulation)

    def record(self, stream: Stream | None = None) -> None:
        self._point = Stream(self._emulation)
        self._point.wait_stream(stream or self._emulation.stream)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._emulation.stream).wait_stream(self._point)

    def synchronize(self) -> None:
        self._emulation.wait_on_host("Event.synchronize")


class Emulation:
    """What torch.cuda knows: the capture that is open, and the current stream."""

    def __init__(self):
        self.recorder: Recorder | None = None
        # Whether torch's random generator notes an open capture. Only a capture that ends removes the note.
        self.generator_open = False
        self.stream = Stream(self)

    def current_stream(self, device=None) -> Stream:
        return self.stream

    def set_stream(self, stream: Stream) -> None:
        self.stream = stream

    @contextmanager
    def use_stream(self, stream: Stream | None) -> Iterator[None]:
        """torch.cuda.stream."""
        outer, self.stream = self.stream, stream or self.stream
        try:
            yield
        finally:
            self.stream = outer

    def synchronize(self, device=None) -> None:
        self.wait_on_host("synchronize")

    def wait_on_host(self, name: str) -> None:
        """The host waits for the device: all work is done by now, unless it is being captured."""
        if self.recorder is not None:
            self.recorder.refuse(name)

    def capturing(self) -> bool:
        return self.recorder is not None

    @contextmanager
    def graph(
        self, cuda_graph: CUDAGraph, pool=None, stream=None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        """torch.cuda.graph. As there, a capture that cannot be ended ends in an error of its own and leaves the stream of the
        capture current."""
        if self.capturing():
            raise RuntimeError(f"{NOT_PERMITTED}: another capture is open")
        cuda_graph.reset()
        cuda_graph._pool = PoolHandle() if pool is None else pool
        outer, self.stream = self.stream, Stream(self) if stream is None else stream
        self.generator_open = True
        if cuda_graph._pool.ended:
            raise RuntimeError(POOL_ENDED)
        self.recorder = recorder = Recorder(self)
        try:
            with recorder, _HostReads(recorder):
                yield
        finally:
            self.recorder = None
            recorder.undo()
            if recorder.fault is not None:
                raise RuntimeError(recorder.fault)
            self.stream, self.generator_open = outer, False
        cuda_graph._end_capture(recorder.nodes, recorder.fresh)
        cuda_graph._pool.used = True
        cuda_graph._pool.graphs.add(cuda_graph)

    def launch(self, kernel: Kernel, *operands) -> None:
        """In the place of `launch` of a kernel's Triton module: the reference, now or at every replay."""
        if self.recorder is None:
            kernel.run(*operands)
        else:
            self.recorder.add(kernel.nodes, kernel.run, operands)


class Recorder(TorchDispatchMode):
    """Records operations as Nodes while it executes them, and can undo what they did.

    fresh: tensors made since it was entered, by memory; they are kept, so that no memory is given out twice.
    """

    def __init__(self, emulation: Emulation):
        super().__init__()
        self.nodes: list[Node] = []
        self.fresh: dict[int, Tensor] = {}
        self._emulation, self._origin = emulation, emulation.stream
        self._refused = False  # whether an operation was
        # Of each stream that takes part: which nodes its next one comes after.
        self._before_next: dict[Stream, set[int]] = {self._origin: set()}
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    @property
    def fault(self) -> str | None:
        """Why the capture cannot be ended now."""
        if self._refused:
            return INVALIDATED
        return UNJOINED if len(self._before_next[self._origin]) < len(self.nodes) else None

    def refuse(self, name: str) -> None:
        self._refused = True
        raise RuntimeError(f"{NOT_PERMITTED}: {name}")

    def order(self, first: Stream, then: Stream) -> None:
        """What `then` does next comes after what `first` has done. It takes part in the capture from now on, if `first` does."""
        if first in self._before_next:
            self._before_next.setdefault(then, set()).update(self._before_next[first])

    def add(self, names: tuple[str, ...], run: Callable[..., None], operands: tuple) -> None:
        """A node. It holds memory from before the capture through tensors of its own, so that it shows when nobody else does."""

        def own(leaf):
            outside = isinstance(leaf, Tensor) and _memory(leaf) not in self.fresh
            return leaf.detach() if outside else leaf

        if self._emulation.stream not in self._before_next:
            self.refuse(f"{names[0]} on a stream that has not waited for the capture's")
        self._before_next[self._emulation.stream].add(len(self.nodes))
        self.nodes.append(Node(names, run, tree_map(own, operands)))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _needs_host(func, args):
            self.refuse(str(func))
        if func not in ONE_KERNEL:
            with self:
                found = func.decompose(*args, **kwargs)  # in inference mode operations arrive that are made of others
            if found is not NotImplemented:
                return found
        written = _written(func, args, kwargs)
        for tensor in written:
            self._save(tensor)
        found = func(*args, **kwargs)
        given = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        # By place among what is returned, where a replay finds it again. What shares memory with an operand is a view of it.
        new = [(n, leaf) for n, leaf in enumerate(tree_leaves(found)) if _is_new(leaf, given)]
        self.fresh |= {_memory(tensor): tensor for _, tensor in new}
        launches = any(tensor.numel() for tensor in (*written, *(tensor for _, tensor in new)))
        if launches and not func._schema.name.removeprefix("aten::").startswith(ALLOCATIONS):
            self.add((str(func),), partial(_rerun, func, new), (args, kwargs))
        return found

    def _save(self, tensor: Tensor) -> None:
        memory, storage = _memory(tensor), tensor.untyped_storage()
        if memory not in self.fresh and memory not in self._before:
            self._before[memory] = storage, storage.clone()

    def undo(self) -> None:
        """Nothing has run: what was changed is as before, and what was computed is anything."""
        for storage, before in self._before.values():
            storage.copy_(before)
        with torch.inference_mode():
            for tensor in self.fresh.values():
                tensor.fill_(_poison(tensor.dtype))


class _HostReads(TorchFunctionMode):
    """Refuses what reads a tensor's memory without an operation."""

    def __init__(self, recorder: Recorder):
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in TO_HOST:
            self._recorder.refuse(func.__name__)
        return func(*args, **(kwargs or {}))


def _needs_host(func, args) -> bool:
    """Whether an operation waits for the device, or copies from memory of the host that is not pinned."""
    if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default):
        return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1]))
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return func in FROM_HOST or not tags.isdisjoint(func.tags)


def _written(func, args, kwargs) -> list[Tensor]:
    """The operands that an operation changes."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    changed = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return _tensors([named.get(name) for name in changed])


def _rerun(func, new: list[tuple[int, Tensor]], args, kwargs) -> None:
    """Execute an operation again, what it makes into the tensors that it made first."""
    found = tree_leaves(func(*args, **kwargs))
    for place, tensor in new:
        tensor.copy_(found[place])


def _is_new(leaf, given: set[int]) -> bool:
    return isinstance(leaf, Tensor) and _memory(leaf) not in given


def _tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    """What tensors that share memory have in common."""
    return tensor.untyped_storage()._cdata


def _references(tensor: Tensor) -> int:
    """How many tensors hold the memory of this one. Asking for it makes its Python object, which holds it once more."""
    return torch._C._storage_Use_Count(_memory(tensor)) - 1


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype == torch.bool:
        return True
    return float("nan") if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype).min


# --- kernels -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel of llava/kernels by name. run: takes the operands of its `launch` and does with the reference what the
    kernel does; nodes: names of what one call launches."""

    name: str
    run: Callable[..., None]
    nodes: tuple[str, ...]

    @classmethod
    def of(cls, name: str, run: Callable[..., None], *nodes: str) -> Kernel:
        return cls(name, run, nodes or (name,))


def _into(outs: Iterable[Tensor | None], found: Iterable[Tensor | None]) -> None:
    for out, result in zip(outs, found, strict=True):
        if out is not None:
            out.copy_(result)


def _reference(name: str) -> Callable:
    return importlib.import_module(f"llava.kernels.{name}_reference").reference


def _decode_attention(q, k, v, prefix_len, core, core_len, text, text_len, scale, scores, out, workspace) -> None:
    found = _reference("decode_attention")(q, k, v, prefix_len, core, core_len, text, text_len, scale, scores)
    _into(out, found)


def _add_rms_norm(hidden, delta, weight, eps, summed, normed) -> None:
    _into((summed, normed), _reference("add_rms_norm")(hidden, delta, weight, eps))


def _silu_mul(gate, up, out) -> None:
    _into([out], [_reference("silu_mul")(gate, up)])


def _matvec(states, weight, bias, up, out) -> None:
    _into([out], [_reference("matvec")(states, weight, bias, up)])


def _quick_gelu(hidden, out) -> None:
    _into([out], [_reference("quick_gelu")(hidden)])


def _rotate_append(q, k, v, cos, sin, keys, values, slots, counts, out) -> None:
    _into([out], [_reference("rotate_append")(q, k, v, cos, sin, keys, values, slots, counts)])


# Those that change their operands in place take the reference as it is.
KERNELS = (
    Kernel.of("decode_attention", _decode_attention, "decode_attention, splits", "decode_attention, sum"),
    Kernel.of("add_rms_norm", _add_rms_norm),
    Kernel.of("silu_mul", _silu_mul),
    Kernel.of("matvec", _matvec),
    Kernel.of("quick_gelu", _quick_gelu),
    Kernel.of("rotate_append", _rotate_append),
    Kernel.of("evict", _reference("evict")),
    Kernel.of("rank_core", _reference("rank_core")),
)


def _backend_for(tensor: Tensor, requested: str | None = None, choose=backend.backend_for) -> str:
    return "triton" if requested is None else choose(tensor, requested)


def install(patch) -> Emulation:
    """Put the emulation in the place of torch.cuda's graphs and of all Triton launches, until `patch`, a pytest.MonkeyPatch,
    is undone."""
    emulation = Emulation()
    patch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    patch.setattr(torch.cuda, "graph", emulation.graph)
    patch.setattr(torch.cuda, "graph_pool_handle", PoolHandle)
    patch.setattr(torch.cuda, "is_current_stream_capturing", emulation.capturing)
    patch.setattr(torch.cuda, "Stream", partial(Stream, emulation))
    patch.setattr(torch.cuda, "Event", partial(Event, emulation))
    patch.setattr(torch.cuda, "current_stream", emulation.current_stream)
    patch.setattr(torch.cuda, "set_stream", emulation.set_stream)
    patch.setattr(torch.cuda, "stream", emulation.use_stream)
    patch.setattr(torch.cuda, "synchronize", emulation.synchronize)
    patch.setattr(torch.cuda, "empty_cache", lambda: None)
    patch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    patch.setattr(graphs, "available", lambda device: True)
    patch.setattr(backend, "backend_for", _backend_for)
    for kernel in KERNELS:
        module = importlib.import_module(f"llava.kernels.{kernel.name}_triton")
        patch.setattr(module, "launch", partial(emulation.launch, kernel))
    return emulation

"""The emulation of CUDA graphs (support/graph_emulator.py): it must refuse what a GPU refuses, or tests over it prove nothing."""

import gc

import pytest
import torch
from support.graph_emulator import CUDAGraph, install
from torch.nn.functional import linear
from torch.utils._pytree import tree_leaves, tree_map

from llava.kernels import backend
from llava.kernels import decode_attention as decode_attention_module
from llava.kernels.add_rms_norm import add_rms_norm
from llava.kernels.decode_attention import decode_attention
from llava.kernels.evict import evict
from llava.kernels.matvec import matvec
from llava.kernels.quick_gelu import quick_gelu
from llava.kernels.rank_core import rank_core
from llava.kernels.rotate_append import rotate_append
from llava.kernels.silu_mul import silu_mul
from llava.model import graphs


@pytest.fixture
def emulation():
    with pytest.MonkeyPatch.context() as patch:
        yield install(patch)


@pytest.fixture(params=[torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def mode(request):
    """Operations made of others reach the recorder in parts under no_grad, and as they are in inference mode."""
    with request.param():
        yield


def captured(run):
    """(graph, what `run` returned in the capture)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=torch.cuda.graph_pool_handle(), capture_error_mode="thread_local"):
        assert torch.cuda.is_current_stream_capturing()
        found = run()
    assert not torch.cuda.is_current_stream_capturing()
    return graph, found


# --- what a capture leaves ---------------------------------------------------------------------------------------


def test_capturing_runs_nothing(emulation, mode):
    given, changed = torch.arange(6.0).view(2, 3), torch.ones(3)

    def run():
        changed.add_(given[0])
        changed[1:].mul_(2)
        return given * 2, given.argmax(dim=1), given > 1, torch.empty(4)

    graph, (doubled, best, above, room) = captured(run)
    assert changed.tolist() == [1, 1, 1]
    assert doubled.isnan().all() and room.isnan().all()
    assert best.tolist() == [torch.iinfo(torch.int64).min] * 2 and above.all()
    graph.replay()
    assert torch.equal(doubled, given * 2) and best.tolist() == [2, 2] and torch.equal(above, given > 1)
    assert changed.tolist() == [1, 4, 6]


def test_a_replay_works_on_the_very_same_tensors(emulation, mode):
    states, weight, sums = torch.zeros(1, 1, 3), torch.randn(4, 3), torch.zeros(4)

    def run():
        product = linear(states, weight).softmax(-1)
        sums.add_(product[0, 0])
        return product

    graph, found = captured(run)
    expected = torch.zeros(4)
    for seed in range(3):
        states.copy_(torch.randn(1, 1, 3, generator=torch.Generator().manual_seed(seed)))
        if seed == 2:
            weight.neg_()
        graph.replay()
        assert torch.equal(found, linear(states, weight).softmax(-1))
        expected += found[0, 0]
        assert torch.equal(sums, expected)


def test_what_the_host_decides_is_baked_in(emulation, mode):
    given, host = torch.ones(3), {"factor": 2}
    graph, found = captured(lambda: given * host["factor"] if host["factor"] > 1 else given + 100)
    host["factor"] = 1
    graph.replay()
    assert found.tolist() == [2, 2, 2]


def test_outputs_of_one_graph_are_inputs_of_another(emulation, mode):
    given = torch.ones(3)
    first, doubled = captured(lambda: given * 2)
    second, found = captured(lambda: doubled + 1)
    second.replay()
    assert found.isnan().all()
    first.replay()
    second.replay()
    assert found.tolist() == [3, 3, 3]


# --- nodes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run, count",
    [
        (lambda x: x.view(-1)[1:].unsqueeze(0).expand(3, -1), 0),
        (lambda x: x.t().split(1, dim=1), 0),
        (lambda x: x.contiguous().to(x.dtype).reshape(-1), 0),
        (lambda x: (torch.empty(3), torch.empty_like(x), x.new_empty(2)), 0),
        (lambda x: (x[:, :0] + 1, x[:0].zero_()), 0),
        (lambda x: x.t().contiguous(), 1),
        (lambda x: x.new_zeros(2), 1),
        (lambda x: x[:, 1:].mul_(2), 1),
        (lambda x: x[torch.zeros_like(x[0], dtype=torch.long)], 2),
        (lambda x: torch.add(x, 1, out=torch.empty(2, 2)), 1),
        (lambda x: linear(x[None], x), 1),
        (lambda x: torch.where(x > 0, x, 0.0), 3),
        (lambda x: torch.cat([-x, x]).sort(dim=0).values, 3),
    ],
)
def test_nodes_are_what_a_gpu_launches(emulation, mode, run, count):
    given = torch.ones(2, 2)
    graph, _ = captured(lambda: run(given))
    assert len(graph.nodes) == count, graph.nodes


@torch.inference_mode()
def test_one_kernel_of_a_gpu_is_one_node(emulation):
    """PyTorch makes these of several operations on a CPU alone."""
    given = torch.ones(1, 3, 2)
    attention = torch.nn.functional.scaled_dot_product_attention
    graph, _ = captured(lambda: torch.nn.functional.rms_norm(given, (2,), given[0, 0], 1e-5))
    assert graph.nodes == ["aten.rms_norm.default"]
    graph, _ = captured(lambda: attention(given, given, given, is_causal=True))
    assert graph.nodes == ["aten.scaled_dot_product_attention.default"]


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x[0].item(),
        lambda x: int(x[0]),
        lambda x: bool(x.any()),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.cpu(),
        lambda x: torch.equal(x, x),
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x.masked_select(x > 0),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), x[:1]),
        lambda x: x.unique(),
        lambda x: x.unique_consecutive(),
        lambda x: x.long().bincount(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
        lambda x: torch.as_tensor([1.0]),
        lambda x: x[[0, 1]],
    ],
)
def test_the_host_is_refused(emulation, mode, run):
    given, changed = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)
    stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    run(given.clone())  # outside a capture it is in order
    with pytest.raises(RuntimeError, match="due to a previous error during capture") as found, torch.cuda.graph(graph):
        changed.add_(given)
        run(given)
    assert "not permitted when stream is capturing" in str(found.value.__context__)
    assert not torch.cuda.is_current_stream_capturing()
    assert changed.tolist() == [0, 0, 0] and given.tolist() == [1, 2, 3]
    assert graph.nodes == []
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        graph.replay()
    # torch leaves the stream of the capture current there; our one way of capturing must not.
    assert torch.cuda.current_stream() is not stream
    torch.cuda.set_stream(stream)
    with pytest.warns(UserWarning, match="could not be captured"):
        assert graphs.capture(lambda: run(given)) is None
    assert torch.cuda.current_stream() is stream


def test_an_error_inside_a_capture(emulation, mode):
    graph, stream, changed = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.zeros(3)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"), torch.cuda.graph(graph):
        changed.add_(1)
        raise torch.OutOfMemoryError("no memory")
    assert changed.tolist() == [0, 0, 0] and graph.nodes == []
    assert torch.cuda.current_stream() is stream and not torch.cuda.is_current_stream_capturing()
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        graph.replay()
    graph, _ = captured(lambda: changed.add_(1))  # the next capture knows nothing of it
    graph.replay()
    assert changed.tolist() == [1, 1, 1]


@pytest.mark.filterwarnings("ignore:a CUDA graph could not be captured")
def test_random_numbers_after_a_capture_that_was_refused(emulation):
    """A refused capture alone leaves the note of an open capture in the generator; graphs.capture removes it."""
    numbers, stream = torch.ones(3), torch.cuda.current_stream()
    with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        numbers.sum().item()
    assert emulation.generator_open
    torch.cuda.set_stream(stream)
    assert graphs.capture(lambda: numbers.sum().item()) is None
    assert not emulation.generator_open and torch.cuda.current_stream() is stream


def test_a_pool_ends_with_its_last_graph(emulation):
    numbers, handle = torch.ones(3), torch.cuda.graph_pool_handle()
    kept = []
    for _ in range(2):
        kept.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(kept[-1], pool=handle):
            numbers.add_(1)
    kept.pop()
    gc.collect()
    with torch.cuda.graph(torch.cuda.CUDAGraph(), pool=handle):
        numbers.add_(1)
    kept.clear()
    gc.collect()
    with pytest.raises(RuntimeError, match="the pool has ended"), torch.cuda.graph(torch.cuda.CUDAGraph(), pool=handle):
        numbers.add_(1)


def test_a_graph_without_a_capture(emulation):
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        graph.replay()
    graph, _ = captured(lambda: torch.ones(2))
    assert graph.pool() is not None
    graph.replay()
    graph.reset()
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        graph.replay()


def test_one_capture_at_a_time(emulation):
    outer = torch.cuda.CUDAGraph()
    with torch.cuda.graph(outer):
        found = torch.ones(2)
        inner = torch.cuda.graph(torch.cuda.CUDAGraph())
        with pytest.raises(RuntimeError, match="another capture is open"), inner:
            pass
    assert outer.nodes == ["aten.ones.default"] and found.isnan().all()


def test_memory_that_was_freed_after_the_capture(emulation, mode):
    """On a GPU it is somebody else's by then, and a replay reads that without a word."""
    kept, passing = torch.ones(3), [torch.ones(3)]
    graph, found = captured(lambda: kept.view(3, 1) + passing[0][None])
    graph.replay()
    view = passing.pop()[1:]
    gc.collect()
    graph.replay()  # a view keeps the memory
    assert found.tolist() == [[2, 2, 2]] * 3
    del view
    gc.collect()
    with pytest.raises(RuntimeError, match="reads a tensor .* freed after the capture"):
        graph.replay()


# --- streams -----------------------------------------------------------------------------------------------------


def by_stream(side):
    """(waits for the current stream, waits of the current one for it) of a side stream."""
    return lambda: side.wait_stream(torch.cuda.current_stream()), lambda: torch.cuda.current_stream().wait_stream(side)


def by_event(side):
    forked, joined = torch.cuda.Event(), torch.cuda.Event()

    def fork():
        forked.record()
        forked.wait(side)

    def join():
        joined.record(side)
        joined.wait()

    return fork, join


@pytest.mark.parametrize("how", [by_stream, by_event])
def test_a_side_stream_is_part_of_a_capture(emulation, mode, how):
    given, side, outer = torch.ones(3), torch.cuda.Stream(), torch.cuda.current_stream()
    fork, join = how(side)

    def run():
        doubled = given * 2
        fork()
        with torch.cuda.stream(side):
            assert torch.cuda.current_stream() is side
            found = doubled + 1
            found.record_stream(side)
        assert torch.cuda.current_stream() is not side
        join()
        return found

    assert run().tolist() == [3, 3, 3]  # outside a capture as well
    for _ in range(2):  # what one capture knows of streams is nothing to the next
        graph, found = captured(run)
        assert len(graph.nodes) == 2 and torch.cuda.current_stream() is outer
        graph.replay()
        assert found.tolist() == [3, 3, 3]


@pytest.mark.parametrize("how", [by_stream, by_event])
def test_a_side_stream_that_nobody_waits_for(emulation, how):
    given, side, outer = torch.ones(3), torch.cuda.Stream(), torch.cuda.current_stream()
    fork, join = how(side)

    def run(*, joins):
        fork()
        with torch.cuda.stream(side):
            given.add_(1)
        if joins:
            join()
            with torch.cuda.stream(side):
                given.add_(1)  # behind what was waited for

    for joins in (False, True):
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="has unjoined work"), torch.cuda.graph(graph):
            run(joins=joins)
        assert given.tolist() == [1, 1, 1] and graph.nodes == []
        with pytest.raises(RuntimeError, match="without a preceding successful capture"):
            graph.replay()
        assert torch.cuda.current_stream() is not outer
        torch.cuda.set_stream(outer)


def test_a_stream_beside_a_capture(emulation):
    """One that has not waited for the capture's stream has no place in the graph."""
    given, side = torch.ones(3), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # before the capture: that is something else
    with pytest.raises(RuntimeError) as found, torch.cuda.graph(torch.cuda.CUDAGraph()), torch.cuda.stream(side):
        given.add_(1)
    assert "has not waited for the capture's" in str(found.value.__context__)


@pytest.mark.parametrize(
    "wait",
    [
        lambda: torch.cuda.synchronize(),
        lambda: torch.cuda.current_stream().synchronize(),
        lambda: torch.cuda.Event().synchronize(),
    ],
    ids=["device", "stream", "event"],
)
def test_the_host_cannot_wait_in_a_capture(emulation, wait):
    wait()
    with pytest.raises(RuntimeError) as found, torch.cuda.graph(torch.cuda.CUDAGraph()):
        wait()
    assert "not permitted when stream is capturing" in str(found.value.__context__)


# --- kernels -----------------------------------------------------------------------------------------------------


def rotation():
    """Operands of rotate_append for one token in each of 2 rows, 4 query heads and 2 KV heads of size 8, 5 slots."""
    states = [torch.randn(2, 1, heads, 8) for heads in (4, 2, 2)]
    return [*states, *torch.randn(2, 2, 1, 8), *torch.zeros(2, 2, 2, 5, 8), None, torch.tensor([3, 5]).int()]


def attention(scores):
    """Operands of decode_attention for 2 rows, 4 query heads and 2 KV heads of size 8, 7 slots."""
    ints = {"dtype": torch.int32}
    lists = torch.tensor([[3, 4]] * 2, **ints), torch.tensor([2, 1], **ints)
    text = torch.tensor([[[5, 6]] * 2] * 2, **ints), torch.tensor([[1, 2]] * 2, **ints)
    return [torch.randn(2, 4, 8), *torch.randn(2, 2, 2, 7, 8), torch.tensor([2, 3], **ints), *lists, *text], scores


def eviction():
    """Operands of evict for one row and KV head: the second of three entries, the lowest, goes."""
    counts = torch.tensor([[2, 2]]).int(), torch.tensor([[1, 1]]).int()
    text = torch.tensor([[[7, 8, 9]]]).int(), torch.tensor([[3]]).int()
    return [torch.tensor([[[2.0, 1.0, 0.0]]]), torch.tensor([[[0.1, 0.2, 0.7]]]), *text, *counts, torch.ones(1).int()]


KERNELS = {
    "add_rms_norm": (
        lambda: (torch.randn(2, 1, 8), torch.randn(2, 1, 8), torch.randn(8), 1e-5),
        add_rms_norm,
        ["add_rms_norm"],
    ),
    "add_rms_norm, no delta": (
        lambda: (torch.randn(2, 1, 8), None, torch.randn(8), 1e-5),
        add_rms_norm,
        ["add_rms_norm"],
    ),
    "silu_mul": (lambda: torch.randn(2, 2, 1, 8).unbind(), silu_mul, ["silu_mul"]),
    "matvec": (lambda: (torch.randn(1, 8), torch.randn(5, 8), torch.randn(5)), matvec, ["matvec"]),
    "matvec, gated": (
        lambda: (torch.randn(1, 8), torch.randn(5, 8), torch.randn(5, 8)),
        lambda states, gate, up, **chosen: matvec(states, gate, up=up, **chosen),
        ["matvec"],
    ),
    "quick_gelu": (lambda: (torch.randn(2, 3, 8),), quick_gelu, ["quick_gelu"]),
    "rotate_append": (
        rotation,
        lambda *given, **chosen: (rotate_append(*given, **chosen), *given[5:7]),
        ["rotate_append"],
    ),
    **{
        f"decode_attention, scores {scores}": (
            lambda scores=scores: attention(scores),
            lambda given, scores, **chosen: decode_attention(*given, scores=scores, **chosen),
            ["decode_attention, splits", "decode_attention, sum"],
        )
        for scores in decode_attention_module.SCORES
    },
    "evict": (
        eviction,
        lambda *given, **chosen: (evict(*given, rule="summed", **chosen), *given[:1], *given[2:4])[1:],
        ["evict"],
    ),
    "rank_core": (
        lambda: (
            torch.tensor([[0.1, 0.3, 0.2]]),
            torch.tensor([[4, 5, 6]]).int(),
            torch.tensor([3]).int(),
            torch.tensor([[4, 5]]).int(),
            torch.tensor([2]).int(),
        ),
        lambda *given, **chosen: (rank_core(*given, **chosen), given[3])[1:],
        ["rank_core"],
    ),
}


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def copied(operands):
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, operands)


def same(found, expected):
    return all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_nodes(emulation, mode, name):
    """A call is the kernel's launches and nothing else; it runs the reference, at once or at replay, on the operands then."""
    make, call, nodes = KERNELS[name]
    operands = make()
    expected = tensors(call(*copied(operands), backend="reference"))
    assert same(tensors(call(*copied(operands))), expected)
    before = copied(operands)
    graph, found = captured(lambda: tensors(call(*operands)))
    assert graph.nodes == nodes
    assert same(tensors(before), tensors(operands)) and not same(found, expected)
    graph.replay()
    assert same(found, expected)


# --- what is patched ---------------------------------------------------------------------------------------------


def test_everything_is_as_before_in_the_end():
    names = ("CUDAGraph", "graph", "graph_pool_handle", "is_current_stream_capturing", "Stream", "Event", "stream")
    names += ("current_stream", "set_stream", "synchronize", "empty_cache")
    record_stream = torch.Tensor.record_stream
    before = {name: getattr(torch.cuda, name) for name in names}
    hidden, weight = torch.randn(2, 8), torch.randn(8)
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        assert torch.cuda.CUDAGraph is CUDAGraph
        assert all(getattr(torch.cuda, name) is not old for name, old in before.items())
        assert backend.backend_for(hidden) == "triton" and graphs.available(hidden.device)
        assert backend.backend_for(hidden, "reference") == "reference"
        with pytest.raises(ValueError, match="allowed are"):
            backend.backend_for(hidden, "cutlass")
    assert all(getattr(torch.cuda, name) is old for name, old in before.items())
    assert torch.Tensor.record_stream is record_stream
    assert backend.backend_for(hidden) == "reference" and not graphs.available(hidden.device)
    # The Triton module launches by itself again: in the interpreter, or on a GPU.
    if not torch.cuda.is_available():
        _, found = add_rms_norm(hidden, None, weight, 1e-5, backend="triton")
        assert torch.allclose(found, add_rms_norm(hidden, None, weight, 1e-5)[1], atol=1e-5)

"""Decode attention: reference against the rule in float64, Triton kernel (interpreted without a GPU) against the reference."""

import itertools

import pytest
import torch
from decode_kernel_cases import DEVICE, POISON, TOLERANCE, error, operands, rule

from llava.kernels.decode_attention import DecodeOutput, decode_attention, decode_workspace

F32, F16, BF16 = TOLERANCE


def run_triton(o, splits=None, scores=True, **options):
    """The kernel with outputs and scratch memory full of NaN."""
    out = DecodeOutput.empty(o.q, o.core, o.text, scores)
    workspace = decode_workspace(o.q, o.k, o.core, o.text, splits, backend="triton")
    for tensor in (*out, *vars(workspace).values()):
        if isinstance(tensor, torch.Tensor):
            tensor.fill_(torch.nan)
    return decode_attention(*o, scores=scores, out=out, workspace=workspace, backend="triton", **options)


def agree(found, expected, dtype=F32):
    """Scores are float32 whatever the dtype; float32 sums of float32 products of half-precision inputs."""
    assert error(found.out, expected[0]) <= TOLERANCE[dtype]
    for mine, theirs in zip(found[1:], expected[1:], strict=True):
        assert mine.dtype == torch.float32 and mine.shape == theirs.shape
        if theirs.any():
            assert error(mine, theirs) <= TOLERANCE[F32]
        # Exactly nothing behind the lengths.
        assert not mine.cpu()[theirs.cpu() == 0].any()


ROWS = {
    "one slot": [(0, 1, 0)],
    "63": [(20, 30, 13)],
    "111, three rows": [(35, 56, 20), (0, 40, 3), (70, 2, 39)],
    "577": [(35, 500, 42)],
    "empty core": [(10, 0, 50), (64, 0, 1)],
    "empty text": [(10, 53, 0)],
    "prefix alone": [(65, 0, 0)],
    "core alone": [(0, 32, 0)],
    "an empty row": [(0, 0, 0), (5, 40, 9)],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("groups", "group", "width"), [(2, 1, 64), (1, 7, 80), (3, 2, 96)])
def test_reference_is_a_masked_softmax(rows, groups, group, width):
    o = operands(rows, groups, group, width)
    agree(decode_attention(*o, scores=True, backend="reference"), rule(o))
    agree(decode_attention(*o, scale=0.3, scores=True, backend="reference"), rule(o, 0.3))


# Every row pattern, dtype, group and head size at least twice, splits from one to more than there are blocks.
CASES = [
    # rows, groups, query heads per group, head size, dtype, splits, interleaved
    ("one slot", 1, 1, 128, F32, 1, False),
    ("one slot", 2, 4, 64, F16, 3, True),
    ("63", 2, 1, 64, F32, 1, False),
    ("63", 1, 7, 128, F16, 4, False),
    ("63", 1, 2, 80, BF16, 1, True),
    ("111, three rows", 2, 1, 128, F16, 3, True),
    ("111, three rows", 2, 3, 96, F32, 2, True),
    ("111, three rows", 1, 8, 64, BF16, 1, False),
    ("577", 2, 1, 128, BF16, 7, True),
    ("577", 1, 1, 96, F16, 1, False),
    ("577", 1, 7, 128, F32, 40, False),
    ("577", 1, 4, 80, F16, 5, True),
    ("empty core", 3, 1, 80, F32, 2, False),
    ("empty core", 1, 6, 128, BF16, 3, True),
    ("empty text", 1, 1, 64, BF16, 9, False),
    ("empty text", 2, 5, 64, F32, 1, False),
    ("prefix alone", 1, 1, 112, F16, 2, True),
    ("prefix alone", 2, 2, 128, F16, 2, False),
    ("core alone", 20, 1, 64, F32, 1, False),
    ("core alone", 1, 8, 96, BF16, 2, False),
    ("an empty row", 2, 1, 128, F32, 2, False),
    ("an empty row", 2, 7, 64, F32, 3, False),
]


@pytest.mark.parametrize(("rows", "groups", "group", "width", "dtype", "splits", "interleaved"), CASES, ids=str)
def test_kernel_equals_reference(rows, groups, group, width, dtype, splits, interleaved):
    o = operands(ROWS[rows], groups, group, width, dtype, interleaved=interleaved)
    expected = decode_attention(*o.float(), scores=True, backend="reference")
    agree(run_triton(o, splits), expected, dtype)


@pytest.mark.long
@pytest.mark.parametrize(("group", "width"), itertools.product(range(1, 9), (64, 80, 96, 112, 128)))
def test_kernel_equals_reference_at_every_shape(group, width):
    for i, (rows, dtype) in enumerate(itertools.product(ROWS.values(), TOLERANCE)):
        splits = 1 + 5 * (i % 2)
        o = operands(rows, 2, group, width, dtype, interleaved=splits > 1, seed=i)
        agree(run_triton(o, splits), decode_attention(*o.float(), scores=True, backend="reference"), dtype)


@pytest.mark.parametrize("group", [1, 4])
def test_a_row_that_reads_nothing_gives_zeros(group):
    o = operands(ROWS["an empty row"], group=group, spare=0)
    for found in (run_triton(o), decode_attention(*o, scores=True, backend="reference")):
        assert not any(tensor[0].any() for tensor in found)
        assert found.out[1].any()
    nothing = operands([(0, 0, 0)] * 2, group=group, spare=0)  # lists and storage without any place
    assert nothing.core.shape[-1] == nothing.text.shape[-1] == nothing.k.shape[2] == 0
    for found in (run_triton(nothing), decode_attention(*nothing, scores=True, backend="reference")):
        assert found.out.shape == nothing.q.shape and not found.out.any()


@pytest.mark.parametrize("group", [1, 7])
@pytest.mark.parametrize("lengths", [(63, 63), (1, 111, 0)])
def test_reference_without_lists(lengths, group):
    o = operands([(n, 0, 0) for n in lengths], group=group)
    named, width = list(o), 0
    named[4], named[6] = o.core[:, :width], o.text[..., :width]
    found = decode_attention(*named, scores=True, backend="reference")
    assert error(found.out, rule(o)[0]) < 1e-6
    assert found.core_scores.shape == named[4].shape and found.text_scores.shape == named[6].shape


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_only_the_scores_that_were_asked_for(backend):
    o = operands(ROWS["111, three rows"], group=2)
    both = decode_attention(*o, scores=True, backend=backend)
    for scores, core, text in ((False, False, False), ("core", True, False), ("text", False, True)):
        if backend == "triton":
            found = run_triton(o, scores=scores)
        else:
            found = decode_attention(*o, scores=scores, backend=backend)
        assert torch.equal(found.out, both.out)
        assert (found.core_scores is not None, found.text_scores is not None) == (core, text)
        assert not core or torch.equal(found.core_scores, both.core_scores)
        assert not text or torch.equal(found.text_scores, both.text_scores)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("group", [1, 4, 7])
def test_one_split_without_scores(group, dtype):
    """Its result is the output: there is no second launch, and a row without entries gives zeros."""
    o = operands(ROWS["an empty row"], groups=2, group=group, dtype=dtype)
    found = run_triton(o, splits=1, scores=False)
    assert error(found.out, rule(o)[0]) <= TOLERANCE[dtype]
    assert not found.out[0].any() and found.out[1].any()


def test_one_workspace_for_layers_with_different_lists():
    """Splits and rows agree, lists may be shorter than the workspace's: a step's layers share one."""
    wide, narrow = operands(ROWS["577"], group=2), operands(ROWS["63"], group=2)
    workspace = decode_workspace(wide.q, wide.k, wide.core, wide.text, 3, backend="triton")
    for o in (wide, narrow, wide):
        found = decode_attention(*o, scores=True, workspace=workspace, backend="triton")
        agree(found, rule(o))
    small = decode_workspace(narrow.q, narrow.k, narrow.core, narrow.text, 3, backend="triton")
    with pytest.raises(ValueError, match="the workspace is for .* 49 listed entries, expected are .* 548"):
        decode_attention(*wide, workspace=small, backend="triton")


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("large", ["slot", "row"])
def test_addresses_beyond_2_to_the_31(group, large):
    """Elements of a cache of 4 GiB, of which only a few pages are ever touched."""
    width, beyond = 64, 2**31
    memory = torch.empty(beyond + 400 * width, dtype=F16, device=DEVICE)
    if large == "slot":
        k = memory.view(1, 1, -1, width)
        core = torch.tensor([[k.shape[2] - 1, 2, beyond // width + 7, 5]])
    else:
        k = memory.as_strided((2, 1, 400, width), (beyond, 1, width, 1))
        core = torch.tensor([[3, 399, 7, 1], [399, 0, 17, 1]])
    batch = len(core)
    for b, slots in enumerate(core):
        k[b, 0, slots.to(DEVICE)] = torch.randn(4, width, device=DEVICE).half()
    core = core.int().to(DEVICE)
    q = torch.randn(batch, group, width, device=DEVICE).half()
    none, four = (torch.full((batch,), n, dtype=torch.int32, device=DEVICE) for n in (0, 4))
    o = (q, k, k, none, core, four, core.new_zeros(batch, 1, 0), none[:, None])
    found = decode_attention(*o, scores=True, backend="triton")
    expected = decode_attention(*o, scores=True, backend="reference")
    assert error(found.out, expected.out) <= TOLERANCE[F16]
    assert error(found.core_scores, expected.core_scores) <= TOLERANCE[F32]


def test_the_dispatcher_takes_the_reference_on_the_cpu():
    o = operands(ROWS["63"])
    on_cpu = [t.cpu() for t in o]
    expected = decode_attention(*on_cpu, scores=True, backend="reference")
    found = decode_attention(*on_cpu, scores=True)
    assert all(map(torch.equal, found, expected))
    assert decode_workspace(on_cpu[0], on_cpu[1], on_cpu[4], on_cpu[6]) is None
    out = DecodeOutput.empty(on_cpu[0], on_cpu[4], on_cpu[6], True)
    assert decode_attention(*on_cpu, scores=True, out=out) is out and all(map(torch.equal, out, expected))


def test_shapes_and_dtypes_that_do_not_fit():
    o = operands(ROWS["63"], groups=2, group=2)
    for changes, said in (
        ({"q": o.q[:, :3]}, "does not fit k .*: rows and head size agree, and G divides H"),
        ({"q": o.q[0]}, r"expected are \[B, H, D\], \[B, G, C, D\] and the same"),
        ({"q": o.q.half()}, "q, k and v are torch.float16, torch.float32"),
        ({"core": o.core.long()}, r"core is torch.int64 .*, expected is torch.int32 \[1, 33\]"),
        ({"text_len": o.text_len[:, :1]}, r"text_len is .* expected is torch.int32 \[1, 2\]"),
        ({"k": o.k.transpose(2, 3).contiguous().transpose(2, 3)}, "last dimension of k is not contiguous"),
    ):
        with pytest.raises(ValueError, match=said):
            decode_attention(*{**{name: t for name, t in vars(o).items() if name != "named"}, **changes}.values())
    with pytest.raises(ValueError, match="scores is 'all', allowed are False, True, 'core', 'text'"):
        decode_attention(*o, scores="all")
    with pytest.raises(ValueError, match='backend is "cuda"'):
        decode_attention(*o, backend="cuda")


def test_the_poison_works():
    """The cases above mean something only if a slot too many, or an entry behind a length, is noticed."""
    o = operands(ROWS["63"], groups=1)
    assert o.k.isnan().any() and (o.core == POISON).any()
    o.prefix_len += o.k.shape[2] - int(o.prefix_len)
    assert decode_attention(*o, backend="triton").out.isnan().any()


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("group", [1, 4])
def test_captured_in_a_cuda_graph(group):
    """One capture serves other contents and lengths, and gives the same bits every time."""
    first, second = (operands([rows], group=group, dtype=F16, spare=600 - sum(rows), seed=i)
                     for i, rows in enumerate([(30, 100, 40), (5, 300, 80)]))  # fmt: skip
    lists = [t.new_zeros(*t.shape[:-1], 640) for t in (first.core, first.text)]
    static = [t.clone() for t in first]
    static[4], static[6] = lists

    def load(o):
        for mine, theirs in zip(static, o, strict=True):
            mine[tuple(map(slice, theirs.shape))] = theirs

    load(first)
    out = DecodeOutput.empty(static[0], static[4], static[6], True)
    workspace = decode_workspace(static[0], static[1], static[4], static[6])
    decode_attention(*static, scores=True, out=out, workspace=workspace)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_attention(*static, scores=True, out=out, workspace=workspace)
    for o in (first, second):
        load(o)
        graph.replay()
        once = [t.clone() for t in out]
        expected = rule(o)
        assert error(out.out, expected[0]) <= TOLERANCE[F16]
        assert error(out.core_scores[:, : o.core.shape[1]], expected[1]) <= TOLERANCE[F32]
        assert error(out.text_scores[..., : o.text.shape[2]], expected[2]) <= TOLERANCE[F32]
        graph.replay()
        assert all(map(torch.equal, once, out))

"""The fused kernels of a decode step: references against plain rules, Triton (interpreted without a GPU) against the
references. What a kernel has to write is full of NaN before it runs."""

import pytest
import torch
from decode_kernel_cases import DEVICE, POISON, TOLERANCE, error

from llava.kernels.add_rms_norm import add_rms_norm
from llava.kernels.rotate_append import rotate_append
from llava.kernels.silu_mul import silu_mul

F32, F16, BF16 = TOLERANCE


@pytest.fixture(autouse=True)
def poisoned():
    """torch.empty gives NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape, dtype=F32):
    return torch.randn(shape).to(DEVICE, dtype)


# --- add_rms_norm ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (3, 63), (2, 5, 111), (7, 1000), (1, 5120)], ids=str)
def test_add_rms_norm(shape, dtype):
    hidden, delta, weight = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype)
    summed, normed = add_rms_norm(hidden, delta, weight, 1e-5, backend="triton")
    # Rounded once. (The interpreter cuts bf16 off instead of rounding.)
    assert torch.equal(summed, hidden + delta) or (dtype == BF16 and DEVICE == "cpu")
    assert error(summed, hidden + delta) <= TOLERANCE[dtype]
    _, expected = add_rms_norm(summed.float(), None, weight.float(), 1e-5, backend="reference")
    assert normed.dtype == dtype and error(normed, expected) <= TOLERANCE[dtype]
    same, normed = add_rms_norm(summed, None, weight, 1e-5, backend="triton")
    assert same is summed and error(normed, expected) <= TOLERANCE[dtype]


def test_add_rms_norm_of_states_that_are_zero():
    """eps keeps the scale finite."""
    summed, normed = add_rms_norm(normal(2, 64), None, normal(64), 1e-5, backend="triton")
    zeros, normed = add_rms_norm(summed, -summed, normal(64), 1e-5, backend="triton")
    assert not zeros.any() and not normed.any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_add_rms_norm_reference_is_the_modules_arithmetic(dtype):
    hidden, delta, weight = normal(3, 111, dtype=dtype), normal(3, 111, dtype=dtype), normal(111, dtype=dtype)
    summed, normed = add_rms_norm(hidden, delta, weight, 1e-5, backend="reference")
    assert torch.equal(summed, hidden + delta)
    assert torch.equal(normed, torch.nn.functional.rms_norm(hidden + delta, (111,), weight, 1e-5))
    wide = (hidden + delta).double()
    rule = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert error(normed, rule) <= TOLERANCE[dtype]


# --- silu_mul ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 63), (2, 5, 111), (4, 1000), (1, 2049)], ids=str)
def test_silu_mul(shape, dtype):
    gate, up = (4 * normal(*shape[:-1], 2 * shape[-1] + 3, dtype=dtype)).split([shape[-1], shape[-1] + 3], dim=-1)
    up = up[..., 3:]
    found = silu_mul(gate, up, backend="triton")
    expected = silu_mul(gate.float(), up.float(), backend="reference")
    assert found.is_contiguous() and found.dtype == dtype and error(found, expected) <= TOLERANCE[dtype]
    rule = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    assert error(expected, rule) <= TOLERANCE[F32]


def test_silu_mul_far_from_zero():
    gate = torch.tensor([[-1e4, -200.0, -90.0, 0.0, 90.0, 1e4]], device=DEVICE)
    found = silu_mul(gate, torch.ones_like(gate), backend="triton")
    assert torch.allclose(found, torch.tensor([[0, 0, 0, 0, 90, 1e4]], device=DEVICE), atol=1e-30)


def test_silu_mul_of_rows_without_one_stride():
    gate, up = normal(2, 3, 2, 10).transpose(0, 1)[:, :, 0], normal(3, 2, 10)
    assert error(silu_mul(gate, up, backend="triton"), silu_mul(gate, up, backend="reference")) <= TOLERANCE[F32]


# --- rotate_append -----------------------------------------------------------------------------------------------


def product(batch, tokens, groups, group, size, dtype=F32):
    """(q, k, v): views of one product's output."""
    states = normal(batch, tokens, (groups * (group + 2)) * size, dtype=dtype).unflatten(-1, (-1, size))
    return states.split([groups * group, groups, groups], dim=2)


def angles(batch, tokens, size, dtype=F32):
    """(cos, sin) of random angles; sin with rotate_half's sign."""
    angle = torch.rand(batch, tokens, size // 2) * 6
    return tuple(torch.cat(parts, -1).to(DEVICE, dtype) for parts in ([angle.cos()] * 2, [-angle.sin(), angle.sin()]))


def storage(batch, groups, slots, size, dtype=F32):
    """(keys, values): one layer's views into one allocation for all layers, full of NaN."""
    return torch.full((2, 3, batch, groups, slots, size), torch.nan, device=DEVICE, dtype=dtype)[:, 1]


def integers(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def places(kind, batch, tokens, groups, slots):
    """(slots, counts, where): what rotate_append takes, and the slot [B, G, S] of each new entry."""
    if kind == "prefill":
        return None, None, torch.arange(tokens).expand(batch, groups, tokens)
    if kind == "contiguous":  # up to both edges of the storage
        counts = torch.linspace(tokens, slots, batch + 1).int()[1:]
        where = counts[:, None, None] - tokens + torch.arange(tokens)
        return None, integers(counts.tolist()), where.expand(batch, groups, tokens)
    lists = torch.stack([torch.randperm(slots) for _ in range(batch * groups)]).view(batch, groups, slots)
    counts = torch.randint(tokens, slots + 1, (batch, groups))
    counts[0, 0], counts[-1, -1] = tokens, slots
    where = lists.gather(2, counts[..., None] - tokens + torch.arange(tokens))
    unlisted = lists.clone().scatter_(2, counts[..., None] - tokens + torch.arange(tokens), -1) >= 0
    return integers(lists.masked_fill(unlisted, POISON).tolist()), integers(counts.tolist()), where


def rotated(x, cos, sin):
    """The rotation in float64, pair by pair: x [B, S, N, d] -> [B, N, S, d]."""
    half = x.shape[-1] // 2
    low, high = x.double().split(half, -1)
    cos, sin = cos.double()[:, :, None, half:], sin.double()[:, :, None, half:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1).transpose(1, 2)


ROTATIONS = [
    # kind, batch, tokens, groups, query heads per group, head size, slots, rows of angles
    ("prefill", 1, 7, 2, 1, 64, 9, 1),
    ("prefill", 2, 3, 1, 4, 80, 3, 1),
    ("contiguous", 1, 1, 4, 1, 128, 63, 1),
    ("contiguous", 3, 1, 2, 7, 128, 111, 3),
    ("contiguous", 2, 4, 1, 2, 96, 20, 2),
    ("listed", 1, 1, 3, 1, 128, 63, 1),
    ("listed", 3, 1, 2, 4, 64, 111, 3),
    ("listed", 2, 3, 2, 1, 10, 5, 1),
]


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", ROTATIONS, ids=str)
def test_rotate_append(case, dtype, backend):
    kind, batch, tokens, groups, group, size, slots, rows = case
    q, k, v = product(batch, tokens, groups, group, size, dtype)
    cos, sin = angles(rows, tokens, size, dtype)
    keys, values = storage(batch, groups, slots, size, dtype)
    whole = keys._base
    lists, counts, where = places(kind, batch, tokens, groups, slots)
    found = rotate_append(q, k, v, cos, sin, keys, values, lists, counts, backend=backend)
    assert found.is_contiguous() and found.dtype == dtype
    assert error(found, rotated(q, cos, sin)) <= TOLERANCE[dtype]
    index = where[..., None].expand(-1, -1, -1, size).to(DEVICE)
    assert error(keys.gather(2, index), rotated(k, cos, sin)) <= TOLERANCE[dtype]
    assert torch.equal(values.gather(2, index), v.transpose(1, 2))
    # Nothing else was written: neither in these slots nor in other layers' storage.
    assert int((~whole.isnan()).sum()) == 2 * batch * groups * tokens * size


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["contiguous", "listed"])
def test_rotate_append_reference_is_todays_arithmetic(batch, kind):
    """Bit for bit what a decode step computes with a concatenation, a roll and a scatter per storage."""
    q, k, v = product(batch, 1, 2, 2, 64)
    cos, sin = angles(batch, 1, 64)
    keys, values = storage(batch, 2, 20, 64).clone()
    before = keys.clone()
    lists, counts, where = places(kind, batch, 1, 2, 20)
    both = torch.cat([q[:, 0], k[:, 0]], dim=1)
    both = both * cos + both.roll(32, dims=-1) * sin
    found = rotate_append(q, k, v, cos, sin, keys, values, lists, counts, backend="reference")
    assert torch.equal(found, both[:, :4, None])
    expected = before.scatter(2, where[..., None].expand(-1, -1, -1, 64).to(DEVICE), both[:, 4:, None])
    assert torch.equal(keys.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("large", ["slot", "row"])
def test_rotate_append_beyond_2_to_the_31(large):
    """Elements of a cache of 4 GiB, of which only a few pages are ever touched."""
    size, beyond = 64, 2**31
    torch.use_deterministic_algorithms(False)  # which would fill it
    memory = torch.empty(beyond + 400 * size, dtype=F16, device=DEVICE)
    if large == "slot":
        keys, batch = memory.view(1, 1, -1, size), 1
    else:
        keys, batch = memory.as_strided((2, 1, 400, size), (beyond, 1, size, 1)), 2
    q, k, v = product(batch, 1, 1, 2, size, F16)
    cos, sin = angles(batch, 1, size, F16)
    last = keys.shape[2] - 1
    for lists, counts in ((None, [last + 1] * batch), ([[[POISON, last]]] * batch, [[2]] * batch)):
        keys[:, :, last] = torch.nan
        lists = None if lists is None else integers(lists)
        # One storage for both: a program stores its value behind its key.
        rotate_append(q, k, v, cos, sin, keys, keys, lists, integers(counts), backend="triton")
        assert torch.equal(keys[:, :, last], v[:, 0])


def test_operands_that_do_not_fit():
    q, k, v = product(2, 1, 2, 2, 64)
    cos, sin = angles(2, 1, 64)
    keys, values = storage(2, 2, 9, 64)
    counts, lists = integers([3, 4]), integers([[[1, 2, 3]] * 2] * 2)
    for changes, said in (
        ({"q": q[:, 0]}, r"q is \[2, 4, 64\], .*, where \[B, S, H, d\], \[B, S, G, d\] and \[B, G, C, d\] are due"),
        ({"q": q[:, :, :3]}, "does not fit k .*: G divides H, and d is even"),
        ({"v": v.half()}, r"v is torch.float16 .*, where torch.float32 \[2, 1, 2, 64\] is due"),
        ({"cos": cos[..., :32]}, r"cos is .* where torch.float32 \[2, 1, 64\] is due"),
        ({"values": values[:, :, :4]}, r"values is .* where torch.float32 \[2, 2, 9, 64\] is due"),
        ({"keys": keys.mT.contiguous().mT}, "last dimension of keys is not contiguous"),
        ({"counts": counts.long()}, r"counts is torch.int64 \[2\], where torch.int32 \[2\] is due"),
        ({"slots": lists}, r"counts is torch.int32 \[2\], where torch.int32 \[2, 2\] is due"),
        ({"slots": lists, "counts": None}, "slots are given without counts"),
        ({"keys": keys[:, :, :0], "values": values[:, :, :0]}, "1 tokens do not fit into 0 slots"),
    ):
        given = {"q": q, "k": k, "v": v, "cos": cos, "sin": sin, "keys": keys, "values": values, "counts": counts}
        with pytest.raises(ValueError, match=said):
            rotate_append(**given | changes)
    hidden, weight = normal(2, 64), normal(64)
    for arguments, said in (
        ((hidden, hidden, weight.half()), r"weight is torch.float16 \[64\], where torch.float32 \[64\] is due"),
        ((hidden, hidden[:1], weight), r"delta is .* \[1, 64\], where torch.float32 \[2, 64\] is due"),
        ((hidden.mT, None, normal(2)), "hidden is not contiguous"),
        ((normal(), None, weight), "hidden has no dimension"),
    ):
        with pytest.raises(ValueError, match=said):
            add_rms_norm(*arguments, 1e-5)
    for arguments, said in (
        ((hidden, hidden[:, :3]), r"up is .* \[2, 3\], where torch.float32 \[2, 64\] is due"),
        ((weight, weight), r"gate is \[64\], where \[..., M\]"),
        ((hidden.mT, hidden.mT), "last dimension of gate is not contiguous"),
    ):
        with pytest.raises(ValueError, match=said):
            silu_mul(*arguments)
    with pytest.raises(ValueError, match='backend is "cuda", allowed are "triton", "reference" and None'):
        silu_mul(hidden, hidden, backend="cuda")

"""The fused kernels of a decode step and of the vision tower: references against plain rules, Triton (interpreted
without a GPU) against the references. What a kernel has to write is full of NaN before it runs."""

import pytest
import torch
from decode_kernel_cases import DEVICE, POISON, TOLERANCE, error
from transformers.activations import QuickGELUActivation

from llava.kernels import backend as backends
from llava.kernels import quick_gelu_triton
from llava.kernels.add_rms_norm import add_rms_norm
from llava.kernels.evict import RULES, evict
from llava.kernels.matvec import matvec
from llava.kernels.quick_gelu import quick_gelu
from llava.kernels.rank_core import rank_core
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


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_silu_mul_far_from_zero():
    gate = torch.tensor([[-1e4, -200.0, -90.0, 0.0, 90.0, 1e4]], device=DEVICE)
    found = silu_mul(gate, torch.ones_like(gate), backend="triton")
    assert torch.allclose(found, torch.tensor([[0, 0, 0, 0, 90, 1e4]], device=DEVICE), atol=1e-30)


def test_silu_mul_of_rows_without_one_stride():
    gate, up = normal(2, 3, 2, 10).transpose(0, 1)[:, :, 0], normal(3, 2, 10)
    assert error(silu_mul(gate, up, backend="triton"), silu_mul(gate, up, backend="reference")) <= TOLERANCE[F32]


# --- matvec ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rows, width", [(1, 1), (63, 5), (5, 1000), (70, 64), (3, 4097), (7, 9000)], ids=str)
def test_matvec(rows, width, dtype):
    states, weight, up = (normal(*shape, dtype=dtype) for shape in ((1, width), (rows, width), (rows, width)))
    weight, up, bias = weight / width**0.5, up / width**0.5, normal(rows, dtype=dtype)
    wide = states.double(), weight.double(), up.double(), bias.double()
    product, other = wide[0] @ wide[1].T, wide[0] @ wide[2].T
    rules = {
        "plain": ({}, product),
        "biased": ({"bias": bias}, product + wide[3]),
        "gated": ({"up": up}, product / (1 + (-product).exp()) * other),
    }
    for name, (options, rule) in rules.items():
        found = matvec(states, weight, **options, backend="triton")
        expected = matvec(states, weight, **options, backend="reference")
        assert found.shape == expected.shape == (1, rows) and found.dtype == expected.dtype == dtype
        assert found.is_contiguous() and error(found, rule) <= TOLERANCE[dtype], name
        assert error(expected, rule) <= 2 * TOLERANCE[dtype], name  # the gate is rounded before it is multiplied


def test_matvec_of_a_part_of_a_larger_weight():
    """Rows in the middle of a joint weight, as merged projections have them: nothing beside them is read."""
    joint = torch.full((30, 100), torch.nan, device=DEVICE)
    joint[10:20] = normal(10, 100)
    found = matvec(normal(1, 100), joint[10:20], backend="triton")
    assert found.isfinite().all()


@pytest.mark.parametrize(
    "states, weight, options, complaint",
    [
        ((2, 8), (4, 8), {}, r"states is torch.float32 \[2, 8\], expected is torch.float32 \[1, 8\]"),
        ((1, 8), (4, 9), {}, r"states is .* \[1, 8\], expected is .* \[1, 9\]"),
        ((1, 8), (8,), {}, r"weight is \[8\], expected is \[N, K\]"),
        ((1, 8), (4, 8), {"bias": (8,)}, r"bias is .* \[8\], expected is .* \[4\]"),
        ((1, 8), (4, 8), {"up": (3, 8)}, r"up is .* \[3, 8\], expected is .* \[4, 8\]"),
        ((1, 8), (4, 8), {"bias": (4,), "up": (4, 8)}, "a gated product has no bias"),
    ],
)
def test_matvec_refuses(states, weight, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        matvec(normal(*states), normal(*weight), **{name: normal(*shape) for name, shape in options.items()})


# --- quick_gelu --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0, 5), (3, 63), (2, 5, 111), (2048,), (1, 2049), (3, 4096)], ids=str)
def test_quick_gelu(shape, dtype):
    hidden = 4 * normal(*shape, dtype=dtype)
    found = quick_gelu(hidden, backend="triton")
    expected = quick_gelu(hidden.float(), backend="reference")
    assert found.is_contiguous() and found.dtype == dtype and found.shape == shape
    rule = hidden.double() / (1 + (-1.702 * hidden.double()).exp())
    if found.numel():
        assert error(found, expected) <= TOLERANCE[dtype] and error(expected, rule) <= TOLERANCE[F32]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_quick_gelu_far_from_zero():
    hidden = torch.tensor([-1e4, -200.0, -60.0, 0.0, 60.0, 1e4], device=DEVICE)
    found = quick_gelu(hidden, backend="triton")
    assert torch.allclose(found, torch.tensor([0, 0, 0, 0, 60, 1e4], device=DEVICE), atol=1e-30)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_quick_gelu_reference_is_the_modules_arithmetic(dtype):
    hidden = 4 * normal(3, 111, dtype=dtype)
    assert torch.equal(quick_gelu(hidden, backend="reference"), QuickGELUActivation()(hidden))


def test_quick_gelu_takes_the_reference_where_a_gradient_is_needed(monkeypatch):
    monkeypatch.setattr(backends, "backend_for", lambda tensor, requested=None: requested or "triton")  # as on a GPU
    hidden = normal(3, 63).requires_grad_()
    found = quick_gelu(hidden)
    assert torch.equal(found, quick_gelu(hidden, backend="reference"))
    found.sum().backward()
    gradient, hidden.grad = hidden.grad, None
    QuickGELUActivation()(hidden).sum().backward()
    assert torch.equal(gradient, hidden.grad)
    monkeypatch.setattr(quick_gelu_triton, "launch", lambda hidden, out: out.fill_(7))
    assert (quick_gelu(hidden.detach()) == 7).all()
    with torch.no_grad():
        assert (quick_gelu(hidden) == 7).all()


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


# --- evict -------------------------------------------------------------------------------------------------------


class Region:
    """What evict works on, for rows and KV heads whose lists have lengths of their own."""

    def __init__(self, lengths, width, budgets, dtype=torch.int64):
        """lengths [B][G] before the first step; budgets: per step, (total, recent)."""
        batch, groups = len(lengths), len(lengths[0])
        self.scores = torch.full((batch, groups, width), torch.nan)
        self.text = torch.stack([torch.randperm(width) for _ in range(batch * groups)]).view(batch, groups, width).int()
        self.text_len = torch.tensor(lengths, dtype=torch.int32)
        self.scores[torch.arange(width) < self.text_len[..., None]] = 0.25
        table = torch.tensor([(POISON, POISON), *budgets], dtype=torch.int32).T[:, None].repeat(1, batch, 1)
        self.total, self.recent = table.contiguous()
        self.step = torch.zeros(1, dtype=dtype)
        vars(self).update({name: value.to(DEVICE) for name, value in vars(self).items()})

    def clone(self):
        other = object.__new__(Region)
        vars(other).update({name: value.clone() for name, value in vars(self).items()})
        return other

    def next(self, paid, **options):
        """A step in which a new entry takes the slot behind the live ones, and all are paid `paid` [B, G, T]."""
        self.step += 1
        self.text_len += 1
        paid = paid.masked_fill(torch.arange(paid.shape[-1], device=DEVICE) >= self.text_len[..., None], torch.nan)
        evict(self.scores, paid, self.text, self.text_len, self.total, self.recent, self.step, **options)

    def lists(self):
        """Per row and KV head: (slots, scores) of the live entries."""
        return [
            (slots[:n], scores[:n])
            for slots, scores, n in zip(
                self.text.flatten(0, 1).tolist(),
                self.scores.flatten(0, 1).tolist(),
                self.text_len.flatten().tolist(),
                strict=True,
            )
        ]

    def same(self, other):
        return all(torch.equal(value, vars(other)[name]) for name, value in vars(self).items())


def eighths(*shape):
    """Numbers that tie often and whose sums are exact."""
    return (torch.randint(0, 9, shape) / 8).to(DEVICE)


def plain_step(slots, scores, new_slot, paid, total, recent, rule, quantile):
    """The rule for one list, in Python numbers: ([slots], [scores]) after the step."""
    ranked = sorted(paid)
    rank = quantile * (len(ranked) - 1)
    below, part = int(rank), rank % 1
    centre = 0.0
    if rule == "centred":
        centre = ranked[below] + (part * (ranked[below + 1] - ranked[below]) if part else 0)
    scores = [(0 if rule == "latest" else old) + new - centre for old, new in zip(scores, paid, strict=False)]
    slots, scores = [*slots, new_slot], [*scores, paid[-1]]
    if len(slots) > total:
        candidates = range(len(slots) - recent)
        worst = max((-scores[i], i) for i in candidates)[1] if candidates else 0
        del slots[worst], scores[worst]
    return slots, scores


RUNS = [
    # lengths, width, (total, recent) per step
    ([[5]], 16, [(5, 2)] * 6),
    ([[3, 20, 0], [7, 19, 1]], 24, [(4, 1), (4, 2), (5, 2), (6, 6), (6, 0), (7, 3), (20, 5), (20, 5)]),
    ([[110, 111]], 112, [(111, 30)]),
    ([[1022, 200]], 1100, [(1000, 500), (1000, 0), (1001, 1001)]),
]


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(("rule", "quantile"), [("summed", 0), ("latest", 0), ("centred", 0.25), ("centred", 1)])
@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run[0]}, {run[1]}")
def test_evict_is_the_rule(run, rule, quantile, backend):
    lengths, width, budgets = run
    region = Region(lengths, width, budgets)
    for total, recent in budgets:
        paid = eighths(*region.text.shape)
        before, free = region.lists(), region.text.gather(2, region.text_len[..., None].long()).flatten().tolist()
        region.next(paid, rule=rule, quantile=quantile, backend=backend)
        expected = [
            plain_step(slots, scores, new, given[: len(slots) + 1], total, recent, rule, quantile)
            for (slots, scores), new, given in zip(before, free, paid.flatten(0, 1).tolist(), strict=True)
        ]
        assert region.lists() == expected
        # Every slot is still there, and scores behind the live entries are 0.
        assert torch.equal(region.text.sort(-1).values, torch.arange(width, device=DEVICE).expand_as(region.text).int())
        live = torch.arange(width, device=DEVICE) <= region.text_len[..., None]
        assert not region.scores[~live].any()


def many_steps(rule, quantile, groups, width, prompt, steps):
    budgets = [(max(prompt - 3, (prompt + step) // 2), 4 + step % 5) for step in range(1, steps + 1)]
    lengths = torch.randint(prompt // 2, prompt + 1, (2, groups)).tolist()
    found = Region(lengths, width, budgets, torch.int32)
    expected = found.clone()
    for _ in range(steps):
        paid = eighths(*found.text.shape)
        found.next(paid, rule=rule, quantile=quantile, backend="triton")
        expected.next(paid, rule=rule, quantile=quantile, backend="reference")
        assert found.same(expected)


@pytest.mark.parametrize("rule", RULES)
def test_evict_over_many_steps(rule):
    many_steps(rule, 0.5, 2, 63, 40, 12)


@pytest.mark.long
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("width", "prompt", "steps"), [(1000, 600, 100), (3200, 3000, 40)])
def test_evict_over_very_many_steps(rule, width, prompt, steps):
    many_steps(rule, 0.125, 2, width, prompt, steps)


@pytest.mark.parametrize("quantile", [0.0, 0.37, 0.9, 1.0])
@pytest.mark.parametrize("rule", RULES)
def test_evict_with_probabilities(rule, quantile):
    """Float arithmetic in another order may differ by a rounding: scores agree to 1e-5, not to the bit."""
    found = Region([[1, 2, 40, 100]], 111, [(200, 3)])
    expected = found.clone()
    paid = torch.randn(found.text.shape, device=DEVICE).mul(5).softmax(-1)
    found.next(paid, rule=rule, quantile=quantile, backend="triton")
    expected.next(paid, rule=rule, quantile=quantile, backend="reference")
    assert error(found.scores, expected.scores) <= TOLERANCE[F32]
    assert torch.equal(found.text, expected.text) and torch.equal(found.text_len, expected.text_len)


@pytest.mark.parametrize("rule", RULES)
def test_evict_of_empty_lists(rule):
    """No live entry, the step's own neither; and lists without any place."""
    for backend in ("triton", "reference"):
        region = Region([[-1, -1]], 5, [(0, 0)])
        before = region.clone()
        region.next(eighths(1, 2, 5), rule=rule, quantile=0.5, backend=backend)
        assert not region.scores.any() and not region.text_len.any() and torch.equal(region.text, before.text)
        region = Region([[-1]], 0, [(0, 0)])
        region.next(eighths(1, 1, 0), rule=rule, backend=backend)
        assert region.text.shape == (1, 1, 0)


# --- rank_core ---------------------------------------------------------------------------------------------------


CORES = [
    # image entries and core of each row, width of both lists
    ([(1, 1)], 1, 1),
    ([(63, 20)], 63, 20),
    ([(111, 111), (40, 0), (0, 0), (70, 69)], 128, 120),
    ([(1000, 300), (999, 1)], 1100, 300),
]


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("case", CORES, ids=str)
def test_rank_core_is_the_rule(case, backend):
    rows, width, most = case
    image = torch.stack([torch.randperm(width) for _ in rows]).int().to(DEVICE)
    image_len, core_len = (integers([row[i] for row in rows]) for i in (0, 1))
    kinds = (
        eighths(len(rows), width),  # many ties
        torch.zeros(len(rows), width, device=DEVICE).where(eighths(len(rows), width) < 0.5, -0.0),
        torch.randn(len(rows), width, device=DEVICE),
        torch.rand(len(rows), width, device=DEVICE) * 1e-40,
    )
    for scores in kinds:
        scores = scores.masked_fill(torch.arange(width, device=DEVICE) >= image_len[:, None], torch.inf)
        core = torch.full((len(rows), most), POISON, dtype=torch.int32, device=DEVICE)
        rank_core(scores, image, image_len, core, core_len, backend=backend)
        for b, (held, size) in enumerate(rows):
            best = sorted(range(held), key=lambda i: (-scores[b, i].item(), i))[:size]  # noqa: B023 called at once
            expected = [image[b, i].item() for i in sorted(best)] + [image[b, -1].item()] * (most - size)
            assert core[b].tolist() == expected


@pytest.mark.long
@pytest.mark.parametrize("width", [2880, 4000])
def test_rank_core_over_many_steps(width):
    image = torch.arange(3, 3 + width, dtype=torch.int32, device=DEVICE).repeat(2, 1)
    image_len = integers([width, width - 100])
    for step in range(20):
        scores = eighths(2, width) if step % 2 else torch.rand(2, width, device=DEVICE)
        core_len = integers([step * width // 20, 10 * step])
        found, expected = (torch.full((2, width), POISON, dtype=torch.int32, device=DEVICE) for _ in range(2))
        rank_core(scores, image, image_len, found, core_len, backend="triton")
        rank_core(scores, image, image_len, expected, core_len, backend="reference")
        assert torch.equal(found, expected)


def test_a_core_without_places():
    nothing = integers([0])
    core = torch.empty(1, 0, dtype=torch.int32, device=DEVICE)
    for width in (0, 5):
        image = integers([list(range(width))])
        for backend in ("triton", "reference"):
            rank_core(image.float(), image, nothing, core, nothing, backend=backend)


# --- all of them -------------------------------------------------------------------------------------------------


class Step:
    """Every kernel once, on tensors of its own that keep their places; `load` gives them other contents."""

    def __init__(self):
        self.hidden, self.delta, self.weight = normal(2, 64), normal(2, 64), normal(64)
        self.qkv, self.angles, self.cache = normal(2, 1, 8, 64), normal(2, 2, 1, 64), normal(2, 2, 2, 40, 64)
        self.region = Region([[20, 30], [3, 35]], 40, [(18, 4)] * 8)
        self.paid, self.ranked = eighths(2, 2, 40), eighths(2, 63)
        self.image, self.core = (
            torch.arange(126, dtype=torch.int32, device=DEVICE).view(2, 63),
            integers([[0] * 30] * 2),
        )
        self.image_len, self.core_len = integers([63, 50]), integers([30, 20])
        self.found = {}

    def tensors(self):
        given = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return given | {f"region.{name}": value for name, value in vars(self.region).items()} | self.found

    def load(self, other):
        theirs = other.tensors()
        for name, mine in self.tensors().items():
            if name in theirs:
                mine.copy_(theirs[name])

    def __call__(self, backend):
        summed, normed = add_rms_norm(self.hidden, self.delta, self.weight, 1e-5, backend=backend)
        product = silu_mul(normed[:, :32], summed[:, 32:], backend=backend)
        activated = quick_gelu(summed, backend=backend)
        region = self.region
        region.step += 1
        region.text_len += 1
        q, k, v = self.qkv.split([4, 2, 2], dim=2)
        places = (region.text, region.text_len)
        rotated = rotate_append(q, k, v, *self.angles, *self.cache, *places, backend=backend)
        tables = (region.total, region.recent, region.step)
        evict(region.scores, self.paid, *places, *tables, rule="centred", quantile=0.5, backend=backend)
        rank_core(self.ranked, self.image, self.image_len, self.core, self.core_len, backend=backend)
        self.found = {
            "summed": summed,
            "normed": normed,
            "product": product,
            "rotated": rotated,
            "activated": activated,
        }


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_captured_in_a_cuda_graph():
    """One capture serves other contents, counts and lists."""
    captured = Step()
    captured("triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured("triton")
    for _ in range(2):
        expected = Step()
        captured.load(expected)
        for _ in range(3):
            graph.replay()
            expected("reference")
            for name, theirs in expected.tensors().items():
                mine = captured.tensors()[name]
                assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-5, equal_nan=True), name


# --- what does not fit -------------------------------------------------------------------------------------------


def test_operands_that_do_not_fit():
    q, k, v = product(2, 1, 2, 2, 64)
    cos, sin = angles(2, 1, 64)
    keys, values = storage(2, 2, 9, 64)
    counts, lists = integers([3, 4]), integers([[[1, 2, 3]] * 2] * 2)
    for changes, said in (
        ({"q": q[:, 0]}, r"q is \[2, 4, 64\], .*, expected are \[B, S, H, d\], \[B, S, G, d\] and \[B, G, C, d\]"),
        ({"q": q[:, :, :3]}, "does not fit k .*: G divides H, and d is even"),
        ({"v": v.half()}, r"v is torch.float16 .*, expected is torch.float32 \[2, 1, 2, 64\]"),
        ({"cos": cos[..., :32]}, r"cos is .* expected is torch.float32 \[2, 1, 64\]"),
        ({"values": values[:, :, :4]}, r"values is .* expected is torch.float32 \[2, 2, 9, 64\]"),
        ({"keys": keys.mT.contiguous().mT}, "last dimension of keys is not contiguous"),
        ({"counts": counts.long()}, r"counts is torch.int64 \[2\], expected is torch.int32 \[2\]"),
        ({"slots": lists}, r"counts is torch.int32 \[2\], expected is torch.int32 \[2, 2\]"),
        ({"slots": lists, "counts": None}, "slots are given without counts"),
        ({"keys": keys[:, :, :0], "values": values[:, :, :0]}, "1 tokens do not fit into 0 slots"),
    ):
        given = {"q": q, "k": k, "v": v, "cos": cos, "sin": sin, "keys": keys, "values": values, "counts": counts}
        with pytest.raises(ValueError, match=said):
            rotate_append(**given | changes)
    hidden, weight = normal(2, 64), normal(64)
    for arguments, said in (
        ((hidden, hidden, weight.half()), r"weight is torch.float16 \[64\], expected is torch.float32 \[64\]"),
        ((hidden, hidden[:1], weight), r"delta is .* \[1, 64\], expected is torch.float32 \[2, 64\]"),
        ((hidden.mT, None, normal(2)), "hidden is not contiguous"),
        ((normal(), None, weight), "hidden has no dimension"),
    ):
        with pytest.raises(ValueError, match=said):
            add_rms_norm(*arguments, 1e-5)
    for arguments, said in (
        ((hidden, hidden[:, :3]), r"up is .* \[2, 3\], expected is torch.float32 \[2, 64\]"),
        ((weight, weight), r"gate is \[64\], expected is \[..., M\]"),
        ((hidden.mT, hidden.mT), "last dimension of gate is not contiguous"),
    ):
        with pytest.raises(ValueError, match=said):
            silu_mul(*arguments)
    with pytest.raises(ValueError, match=r"hidden is not contiguous: its strides are \(1, 64\)"):
        quick_gelu(hidden.mT)
    with pytest.raises(ValueError, match='backend is "cuda", allowed are "triton", "reference" and None'):
        silu_mul(hidden, hidden, backend="cuda")
    region = Region([[3, 4]], 8, [(3, 1)])
    given = {name: value for name, value in vars(region).items() if name != "scores"} | {"paid": region.scores}
    for changes, said in (
        ({"rule": "oldest"}, "rule is 'oldest', allowed are 'summed', 'latest', 'centred'"),
        ({"quantile": 1.5}, "quantile is 1.5, allowed is 0 to 1"),
        ({"scores": region.scores[0]}, r"scores is \[2, 8\] .*, expected are \[B, G, T\] and \[B, steps \+ 1\]"),
        ({"paid": region.scores.half()}, "paid is torch.float16 .*, expected is torch.float32"),
        ({"text": region.text[..., :4]}, r"text is .* \[1, 2, 4\], expected is torch.int32 \[1, 2, 8\]"),
        ({"text_len": region.text_len[:, :1]}, r"text_len is .* expected is torch.int32 \[1, 2\]"),
        ({"recent": region.recent[:, :1]}, r"recent is .* expected is torch.int32 \[1, 2\]"),
        ({"step": region.step.float()}, r"step is torch.float32 \[1\], expected is torch.int64 \[1\]"),
        ({"text": region.text.mT.contiguous().mT}, "text is not contiguous"),
    ):
        with pytest.raises(ValueError, match=said):
            evict(**{"scores": region.scores, "rule": "summed"} | given | changes)
    scores, image, length = normal(1, 8), integers([list(range(8))]), integers([4])
    for changes, said in (
        ({"core": integers([list(range(9))])}, r"core \[1, 9\], expected are \[B, N\] and \[B, M\] with M at most N"),
        ({"scores": scores.double()}, "scores is torch.float64 .*, expected is torch.float32"),
        ({"image": image[:, :5]}, r"image is .* \[1, 5\], expected is torch.int32 \[1, 8\]"),
        ({"core_len": length.long()}, "core_len is torch.int64 .*, expected is torch.int32"),
    ):
        operands = {"scores": scores, "image": image, "image_len": length, "core": image[:, :4].clone()}
        with pytest.raises(ValueError, match=said):
            rank_core(**operands | {"core_len": length} | changes)

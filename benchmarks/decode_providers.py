"""What benchmarks/decode_kernel.py times: the operands of a step, and several ways to attend to listed slots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from memory import cache_bytes
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from llava.kernels.decode_attention import DecodeOutput, decode_attention, decode_workspace

PREFIX, TEXT = 35, 64  # slots before and after the image, which are all read


@dataclass
class Case:
    """Sizes of one case: the cache, and the part of it that is read.

    tokens: vision tokens stored; share: share of them that is read; heads: H; groups: G; width: d.
    """

    batch: int
    tokens: int
    share: float
    heads: int
    groups: int
    width: int
    dtype: torch.dtype
    device: str

    @property
    def stored(self) -> int:
        return PREFIX + self.tokens + TEXT

    @property
    def core(self) -> int:
        return int(self.share * self.tokens + 1e-6)

    @property
    def listed(self) -> int:
        return PREFIX + self.core + TEXT

    def bytes(self, rows: int) -> int:
        """Bytes of `rows` keys and values per batch row and KV head."""
        return 2 * self.batch * self.groups * rows * self.width * self.dtype.itemsize

    def copies(self, most: int) -> int:
        """Number of copies of the cache: their listed rows are four times as large as the processor's cache."""
        return max(2, min(most, -(-4 * cache_bytes(self.device) // self.bytes(self.listed))))


class Step:
    """Operands of one call: a query, a cache of random numbers, and the lists in the form of each provider."""

    def __init__(self, case: Case, seed: int):
        # 1. Query, cache, and the lists of our kernel.
        make = torch.Generator(case.device).manual_seed(seed)
        options = {"generator": make, "device": case.device}
        batch, groups, stored = case.batch, case.groups, case.stored
        self.q = torch.randn(batch, case.heads, case.width, **options).to(case.dtype)
        self.k, self.v = (torch.randn(batch, groups, stored, case.width, **options).to(case.dtype) for _ in "kv")
        ranks = torch.rand(batch, case.tokens, **options).argsort(-1)
        self.core = (PREFIX + ranks[:, : case.core].sort(-1).values).int()
        # After evictions, the slots of the text are in no order.
        text = PREFIX + case.tokens + torch.rand(batch, groups, TEXT, **options).argsort(-1)
        self.text = text.int()

        def full(value, *shape):
            return torch.full(shape, value, dtype=torch.int32, device=case.device)

        self.prefix_len, self.core_len = full(PREFIX, batch), full(case.core, batch)
        self.text_len = full(TEXT, batch, groups)
        # The same lists for all stored slots: the prefix is the whole cache, and the other parts are empty.
        self.everything = (full(stored, batch), self.core, full(0, batch), self.text, full(0, batch, groups))

        # 2. The same slots as flat row numbers and as a mask, for the baselines. Their time leaves this work out.
        slots = torch.cat(
            [
                torch.arange(PREFIX, device=case.device).expand(batch, groups, -1),
                self.core.long()[:, None].expand(-1, groups, -1),
                text,
            ],
            dim=-1,
        )
        sequence = torch.arange(batch * groups, device=case.device).view(batch, groups, 1)
        self.flat = (sequence * stored + slots).flatten()
        self.mask = torch.zeros(batch, groups, 1, stored, dtype=torch.bool, device=case.device)
        self.mask.scatter_(-1, slots[:, :, None], True)
        # [B, G, H / G, d]: the heads of a group as rows of one problem, so that SDPA does not copy keys per head.
        self.grouped = self.q.view(batch, groups, -1, case.width)

    @property
    def lists(self) -> tuple[Tensor, ...]:
        return self.prefix_len, self.core, self.core_len, self.text, self.text_len

    def expected(self, everything: bool) -> DecodeOutput:
        """Output and scores by the reference, in float32, or in float64 if the operands are float32.

        everything: over all stored slots, else over the listed ones.
        """
        precise = torch.float64 if self.q.dtype == torch.float32 else torch.float32
        operands = (t.to(precise) for t in (self.q, self.k, self.v))
        lists = self.everything if everything else self.lists
        return decode_attention(*operands, *lists, scores=True, backend="reference")


def ours(step: Step, workspace, out: DecodeOutput) -> DecodeOutput:
    return decode_attention(
        step.q, step.k, step.v, *step.lists, scores=out.core_scores is not None, out=out, workspace=workspace
    )


def sdpa(step: Step) -> Tensor:
    return scaled_dot_product_attention(step.grouped, step.k, step.v)


def index_select(step: Step) -> Tensor:
    *rows, _, width = step.k.shape
    k, v = (t.view(-1, width).index_select(0, step.flat).view(*rows, -1, width) for t in (step.k, step.v))
    return scaled_dot_product_attention(step.grouped, k, v)


def masked(step: Step) -> Tensor:
    mask = step.mask.expand(-1, -1, step.grouped.shape[2], -1)
    return scaled_dot_product_attention(step.grouped, step.k, step.v, attn_mask=mask)


@dataclass
class Provider:
    """One way to attend, with its measurements.

    rows: rows of keys and values that it moves. everything: it reads all stored slots. calls, replays: samples in
    microseconds. captured: output of the graph's last call. error: largest relative error so far.
    """

    name: str
    call: Callable[[Step], Tensor | DecodeOutput]
    rows: int
    everything: bool = False
    calls: list[float] = field(default_factory=list)
    replays: list[float] = field(default_factory=list)
    graph: torch.cuda.CUDAGraph | None = None
    captured: Tensor | DecodeOutput | None = None
    error: float = 0.0


def providers(case: Case, step: Step, splits: int | None, tuning: list[int] | None) -> list[Provider]:
    """All providers. splits, tuning: of our kernel, instead of its own choice."""
    # Output and workspace are shared by all calls, as in the engine: a step must not allocate.
    workspace = decode_workspace(step.q, step.k, step.core, step.text, splits)
    if workspace is not None and tuning:
        from llava.kernels.decode_attention_triton import Tuning

        workspace = replace(workspace, tuning=Tuning(*tuning))
    outputs = [DecodeOutput.empty(step.q, step.core, step.text, scores) for scores in (False, True)]
    return [
        Provider("ours", lambda s: ours(s, workspace, outputs[0]), case.listed),
        Provider("ours_scores", lambda s: ours(s, workspace, outputs[1]), case.listed),
        Provider("sdpa", sdpa, case.stored, everything=True),
        Provider("index_select", index_select, 3 * case.listed),
        Provider("masked", masked, case.stored),
    ]


def error(found: Tensor | DecodeOutput, expected: DecodeOutput) -> float:
    """Largest max |found - expected| / max |expected| over the output and the scores. NaN stays NaN."""
    found = found if isinstance(found, DecodeOutput) else DecodeOutput(found.reshape(expected.out.shape))
    pairs = [(a.float(), b) for a, b in zip(found, expected, strict=True) if a is not None]
    return float(torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max())

"""Decode attention over listed slots in Triton: a split-K kernel and its reduction (needs triton; import it lazily).

Launch 1, `_split`: one program per row, KV head and split. The three parts form one sequence of positions, and each
split takes an equal share of it. The program looks up the slot of each position and reads its key and value once, for
all query heads of the KV head. It writes a maximum, a sum and an unnormalised output per head (online softmax, arXiv
1805.02867; splits as in Flash-Decoding). Where scores are requested, it also writes the logits of the listed entries.

With one split per sequence and no scores, it writes the output, and there is no second launch.

Launch 2, `_reduce`: joins the splits of each head and turns the logits into scores. Heads are added in a fixed order
and without atomics. The number of a program says which of these tasks it has, so one launch is enough.

All logarithms are to base 2, because exp2 is one instruction.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs of launch 1 per multiprocessor. With 8, an H100 was up to 12 % slower at batches 8 and 32.
_PROGRAMS_PER_SM = 4
# A split with fewer slots costs more time in the reduction than it saves.
_ROWS_PER_SPLIT = 64
# The number of splits is compiled into the kernels. Powers of two up to this limit mean few kernels.
_MOST_SPLITS = 32
# Entries and heads that a program of launch 2 adds up at a time.
_SCORE_BLOCK = 64
_HEAD_TILE = 16


@dataclass(frozen=True)
class Tuning:
    """Settings of launch 1: slots per iteration, warps per program, depth of the load pipeline."""

    block: int
    warps: int
    stages: int


def tuning_for(group: int, dtype: torch.dtype) -> Tuning:
    """Return the default settings for `group` query heads per KV head.

    With one head, products and sums are in registers, and the loads of the next block are under way. The setting is the
    fastest of 13 on an H100 (bfloat16, head size 128, batches 1, 8 and 32). With several heads, tensor cores multiply a
    group that is padded to 16 rows; these settings are chosen by the compiler's report for sm_90 and were not timed: 143
    registers leave room for three programs per multiprocessor, which load one block ahead. Float32 has no exact tensor
    cores, so its blocks are smaller; otherwise registers spill.
    """
    if group == 1:
        return Tuning(block=16, warps=2, stages=2)
    return Tuning(block=16 if dtype == torch.float32 else 64, warps=4, stages=2)


@dataclass(frozen=True)
class Workspace:
    """Scratch memory between the two launches. No call reads what an earlier call left in it.

    partial float32 [B, H, S, D], maxima and sums float32 [B, H, S] for S splits; logits float32 [B, H, W] with W at
    least the sum of the widths of both lists; tuning: None for the default
    """

    partial: Tensor
    maxima: Tensor
    sums: Tensor
    logits: Tensor
    tuning: Tuning | None = None

    @classmethod
    def empty(cls, q: Tensor, k: Tensor, core: Tensor, text: Tensor, splits: int | None = None) -> Workspace:
        """Return a workspace for these tensors. splits: None chooses by choose_splits."""
        (batch, heads, width), groups = q.shape, k.shape[1]
        splits = choose_splits(batch * groups, k.shape[2], _processors(q.device)) if splits is None else splits
        floats = {"device": q.device, "dtype": torch.float32}
        return cls(
            torch.empty(batch, heads, splits, width, **floats),
            torch.empty(batch, heads, splits, **floats),
            torch.empty(batch, heads, splits, **floats),
            torch.empty(batch, heads, core.shape[-1] + text.shape[-1], **floats),
        )


def choose_splits(sequences: int, slots: int, processors: int) -> int:
    """Return how many programs share one sequence (row and KV head) of at most `slots` entries.

    processors: number of multiprocessors. The result is a power of two, rounded up, so a split may get only half of
    _ROWS_PER_SPLIT.
    """
    wanted = min(triton.cdiv(_PROGRAMS_PER_SM * processors, sequences), slots // _ROWS_PER_SPLIT)
    return min(triton.next_power_of_2(max(wanted, 1)), _MOST_SPLITS)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


# Lists and their strides depend on the length of a request. Triton would compile a second kernel for values that are
# multiples of 16, although that makes these kernels no faster.
@triton.jit(
    do_not_specialize=("core_row", "text_row", "text_group", "logits_head"),
    do_not_specialize_on_alignment=("prefix_len_ptr", "core_ptr", "core_len_ptr", "text_ptr", "text_len_ptr"),
)
def _split(
    q_ptr, k_ptr, v_ptr, prefix_len_ptr, core_ptr, core_len_ptr, text_ptr, text_len_ptr,
    partial_ptr, maxima_ptr, sums_ptr, logits_ptr, out_ptr,
    scale_log2,
    q_row, q_head, k_row, k_group, k_slot, v_row, v_group, v_slot, core_row, text_row, text_group, logits_head,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr, PADDED_GROUP: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    CORE_SCORES: tl.constexpr, TEXT_SCORES: tl.constexpr, UPCAST: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Launch 1 (module docstring). Strides count elements. The heads of a group are group * GROUP + 0 .. GROUP - 1."""
    # 1. The share of this split: positions first .. last - 1.
    # 64 bits: a large cache has more than 2^31 elements.
    sequence = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = sequence // GROUPS
    group = sequence % GROUPS
    n_prefix = tl.load(prefix_len_ptr + row)
    n_core = tl.load(core_len_ptr + row)
    n_text = tl.load(text_len_ptr + sequence)
    total = n_prefix + n_core + n_text
    # At least a block: short sequences then use few splits, and the others end at once.
    share = tl.maximum(tl.cdiv(total, SPLITS), BLOCK)
    first = split * share
    last = tl.minimum(first + share, total)

    # 2. Pointers of this row and KV head, and the queries of its group.
    offsets = tl.arange(0, BLOCK)
    dims = tl.arange(0, PADDED_WIDTH)
    heads = tl.arange(0, PADDED_GROUP)
    inside = dims < WIDTH
    core_ptr += row * core_row
    text_ptr += row * text_row + group * text_group
    k_ptr += row * k_row + group * k_group
    v_ptr += row * v_row + group * v_group
    q_ptr += row * q_row + group * GROUP * q_head
    first_head = sequence * GROUP  # row * heads + first head of the group
    logits_ptr += first_head * logits_head
    if GROUP == 1:
        q = tl.load(q_ptr + dims, mask=inside, other=0.0).to(tl.float32)
        # Each of the BLOCK lanes has its own online softmax, joined after the loop: the loop has no sum over lanes.
        maximum = tl.full([BLOCK], float("-inf"), tl.float32)
        total_weight = tl.zeros([BLOCK], tl.float32)
        acc = tl.zeros([BLOCK, PADDED_WIDTH], tl.float32)
    else:
        q = tl.load(
            q_ptr + heads[:, None] * q_head + dims[None, :], mask=(heads < GROUP)[:, None] & inside[None, :], other=0.0
        )
        if UPCAST:  # in the interpreter, see _INTERPRETED
            q = q.to(tl.float32)
        maximum = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
        total_weight = tl.zeros([PADDED_GROUP], tl.float32)
        acc = tl.zeros([PADDED_GROUP, PADDED_WIDTH], tl.float32)

    # 3. Online softmax over the blocks of the share.
    for start in tl.range(first, last, BLOCK, num_stages=STAGES):
        position = start + offsets
        valid = position < last
        listed = position - n_prefix
        in_core = (listed >= 0) & (listed < n_core)
        in_text = listed >= n_core
        core_slot = tl.load(core_ptr + listed, mask=valid & in_core, other=0)
        text_slot = tl.load(text_ptr + (listed - n_core), mask=valid & in_text, other=0)
        slot = tl.where(listed < 0, position, tl.where(in_core, core_slot, text_slot)).to(tl.int64)
        mask = valid[:, None] & inside[None, :]
        k = tl.load(k_ptr + slot[:, None] * k_slot + dims[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + slot[:, None] * v_slot + dims[None, :], mask=mask, other=0.0)
        wanted = valid & ((in_core & CORE_SCORES) | (in_text & TEXT_SCORES))
        if GROUP == 1:
            logits = tl.sum(k.to(tl.float32) * q[None, :], axis=1) * scale_log2
            if CORE_SCORES or TEXT_SCORES:
                tl.store(logits_ptr + listed, logits, mask=wanted)
            logits = tl.where(valid, logits, float("-inf"))
            higher = tl.maximum(maximum, logits)
            finite = tl.where(higher == float("-inf"), 0.0, higher)  # a lane without entries: -inf - -inf is NaN
            shrink = tl.exp2(maximum - finite)
            weight = tl.exp2(logits - finite)
            total_weight = total_weight * shrink + weight
            acc = acc * shrink[:, None] + weight[:, None] * v.to(tl.float32)
        else:
            if UPCAST:
                k = k.to(tl.float32)
                v = v.to(tl.float32)
            logits = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
            if CORE_SCORES or TEXT_SCORES:
                tl.store(
                    logits_ptr + heads[:, None] * logits_head + listed[None, :],
                    logits,
                    mask=(heads < GROUP)[:, None] & wanted[None, :],
                )
            logits = tl.where(valid[None, :], logits, float("-inf"))
            higher = tl.maximum(maximum, tl.max(logits, axis=1))  # finite: every block has a valid entry
            shrink = tl.exp2(maximum - higher)
            weight = tl.exp2(logits - higher[:, None])
            total_weight = total_weight * shrink + tl.sum(weight, axis=1)
            acc = tl.dot(weight.to(v.dtype), v, acc=acc * shrink[:, None], input_precision="ieee")
        maximum = higher

    # 4. The result of the split. A split without entries writes maximum -inf and sum 0, but no partial output.
    # ALONE: the split is the whole sequence, so its result is the output. A sequence without entries has output 0.
    if GROUP == 1:
        lanes = maximum
        maximum = tl.max(lanes, axis=0)
        join = tl.exp2(lanes - tl.where(maximum == float("-inf"), 0.0, maximum))
        joined_weight = tl.sum(total_weight * join, axis=0)
        if ALONE:
            out = tl.sum(acc * join[:, None], axis=0) / tl.where(joined_weight == 0.0, 1.0, joined_weight)
            tl.store(out_ptr + first_head * WIDTH + dims, out.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            tl.store(maxima_ptr + first_head * SPLITS + split, maximum)
            tl.store(sums_ptr + first_head * SPLITS + split, joined_weight)
            if first < last:
                joined = tl.sum(acc * join[:, None], axis=0)
                tl.store(partial_ptr + (first_head * SPLITS + split) * WIDTH + dims, joined, mask=inside)
    elif ALONE:
        out = acc / tl.where(total_weight == 0.0, 1.0, total_weight)[:, None]
        mask = (heads < GROUP)[:, None] & inside[None, :]
        tl.store(
            out_ptr + (first_head + heads)[:, None] * WIDTH + dims[None, :], out.to(out_ptr.dtype.element_ty), mask=mask
        )
    else:
        entry = (first_head + heads) * SPLITS + split
        tl.store(maxima_ptr + entry, maximum, mask=heads < GROUP)
        tl.store(sums_ptr + entry, total_weight, mask=heads < GROUP)
        if first < last:
            mask = (heads < GROUP)[:, None] & inside[None, :]
            tl.store(partial_ptr + entry[:, None] * WIDTH + dims[None, :], acc, mask=mask)


@triton.jit
def _join(
    partial_ptr, maxima_ptr, sums_ptr, out_ptr, head,
    WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr, SPLITS: tl.constexpr, PADDED_SPLITS: tl.constexpr,
):  # fmt: skip
    """Write the output of one head, joined from its splits."""
    splits = tl.arange(0, PADDED_SPLITS)
    dims = tl.arange(0, PADDED_WIDTH)
    maxima = tl.load(maxima_ptr + head * SPLITS + splits, mask=splits < SPLITS, other=float("-inf"))
    sums = tl.load(sums_ptr + head * SPLITS + splits, mask=splits < SPLITS, other=0.0)
    highest = tl.max(maxima, axis=0)
    join = tl.exp2(maxima - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(sums * join, axis=0)
    # A split without entries wrote no partial output, so its memory is not initialised and must not be read.
    written = (maxima > float("-inf"))[:, None] & (dims < WIDTH)[None, :]
    entry = (head * SPLITS + splits)[:, None] * WIDTH + dims[None, :]
    partial = tl.load(partial_ptr + entry, mask=written, other=0.0)
    # A row that reads nothing has total 0; its output is 0, not NaN.
    out = tl.sum(partial * join[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + head * WIDTH + dims, out.to(out_ptr.dtype.element_ty), mask=dims < WIDTH)


@triton.jit
def _probabilities(
    maxima_ptr, sums_ptr, logits_ptr, logits_head, head, known, entry, valid,
    SPLITS: tl.constexpr, PADDED_SPLITS: tl.constexpr,
):  # fmt: skip
    """Return the probabilities of listed entries, summed over the given heads; 0 where not valid.

    head, known: heads, and which of them exist. entry, valid: indices into the logits, and which of them count.
    """
    splits = tl.arange(0, PADDED_SPLITS)
    of_split = head[:, None] * SPLITS + splits[None, :]
    mask = known[:, None] & (splits < SPLITS)[None, :]
    maxima = tl.load(maxima_ptr + of_split, mask=mask, other=float("-inf"))
    sums = tl.load(sums_ptr + of_split, mask=mask, other=0.0)
    highest = tl.max(maxima, axis=1)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.sum(sums * tl.exp2(maxima - highest[:, None]), axis=1)
    log_sum = highest + tl.log2(tl.where(total == 0.0, 1.0, total))
    logits = tl.load(
        logits_ptr + head[:, None] * logits_head + entry[None, :],
        mask=known[:, None] & valid[None, :],
        other=float("-inf"),
    )
    return tl.sum(tl.exp2(logits - log_sum[:, None]), axis=0)


@triton.jit(
    do_not_specialize=("logits_head", "core_width", "text_width", "core_blocks", "text_blocks"),
    do_not_specialize_on_alignment=("core_len_ptr", "text_len_ptr"),
)
def _reduce(
    partial_ptr, maxima_ptr, sums_ptr, logits_ptr, core_len_ptr, text_len_ptr, out_ptr, core_scores_ptr, text_scores_ptr,
    logits_head, core_width, text_width, core_blocks, text_blocks,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr, PADDED_GROUP: tl.constexpr,
    SPLITS: tl.constexpr, PADDED_SPLITS: tl.constexpr, HEAD_TILE: tl.constexpr, SCORE_BLOCK: tl.constexpr,
    CORE_SCORES: tl.constexpr, TEXT_SCORES: tl.constexpr,
):  # fmt: skip
    """Launch 2. Programs 0 .. HEADS - 1 of a row join outputs; the next core_blocks write core scores; then text_blocks
    programs per KV head write text scores."""
    task = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    if task < HEADS:
        _join(
            partial_ptr, maxima_ptr, sums_ptr, out_ptr, row * HEADS + task, WIDTH, PADDED_WIDTH, SPLITS, PADDED_SPLITS
        )  # fmt: skip
    if CORE_SCORES:  # noqa: SIM102 settled by the compiler, the next by each program
        if (task >= HEADS) & (task < HEADS + core_blocks):
            image = (task - HEADS) * SCORE_BLOCK + tl.arange(0, SCORE_BLOCK)
            in_core = image < tl.load(core_len_ptr + row)
            scores = tl.zeros([SCORE_BLOCK], tl.float32)
            for first in range(0, HEADS, HEAD_TILE):
                head = first + tl.arange(0, HEAD_TILE)
                scores += _probabilities(
                    maxima_ptr, sums_ptr, logits_ptr, logits_head, row * HEADS + head, head < HEADS, image, in_core,
                    SPLITS, PADDED_SPLITS,
                )  # fmt: skip
            tl.store(core_scores_ptr + row * core_width + image, scores / HEADS, mask=image < core_width)
    if TEXT_SCORES:  # noqa: SIM102
        if task >= HEADS + core_blocks:
            work = task - HEADS - core_blocks
            sequence = row * (HEADS // GROUP) + work // text_blocks
            text = (work % text_blocks) * SCORE_BLOCK + tl.arange(0, SCORE_BLOCK)
            in_text = text < tl.load(text_len_ptr + sequence)
            member = tl.arange(0, PADDED_GROUP)
            sums = _probabilities(
                maxima_ptr, sums_ptr, logits_ptr, logits_head, sequence * GROUP + member, member < GROUP,
                tl.load(core_len_ptr + row) + text, in_text, SPLITS, PADDED_SPLITS,
            )  # fmt: skip
            tl.store(text_scores_ptr + sequence * text_width + text, sums, mask=text < text_width)


# Triton's interpreter computes wrong results in bfloat16. Under it, values become float32 right after the load.
_INTERPRETED = not isinstance(_split, triton.runtime.JITFunction)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_len: Tensor,
    core: Tensor,
    core_len: Tensor,
    text: Tensor,
    text_len: Tensor,
    scale: float,
    scores: bool | str,
    out,
    workspace: Workspace,
) -> None:
    """Fill `out` (a DecodeOutput). Shapes as in decode_attention. ValueError for a workspace of other shapes."""
    # 1. The workspace must fit: the kernels write to it without a check.
    (batch, heads, width), groups = q.shape, k.shape[1]
    splits = workspace.maxima.shape[-1]
    core_width, text_width = core.shape[-1], text.shape[-1]
    if workspace.partial.shape != (batch, heads, splits, width) or workspace.logits.shape[-1] < core_width + text_width:
        raise ValueError(
            f"the workspace is for partial outputs {[*workspace.partial.shape]} and {workspace.logits.shape[-1]} listed "
            f"entries, expected are {[batch, heads, splits, width]} and {core_width + text_width}"
        )
    # 2. Constants that both kernels share.
    tuning = workspace.tuning or tuning_for(heads // groups, q.dtype)
    core_scores, text_scores = scores in (True, "core"), scores in (True, "text")
    shared = {
        "GROUP": heads // groups,
        "WIDTH": width,
        # tl.arange needs a power of two, and tl.dot at least 16.
        "PADDED_WIDTH": max(16, triton.next_power_of_2(width)),
        "SPLITS": splits,
        "CORE_SCORES": core_scores,
        "TEXT_SCORES": text_scores,
    }
    alone = splits == 1 and not scores
    core_blocks = triton.cdiv(core_width, _SCORE_BLOCK) if core_scores else 0
    text_blocks = triton.cdiv(text_width, _SCORE_BLOCK) if text_scores else 0
    scratch = (workspace.partial, workspace.maxima, workspace.sums, workspace.logits)
    logits_head = workspace.logits.stride(1)
    # 3. The launches. Triton uses the current device, which a model over several GPUs does not set to the tensors'.
    with torch.cuda.device_of(q):
        _split[(batch * groups, splits)](
            q, k, v, prefix_len, core, core_len, text, text_len, *scratch, out.out,
            scale * 1.4426950408889634,  # log2(e)
            *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], core.stride(0), *text.stride()[:2], logits_head,
            GROUPS=groups, PADDED_GROUP=16, BLOCK=tuning.block, STAGES=tuning.stages,
            UPCAST=_INTERPRETED and q.dtype == torch.bfloat16, ALONE=alone, num_warps=tuning.warps, **shared,
        )  # fmt: skip
        if alone:
            return
        _reduce[(heads + core_blocks + groups * text_blocks, batch)](
            *scratch, core_len, text_len, out.out, out.core_scores, out.text_scores,
            logits_head, core_width, text_width, core_blocks, text_blocks,
            HEADS=heads, PADDED_GROUP=triton.next_power_of_2(heads // groups), HEAD_TILE=_HEAD_TILE,
            PADDED_SPLITS=triton.next_power_of_2(splits), SCORE_BLOCK=_SCORE_BLOCK, num_warps=4, **shared,
        )  # fmt: skip

"""Compile the Triton decode kernels for GPUs that need not be there, and print what they use as JSON lines.

    python tests/decode_kernel_aot.py '{"target": 90, "dtype": "fp16", "group": 1, "width": 128, "scores": true}' ...

Without TRITON_INTERPRET in the environment: the interpreter compiles nothing. Optional keys: block, warps, stages; and ones:
true for lists of one entry, whose widths and strides a launch turns into constants, with 64-bit strides of the storage.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llava.kernels import decode_attention_triton as kernels

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_LISTS = ("prefix_len_ptr", "core_ptr", "core_len_ptr", "text_ptr", "text_len_ptr")
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_SPLITS = 16


def usage(kernel, target: int, types: dict[str, str], constants: dict, warps: int) -> dict:
    """Registers, local memory (where spills go), 16-byte global loads and shared memory of one compiled kernel.

    types: of the arguments that are no constants and no plain integers. All pointers and strides count as multiples of 16, as
    those of a real cache are.
    """
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][:1] in "*i"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": warps})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        dump = subprocess.run(
            [_BIN / "cuobjdump", "--dump-resource-usage", "--dump-sass", file],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", dump)[1]) for name in ("REG", "STACK", "LOCAL"))
    return {
        "registers": registers,
        "local_bytes": stack + local,
        "spill_instructions": len(re.findall(r"\b(?:STL|LDL)\b", dump)),
        "wide_loads": len(re.findall(r"\b(?:LDG|LDGSTS)\.E[.\w]*\.128\b", dump)),
        "shared_bytes": compiled.metadata.shared,
    }


def variant(target, dtype, group, width, scores, block=None, warps=None, stages=None, ones=False) -> dict:
    """What both kernels use at one setting."""
    tuning = kernels.tuning_for(group, _DTYPES[dtype])
    block, warps, stages = block or tuning.block, warps or tuning.warps, stages or tuning.stages
    padded = max(16, triton.next_power_of_2(width))
    shared = {"GROUP": group, "WIDTH": width, "PADDED_WIDTH": padded, "SPLITS": _SPLITS}
    shared |= {"CORE_SCORES": scores, "TEXT_SCORES": scores}
    split = {"GROUPS": 8, "PADDED_GROUP": 16, "BLOCK": block, "STAGES": stages, "UPCAST": False}
    split_types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}") | dict.fromkeys(_LISTS, "*i32")
    split_types |= dict.fromkeys(("partial_ptr", "maxima_ptr", "sums_ptr", "logits_ptr"), "*fp32") | {
        "scale_log2": "fp32"
    }
    reduce = {"HEADS": 8 * group, "PADDED_GROUP": triton.next_power_of_2(group), "PADDED_SPLITS": _SPLITS}
    reduce |= {"HEAD_TILE": kernels._HEAD_TILE, "SCORE_BLOCK": kernels._SCORE_BLOCK}
    reduce_types = {n: "*fp32" for n in kernels._reduce.arg_names if n.endswith("_ptr")}
    reduce_types |= {"out_ptr": f"*{dtype}", "core_len_ptr": "*i32", "text_len_ptr": "*i32"}
    if ones:
        split |= dict.fromkeys(("core_row", "text_row", "text_group", "logits_head"), 1)
        split_types |= dict.fromkeys(("k_row", "k_group", "k_slot", "v_row", "v_group", "v_slot"), "i64")
        reduce |= dict.fromkeys(("logits_head", "core_width", "text_width", "core_blocks", "text_blocks"), 1)
    return {
        "split": usage(kernels._split, target, split_types, shared | split, warps),
        "reduce": usage(kernels._reduce, target, reduce_types, shared | reduce, 4),
    }


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(json.dumps(variant(**json.loads(argument))), flush=True)

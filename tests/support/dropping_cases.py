"""The methods inside the LLM and their settings that the tests go through, and greedy decoding with logits."""

import torch

from llava.config import AdaVConfig
from llava.constants import IMAGE_TOKEN_INDEX

IMAGE = IMAGE_TOKEN_INDEX
LAYERS = 8
K = 6
# method and options: the default, every version of the rule, and every published setting.
CASES = [
    ("fastv", {}),
    ("fastv", {"layer": 5}),
    ("fitprune", {}),
    ("fitprune", {"ratio": 60}),
    ("sparsevlm", {}),
    ("sparsevlm", {"version": "2.0"}),
    ("sparsevlm", {"keep": [30, 20, 7]}),
    ("pyramiddrop", {}),
    ("pyramiddrop", {"keep": [0.5, 0.25, 0.125]}),
    ("dart", {}),
    ("dart", {"layer": 5}),
    ("dart", {"compat": "public"}),
]
IDS = [" ".join([name, *(f"{k}={v}" for k, v in options.items())]) for name, options in CASES]
OTHER_COUNTS = {"keep", "ratio", "compat"}  # options under which the last count is not the budget
BY_BUDGET = [(name, options) for name, options in CASES if not OTHER_COUNTS & set(options)]
STEPS = 6
GREEDY = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}


def config(method, tokens=K, **options):
    return AdaVConfig(method=method, overall_tokens=tokens, options=options)


def greedy(model, prepared, **more):
    """Tokens [B, T], logits [B, T, V] and the output of greedy decoding."""
    options = GREEDY | {"return_dict_in_generate": True, "output_logits": True} | more
    out = model.generate(prepared=prepared, **options)
    return out.sequences, torch.stack(out.logits, dim=1), out

"""The projector: it maps tower states to the width of the LLM's word embeddings."""

from __future__ import annotations

import re

from torch import nn
from transformers.activations import ACT2FN

from llava.common.errors import UserError


def build_vision_projector(config) -> nn.Module:
    """Return the projector of config.mm_projector_type, [.., mm_hidden_size] -> [.., hidden_size].

    The types are LLaVA's: "linear" and "mlpNx_gelu". UserError for any other type.
    """
    kind = getattr(config, "mm_projector_type", "linear")
    if kind == "linear":
        return nn.Linear(config.mm_hidden_size, config.hidden_size)
    match = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    if not match or int(match.group(1)) < 1:
        raise UserError(f'mm_projector_type is "{kind}", allowed are "linear" and "mlpNx_gelu" with N from 1')
    bias = getattr(config, "mm_projector_bias", True)
    # Linear layers and activations alternate, so that the weights are numbered as in LLaVA's checkpoints: 0, 2, ...
    modules: list[nn.Module] = [nn.Linear(config.mm_hidden_size, config.hidden_size, bias=bias)]
    for _ in range(1, int(match.group(1))):
        modules += [ACT2FN[config.mm_projector_act], nn.Linear(config.hidden_size, config.hidden_size, bias=bias)]
    return nn.Sequential(*modules)

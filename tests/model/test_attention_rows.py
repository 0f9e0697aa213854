"""Rows read beside SDPA equal the last rows of transformers' eager attention, in prefill and at every decode step."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from llava.analysis.last_query_rows import LastQueryRows

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 50,
    "initializer_range": 0.3,  # so that rows are far from even
}


def pair(kind: str, kv_heads: int):
    """The same weights with SDPA and with eager attention."""
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
    }[kind]
    torch.manual_seed(0)
    plain = model_class(config_class(**SIZES, num_key_value_heads=kv_heads, attn_implementation="sdpa")).eval()
    eager = model_class(config_class(**SIZES, num_key_value_heads=kv_heads, attn_implementation="eager")).eval()
    eager.load_state_dict(plain.state_dict())
    return plain, eager


@pytest.mark.parametrize("kind, kv_heads", [("llama", 4), ("llama", 2), ("mistral", 1)])
def test_rows_equal_eager_attention(kind, kv_heads):
    plain, eager = pair(kind, kv_heads)
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # the first row is padded on the left
    arguments = {
        "attention_mask": mask,
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
    }
    with LastQueryRows(plain) as rows:
        tokens = plain.generate(ids, **arguments)
    assert [call.shape for call in rows.calls] == [(3, 2, 9), (3, 2, 10), (3, 2, 11), (3, 2, 12)]
    wanted = eager.generate(ids, **arguments, output_attentions=True, return_dict_in_generate=True)
    assert torch.equal(wanted.sequences, tokens)
    for call, layers in zip(rows.calls, wanted.attentions, strict=True):
        assert torch.allclose(call.sum(dim=-1), torch.ones(3, 2), atol=1e-6)
        assert (call[:, 0, :4] == 0).all(), "nothing is paid to padding"
        for row, attention in zip(call, layers, strict=True):
            assert torch.allclose(row, attention.mean(dim=1)[:, -1], atol=1e-6)
    assert rows.calls[0].std() > 0.05


def test_nothing_is_left_on_the_model():
    plain, _ = pair("llama", 2)
    with LastQueryRows(plain) as rows:
        plain(torch.tensor([[3, 4, 5]]))
    with pytest.raises(RuntimeError, match="stop"), LastQueryRows(plain):
        raise RuntimeError("stop")
    plain(torch.tensor([[3, 4, 5]]))
    assert len(rows.calls) == 1
    assert not any(layer.self_attn._forward_hooks for layer in plain.model.layers)

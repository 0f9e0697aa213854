"""The name of the KV cache among the arguments of a layer and the fields of an output of transformers.

It is "cache" from 5.24 on, and "past_key_values" before. The old name warns from 5.24 on and is removed in 5.40."""

import inspect

from transformers.models.llama.modeling_llama import LlamaDecoderLayer

CACHE = "cache" if "cache" in inspect.signature(LlamaDecoderLayer.forward).parameters else "past_key_values"

"""What transformers calls the KV cache among the arguments of a layer and the fields of an output: "cache" from 5.24 on,
"past_key_values" before, which warns from 5.24 on and goes with 5.40."""

import inspect

from transformers.models.llama.modeling_llama import LlamaDecoderLayer

CACHE = "cache" if "cache" in inspect.signature(LlamaDecoderLayer.forward).parameters else "past_key_values"

"""LLaVA on an LLM of Llama's architecture (Vicuna, Nous-Hermes-2-Yi)."""

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel

from llava.model.decoding.layer_loop import DroppingDecoder
from llava.model.language_model.llava_config import LlavaLlamaConfig
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaLlamaModel(DroppingDecoder, LlavaMetaModel, LlamaModel):
    """The decoder, with vision tower, projector and newline embedding."""

    config_class = LlavaLlamaConfig


class LlavaLlamaForCausalLM(LlavaMetaForCausalLM, LlamaForCausalLM):
    """The decoder with its language-modelling head; LlavaMetaForCausalLM adds images and generation."""

    config_class = LlavaLlamaConfig
    # A device map must not split these: the loop calls the parts of a layer, and the tower runs as one.
    _no_split_modules = ["LlamaDecoderLayer", "CLIPVisionTower"]

    def __init__(self, config):
        super(LlamaForCausalLM, self).__init__(config)  # skips the class that would build a decoder without a tower
        self.model = LlavaLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register(LlavaLlamaConfig.model_type, LlavaLlamaConfig)
AutoModelForCausalLM.register(LlavaLlamaConfig, LlavaLlamaForCausalLM)

"""LLaVA on an LLM of Mistral's architecture."""

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, MistralForCausalLM, MistralModel

from llava.model.decoding.layer_loop import DroppingDecoder
from llava.model.language_model.llava_config import LlavaMistralConfig
from llava.model.llava_arch import LlavaMetaForCausalLM, LlavaMetaModel


class LlavaMistralModel(DroppingDecoder, LlavaMetaModel, MistralModel):
    """The decoder, with vision tower, projector and newline embedding."""

    config_class = LlavaMistralConfig


class LlavaMistralForCausalLM(LlavaMetaForCausalLM, MistralForCausalLM):
    """The decoder with its language-modelling head; LlavaMetaForCausalLM adds images and generation."""

    config_class = LlavaMistralConfig
    # A device map must not split these: the loop calls the parts of a layer, and the tower runs as one.
    _no_split_modules = ["MistralDecoderLayer", "CLIPVisionTower"]

    def __init__(self, config):
        super(MistralForCausalLM, self).__init__(config)  # skips the class that would build a decoder without a tower
        self.model = LlavaMistralModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register(LlavaMistralConfig.model_type, LlavaMistralConfig)
AutoModelForCausalLM.register(LlavaMistralConfig, LlavaMistralForCausalLM)

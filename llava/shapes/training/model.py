"""The demo model for training: transformers' CLIP tower and Llama, a two-layer projector and the newline token."""

import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from llava.shapes.tokenizer import MAX_LENGTH, vocabulary

# Of OpenAI's CLIP (preprocessor_config.json of openai/clip-vit-large-patch14-336), as in LLaVA.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def tower_config(sizes):
    """CLIPVisionConfig of the demo tower."""
    return CLIPVisionConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.tower_mlp,
        num_hidden_layers=sizes.tower_layers,
        num_attention_heads=sizes.heads,
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
        hidden_act="gelu",
        projection_dim=sizes.width,
    )


def llm_config(sizes, layers=None):
    """LlamaConfig of the demo LLM with `layers` layers. Default: the final number."""
    vocab = vocabulary()
    return LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=sizes.width,
        intermediate_size=sizes.llm_mlp,
        num_hidden_layers=layers or sizes.llm_layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=MAX_LENGTH,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=vocab["<s>"],
        eos_token_id=vocab["</s>"],
        pad_token_id=vocab["<pad>"],
    )


class DemoModel(nn.Module):
    """Tower, projector, LLM and newline token, with the names that the checkpoint writer expects."""

    def __init__(self, sizes, llm_layers=None):
        super().__init__()
        self.sizes = sizes
        self.tower = CLIPVisionModel._from_config(tower_config(sizes), attn_implementation="sdpa")
        self.projector = nn.Sequential(
            nn.Linear(sizes.width, sizes.width), nn.GELU(), nn.Linear(sizes.width, sizes.width)
        )
        self.llm = LlamaForCausalLM._from_config(llm_config(sizes, llm_layers), attn_implementation="sdpa")
        self.image_newline = nn.Parameter(torch.randn(sizes.width) * 0.05)
        self.register_buffer("mean", torch.tensor(CLIP_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(CLIP_STD).view(1, 3, 1, 1), persistent=False)
        for layer in self.tower.encoder.layers:
            # CLIP's initial weights are tuned for width 768 and many layers. At width 128, Xavier learns faster.
            for linear in (m for m in layer.modules() if isinstance(m, nn.Linear)):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)

    def replace_llm_layers(self, layers):
        """Replace the decoder layers by `layers` new ones. The word embeddings stay."""
        fresh = LlamaForCausalLM._from_config(llm_config(self.sizes, layers), attn_implementation="sdpa")
        fresh.model.embed_tokens.weight.data.copy_(self.llm.model.embed_tokens.weight.data)
        self.llm = fresh

    def grow_llm(self, layers):
        """Append decoder layers until there are `layers`.

        The outputs of new layers are zero at first, so the model still computes the same as before.
        """
        grown = LlamaForCausalLM._from_config(llm_config(self.sizes, layers), attn_implementation="sdpa")
        grown.load_state_dict(self.llm.state_dict(), strict=False)
        for layer in grown.model.layers[len(self.llm.model.layers) :]:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
        self.llm = grown

    def see(self, tiles):
        """Hidden states [T, 1 + P, W] of the layer before the last, [CLS] first, of tiles uint8 [T, 96, 96, 3]."""
        return self.see_and_gather(tiles)[0]

    def see_and_gather(self, tiles):
        """(result of `see`, attention output [T, W] of [CLS] in that layer, without the residual)."""
        # The layer is written out because its module does not return the attention output by itself.
        hidden = self._before_last_trained(tiles)
        layer = self.tower.encoder.layers[-2]
        taken, _ = layer.self_attn(layer.layer_norm1(hidden), attention_mask=None)
        hidden = hidden + taken
        return hidden + layer.mlp(layer.layer_norm2(hidden)), taken[:, 0]

    def _before_last_trained(self, tiles):
        pixels = tiles.permute(0, 3, 1, 2).float().div_(255.0).sub_(self.mean).div_(self.std)
        hidden = self.tower.pre_layrnorm(self.tower.embeddings(pixels))
        for layer in self.tower.encoder.layers[:-2]:
            hidden = layer(hidden, attention_mask=None)
        return hidden

    def cls_attention(self, tiles):
        """Saliency [T, P]: attention from [CLS] to the patches, mean over heads, in the layer before the last."""
        hidden = self._before_last_trained(tiles)
        layer = self.tower.encoder.layers[-2]
        normed, attention = layer.layer_norm1(hidden), layer.self_attn
        heads = self.sizes.heads
        query = attention.q_proj(normed[:, :1]).unflatten(-1, (heads, -1)).transpose(1, 2)
        keys = attention.k_proj(normed).unflatten(-1, (heads, -1)).transpose(1, 2)
        row = torch.softmax((query @ keys.transpose(-1, -2))[:, :, 0] * attention.scale, dim=-1)
        return row[..., 1:].mean(1)

    @property
    def embeddings(self):
        """Word embeddings [V, D]. They are also the LM head (tied)."""
        return self.llm.model.embed_tokens.weight

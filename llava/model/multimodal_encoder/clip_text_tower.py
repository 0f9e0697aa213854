"""CLIP's text tower: it measures how close the patches of an image are to the question in CLIP's joint space.

LLaVA checkpoints contain only the vision tower. `options.text_tower` names the CLIP that it came from. Of that CLIP the
text tower and the two projections into the joint space are loaded, and no vision layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from llava.common.errors import UserError, first_line
from llava.common.hub import checkpoint_folder, quiet_loading
from llava.common.transfer import to_device
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower


@dataclass
class ClipTextTower:
    """A loaded text tower. It is no nn.Module, so it does not become a part of the LLaVA and is not saved with it.

    name: the name that `load` was given; clip: CLIPModel without vision layers, in float32; tokenizer: that of CLIP
    """

    name: str
    clip: CLIPModel
    tokenizer: object

    @classmethod
    def load(cls, name: str, vision_tower: CLIPVisionTower) -> ClipTextTower:
        """Return the text tower of a CLIP; name: folder or hub name of the CLIP that `vision_tower` is a part of.

        UserError where it cannot be loaded, lacks weights or has another vision width.
        """
        folder = checkpoint_folder(name)
        try:
            config = CLIPConfig.from_pretrained(folder)
            # The patches come from the LLaVA's own tower, so CLIP's vision layers would only take memory.
            config.vision_config.num_hidden_layers = 0
            with quiet_loading():
                clip, info = CLIPModel.from_pretrained(
                    folder, config=config, dtype=torch.float32, weights_only=True, output_loading_info=True
                )
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # torch, safetensors, tokenizers and transformers each raise their own
            raise UserError(f"{folder}: the CLIP text tower cannot be loaded ({first_line(error)})") from error
        missing = sorted(info["missing_keys"])
        if missing:
            raise UserError(
                f"{folder}: {len(missing)} weights of the CLIP text tower are missing, among them {missing[0]}"
            )
        width, ours = clip.visual_projection.in_features, vision_tower.config.hidden_size
        if width != ours:
            raise UserError(f"{folder}: a CLIP of vision width {width}, allowed is that of the vision tower, {ours}")
        return cls(name, clip.eval().to(vision_tower.device), tokenizer)

    @torch.no_grad()
    def cosine(self, hidden: Tensor, question: str) -> Tensor:
        """Return the float32 cosine [T, P] of patch states [T, P, W] of the feature layer with the question.

        A long question is cut into parts, and the result is the mean over them. It is zero for an empty question.
        """
        text = self._parts(question)
        if text is None:
            return hidden.new_zeros(hidden.shape[:-1], dtype=torch.float32)
        hidden = hidden.to(self.clip.device, torch.float32)
        patches = self.clip.visual_projection(self.clip.vision_model.post_layernorm(hidden))
        return mean_cosine(patches, text)

    def _parts(self, question: str) -> Tensor | None:
        """Return the text embeddings [parts, J] of a question in CLIP's joint space of width J; None for an empty one.

        A part is as much of the question as the context of the tower holds, with its own begin and end token.
        """
        # verbose=False: the tokenizer would warn about questions beyond its context, which are cut here anyway.
        ids = self.tokenizer(question, add_special_tokens=False, verbose=False).input_ids
        room = self.clip.config.text_config.max_position_embeddings - 2
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        embeds = []
        for start in range(0, len(ids), room):
            part = to_device(torch.tensor([[begin, *ids[start : start + room], end]]), self.clip.device)
            embeds.append(self.clip.text_projection(self.clip.text_model(input_ids=part).pooler_output))
        return torch.cat(embeds) if embeds else None


def mean_cosine(patches: Tensor, text: Tensor) -> Tensor:
    """Return the cosine [...] of patches [..., J] with the text [parts, J], mean over the parts."""
    patches, text = (torch.nn.functional.normalize(x, dim=-1) for x in (patches, text))
    return (patches @ text.T).mean(dim=-1)

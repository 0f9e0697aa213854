"""CLIP's other half: how close are the patches of an image to the question in the space that CLIP was trained in?

LLaVA checkpoints hold only the vision tower. `options.text_tower` names the CLIP that it came from; of that, the text
tower and the two projections into the joint space are loaded, and none of the vision layers.
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
    """A loaded text tower. Not a module: it is no part of the LLaVA, nor saved with it.

    name  what `load` was given; clip: CLIPModel without vision layers, in float32; tokenizer: CLIP's own
    """

    name: str
    clip: CLIPModel
    tokenizer: object

    @classmethod
    def load(cls, name: str, vision_tower: CLIPVisionTower) -> ClipTextTower:
        """name: folder or hub name of a CLIP whose vision tower is `vision_tower`. UserError where it is none."""
        folder = checkpoint_folder(name)
        try:
            config = CLIPConfig.from_pretrained(folder)
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
        """[T, P, W] patch states, as the feature layer gives them -> [T, P] float32 cosine with the question.

        The mean over the parts that a long question is cut into; zero where the question is empty.
        """
        text = self._parts(question)
        if text is None:
            return hidden.new_zeros(hidden.shape[:-1], dtype=torch.float32)
        hidden = hidden.to(self.clip.device, torch.float32)
        patches = self.clip.visual_projection(self.clip.vision_model.post_layernorm(hidden))
        return mean_cosine(patches, text)

    def _parts(self, question: str) -> Tensor | None:
        """[parts, J] text embeddings; a part is as much of the question as the tower's context holds, with its own begin
        and end token."""
        ids = self.tokenizer(question, add_special_tokens=False, verbose=False).input_ids
        room = self.clip.config.text_config.max_position_embeddings - 2
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        embeds = []
        for start in range(0, len(ids), room):
            part = to_device(torch.tensor([[begin, *ids[start : start + room], end]]), self.clip.device)
            embeds.append(self.clip.text_projection(self.clip.text_model(input_ids=part).pooler_output))
        return torch.cat(embeds) if embeds else None


def mean_cosine(patches: Tensor, text: Tensor) -> Tensor:
    """[..., J] patches, [parts, J] text -> [...] cosine, mean over the parts."""
    patches, text = (torch.nn.functional.normalize(x, dim=-1) for x in (patches, text))
    return (patches @ text.T).mean(dim=-1)

"""compress() for transformers' LlavaForConditionalGeneration (1.5) and LlavaNextForConditionalGeneration (1.6).

While the block lasts, generate() and forward() of the model run our own model on its weights: tower, selection, splicing,
decoder loop and caches are those of load_pretrained_model, so what comes out is what they give. Here is what lies
between: the processor's prompts, in which an image is one id per token, and transformers' arguments and results.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import GenerationMixin, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from llava.common.errors import UserError
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.integrations.transformers.base import Compression
from llava.integrations.transformers.shared_weights import on_weights_of
from llava.mm_utils import left_pad
from llava.model.builder import configure
from llava.model.prompt_rows import labels_of, real_tokens

CLASSES = (LlavaForConditionalGeneration, LlavaNextForConditionalGeneration)
# Arguments of transformers that go past the images and the prompt, or that say how to read a tower that is ours here.
_REFUSED = (
    "inputs_embeds",
    "past_key_values",
    "cache",
    "position_ids",
    "mm_encoder_outputs",
    "vision_feature_layer",
    "vision_feature_select_strategy",
)


class LlavaCompression(Compression):
    """Of one model of CLASSES, with a Llama or Mistral LLM and a CLIP tower. See `compress`."""

    def redirections(self):
        if not isinstance(self.model, CLASSES):
            raise UserError(
                f"compress() got a {type(self.model).__name__}, allowed are "
                f"{' and '.join(one.__name__ for one in CLASSES)} themselves: not what stands around them, nor their parts"
            )
        self._twin = on_weights_of(self.model, self.config)
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        states = self.config.make_method().tower_states
        for name, needed in (
            ("text_scope", self.config.option("text_scope") == "turn"),
            ("text_tower", "text_cosine" in states),
        ):
            if needed and tokenizer is None:
                value = self.config.options[name]
                raise UserError(
                    f'options.{name} is "{value}", which needs words: pass compress(..., processor=processor)'
                )
        if self._anyres and self.config.option("anyres") == "fastervlm":
            raise UserError(
                "the tile path fastervlm (options.anyres, or options.compat) cuts images its own way, but the processor of "
                "a LlavaNext cuts them in the official one, the only one allowed here; load_pretrained_model has both"
            )
        configure(self._twin, self.config, tokenizer)
        return {"generate": self.generate, "forward": self.forward}

    @property
    def _anyres(self) -> bool:
        return isinstance(self.model, LlavaNextForConditionalGeneration)

    @torch.no_grad()
    def generate(self, *args, **kwargs):
        """As the model's own generate(): the prompt as it came, and the new tokens behind it."""
        given = _by_name(GenerationMixin.generate, self.model, args, kwargs)
        inputs, ids = given.pop("inputs", None), given.pop("input_ids", None)
        if (inputs is None) == (ids is None):
            found = "neither" if ids is None else "both"
            raise UserError(f"generate() takes inputs or input_ids, but got {found}")
        ids = inputs if ids is None else ids
        if given.pop("assistant_model", None) is not None:
            raise UserError(
                "assistant_model does not go with compress(), allowed are greedy search, sampling and beams"
            )
        self._twin.generation_config = self.model.generation_config
        prepared = self._twin.prepare(**self._prompts(ids, given))
        self.last_selection = [selection for row in prepared.selections for selection in row]
        return self._twin.generate(prepared=prepared, prompt_ids=ids.to(prepared.inputs_embeds.device), **given)

    def forward(self, *args, **kwargs):
        """As the model's own forward() on whole prompts: logits and loss of what is left of them.

        Rows are padded left to the longest of what is left; no cache is made, and none can be gone on from.
        """
        given = _by_name(type(self.model).forward, self.model, args, kwargs)
        if given.pop("use_cache", None):
            raise UserError(
                "under compress() forward() leaves no cache, but use_cache is true: generate() makes its own"
            )
        ids = given.pop("input_ids", None)
        if ids is None:
            raise UserError("under compress() forward() needs input_ids")
        return self._twin(**self._prompts(ids, given), use_cache=False, **given)

    def _prompts(self, ids: Tensor, given: dict) -> dict:
        """What our model takes for input_ids [B, S] and what came with them, which is taken out of `given`."""
        if ids.dim() != 2:
            raise UserError(f"input_ids have shape {list(ids.shape)}, allowed is [rows, tokens]")
        for name in _REFUSED:
            if given.pop(name, None) is not None:
                raise UserError(
                    f"{name} does not go with compress(), allowed are input_ids, pixel_values and image_sizes"
                )
        pixels, sizes, mask, labels = (
            given.pop(name, None) for name in ("pixel_values", "image_sizes", "attention_mask", "labels")
        )
        if not self._anyres:
            sizes = None  # every image is one tile
        elif sizes is not None:
            sizes = [(int(width), int(height)) for height, width in sizes]  # the other way round in transformers
        image_id = self.model.config.image_token_id
        rows = real_tokens(ids, mask, self._twin.config)
        kept = _one_per_image([row for row, _ in rows], image_id, self._twin.slots(pixels, sizes, self.config))
        folded = [
            row.masked_fill(row == image_id, IMAGE_TOKEN_INDEX)[keep] for (row, _), keep in zip(rows, kept, strict=True)
        ]
        folded, mask = left_pad(folded, 0)
        prompts = {"input_ids": folded, "attention_mask": mask, "images": pixels, "image_sizes": sizes}
        if labels is not None:
            labels = [own[keep] for own, keep in zip(labels_of(labels, rows), kept, strict=True)]
            prompts["labels"] = left_pad(labels, IGNORE_INDEX)[0]
        return prompts


def _by_name(method, model, args: tuple, kwargs: dict) -> dict:
    """Arguments of a call of `method`, by name."""
    given = dict(inspect.signature(method).bind(model, *args, **kwargs).arguments)
    del given["self"]
    return given | given.pop("kwargs", {})


def _one_per_image(rows: list[Tensor], image_id: int, counts: list[int]) -> list[Tensor]:
    """Per row [S] of ids: the mask [S] that leaves one id per image, the first of those that stand for it.

    counts: of every image, in reading order over the rows, how many there have to be. UserError where they are not there.
    """
    masks, image = [], 0
    for b, row in enumerate(rows):
        places = (row == image_id).nonzero().flatten().tolist()
        keep = row != image_id
        at = 0
        while at < len(places):
            run = next((n for n in range(1, len(places) - at) if places[at + n] != places[at] + n), len(places) - at)
            if image == len(counts):
                raise UserError(f"{len(counts)} images came with prompts that have placeholders for more, in row {b}")
            if run < counts[image]:
                raise UserError(
                    f"row {b}: image {image} has {counts[image]} tokens, but its placeholder (id {image_id}) is repeated "
                    f"{run} times; allowed is what the model's own processor makes of prompt and images"
                )
            keep[places[at]] = True
            at, image = at + counts[image], image + 1
        masks.append(keep)
    if image != len(counts):
        raise UserError(f"{len(counts)} images came with prompts that have placeholders for {image}")
    return masks

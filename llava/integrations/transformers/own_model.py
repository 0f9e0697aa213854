"""compress() for transformers' LlavaForConditionalGeneration (1.5) and LlavaNextForConditionalGeneration (1.6).

Inside the block, generate() and forward() of the model run our own model on its weights. Tower, selection, splicing,
decoder loop and caches are those of load_pretrained_model, so the results are the same. This file translates between
the two: prompts of transformers' processor have one placeholder per vision token, ours have one per image. Arguments
and results have the names and shapes of transformers.
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
# Arguments that bypass the prompt or the images, or that configure the tower. Our tower takes them from the checkpoint.
_REFUSED = (
    "inputs_embeds",
    "past_key_values",
    "cache",
    "position_ids",
    "mm_encoder_outputs",
    "vision_feature_layer",
    "vision_feature_select_strategy",
)


class OwnModel(Compression):
    """Compression of a model of CLASSES that has a Llama or Mistral LLM and a CLIP tower. See `compress`."""

    def redirections(self):
        """generate() and forward() of our model on the weights of `model`. UserError for what cannot be used."""
        if not isinstance(self.model, CLASSES):
            raise UserError(
                f"compress() got a {type(self.model).__name__}, allowed are "
                f"{' and '.join(one.__name__ for one in CLASSES)} themselves: not what stands around them, nor their parts"
            )
        self._twin = on_weights_of(self.model, self.config)
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        method = self.config.make_method()
        states = method.tower_states
        if method.words is not None and tokenizer is None:
            raise UserError(
                f'method "{self.config.method}" reads the words of a question: pass compress(..., processor=processor)'
            )
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
        """True for LLaVA-1.6, which cuts an image into tiles."""
        return isinstance(self.model, LlavaNextForConditionalGeneration)

    @torch.no_grad()
    def generate(self, *args, **kwargs):
        """Token ids as the model's own generate() returns them: the prompt as it was given, then the new tokens."""
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
        # Read at each call: a user may change the model's generation_config inside the block.
        self._twin.generation_config = self.model.generation_config
        prepared = self._twin.prepare(**self._prompts(ids, given))
        self.last_selection = [selection for row in prepared.selections for selection in row]
        return self._twin.generate(prepared=prepared, prompt_ids=ids.to(prepared.inputs_embeds.device), **given)

    # torch.compile(model) would compile this, and it is Python work on the host.
    @torch.compiler.disable
    def forward(self, *args, **kwargs):
        """Output of the model's own forward() for whole prompts: logits and loss of the tokens that stay.

        Rows are padded left to the longest shortened row. No cache is made, and an earlier cache cannot be continued.
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
        """Arguments of our model for input_ids [B, S] and the arguments that came with them.

        The arguments that are used here are removed from `given`.
        """
        # 1. Check the arguments, and take images, mask and labels out of them.
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
            sizes = None
        elif sizes is not None:
            sizes = [(int(width), int(height)) for height, width in sizes]  # transformers has (height, width)
        # 2. Find the placeholders of each image, and keep one of them.
        image_id = self.model.config.image_token_id
        rows = real_tokens(ids, mask, self._twin.config)
        kept = _one_per_image([row for row, _ in rows], image_id, self._twin.slots(pixels, sizes, self.config))
        folded = [
            row.masked_fill(row == image_id, IMAGE_TOKEN_INDEX)[keep] for (row, _), keep in zip(rows, kept, strict=True)
        ]
        # 3. Pad the shorter rows again. The mask marks padding, so any id will do.
        folded, mask = left_pad(folded, 0)
        prompts = {"input_ids": folded, "attention_mask": mask, "images": pixels, "image_sizes": sizes}
        if labels is not None:
            labels = [own[keep] for own, keep in zip(labels_of(labels, rows), kept, strict=True)]
            prompts["labels"] = left_pad(labels, IGNORE_INDEX)[0]
        return prompts


def _by_name(method, model, args: tuple, kwargs: dict) -> dict:
    """Arguments of a call of `method`, by name. Positional ones are matched with the signature."""
    given = dict(inspect.signature(method).bind(model, *args, **kwargs).arguments)
    del given["self"]
    return given | given.pop("kwargs", {})


def _one_per_image(rows: list[Tensor], image_id: int, counts: list[int]) -> list[Tensor]:
    """Per row of ids [S]: the bool mask [S] that keeps the first placeholder of each image and all text.

    counts: vision tokens of each image, in reading order over the rows; the processor repeats the placeholder as often.
    Raises UserError if an image has fewer placeholders, or if placeholders and images do not match.
    """
    masks, image = [], 0
    for b, row in enumerate(rows):
        places = (row == image_id).nonzero().flatten().tolist()
        keep = row != image_id
        at = 0
        while at < len(places):
            # Length of the run of adjacent placeholders. Two images without text between them form one run, so only
            # as many as this image needs are taken from it.
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

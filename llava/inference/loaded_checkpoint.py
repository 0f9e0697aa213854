"""LoadedCheckpoint: a checkpoint that answers questions. Evaluation, serving, overlay, lmms-eval and analyses load with it.

loaded = LoadedCheckpoint("playground/llava-shapes-v1.6", config=config)
prepared = loaded.prepare(["What color is the circle?"], [image], config)
answer = loaded.engine.generate(prepared, Sampling(16)).answers[0].text
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import default_conv_mode, single_turn
from llava.costs.model_shape import ModelShape
from llava.mm_utils import left_pad, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.decoding.engine import Engine
from llava.model.decoding.prepared import PreparedPrompt, StageClock
from llava.model.encoded_images import EncodedImage


@dataclass(frozen=True)
class Pixels:
    """An image as the vision tower takes it: pixels [3, H, W] or [T, 3, H, W], and (width, height) of the original."""

    pixels: Tensor
    size: tuple[int, int]

    def pin_memory(self) -> Pixels:
        """The same in pinned memory; DataLoader calls it where it is told to pin."""
        return Pixels(self.pixels.pin_memory(), self.size)


class LoadedCheckpoint:
    """Tokenizer, model, image processor and engine of one checkpoint.

    path, model_base: folder or hub name, and the LLM under a LoRA or projector-only checkpoint. config: the model's own.
    device: "cpu", "cuda", or "auto", which is the GPU where there is one; device_map: as transformers takes it, in place of
    device. dtype: a name, or "auto". purpose: what the checkpoint is needed for, in the error message.

    shape: sizes that costs are counted from. conversation: the template of the checkpoint. context: positions of the LLM.
    Raises UserError where the checkpoint has no tokenizer or image processor, and for "cuda" without a GPU.
    """

    def __init__(
        self,
        path,
        model_base=None,
        config: AdaVConfig | None = None,
        *,
        device: str = "auto",
        device_map=None,
        dtype="auto",
        purpose: str = "an evaluation",
    ):
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "a GPU was asked for, but this torch sees no CUDA device; allowed are cpu and auto (CUDA_VISIBLE_DEVICES= "
                "runs an evaluation on the CPU)"
            )
        self.tokenizer, self.model, self.image_processor, self.context = load_pretrained_model(
            path,
            model_base,
            config=config,
            device_map=device_map or ("cpu" if device == "cpu" else "auto"),
            torch_dtype=dtype,
        )
        for part, found in (("tokenizer", self.tokenizer), ("image processor", self.image_processor)):
            if found is None:
                raise UserError(f"{path}: has no {part}, which {purpose} needs")
        self.device = self.model.get_input_embeddings().weight.device
        self.engine = Engine(self.model, self.tokenizer)
        self.shape = ModelShape.of(self.model.config)
        self.conversation = default_conv_mode(self.model.config, self.tokenizer)

    def pixels(self, image: Image.Image, config: AdaVConfig) -> Pixels:
        """An image cut into tiles, as the checkpoint and the configuration want it."""
        (tiles,) = process_images([image], self.image_processor, self.model.config, config.option("anyres"))
        return Pixels(tiles, image.size)

    def token_ids(self, prompt: str, has_image: bool, conversation: str | None = None) -> Tensor:
        """[S] ids of a conversation of one turn; the image's placeholder comes first."""
        placeholder = DEFAULT_IMAGE_TOKEN + "\n" if has_image else ""
        text = single_turn(conversation or self.conversation, placeholder + prompt)
        return tokenizer_image_token(text, self.tokenizer, return_tensors="pt")

    @torch.inference_mode()
    def encode(
        self, images: Sequence[Pixels], config: AdaVConfig, clock: StageClock | None = None
    ) -> list[EncodedImage]:
        """Pixels through the vision tower and, where need be, the projector. No question changes the result."""
        if not images:
            return []
        return self.model.encode([image.pixels for image in images], [image.size for image in images], config, clock)

    @torch.inference_mode()
    def splice(
        self,
        prompts: Sequence[str],
        images: Sequence[EncodedImage | None],
        config: AdaVConfig,
        conversation: str | None = None,
    ) -> PreparedPrompt:
        """A batch of questions. images: one for each prompt, None where it has none."""
        rows = [
            self.token_ids(prompt, image is not None, conversation)
            for prompt, image in zip(prompts, images, strict=True)
        ]
        return self.prepare_ids(rows, [image for image in images if image is not None], config)

    @torch.inference_mode()
    def prepare_ids(self, rows: Sequence[Tensor], images: list[EncodedImage], config: AdaVConfig) -> PreparedPrompt:
        """A batch of token ids [S] with placeholders; images: flat, in reading order."""
        ids, mask = left_pad(list(rows), self.engine.pad)
        return self.model.prepare(ids, attention_mask=mask, config=config, encoded=images)

    def prepare(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image | None],
        config: AdaVConfig,
        conversation: str | None = None,
    ) -> PreparedPrompt:
        """A batch of questions about images that are decoded already: encode, then splice."""
        encoded = iter(self.encode([self.pixels(image, config) for image in images if image is not None], config))
        return self.splice(
            prompts, [None if image is None else next(encoded) for image in images], config, conversation
        )

"""LoadedCheckpoint: a loaded checkpoint that answers questions.

Evaluation, serving, overlay, lmms-eval and the analyses all load a checkpoint with it.

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
from llava.common.threads import threads_for
from llava.config import AdaVConfig
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import default_conv_mode, single_turn
from llava.costs.model_shape import ModelShape
from llava.mm_utils import left_pad, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.decoding.engine import Engine
from llava.model.decoding.prepared import PreparedPrompt, StageClock
from llava.model.encoded_images import EncodedImage


@dataclass(frozen=True)
class Pixels:
    """One image as input of the vision tower.

    pixels: [3, H, W] for one tile, [T, 3, H, W] for several. size: (width, height) of the original image in pixels.
    """

    pixels: Tensor
    size: tuple[int, int]

    def pin_memory(self) -> Pixels:
        """Return a copy in pinned memory."""
        # DataLoader pins tensors and containers by itself. For any other object it calls this method.
        return Pixels(self.pixels.pin_memory(), self.size)


def question_ids(
    tokenizer, conversation: str, prompt: str, images: int, image_id: int = IMAGE_TOKEN_INDEX
) -> list[int]:
    """Return the token ids of a conversation of one turn under the template `conversation`.

    images: number of images, which come first; image_id stands for each of them.
    """
    # Placeholder and line break before the question: the order that LLaVA's checkpoints were trained with.
    placeholders = (DEFAULT_IMAGE_TOKEN + "\n") * images
    return tokenizer_image_token(single_turn(conversation, placeholders + prompt), tokenizer, image_id)


class LoadedCheckpoint:
    """Tokenizer, model, image processor and engine of one checkpoint.

    path: folder or hub name. model_base: the LLM under a LoRA or projector-only checkpoint, or None.
    config: the configuration that the model is loaded with.
    device: "cpu", "cuda", or "auto" (the GPU if there is one). device_map: passed to transformers; replaces device.
    dtype: name of a dtype, or "auto". threads: CPU threads of this process; None: see llava.common.threads. purpose: words for the error message: what the checkpoint is needed for.

    Attributes: shape has the sizes that costs are counted from; conversation is the name of the checkpoint's
    conversation template; context is the LLM's number of positions.
    Raises UserError if the checkpoint has no tokenizer or no image processor, and for "cuda" without a GPU.
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
        threads: int | None = None,
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
            # The loader returns None for a missing part, because some callers (training) can do without it.
            if found is None:
                raise UserError(f"{path}: has no {part}, which {purpose} needs")
        # With a device_map, layers may be on several devices. Prompts go to the device of the word embeddings.
        self.device = self.model.get_input_embeddings().weight.device
        on_cpu = self.device.type == "cpu"
        threads = threads_for(sum(part.numel() for part in self.model.parameters()) if on_cpu else None, threads)
        if threads is not None:
            torch.set_num_threads(threads)
        self.engine = Engine(self.model, self.tokenizer)
        self.shape = ModelShape.from_config(self.model.config)
        self.conversation = default_conv_mode(self.model.config, self.tokenizer)

    def pixels(self, image: Image.Image, config: AdaVConfig) -> Pixels:
        """Cut an image into tiles, by the rule of the checkpoint and the option `anyres` of the configuration."""
        (tiles,) = process_images([image], self.image_processor, self.model.config, config.option("anyres"))
        return Pixels(tiles, image.size)

    def token_ids(self, prompt: str, images: int, conversation: str | None = None) -> Tensor:
        """Return the token ids [S] of a conversation of one turn.

        images: number of images; their placeholders come first. conversation: name of a template; None takes the
        checkpoint's.
        """
        return torch.tensor(question_ids(self.tokenizer, conversation or self.conversation, prompt, images))

    @torch.inference_mode()
    def encode(
        self, images: Sequence[Pixels], config: AdaVConfig, clock: StageClock | None = None
    ) -> list[EncodedImage]:
        """Encode images with the vision tower and, unless the method defers it, the projector.

        The result does not depend on a question, so questions about one image can share it.
        """
        if not images:
            return []
        return self.model.encode([image.pixels for image in images], [image.size for image in images], config, clock)

    @torch.inference_mode()
    def splice(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[EncodedImage]],
        config: AdaVConfig,
        conversation: str | None = None,
    ) -> PreparedPrompt:
        """Prepare a batch of questions about encoded images.

        images: one entry per prompt, with the images of the prompt; empty for a prompt without image.
        """
        rows = [
            self.token_ids(prompt, len(several), conversation) for prompt, several in zip(prompts, images, strict=True)
        ]
        return self.prepare_ids(rows, [image for several in images for image in several], config)

    @torch.inference_mode()
    def prepare_ids(self, rows: Sequence[Tensor], images: list[EncodedImage], config: AdaVConfig) -> PreparedPrompt:
        """Prepare a batch of token ids.

        rows: ids [S] of each row, with placeholders. images: flat over the batch, in reading order.
        """
        # The mask goes along, because ids alone do not tell padding: a pad id may also be a real token of the prompt.
        ids, mask = left_pad(list(rows), self.engine.pad)
        return self.model.prepare(ids, attention_mask=mask, config=config, encoded=images)

    def prepare(
        self,
        prompts: Sequence[str],
        images: Sequence[Image.Image | None],
        config: AdaVConfig,
        conversation: str | None = None,
    ) -> PreparedPrompt:
        """Prepare a batch of questions about decoded images: encode, then splice.

        images: one entry per prompt; None for a prompt without image.
        """
        encoded = iter(self.encode([self.pixels(image, config) for image in images if image is not None], config))
        return self.splice(
            prompts, [[] if image is None else [next(encoded)] for image in images], config, conversation
        )

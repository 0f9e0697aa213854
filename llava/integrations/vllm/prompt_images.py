"""The images of one prompt before the tower: their tiles and pixels, their number of tokens, and their questions."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import default_conv_mode, turn_markers
from llava.integrations.transformers.families.base import Family, grid_layout
from llava.integrations.transformers.families.base import Layout as GridLayout
from llava.integrations.vllm.image_request import ImageRequest
from llava.methods.before_llm import Selector
from llava.mm_utils import TilePlan, process_images, tile_plan
from llava.model.checkpoint import Checkpoint
from llava.model.encoded_images import RecentImages
from llava.model.image_tokens import Layout, layout_of, made_smaller, sample_key, tokens_kept
from llava.model.processors import adopt_padding, image_processor_of
from llava.model.prompt_rows import image_places, question_of, word_ids, words_read

PIXEL_BYTES = 128 << 20  # 39 images of five tiles of 336 pixels in half precision


class Tiling:
    """How a checkpoint cuts images into tiles.

    hf_config: the checkpoint's configuration in transformers' form. name: the checkpoint's name, for messages. UserError
    for an architecture that our code does not know, such as another tower than CLIP.
    """

    def __init__(self, hf_config, name: str):
        self.config = Checkpoint(Path(name), None, hf_config.to_dict(), "full", hf=True).model_config()
        # Reading a configuration of transformers takes milliseconds, so its values are kept.
        self.vision = self.config.vision
        self.side = self.vision.image_size // self.vision.patch_size
        self.plan = lru_cache(maxsize=64)(self._plan)

    def _plan(self, size: tuple[int, int], anyres: str) -> TilePlan:
        """Return the tiles of an image of `size` (width, height)."""
        return tile_plan(size, self.config, anyres)

    def layout(self, size: tuple[int, int], anyres: str) -> Layout:
        """Return the places of the tokens of an image of `size` (width, height)."""
        plan = self.plan(size, anyres)
        return layout_of(plan, self.side, plan.tiles)


class PromptImages(ABC):
    """Turns the images of a prompt into ImageRequests, for one checkpoint.

    image_id: the placeholder of an image in a prompt. marks: further ids that stand around images, and are no part of a
    question. conversation: name of the template whose markers separate the turns. tokenizer: of the checkpoint.
    """

    def __init__(self, image_id: int, marks: Sequence[int], conversation: str, tokenizer):
        self.image_id = image_id
        self._marks = torch.tensor(marks, dtype=torch.long)
        self._markers = turn_markers(conversation, tokenizer)
        self._to_text = partial(tokenizer.decode, skip_special_tokens=True)
        self._to_ids = partial(word_ids, tokenizer)

    @abstractmethod
    def places(self, size: tuple[int, int], settings: AdaVConfig) -> Layout | GridLayout:
        """Return the places of the vision tokens of an image. size: as in ImageRequest."""

    def anyres(self, settings: AdaVConfig) -> str | None:
        """Return ImageRequest.anyres."""
        return None

    def whole(self, ids: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Return the ids that ImageTokens.key is made of. ids [S]: one placeholder per image."""
        return ids

    def requests(
        self, prompt: Sequence[int], sizes: Sequence[tuple[int, int]], hashes: Sequence[str], settings: AdaVConfig
    ) -> list[ImageRequest]:
        """Return the ImageRequest of each image of a prompt.

        prompt: token ids with one image id per image. sizes: (width, height) of each image; hashes: of each image.
        UserError where images and image ids do not match, and for a budget that the method cannot have.
        """
        ids = torch.tensor(prompt, dtype=torch.long)
        ids = ids.masked_fill(ids == self.image_id, IMAGE_TOKEN_INDEX)
        places = image_places(ids)
        if len(places) != len(sizes):
            raise UserError(f"the prompt has {len(places)} image placeholders, but {len(sizes)} images came with it")
        method = settings.make_method()
        requests = []
        for nth, (place, size, image) in enumerate(zip(places, sizes, hashes, strict=True)):
            question = self._question(method, ids, place, settings.option("text_scope"))
            requests.append(
                ImageRequest(
                    image=image,
                    size=size,
                    method=settings.method,
                    budget=settings.overall_tokens if method.uses_budget or method.resizes else 1,
                    options=settings.method_options,
                    anyres=self.anyres(settings),
                    question=None if question is None else tuple(question),
                    words=self._to_text(question) if "text_cosine" in method.tower_states else None,
                    key=sample_key(self.whole(ids, sizes), size, nth) if method.reads_key else None,
                    saliency=settings.option("saliency"),
                )
            )
        return requests

    def _question(self, method: Selector, ids: Tensor, place: int, scope: str) -> list[int] | None:
        """Return the token ids that a method reads for the image at ids[place]; None for a method that reads none."""
        if not method.reads_text:
            return None
        if method.words is not None:
            return words_read(method.words, ids, place, self._markers, self._to_text, self._to_ids)
        asked = question_of(ids, place, scope, self._markers) & ~torch.isin(ids, self._marks)
        return ids[asked].tolist()

    def tokens(self, size: tuple[int, int], settings: AdaVConfig) -> int:
        """Return how many tokens the LLM reads of an image. size: as in ImageRequest."""
        return tokens_kept(settings.make_method(), self.places(size, settings), settings.overall_tokens)


class TiledImages(PromptImages):
    """Images that are cut into tiles of one size, as LLaVA does. It makes their pixels, too.

    hf_config: the checkpoint's configuration in transformers' form. image_processor: settings of its image processor.
    tokenizer: its tokenizer. name: the checkpoint's name, for messages. UserError for an architecture that this code
    does not know.
    """

    def __init__(self, hf_config, image_processor: dict, tokenizer, name: str):
        self._tiling = Tiling(hf_config, name)
        # transformers' default processors give other last digits where torchvision is installed, so these are PIL's.
        self._processor = image_processor_of(image_processor, name)
        config = self._tiling.config
        adopt_padding(config, self._processor)
        super().__init__(hf_config.image_token_index, (), default_conv_mode(config, tokenizer), tokenizer)
        self._recent, self._lock = RecentImages(PIXEL_BYTES), threading.Lock()  # vLLM has several threads here

    def places(self, size: tuple[int, int], settings: AdaVConfig) -> Layout:
        return self._tiling.layout(size, settings.option("anyres"))

    def anyres(self, settings: AdaVConfig) -> str:
        return settings.option("anyres")

    def pixels(self, image: Image.Image, request: ImageRequest, dtype: torch.dtype) -> Tensor:
        """Return the pixels [T, 3, H, W] of an image, for the tower. They may be smaller than the tower's tiles."""
        # vLLM's own cache has them once per question where the method reads questions.
        key = request.tiles_key
        with self._lock:
            pixels = self._recent.get(key)
        if pixels is None:
            (pixels,) = process_images([image], self._processor, self._tiling.config, request.anyres)
            pixels = pixels if pixels.dim() == 4 else pixels[None]
            if request.selector.resizes:
                plan, tiling = self._tiling.plan(request.size, request.anyres), self._tiling
                sizes = len(pixels), tiling.side, tiling.vision.patch_size
                smaller = made_smaller(pixels[:1], plan, *sizes, request.budget)
                pixels = pixels if smaller is None else smaller
            pixels = pixels.to(dtype)
            with self._lock:
                self._recent.put(key, pixels)
        return pixels


class GridImages(PromptImages):
    """Images that are one grid of tokens each, as in Qwen-VL. ImageRequest.size counts tokens.

    hf_config: the checkpoint's configuration in transformers' form. tokenizer: its tokenizer.
    """

    def __init__(self, hf_config, tokenizer):
        marks = [hf_config.video_token_id, hf_config.vision_start_token_id, hf_config.vision_end_token_id]
        super().__init__(hf_config.image_token_id, marks, Family.conversation, tokenizer)

    def places(self, size: tuple[int, int], settings: AdaVConfig) -> GridLayout:
        width, height = size
        return grid_layout(height, width)

    def whole(self, ids: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
        # As compress() for models of transformers has it: one placeholder per token.
        counts = torch.ones_like(ids)
        counts[image_places(ids)] = torch.tensor([width * height for width, height in sizes])
        return ids.masked_fill(ids == IMAGE_TOKEN_INDEX, self.image_id).repeat_interleave(counts)

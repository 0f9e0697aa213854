"""Family: what `compress` has to know about one family of models. Everything else is in compression.py and prompts.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Layout:
    """The places of the N vision tokens of one image, on the host, in the order of its placeholders.

    size              (width, height) of the image in any unit; it tells images apart for method `random`
    tile, row, column int64 [N], as in ImageTokens: tile -1 is a newline token
    """

    size: tuple[int, int]
    tile: Tensor
    row: Tensor
    column: Tensor

    def __len__(self) -> int:
        return len(self.tile)


@dataclass
class VisionTokens:
    """What the vision tower gives for I images. Lists have one entry per image, in reading order.

    features  [N, D] each: the embeddings that the LLM reads
    saliency  [N] float32 each: the attention that a token's patches receive, NaN for newline tokens
    beside    per image, other states with one row per vision token, [N, D'] each: DeepStack features of Qwen3-VL
    """

    features: list[Tensor]
    saliency: list[Tensor]
    beside: list[list[Tensor]] = field(default_factory=list)


class Family(ABC):
    """Base class of a family. It reads `model` and never changes it, except for `count_dropped` and `restore`.

    The processor repeats the placeholder of an image once per vision token, and generate() takes 1-D or M-RoPE
    positions from the model itself. A family for which both holds needs only what follows.

    name            in messages
    model_classes   classes of transformers that are compressed
    image_inputs    arguments of generate() and forward() that come with every image; the first has the pixels
    optional_inputs arguments about images that may be missing
    videos          arguments that hold videos, which are refused
    inside_llm      methods inside the LLM that work; they need layers that all attend to the tokens that are left
    adaptive_caches whether adaptive KV caches work; they count positions of one dimension
    conversation    name of the template in llava/conversation.py whose markers separate the turns of a prompt
    """

    name: str
    model_classes: tuple[type, ...]
    image_inputs: tuple[str, ...]
    optional_inputs: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    inside_llm: tuple[str, ...] = ("fastv", "pyramiddrop", "fitprune", "sparsevlm", "dart")
    adaptive_caches: bool = False
    conversation = "chatml_direct"

    def __init__(self, model):
        self.model = model

    @property
    def image_token(self) -> int:
        """Id of the placeholder."""
        return self.model.config.image_token_id

    @property
    def marks(self) -> list[int]:
        """Ids that stand around or for images and videos, and are no part of a question."""
        return [self.image_token]

    @abstractmethod
    def layouts(self, ids: Tensor, given: dict) -> list[Layout]:
        """The Layout of every image of a request, without running the vision tower.

        ids [B, S]; given: `image_inputs` and `optional_inputs`, as the processor returns them; None where they are missing
        UserError for arguments that do not belong together.
        """

    @abstractmethod
    def encode(self, given: dict, layouts: list[Layout]) -> VisionTokens:
        """Run the vision tower. The modules of the model are called as they are, so that their hooks run."""

    def llm_arguments(self, is_image: Tensor, beside: list[Tensor]) -> dict:
        """Further arguments of the LLM in prefill.

        is_image [B, L]: vision tokens of the shortened prompts; beside: VisionTokens.beside, [B, L, D'] each
        """
        return {}

    # Only a model that keeps something about the positions of its last prompt has to implement these three.

    def count_dropped(self, dropped: Tensor) -> None:  # noqa: B027
        """Adjust what the model itself keeps about positions. dropped [B, 1]: tokens that each prompt lost."""

    def state(self):  # noqa: B027
        """What `count_dropped` changes, to be given to `restore`."""

    def restore(self, state) -> None:  # noqa: B027
        """Undo `count_dropped`."""


def grid_layout(height: int, width: int) -> Layout:
    """The layout of an image that is one tile of height x width tokens in raster order."""
    number = torch.arange(height * width)
    return Layout((width, height), torch.zeros_like(number), number // width, number % width)


def runs(ids: Tensor, token: int) -> list[int]:
    """Lengths of the unbroken runs of `token` in ids [B, S], in reading order."""
    is_token = torch.nn.functional.pad(ids == token, (1, 1))
    starts = torch.nonzero(is_token[:, 1:-1] & ~is_token[:, :-2])
    ends = torch.nonzero(is_token[:, 1:-1] & ~is_token[:, 2:])
    return (ends[:, 1] - starts[:, 1] + 1).tolist()

"""random: K patches drawn at random. A method has to beat this baseline; report several seeds."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.common.transfer import to_device
from llava.methods.before_llm.base import ImageTokens, Selection, Selector, take


@dataclass
class Random(Selector):
    """K distinct patches, drawn uniformly over all tiles; the generator is seeded with (seed, ImageTokens.key).

    The draw depends on the sample, not on the other rows of its batch. It is made on the CPU, so all devices draw the
    same patches.

    seed  a whole number of at least 0
    """

    reads_features = False
    reads_text = False
    reads_key = True

    seed: int = 0

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        digest = hashlib.sha256(f"{self.seed}/{image.key}".encode()).digest()
        # >> 1 keeps the seed below 2**63, so it is a positive signed 64-bit integer.
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        drawn = torch.randperm(len(image.on_host.patches), generator=generator)[:budget]
        return take(image, to_device(image.on_host.patches[drawn], image.features.device))

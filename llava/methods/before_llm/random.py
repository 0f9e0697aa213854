"""random: K patches drawn blindly. The baseline that a method has to beat; report several seeds."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from llava.common.transfer import to_device
from llava.methods.before_llm.base import ImageTokens, Selection, Selector, take


@dataclass
class Random(Selector):
    """K distinct patches, uniformly over all tiles, drawn from (seed, ImageTokens.key).

    The draw depends on the sample and not on its neighbours in a batch, and is made on the CPU, so that every device
    draws alike.

    seed  a whole number of at least 0
    """

    reads_features = False

    seed: int = 0

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        digest = hashlib.sha256(f"{self.seed}/{image.key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        drawn = torch.randperm(len(image.on_host.patches), generator=generator)[:budget]
        return take(image, to_device(image.on_host.patches[drawn], image.features.device))

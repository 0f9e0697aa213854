"""What an adaptive KV cache holds of an image at each decode step: which of its tokens are core, secondary, minor.

classes = trace(model, prepared, steps=8)      # [1 + steps] arrays [layers, K], llava.overlay.views names the classes
"""

from __future__ import annotations

import numpy as np
import torch

from llava.model.decoding.adaptive_cache import AdaptiveCache
from llava.model.decoding.engine import Engine
from llava.model.decoding.prepared import PreparedPrompt
from llava.model.decoding.sampling import Sampling
from llava.overlay.views import ABSENT, CORE, MINOR, SECONDARY


def traceable(prepared: PreparedPrompt) -> bool:
    """Whether the request's policy evicts or leaves out image tokens as such: A-VL with its vision part switched on.

    H2O ranks the whole sequence per KV head, and a full cache has no classes.
    """
    return getattr(prepared.caching.policy, "rate", None) is not None


@torch.inference_mode()
def trace(model, prepared: PreparedPrompt, steps: int) -> list[np.ndarray]:
    """Greedy decoding of a batch of one prompt with one image, for `steps` steps, past the end of its answer if need be.

    Returns [1 + steps] uint8 arrays [layers, K]: of each of the K tokens that entered the LLM its class after prefill and
    after each step. What stands there is what the next step reads: CORE is read, SECONDARY is stored and waits for the
    next re-ranking, MINOR is evicted, ABSENT was dropped inside the LLM before that layer.
    """
    engine = Engine(model, graphs=False)
    engine.ends = set()
    generation = engine.stream(prepared, Sampling(steps + 1))
    return [image_classes(generation.cache, prepared) for _ in generation]


def image_classes(cache: AdaptiveCache, prepared: PreparedPrompt) -> np.ndarray:
    """uint8 [layers, K]: the classes as they are now, of the one image of the first row."""
    ((_, tokens),) = prepared.image_spans[0]
    classes = np.full((len(cache.layers), tokens), ABSENT, dtype=np.uint8)
    for number, layer in enumerate(cache.layers):
        seen = _seen(prepared, number, tokens)
        stayed = layer.stayed[0].cpu().numpy()
        plan = layer.plans[0]
        core = np.arange(len(stayed))  # no core: all that is stored is read
        if plan.policy.interval > 0:
            core = layer.core[0, : plan.core].cpu().numpy() - plan.front
        held = np.full(len(seen), MINOR, dtype=np.uint8)
        held[stayed] = SECONDARY
        held[stayed[core]] = CORE
        classes[number, seen[seen >= 0]] = held[seen >= 0]
    return classes


def _seen(prepared: PreparedPrompt, layer: int, tokens: int) -> np.ndarray:
    """Which of the image's tokens the layer's attention saw; -1 for one that was made of dropped ones."""
    dropping = prepared.dropping
    stage = dropping.stage_of[layer] if dropping is not None else 0
    return np.arange(tokens) if stage == 0 else dropping.survivors(0, 0)[stage - 1].cpu().numpy()

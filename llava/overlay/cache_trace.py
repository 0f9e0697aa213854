"""Records the class of each vision token in an adaptive KV cache, at each decode step: core, secondary or minor.

classes = trace(model, prepared, steps=8)      # [1 + steps] arrays [L, K]; llava.overlay.views names the classes
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
    """True if the cache policy of a request gives classes to vision tokens: A-VL with its vision part switched on.

    H2O ranks the whole sequence per KV head, and a full cache has no classes.
    """
    return getattr(prepared.caching.policy, "rate", None) is not None


@torch.inference_mode()
def trace(model, prepared: PreparedPrompt, steps: int) -> list[np.ndarray]:
    """The class of each vision token after prefill and after each of `steps` decode steps, under greedy decoding.

    prepared: a batch of one prompt with one image. Decoding continues after the end of the answer.
    Returns [1 + steps] uint8 arrays [L, K], for L layers and the K vision tokens that entered the LLM. The next step
    reads CORE tokens. SECONDARY tokens are stored and wait for the next re-ranking. MINOR tokens are evicted. ABSENT
    tokens were dropped inside the LLM before that layer.
    """
    engine = Engine(model, graphs=False)
    engine.ends = set()  # no token ends the answer, so that all steps run
    generation = engine.stream(prepared, Sampling(steps + 1))
    return [image_classes(generation.cache, prepared) for _ in generation]


def image_classes(cache: AdaptiveCache, prepared: PreparedPrompt) -> np.ndarray:
    """The present classes, uint8 [L, K], of the only image of the first row."""
    ((_, tokens),) = prepared.image_spans[0]
    classes = np.full((len(cache.layers), tokens), ABSENT, dtype=np.uint8)
    for number, layer in enumerate(cache.layers):
        seen = _seen(prepared, number, tokens)
        stayed = layer.stayed[0].cpu().numpy()
        plan = layer.plans[0]
        core = np.arange(len(stayed))  # without re-ranking there is no core list: every stored token is read
        if plan.policy.interval > 0:
            # The list has slots of the row. Image slots begin after the front.
            core = layer.core[0, : plan.core].cpu().numpy() - plan.front
        held = np.full(len(seen), MINOR, dtype=np.uint8)
        held[stayed] = SECONDARY
        held[stayed[core]] = CORE
        # A token that a method made of dropped tokens (-1) has no patch to draw.
        classes[number, seen[seen >= 0]] = held[seen >= 0]
    return classes


def _seen(prepared: PreparedPrompt, layer: int, tokens: int) -> np.ndarray:
    """Indices of the image's tokens that the attention of a layer saw; -1 for a token made of dropped tokens."""
    dropping = prepared.dropping
    stage = dropping.stage_of[layer] if dropping is not None else 0
    return np.arange(tokens) if stage == 0 else dropping.survivors(0, 0)[stage - 1].cpu().numpy()

"""Runs several methods on one image and question and measures each of them, for the overlay command."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from PIL import Image

from llava.common.errors import UserError
from llava.common.machine import environment
from llava.common.scatter import scatters, spread
from llava.config import AdaVConfig
from llava.costs.measure import kv_bytes, predicted, vision_tokens
from llava.costs.model_shape import ImageCounts, ModelShape
from llava.inference.loaded_checkpoint import LoadedCheckpoint
from llava.methods.before_llm import Selection
from llava.mm_utils import TilePlan, tile_plan
from llava.model.decoding.sampling import Sampling
from llava.overlay.cache_strip import CacheStates
from llava.overlay.cache_trace import trace, traceable


@dataclass(frozen=True)
class MethodResult:
    """Answer and cost of one method on the image and question.

    kept, total: vision tokens left after the last cut, and without any method; layer_mean: in a layer, mean over layers
    first_token, prefill: seconds, median over runs; repeats: the seconds to the first token of each run; kv_bytes: live at the end of the answer; flops: predicted, from
    pixels to the first token; cache: what A-VL held at each step, None where it is off
    """

    selection: Selection
    answer: str
    new_tokens: int
    kept: int
    total: int
    layer_mean: float
    first_token: float
    prefill: float
    kv_bytes: int
    flops: int
    cache: CacheStates | None = None
    repeats: tuple[float, ...] = ()

    def notes(self) -> list[str]:
        """The cost, one line each. A line says if its number is predicted and not measured."""
        # layer_mean repeats `kept` for a method before the LLM; it is shown only where tokens drop inside the LLM.
        inside = [f"{self.layer_mean:.1f} vision tokens in a layer, mean over layers"]
        return [
            *(inside if abs(self.layer_mean - self.kept) > 0.05 else []),
            f"first token after {1000 * self.first_token:.1f} ms, of which prefill {1000 * self.prefill:.1f} ms",
            *([self._scatter()] if scatters(spread(self.repeats)) else []),
            f"KV cache {_unit(self.kv_bytes, ('bytes', 'kB', 'MB', 'GB'))} live",
            f"{_unit(self.flops, ('FLOPs', 'kFLOPs', 'MFLOPs', 'GFLOPs', 'TFLOPs', 'PFLOPs'))} to the first token (predicted)",
        ]

    def _scatter(self) -> str:
        """Return the text below a time that must not be quoted."""
        low, high = 1000 * min(self.repeats), 1000 * max(self.repeats)
        return f"do not quote this time: its repeats lie between {low:.1f} and {high:.1f} ms"


def _unit(value: float, units: tuple[str, ...]) -> str:
    """A number of about three digits with its unit. Each unit is a thousand times the one before."""
    power = 0
    while value >= 1000 and power < len(units) - 1:
        value, power = value / 1000, power + 1
    return f"{value:.3g} {units[power]}" if value < 1000 else f"{value:,.0f} {units[power]}"


class MethodMeasurer:
    """A loaded checkpoint with one image and one question.

    plan, side: how the image is cut, patches per tile side. tokenizer: the checkpoint's. UserError where the checkpoint lacks tokenizer or image
    processor, or the prompt is longer than its context.
    """

    def __init__(
        self,
        model_path: str,
        image: Image.Image,
        question: str,
        config: AdaVConfig,
        *,
        model_base: str | None = None,
        conversation: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        threads: int | None = None,
    ):
        loaded = LoadedCheckpoint(
            model_path, model_base, config, device=device, dtype=dtype, threads=threads, purpose="a question"
        )
        self.model, self.engine, self.context, self.image = loaded.model, loaded.engine, loaded.context, image
        self.tokenizer = loaded.tokenizer
        self.plan: TilePlan = tile_plan(image.size, self.model.config, config.option("anyres"))
        self.side: int = self.model.get_vision_tower().num_patches_per_side
        self._ids = loaded.token_ids(question, images=1, conversation=conversation)[None]
        self._pixels = loaded.pixels(image, config).pixels.to(loaded.device, self.model.dtype)

    def looks(
        self,
        configs: dict[str, AdaVConfig],
        max_new_tokens: int = 64,
        repeats: int = 5,
        steps: int = 6,
        tick: Callable[[], None] = lambda: None,
    ) -> dict[str, MethodResult]:
        """Label -> MethodResult.

        configs: label -> configuration. repeats: timed runs of each method, after one run that is not timed.
        steps: decode steps for which A-VL's cache is recorded. tick: called after each run, for a progress bar.
        """
        # Methods take turns. If the machine becomes busy, all of them slow down, and the comparison stays fair.
        times: dict[str, list[tuple[float, float]]] = {label: [] for label in configs}
        for nth in range(repeats):
            for label, config in configs.items():
                if nth == 0:  # warm-up: allocations, CUDA kernels and captured graphs of this shape
                    self._first_token(config, max_new_tokens)
                    tick()
                times[label].append(self._first_token(config, max_new_tokens))
                tick()
        found = {}
        for label, config in configs.items():
            first_tokens, prefills = zip(*times[label], strict=True)
            medians = statistics.median(first_tokens), statistics.median(prefills)
            answered = self._answered(config, max_new_tokens, steps, *medians)
            found[label] = replace(answered, repeats=first_tokens)
            tick()
        return found

    def conditions(self, repeats: int) -> str:
        """A few sentences that say how the numbers were measured, and on which hardware."""
        device = self.engine.device
        if device.type == "cuda":
            where = torch.cuda.get_device_name(device)
        else:
            threads = torch.get_num_threads()
            where = f"{environment()['cpu']}, {threads} thread{'s' if threads > 1 else ''}"
        return (
            f"Measured: time to the first token, median of {repeats} after one that is not counted, from ready tiles on (vision "
            f"tower, projector, selection, prefill; decoding and tiling the file excluded), methods in turn, one request at "
            f"a time, {str(self.model.dtype).removeprefix('torch.')}, {where}; KV cache: bytes of the entries of prompt and "
            "answer when the answer ends. Predicted: FLOPs, 2 for each multiply-add, counted from the configuration."
        )

    @torch.inference_mode()
    def _first_token(self, config: AdaVConfig, max_new_tokens: int) -> tuple[float, float]:
        """(seconds from tiles to the first token, seconds of prefill in them)."""
        start = self._now()
        generation = self.engine.stream(self._prepare(config), Sampling(max_new_tokens))
        next(generation)
        return self._now() - start, generation.seconds["prefill"]

    def _now(self) -> float:
        """The time in seconds after all work on the device has finished. CUDA kernels run asynchronously."""
        if self.engine.device.type == "cuda":
            torch.cuda.synchronize(self.engine.device)
        return time.perf_counter()

    @torch.inference_mode()
    def _answered(
        self, config: AdaVConfig, max_new_tokens: int, steps: int, first_token: float, prefill: float
    ) -> MethodResult:
        """Answer the question under one configuration, and collect answer, costs and cache states."""
        prepared = self._prepare(config)
        generated = self.engine.generate(prepared, Sampling(max_new_tokens))
        (answer,), (selection,) = generated.answers, prepared.selections[0]
        counts, shape = [ImageCounts.from_plan(self.plan, self.side)], ModelShape.from_config(self.model.config)
        costs = predicted(prepared, counts, shape, config)
        (memory,) = kv_bytes(generated.cache, costs, [len(answer.tokens)])
        tokens, cache = vision_tokens(prepared, 0), None
        if traceable(prepared) and len(selection.indices):
            again = self._prepare(config)
            cache = CacheStates(selection, trace(self.model, again, steps), again.caching.policy.interval)
        return MethodResult(
            selection,
            answer.text.strip(),
            len(answer.tokens),
            tokens["kept"][0],
            counts[0].tokens,
            tokens["layer_mean"][0],
            first_token,
            prefill,
            memory["kv_bytes_live"],
            costs[0].total,
            cache,
        )

    def _prepare(self, config: AdaVConfig):
        """A PreparedPrompt of the question. UserError for a prompt that is longer than the context."""
        prepared = self.model.prepare(self._ids, [self._pixels], [self.image.size], config=config)
        if prepared.lengths[0] > self.context:
            raise UserError(
                f"the prompt has {prepared.lengths[0]} tokens, but the checkpoint reads {self.context}; ask a shorter "
                "question or keep fewer vision tokens"
            )
        return prepared

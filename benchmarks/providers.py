"""Providers of benchmarks/end_to_end.py: one class each, all with the same weights and the same prompts.

    transformers   LlavaForConditionalGeneration or LlavaNextForConditionalGeneration unchanged, SDPA, generate()
    upstream       the way of the published pruning code, at its cost: see Upstream
    ours           this repository's model.generate() under any configuration
    engine         this repository's generation engine under any configuration, as in evaluation

A new provider needs a class with `answer` and a line in PROVIDERS.
"""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from accelerate import init_empty_weights
from shapes import Prompts
from torch import Tensor
from transformers import CLIPVisionModel, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

from llava.config import AdaVConfig
from llava.constants import IMAGE_TOKEN_INDEX
from llava.integrations.transformers.reference import share_weights
from llava.methods.before_llm import select
from llava.methods.inside_llm import DROPPERS
from llava.mm_utils import tile_plan
from llava.model.decoding.cache_argument import CACHE
from llava.model.decoding.engine import Engine, capacity_multiple
from llava.model.decoding.prepared import StageClock
from llava.model.decoding.sampling import Sampling


@dataclass
class Answer:
    """Answer of a provider to a batch of prompts, with its times.

    tokens  [B, new tokens], on the CPU
    logits  [B, V] of the first token, float32 on the CPU; None if they were not asked for
    first   seconds from pixels on the device to the first token of every row
    decode  seconds from there to the last token
    stages  seconds of `first` in vision_tower, projector and selection; the rest is prefill
    kept    per row, indices of the vision tokens that the LLM read; None if the provider does not select
    kv      bytes of the KV cache after the last step
    """

    tokens: Tensor
    first: float
    decode: float
    kv: int
    stages: dict[str, float] = field(default_factory=dict)
    logits: Tensor | None = None
    kept: list[Tensor] | None = None


class Models:
    """Our model, and transformers' model on the same tensors, which is made at first use."""

    def __init__(self, ours):
        self.ours = ours

    @cached_property
    def transformers(self):
        model = share_weights(self.ours)
        model.generation_config = copy.deepcopy(self.ours.generation_config)
        return model


class Provider(ABC):
    """One way to answer prompts. Everything that it needs is built once, in its constructor.

    name: in the table. config: the method and the cache policy. side_by_side: True if it answers a batch at once, False
    if row by row.
    """

    name: str
    side_by_side = True

    def __init__(self, models: Models, config: AdaVConfig):
        self.models, self.config = models, config

    @abstractmethod
    def answer(self, prompts: Prompts, new_tokens: int, logits: bool = False) -> Answer:
        """Greedy answers of exactly `new_tokens` tokens. logits: also return those of the first token."""

    def multiple(self, batch: int) -> int:
        """Number to whose multiples the capacities of its KV cache are rounded up."""
        return 1

    def release(self) -> None:  # noqa: B027 (most keep nothing)
        """Free what is kept from one answer to the next."""


class Ours(Provider):
    """This repository's model: prepare(), and transformers' generate() with our decoder."""

    name = "ours"

    def answer(self, prompts: Prompts, new_tokens: int, logits: bool = False) -> Answer:
        model, watch = self.models.ours, Watch(prompts.ids.device)
        prepared = model.prepare(prompts.ids, prompts.pixels, prompts.sizes, config=self.config)
        answer = watch.generate(model, new_tokens, logits, prepared=prepared)
        times = dict(prepared.seconds)
        answer.stages = times | {"selection": times.pop("selection", 0.0) + times.pop("splice", 0.0)}
        answer.kept = [selection.indices.cpu() for row in prepared.selections for selection in row]
        return answer


class OursByEngine(Provider):
    """This repository's model with its engine: storage is allocated once, and steps are captured on a GPU."""

    name = "engine"

    def __init__(self, models: Models, config: AdaVConfig):
        super().__init__(models, config)
        self.engine = Engine(models.ours)
        self.engine.ends = set()  # no end token, so that answers are as long as asked for

    def multiple(self, batch: int) -> int:
        return capacity_multiple(batch) if self.engine.graphs else 1

    def answer(self, prompts: Prompts, new_tokens: int, logits: bool = False) -> Answer:
        watch = Watch(prompts.ids.device)
        prepared = self.models.ours.prepare(prompts.ids, prompts.pixels, prompts.sizes, config=self.config)
        generation = self.engine.stream(prepared, Sampling(max_new_tokens=new_tokens))
        next(generation)
        first, of_first = watch.now(), generation.logits.float().cpu() if logits else None
        start = watch.now()  # again: the copy of the logits to the host belongs to neither time
        generated = generation.result()
        last = watch.now()
        times = dict(prepared.seconds)
        return Answer(
            tokens=torch.tensor([answer.tokens for answer in generated.answers]),
            first=first - watch.start,
            decode=last - start,
            kv=sum(layer.keys.nbytes + layer.values.nbytes for layer in generated.cache.layers),
            stages=times | {"selection": times.pop("selection", 0.0) + times.pop("splice", 0.0)},
            logits=of_first,
            kept=[selection.indices.cpu() for row in prepared.selections for selection in row],
        )

    def release(self) -> None:
        self.engine.release()


class Transformers(Provider):
    """transformers' own LLaVA with all vision tokens."""

    name = "transformers"

    def answer(self, prompts: Prompts, new_tokens: int, logits: bool = False) -> Answer:
        model, device = self.models.transformers, prompts.ids.device
        inputs = self._inputs(model, prompts)
        watch = Watch(device)
        with (
            watch.around(model.model.vision_tower, "vision_tower"),
            watch.around(model.model.multi_modal_projector, "projector"),
        ):
            answer = watch.generate(model, new_tokens, logits, **inputs)
        answer.stages = watch.clock.seconds
        return answer

    def _inputs(self, model, prompts: Prompts) -> dict:
        """Model inputs as transformers' processor makes them: one placeholder per vision token."""
        # The prompts are random ids, so the placeholder must be an id that none of them has.
        ids, count = prompts.ids, prompts.image.tokens
        used = set(ids.unique().tolist())
        placeholder = next(i for i in range(prompts.shape.vocab) if i not in used)
        model.config.image_token_index = placeholder
        place = int((ids[0] == IMAGE_TOKEN_INDEX).nonzero())
        image = ids.new_full((len(ids), count), placeholder)
        ids = torch.cat([ids[:, :place], image, ids[:, place + 1 :]], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if model.config.model_type == "llava_next":
            sizes = torch.tensor([(height, width) for width, height in prompts.sizes], device=ids.device)
            return inputs | {"pixel_values": torch.stack(prompts.pixels), "image_sizes": sizes}
        return inputs | {"pixel_values": torch.cat(prompts.pixels)}


class Upstream(Provider):
    """The way of the published code (AdaV on FasterVLM on LLaVA), with the present transformers.

    The whole tower runs with eager attention and keeps the maps of all its layers, of which one row of one layer is
    read. All patches are projected. The kept ones and the words go to generate() of a plain Llama. AdaV's code takes
    only one prompt at a time, so a batch is a loop here. Two things make this provider faster than the published code:
    our selectors choose the tokens, and the authors' loops are slower; and transformers 4.37, which the authors pin,
    also computes the logits of every prompt position in prefill.
    """

    name = "upstream"
    side_by_side = False

    def __init__(self, models: Models, config: AdaVConfig):
        super().__init__(models, config)
        stock = models.transformers
        settings = copy.deepcopy(stock.config.vision_config)
        settings._attn_implementation = "eager"
        with init_empty_weights(include_buffers=False):
            tower, llm = CLIPVisionModel(settings), LlamaForCausalLM(stock.config.text_config)
        tower.load_state_dict(stock.model.vision_tower.state_dict(), assign=True)
        weights = {"model." + name: value for name, value in stock.model.language_model.state_dict().items()}
        llm.load_state_dict(weights | {"lm_head.weight": stock.lm_head.weight}, assign=True)
        llm.generation_config = copy.deepcopy(stock.generation_config)
        self.tower, self.llm = (part.to(stock.device).eval() for part in (tower, llm))

    @staticmethod
    def can(config: AdaVConfig) -> bool:
        """True if this way can do a configuration's prefill: selection before the LLM, by saliency and words."""
        if config.prefill_filter_flag or config.method in ("none", "no_image", "random", *DROPPERS):
            return False
        method = config.make_method()
        return not (method.tower_states or method.resizes or method.zooms)

    def answer(self, prompts: Prompts, new_tokens: int, logits: bool = False) -> Answer:
        return _one_after_another([self._one(prompts, row, new_tokens, logits) for row in range(len(prompts.ids))])

    def _one(self, prompts: Prompts, row: int, new_tokens: int, logits: bool) -> Answer:
        ours, ids, watch = self.models.ours, prompts.ids[row], Watch(prompts.ids.device)
        # Counted from the end: there are more hidden states than maps (the first one is the input), but they end alike.
        layer = ours.config.mm_vision_select_layer
        with watch.clock.stage("vision_tower"):
            seen = self.tower(prompts.pixels[row], output_attentions=True, output_hidden_states=True)
            hidden = seen.hidden_states[layer][:, 1:]
        with watch.clock.stage("projector"):
            features = ours.model.mm_projector(hidden)
        with watch.clock.stage("selection"):
            saliency = seen.attentions[layer][:, :, 0, 1:].float().mean(dim=1)
            del seen  # the maps of all layers: their memory would count in the peak of prefill
            place = int((ids == IMAGE_TOKEN_INDEX).nonzero())
            words = self.llm.model.embed_tokens(ids.clamp(min=0))
            before, after = words[:place], words[place + 1 :]
            plan = tile_plan(prompts.sizes[row], ours.config, self.config.option("anyres"))
            options = self.config.method_options
            image = ours.image_tokens(features, saliency, plan)
            kept = select(self.config.method, image, after, self.config.overall_tokens, **options)
            inputs = torch.cat([before, kept.features.to(words), after])[None]
        answer = watch.generate(self.llm, new_tokens, logits, inputs_embeds=inputs)
        answer.stages, answer.kept = watch.clock.seconds, [kept.indices.cpu()]
        return answer


PROVIDERS = {provider.name: provider for provider in (Transformers, Upstream, Ours, OursByEngine)}


class Watch:
    """Times one answer, starting when this object is made.

    Timing adds only waits for the device: between stages, after the first token and after the last token.
    """

    def __init__(self, device: torch.device):
        self.clock = StageClock(device)
        self._cuda = device.type == "cuda"
        self.start = self.now()

    def now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def around(self, module: torch.nn.Module, stage: str):
        """Context in which every call of `module` counts for the stage."""
        running = []

        def begin(*_):
            running.append(self.clock.stage(stage))
            running[-1].__enter__()

        def end(*_):
            running.pop().__exit__(None, None, None)

        hooks = [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def generate(self, model, new_tokens: int, logits: bool, **inputs) -> Answer:
        """Answer of a greedy generate(), with the times of its first and last token."""
        stamps = _Stamps(self, new_tokens)
        output = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=new_tokens,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([stamps]),
            return_dict_in_generate=True,
            output_logits=logits,
        )
        first, last = stamps.times[0], stamps.times[-1]
        return Answer(
            tokens=output.sequences[:, -new_tokens:].cpu(),
            first=first - self.start,
            decode=last - first,
            kv=sum(layer.keys.nbytes + layer.values.nbytes for layer in getattr(output, CACHE).layers),
            logits=output.logits[0].float().cpu() if logits else None,
        )


class _Stamps(StoppingCriteria):
    """Stopping criterion that never stops, and records the times of the first and the last token."""

    def __init__(self, watch: Watch, new_tokens: int):
        self.watch, self.last, self.count, self.times = watch, new_tokens, 0, []

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        self.count += 1
        if self.count in (1, self.last):
            self.times.append(self.watch.now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _one_after_another(answers: list[Answer]) -> Answer:
    """Answer to a batch from answers to its rows. Times are added. kv is a maximum: one cache exists at a time."""
    first = answers[0]
    return Answer(
        tokens=torch.cat([answer.tokens for answer in answers]),
        first=sum(answer.first for answer in answers),
        decode=sum(answer.decode for answer in answers),
        kv=max(answer.kv for answer in answers),
        stages={stage: sum(answer.stages[stage] for answer in answers) for stage in first.stages},
        logits=None if first.logits is None else torch.cat([answer.logits for answer in answers]),
        kept=[kept for answer in answers for kept in answer.kept],
    )

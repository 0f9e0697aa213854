"""Who answers in benchmarks/end_to_end.py: one class per provider, all on the same weights and the same prompts.

    transformers   LlavaForConditionalGeneration or LlavaNextForConditionalGeneration as they are, SDPA, generate()
    upstream       the way of the published pruning code, and its cost: see Upstream
    ours           this repository's model.generate() under any configuration
    engine         this repository's generation engine under any configuration: what the evaluation runs on

A new provider is a class with `answer`, and a line in PROVIDERS.
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
from llava.model.decoding.engine import CAPACITY_MULTIPLE, Engine
from llava.model.decoding.prepared import StageClock
from llava.model.decoding.sampling import Sampling


@dataclass
class Answer:
    """What a provider did with a batch of prompts, and when.

    tokens [B, T], and logits [B, V] of the first of them in float32, on the CPU; logits None where not asked for
    first   seconds from pixels (on the device already) to the first token of every row
    decode  seconds from there to the last token
    stages  of `first`, seconds in vision_tower, projector and selection; the rest is prefill: the LLM and all around it
    kept    per row, which of the image's tokens the LLM read, where the provider chooses
    kv      bytes of the KV cache that the last step left
    """

    tokens: Tensor
    first: float
    decode: float
    kv: int
    stages: dict[str, float] = field(default_factory=dict)
    logits: Tensor | None = None
    kept: list[Tensor] | None = None


class Models:
    """Our model, and transformers' on the same tensors, made when it is first asked for."""

    def __init__(self, ours):
        self.ours = ours

    @cached_property
    def transformers(self):
        model = share_weights(self.ours)
        model.generation_config = copy.deepcopy(self.ours.generation_config)
        return model


class Provider(ABC):
    """One way to answer prompts. What it builds, it builds once, when it is made.

    name; config: what of the image's tokens it reads; side_by_side: whether it answers a batch at once or row by row;
    multiple: what capacities of its KV cache are rounded up to
    """

    name: str
    side_by_side = True
    multiple = 1

    def __init__(self, models: Models, config: AdaVConfig):
        self.models, self.config = models, config

    @abstractmethod
    def answer(self, prompts: Prompts, new_tokens: int, logits: bool = False) -> Answer:
        """Greedy answers of exactly `new_tokens` tokens. logits: also give those of the first token."""

    def release(self) -> None:  # noqa: B027 (most keep nothing)
        """Let go of what is kept from one answer to the next."""


class Ours(Provider):
    """This repository's model: prepare() and transformers' generate() around our decoder."""

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
    """This repository's model and its engine: storage that is allocated once, on a GPU steps that are captured."""

    name = "engine"

    def __init__(self, models: Models, config: AdaVConfig):
        super().__init__(models, config)
        self.engine = Engine(models.ours)
        self.engine.ends = set()  # answers are as long as asked for
        self.multiple = CAPACITY_MULTIPLE if self.engine.graphs else 1

    def answer(self, prompts: Prompts, new_tokens: int, logits: bool = False) -> Answer:
        watch = Watch(prompts.ids.device)
        prepared = self.models.ours.prepare(prompts.ids, prompts.pixels, prompts.sizes, config=self.config)
        generation = self.engine.stream(prepared, Sampling(max_new_tokens=new_tokens))
        next(generation)
        first, of_first = watch.now(), generation.logits.float().cpu() if logits else None
        start = watch.now()
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
    """transformers' own LLaVA on all of the image's tokens."""

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
        """What transformers' processor would give: a placeholder for every token of the image."""
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
    """The way of the published code (AdaV on FasterVLM on LLaVA), on today's transformers.

    The whole tower runs with eager attention and leaves the maps of all its layers, of which one row of one layer is
    read; all its patches are projected; the kept ones go with the words to a plain Llama's generate(). One prompt at a
    time: AdaV's code cannot take more, so a batch is a loop here. Which tokens are kept is decided by our selectors, to
    whose favour nothing is counted: the authors' loops are slower. Neither are the logits of every position of the
    prompt that transformers 4.37, which they pin, computes in prefill.
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
        """Whether a configuration's prefill is of this way: tokens chosen by [CLS] attention and words, before the LLM."""
        if config.prefill_filter_flag or config.method in ("none", "no_image", "random", *DROPPERS):
            return False
        return not config.make_method().tower_states

    def answer(self, prompts: Prompts, new_tokens: int, logits: bool = False) -> Answer:
        return _one_after_another([self._one(prompts, row, new_tokens, logits) for row in range(len(prompts.ids))])

    def _one(self, prompts: Prompts, row: int, new_tokens: int, logits: bool) -> Answer:
        ours, ids, watch = self.models.ours, prompts.ids[row], Watch(prompts.ids.device)
        layer = ours.config.mm_vision_select_layer  # counted from the end, where states and maps end alike
        with watch.clock.stage("vision_tower"):
            seen = self.tower(prompts.pixels[row], output_attentions=True, output_hidden_states=True)
            hidden = seen.hidden_states[layer][:, 1:]
        with watch.clock.stage("projector"):
            features = ours.model.mm_projector(hidden)
        with watch.clock.stage("selection"):
            saliency = seen.attentions[layer][:, :, 0, 1:].float().mean(dim=1)
            del seen
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
    """Times one answer, from its own making on. Nothing but waiting for the device is done for the sake of timing: at
    the borders of stages, after the first token and after the last."""

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
        """While it is open, every call of `module` is a part of the stage."""
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
        """Greedy generate(), with the moments of its first and its last token."""
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
    """Never stops; notes when the first and the last token were there."""

    def __init__(self, watch: Watch, new_tokens: int):
        self.watch, self.last, self.count, self.times = watch, new_tokens, 0, []

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        self.count += 1
        if self.count in (1, self.last):
            self.times.append(self.watch.now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _one_after_another(answers: list[Answer]) -> Answer:
    """Answers to single prompts as one to their batch. Times add up; of the caches there is one at a time."""
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

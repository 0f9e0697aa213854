"""The generation engine: from a PreparedPrompt to answers, on storage whose size is known after prefill.

    engine = Engine(model, tokenizer)
    answers = engine.generate(model.prepare(input_ids, images, image_sizes), Sampling(max_new_tokens=64)).answers
    for news in engine.stream(prepared, Sampling()): ...       # token by token

One prefill fills an AdaptiveCache (llava/model/kv_cache), whatever its policy; every decode step then writes one entry
per layer and row and reads what the policy lists. On one CUDA device short prefills and all steps are captured as CUDA
graphs: prompts padded to few lengths, one graph for steps that read the core and one for those that re-rank it. Elsewhere
they run plainly. transformers' generate() gives the same
greedy tokens, and does what is not done here (beams, assistants, processors of logits).
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava.errors import UserError
from llava.model.kv_cache.cache import AdaptiveCache
from llava.model.language_model.decode_step import Stepper
from llava.model.language_model.prefill import StaticPrefills
from llava.model.prepared import PreparedPrompt
from llava.model.sampling import Chooser, Sampling
from llava.model.text_stream import TextStream

# Capacities are rounded up to this where steps are captured: requests of similar length then share graphs.
MULTIPLE = 128
# Captured sets of buffers that are kept for later requests of the same shape.
KEPT = 2


@dataclass
class Answer:
    """One row's: tokens, the end token included; text without special tokens and from the stop string on (None without
    a tokenizer); finish: "stop" for an end token or a stop string, "length" where max_new_tokens ended it, "cancelled"."""

    tokens: list[int] = field(default_factory=list)
    text: str | None = None
    finish: str | None = None


@dataclass
class Generated:
    """answers: one per row; cache: as it was at the end; seconds: prefill and decode of the whole batch."""

    answers: list[Answer]
    cache: AdaptiveCache
    seconds: dict[str, float]


class Engine:
    """Generates with one model, one batch after another. Not for several threads at once.

    tokenizer: for texts and stop strings; None for token ids alone. graphs: whether to capture CUDA graphs; None: where the
    model is on one CUDA device. rank_beside: on CUDA, let A-VL's re-ranking run on a side stream, beside the layers
    that follow (same tokens).
    """

    def __init__(self, model, tokenizer=None, *, graphs: bool | None = None, rank_beside: bool = False):
        self.model, self.tokenizer, self._rank_beside = model, tokenizer, rank_beside
        self.device = model.get_input_embeddings().weight.device
        one_gpu = self.device.type == "cuda" and all(p.device == self.device for p in model.parameters())
        if (graphs or rank_beside) and not one_gpu:
            raise UserError("graphs and rank_beside need a model that is on one CUDA device as a whole")
        self.graphs = one_gpu if graphs is None else graphs
        self.ends = end_tokens(model, tokenizer)
        self.pad = pad_token(model, tokenizer)
        self._captured: OrderedDict[tuple, CapturedSteps] = OrderedDict()
        self._prefills = StaticPrefills(model) if self.graphs else None

    def generate(self, prepared: PreparedPrompt, sampling: Sampling | Sequence[Sampling] | None = None) -> Generated:
        """Answer every row of a batch. sampling: for all rows, or one for each; None is greedy, up to 128 tokens."""
        generation = BatchGeneration(self, prepared, sampling)
        for _ in generation:
            pass
        return generation.result()

    def stream(
        self, prepared: PreparedPrompt, sampling: Sampling | Sequence[Sampling] | None = None
    ) -> BatchGeneration:
        """As generate, step by step: iterate over it for what each step adds, and ask it for result() at the end."""
        return BatchGeneration(self, prepared, sampling, streamed=True)

    def prefill(self, prepared: PreparedPrompt, cache: AdaptiveCache) -> Tensor:
        """[B, V] logits of the first new token, the prompts filled into an empty cache."""
        logits = None if self._prefills is None else self._prefills(prepared, cache)
        return self.model.prefill(prepared, cache) if logits is None else logits

    def steps_for(self, cache: AdaptiveCache) -> PlainSteps | CapturedSteps:
        """What runs the decode steps on a prefilled cache."""
        shape = cache.shape() if self.graphs else None
        if shape in self._captured:
            self._captured.move_to_end(shape)
            self._captured[shape].start(cache)
            return self._captured[shape]
        if self._rank_beside:
            cache.rank_beside()
        if not self.graphs:
            return PlainSteps(self.model, cache)
        while len(self._captured) >= KEPT:
            self._captured.popitem(last=False)
        self._captured[shape] = CapturedSteps(self.model, cache)
        return self._captured[shape]


@dataclass(frozen=True)
class New:
    """What a step added to one row: its token, the text that is certain by now, and why the row ended, if it did."""

    token: int
    text: str | None
    finish: str | None


class BatchGeneration:
    """One batch on its way: an iterator over steps. Each gives, per row, its `New`, or None for a row that has ended."""

    def __init__(self, engine: Engine, prepared: PreparedPrompt, sampling, streamed: bool = False):
        rows = len(prepared.lengths)
        given = Sampling() if sampling is None else sampling
        self.sampling = [given] * rows if isinstance(given, Sampling) else list(given)
        if len(self.sampling) != rows:
            raise UserError(
                f"{len(self.sampling)} samplings came with {rows} prompts, allowed is one for each, or one for all"
            )
        if engine.tokenizer is None and any(one.stop for one in self.sampling):
            raise UserError("stop strings need a tokenizer, but the engine was made without one")
        self.answers = [Answer() for _ in range(rows)]
        self.seconds = {"prefill": 0.0, "decode": 0.0}
        self.cache: AdaptiveCache | None = None
        self._engine, self._prepared = engine, prepared
        self._choose = Chooser(self.sampling, engine.device)
        self._streams = [
            TextStream(engine.tokenizer, one.stop) if engine.tokenizer is not None and (streamed or one.stop) else None
            for one in self.sampling
        ]
        self.logits: Tensor | None = None  # [B, V] of the tokens that the last step has chosen
        self._steps: PlainSteps | CapturedSteps | None = None

    def __iter__(self) -> Iterator[list[New | None]]:
        return self

    @torch.inference_mode()
    def __next__(self) -> list[New | None]:
        if all(answer.finish for answer in self.answers):
            raise StopIteration
        start = time.perf_counter()
        stage = "prefill" if self.logits is None else "decode"
        self.logits = self._prefill() if self.logits is None else self._steps(self._tokens)
        self._tokens = self._choose(self.logits)
        if any(answer.finish for answer in self.answers):
            ended = [answer.finish is not None for answer in self.answers]
            self._tokens[torch.tensor(ended, device=self._tokens.device)] = self._engine.pad
        news = [self._add(row, token) for row, token in enumerate(self._tokens.tolist())]  # waits for the device
        self.seconds[stage] += time.perf_counter() - start
        return news

    def cancel(self, row: int) -> None:
        """End a row before its time: its answer is what it has by now, and the others go on without it."""
        if self.answers[row].finish is None:
            self.answers[row].finish = "cancelled"

    def result(self) -> Generated:
        """All answers; what is left to generate is generated first."""
        for _ in self:
            pass
        tokenizer = self._engine.tokenizer
        for answer, stream in zip(self.answers, self._streams, strict=True):
            if stream is not None:
                answer.text = stream.text
            elif tokenizer is not None:
                answer.text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        return Generated(self.answers, self.cache, self.seconds)

    def _prefill(self) -> Tensor:
        """[B, V] logits of the first new token; the cache is filled, and what decodes on it is ready."""
        engine, prepared = self._engine, self._prepared
        steps = max(one.max_new_tokens for one in self.sampling) - 1  # the last token is never fed back
        multiple = MULTIPLE if engine.graphs else 1
        cache = prepared.caching.cache(-(-steps // multiple) * multiple, multiple)
        logits = engine.prefill(prepared, cache)
        self._steps = engine.steps_for(cache)
        self.cache = self._steps.cache
        return logits

    def _add(self, row: int, token: int) -> New | None:
        answer, stream = self.answers[row], self._streams[row]
        if answer.finish:
            return None
        answer.tokens.append(token)
        text = None if stream is None else stream.add(token)
        if token in self._engine.ends or (stream is not None and stream.stopped):
            answer.finish = "stop"
        elif len(answer.tokens) == self.sampling[row].max_new_tokens:
            answer.finish = "length"
        if answer.finish and stream is not None:
            text += stream.end()
        return New(token, text, answer.finish)


class PlainSteps:
    """Decode steps one after another, as they are."""

    def __init__(self, model, cache: AdaptiveCache):
        self._step, self.cache = step_of(model), cache

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [B] -> logits [B, V] of those that follow."""
        self.cache.begin_step(1)
        return self._step(tokens, self.cache)


class CapturedSteps:
    """Decode steps as CUDA graphs over buffers that stay where they are, request after request.

    Steps that re-rank and steps that do not are captured apart. The first of either kind runs plainly: it compiles kernels
    and sets up libraries, which must not happen under capture. Capturing runs nothing, so the step is then replayed.
    """

    def __init__(self, model, cache: AdaptiveCache):
        self._step, self.cache = step_of(model), cache
        self._tokens = cache.shifts.new_zeros(cache.shifts.shape[1])
        self._graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self._logits: dict[bool, Tensor] = {}
        self._ran: set[bool] = set()

    def start(self, cache: AdaptiveCache) -> None:
        """Go on with the contents of another prefilled cache of the same shape."""
        self.cache.take_over(cache)

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [B] -> logits [B, V] of those that follow, valid until the next call."""
        self._tokens.copy_(tokens)
        self.cache.begin_step(1)
        kind = self.cache.update_step
        if kind not in self._ran:
            self._ran.add(kind)
            return self._step(self._tokens, self.cache)
        if kind not in self._graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._logits[kind] = self._step(self._tokens, self.cache)
            self._graphs[kind] = graph
        self._graphs[kind].replay()
        return self._logits[kind]


def step_of(model) -> Callable[[Tensor, AdaptiveCache], Tensor]:
    """What a decode step of a model is: the short form where its layers are such, else its layers as they are."""
    return Stepper.of(model) or model.decode_step


def end_tokens(model, tokenizer=None) -> set[int]:
    """Tokens that end an answer: those of the generation configuration, and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return {end for end in [*ends, getattr(tokenizer, "eos_token_id", None)] if end is not None}


def pad_token(model, tokenizer=None) -> int:
    """What a row that has ended is fed while others go on."""
    pad = getattr(tokenizer, "pad_token_id", None)
    return pad if pad is not None else min(end_tokens(model, tokenizer), default=0)

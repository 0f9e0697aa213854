"""The generation engine: from a PreparedPrompt to answers, on storage whose size is known before prefill.

    engine = Engine(model, tokenizer)
    answers = engine.generate(model.prepare(input_ids, images, image_sizes), Sampling(max_new_tokens=64)).answers
    for outputs in engine.stream(prepared, Sampling()): ...       # token by token

One prefill fills an AdaptiveCache (llava/methods/kv_cache), whatever its policy; every decode step then writes one entry
per layer and row and reads what the policy lists. On one CUDA device what comes again in the same shapes is captured as
CUDA graphs: the vision tower per number of tiles, short prefills, padded to few lengths, and decode steps, one graph for
steps that read the core and one for those that re-rank it. Elsewhere everything runs plainly. transformers' generate()
gives the same greedy tokens, and does what is not done here (beams, assistants, processors of logits).
"""

from __future__ import annotations

import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llava.common.errors import UserError
from llava.methods.kv_cache.base import rounded_up
from llava.model import graphs as cuda_graphs
from llava.model.decoding.adaptive_cache import AdaptiveCache
from llava.model.decoding.decode_step import Stepper
from llava.model.decoding.prefill import StaticPrefills, prefill
from llava.model.decoding.prepared import PreparedPrompt
from llava.model.decoding.sampling import Chooser, Sampling
from llava.model.decoding.text_stream import TextStream
from llava.model.graphs import Store, capture, new_pool

# Capacities are rounded up by this where steps are captured (rounded_up): requests of similar length then share graphs.
MULTIPLE = 128
# A capture costs as much as a dozen plain steps at batch 1, so that it pays from about this many on.
WORTH_CAPTURING = 16
# Shapes of earlier requests that are remembered: steps are captured for a shape that comes again.
REMEMBERED = 256
# The share of a GPU's memory that captured things may hold which nobody is using.
IDLE_SHARE = 1 / 8


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
    """Generates with one model, one batch after another. Not for several threads at once; several generations may be under
    way in turns.

    tokenizer: for texts and stop strings; None for token ids alone. graphs: whether to capture CUDA graphs; None: where the
    model is on one CUDA device. rank_beside: on CUDA, let A-VL's re-ranking run on a side stream, beside the layers
    that follow (same tokens). graph_bytes: of captured things that are idle, which are let go of before the next prefill
    where they hold more; None: an eighth of the GPU's memory. What was used last may hold more until then: it is one
    request's KV cache, kept for the next of that shape.
    """

    def __init__(
        self,
        model,
        tokenizer=None,
        *,
        graphs: bool | None = None,
        rank_beside: bool = False,
        graph_bytes: int | None = None,
    ):
        self.model, self.tokenizer, self._rank_beside = model, tokenizer, rank_beside
        self.device = model.get_input_embeddings().weight.device
        one_gpu = cuda_graphs.available(self.device) and all(p.device == self.device for p in model.parameters())
        if (graphs or rank_beside) and not one_gpu:
            raise UserError("graphs and rank_beside need a model that is on one CUDA device as a whole")
        self.graphs = one_gpu if graphs is None else graphs
        self.ends = end_tokens(model, tokenizer)
        self.pad = pad_token(model, tokenizer)
        self._stepper = Stepper.of(model)
        self._seen: OrderedDict[tuple, None] = OrderedDict()
        if graph_bytes is None:
            graph_bytes = int(IDLE_SHARE * torch.cuda.mem_get_info(self.device)[1]) if self.device.type == "cuda" else 0
        self._store = Store(graph_bytes)
        self._pool = new_pool() if self.graphs else None
        self._prefills = StaticPrefills(model, self._store, self._stepper, pool=self._pool) if self.graphs else None
        if self.graphs:
            model.get_vision_tower().capture_with(self._store, self._pool)

    def generate(self, prepared: PreparedPrompt, sampling: Sampling | Sequence[Sampling] | None = None) -> Generated:
        """Answer every row of a batch. sampling: for all rows, or one for each; None is greedy, up to 128 tokens.

        On a GPU the cache of the result is there until the next request: its storage then goes to that.
        """
        generation = BatchGeneration(self, prepared, sampling)
        for _ in generation:
            pass
        return generation.result()

    def stream(
        self, prepared: PreparedPrompt, sampling: Sampling | Sequence[Sampling] | None = None
    ) -> BatchGeneration:
        """As generate, step by step: iterate over it for what each step adds, and ask it for result() at the end."""
        return BatchGeneration(self, prepared, sampling, streamed=True)

    # --- what is captured ------------------------------------------------------------------------------------------

    def captured_sets(self) -> list[CapturedSteps]:
        """The captured decode steps that are kept, those used last at the end."""
        return [kept for kept in self._store.all() if isinstance(kept, CapturedSteps)]

    def captured_bytes(self) -> int:
        """Bytes of everything captured that is kept: KV caches, buffers of prefills and of the vision tower."""
        return self._store.nbytes

    def release(self) -> None:
        """Let go of everything captured that no unfinished generation uses, and give its memory back to the device."""
        self._store.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # --- parts of a generation -------------------------------------------------------------------------------------

    def cache_for(self, prepared: PreparedPrompt, steps: int) -> AdaptiveCache:
        """An empty cache for a prompt and `steps` decode steps. It takes the storage of captured steps of its shape, if
        there are some that nobody is using; others are let go of where they hold too much."""
        multiple = MULTIPLE if self.graphs else 1
        cache = prepared.caching.cache(rounded_up(steps, multiple), multiple)
        captured = self._store.get(_shape(cache)) if self.graphs else None
        if captured is not None and not captured.busy:
            captured.lend_to(cache)
        self._store.evict(spare=_shape(cache))
        return cache

    def prefill(self, prepared: PreparedPrompt, cache: AdaptiveCache) -> Tensor:
        """[B, V] logits of the first new token, the prompts filled into an empty cache."""
        logits = None if self._prefills is None else self._prefills(prepared, cache)
        if logits is None and prepared.dropping is None:
            logits = prefill(self.model, prepared, cache, self._stepper)
        return self.model.prefill(prepared, cache) if logits is None else logits

    def steps_for(
        self, cache: AdaptiveCache, count: int | None = None, holder: BatchGeneration | None = None
    ) -> PlainSteps | CapturedSteps:
        """What runs the decode steps on a prefilled cache. count: how many there will be at most; None: all it has room for.
        holder: whose storage the cache is until it has ended, or is forgotten.

        Captured steps where the cache's shape has come before and enough steps are to come.
        """
        if self._rank_beside:
            cache.rank_beside()
        step = self._stepper or self.model.decode_step
        if not self.graphs or cache.tensors is None:
            return PlainSteps(step, cache)
        shape, count = _shape(cache), cache.limit if count is None else count
        captured = self._store.get(shape)
        if captured is not None and captured.cache is cache:
            return captured.begin(count, holder)
        again = shape in self._seen
        self._seen[shape] = None
        self._seen.move_to_end(shape)
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        if captured is not None or not again or count < WORTH_CAPTURING:
            return PlainSteps(step, cache)
        captured = CapturedSteps(step, cache, self._pool)
        self._store.put(shape, captured)
        return captured.begin(count, holder)


def _shape(cache: AdaptiveCache) -> tuple:
    """What captured steps are kept by."""
    return ("steps", cache.layout.key)


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
        self._failed = False
        self._ahead = False  # whether the step that comes next has been launched
        self._ended: Tensor | None = None  # [B] bool on the device: rows that are fed padding from now on
        self._count_ended = 0

    def __iter__(self) -> Iterator[list[New | None]]:
        return self

    def __next__(self) -> list[New | None]:
        if self.ended:
            raise StopIteration
        self._failed = True  # until the step is through
        outputs = self._next()
        self._failed = False
        return outputs

    @torch.inference_mode()
    def _next(self) -> list[New | None]:
        start = time.perf_counter()
        stage = "prefill" if self.logits is None else "decode"
        # 1. The tokens of this step, unless the step before has launched it already.
        if not self._ahead:
            self._launch()
        self._ahead = False
        fetched = self._fetch()
        # 2. The step after it, so that the device has work while the host reads this one's tokens.
        if self._looks_ahead():
            self._launch()
            self._ahead = True
        # 3. What the host makes of the tokens; it waits for the device here and nowhere else.
        outputs = [self._add(row, token) for row, token in enumerate(fetched())]
        self.seconds[stage] += time.perf_counter() - start
        return outputs

    def _launch(self) -> None:
        """Prefill, or a step: the logits and the tokens that are chosen by them."""
        self.logits = self._prefill() if self.logits is None else self._steps(self._tokens)
        self._tokens = self._choose(self.logits)
        self._pad_ended()

    def _looks_ahead(self) -> bool:
        """Whether the next step may be launched before the tokens of this one are known.

        It is in vain where they end the answer, so that only answers that have gone on for a while are worth it; and no
        step is launched that no row can need.
        """
        done = max(len(answer.tokens) for answer in self.answers) + 1
        open_rows = [
            one.max_new_tokens > len(answer.tokens) + 1
            for one, answer in zip(self.sampling, self.answers, strict=True)
            if answer.finish is None
        ]
        return self._engine.graphs and done >= WORTH_CAPTURING and any(open_rows)

    def _fetch(self) -> Callable[[], list[int]]:
        """Start bringing the chosen tokens to the host; call the result for them."""
        if not self._tokens.is_cuda:
            return self._tokens.tolist
        host = torch.empty(self._tokens.shape, dtype=self._tokens.dtype, pin_memory=True)
        host.copy_(self._tokens, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

        def tokens() -> list[int]:
            arrived.synchronize()
            return host.tolist()

        return tokens

    @property
    def ended(self) -> bool:
        """Whether no step is to come: every row has ended, or a step failed."""
        return self._failed or all(answer.finish for answer in self.answers)

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

    def _pad_ended(self) -> None:
        """Feed padding to rows that have ended. Which those are goes to the device when it changes, not at every step."""
        ended = [answer.finish is not None for answer in self.answers]
        if sum(ended) != self._count_ended:
            self._count_ended = sum(ended)
            self._ended = torch.tensor(ended).to(self._tokens.device)
        if self._ended is not None:
            self._tokens.masked_fill_(self._ended, self._engine.pad)

    def _prefill(self) -> Tensor:
        """[B, V] logits of the first new token; the cache is filled, and what decodes on it is ready.

        Where memory runs out, what the engine has kept of earlier requests goes, and prefill is tried once more.
        """
        engine = self._engine
        try:
            return self._prefilled()
        except torch.OutOfMemoryError:
            if not engine.captured_bytes():
                raise
        # Behind the except: while the error is held, its traceback holds the tensors of the failed attempt.
        self.cache = self._steps = None
        engine.release()
        return self._prefilled()

    def _prefilled(self) -> Tensor:
        engine, prepared = self._engine, self._prepared
        steps = max(one.max_new_tokens for one in self.sampling) - 1  # the last token is never fed back
        cache = engine.cache_for(prepared, steps)
        logits = engine.prefill(prepared, cache)
        self._steps, self.cache = engine.steps_for(cache, steps, self), cache
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

    def __init__(self, step: Callable[[Tensor, AdaptiveCache], Tensor], cache: AdaptiveCache):
        self._step, self.cache = step, cache

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [B] -> logits [B, V] of those that follow."""
        self.cache.begin_step(1)
        return self._step(tokens, self.cache)


class CapturedSteps:
    """Decode steps as CUDA graphs over the storage of one cache, lent to request after request of its shape.

    Steps that re-rank and steps that do not are captured apart. The first of either kind runs plainly: it compiles kernels
    and sets up libraries, which must not happen under capture. Capturing runs nothing, so the step is then replayed. Where
    a capture fails, steps run plainly.

    graphs: by whether the step re-ranks. left: steps that the request at hand may still take.
    """

    def __init__(self, step: Callable[[Tensor, AdaptiveCache], Tensor], cache: AdaptiveCache, pool=None):
        self._step, self.cache, self._pool = step, cache, pool
        self._tensors = cache.tensors
        self._tokens = self._tensors.positions.new_zeros(len(self._tensors.positions))
        self.graphs: dict[bool, torch.cuda.CUDAGraph] = {}
        self._logits: dict[bool, Tensor] = {}
        self._ran: set[bool] = set()
        self._captures, self.left = True, 0
        self._holder: Callable[[], BatchGeneration | None] = lambda: None

    @property
    def nbytes(self) -> int:
        """Bytes of the KV cache and of what the graphs leave in buffers of their own."""
        return self._tensors.nbytes + sum(logits.nbytes for logits in self._logits.values())

    @property
    def busy(self) -> bool:
        """Whether a generation that is not at its end decodes on the storage."""
        holder = self._holder()
        return holder is not None and not holder.ended

    def begin(self, count: int, holder: BatchGeneration | None) -> CapturedSteps:
        """Go on with the request whose prompt the storage holds, for at most `count` steps."""
        self.left = count
        self._holder = (lambda: None) if holder is None else weakref.ref(holder)
        return self

    def lend_to(self, cache: AdaptiveCache) -> None:
        """Let a cache of the same shape be prefilled into the storage. The one before is refused from now on."""
        self.cache.give_up_tensors()
        cache.use_tensors(self._tensors)
        self.cache = cache

    def __call__(self, tokens: Tensor) -> Tensor:
        """tokens [B] -> logits [B, V] of those that follow, valid until the next call."""
        self._tokens.copy_(tokens)
        self.cache.begin_step(1)
        kind = self.cache.update_step
        self.left -= 1
        if kind not in self.graphs and kind in self._ran and self._captures and self.left + 1 >= WORTH_CAPTURING:
            self._capture(kind)
        if kind in self.graphs:
            self.graphs[kind].replay()
            return self._logits[kind]
        self._ran.add(kind)
        return self._step(self._tokens, self.cache)

    def _capture(self, kind: bool) -> None:
        found: list[Tensor] = []
        graph = capture(lambda: found.append(self._step(self._tokens, self.cache)), self._pool)
        if graph is None:
            self._captures = False
        else:
            self.graphs[kind], self._logits[kind] = graph, found[0]


def end_tokens(model, tokenizer=None) -> set[int]:
    """Tokens that end an answer: those of the generation configuration, and the tokenizer's."""
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return {end for end in [*ends, getattr(tokenizer, "eos_token_id", None)] if end is not None}


def pad_token(model, tokenizer=None) -> int:
    """What a row that has ended is fed while others go on."""
    pad = getattr(tokenizer, "pad_token_id", None)
    return pad if pad is not None else min(end_tokens(model, tokenizer), default=0)

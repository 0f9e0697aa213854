"""The generation engine: from a PreparedPrompt to answers, on storage of a size that is known before prefill.

    engine = Engine(model, tokenizer)
    answers = engine.generate(model.prepare(input_ids, images, image_sizes), Sampling(max_new_tokens=64)).answers
    for outputs in engine.stream(prepared, Sampling()): ...       # token by token

One prefill fills an AdaptiveCache under any policy (llava/methods/kv_cache). Every decode step then writes one entry
per layer and row and reads the entries that the policy lists. On one CUDA device, work that repeats in the same shapes
is captured as CUDA graphs: the vision tower per number of tiles; short prefills, padded to few lengths; and decode
steps, with one graph for update steps and one for the others. Elsewhere everything runs without graphs. generate() of
transformers gives the same greedy tokens. It also does what the engine does not (beams, assistants, logits processors).
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
from llava.model.decoding.shared_prefill import prefill_shared
from llava.model.decoding.text_stream import TextStream
from llava.model.graphs import Pool, Store, capture

# Where steps are captured, capacities are rounded up to a multiple of this at batch 1 (capacity_multiple, rounded_up).
# Requests of similar length then share graphs.
CAPACITY_MULTIPLE = 128
# A capture costs as much as a dozen plain steps at batch 1, so it pays from about this many steps on.
MIN_STEPS_TO_CAPTURE = 16
# How many shapes of earlier requests are remembered. Steps are captured only for a shape that repeats.
REMEMBERED = 256
# Share of a GPU's memory that idle captured graphs and their buffers may hold.
IDLE_SHARE = 1 / 8


@dataclass
class Answer:
    """The answer of one row.

    tokens: token ids, the end token included
    text: the decoded text without special tokens, cut before the stop string; None without a tokenizer
    finish: "stop" for an end token or a stop string, "length" for max_new_tokens, or "cancelled"
    """

    tokens: list[int] = field(default_factory=list)
    text: str | None = None
    finish: str | None = None


@dataclass
class Generated:
    """Result of a batch. answers: one per row; cache: its final state; seconds: of "prefill" and "decode"."""

    answers: list[Answer]
    cache: AdaptiveCache
    seconds: dict[str, float]


class Engine:
    """Generates with one model, one batch after another.

    Only one thread may use it at a time. The steps of several generations may alternate.

    tokenizer: for texts and stop strings; None for token ids only
    graphs: whether to capture CUDA graphs; None captures where the model is on one CUDA device
    rank_beside: on CUDA, run A-VL's ranking on a side stream, in parallel with the layers that follow (same tokens)
    graph_bytes: limit of idle captured graphs and buffers; None is an eighth of the GPU's memory. They are freed before
        the next prefill where they hold more. Until then the newest may exceed the limit: it is the KV cache of one
        request, kept for the next request of that shape.
    UserError for graphs or rank_beside where the model is not on one CUDA device.
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
        self.ends = end_tokens(model.generation_config, tokenizer)
        self.pad = pad_token(model, tokenizer)
        self._stepper = Stepper.for_model(model)
        self._seen: OrderedDict[tuple, None] = OrderedDict()
        if graph_bytes is None:
            graph_bytes = int(IDLE_SHARE * torch.cuda.mem_get_info(self.device)[1]) if self.device.type == "cuda" else 0
        self._store = Store(graph_bytes)
        self._pool = Pool() if self.graphs else None
        self._prefills = StaticPrefills(model, self._store, self._stepper, pool=self._pool) if self.graphs else None
        if self.graphs:
            model.get_vision_tower().capture_with(self._store, self._pool)

    def generate(self, prepared: PreparedPrompt, sampling: Sampling | Sequence[Sampling] | None = None) -> Generated:
        """Return the answers of all rows of a batch.

        sampling: one for all rows, or one per row; None is greedy, up to 128 tokens
        On a GPU the cache of the result is valid until the next request, which may take over its storage.
        """
        generation = BatchGeneration(self, prepared, sampling)
        for _ in generation:
            pass
        return generation.result()

    def stream(
        self, prepared: PreparedPrompt, sampling: Sampling | Sequence[Sampling] | None = None
    ) -> BatchGeneration:
        """Return a generation to iterate over: each item is the output of one step. result() gives all answers."""
        return BatchGeneration(self, prepared, sampling, streamed=True)

    # --- captured graphs -------------------------------------------------------------------------------------------

    def captured_sets(self) -> list[CapturedSteps]:
        """Return the captured decode steps that are stored, the most recently used last."""
        return [kept for kept in self._store.all() if isinstance(kept, CapturedSteps)]

    def captured_bytes(self) -> int:
        """Return the bytes of all stored captured work: KV caches, buffers of prefills and of the vision tower."""
        return self._store.nbytes

    def release(self) -> None:
        """Free all captured work that no unfinished generation uses, and give its memory back to the device."""
        self._store.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # --- parts of a generation -------------------------------------------------------------------------------------

    def cache_for(self, prepared: PreparedPrompt, steps: int) -> AdaptiveCache:
        """Return an empty cache for a prompt and `steps` decode steps.

        It takes over the storage of idle captured steps of its shape. Other idle captured work is freed where it
        exceeds the limit.
        """
        multiple = capacity_multiple(len(prepared.lengths)) if self.graphs else 1
        cache = prepared.caching.cache(rounded_up(steps, multiple), multiple)
        captured = self._store.get(_shape(cache)) if self.graphs else None
        if captured is not None and not captured.busy:
            captured.lend_to(cache)
        self._store.evict(spare=_shape(cache))
        return cache

    def prefill(self, prepared: PreparedPrompt, cache: AdaptiveCache) -> Tensor:
        """Prefill the prompts into an empty cache and return the logits [B, V] of the first new token."""
        # From the fastest way to the most general one: a captured prefill, shared prefixes, fused layers, the loop that
        # drops tokens.
        logits = None if self._prefills is None else self._prefills(prepared, cache)
        if logits is None and prepared.prefixes:
            logits = prefill_shared(self.model, prepared, cache, self._stepper)
        if logits is None and prepared.dropping is None:
            logits = prefill(self.model, prepared, cache, self._stepper)
        return self.model.prefill(prepared, cache) if logits is None else logits

    def steps_for(
        self, cache: AdaptiveCache, count: int | None = None, holder: BatchGeneration | None = None
    ) -> PlainSteps | CapturedSteps:
        """Return the object that runs decode steps on a prefilled cache.

        These are captured steps where the shape of the cache has come before and enough steps follow; plain steps
        otherwise.
        count: the most steps that follow; None is all that the cache has room for
        holder: the generation that owns the storage until it has ended or is garbage-collected
        """
        # 1. Without graphs, plain steps.
        if self._rank_beside:
            cache.rank_beside()
        step = self._stepper or self.model.decode_step
        if not self.graphs or cache.tensors is None:
            return PlainSteps(step, cache)
        # 2. Steps that were captured on this storage.
        shape, count = _shape(cache), cache.limit if count is None else count
        captured = self._store.get(shape)
        if captured is not None and captured.cache is cache:
            return captured.begin(count, holder)
        # 3. New captured steps, for a shape that repeats. A shape whose stored steps are busy is not captured twice.
        again = shape in self._seen
        self._seen[shape] = None
        self._seen.move_to_end(shape)
        while len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        if captured is not None or not again or count < MIN_STEPS_TO_CAPTURE:
            return PlainSteps(step, cache)
        captured = CapturedSteps(step, cache, self._pool)
        self._store.put(shape, captured)
        return captured.begin(count, holder)


def _shape(cache: AdaptiveCache) -> tuple:
    """Return the key under which captured steps are stored."""
    return ("steps", cache.layout.key)


@dataclass(frozen=True)
class StepOutput:
    """Output of one step for one row.

    token: the new token; text: newly certain text, None without a text stream; finish: why the row ended, None if it
    did not
    """

    token: int
    text: str | None
    finish: str | None


class BatchGeneration:
    """One batch in generation: an iterator over steps. A step gives one StepOutput per row, None for ended rows."""

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
        self.logits: Tensor | None = None  # [B, V] of the newest step; it may be one step ahead of the answers
        self._steps: PlainSteps | CapturedSteps | None = None
        self._failed = False
        self._ahead = False  # whether the next step has been launched already
        self._ended: Tensor | None = None  # [B] bool on the device: rows that are fed padding from now on
        self._count_ended = 0

    def __iter__(self) -> Iterator[list[StepOutput | None]]:
        return self

    def __next__(self) -> list[StepOutput | None]:
        if self.ended:
            raise StopIteration
        self._failed = True  # stays True if the step raises: the cache is then in an unknown state
        outputs = self._next()
        self._failed = False
        return outputs

    @torch.inference_mode()
    def _next(self) -> list[StepOutput | None]:
        start = time.perf_counter()
        stage = "prefill" if self.logits is None else "decode"
        # 1. Launch this step, unless the step before has launched it.
        if not self._ahead:
            self._launch()
        self._ahead = False
        fetched = self._fetch()
        # 2. Launch the next step, so that the device has work while the host reads the tokens of this one.
        if self._looks_ahead():
            self._launch()
            self._ahead = True
        # 3. Add the tokens to the answers. Only here does the host wait for the device.
        outputs = [self._add(row, token) for row, token in enumerate(fetched())]
        self.seconds[stage] += time.perf_counter() - start
        return outputs

    def _launch(self) -> None:
        """Launch prefill or a step, and the choice of the tokens."""
        self.logits = self._prefill() if self.logits is None else self._steps(self._tokens)
        self._tokens = self._choose(self.logits)
        self._pad_ended()

    def _looks_ahead(self) -> bool:
        """Return whether the next step may be launched before the tokens of this one are known.

        The launch is wasted where these tokens end the answer. Therefore short answers never launch ahead, and no step
        is launched that no row can need.
        """
        done = max(len(answer.tokens) for answer in self.answers) + 1
        open_rows = [
            one.max_new_tokens > len(answer.tokens) + 1
            for one, answer in zip(self.sampling, self.answers, strict=True)
            if answer.finish is None
        ]
        return self._engine.graphs and done >= MIN_STEPS_TO_CAPTURE and any(open_rows)

    def _fetch(self) -> Callable[[], list[int]]:
        """Start the copy of the chosen tokens to the host; the returned function waits for it and gives the tokens."""
        if not self._tokens.is_cuda:
            return self._tokens.tolist
        # A pinned buffer and an event: .tolist() would wait for all work on the device, the next step included.
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
        """Whether no step follows: every row has ended, or a step has failed."""
        return self._failed or all(answer.finish for answer in self.answers)

    def cancel(self, row: int) -> None:
        """End a row early. Its answer is what it has so far, and the other rows continue."""
        if self.answers[row].finish is None:
            self.answers[row].finish = "cancelled"

    def result(self) -> Generated:
        """Return all answers, after running the steps that are left."""
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
        """Replace the tokens of ended rows by padding. The mask goes to the device only when it changes."""
        ended = [answer.finish is not None for answer in self.answers]
        if sum(ended) != self._count_ended:
            self._count_ended = sum(ended)
            self._ended = torch.tensor(ended).to(self._tokens.device)
        if self._ended is not None:
            self._tokens.masked_fill_(self._ended, self._engine.pad)

    def _prefill(self) -> Tensor:
        """Prefill, prepare the decode steps, and return the logits [B, V] of the first new token.

        Where memory runs out, the captured work of earlier requests is freed, and prefill is tried once more.
        """
        engine = self._engine
        try:
            return self._prefilled()
        except torch.OutOfMemoryError:
            if not engine.captured_bytes():
                raise
        # Not inside the except block: there the error's traceback still holds the tensors of the failed attempt.
        self.cache = self._steps = None
        engine.release()
        return self._prefilled()

    def _prefilled(self) -> Tensor:
        """Make one attempt of `_prefill`."""
        engine, prepared = self._engine, self._prepared
        steps = max(one.max_new_tokens for one in self.sampling) - 1  # the last token is never fed back
        cache = engine.cache_for(prepared, steps)
        logits = engine.prefill(prepared, cache)
        self._steps, self.cache = engine.steps_for(cache, steps, self), cache
        return logits

    def _add(self, row: int, token: int) -> StepOutput | None:
        """Add a token to the answer of a row; return its output, or None for a row that had ended."""
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
        return StepOutput(token, text, answer.finish)


class PlainSteps:
    """Decode steps without CUDA graphs."""

    def __init__(self, step: Callable[[Tensor, AdaptiveCache], Tensor], cache: AdaptiveCache):
        self._step, self.cache = step, cache

    def __call__(self, tokens: Tensor) -> Tensor:
        """Run one step on tokens [B] and return the logits [B, V] of the tokens that follow."""
        self.cache.begin_step(1)
        return self._step(tokens, self.cache)


class CapturedSteps:
    """Decode steps as CUDA graphs over the storage of one cache, which serves one request of its shape after another.

    Update steps and other steps have separate graphs. The first step of each kind runs without a graph: it compiles
    kernels and sets up libraries, which must not happen during a capture. A capture executes nothing, so the captured
    step is replayed at once. Where a capture fails, steps run without graphs.

    graphs: by whether the step is an update step; left: steps that the current request may still take
    """

    def __init__(self, step: Callable[[Tensor, AdaptiveCache], Tensor], cache: AdaptiveCache, pool: Pool | None = None):
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
        """Bytes of the KV cache and of the graphs' output buffers."""
        return self._tensors.nbytes + sum(logits.nbytes for logits in self._logits.values())

    @property
    def busy(self) -> bool:
        """Whether an unfinished generation decodes on the storage."""
        # A weak reference: a generation that a caller abandoned must not block the storage.
        holder = self._holder()
        return holder is not None and not holder.ended

    def begin(self, count: int, holder: BatchGeneration | None) -> CapturedSteps:
        """Start the decoding of the request whose prompt is in the storage, for at most `count` steps."""
        self.left = count
        self._holder = (lambda: None) if holder is None else weakref.ref(holder)
        return self

    def lend_to(self, cache: AdaptiveCache) -> None:
        """Lend the storage to a new cache of the same shape. Any later use of the old cache raises UserError."""
        self.cache.give_up_tensors()
        cache.use_tensors(self._tensors)
        self.cache = cache

    def __call__(self, tokens: Tensor) -> Tensor:
        """Run one step on tokens [B]; return the logits [B, V] of the tokens that follow, valid until the next call."""
        # Copied, because the graph reads its input at a fixed address.
        self._tokens.copy_(tokens)
        self.cache.begin_step(1)
        kind = self.cache.update_step
        self.left -= 1
        if kind not in self.graphs and kind in self._ran and self._captures and self.left + 1 >= MIN_STEPS_TO_CAPTURE:
            self._capture(kind)
        if kind in self.graphs:
            self.graphs[kind].replay()
            return self._logits[kind]
        self._ran.add(kind)
        return self._step(self._tokens, self.cache)

    def _capture(self, kind: bool) -> None:
        """Capture steps of one kind; after a failure no further capture is tried."""
        found: list[Tensor] = []
        graph = capture(lambda: found.append(self._step(self._tokens, self.cache)), self._pool)
        if graph is None:
            self._captures = False
        else:
            self.graphs[kind], self._logits[kind] = graph, found[0]


def capacity_multiple(batch: int) -> int:
    """Return the multiple to which the capacities of a batch are rounded up where steps are captured."""
    # The memory that rounding wastes grows with the rows. With 128 for every batch, 32 rows of 3,072 tokens of a 7B model
    # needed 8.6 GB more than their entries, and did not fit on an H100.
    return {1: CAPACITY_MULTIPLE, 2: CAPACITY_MULTIPLE // 2}.get(batch, CAPACITY_MULTIPLE // 4)


def end_tokens(generation_config, tokenizer=None) -> set[int]:
    """Return the tokens that end an answer: those of the generation configuration and that of the tokenizer."""
    ends = generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return {end for end in [*ends, getattr(tokenizer, "eos_token_id", None)] if end is not None}


def pad_token(model, tokenizer=None) -> int:
    """Return the token that ended rows are fed while others continue; any valid id would do."""
    pad = getattr(tokenizer, "pad_token_id", None)
    return pad if pad is not None else min(end_tokens(model.generation_config, tokenizer), default=0)

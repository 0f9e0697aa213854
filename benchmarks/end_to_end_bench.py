"""Who is measured in benchmarks/end_to_end.py, whether their answers are right, and the measuring itself."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace

import torch
from memory import (
    OUT_OF_MEMORY,
    Peak,
    attempt,
    bare_step,
    copy_bandwidth,
    decode_weight_bytes,
    free_memory,
    read_bandwidth,
)
from providers import Answer, Models, Ours, OursByEngine, Provider, Transformers, Upstream
from shapes import Preset, Prompts, random_model
from torch import Tensor

from llava.analysis.self_check import FLOAT32_LIMIT, HALF_LIMITS
from llava.common.progress import progress_bar
from llava.config import AdaVConfig
from llava.costs.flops import Cost, allocated_kv_bytes, predict

# Other vision tokens that the float32 models may keep on a GPU. Its kernels sum in another order for every shape and
# backend, so that a near tie at the edge of a list may go either way; on a CPU it does not.
OTHER_TOKENS = 0.02
# Untimed answers after the check. On a GPU the first of a shape compiles kernels and sets up libraries, the second
# captures graphs, and what the check had captured has been let go of.
WARM_UPS = {"cpu": 1, "cuda": 2}


@dataclass
class Entry:
    """One line of the table: a provider under a configuration, the provider it is compared with, and its answers.

    same_as: a provider that has to give the very same tokens under every cache policy (the engine's generate()).
    out_of_memory: whether an answer did not fit; there are none then. checked: the tokens that every timed answer has to
    have in float32; None for what is not timed.
    """

    provider: Provider
    label: str
    reference: Provider | None
    same_as: Provider | None = None
    answers: list[Answer] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    same_tokens: float | None = None
    out_of_memory: bool = False
    checked: Tensor | None = None

    @property
    def name(self) -> str:
        return f"{self.provider.name} ({self.label})"

    @property
    def key(self) -> tuple[str, str]:
        return self.provider.name, self.label


class Bench:
    """A model with random weights, and who answers with it under which configurations.

    providers: names; configs: by what they are called. `entries` are the lines of the table; `bandwidth` and `reading` are
    the fastest copy and the fastest pass of reading alone so far, in bytes per second; `bare` has, by rows at once, the
    seconds of the fastest pass over a decode step's products alone.
    """

    def __init__(
        self, preset: Preset, layers: int | None, device: str, dtype: torch.dtype, seed: int, providers, configs: dict
    ):
        self.preset, self.device, self.dtype, self.seed = preset, device, dtype, seed
        model = random_model(preset.model_config(newline=True, layers=layers), device, dtype, seed)
        self.models = Models(model)
        self.weights, self.bandwidth, self.reading = decode_weight_bytes(model), 0.0, 0.0
        self.bare: dict[int, float] = {}
        self.entries = self._entries(providers, configs)

    def _entries(self, chosen, configs: dict[str, AdaVConfig]) -> list[Entry]:
        whole = Transformers(self.models, AdaVConfig(method="none"))
        entries = [Entry(whole, "all tokens", None)] if "transformers" in chosen else []
        for label, config in configs.items():
            reference = None
            if config.method == "none" and not config.prefill_filter_flag:
                reference = whole
            elif Upstream.can(config):
                reference = Upstream(self.models, config)
                if "upstream" in chosen and config.cache_policy == "full":
                    entries.append(Entry(reference, label, None))
            ours = Ours(self.models, config)
            if "ours" in chosen:
                entries.append(Entry(ours, label, reference))
            if "engine" in chosen:
                entries.append(Entry(OursByEngine(self.models, config), label, reference, ours))
        return entries

    @property
    def other_tokens(self) -> float:
        """The share of other vision tokens that float32 answers may keep."""
        return OTHER_TOKENS if self.device == "cuda" else 0.0

    def prompts(self, batch: int) -> Prompts:
        model = self.models.ours
        return Prompts.random(self.preset, model.config, model.lm_head.weight, batch, self.seed)

    def cost(self, config: AdaVConfig, prompts: Prompts) -> Cost:
        return predict(prompts.shape, config, [prompts.image], sum(prompts.text), [prompts.text[1]])

    def release(self) -> None:
        """Let go of what providers keep between answers, and of what nobody holds any more."""
        for entry in self.entries:
            entry.provider.release()
        free_memory(self.device)

    def _answer(self, provider: Provider, prompts: Prompts, new_tokens: int, logits: bool = False) -> Answer | str:
        """An answer, or why there is none (attempt)."""
        answer, failure = attempt(lambda: provider.answer(prompts, new_tokens, logits))
        if failure:
            self.release()
        return failure or answer

    @torch.inference_mode()
    def right(self, prompts: Prompts, new_tokens: int, entries=None) -> tuple[list[Entry], list[str]]:
        """Entries whose answers are right, with each one's first answer, and what is wrong with the others. Those that run
        out of memory are among the former, without an answer. entries: all unless given."""
        truths: dict[int, Answer | str] = {}
        right, complaints = [], []
        for entry in progress_bar("checking", self.entries if entries is None else entries, unit=" providers"):
            for provider in (entry.provider, entry.reference, entry.same_as):
                if provider is not None and id(provider) not in truths:
                    truths[id(provider)] = self._answer(provider, prompts, new_tokens, logits=True)
            answer = truths[id(entry.provider)]
            wrong = self._complaint(entry, answer, truths, prompts, new_tokens)
            if wrong:
                complaints.append(f"{entry.name}: {wrong}, so it gets no time")
            else:
                failed = answer == OUT_OF_MEMORY
                right.append(replace(entry, answers=[] if failed else [answer], peaks=[], out_of_memory=failed))
            self.release()
        return right, complaints

    def _complaint(
        self, entry: Entry, answer: Answer | str, truths: dict, prompts: Prompts, new_tokens: int
    ) -> str | None:
        """What is wrong with an answer, of all that can be; None where nothing is, or where memory did not suffice."""
        if isinstance(answer, str):
            return None if answer == OUT_OF_MEMORY else f"it fails ({answer})"
        for other in (entry.reference, entry.same_as):
            truth = truths[id(other)] if other is not None else None
            if isinstance(truth, str):
                why = "runs out of memory (--check-batch compares fewer rows)" if truth == OUT_OF_MEMORY else "fails"
                return f"{other.name}, which it is compared with, {why}"
        wrong = self._wrong(entry, answer, truths.get(id(entry.reference)), prompts, new_tokens)
        if wrong is None and entry.same_as is not None and self.dtype == torch.float32:
            return self._unequal(answer, truths[id(entry.same_as)], entry.same_as.name)
        return wrong

    def _unequal(self, answer: Answer, truth: Answer, other: str) -> str | None:
        """Whether tokens are not the very same that another way of ours gave to the same vision tokens."""
        alike, apart = _same_choices(answer, truth)
        if apart > self.other_tokens:
            return f"it keeps other vision tokens than {other}"
        same = (answer.tokens == truth.tokens)[alike]
        return None if same.all() else f"{1 - same.float().mean():.0%} of its tokens are not those of {other}"

    def _wrong(
        self, entry: Entry, answer: Answer, truth: Answer | None, prompts: Prompts, new_tokens: int
    ) -> str | None:
        """What is wrong with an answer; None where nothing is."""
        rows = len(prompts.ids)
        if tuple(answer.tokens.shape) != (rows, new_tokens):
            return f"it gave {list(answer.tokens.shape)} tokens, asked were {[rows, new_tokens]}"
        if not torch.isfinite(answer.logits).all():
            return "its logits are not finite"
        config = entry.provider.config
        costs = [self.cost(config, prompts)] * (rows if entry.provider.side_by_side else 1)
        expected = allocated_kv_bytes(costs, self.dtype.itemsize, new_tokens - 1, entry.provider.multiple)
        if answer.kv != expected:
            return f"its KV cache has {answer.kv:,} bytes, expected are {expected:,}"
        if truth is None:
            return None
        other = entry.reference.name
        exact = self.dtype == torch.float32
        entry.same_tokens = float((answer.tokens == truth.tokens).float().mean())
        alike, apart = _same_choices(answer, truth)
        if exact and apart > self.other_tokens:
            return f"it keeps other vision tokens than {other}"
        if not alike.any():
            return None  # the LLM read something else in every row
        return self._unlike(
            (answer.logits[alike], answer.tokens[alike]), (truth.logits[alike], truth.tokens[alike]), other, config
        )

    def _unlike(self, ours, theirs, other: str, config: AdaVConfig) -> str | None:
        """Whether logits and tokens of the same prompts and the same vision tokens are further apart than they may be."""
        (logits, tokens), (expected, expected_tokens) = ours, theirs
        apart = logits - expected
        if self.dtype == torch.float32:
            if float(apart.abs().max()) > FLOAT32_LIMIT:
                return f"its logits are up to {float(apart.abs().max()):.1e} from those of {other}, allowed is {FLOAT32_LIMIT:g}"
            same = float((tokens == expected_tokens).float().mean())
            if config.cache_policy == "full" and same < 1:
                return f"{1 - same:.0%} of its tokens are not those of {other}"
            return None
        spread = expected - expected.mean(dim=-1, keepdim=True)
        relative = float(apart.square().mean().sqrt() / spread.square().mean().sqrt())
        if relative > HALF_LIMITS[self.dtype]:
            return f"its logits are {relative:.1%} of their spread from those of {other}, allowed is {HALF_LIMITS[self.dtype]:.0%}"
        return None

    def groups(self, entries: list[Entry]) -> list[list[Entry]]:
        """Who is measured together. On a CPU all take turns in every repetition, so that a machine that slows down slows all
        of them. On a GPU what an engine keeps would then be in the others' memory: there each is alone."""
        return [[entry] for entry in entries] if self.device == "cuda" else [list(entries)]

    @torch.inference_mode()
    def measure(self, group: list[Entry], prompts: Prompts, new_tokens: int, repeats: int) -> list[str]:
        """Time the entries of a group, say what was wrong with some of them, and leave the others in it."""
        complaints: list[str] = []
        timed = [entry for entry in group if not entry.out_of_memory]
        with progress_bar("measuring", total=repeats * len(timed), unit=" answers") as shown:
            for repeat in range(repeats if timed else 0):
                if repeat == 0 or self.device != "cuda":  # later the memory of a GPU may be full of what is measured
                    self._yardsticks(timed, prompts)
                for entry in [] if repeat else timed:
                    complaints += self._warm_up(entry, prompts, new_tokens)
                for entry in [entry for entry in timed if entry.checked is not None]:
                    complaints += self._repeat(entry, prompts, new_tokens, repeat + 1)
                    shown.update()
        self.release()
        group[:] = [entry for entry in group if entry.out_of_memory or entry.checked is not None]
        return complaints

    def _yardsticks(self, entries: list[Entry], prompts: Prompts) -> None:
        """What the speed of decoding is set against."""
        self.bandwidth = max(self.bandwidth, copy_bandwidth(self.device))
        self.reading = max(self.reading, read_bandwidth(self.device))
        for rows in {len(prompts.ids) if entry.provider.side_by_side else 1 for entry in entries}:
            passed = bare_step(self.models.ours, rows)
            self.bare[rows] = min(passed, self.bare.get(rows, passed))
        free_memory(self.device)

    def _warm_up(self, entry: Entry, prompts: Prompts, new_tokens: int) -> list[str]:
        """Answers that are not timed. The tokens of the check, or of the first where that was on other rows, are those of
        every answer to come."""
        checked = entry.answers.pop().tokens
        entry.checked = checked if len(checked) == len(prompts.ids) else None
        for _ in range(WARM_UPS[self.device]):
            answer = self._answer(entry.provider, prompts, new_tokens)
            if isinstance(answer, str):
                return self._fails(entry, answer)
            if entry.checked is None:
                entry.checked = answer.tokens
            elif self._differs(entry, answer):
                return self._refuse(entry, "its answer after the check")
        return []

    def _repeat(self, entry: Entry, prompts: Prompts, new_tokens: int, number: int) -> list[str]:
        gc.collect()
        peak = Peak(self.device)
        answer = self._answer(entry.provider, prompts, new_tokens)
        if isinstance(answer, str):
            return self._fails(entry, answer)
        entry.peaks.append(peak.bytes() or 0)
        entry.answers.append(answer)
        return self._refuse(entry, f"repetition {number}") if self._differs(entry, answer) else []

    @staticmethod
    def _fails(entry: Entry, failure: str) -> list[str]:
        entry.checked, entry.out_of_memory = None, failure == OUT_OF_MEMORY
        entry.answers.clear()
        return [] if entry.out_of_memory else [f"{entry.name}: it fails ({failure}), so it gets no time"]

    def _differs(self, entry: Entry, answer: Answer) -> bool:
        return self.dtype == torch.float32 and not torch.equal(answer.tokens, entry.checked)

    @staticmethod
    def _refuse(entry: Entry, what: str) -> list[str]:
        entry.checked = None
        return [f"{entry.name}: {what} gave other tokens, so it gets no time"]


def _same_choices(answer: Answer, truth: Answer) -> tuple[Tensor, float]:
    """([B] bool: rows in which the same vision tokens were kept, the share of tokens that were not)."""
    if not truth.kept:
        return torch.ones(len(answer.tokens), dtype=torch.bool), 0.0
    pairs = list(zip(answer.kept, truth.kept, strict=True))
    others = [int((~torch.isin(ours, theirs)).sum()) for ours, theirs in pairs]
    alike = torch.tensor([torch.equal(ours, theirs) for ours, theirs in pairs])
    apart = sum(others) / max(1, sum(len(ours) for ours, _ in pairs))
    # Rows with as many tokens of which none is another one, but in another order or number, are not alike either.
    return alike, apart if any(others) or alike.all() else 1.0

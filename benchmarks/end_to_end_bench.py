"""The providers that benchmarks/end_to_end.py measures, the check of their answers, and the measurement."""

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

# Share of vision tokens in which float32 answers may differ on a GPU. GPU kernels sum in another order for every shape
# and backend, so a near tie at the end of a ranking can go either way. On a CPU it does not.
OTHER_TOKENS = 0.02
# Untimed answers after the check. On a GPU, the first answer of a shape compiles kernels and sets up libraries, and the
# second one captures graphs. The graphs that the check captured are released by then.
WARM_UPS = {"cpu": 1, "cuda": 2}


@dataclass
class Entry:
    """One line of the table: a provider with its configuration, and its answers.

    reference: the provider that it is compared with. same_as: a provider that must give exactly the same tokens under
    every cache policy (generate() for the engine). peaks: peak memory of each timed answer, in bytes. same_tokens:
    share of tokens that equal those of the reference. out_of_memory: an answer did not fit, and there are none.
    checked: the tokens that every timed answer must have in float32; None if the entry is not timed.
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
    """A model with random weights, and the providers and configurations that answer with it.

    providers: their names. configs: configurations by label. entries: lines of the table. bandwidth, reading: the
    fastest copy and the fastest reading so far, in bytes per second. bare: number of rows -> seconds of the fastest
    pass over the products of a decode step alone.
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
        """Share of vision tokens in which float32 answers may differ."""
        return OTHER_TOKENS if self.device == "cuda" else 0.0

    def prompts(self, batch: int) -> Prompts:
        model = self.models.ours
        return Prompts.random(self.preset, model.config, model.lm_head.weight, batch, self.seed)

    def cost(self, config: AdaVConfig, prompts: Prompts) -> Cost:
        return predict(prompts.shape, config, [prompts.image], sum(prompts.text), [prompts.text[1]])

    def release(self) -> None:
        """Free what providers keep between answers, and give unused memory back to the device."""
        for entry in self.entries:
            entry.provider.release()
        free_memory(self.device)

    def _answer(self, provider: Provider, prompts: Prompts, new_tokens: int, logits: bool = False) -> Answer | str:
        """An answer, or the reason why there is none (see attempt)."""
        answer, failure = attempt(lambda: provider.answer(prompts, new_tokens, logits))
        if failure:
            self.release()
        return failure or answer

    @torch.inference_mode()
    def right(self, prompts: Prompts, new_tokens: int, entries=None) -> tuple[list[Entry], list[str]]:
        """(entries whose answers are right, each with its first answer; what is wrong with the others).

        An entry that runs out of memory counts as right, and has no answer. entries: default all.
        """
        # Several entries share a reference, so each provider answers once.
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
        """What is wrong with an answer or with its comparison. None: nothing is, or it ran out of memory."""
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
        """What differs from the tokens of another of our providers on the same vision tokens; None if nothing does."""
        alike, apart = _same_choices(answer, truth)
        if apart > self.other_tokens:
            return f"it keeps other vision tokens than {other}"
        same = (answer.tokens == truth.tokens)[alike]
        return None if same.all() else f"{1 - same.float().mean():.0%} of its tokens are not those of {other}"

    def _wrong(
        self, entry: Entry, answer: Answer, truth: Answer | None, prompts: Prompts, new_tokens: int
    ) -> str | None:
        """What is wrong with an answer: its shape, logits, KV cache, or kept tokens. None if nothing is."""
        rows = len(prompts.ids)
        if tuple(answer.tokens.shape) != (rows, new_tokens):
            return f"it gave {list(answer.tokens.shape)} tokens, asked were {[rows, new_tokens]}"
        if not torch.isfinite(answer.logits).all():
            return "its logits are not finite"
        config = entry.provider.config
        costs = [self.cost(config, prompts)] * (rows if entry.provider.side_by_side else 1)
        expected = allocated_kv_bytes(costs, self.dtype.itemsize, new_tokens - 1, entry.provider.multiple(rows))
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
            return None  # the LLM read other tokens in every row, so there is nothing to compare
        return self._unlike(
            (answer.logits[alike], answer.tokens[alike]), (truth.logits[alike], truth.tokens[alike]), other, config
        )

    def _unlike(self, ours, theirs, other: str, config: AdaVConfig) -> str | None:
        """What differs too much in (logits, tokens) on the same prompts and vision tokens; None if nothing does."""
        (logits, tokens), (expected, expected_tokens) = ours, theirs
        apart = logits - expected
        if self.dtype == torch.float32:
            if float(apart.abs().max()) > FLOAT32_LIMIT:
                return f"its logits are up to {float(apart.abs().max()):.1e} from those of {other}, allowed is {FLOAT32_LIMIT:g}"
            same = float((tokens == expected_tokens).float().mean())
            # A cache policy leaves entries unread from the second token on, so later tokens may differ.
            if config.cache_policy == "full" and same < 1:
                return f"{1 - same:.0%} of its tokens are not those of {other}"
            return None
        spread = expected - expected.mean(dim=-1, keepdim=True)
        relative = float(apart.square().mean().sqrt() / spread.square().mean().sqrt())
        if relative > HALF_LIMITS[self.dtype]:
            return f"its logits are {relative:.1%} of their spread from those of {other}, allowed is {HALF_LIMITS[self.dtype]:.0%}"
        return None

    def groups(self, entries: list[Entry]) -> list[list[Entry]]:
        """Entries that are measured together.

        On a CPU, all take turns in every repetition, so that a machine that slows down slows all of them. On a GPU, the
        memory that an engine keeps would be missing for the others, so each entry is measured alone.
        """
        return [[entry] for entry in entries] if self.device == "cuda" else [list(entries)]

    @torch.inference_mode()
    def measure(self, group: list[Entry], prompts: Prompts, new_tokens: int, repeats: int) -> list[str]:
        """Time the entries of a group and return what was wrong. Entries that were wrong are removed from `group`."""
        complaints: list[str] = []
        timed = [entry for entry in group if not entry.out_of_memory]
        with progress_bar("measuring", total=repeats * len(timed), unit=" answers") as shown:
            for repeat in range(repeats if timed else 0):
                if repeat == 0 or self.device != "cuda":  # later, a GPU's memory may be too full for the yardsticks
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
        """Measure what the speed of decoding is compared with. The fastest of all passes counts."""
        self.bandwidth = max(self.bandwidth, copy_bandwidth(self.device))
        self.reading = max(self.reading, read_bandwidth(self.device))
        for rows in {len(prompts.ids) if entry.provider.side_by_side else 1 for entry in entries}:
            passed = bare_step(self.models.ours, rows)
            self.bare[rows] = min(passed, self.bare.get(rows, passed))
        free_memory(self.device)

    def _warm_up(self, entry: Entry, prompts: Prompts, new_tokens: int) -> list[str]:
        """Give the answers that are not timed, and return what was wrong.

        Every later answer must have the tokens of the check, or of the first answer if the check was on other rows.
        """
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
        gc.collect()  # not during the answer, where it would be timed
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
        # In half precision, kernels that sum in another order can turn a near tie, so tokens may differ.
        return self.dtype == torch.float32 and not torch.equal(answer.tokens, entry.checked)

    @staticmethod
    def _refuse(entry: Entry, what: str) -> list[str]:
        entry.checked = None
        return [f"{entry.name}: {what} gave other tokens, so it gets no time"]


def _same_choices(answer: Answer, truth: Answer) -> tuple[Tensor, float]:
    """([B] bool: rows with the same kept vision tokens, share of kept tokens that differ)."""
    if not truth.kept:
        return torch.ones(len(answer.tokens), dtype=torch.bool), 0.0
    pairs = list(zip(answer.kept, truth.kept, strict=True))
    others = [int((~torch.isin(ours, theirs)).sum()) for ours, theirs in pairs]
    alike = torch.tensor([torch.equal(ours, theirs) for ours, theirs in pairs])
    apart = sum(others) / max(1, sum(len(ours) for ours, _ in pairs))
    # Rows whose tokens are the same, but in another order or number, are not alike either, and count as wrong.
    return alike, apart if any(others) or alike.all() else 1.0

"""Who is measured in benchmarks/end_to_end.py, whether their answers are right, and the measuring itself."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace

import torch
from memory import Peak, bare_step, copy_bandwidth, decode_weight_bytes
from providers import Answer, Models, Ours, OursByEngine, Provider, Transformers, Upstream
from shapes import Preset, Prompts, random_model

from llava.config import AdaVConfig
from llava.eval.flops import Cost, allocated_kv_bytes, predict
from llava.eval.self_check import FLOAT32_LIMIT, HALF_LIMITS
from llava.progress import progress_bar


@dataclass
class Entry:
    """One line of the table: a provider under a configuration, the provider it is compared with, and its answers.

    same_as: a provider that has to give the very same tokens under every cache policy (the engine's generate()).
    """

    provider: Provider
    label: str
    reference: Provider | None
    same_as: Provider | None = None
    answers: list[Answer] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    same_tokens: float | None = None

    @property
    def name(self) -> str:
        return f"{self.provider.name} ({self.label})"

    @property
    def key(self) -> tuple[str, str]:
        return self.provider.name, self.label


class Bench:
    """A model with random weights, and who answers with it under which configurations.

    providers: names; configs: by what they are called. `entries` are the lines of the table; `bandwidth` is the fastest
    copy so far, in bytes per second, tried before every repetition; `bare` has, by rows at once, the seconds of the fastest
    pass over a decode step's products alone.
    """

    def __init__(
        self, preset: Preset, layers: int | None, device: str, dtype: torch.dtype, seed: int, providers, configs: dict
    ):
        self.preset, self.device, self.dtype, self.seed = preset, device, dtype, seed
        model = random_model(preset.model_config(newline=True, layers=layers), device, dtype, seed)
        self.models = Models(model)
        self.weights, self.bandwidth = decode_weight_bytes(model), 0.0
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

    def prompts(self, batch: int) -> Prompts:
        model = self.models.ours
        return Prompts.random(self.preset, model.config, model.lm_head.weight, batch, self.seed)

    def cost(self, config: AdaVConfig, prompts: Prompts) -> Cost:
        return predict(prompts.shape, config, [prompts.image], sum(prompts.text), [prompts.text[1]])

    @torch.inference_mode()
    def right(self, prompts: Prompts, new_tokens: int) -> tuple[list[Entry], list[str]]:
        """Entries whose answers are right, with each one's first answer, and what is wrong with the others."""
        truths: dict[int, Answer] = {}
        right, complaints = [], []
        for entry in progress_bar("checking", self.entries, unit=" providers"):
            answer = entry.provider.answer(prompts, new_tokens, logits=True)
            truths[id(entry.provider)] = answer
            for other in (entry.reference, entry.same_as):
                if other is not None and id(other) not in truths:
                    truths[id(other)] = other.answer(prompts, new_tokens, logits=True)
            wrong = self._wrong(entry, answer, truths.get(id(entry.reference)), prompts, new_tokens)
            if entry.same_as is not None and self.dtype == torch.float32 and wrong is None:
                same = answer.tokens == truths[id(entry.same_as)].tokens
                if not same.all():
                    wrong = f"{1 - same.float().mean():.0%} of its tokens are not those of {entry.same_as.name}"
            if wrong:
                complaints.append(f"{entry.name}: {wrong}, so it gets no time")
            else:
                right.append(replace(entry, answers=[answer], peaks=[]))
        return right, complaints

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
        pairs = zip(answer.kept, truth.kept, strict=True) if truth.kept is not None else ()
        same_kept = all(torch.equal(ours, theirs) for ours, theirs in pairs)
        if exact and not same_kept:
            return f"it keeps other vision tokens than {other}"
        apart = answer.logits - truth.logits
        if exact and float(apart.abs().max()) > FLOAT32_LIMIT:
            return f"its logits are up to {float(apart.abs().max()):.1e} from those of {other}, allowed is {FLOAT32_LIMIT:g}"
        if exact and config.cache_policy == "full" and entry.same_tokens < 1:
            return f"{1 - entry.same_tokens:.0%} of its tokens are not those of {other}"
        spread = truth.logits - truth.logits.mean(dim=-1, keepdim=True)
        relative = float(apart.square().mean().sqrt() / spread.square().mean().sqrt())
        if not exact and same_kept and relative > HALF_LIMITS[self.dtype]:
            return f"its logits are {relative:.1%} of their spread from those of {other}, allowed is {HALF_LIMITS[self.dtype]:.0%}"
        return None

    @torch.inference_mode()
    def measure(self, entries: list[Entry], prompts: Prompts, new_tokens: int, repeats: int) -> list[str]:
        """Time the entries in turns, and say which of them answered otherwise than before."""
        complaints = []
        checked = {entry.key: entry.answers.pop() for entry in entries}
        for repeat in progress_bar("measuring", range(repeats), unit=" repetitions"):
            self.bandwidth = max(self.bandwidth, copy_bandwidth(self.device))
            for rows in {len(prompts.ids) if entry.provider.side_by_side else 1 for entry in entries}:
                passed = bare_step(self.models.ours, rows)
                self.bare[rows] = min(passed, self.bare.get(rows, passed))
            for entry in list(entries):
                gc.collect()
                peak = Peak(self.device)
                answer = entry.provider.answer(prompts, new_tokens)
                entry.peaks.append(peak.bytes() or 0)
                entry.answers.append(answer)
                if self.dtype == torch.float32 and not torch.equal(answer.tokens, checked[entry.key].tokens):
                    complaints.append(f"{entry.name}: repetition {repeat + 1} gave other tokens, so it gets no time")
                    entries.remove(entry)
        return complaints

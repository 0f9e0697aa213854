"""A plain recomputation of cached decoding under A-VL and H2O: no storage, no lists, no padding, no SDPA.

Keys and values of everything that was ever seen stay; what is evicted or not read is masked. One row at a time, with
Python sets and sorts in place of device lists; the rules are written down anew, from an AdaVConfig. Which tokens a
method inside the LLM drops is taken from the records of its `Dropping`.
"""

from __future__ import annotations

from math import floor

import torch
from dropping_reference import image_order, rotate
from torch import Tensor

BEFORE, IMAGE, AFTER = range(3)


class Layer:
    """What one layer has seen: keys and values [G, n, d], the kind of each entry, and which of them each head keeps."""

    def __init__(self, config, key: Tensor, value: Tensor, kinds: list[int], entered: int):
        self.config, self.key, self.value, self.kinds, self.entered = config, key, value, list(kinds), entered
        self.heads = range(key.shape[0])
        self.kept = [set(range(len(kinds))) for _ in self.heads]
        self.core: set[int] = set()
        self.h2o = config.all_use_h2o or config.h2o_heavy_share is not None
        self.score = [[0.0] * len(kinds) for _ in self.heads]
        self.prompt = len(self.region())

    def region(self) -> list[int]:
        """Entries that can be evicted while decoding goes on, evicted ones included."""
        return [i for i, kind in enumerate(self.kinds) if self.h2o or kind == AFTER]

    def image(self) -> list[int]:
        return [i for i in sorted(self.kept[0]) if self.kinds[i] == IMAGE]

    def best_image(self, row: Tensor, rate: float) -> set[int]:
        """row [n]: mean over query heads."""
        count = floor((1 - rate) * self.entered + 1e-6)
        return set(sorted(self.image(), key=lambda i: -row[i].item())[:count])

    def after_prefill(self, weights: Tensor) -> None:
        """weights [H, n, n] of the prompt."""
        c = self.config
        if c.vision_adaptive_attention and not self.h2o:
            last = weights.mean(dim=0)[-1]
            stay = self.best_image(last, c.vision_adaptive_attention_rate)
            self.core = self.best_image(last, c.vision_adaptive_attention_compute_rate)
            gone = set(self.image()) - stay
            self.kept = [kept - gone for kept in self.kept]
        if c.text_pruning_flag or self.h2o:
            paid, region = self.of_kv_heads(weights), self.region()
            for query in region:
                older = [i for i in region if i < query]
                self.note(paid[:, query], older, query, ranked=older)
            if self.rule() == "direct":
                self.note(paid[:, -1], region, None, ranked=region)
            self.evict(len(region))

    def allowed(self, step: int) -> Tensor:
        """[G, n]: what decode step `step` reads."""
        c, entries = self.config, range(len(self.kinds))
        mask = torch.tensor([[i in kept for i in entries] for kept in self.kept])
        interval = c.vision_adaptive_attention_update_interval
        if c.vision_adaptive_attention and not self.h2o and interval > 0 and step % interval:
            mask[:, sorted(set(self.image()) - self.core)] = False
        return mask

    def after_step(self, weights: Tensor, step: int) -> None:
        """weights [H, n] of the step's query, its own entry last."""
        c, own = self.config, len(self.kinds) - 1
        interval = c.vision_adaptive_attention_update_interval
        if c.vision_adaptive_attention and not self.h2o and interval > 0 and step % interval == 0:
            self.core = self.best_image(weights.mean(dim=0), c.vision_adaptive_attention_compute_rate)
        if c.text_pruning_flag or self.h2o:
            self.note(self.of_kv_heads(weights), self.region()[:-1], own, ranked=self.region())
            self.evict(len(self.region()))

    def of_kv_heads(self, weights: Tensor) -> Tensor:
        return weights.view(len(self.kept), -1, *weights.shape[1:]).sum(dim=1)

    def rule(self) -> str:
        return "h2o" if self.h2o else self.config.text_rule

    def note(self, paid: Tensor, older: list[int], own: int | None, ranked: list[int]) -> None:
        """One query's attention [G, n]: to what was there before it, and to itself; ranked: what the quantile is taken over."""
        for head in self.heads:
            living = [i for i in older if i in self.kept[head]]
            level = 0.0
            compared = [i for i in ranked if i in self.kept[head]]
            if self.rule() == "history" and compared:
                level = torch.quantile(paid[head, compared], self.config.text_pruning_rate).item()
            row = paid[head].tolist()
            for i in living:
                self.score[head][i] = row[i] + (0.0 if self.rule() == "direct" else self.score[head][i] - level)
            if own is not None:
                self.score[head][own] = row[own]

    def sizes(self, seen: int) -> tuple[int, int]:
        """(total, recent) once `seen` tokens have been in the region."""
        c = self.config
        if c.h2o_heavy_share is not None:
            heavy, recent = (floor(part * self.prompt + 1e-6) for part in (c.h2o_heavy_share, c.h2o_recent_share))
            return heavy + recent, recent
        if c.all_use_h2o:
            return int(seen / 8) + int(3 * seen / 8), int(3 * seen / 8)
        total = max(round((1 - c.text_pruning_rate) * seen), c.text_init_cache)
        return total, {"h2o": total - floor(c.text_heavy_share * total + 1e-6), "history": total // 2, "direct": 0}[
            self.rule()
        ]

    def evict(self, seen: int) -> None:
        total, recent = self.sizes(seen)
        for head in self.heads:
            living = [i for i in self.region() if i in self.kept[head]]
            if len(living) > total:
                old, new = living[: len(living) - recent], living[len(living) - recent :]
                stay = sorted(old, key=lambda i: -self.score[head][i])[: total - recent]
                self.kept[head] -= set(living) - set(stay) - set(new)


def _attend(layer, states: Tensor, positions: Tensor, theta: float):
    """Query [H, S, d], key and value [G, S, d] of normed states [S, D], rotated."""
    part = layer.self_attn
    query, key, value = (
        projection(states).view(len(states), -1, part.head_dim).transpose(0, 1)
        for projection in (part.q_proj, part.k_proj, part.v_proj)
    )
    query, key = rotate(torch.cat([query, key]), positions, theta).split([len(query), len(key)])
    return query, key, value


def _weights(query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    """Softmax [H, S, n]; mask: what may be read, broadcast to that."""
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    return (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).masked_fill(~mask, float("-inf")).softmax(dim=-1)


def _output(layer, states: Tensor, weights: Tensor, value: Tensor) -> Tensor:
    value = value.repeat_interleave(len(weights) // len(value), dim=0)
    return layer.self_attn.o_proj((weights @ value).transpose(0, 1).reshape(len(states), -1))


@torch.no_grad()
def replay(model, prepared, row: int, tokens: list[int], config) -> tuple[Tensor, list[Layer], list[list[int]]]:
    """Logits [1 + len(tokens), V] of one row before and after each of `tokens`; what each layer has come to; and per
    layer, entries per KV head after prefill and after each token.
    """
    llm, length = model.model, prepared.lengths[row]
    theta = model.config.rope_parameters["rope_theta"]
    pad = prepared.inputs_embeds.shape[1] - length
    states, positions = prepared.inputs_embeds[row, pad:], prepared.position_ids[row, pad:]
    following = int(positions[-1]) + 1 + int(prepared.position_offset[row])
    images = [(start - pad, count) for start, count in prepared.image_spans[row]]
    entered = sum(count for _, count in images)
    kinds = [BEFORE] * length
    if images:
        kinds[images[0][0] :] = [AFTER] * (length - images[0][0])
    for start, count in images:
        kinds[start : start + count] = [IMAGE] * count
    dropping = prepared.dropping
    place = dropping.dropper.place if dropping else None
    pending = [{r.layer: r for r in records} for records in dropping.records[row]] if dropping else []
    layers, counts, numbers = [], [], []

    def cut(number: int, *values: Tensor) -> list[Tensor]:
        nonlocal positions, images, kinds
        order, sources, at, moved, gone = [], [], 0, [], 0
        for (start, count), records in zip(images, pending, strict=True):
            order += range(at, start)
            at, mine = start + count, list(range(start, start + count))
            if number in records:
                mine, made = image_order(records[number], count, start, len(kinds) + len(sources))
                sources += made
            moved.append((start - gone, len(mine)))
            gone += count - len(mine)
            order += mine
        order += range(at, len(kinds))
        images = moved
        kinds = [(kinds + [IMAGE] * len(sources))[i] for i in order]
        positions = torch.arange(len(order)) if dropping.dropper.reindexed else positions[order]
        made = [[value[members].mean(dim=0) for members in sources] for value in values]
        return [torch.cat([v, *(m[None] for m in new)])[order] for v, new in zip(values, made, strict=True)]

    for number, layer in enumerate(llm.layers):
        here = any(number in records for records in pending)
        if here and place == "before":
            (states,) = cut(number, states)
        query, key, value = _attend(layer, layer.input_layernorm(states), positions, theta)
        weights = _weights(query, key, torch.ones(len(states), len(states), dtype=torch.bool).tril())
        attended = _output(layer, states, weights, value)
        layers.append(Layer(config, key, value, kinds, entered))
        layers[-1].after_prefill(weights)
        counts.append([len(layers[-1].kept[0])])
        numbers.append(len(states) if dropping and dropping.dropper.reindexed else following)
        if here and place == "inside":
            states, attended = cut(number, states, attended)
        states = states + attended
        states = states + layer.mlp(layer.post_attention_layernorm(states))
        if here and place == "after":
            (states,) = cut(number, states)
    logits = [model.lm_head(llm.norm(states[-1]))]
    for step, token in enumerate(tokens, 1):
        states = llm.embed_tokens(torch.tensor([token]))
        for number, (layer, seen) in enumerate(zip(llm.layers, layers, strict=True)):
            position = torch.tensor([numbers[number] + step - 1])
            query, key, value = _attend(layer, layer.input_layernorm(states), position, theta)
            seen.key, seen.value = torch.cat([seen.key, key], dim=1), torch.cat([seen.value, value], dim=1)
            seen.kinds.append(AFTER)
            for head in seen.heads:
                seen.kept[head].add(len(seen.kinds) - 1)
                seen.score[head].append(0.0)
            mask = seen.allowed(step).repeat_interleave(len(query) // len(key), dim=0)[:, None]
            weights = _weights(query, seen.key, mask)
            states = states + _output(layer, states, weights, seen.value)
            states = states + layer.mlp(layer.post_attention_layernorm(states))
            seen.after_step(weights[:, 0], step)
            assert len({len(kept) for kept in seen.kept}) == 1
            counts[number].append(len(seen.kept[0]))
        logits.append(model.lm_head(llm.norm(states[-1])))
    return torch.stack(logits), layers, counts

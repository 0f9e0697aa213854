"""The cache policies and their settings that the tests go through, and decoding by hand with logits."""

import torch

from llava.config import AdaVConfig


def vision(rate, compute_rate, interval):
    return {
        "vision_adaptive_attention": True,
        "vision_adaptive_attention_rate": rate,
        "vision_adaptive_attention_compute_rate": compute_rate,
        "vision_adaptive_attention_update_interval": interval,
    }


def text(rule, minimum=3, rate=0.4):
    return {"text_pruning_flag": True, "text_rule": rule, "text_pruning_rate": rate, "text_init_cache": minimum}


FILTER = {"prefill_filter_flag": True, "prefill_filter_layer": 2, "prefill_filter_rate": 0.5}
PUBLISHED = vision(0.5, 0.7, 3) | text("h2o")
# name -> (policy that the configuration must pick, keys of the configuration)
CASES = {
    "full": ("full", {}),
    "core": ("avl", vision(0.5, 0.7, 3)),
    "core of all": ("avl", vision(0.0, 0.9, 4)),
    "updates only": ("avl", vision(0.4, 0.8, 1)),
    "eviction only": ("avl", vision(0.6, 0.6, -1)),
    "text h2o": ("avl", text("h2o")),
    "text history": ("avl", text("history")),
    "text direct": ("avl", text("direct")),
    "text minimum": ("avl", text("h2o", minimum=10)),
    "published": ("avl", PUBLISHED),
    "core and history": ("avl", vision(0.3, 0.6, 2) | text("history", rate=0.6)),
    "h2o": ("h2o", {"all_use_h2o": True}),
    "h2o of the paper": ("h2o", {"h2o_heavy_share": 0.2, "h2o_recent_share": 0.1}),
}
# Methods that feed the cache: the prefill filter stands beside those before the LLM.
FRONTS = {
    "none": ("none", {}, {}),
    "adav": ("adav", {}, {}),
    "adav, original positions": ("adav", {"positions": "original"}, {}),
    "visionzip": ("visionzip", {"dominant": 2, "contextual": 2}, {}),
    "filter": ("none", {}, FILTER),
    "adav and filter": ("adav", {}, FILTER),
    "fastv": ("fastv", {}, {}),
    "fitprune": ("fitprune", {}, {}),
    "sparsevlm": ("sparsevlm", {}, {}),
    "pyramiddrop": ("pyramiddrop", {}, {}),
    "no_image": ("no_image", {}, {}),
}


def setting(case, front="none", tokens=12, **more):
    """The configuration of a case behind a front."""
    method, options, keys = FRONTS[front]
    keys = CASES[case][1] | keys | more
    if keys.get("vision_adaptive_attention") and keys.get("prefill_filter_flag"):
        # What the filter drops, A-VL cannot keep.
        keys["prefill_filter_rate"] = min(keys["prefill_filter_rate"], keys["vision_adaptive_attention_rate"])
    return AdaVConfig(method=method, overall_tokens=tokens, options=options, **keys)


def by_hand(model, prepared, tokens, cache):
    """Prefill and forced `tokens` [B, T], one step at a time: logits [B, 1 + T, V]."""
    parts = {"dropping": prepared.dropping, "caching": prepared.caching}
    parts = {name: part for name, part in parts.items() if part is not None}
    with torch.no_grad():
        out = model(
            inputs_embeds=prepared.inputs_embeds,
            attention_mask=prepared.attention_mask,
            position_ids=prepared.position_ids,
            past_key_values=cache,
            **parts,
        )
        logits = [out.logits[:, -1]]
        for step in tokens.T:
            out = model(input_ids=step[:, None], past_key_values=cache, **parts)
            logits.append(out.logits[:, -1])
    return torch.stack(logits, dim=1)

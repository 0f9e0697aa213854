"""Measurements of a whole run from the rows of its shards: tokens, seconds, KV cache, memory. Imports no torch."""

from __future__ import annotations

from collections import defaultdict
from itertools import groupby

from llava.common.scatter import spread

_FEWEST_BATCHES = 8  # the first batch of each shard warms up
STAGES = ("image_decode", "vision_tower", "projector", "selection", "splice", "prefill", "decode")


def summarise(rows: list[dict]) -> dict:
    """Return the measurements of a run over all its sessions; {} if no sample is answered.

    Tokens are means per image: before, after (left after the last cut, where a method cuts inside the LLM), and seen by a
    layer in the mean over layers; seconds are summed over all shards; KV bytes are per sample at the end of generation;
    FLOPs are predicted (llava.costs.flops), per sample. prefill_spread says whether times can be quoted
    (llava.common.scatter). Rows of vLLM have what vLLM measures of a request in place of seconds, KV bytes and memory.
    """
    if not rows:
        return {}
    # 1. Lists over images and samples.
    before = [n for row in rows for n in row["total"]]
    after = [n for row in rows for n in row["kept"]]
    # Rows of earlier versions of the code lack layer_mean, and prefill_flops as well.
    seen = [n for row in rows for n in row.get("layer_mean", row["kept"])]
    counted = [row for row in rows if "prefill_flops" in row]
    seconds: dict[str, float] = defaultdict(float)
    for row in rows:
        for stage, value in row.get("seconds", {}).items():
            seconds[stage] += value
    # 2. Means, sums and maxima.
    order = [*STAGES, *sorted(seconds.keys() - set(STAGES))]
    report = {
        "answered": len(rows),
        "conversation": sorted({row["conversation"] for row in rows}),
        "vision_tokens_per_image": {
            "before": _mean(before),
            "after": _mean(after),
            "layer_mean": _mean(seen),
            "images": len(after),
        },
        "prefill_flops_predicted": {
            "mean": _mean([row["prefill_flops"] for row in counted]),
            "questions": len(counted),
        },
        "new_tokens": {
            "mean": _mean([row["new_tokens"] for row in rows]),
            "total": sum(row["new_tokens"] for row in rows),
        },
        "prefill_spread": _prefill_spread([row for row in counted if "seconds" in row]),
        "seconds_per_stage": {stage: round(seconds[stage], 4) for stage in order if stage in seconds},
    }
    for name in ("kv_bytes_live", "kv_bytes_allocated", "kv_bytes_predicted", "kv_bytes_read"):
        if values := [row[name] for row in rows if name in row]:
            report[name] = {"mean": _mean(values), "max": max(values)}
    if measured := [row["vllm"] for row in rows if "vllm" in row]:
        report["vllm"] = _requests(measured)
    # The maximum over rows: each row has the peak of its process so far. On the CPU there is no peak_cuda.
    report["peak_memory_bytes_per_shard"] = {
        name.removeprefix("peak_"): max(row[name] for row in rows if name in row)
        for name in ("peak_rss", "peak_cuda")
        if any(name in row for row in rows)
    }
    return report


def _prefill_spread(rows: list[dict]) -> float | None:
    """`spread` of prefill time per predicted FLOP over the batches; None where there are too few to tell."""
    repeats = []
    for seconds, batch in groupby(rows, key=lambda row: row["seconds"]):  # the rows of a batch have equal shares of it
        batch = list(batch)
        repeats.append(seconds.get("prefill", 0.0) * len(batch) / sum(row["prefill_flops"] for row in batch))
    return round(spread(repeats), 4) if len(repeats) >= _FEWEST_BATCHES else None


def _requests(measured: list[dict]) -> dict:
    """Return what vLLM measured of its requests: seconds, and prompt tokens that were in its prefix cache.

    Requests overlap, so their seconds add up to more than the run took.
    """
    report = {}
    for name in ("seconds_queued", "seconds_prefill", "seconds_to_first_token", "seconds_decode"):
        values = sorted(one[name] for one in measured)
        report[name] = {"mean": _mean(values), "median": values[len(values) // 2], "max": values[-1]}
    prompt, cached = (sum(one[name] for one in measured) for name in ("prompt_tokens", "cached_prompt_tokens"))
    report["prompt_tokens"] = {"mean": round(prompt / len(measured), 3), "total": prompt}
    report["cached_prompt_tokens"] = {"total": cached, "share": round(cached / prompt, 4)}
    return report


def _mean(values: list) -> float | None:
    return round(sum(values) / len(values), 3) if values else None

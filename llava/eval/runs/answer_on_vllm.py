"""VllmAnswerer: vLLM with this repository's plugin, which answers the samples of work orders.

Imported by a worker that runs under a Python with vLLM (llava.eval.runs.engines). Prompts, templates and end tokens are
those of the checkpoint as it is, made by the same code as for this repository's engine; vLLM loads the weights from the
folder in transformers' format.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

# Before vLLM is imported, which reads these once. What the user has set is kept. An evaluation sends nothing anywhere.
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from llava.common.errors import UserError, first_line
from llava.common.files import read_json
from llava.config import AdaVConfig
from llava.conversation import default_conv_mode
from llava.costs.flops import predict
from llava.costs.model_shape import ImageCounts, ModelShape
from llava.eval.runs.answerer import Answerer
from llava.eval.runs.image_reader import UnreadableImage, read_image
from llava.eval.runs.work_order import OrderedSample, WorkOrder
from llava.inference.loaded_checkpoint import question_ids
from llava.mm_utils import tile_plan
from llava.model.checkpoint import Checkpoint
from llava.model.decoding.engine import end_tokens
from llava.model.processors import load_tokenizer

# On a CPU, vLLM would reserve nearly all memory of the machine for its KV cache. Enough for so many prompts of the full
# context, but no more than so many bytes unless a single one needs more.
_CPU_PROMPTS, _CPU_BYTES = 16, 4 << 30


class VllmAnswerer(Answerer):
    """A vLLM engine that answers the samples of one work order after another.

    A batch is handed over as a whole. vLLM runs as many of its requests at a time as its KV cache holds, and starts the
    next where one ends. Questions about one image share what the plugin and vLLM's caches share between them.
    """

    def __init__(self, order: WorkOrder):
        """Start vLLM on the devices of this worker: all of them hold one model (tensor parallelism)."""
        source = Checkpoint.open(order.checkpoint, order.model_base)
        self.tokenizer, self.config = load_tokenizer([source.folder, source.base]), source.model_config()
        if self.tokenizer is None:
            raise UserError(f"{order.checkpoint}: has no tokenizer, which an evaluation needs")
        self.shape = ModelShape.from_config(self.config)
        self.conversation = default_conv_mode(self.config, self.tokenizer)
        # The whole engine gets the configuration, so vLLM plans its memory for so many vision tokens.
        self.adav, self.llm = order.config, _start(order, self.shape, self.config.max_position_embeddings)
        exported = read_json(Path(order.for_vllm) / "config.json")
        self.image_id = exported.get("image_token_index", exported.get("image_token_id"))
        self.ends = end_tokens(source.generation_config(), self.tokenizer)

    def begin(self, order: WorkOrder) -> None:
        """Empty all caches: times of runs are compared, so no run may use what another run computed."""
        from llava.integrations.vllm.processor import forget_images

        if order.config != self.adav:
            raise ValueError("vLLM was started with another configuration than that of the order")
        self.llm.reset_prefix_cache()
        self.llm.reset_mm_cache()
        forget_images()

    def answer_next(self, samples: Sequence[OrderedSample], order: WorkOrder) -> list[dict]:
        """Answer a batch as requests that vLLM runs together."""
        from vllm import SamplingParams

        generation, batch = order.generation, samples[: order.batch_size]
        conversation = generation.conversation or self.conversation
        # 1. Read each image of the batch once.
        images, errors = _read({name for sample in batch for name in sample.images}, order.image_folder)
        failed = {sample.key: errors[name] for sample in batch for name in sample.images if name in errors}
        rows = [{"key": list(key), "error": error} for key, error in failed.items()]
        readable = [sample for sample in batch if sample.key not in failed]
        # 2. One request per sample.
        prompts = []
        for sample in readable:
            ids = question_ids(self.tokenizer, conversation, sample.prompt, len(sample.images), self.image_id)
            request = {"prompt_token_ids": ids}
            if sample.images:
                request["multi_modal_data"] = {"image": [images[name] for name in sample.images]}
            prompts.append(request)
        # The launcher's orders are greedy. Answers are decoded below, as this repository's engine decodes them.
        greedy = SamplingParams(
            temperature=0.0, max_tokens=generation.max_new_tokens, stop_token_ids=sorted(self.ends), detokenize=False
        )
        try:
            outputs = self.llm.generate(prompts, greedy, use_tqdm=False)
        except ValueError as error:
            raise UserError(f"vLLM refuses a question ({first_line(error)})") from error
        # 3. One row per sample.
        for sample, output in zip(readable, outputs, strict=True):
            sizes = [images[name].size for name in sample.images]
            rows.append(self._row(sample, output, sizes, order.config, conversation))
        return rows

    def _row(
        self, sample: OrderedSample, output, sizes: list[tuple[int, int]], config: AdaVConfig, conversation: str
    ) -> dict:
        """Return the row of one sample. output: vLLM's RequestOutput. sizes: those of its images."""
        prompt, tokens, metrics = output.prompt_token_ids, output.outputs[0].token_ids, output.metrics
        plans = [tile_plan(size, self.config, config.option("anyres")) for size in sizes]
        images = [ImageCounts.from_plan(plan, self.shape.side) for plan in plans]
        # Counted in the prompt that vLLM ran: every vision token has its place there. A line break parts two images.
        kept = [len(list(run)) for is_image, run in groupby(prompt, key=self.image_id.__eq__) if is_image]
        starts = [
            at for at, number in enumerate(prompt) if number == self.image_id and prompt[at - 1] != self.image_id
        ]
        words = [len(prompt) - start - sum(kept[i:]) for i, start in enumerate(starts)]
        cost = predict(self.shape, config, images, len(prompt) - sum(kept), words, kept)
        return {
            "key": list(sample.key),
            "answer": self.tokenizer.decode(tokens, skip_special_tokens=True).strip(),
            "total": [image.tokens for image in images],
            "kept": kept,
            "layer_mean": kept,
            "new_tokens": len(tokens),
            "conversation": conversation,
            "prefill_flops": cost.total,
            # Seconds by vLLM's own clocks. Requests overlap: they add up to more than the run takes.
            "vllm": {
                "seconds_queued": round(metrics.scheduled_ts - metrics.queued_ts, 6),
                "seconds_prefill": round(metrics.first_token_ts - metrics.scheduled_ts, 6),
                "seconds_to_first_token": round(metrics.first_token_latency, 6),
                "seconds_decode": round(metrics.last_token_ts - metrics.first_token_ts, 6),
                "prompt_tokens": len(prompt),
                "cached_prompt_tokens": output.num_cached_tokens or 0,
            },
        }


def _start(order: WorkOrder, shape: ModelShape, context: int):
    """Start vLLM for `order`; return its LLM. context: positions of the LLM.

    Raises UserError if vLLM was built for another kind of device than the worker is to use.
    """
    cpu = order.generation.device == "cpu"
    if cpu:
        # One process: on a CPU nothing is gained by a second one, which would compete for the same cores. The launcher has
        # set the number of threads, and several workers may share the cores.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm import LLM
    from vllm.platforms import current_platform

    if current_platform.is_cpu() != cpu:
        built, asked = ("CPUs", "GPUs") if cpu is False else ("GPUs", "the CPU")
        raise UserError(
            f"this vLLM is built for {built}, but the run is to use {asked}; CUDA_VISIBLE_DEVICES= asks for the CPU, and "
            "VLLM_PYTHON= names another Python"
        )
    settings = {}
    if cpu:
        settings["enforce_eager"] = True
        # Requests share whole blocks alone, and vLLM's 128 tokens on a CPU are more than many prompts with few vision tokens
        # have. Its attention on CPUs wants a multiple of 32.
        settings["block_size"] = 32
        if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:
            one = shape.layers * shape.kv_entry(4) * context
            settings["kv_cache_memory_bytes"] = max(one, min(_CPU_PROMPTS * one, _CPU_BYTES))
    with warnings.catch_warnings():
        # The launcher shows warnings, and these are vLLM's own affairs.
        warnings.simplefilter("ignore")
        return LLM(
            model=order.for_vllm,
            dtype=_dtype(order, cpu),
            tensor_parallel_size=1 if cpu else len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")),
            limit_mm_per_prompt={"image": max([len(sample.images) for sample in order.samples], default=1) or 1},
            mm_processor_kwargs={"adav": order.config.to_dict()},
            disable_log_stats=False,  # each output then has its times
            **settings,
        )


def _dtype(order: WorkOrder, cpu: bool) -> str:
    """The dtype as for this repository's engine: "auto" is float32 on a CPU, the checkpoint's own on a GPU."""
    if order.generation.dtype != "auto":
        return order.generation.dtype
    if cpu:
        return "float32"
    # vLLM's own "auto" would make float16 of float32.
    settings = read_json(Path(order.for_vllm) / "config.json")
    return settings.get("dtype") or settings.get("torch_dtype") or "auto"


def _read(names: set[str], folder: Path) -> tuple[dict, dict[str, str]]:
    """Return (images by name, errors of unreadable images by name)."""
    images, errors = {}, {}
    for name in sorted(names):
        try:
            images[name] = read_image(folder / name)
        except UnreadableImage as error:
            errors[name] = str(error)
    return images, errors

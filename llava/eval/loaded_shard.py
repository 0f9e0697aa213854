"""A loaded checkpoint that answers samples in batches, and appends each batch to an answers file at once."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import torch
from PIL import Image
from transformers import StoppingCriteriaList
from transformers import logging as transformers_logging

from llava.config import AdaVConfig
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import default_conv_mode, single_turn
from llava.errors import UserError
from llava.eval.answers import AnswerFile
from llava.eval.measure import FirstToken, kv_bytes, peak_memory, predicted
from llava.eval.model_shape import ImageCounts, ModelShape
from llava.mm_utils import left_pad, process_images, tile_plan, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.prepared import PreparedPrompt, StageClock
from llava.model.token_dropping.plan import layer_mean


class LoadedShard:
    """A loaded checkpoint that answers the samples of one spec after another."""

    def __init__(self, spec: dict):
        if spec["device"] == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "the shard was given a GPU, but this torch sees no CUDA device; CUDA_VISIBLE_DEVICES= runs on the CPU"
            )
        transformers_logging.set_verbosity_error()  # a shard's last lines should say why it died
        self.tokenizer, self.model, self.image_processor, _ = load_pretrained_model(
            spec["checkpoint"],
            spec["model_base"],
            config=AdaVConfig(**spec["config"]),
            device_map="auto" if spec["device"] == "cuda" else "cpu",
            torch_dtype=spec["dtype"],
        )
        for part, found in (("tokenizer", self.tokenizer), ("image processor", self.image_processor)):
            if found is None:
                raise UserError(f"{spec['checkpoint']}: has no {part}, which an evaluation needs")
        self.device = self.model.get_input_embeddings().weight.device
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = {end for end in [*ends, self.tokenizer.eos_token_id] if end is not None}
        pad = self.tokenizer.pad_token_id
        self.pad = pad if pad is not None else min(self.ends, default=0)
        self.shape = ModelShape.of(self.model.config)

    def run(self, spec: dict, stopping: threading.Event) -> None:
        """Answer the samples of `spec` and append them to its answers file, until done or `stopping` is set."""
        config = AdaVConfig(**spec["config"])
        conversation = spec["conversation"] or default_conv_mode(self.model.config, self.tokenizer)
        answers, samples, size = AnswerFile(Path(spec["answers"])), spec["samples"], spec["batch_size"]
        while samples and not stopping.is_set():
            try:
                rows = self.answer(samples[:size], config, conversation, spec)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise UserError(
                        "the GPU has too little memory for one sample; use fewer tokens or --dtype float16"
                    ) from None
                size = (min(size, len(samples)) + 1) // 2
                torch.cuda.empty_cache()
                print(f"out of GPU memory, going on with batches of {size}", file=sys.stderr)
                continue
            answers.append(rows)
            samples = samples[size:]
        answers.close()

    @torch.inference_mode()
    def answer(self, samples: list[dict], config: AdaVConfig, conversation: str, spec: dict) -> list[dict]:
        """One batch -> one row per sample, in order: its answer and measurements, or why its image is unreadable."""
        clock = StageClock(self.device)
        images, readable, rows = [], [], []
        with clock.stage("image_decode"):
            for sample in samples:
                if sample["image"] is not None:
                    try:
                        images.append(read_image(Path(spec["image_folder"]) / sample["image"]))
                    except UnreadableImage as error:
                        rows.append({"key": sample["key"], "error": str(error)})
                        continue
                readable.append(sample)
        if not readable:
            return rows
        prepared = self.prepare(readable, images, config, conversation, clock)
        first = FirstToken(self.device)
        output = self.model.generate(
            prepared=prepared,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            max_new_tokens=spec["max_new_tokens"],
            pad_token_id=self.pad,
            stopping_criteria=StoppingCriteriaList([first]),
            return_dict_in_generate=True,
        )
        prefill, decode = first.split()
        seconds = {**clock.seconds, **prepared.seconds, "prefill": prefill, "decode": decode}
        tokens = [self._cut(ids) for ids in output.sequences.tolist()]
        plans = [tile_plan(image.size, self.model.config, config.option("anyres")) for image in images]
        costs = predicted(prepared, [ImageCounts.of(plan, self.shape.side) for plan in plans], self.shape, config)
        memory = kv_bytes(output.past_key_values, costs, prepared, [len(ids) for ids in tokens])
        for i, sample in enumerate(readable):
            rows.append(
                {
                    "key": sample["key"],
                    "answer": self.tokenizer.decode(tokens[i], skip_special_tokens=True).strip(),
                    "total": [selection.total for selection in prepared.selections[i]],
                    **vision_tokens(prepared, i),
                    "new_tokens": len(tokens[i]),
                    "conversation": conversation,
                    # Shares of the batch: summed over all samples they are the time of the run.
                    "seconds": {stage: round(value / len(readable), 7) for stage, value in seconds.items()},
                    "prefill_flops": costs[i].total,
                    **memory[i],
                    **peak_memory(),
                }
            )
        return rows

    @torch.inference_mode()
    def prepare(
        self, samples: list[dict], images: list, config: AdaVConfig, conversation: str | None = None, clock=None
    ):
        """The PreparedPrompt of a batch whose images (PIL, flat, in order) are decoded already."""
        clock = clock or StageClock(self.device)
        conversation = conversation or default_conv_mode(self.model.config, self.tokenizer)
        with clock.stage("image_decode"):
            pixels = (
                process_images(images, self.image_processor, self.model.config, config.option("anyres"))
                if images
                else None
            )
        input_ids, mask = left_pad([self._token_ids(sample, conversation) for sample in samples], self.pad)
        return self.model.prepare(
            input_ids.to(self.device),
            self._to_device(pixels),
            [image.size for image in images] or None,
            attention_mask=mask.to(self.device),
            config=config,
        )

    def _token_ids(self, sample: dict, conversation: str) -> torch.Tensor:
        placeholder = DEFAULT_IMAGE_TOKEN + "\n" if sample["image"] is not None else ""
        prompt = single_turn(conversation, placeholder + sample["prompt"])
        return tokenizer_image_token(prompt, self.tokenizer, return_tensors="pt")

    def _to_device(self, pixels):
        if pixels is None:
            return None
        if isinstance(pixels, list):
            return [self._to_device(p) for p in pixels]
        return pixels.to(self.device, self.model.dtype)

    def _cut(self, ids: list[int]) -> list[int]:
        """New tokens of one row up to and with its end token: what follows is padding of the batch."""
        for i, token in enumerate(ids):
            if token in self.ends:
                return ids[: i + 1]
        return ids


def vision_tokens(prepared: PreparedPrompt, row: int) -> dict[str, list]:
    """Per image of a row: vision tokens left after the last cut, and those that a layer sees in the mean over layers."""
    dropping, selections = prepared.dropping, prepared.selections[row]
    if dropping is None:
        kept = [len(selection.indices) for selection in selections]
        return {"kept": kept, "layer_mean": kept}
    return {
        "kept": [dropping.left(row, image) for image in range(len(selections))],
        "layer_mean": [round(layer_mean(dropping.schedule(row, image)), 4) for image in range(len(selections))],
    }


class UnreadableImage(Exception):
    """An image file that is there but cannot be decoded."""


def read_image(path: Path) -> Image.Image:
    """An RGB image; UnreadableImage says why not. A decoder may raise almost anything on a damaged file."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error

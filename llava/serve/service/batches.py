"""A loaded checkpoint that answers batches of requests and measures each row when it ends."""

from __future__ import annotations

import hashlib
import threading
import time
from copy import deepcopy
from dataclasses import dataclass, fields, is_dataclass, replace

import torch
from PIL import Image
from torch import Tensor

from llava.config import AdaVConfig
from llava.costs.measure import kv_bytes, predicted, vision_tokens
from llava.costs.model_shape import ImageCounts
from llava.inference.loaded_checkpoint import LoadedCheckpoint, Pixels
from llava.methods.inside_llm import dropper_names
from llava.mm_utils import TilePlan, tile_plan, tokenizer_image_token
from llava.model.decoding.engine import BatchGeneration
from llava.model.decoding.prepared import PreparedPrompt
from llava.model.decoding.sampling import Sampling
from llava.model.encoded_images import EncodedImage, RecentImages
from llava.model.image_tokens import layout_of, tokens_kept
from llava.serve.service.reply import Answered, KeptTokens, Reply
from llava.serve.service.request import PromptTooLong, Request, chat_prompt

# Upper bound of letters per token. A prompt with more letters than this cannot fit, so it is refused before the
# tokenizer, which would need long for it.
LETTERS = 200


@dataclass(frozen=True)
class Picture(Pixels):
    """Pixels of one image of a request. digest: hash of its content, so that equal images are encoded once."""

    digest: bytes


@dataclass(frozen=True)
class Job:
    """A request that is ready for a batch.

    ids: [S] token ids with image placeholders, without padding. pictures: its images in reading order.
    submitted: time of submission, in seconds of perf_counter.
    """

    ids: Tensor
    pictures: tuple[Picture, ...]
    config: AdaVConfig
    sampling: Sampling
    reply: Reply
    submitted: float


class BatchAnswerer(LoadedCheckpoint):
    """A loaded checkpoint that answers requests in batches.

    `job` may be called from any thread. `answer` and `free_memory` must always be called from the same thread.
    """

    def __init__(
        self, model_path, model_base, config: AdaVConfig, device_map, dtype, threads, max_prompt_tokens, image_cache
    ):
        super().__init__(
            model_path,
            model_base,
            config,
            device_map=device_map,
            dtype=dtype,
            threads=threads,
            purpose="a conversation",
        )
        self.max_prompt_tokens = min(max_prompt_tokens or self.context - 1, self.context - 1)
        self._recent = RecentImages(image_cache)
        # A tokenizer changes its own settings during a call, so it is not thread-safe. `job` uses a copy behind a lock,
        # while the engine decodes with the original.
        self._reader, self._reading = deepcopy(self.tokenizer), threading.Lock()
        self._reader.model_max_length = int(1e30)  # no warning of transformers: `job` raises PromptTooLong instead

    # --- before the queue, in the caller's thread -------------------------------------------------------------------

    def job(self, request: Request, config: AdaVConfig, reply: Reply, submitted: float) -> Job:
        """The Job of a request. UserError if it cannot be answered, PromptTooLong if it does not fit.

        A Job holds no PIL image, so a waiting request keeps only its pixels for the tower in memory.
        """
        # 1. Check the configuration and the length of the text.
        self.check(config)
        prompt = chat_prompt(self.conversation, request.turns)
        if len(prompt) > LETTERS * self.max_prompt_tokens:
            raise PromptTooLong(
                f"the prompt has {len(prompt):,} letters, allowed are {self.max_prompt_tokens:,} tokens: "
                "a shorter conversation would fit"
            )
        # 2. Check the length with images. It needs only their sizes, so the pixels come last.
        images = [image for turn in request.turns for image in turn.images]
        with self._reading:
            ids = tokenizer_image_token(prompt, self._reader, return_tensors="pt")
        plans = [tile_plan(image.size, self.model.config, config.option("anyres")) for image in images]
        length = len(ids) - len(images) + sum(self.longest(plan, config) for plan in plans)
        if length > self.max_prompt_tokens:
            raise PromptTooLong(
                f"the prompt has {length:,} tokens, images included, allowed are {self.max_prompt_tokens:,}: "
                "a shorter conversation, fewer images or fewer vision tokens would fit"
            )
        # 3. Limit the answer to the rest of the context.
        room = self.context - length
        sampling = replace(request.sampling, max_new_tokens=min(request.sampling.max_new_tokens, room))
        pictures = tuple(self._picture(image, config) for image in images)
        return Job(ids, pictures, config, sampling, reply, submitted)

    def check(self, config: AdaVConfig) -> None:
        """Raise UserError if a configuration does not fit this checkpoint."""
        config.check_method_options()
        dropper = config.make_dropper()
        if dropper is not None:
            dropper.check(self.model.config)

    def longest(self, plan: TilePlan, config: AdaVConfig) -> int:
        """Upper limit of the positions that an image takes in the LLM."""
        layout = layout_of(plan, self.shape.side, plan.tiles)
        method = config.make_method()
        # All tokens enter the LLM, or kept tokens have positions up to that of the last token.
        if config.method in dropper_names() or (method.needs_image and config.option("positions") == "original"):
            return len(layout.tile)
        return tokens_kept(method, layout, config.overall_tokens)

    def _picture(self, image: Image.Image, config: AdaVConfig) -> Picture:
        """The Picture of a PIL image."""
        image = image if image.mode == "RGB" else image.convert("RGB")
        # The size is hashed too: the bytes of a 2 x 8 image may equal those of a 4 x 4 image.
        digest = hashlib.blake2b(repr(image.size).encode(), digest_size=32)
        digest.update(image.tobytes())
        return Picture(**vars(self.pixels(image, config)), digest=digest.digest())

    # --- the model, in one thread -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def answer(self, jobs: list[Job]) -> None:
        """Answer jobs of equal configuration as one batch, and finish their replies.

        If it raises, unfinished replies have the text that was generated so far.
        """
        # 1. Encode the images and prepare the prompts.
        began = time.perf_counter()
        config = jobs[0].config
        pictures = [picture for job in jobs for picture in job.pictures]
        encoded, reused = self._encoded(pictures, config)
        images = [encoded[picture.digest] for picture in pictures]
        prepared = self.prepare_ids([job.ids for job in jobs], images, config)
        counts = [ImageCounts.from_plan(image.plan, self.shape.side) for image in images]
        costs = predicted(prepared, counts, self.shape, config)
        plans = iter([image.plan for image in images])
        plans = [[next(plans) for _ in job.pictures] for job in jobs]
        # 2. Generate step by step. A row whose client has cancelled ends before the next step.
        generation = self.engine.stream(prepared, [job.sampling for job in jobs])
        first = None
        while True:
            for row, job in enumerate(jobs):
                if job.reply.cancelled:
                    generation.cancel(row)
            outputs = next(generation, None)
            now = time.perf_counter()
            first = now if first is None and outputs is not None else first
            for row, job in enumerate(jobs):
                if outputs is not None and outputs[row] is not None:
                    job.reply.add(outputs[row].text)
                # 3. Measure a row in the step in which it ends: later steps feed padding to it.
                if generation.answers[row].finish is not None and not job.reply.over:
                    measured = self._measured(prepared, generation, row, plans[row], costs)
                    times = _times(job, began, first, now, measured["new_tokens"])
                    again = sum(picture.digest in reused for picture in job.pictures)
                    finish = generation.answers[row].finish
                    job.reply.finish(
                        Answered(job.reply.text, finish, batch=len(jobs), images_reused=again, **measured, **times)
                    )
            if outputs is None:
                return

    def _encoded(self, pictures: list[Picture], config: AdaVConfig) -> tuple[dict[bytes, EncodedImage], set[bytes]]:
        """(encoded images by digest, digests of those that an earlier request had encoded)."""
        encoding = self.model.encoding(config)
        wanted = {picture.digest: picture for picture in pictures}
        known = {digest: self._recent.get((digest, encoding)) for digest in wanted}
        known = {digest: image for digest, image in known.items() if image is not None}
        new = [picture for digest, picture in wanted.items() if digest not in known]
        made = self.encode(new, config)
        for picture, image in zip(new, made, strict=True):
            self._recent.put((picture.digest, encoding), image)
        return known | {picture.digest: image for picture, image in zip(new, made, strict=True)}, set(known)

    def free_memory(self) -> None:
        """Free memory after a failure: encoded images and captured graphs. Both are made again when needed."""
        self._recent = RecentImages(self._recent.capacity)
        self.engine.release()

    def _measured(
        self, prepared: PreparedPrompt, generation: BatchGeneration, row: int, plans: list[TilePlan], costs: list
    ) -> dict:
        """The fields of Answered about tokens and memory, of a row that has just ended."""
        new_tokens = [len(answer.tokens) for answer in generation.answers]
        bytes_ = (0, 0)
        if generation.cache is not None:  # None if all rows were cancelled before prefill
            found = kv_bytes(generation.cache, costs, new_tokens)[row]
            bytes_ = found["kv_bytes_live"], found["kv_bytes_allocated"]
        selections = prepared.selections[row]
        return {
            "prompt_tokens": prepared.lengths[row],
            "new_tokens": new_tokens[row],
            "images": tuple(KeptTokens(*one) for one in zip(plans, map(_for_looking, selections), strict=True)),
            "side": self.shape.side,
            "vision_tokens": (sum(vision_tokens(prepared, row)["kept"]), sum(one.total for one in selections)),
            "kv_bytes": bytes_,
            "prefill_flops": costs[row].total,
        }


def _times(job: Job, began: float, first: float | None, now: float, new_tokens: int) -> dict:
    """The fields seconds and tokens_per_second of Answered, of a row that ends `now`.

    began, first, now: perf_counter when the batch began, when its first token was there, and now.
    """
    decode = now - first if first is not None else 0.0
    seconds = {"waited": began - job.submitted, "first_token": (first or now) - began, "decode": decode}
    return {
        "seconds": seconds,
        "tokens_per_second": (new_tokens - 1) / decode if new_tokens > 1 and decode > 0 else None,
    }


def _for_looking(selection):
    """A copy of a selection on the CPU, without features.

    A view of a device tensor would keep the memory of the whole batch as long as a client keeps its answer.
    """
    values = {f.name: _moved(getattr(selection, f.name)) for f in fields(selection) if f.name != "features"}
    return replace(selection, features=torch.empty(len(selection.indices), 0), **values)


def _moved(value):
    """A copy of a value with all of its tensors on the CPU, at any depth."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _moved(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(one) for one in value)
    if is_dataclass(value):
        return replace(value, **{f.name: _moved(getattr(value, f.name)) for f in fields(value)})
    return value

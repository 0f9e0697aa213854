"""A loaded checkpoint that answers work orders in batches, and appends each batch to an answers file at once."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from transformers import logging as transformers_logging

from llava.common.errors import UserError
from llava.common.files import digest_of
from llava.config import AdaVConfig
from llava.costs.measure import kv_bytes, peak_memory, predicted, vision_tokens
from llava.costs.model_shape import ImageCounts
from llava.eval.runs.image_reader import ImageFiles, ImageReader, UnreadableImage
from llava.eval.runs.shard_answers import AnswerFile
from llava.eval.runs.work_order import Generation, OrderedSample, WorkOrder
from llava.inference.loaded_checkpoint import LoadedCheckpoint
from llava.model.decoding.prepared import StageClock
from llava.model.decoding.sampling import Sampling
from llava.model.encoded_images import EncodedImage, RecentImages

# Of encoded images that are kept for the next batch. Work is ordered by image, so it need not hold many: LLaVA-1.6's
# largest takes 24 MB in half precision on the 7B model.
RECENT_BYTES = 256 << 20


class ShardAnswerer(LoadedCheckpoint):
    """A loaded checkpoint that answers the samples of one work order after another.

    Questions about one image share its decoding, its tiles and the vision tower's pass, within a batch and from one batch
    to the next; tokens are selected anew for each question.
    """

    def __init__(self, order: WorkOrder, image_workers: int | None = None):
        """image_workers: processes that decode and resize images ahead; None: two beside a GPU, none on the CPU, whose
        cores are busy."""
        transformers_logging.set_verbosity_error()  # a shard's last lines should say why it died
        super().__init__(
            order.checkpoint,
            order.model_base,
            order.config,
            device=order.generation.device,
            dtype=order.generation.dtype,
        )
        self.recent = RecentImages(RECENT_BYTES)
        self.image_workers = (2 if self.device.type == "cuda" else 0) if image_workers is None else image_workers

    def run(self, order: WorkOrder, stopping: threading.Event) -> None:
        """Answer the samples of `order` and append them to its answers file, until done or `stopping` is set."""
        self.recent = RecentImages(RECENT_BYTES)  # of this run alone: times of several runs are compared
        answers, samples, size = AnswerFile(order.answers), order.samples, order.batch_size
        reader = ImageReader(ImageFiles.of(order, self), self.image_workers)
        while samples and not stopping.is_set():
            rows = None
            with suppress(torch.OutOfMemoryError):
                rows = self.answer(samples[:size], order, reader)
            if rows is None:
                # The error and its traceback, which hold the tensors of the batch, are gone by now.
                if size == 1:
                    raise UserError("the GPU has too little memory for one sample; use fewer tokens or --dtype float16")
                size = (min(size, len(samples)) + 1) // 2
                self.recent = RecentImages(RECENT_BYTES)
                self.engine.release()
                print(f"out of GPU memory, going on with batches of {size}", file=sys.stderr)
                continue
            answers.append(rows)
            samples = samples[size:]
        answers.close()

    @torch.inference_mode()
    def answer(self, samples: Sequence[OrderedSample], order: WorkOrder, reader: ImageReader) -> list[dict]:
        """One batch -> one row per sample, in order: its answer and measurements, or why its image is unreadable."""
        clock, config = StageClock(self.device), order.config
        conversation = order.generation.conversation or self.conversation
        # 1. The images of the batch, each encoded once.
        names = list(dict.fromkeys(sample.image for sample in samples if sample.image is not None))
        encoded, errors = self._encoded(names, order.image_folder, reader, config, clock)
        rows = [{"key": list(s.key), "error": errors[s.image]} for s in samples if s.image in errors]
        readable = [sample for sample in samples if sample.image not in errors]
        if not readable:
            return rows
        # 2. Their questions, answered as one batch.
        images = [None if sample.image is None else encoded[sample.image] for sample in readable]
        prepared = self.splice([sample.prompt for sample in readable], images, config, conversation)
        generated = self.engine.generate(prepared, [_sampling(order.generation, sample) for sample in readable])
        # 3. What was measured, and what it should have cost.
        seconds = Counter(generated.seconds)
        seconds.update(clock.seconds)
        seconds.update(prepared.seconds)
        new_tokens = [len(answer.tokens) for answer in generated.answers]
        counts = [ImageCounts.of(image.plan, self.shape.side) for image in images if image is not None]
        costs = predicted(prepared, counts, self.shape, config)
        memory = kv_bytes(generated.cache, costs, new_tokens)
        for i, sample in enumerate(readable):
            rows.append(
                {
                    "key": list(sample.key),
                    "answer": generated.answers[i].text.strip(),
                    "total": [selection.total for selection in prepared.selections[i]],
                    **vision_tokens(prepared, i),
                    "new_tokens": new_tokens[i],
                    "conversation": conversation,
                    # Shares of the batch: summed over all samples they are the time of the run.
                    "seconds": {stage: round(value / len(readable), 7) for stage, value in seconds.items()},
                    "prefill_flops": costs[i].total,
                    **memory[i],
                    **peak_memory(),
                }
            )
        return rows

    def _encoded(
        self, names: list[str], folder: Path, reader: ImageReader, config: AdaVConfig, clock: StageClock
    ) -> tuple[dict[str, EncodedImage], dict[str, str]]:
        """Images of a batch by name, each decoded and encoded at most once; and why those that are missing are."""
        encoded, errors, new = {}, {}, {}
        encoding = self.model.encoding(config)
        with clock.stage("image_decode", on_host=True):
            for name in names:
                try:
                    key = (_stamp(folder / name), encoding)
                    known = self.recent.get(key)
                    if known is None:
                        new[name] = key, reader.get(name)
                    else:
                        encoded[name] = known
                except UnreadableImage as error:
                    errors[name] = str(error)
        made = self.encode([image for _, image in new.values()], config, clock)
        for (name, (key, _)), image in zip(new.items(), made, strict=True):
            self.recent.put(key, image)
            encoded[name] = image
        return encoded, errors


def _sampling(generation: Generation, sample: OrderedSample) -> Sampling:
    """Greedy, or drawn from a seed that belongs to the sample, whatever batch it is in."""
    if not generation.temperature:
        return Sampling(generation.max_new_tokens)
    seed = int(digest_of([generation.seed, list(sample.key)]), 16)
    return Sampling(generation.max_new_tokens, generation.temperature, generation.top_p or 1.0, seed)


def _stamp(path: Path) -> tuple:
    """What tells one state of an image file from another, without reading it."""
    try:
        state = path.stat()
    except OSError as error:
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error
    return str(path), state.st_mtime_ns, state.st_size

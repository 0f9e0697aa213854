"""ShardAnswerer: a checkpoint loaded into this repository's engine, which answers work orders in batches."""

from __future__ import annotations

import sys
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
from llava.eval.runs.answerer import Answerer
from llava.eval.runs.image_reader import ImageFiles, ImageReader, UnreadableImage
from llava.eval.runs.work_order import Generation, OrderedSample, WorkOrder
from llava.inference.loaded_checkpoint import LoadedCheckpoint
from llava.model.decoding.prepared import StageClock
from llava.model.decoding.sampling import Sampling
from llava.model.encoded_images import EncodedImage, RecentImages

# Bytes of encoded images that are kept for the next batch. Questions are sorted by image, so a few images are enough:
# the largest image of LLaVA-1.6 takes 24 MB in half precision on the 7B model.
RECENT_BYTES = 256 << 20


class ShardAnswerer(LoadedCheckpoint, Answerer):
    """A loaded checkpoint that answers the samples of one work order after another.

    Questions about one image share the decoded file, the tiles and the pass through the vision tower. This holds within
    a batch and from one batch to the next. Vision tokens are selected again for each question.
    """

    def __init__(self, order: WorkOrder, image_workers: int | None = None):
        """Load the checkpoint of `order`.

        image_workers: processes that decode and resize images ahead. None: two with a GPU, none on the CPU, because
        there the model uses all cores.
        """
        # If the shard dies, the launcher shows its last lines. They should give the reason, not transformers' advice.
        transformers_logging.set_verbosity_error()
        super().__init__(
            order.checkpoint,
            order.model_base,
            order.config,
            device=order.generation.device,
            dtype=order.generation.dtype,
        )
        self.recent = RecentImages(RECENT_BYTES)
        self.image_workers = (2 if self.device.type == "cuda" else 0) if image_workers is None else image_workers

    def begin(self, order: WorkOrder) -> None:
        """Open the images of `order`, with an empty store of encoded ones."""
        # Times of runs are compared, so no run may use images that another run encoded.
        self.recent = RecentImages(RECENT_BYTES)
        self.reader, self.size = ImageReader(ImageFiles.from_order(order, self), self.image_workers), order.batch_size

    def answer_next(self, samples: Sequence[OrderedSample], order: WorkOrder) -> list[dict]:
        """Answer the next batch. If the GPU is out of memory, the batch size is halved.

        Raises UserError if one sample does not fit.
        """
        while True:
            with suppress(torch.OutOfMemoryError):
                return self.answer(samples[: self.size], order, self.reader)
            # Outside of `with`, the error is gone. Its traceback holds the tensors of the batch, so memory can only be
            # freed here.
            if self.size == 1:
                raise UserError("the GPU has too little memory for one sample; use fewer tokens or --dtype float16")
            # min(): the failed batch may be the short last one, and half of the full size would be no smaller.
            self.size = (min(self.size, len(samples)) + 1) // 2
            self.recent = RecentImages(RECENT_BYTES)
            self.engine.release()
            print(f"out of GPU memory, going on with batches of {self.size}", file=sys.stderr)

    @torch.inference_mode()
    def answer(self, samples: Sequence[OrderedSample], order: WorkOrder, reader: ImageReader) -> list[dict]:
        """Answer one batch; return one row per sample.

        A row has the answer and its measurements, or the error of an unreadable image. Rows with an error come first.
        """
        clock, config = StageClock(self.device), order.config
        conversation = order.generation.conversation or self.conversation
        # 1. Encode each image of the batch once.
        names = list(dict.fromkeys(sample.image for sample in samples if sample.image is not None))
        encoded, errors = self._encoded(names, order.image_folder, reader, config, clock)
        rows = [{"key": list(s.key), "error": errors[s.image]} for s in samples if s.image in errors]
        readable = [sample for sample in samples if sample.image not in errors]
        if not readable:
            return rows
        # 2. Answer the questions with a readable image as one batch.
        images = [None if sample.image is None else encoded[sample.image] for sample in readable]
        prepared = self.splice([sample.prompt for sample in readable], images, config, conversation)
        generated = self.engine.generate(prepared, [_sampling(order.generation, sample) for sample in readable])
        # 3. Collect measured times and predicted costs.
        seconds = Counter(generated.seconds)
        seconds.update(clock.seconds)
        seconds.update(prepared.seconds)
        new_tokens = [len(answer.tokens) for answer in generated.answers]
        counts = [ImageCounts.from_plan(image.plan, self.shape.side) for image in images if image is not None]
        costs = predicted(prepared, counts, self.shape, config)
        memory = kv_bytes(generated.cache, costs, new_tokens)
        # 4. One row per sample.
        for i, sample in enumerate(readable):
            rows.append(
                {
                    "key": list(sample.key),
                    "answer": generated.answers[i].text.strip(),
                    "total": [selection.total for selection in prepared.selections[i]],
                    **vision_tokens(prepared, i),
                    "new_tokens": new_tokens[i],
                    "conversation": conversation,
                    # Each sample gets an equal share of the batch's time, so the sum over samples is the run's time.
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
        """Return (encoded images by name, errors of unreadable images by name); each image is encoded at most once."""
        encoded, errors, new = {}, {}, {}
        encoding = self.model.encoding(config)
        # on_host: a CUDA event measures the device, and does not see time that the host spends on files.
        with clock.stage("image_decode", on_host=True):
            for name in names:
                try:
                    # The key names all that an encoding depends on: the state of the file, and the tower's settings.
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
    """Return the sampling settings of one sample: greedy, or a draw with the sample's own seed."""
    if not generation.temperature:
        return Sampling(generation.max_new_tokens)
    # The seed comes from the sample's key, so batch size, shards and interruptions do not change an answer.
    seed = int(digest_of([generation.seed, list(sample.key)]), 16)
    return Sampling(generation.max_new_tokens, generation.temperature, generation.top_p or 1.0, seed)


def _stamp(path: Path) -> tuple:
    """Return (path, time of change, size) of an image file, which tells two states of it apart without reading it."""
    try:
        state = path.stat()
    except OSError as error:
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error
    return str(path), state.st_mtime_ns, state.st_size

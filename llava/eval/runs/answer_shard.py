"""A loaded checkpoint that answers samples in batches, and appends each batch to an answers file at once."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch
from PIL import Image
from transformers import logging as transformers_logging

from llava.common.errors import UserError
from llava.common.files import digest_of
from llava.config import AdaVConfig
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import default_conv_mode, single_turn
from llava.costs.measure import kv_bytes, peak_memory, predicted, vision_tokens
from llava.costs.model_shape import ImageCounts, ModelShape
from llava.eval.runs.image_reader import ImageFiles, ImageReader, Pixels, UnreadableImage
from llava.eval.runs.shard_answers import AnswerFile
from llava.mm_utils import left_pad, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.decoding.engine import Engine
from llava.model.decoding.prepared import PreparedPrompt, StageClock
from llava.model.decoding.sampling import Sampling
from llava.model.encoded_images import EncodedImage, RecentImages

# Of encoded images that are kept for the next batch. Work is ordered by image, so it need not hold many: LLaVA-1.6's
# largest takes 24 MB in half precision on the 7B model.
RECENT_BYTES = 256 << 20


class LoadedShard:
    """A loaded checkpoint that answers the samples of one spec after another.

    Questions about one image share its decoding, its tiles and the vision tower's pass, within a batch and from one batch
    to the next; tokens are selected anew for each question.
    """

    def __init__(self, spec: dict, image_workers: int | None = None):
        """image_workers: processes that decode and resize images ahead; None: two beside a GPU, none on the CPU, whose
        cores are busy."""
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
        self.engine = Engine(self.model, self.tokenizer)
        self.shape = ModelShape.of(self.model.config)
        self.recent = RecentImages(RECENT_BYTES)
        self.image_workers = (2 if self.device.type == "cuda" else 0) if image_workers is None else image_workers

    def run(self, spec: dict, stopping: threading.Event) -> None:
        """Answer the samples of `spec` and append them to its answers file, until done or `stopping` is set."""
        config = AdaVConfig(**spec["config"])
        conversation = spec["conversation"] or default_conv_mode(self.model.config, self.tokenizer)
        self.recent = RecentImages(RECENT_BYTES)  # of this run alone: times of several runs are compared
        answers, samples, size = AnswerFile(Path(spec["answers"])), spec["samples"], spec["batch_size"]
        names = list(dict.fromkeys(sample["image"] for sample in samples if sample["image"] is not None))
        files = self.images_of(spec, names, config)
        reader = ImageReader(files, self.image_workers)
        while samples and not stopping.is_set():
            rows = None
            with suppress(torch.OutOfMemoryError):
                rows = self.answer(samples[:size], config, conversation, spec, reader)
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
    def answer(
        self, samples: list[dict], config: AdaVConfig, conversation: str, spec: dict, reader: ImageReader
    ) -> list[dict]:
        """One batch -> one row per sample, in order: its answer and measurements, or why its image is unreadable."""
        clock = StageClock(self.device)
        names = list(dict.fromkeys(s["image"] for s in samples if s["image"] is not None))
        encoded, errors = self._encoded(names, Path(spec["image_folder"]), reader, config, clock)
        rows = [{"key": s["key"], "error": errors[s["image"]]} for s in samples if s["image"] in errors]
        readable = [sample for sample in samples if sample["image"] not in errors]
        if not readable:
            return rows
        images = [encoded[sample["image"]] for sample in readable if sample["image"] is not None]
        prepared = self.splice(readable, images, config, conversation)
        generated = self.engine.generate(prepared, [_sampling(spec, sample) for sample in readable])
        seconds = Counter(generated.seconds)
        seconds.update(clock.seconds)
        seconds.update(prepared.seconds)
        new_tokens = [len(answer.tokens) for answer in generated.answers]
        counts = [ImageCounts.of(image.plan, self.shape.side) for image in images]
        costs = predicted(prepared, counts, self.shape, config)
        memory = kv_bytes(generated.cache, costs, new_tokens)
        for i, sample in enumerate(readable):
            rows.append(
                {
                    "key": sample["key"],
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
        made = self._encode([image for _, image in new.values()], config, clock)
        for (name, (key, _)), image in zip(new.items(), made, strict=True):
            self.recent.put(key, image)
            encoded[name] = image
        return encoded, errors

    def images_of(self, spec: dict, names: list[str], config: AdaVConfig) -> ImageFiles:
        """The images of a spec's folder, as this checkpoint wants them."""
        folder = Path(spec["image_folder"])
        return ImageFiles(folder, names, self.image_processor, self.model.config, config.option("anyres"))

    @torch.inference_mode()
    def _encode(self, images: list[Pixels], config: AdaVConfig, clock: StageClock) -> list[EncodedImage]:
        """Pixels through the vision tower and, where need be, the projector."""
        if not images:
            return []
        return self.model.encode([image.pixels for image in images], [image.size for image in images], config, clock)

    @torch.inference_mode()
    def splice(
        self, samples: list[dict], images: list[EncodedImage], config: AdaVConfig, conversation: str | None = None
    ) -> PreparedPrompt:
        """The PreparedPrompt of a batch; images: flat, in order, one for each sample that has one."""
        conversation = conversation or default_conv_mode(self.model.config, self.tokenizer)
        input_ids, mask = left_pad([self._token_ids(sample, conversation) for sample in samples], self.engine.pad)
        return self.model.prepare(input_ids, attention_mask=mask, config=config, encoded=images)

    def prepare(
        self, samples: list[dict], images: list[Image.Image], config: AdaVConfig, conversation: str | None = None
    ) -> PreparedPrompt:
        """The PreparedPrompt of a batch whose images (PIL, flat, in order) are decoded already."""
        return self.splice(samples, self.encode(images, config), config, conversation)

    def encode(self, images: list[Image.Image], config: AdaVConfig) -> list[EncodedImage]:
        """PIL images through tiles, vision tower and, where need be, the projector."""
        read = [
            Pixels(
                process_images([image], self.image_processor, self.model.config, config.option("anyres"))[0], image.size
            )
            for image in images
        ]
        return self._encode(read, config, StageClock(self.device))

    def _token_ids(self, sample: dict, conversation: str) -> torch.Tensor:
        placeholder = DEFAULT_IMAGE_TOKEN + "\n" if sample["image"] is not None else ""
        prompt = single_turn(conversation, placeholder + sample["prompt"])
        return tokenizer_image_token(prompt, self.tokenizer, return_tensors="pt")


def _sampling(spec: dict, sample: dict) -> Sampling:
    """Greedy, or drawn from a seed that belongs to the sample, whatever batch it is in."""
    if not spec["temperature"]:
        return Sampling(spec["max_new_tokens"])
    seed = int(digest_of([spec["seed"], sample["key"]]), 16)
    return Sampling(spec["max_new_tokens"], spec["temperature"], spec["top_p"] or 1.0, seed)


def _stamp(path: Path) -> tuple:
    """What tells one state of an image file from another, without reading it."""
    try:
        state = path.stat()
    except OSError as error:
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error
    return str(path), state.st_mtime_ns, state.st_size

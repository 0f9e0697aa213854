"""`--model adav_transformers` of lmms-eval: any model that `compress()` takes, with its own processor and chat template.

    python -m lmms_eval --model adav_transformers --tasks docvqa_val --batch_size 8 \
        --model_args pretrained=Qwen/Qwen3-VL-8B-Instruct,method=adav,overall_tokens=256
"""

from __future__ import annotations

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from transformers import AutoModelForImageTextToText, AutoProcessor

from llava.common.errors import UserError, first_line
from llava.common.hub import quiet_loading
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.integrations.lmms_eval.model import AdaVModel, Asked
from llava.integrations.transformers import compress


class AdaVTransformers(AdaVModel):
    """A model of transformers whose vision tokens are selected by AdaV or another method.

    pretrained: checkpoint in transformers' format. processor: folder or hub name of another checkpoint with a processor.
    system_prompt: a text at the start of each conversation.
    """

    name = "adav_transformers"

    def _load(
        self, pretrained, dtype, placement, processor: str | None = None, system_prompt: str | None = None
    ) -> None:
        self.system_prompt = system_prompt
        if dtype == "auto" and not torch.cuda.is_available():
            dtype = "float32"  # half precision is slow on a CPU
        try:
            with quiet_loading():
                self.model = AutoModelForImageTextToText.from_pretrained(
                    pretrained, dtype=dtype, device_map=placement
                ).eval()
            self.processor = AutoProcessor.from_pretrained(processor or pretrained)
        except (OSError, ValueError) as error:
            raise UserError(f"{pretrained}: cannot be loaded ({first_line(error)})") from error
        if getattr(self.processor, "chat_template", None) is None:
            raise UserError(f"{processor or pretrained}: its processor has no chat template, which makes the prompts")
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"
        self.device = self.model.device
        # Now, and not in the first batch: a model or a configuration that cannot be used ends the run before it starts.
        with self._compressed():
            pass

    def _compressed(self):
        return compress(self.model, self.config, processor=self.processor)

    def _document(self, request: Instance) -> Asked:
        """The request with its prompt: the conversation in the words of the chat template."""
        asked = self._asked(request)
        first, *others = asked.text.split(DEFAULT_IMAGE_TOKEN)
        content = [{"type": "text", "text": first}] if first.strip() else []
        for text in others:
            content.append({"type": "image"})
            if text.strip():
                content.append({"type": "text", "text": text.strip("\n")})
        messages = [{"role": "user", "content": content}]
        if self.system_prompt is not None:
            system = [{"type": "text", "text": self.system_prompt}]
            messages = [{"role": "system", "content": system}, *messages]
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return Asked(prompt, asked.images)

    @torch.inference_mode()
    def _answer(self, documents: list[Asked], settings: dict) -> tuple[list[GenerationResult], list[tuple[int, int]]]:
        # One list of pictures per prompt that has any: LLaVA-OneVision reads from it which prompts have one picture.
        pictures = [document.images for document in documents if document.images]
        inputs = self.processor(
            text=[document.text for document in documents], images=pictures or None, padding=True, return_tensors="pt"
        ).to(self.device, self.model.dtype)
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        with self._compressed() as compression:
            output = self.model.generate(**inputs, pad_token_id=self._padding(ends), **self._sampling(settings))
        counts = [(kept.total, self._left(kept)) for kept in compression.last_selection or ()]
        # Tokens that the LLM reads: those of the prompt, less those that were dropped from its images.
        lengths, at = inputs["attention_mask"].sum(dim=1).tolist(), 0
        for row, document in enumerate(documents):
            own = counts[at : at + len(document.images)]
            lengths[row] -= sum(total - kept for total, kept in own)
            at += len(own)
        new = output[:, inputs["input_ids"].shape[1] :]
        return self._results(new, lengths, ends, self.tokenizer, settings), counts

    @staticmethod
    def _left(selection) -> int:
        """Vision tokens of an image that the last layer sees."""
        survivors = selection.report.get("survivors")
        return len(survivors[-1]) if survivors else len(selection.indices)

    def _padding(self, ends: set[int]) -> int | None:
        pad = self.tokenizer.pad_token_id
        return min(ends, default=None) if pad is None else pad

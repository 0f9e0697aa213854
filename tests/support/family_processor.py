"""A stand-in for the processor of a tiny model of family_cases.py. transformers' own processors need torchvision.

As a command, it runs lmms-eval with that processor:  python family_processor.py --model adav_transformers ...
"""

import runpy
from types import SimpleNamespace

import transformers
from family_cases import CASES
from transformers import AutoConfig, BatchFeature

PICTURES = {"large": (60, 40), "small": (20, 20), "tall": (30, 80)}  # (width, height) that become this image of a case


class TinyProcessor:
    """Makes prompts of `case`. A text becomes as many ids as it has letters, and its pictures become images before it."""

    chat_template = "a template"

    def __init__(self, case):
        self.case = case
        self.tokenizer = SimpleNamespace(
            pad_token_id=0, decode=lambda ids, **_: " ".join(map(str, ids)), padding_side="right"
        )

    def apply_chat_template(self, messages, add_generation_prompt, tokenize, **settings):
        assert add_generation_prompt
        parts = [part for message in messages for part in message["content"]]
        text = "|".join(part.get("text", "<image>") for part in parts)
        if not tokenize:
            return text
        assert settings == {"return_dict": True, "return_tensors": "pt"}
        pictures = [SimpleNamespace(size=PICTURES["large"]) for part in parts if part["type"] == "image"]
        return self([text], [pictures] if pictures else None, padding=True, return_tensors="pt")

    def __call__(self, text, images, padding, return_tensors):
        assert padding and return_tensors == "pt"
        own = iter(images or [])
        prompts = []
        for row in text:
            pieces = [self._piece(*picture.size) for picture in next(own)] if "<image>" in row else []
            prompts.append(self.case.prompt([*pieces, len(row)], seed=len(row)))
        assert next(own, None) is None
        return BatchFeature(self.case.batch(prompts))

    @staticmethod
    def _piece(width, height):
        return "large" if width > height else "tall" if width < height else "small"

    def decode(self, ids, **settings):
        return self.tokenizer.decode(ids.tolist(), **settings)


def processor_of(checkpoint, **_):
    """The stand-in for the processor of a folder with a tiny model."""
    return TinyProcessor(CASES[AutoConfig.from_pretrained(checkpoint).model_type])


if __name__ == "__main__":
    transformers.AutoProcessor.from_pretrained = processor_of
    runpy.run_module("lmms_eval", run_name="__main__")

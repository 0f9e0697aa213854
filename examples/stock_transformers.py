"""Runs a stock transformers model with its own processor on fewer vision tokens. No part of the model is replaced.

    python examples/stock_transformers.py
"""

import tempfile
from pathlib import Path

from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.utils import logging

from llava.config import AdaVConfig
from llava.conversation import single_turn
from llava.integrations.transformers import compress
from llava.model.builder import load_pretrained_model
from llava.model.export import save_checkpoint
from llava.shapes.dataset import scene_questions

logging.disable_progress_bar()
CHECKPOINT = Path(__file__).parents[1] / "playground" / "llava-shapes-v1.5"
scene, questions = scene_questions("v1.5", "test", 7)
image = Image.fromarray(scene.pixels)

with tempfile.TemporaryDirectory() as folder:
    # The demo checkpoint has LLaVA's format, so it is first written in transformers' format. A hub name such as
    # "llava-hf/llava-1.5-7b-hf" does not need this step.
    tokenizer, ours, image_processor, _ = load_pretrained_model(CHECKPOINT)
    save_checkpoint(ours, tokenizer, image_processor, folder, "llava-hf")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="float32")
    processor = AutoProcessor.from_pretrained(folder)

prompts = [single_turn("vicuna_v1", "<image>\n" + question.text) for question in questions]
inputs = processor(images=[image] * len(prompts), text=prompts, return_tensors="pt", padding=True)


def ask():
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    new = output[:, inputs["input_ids"].shape[1] :]  # as usual, the output has the prompt and then the new tokens
    return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]


before = ask()
with compress(model, config=AdaVConfig(method="adav", overall_tokens=14)) as compression:
    compressed = ask()
after = ask()

for question, whole, few in zip(questions, before, compressed, strict=True):
    print(f"{question.text:36} all tokens: {whole:8} compressed: {few:8} (right: {question.answer})")
kept = compression.last_selection[0]
print(f"{type(model).__name__} read {len(kept.indices)} of {kept.total} vision tokens of each picture")
print(f"the same model again as it was after the block: {'yes' if after == before else 'no'}")

"""Answers questions about pictures of different sizes as one batch. The answers are the same as one at a time.

    python examples/a_batch.py
"""

import time
from pathlib import Path

from PIL import Image

from llava.config import AdaVConfig
from llava.conversation import default_conv_mode, single_turn
from llava.mm_utils import left_pad, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.decoding.engine import Engine
from llava.model.decoding.sampling import Sampling
from llava.shapes.dataset import scene_questions

# LLaVA-1.6 style: a picture is cut into tiles, so pictures of different shapes have different numbers of vision tokens.
CHECKPOINT = Path(__file__).parents[1] / "playground" / "llava-shapes-v1.6"

images, questions = [], []
for number in range(4):
    scene, asked = scene_questions("v1.6", "test", number)
    images += [Image.fromarray(scene.pixels)] * 2  # two questions about each of four pictures
    questions += [asked[0], asked[2]]

# overall_tokens is a budget per picture, all of its tiles together.
config = AdaVConfig(method="adav", overall_tokens=58)
tokenizer, model, image_processor, _ = load_pretrained_model(CHECKPOINT, config=config)
engine = Engine(model, tokenizer)  # the evaluation uses it; model.generate accepts the same batches
template = default_conv_mode(model.config, tokenizer)


def answer(images, questions):
    """(answers in order, PreparedPrompt that the LLM read). images: of the whole batch, in reading order."""
    prompts = [single_turn(template, "<image>\n" + question.text) for question in questions]
    rows = [tokenizer_image_token(prompt, tokenizer, return_tensors="pt") for prompt in prompts]
    input_ids, attention_mask = left_pad(rows, tokenizer.pad_token_id)
    pixels = list(process_images(images, image_processor, model.config))
    prepared = model.prepare(input_ids, pixels, [image.size for image in images], attention_mask)
    generated = engine.generate(prepared, Sampling(max_new_tokens=8))
    return [one.text.strip() for one in generated.answers], prepared


start = time.perf_counter()
together, prepared = answer(images, questions)
seconds = time.perf_counter() - start
for row, (image, question, said) in enumerate(zip(images, questions, together, strict=True)):
    kept = prepared.selections[row][0]
    print(
        f"{image.width:3} x {image.height:<3} {len(kept.indices):3} of {kept.total:3} vision tokens, "
        f"prompt of {prepared.lengths[row]} tokens: {question.text} -> {said} (right: {question.answer})"
    )
alone = [answer([image], [question])[0][0] for image, question in zip(images, questions, strict=True)]
right = sum(said == question.answer for said, question in zip(together, questions, strict=True))
print(f"{right} of {len(questions)} right, {seconds:.2f} s as one batch")
print(f"same answers one at a time: {'yes' if alone == together else 'no'}")

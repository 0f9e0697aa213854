"""Compares methods: the same questions under several methods, with the same budget of vision tokens.

    python examples/compare_methods.py

It is a first look and takes seconds. `make compare` does the same for all methods, with intervals and plots, and
explains what a demo cannot show.
"""

from pathlib import Path

from PIL import Image

from llava.config import AdaVConfig
from llava.conversation import default_conv_mode, single_turn
from llava.mm_utils import left_pad, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.decoding.engine import Engine
from llava.model.decoding.sampling import Sampling
from llava.shapes.dataset import scene_questions

CHECKPOINT = Path(__file__).parents[1] / "playground" / "llava-shapes-v1.5"
PICTURES, BUDGET = 25, 14  # four questions about each picture; vision tokens per picture, of 144
METHODS = ("none", "no_image", "random", "fastervlm", "t2i", "divprune", "adav", "fastv")  # the README has the others

tokenizer, model, image_processor, _ = load_pretrained_model(CHECKPOINT)
engine = Engine(model, tokenizer)
template = default_conv_mode(model.config, tokenizer)

images, questions = [], []
for number in range(PICTURES):
    scene, asked = scene_questions("v1.5", "test", number)
    images += [Image.fromarray(scene.pixels)] * len(asked)
    questions += asked
prompts = [single_turn(template, "<image>\n" + question.text) for question in questions]
rows = [tokenizer_image_token(prompt, tokenizer, return_tensors="pt") for prompt in prompts]
input_ids, attention_mask = left_pad(rows, tokenizer.pad_token_id)
pixels = process_images(images, image_processor, model.config)
sizes = [image.size for image in images]

print(f"{len(questions)} questions about {PICTURES} pictures; chance is what no_image gets")
print("method      right   kept   prompt")
for method in METHODS:
    config = AdaVConfig(method=method, overall_tokens=BUDGET)  # options={...} steers a method; see the README
    # config= is for this request only, so one model can serve requests of different methods.
    prepared = model.prepare(input_ids, pixels, sizes, attention_mask, config=config)
    generated = engine.generate(prepared, Sampling(max_new_tokens=8))
    answers = [one.text.strip() for one in generated.answers]
    right = sum(said == question.answer for said, question in zip(answers, questions, strict=True))
    # A method inside the LLM (fastv) reads all tokens at first. Its last count is what is left after the last cut.
    dropping, first = prepared.dropping, prepared.selections[0][0]
    kept = len(first.indices) if dropping is None else dropping.left(0, 0)
    print(f"{method:10} {100 * right / len(questions):5.1f} %  {kept:5}  {prepared.lengths[0]:5} tokens")

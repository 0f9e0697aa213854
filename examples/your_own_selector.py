"""Adds a method of your own that chooses vision tokens: twenty lines, one dictionary entry, then used by its name.

    python examples/your_own_selector.py
"""

from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from llava.config import AdaVConfig
from llava.conversation import default_conv_mode, single_turn
from llava.methods.before_llm import SELECTORS, ImageTokens, Selection, Selector
from llava.methods.before_llm.base import take
from llava.methods.ranking import lowest_index_topk
from llava.mm_utils import left_pad, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.decoding.engine import Engine
from llava.model.decoding.sampling import Sampling
from llava.shapes.dataset import scene_questions


@dataclass
class Loudest(Selector):
    """Keeps the patches whose projected features are farthest from the picture's mean. Background patches are near it.

    Fields are the method's options: `options={"exponent": 1.0}` in the configuration. `keep` is called only if tokens
    must be dropped. Budgets that keep everything, newline tokens, batches and several images are handled elsewhere.
    """

    exponent: float = 2.0  # of the norm that measures distance

    def keep(self, image: ImageTokens, text: Tensor, budget: int) -> Selection:
        """Selection of `budget` patches. image: features [N, D], saliency [N], places. text: the words [m, D]."""
        patches = image.features[image.patches].float()
        distance = (patches - patches.mean(dim=0)).norm(p=self.exponent, dim=-1)
        return take(image, image.patches[lowest_index_topk(distance, budget)])


SELECTORS["loudest"] = Loudest  # from now on, the configuration accepts it like any other method

CHECKPOINT = Path(__file__).parents[1] / "playground" / "llava-shapes-v1.5"
tokenizer, model, image_processor, _ = load_pretrained_model(CHECKPOINT)
engine = Engine(model, tokenizer)
scenes = [scene_questions("v1.5", "test", number) for number in range(25)]
images = [Image.fromarray(scene.pixels) for scene, asked in scenes for _ in asked]
questions = [question for _, asked in scenes for question in asked]
template = default_conv_mode(model.config, tokenizer)
prompts = [single_turn(template, "<image>\n" + question.text) for question in questions]
rows = [tokenizer_image_token(prompt, tokenizer, return_tensors="pt") for prompt in prompts]
input_ids, attention_mask = left_pad(rows, tokenizer.pad_token_id)
pixels = process_images(images, image_processor, model.config)

for method, options in (("random", {}), ("loudest", {}), ("loudest", {"exponent": 1.0}), ("adav", {})):
    config = AdaVConfig(method=method, overall_tokens=14, options=options)
    prepared = model.prepare(input_ids, pixels, attention_mask=attention_mask, config=config)
    answers = engine.generate(prepared, Sampling(max_new_tokens=8)).answers
    right = sum(one.text.strip() == question.answer for one, question in zip(answers, questions, strict=True))
    kept = prepared.selections[0][0]
    print(f"{method} {options or ''}".ljust(26), end="")
    print(f"{right:3} of {len(questions)} right, {len(kept.indices)} of {kept.total} vision tokens each")

"""Answers one question about one picture, with all vision tokens and with a tenth of them.

    python examples/one_image.py
"""

from pathlib import Path

from PIL import Image

from llava.config import AdaVConfig
from llava.conversation import default_conv_mode, single_turn
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.shapes.dataset import scene_questions

# A LLaVA of 1.7 M parameters that knows drawn shapes, digits and letters. Any LLaVA 1.5 or 1.6 loads the same way:
# a folder, or a hub name such as "llava-hf/llava-1.5-7b-hf".
CHECKPOINT = Path(__file__).parents[1] / "playground" / "llava-shapes-v1.5"

# A picture of the demo task. Image.open("your.png") works, too.
scene, questions = scene_questions("v1.5", "test", 7)
image, question = Image.fromarray(scene.pixels), questions[0]

tokenizer, model, image_processor, _ = load_pretrained_model(CHECKPOINT)
prompt = single_turn(default_conv_mode(model.config, tokenizer), "<image>\n" + question.text)
input_ids = tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None]
pixels = process_images([image], image_processor, model.config)

print(f"Question: {question.text}  (right answer: {question.answer})")
for config in (AdaVConfig(method="none"), AdaVConfig(method="adav", overall_tokens=14)):
    model.adav_config = config  # or load_pretrained_model(..., config=config) for all requests
    new_tokens = model.generate(
        input_ids, images=pixels, image_sizes=[image.size], max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    answer = tokenizer.decode(new_tokens[0], skip_special_tokens=True).strip()
    kept = model.last_selection[0]
    print(f"{config.method:5} {len(kept.indices):3} of {kept.total} vision tokens -> {answer}")

# What AdaV kept, and how it split its budget between the question's words and the tower's [CLS] attention.
print(f"chosen by the question: {kept.report['k_text']}, by saliency: {kept.report['k_saliency']}")
side = model.get_vision_tower().num_patches_per_side
places = set(zip(kept.row.tolist(), kept.column.tolist(), strict=True))
for row in range(side):
    print("  " + " ".join("#" if (row, column) in places else "." for column in range(side)))

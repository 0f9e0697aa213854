"""Prompts that transformers' own processors make, under compress(): the layout that the tests' prompts copy.

The processors need torchvision. `make test-all` runs this in the environment of vLLM, which has it.
"""

import numpy as np
import pytest
import torch
import transformers
from family_cases import CASES, END, IMAGE, START, VIDEO
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from llava.integrations.transformers import compress

pytest.importorskip("torchvision", reason="transformers' processors of these families need it")
pytestmark = pytest.mark.long

K, TILE = 3, {"height": 56, "width": 56}
QWEN = {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": START, "<|vision_end|>": END}
INTERN = {"<IMG_CONTEXT>": IMAGE, "<video>": VIDEO, "<img>": START, "</img>": END}
GRIDS = [[56, 56], [56, 112], [112, 56], [112, 112]]
QUESTION = {"type": "text", "text": " what is it"}
PICTURES = [
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))
    for seed, size in enumerate([(90, 140), (150, 60)])
]


def tokenizer(special, **names):
    """A tokenizer of words with the ids of family_cases.py. names: tokens that a processor asks the tokenizer for."""
    words = ["<pad>", "<s>", "<unk>", "what", "is", "it", "user", "assistant"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)} | special, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(list(special))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", padding_side="left", extra_special_tokens=names
    )


def template(image):
    """A chat template that writes `image` for an image."""
    part = "{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}{% endif %}"
    turn = "{{ turn['role'] }} {% for part in turn['content'] %}" + part + "{% endfor %} "
    return "{% for turn in messages %}" + turn + "{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"


def qwen(generation, videos):
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 40}
    return getattr(transformers, f"{generation}Processor")(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=14, merge_size=2, size=pixels),
        tokenizer=tokenizer(QWEN),
        video_processor=getattr(transformers, f"{videos}VideoProcessor")(),
        chat_template=template("<|vision_start|><|image_pad|><|vision_end|>"),
    )


def internvl():
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    return transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(
            size=TILE, crop_to_patches=True, min_patches=1, max_patches=6
        ),
        tokenizer=tokenizer(INTERN, **names, video_token="<video>"),
        video_processor=transformers.InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>"),
    )


def onevision():
    return transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=TILE, image_grid_pinpoints=GRIDS),
        tokenizer=tokenizer({"<image>": IMAGE, "<video>": VIDEO}),
        video_processor=transformers.LlavaOnevisionVideoProcessor(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template("<image>"),
    )


PROCESSORS = {
    "qwen2_vl": lambda: qwen("Qwen2VL", "Qwen2VL"),
    "qwen2_5_vl": lambda: qwen("Qwen2_5_VL", "Qwen2VL"),
    "qwen3_vl": lambda: qwen("Qwen3VL", "Qwen3VL"),
    "qwen3_5": lambda: qwen("Qwen3VL", "Qwen3VL"),
    "internvl": internvl,
    "llava_onevision": onevision,
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_batch_with_one_and_two_images(name):
    model, processor = CASES[name].model(), PROCESSORS[name]()
    images = [{"type": "image", "image": picture} for picture in PICTURES]
    inputs = processor.apply_chat_template(
        [[{"role": "user", "content": [*own, QUESTION]}] for own in (images, images[:1])],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    settings = {"max_new_tokens": 4, "do_sample": False}
    stock = model.generate(**inputs, **settings)
    with compress(model, method="none") as compression:
        assert torch.equal(model.generate(**inputs, **settings), stock)
    assert sum(kept.total for kept in compression.last_selection) == int((inputs["input_ids"] == IMAGE).sum())
    with compress(model, method="adav", overall_tokens=K) as compression:
        few = model.generate(**inputs, **settings)
    assert [len(kept.indices) for kept in compression.last_selection] == [K] * 3 and not torch.equal(few, stock)

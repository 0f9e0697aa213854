"""Asks a model of any family that compress() takes about a picture: once with all vision tokens, once with fewer.

    python examples/families.py Qwen/Qwen3-VL-8B-Instruct photo.jpg "What is on the table?" --tokens 256

The code is the same for every family; checkpoints of them:

    LLaVA-1.5, LLaVA-NeXT   llava-hf/llava-1.5-7b-hf, llava-hf/llava-v1.6-vicuna-7b-hf
    Qwen2-VL, Qwen2.5-VL    Qwen/Qwen2-VL-7B-Instruct, Qwen/Qwen2.5-VL-7B-Instruct
    Qwen3-VL, Qwen3.5       Qwen/Qwen3-VL-8B-Instruct, Qwen/Qwen3-VL-30B-A3B-Instruct, Qwen/Qwen3.5-27B
    InternVL                OpenGVLab/InternVL3-8B-hf, OpenGVLab/InternVL3_5-8B-HF
    LLaVA-OneVision         llava-hf/llava-onevision-qwen2-7b-ov-hf

Except for LLaVA's, their processors need torchvision (pip install torchvision).
"""

import argparse

from transformers import AutoModelForImageTextToText, AutoProcessor

from llava.integrations.transformers import compress

parser = argparse.ArgumentParser(description="Ask a model about a picture, with all vision tokens and with fewer.")
parser.add_argument("checkpoint", help="folder or hub name, in transformers' format")
parser.add_argument("picture", help="file or URL")
parser.add_argument("question")
parser.add_argument("--tokens", type=int, default=256, help="vision tokens that the LLM reads (default: %(default)s)")
parser.add_argument("--method", default="adav", help="how they are selected (default: %(default)s)")
given = parser.parse_args()

model = AutoModelForImageTextToText.from_pretrained(given.checkpoint, dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained(given.checkpoint)
inputs = processor.apply_chat_template(
    [
        {
            "role": "user",
            "content": [{"type": "image", "path": given.picture}, {"type": "text", "text": given.question}],
        }
    ],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)


def ask():
    output = model.generate(**inputs, max_new_tokens=64)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


print(f"all vision tokens: {ask()}")
with compress(model, method=given.method, overall_tokens=given.tokens) as compression:
    answer = ask()
for kept in compression.last_selection:
    print(f"{len(kept.indices)} of {kept.total} vision tokens: {answer}")

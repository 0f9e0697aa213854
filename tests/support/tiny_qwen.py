"""Tiny random checkpoints of Qwen2.5-VL and Qwen3-VL as their repositories lay them out: weights, tokenizer, processor."""

from pathlib import Path

import transformers
from tiny_checkpoints import CLIP_MEAN, CLIP_STD, _word_level, randomise, write_json

MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<pad>")
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
SIDE = 28  # pixels along one side of a merged token
# Heads of 32, which is the smallest that vLLM's CPU attention has.
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
VISION = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_heads": 2,
    "out_hidden_size": 128,
    "patch_size": 14,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
KINDS = {
    "Qwen2_5_VL": (
        {"rope_parameters": ROPE},
        {"window_size": 56, "fullatt_block_indexes": [0, 2]},
    ),
    "Qwen3VL": (
        {"rope_parameters": ROPE | {"mrope_interleaved": True}, "head_dim": 32},
        {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]},
    ),
}


def save_qwen(folder: Path, kind: str):
    """Write a checkpoint with images of 4 to 100 merged tokens, and return its transformers model in float32.

    kind: a key of KINDS.
    """
    # 1. Tokenizer.
    tokenizer = _word_level(image_token=False, chatml=True)
    tokenizer.add_special_tokens(list(MARKS))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "eos_token": "<|im_end|>", "pad_token": "<pad>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | names)
    # 2. Model.
    id_of, (text, vision) = tokenizer.token_to_id, KINDS[kind]
    start, end, image, video, pad = map(id_of, MARKS)
    ids = {"bos_token_id": id_of("<s>"), "eos_token_id": id_of("<|im_end|>"), "pad_token_id": pad}
    config = getattr(transformers, f"{kind}Config")(
        text_config=TEXT | text | ids | {"vocab_size": tokenizer.get_vocab_size() + 6},
        vision_config=VISION | vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    randomise(model, 0)
    model.save_pretrained(folder)
    # 3. Processors.
    patches = {
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    patches["size"] = {"shortest_edge": 4 * SIDE**2, "longest_edge": 100 * SIDE**2}
    image = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": f"{kind}Processor"}
    write_json(folder / "preprocessor_config.json", patches | image)
    video = "Qwen2VLVideoProcessor" if kind == "Qwen2_5_VL" else "Qwen3VLVideoProcessor"
    write_json(folder / "video_preprocessor_config.json", patches | {"video_processor_type": video})
    return model

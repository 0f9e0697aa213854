"""Tiny random checkpoints in every format that `load_pretrained_model` reads, beside the transformers model they came from.

One transformers model (`build_reference`) is the source of every file: the `llava-hf` folders are written with
transformers' own `save_pretrained`, or with the names and the sparse config.json of the published repositories; the
original LLaVA folders hold the same tensors under LLaVA's names. A test then compares what we load with the source.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
)

PATCH = 14
SIDE = 56  # one tile: 4 x 4 patches
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]

# The five grids of LLaVA 1.6 in units of one tile, in the order of the published configs. LLaVA reads each pair as
# (width, height), Hugging Face as (height, width).
GRIDS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
PINPOINTS = [[SIDE * a, SIDE * b] for a, b in GRIDS]
SWAPPED_PINPOINTS = [[b, a] for a, b in PINPOINTS]

# Every word of the templates and of the tests' questions, so that prompts are not a row of <unk>.
VOCABULARY_TEXT = """
A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and
polite answers to the user's questions. USER: ASSISTANT: [INST] [/INST] <|im_start|> system Answer the questions.
<|im_end|> What colour is shape on left? right How many digits are there in picture and what do they add up to? Yes
No One two three red green blue circle square star
"""
QUESTIONS = (
    "What colour is the shape on the left?",
    "How many digits are there in the picture and what do they add up to?",
    "Yes?",
)


# ---------------------------------------------------------------------------------------------------- tokenizers
def _word_level(image_token: bool, chatml: bool) -> Tokenizer:
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), behavior="isolated"),
            pre_tokenizers.Split(Regex(r"[^\S\n]+"), behavior="removed"),
            pre_tokenizers.Punctuation(behavior="isolated"),
        ]
    )
    words = [w for w, _ in split.pre_tokenize_str(VOCABULARY_TEXT) if w != "\n"]
    special = ["<unk>", "<s>", "</s>"]
    names = dict.fromkeys([*special, "\n", *words])
    vocab = {name: number for number, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    if chatml:
        special += ["<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens(special + (["<image>", "<pad>"] if image_token else []))
    return tokenizer


def write_word_tokenizer(folder: Path, image_token: bool = False, chatml: bool = False) -> None:
    """Tokenizer files: words, punctuation and line feeds are one token each, `<s>` in front.

    image_token: as in `llava-hf` repositories, `<image>` and `<pad>` come last in the vocabulary.
    chatml: `<|im_start|>` and `<|im_end|>` are special tokens, as in LLaVA-1.6-34B.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _word_level(image_token, chatml).save(str(folder / "tokenizer.json"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "<|im_end|>" if chatml else "</s>"}
    special["pad_token"] = "<pad>" if image_token else "<unk>"
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, "padding_side": "right"}
    write_json(folder / "tokenizer_config.json", config | special)
    write_json(folder / "special_tokens_map.json", special)


def train_sentencepiece(folder: Path) -> None:
    """A bare `tokenizer.model` with the tokenizer_config.json of the liuhaotian repositories, and no tokenizer.json."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*VOCABULARY_TEXT.strip().splitlines(), *QUESTIONS] * 20),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()

    def special(content):
        return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": False, "rstrip": False}

    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": special("<s>"),
        "clean_up_tokenization_spaces": False,
        "eos_token": special("</s>"),
        "legacy": False,
        "model_max_length": 2048,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": special("<unk>"),
    }
    write_json(folder / "tokenizer_config.json", config)
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", names)


# ---------------------------------------------------------------------------------------------------- the source
@dataclass
class Ids:
    """Where the special tokens of a tiny checkpoint lie in its vocabulary."""

    image: int
    pad: int
    bos: int = 1
    eos: int = 2
    size: int = field(default=0)


def word_ids() -> Ids:
    """Ids of the word-level tokenizer; the vocabulary of the model has rows to spare, as published ones have."""
    vocab = _word_level(image_token=True, chatml=False).get_vocab()
    return Ids(image=vocab["<image>"], pad=vocab["<pad>"], size=len(vocab) + 6)


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Weights large enough that logits are of order 1 and every input, position and layer shows in them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim >= 2:
                embedding = "embed" in name and "patch" not in name
                weight.copy_(noise if embedding else noise * 1.3 / (weight[0].numel() ** 0.5))
            elif "norm" in name and name.endswith("weight"):
                weight.copy_(1 + 0.2 * noise)
            else:
                weight.copy_(noise * (1.0 if "newline" in name or "class_embedding" in name else 0.2))


def build_reference(
    kind: str = "llava",
    text: str = "llama",
    seed: int = 0,
    ids: Ids | None = None,
    pinpoints: list | None = None,
    side: int = SIDE,
    vision: dict | None = None,
    **text_options,
) -> LlavaForConditionalGeneration | LlavaNextForConditionalGeneration:
    """A random transformers model in float32. kind: `llava` (1.5) or `llava_next` (1.6); text: `llama` or `mistral`.

    pinpoints are in Hugging Face's order, (height, width).
    """
    ids = ids or word_ids()
    vision_options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision_config = CLIPVisionConfig(
        **(vision_options | {"image_size": side, "patch_size": PATCH, "projection_dim": 16} | (vision or {}))
    )
    sizes = {
        "vocab_size": ids.size,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if text == "mistral" else 4,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
    }
    if text == "mistral":
        sizes |= {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    text_config = {"llama": LlamaConfig, "mistral": MistralConfig}[text](**(sizes | text_options))
    common = {
        "vision_config": vision_config.to_dict(),
        "text_config": text_config.to_dict(),
        "image_token_index": ids.image,
        "pad_token_id": ids.pad,
        "image_seq_length": (side // PATCH) ** 2,
        "tie_word_embeddings": text_config.tie_word_embeddings,
    }
    if kind == "llava":
        model = LlavaForConditionalGeneration(LlavaConfig(**common))
    else:
        common["image_grid_pinpoints"] = [list(p) for p in pinpoints or PINPOINTS]
        model = LlavaNextForConditionalGeneration(LlavaNextConfig(**common))
    randomise(model, seed)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = ids.eos, ids.pad
    return model.eval()


# ---------------------------------------------------------------------------------------------------- llava-hf
def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _preprocessor(model, published: bool) -> dict:
    side = model.config.vision_config.image_size
    content = {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "image_processor_type": "CLIPImageProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }
    if model.config.model_type == "llava_next":
        content |= {
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": model.config.image_grid_pinpoints,
        }
        content |= {"aspect_ratio_setting": "anyres", "do_pad": True} if published else {}
    return content


def _write_processor(model, folder: Path, published: bool) -> None:
    write_word_tokenizer(folder, image_token=True)
    write_json(folder / "preprocessor_config.json", _preprocessor(model, published))
    name = "LlavaNextProcessor" if model.config.model_type == "llava_next" else "LlavaProcessor"
    content = {"processor_class": name, "image_token": "<image>", "patch_size": PATCH}
    content |= {"vision_feature_select_strategy": "default"}
    content |= {} if published else {"num_additional_image_tokens": 1}
    write_json(folder / "processor_config.json", content)


def save_llava_hf(model, folder: Path, layout: str = "current", processor: bool = True) -> Path:
    """Writes `model` as a `llava-hf` folder.

    layout: `current` is what transformers 5 saves; `published` has the names, the shards and the sparse config.json
    of the repositories on the hub; `runtime` has the names that the modules have in memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "current":
        model.save_pretrained(folder)
    elif layout == "runtime":
        model.save_pretrained(folder)
        save_file(contiguous(model.state_dict()), folder / "model.safetensors", metadata={"format": "pt"})
    elif layout == "published":
        tensors = {_published_name(name): value for name, value in model.state_dict().items()}
        save_sharded_safetensors(contiguous(tensors), folder)
        write_json(folder / "config.json", _published_config(model))
        write_json(
            folder / "generation_config.json", {"_from_model_config": True, "eos_token_id": 2, "pad_token_id": 3}
        )
    else:
        raise ValueError(layout)
    if processor:
        _write_processor(model, folder, published=layout == "published")
    return folder


def _published_name(name: str) -> str:
    for ours, theirs in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.", ""),
    ):
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    raise ValueError(name)


def _published_config(model) -> dict:
    """Only what the hub's config.json says; everything else is the default of transformers' config classes."""
    text, vision = model.config.text_config, model.config.vision_config
    defaults = type(text)()
    text_content = {"_name_or_path": "base", "model_type": text.model_type, "torch_dtype": "float32"}
    for key in (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "sliding_window"),
    ):
        if getattr(text, key, None) != getattr(defaults, key, None):
            text_content[key] = getattr(text, key)
    if text.rope_parameters["rope_theta"] != 10000:
        text_content["rope_theta"] = text.rope_parameters["rope_theta"]
    content = {
        "architectures": [type(model).__name__],
        "ignore_index": -100,
        "image_token_index": model.config.image_token_index,
        "model_type": model.config.model_type,
        "pad_token_id": model.config.pad_token_id,
        "projector_hidden_act": "gelu",
        "text_config": text_content,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.36.0.dev0",
        "vision_config": {
            "hidden_size": vision.hidden_size,
            "image_size": vision.image_size,
            "intermediate_size": vision.intermediate_size,
            "model_type": "clip_vision_model",
            "num_attention_heads": vision.num_attention_heads,
            "num_hidden_layers": vision.num_hidden_layers,
            "patch_size": vision.patch_size,
            "projection_dim": vision.projection_dim,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": text.vocab_size,
    }
    if model.config.model_type == "llava_next":
        content["image_grid_pinpoints"] = model.config.image_grid_pinpoints
        content["use_image_newline_parameter"] = True
    return content


def nest_image_processor(folder: Path, **changes) -> Path:
    """Moves the image processor's settings to where transformers 5 saves them: into processor_config.json."""
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    content = json.loads((folder / "processor_config.json").read_text())
    write_json(folder / "processor_config.json", content | {"image_processor": settings | changes})
    return folder


# ------------------------------------------------------------------------------------------- original LLaVA format
def text_tensors(model) -> dict[str, torch.Tensor]:
    """The language model's tensors under the names of a plain LlamaForCausalLM."""
    prefix = "model.language_model."
    tensors = {"model." + k[len(prefix) :]: v for k, v in model.state_dict().items() if k.startswith(prefix)}
    return tensors | {"lm_head.weight": model.lm_head.weight}


def projector_tensors(model) -> dict[str, torch.Tensor]:
    """The projector's tensors, and the newline token where there is one, under LLaVA's names."""
    projector = model.model.multi_modal_projector
    tensors = {
        f"model.mm_projector.{place}.{name}": getattr(layer, name)
        for place, layer in ((0, projector.linear_1), (2, projector.linear_2))
        for name in ("weight", "bias")
    }
    newline = getattr(model.model, "image_newline", None)
    return tensors | ({} if newline is None else {"model.image_newline": newline})


def save_clip_tower(model, folder: Path, weights: str = "bin") -> Path:
    """The vision tower alone, laid out as openai/clip-vit-large-patch14-336: a whole CLIPModel, and its old
    preprocessor_config.json, in which `size` and `crop_size` are plain numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    vision = model.config.vision_config
    text = CLIPTextConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=0,
        eos_token_id=2,
    )
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=vision.projection_dim
    )
    clip = CLIPModel(config)
    clip.vision_model.load_state_dict(model.model.vision_tower.state_dict())
    tensors = contiguous(clip.state_dict())
    positions = torch.arange(tensors["vision_model.embeddings.position_embedding.weight"].shape[0])
    tensors["vision_model.embeddings.position_ids"] = positions[None]
    if weights == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["CLIPModel"]
    config.save_pretrained(folder)
    write_json(
        folder / "preprocessor_config.json",
        {
            "crop_size": vision.image_size,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "resample": 3,
            "size": vision.image_size,
        },
    )
    return folder


def original_config(model, tower: Path | str, model_type: str = "llava", **changes) -> dict:
    """config.json of an original LLaVA checkpoint with the language model of `model`."""
    text, anyres = model.config.text_config, model.config.model_type == "llava_next"
    content = {
        "_name_or_path": "llava-tiny",
        "architectures": ["LlavaMistralForCausalLM" if text.model_type == "mistral" else "LlavaLlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "image_aspect_ratio": "anyres" if anyres else "pad",
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate_size,
        "max_length": 4096,
        "max_position_embeddings": text.max_position_embeddings,
        "mm_hidden_size": model.config.vision_config.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(tower),
        "model_type": "llava_mistral" if text.model_type == "mistral" else model_type,
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": text.rope_parameters["rope_theta"],
        "tie_word_embeddings": False,
        "tokenizer_model_max_length": 1024,
        "tokenizer_padding_side": "right",
        "torch_dtype": "float32",
        "transformers_version": "4.31.0",
        "tune_mm_mlp_adapter": False,
        "use_cache": True,
        "use_mm_proj": True,
        "vocab_size": text.vocab_size,
    }
    if text.model_type == "mistral":
        content["sliding_window"] = text.sliding_window
    if anyres:
        content |= {
            "image_grid_pinpoints": [[w, h] for h, w in model.config.image_grid_pinpoints],
            "image_crop_resolution": 224,
            "image_split_resolution": 224,
            "mm_patch_merge_type": "spatial_unpad",
            "mm_vision_tower_lr": 2e-06,
            "unfreeze_mm_vision_tower": True,
        }
    return content | changes


def save_original(
    model,
    folder: Path,
    tower: Path,
    weights: str = "safetensors",
    vision_in_checkpoint: bool | None = None,
    tokenizer: str | None = "words",
    model_type: str = "llava",
    **config_changes,
) -> Path:
    """Writes `model` as an original LLaVA checkpoint whose `mm_vision_tower` is the folder `tower`.

    weights: `safetensors`, `sharded_safetensors`, `bin` or `sharded_bin`; the .bin files also hold the buffers that
    old versions saved. vision_in_checkpoint: by default as published, absent from 1.5 and present in 1.6.
    tokenizer: `words`, `chatml`, `sentencepiece` or None.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if vision_in_checkpoint is None:
        vision_in_checkpoint = model.config.model_type == "llava_next"
    tensors = text_tensors(model) | projector_tensors(model)
    if vision_in_checkpoint:
        prefix = "model.vision_tower.vision_tower.vision_model."
        tensors |= {prefix + k: v for k, v in model.model.vision_tower.state_dict().items()}
    tensors = contiguous(tensors)
    if "bin" in weights:
        head = model.config.text_config.hidden_size // model.config.text_config.num_attention_heads
        for layer in range(model.config.text_config.num_hidden_layers):
            # A stale buffer, and a wrong one: whoever loads it rather than computes it is found out.
            tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.full((head // 2,), 0.123)
        if vision_in_checkpoint:
            count = model.model.vision_tower.embeddings.position_embedding.weight.shape[0]
            tensors["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(count)[None]
    writer = {
        "safetensors": lambda: save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"}),
        "sharded_safetensors": lambda: save_sharded_safetensors(tensors, folder),
        "bin": lambda: torch.save(tensors, folder / "pytorch_model.bin"),
        "sharded_bin": lambda: save_sharded_bin(tensors, folder),
    }[weights]
    writer()
    write_json(folder / "config.json", original_config(model, tower, model_type, **config_changes))
    generation = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "max_length": 4096}
    write_json(folder / "generation_config.json", generation | {"pad_token_id": 0, "temperature": 0.9, "top_p": 0.6})
    if tokenizer == "sentencepiece":
        train_sentencepiece(folder)
    elif tokenizer:
        write_word_tokenizer(folder, chatml=tokenizer == "chatml")
    return folder


def save_plain_llm(model, folder: Path) -> Path:
    """The language model alone, as a plain Llama or Mistral checkpoint: what `model_base` names."""
    plain_llm(model).save_pretrained(folder)
    write_word_tokenizer(folder)
    return folder


def plain_llm(model) -> LlamaForCausalLM | MistralForCausalLM:
    """transformers' text-only model with the language weights of `model`."""
    text = model.config.text_config
    plain = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM}[text.model_type](text)
    plain.load_state_dict(text_tensors(model))
    plain.generation_config = model.generation_config
    return plain.eval()


def save_projector_only(model, folder: Path, tower: Path) -> Path:
    """A pre-training checkpoint of LLaVA: the projector alone, to be loaded over a `model_base`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v for k, v in projector_tensors(model).items() if "mm_projector" in k}
    torch.save(contiguous(tensors), folder / "mm_projector.bin")
    write_json(folder / "config.json", original_config(model, tower, "llava_llama", tune_mm_mlp_adapter=True))
    return folder


def save_lora(model, folder: Path, tower: Path, adapter_file: str = "adapter_model.safetensors"):
    """A LoRA checkpoint of LLaVA, to be loaded over a `model_base` with the language weights of `model`.

    Returns the transformers model with the adapters merged into its language weights.
    """
    from peft import LoraConfig, get_peft_model

    folder.mkdir(parents=True, exist_ok=True)
    adapted = get_peft_model(
        plain_llm(model),
        LoraConfig(
            r=4,
            lora_alpha=16,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            lora_dropout=0.05,
            bias="none",
            task_type="CAUSAL_LM",
        ),
    )
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    adapted.save_pretrained(folder)
    if adapter_file.endswith(".bin"):
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / adapter_file)
        (folder / "adapter_model.safetensors").unlink()
    trained = {"base_model.model." + k: v for k, v in projector_tensors(model).items()}
    torch.save(contiguous(trained), folder / "non_lora_trainables.bin")
    write_json(folder / "config.json", original_config(model, tower, "llava_llama"))

    merged = adapted.merge_and_unload()
    twin = type(model)(model.config)
    twin.load_state_dict(model.state_dict())
    twin.model.language_model.load_state_dict(merged.model.state_dict())
    twin.lm_head.load_state_dict(merged.lm_head.state_dict())
    twin.generation_config = model.generation_config
    return twin.eval()


# ---------------------------------------------------------------------------------------------------- files
def contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies that share no memory with the model, as files need them."""
    return {name: value.detach().clone().contiguous() for name, value in tensors.items()}


def _shards(tensors: dict, pattern: str, count: int = 2):
    names = list(tensors)
    files = [pattern.format(number + 1, count) for number in range(count)]
    parts = {file: {name: tensors[name] for name in names[number::count]} for number, file in enumerate(files)}
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": {n: file for file, part in parts.items() for n in part}}
    return parts, index


def save_sharded_safetensors(tensors: dict, folder: Path) -> None:
    parts, index = _shards(tensors, "model-{:05d}-of-{:05d}.safetensors")
    for file, part in parts.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    write_json(folder / "model.safetensors.index.json", index)


def save_sharded_bin(tensors: dict, folder: Path) -> None:
    parts, index = _shards(tensors, "pytorch_model-{:05d}-of-{:05d}.bin")
    for file, part in parts.items():
        torch.save(part, folder / file)
    write_json(folder / "pytorch_model.bin.index.json", index)


# ---------------------------------------------------------------------------------------------------- images
def make_image(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB image with structure at every scale: gradients, a bright rectangle and noise."""
    generator = torch.Generator().manual_seed(1000 * width + height + seed)
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    pixels = torch.stack([x, y, (1 - x) * y]) * 150
    top, left = int(height * 0.2), int(width * 0.5)
    pixels[seed % 3, top : top + height // 3 + 1, left : left + width // 3 + 1] += 90
    pixels += torch.rand((3, height, width), generator=generator) * 60
    return Image.fromarray(pixels.clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy(), "RGB")

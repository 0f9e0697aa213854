"""load_pretrained_model: loads tokenizer, model and image processor from a checkpoint folder or hub name.

Two checkpoint formats load: the original one of LLaVA (`liuhaotian/llava-*`, with its projector-only and LoRA forms on
top of a `model_base`), and that of transformers (`llava-hf/*`). The files of a checkpoint say what it is, never its
name.
"""

from __future__ import annotations

import os
from functools import partial

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from llava.common.errors import UserError, first_line
from llava.config import AdaVConfig
from llava.conversation import default_conv_mode, turn_markers
from llava.model.checkpoint import Checkpoint
from llava.model.decoding.decode_step import merge_projections
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralForCausalLM
from llava.model.processors import adopt_padding, load_tokenizer
from llava.model.prompt_rows import word_ids

MODEL_CLASSES = {"llava_llama": LlavaLlamaForCausalLM, "llava_mistral": LlavaMistralForCausalLM}


def load_pretrained_model(
    model_path: str | os.PathLike,
    model_base: str | os.PathLike | None = None,
    model_name: str | None = None,
    load_8bit: bool = False,
    load_4bit: bool = False,
    device_map="auto",
    device: str | None = None,
    *,
    config: AdaVConfig | None = None,
    torch_dtype="auto",
):
    """Load a LLaVA checkpoint. Returns (tokenizer, model, image_processor, context_len).

    model_path: folder or hub name
    model_base: the LLM (or LLaVA) under a projector-only or LoRA checkpoint
    model_name: accepted because callers of LLaVA pass it, and ignored
    load_8bit, load_4bit: the linear layers of the LLM in 8 or 4 bits (bitsandbytes; 4 bits are NF4). The vision tower, the
        projector and the head keep their dtype. For full checkpoints, without model_base.
    device_map: as transformers takes it; "auto" is the CPU where there is no GPU
    device: as in LLaVA, the device of the whole model, with priority over device_map; None and "cuda" leave the choice to
        device_map
    config: settings of the methods; None is the plain model
    torch_dtype: a dtype or its name; "auto" is the checkpoint's own dtype on a GPU and float32 on the CPU
    context_len is in tokens. Tokenizer or image processor is None where the checkpoint has none. Raises UserError for
    anything that is wrong with the checkpoint or does not fit `config`.
    """
    # 1. Configuration and checks. They come before the weights, which take minutes to load.
    config = config or AdaVConfig(method="none")
    config.check_method_options()
    device_map = _device_map(device_map, device)
    on_gpu = torch.cuda.is_available() and device_map not in ("cpu", {"": "cpu"})
    if device_map == "auto" and not on_gpu:
        device_map = None
    source = Checkpoint.open(model_path, model_base)
    dtype = _dtype(torch_dtype, on_gpu)
    quantisation = quantisation_config(source, load_8bit, load_4bit, dtype)
    if quantisation is not None and device_map is None:
        device_map = {"": "cpu"}
    model_config = source.model_config()
    check_config(config, model_config)
    # 2. The model.
    model = source.load(MODEL_CLASSES[model_config.model_type], model_config, device_map, dtype, quantisation)
    model.eval()
    make_fast(model)
    # 3. Tokenizer and image processor. Projector-only and LoRA checkpoints often leave them to the base or the tower.
    tokenizer = load_tokenizer([source.folder, source.base])
    image_processor = source.image_processor()
    adopt_padding(model.config, image_processor)
    # 4. The methods.
    configure(model, config, tokenizer)
    context_len = getattr(model_config, "max_sequence_length", None) or model_config.max_position_embeddings
    return tokenizer, model, image_processor, context_len


def quantisation_config(source: Checkpoint, load_8bit: bool, load_4bit: bool, dtype):
    """BitsAndBytesConfig for from_pretrained, or None where neither is asked for.

    UserError for both at a time, for a checkpoint with a model_base, and where bitsandbytes is not installed.
    """
    if not (load_8bit or load_4bit):
        return None
    asked = "load_8bit" if load_8bit else "load_4bit"
    if load_8bit and load_4bit:
        raise UserError("load_8bit and load_4bit are both true, allowed is one of them")
    if source.base is not None:
        raise UserError(
            f"{asked} is true, but {source.folder} needs a model_base: merge both first, because weights in few bits cannot "
            "be added to"
        )
    if not is_bitsandbytes_available():
        raise UserError(f"{asked} is true, but bitsandbytes is not installed: pip install bitsandbytes")
    return BitsAndBytesConfig(
        load_in_8bit=load_8bit,
        load_in_4bit=load_4bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype if isinstance(dtype, torch.dtype) else torch.float16,
        llm_int8_skip_modules=["model.vision_tower", "model.mm_projector", "lm_head"],
    )


def _device_map(device_map, device):
    """The device map that LLaVA's arguments mean: a device other than "cuda" takes the whole model."""
    if device is None:
        return device_map
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UserError(f'device is "{device}", allowed are cpu, cuda and cuda:N ({first_line(error)})') from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f'device is "{device}", but this torch sees no GPU; allowed are cpu and None')
    return device_map if str(device) == "cuda" else {"": str(device)}


def make_fast(model) -> None:
    """Make the LLM faster on GPUs without changing its results; do nothing where any weight is not on a GPU.

    Weights that multiply the same input become adjacent (merge_projections), and cuDNN's attention is switched off.
    """
    devices = {weight.device.type for weight in model.parameters()}
    if devices == {"cuda"}:
        prefer_flash_attention()
        merge_projections(model)


def prefer_flash_attention() -> None:
    """Switch off cuDNN's attention in PyTorch, for the whole process.

    torch 2.11 for CUDA 13 prefers it on an H100 and an H200. It builds a plan for every new shape, which takes 20 to
    400 ms. generate() has a new shape in each decode step and in each length of a prompt. Flash attention needs no
    plan.
    """
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)


def check_config(config: AdaVConfig, model_config) -> None:
    """Raise UserError where a model of `model_config` cannot run `config`; called before weights are loaded."""
    if config.option("saliency") != "attention":
        raise UserError(
            f'"options.saliency" is "{config.option("saliency")}", allowed for LLaVA is "attention": its tower has [CLS]'
        )
    dropper = config.make_dropper()
    if dropper is not None:
        dropper.check(model_config)


def configure(model, config: AdaVConfig, tokenizer=None) -> None:
    """Make `config` the default of the model and load what its method needs. tokenizer: None where there is none."""
    model.adav_config = config
    model.config.mm_anyres = config.option("anyres")
    config.warn_of_unused_options()
    if tokenizer is not None:
        give_words(model, default_conv_mode(model.config, tokenizer), tokenizer)
    if "text_cosine" in config.make_method().tower_states:
        model.text_tower(config.options["text_tower"])


def give_words(model, template: str, tokenizer) -> None:
    """Give the model what methods need to read the words of a question. template: name of the conversation template."""
    model.turn_markers = turn_markers(template, tokenizer)
    model.question_words = partial(tokenizer.decode, skip_special_tokens=True)
    model.word_ids = partial(word_ids, tokenizer)


def _dtype(torch_dtype, on_gpu: bool):
    """Return the dtype for from_pretrained. UserError for a name that is no floating-point dtype of torch."""
    # float32 on a CPU: half precision is slow there, and not every operation supports it.
    if torch_dtype == "auto":
        return "auto" if on_gpu else torch.float32
    if isinstance(torch_dtype, torch.dtype):
        return torch_dtype
    found = getattr(torch, str(torch_dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UserError(f'torch_dtype is "{torch_dtype}", allowed are "auto", "float32", "float16", "bfloat16"')
    return found

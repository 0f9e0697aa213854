"""Builds the model for training, from an LLM with tower and projector or from a LLaVA, and marks what is trained."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import set_seed
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from llava.common.errors import UserError
from llava.common.hub import checkpoint_folder
from llava.conversation import default_conv_mode
from llava.mm_utils import is_hf, read_pinpoints
from llava.model.builder import MODEL_CLASSES, give_words, load_pretrained_model
from llava.model.checkpoint import Checkpoint, load_extra
from llava.model.processors import load_tokenizer
from llava.train.arguments import RunArguments

# Adapters are added to all linear layers of the LLM except the LM head, as in LLaVA. The tower has layers of the same
# names, so the pattern has the whole path.
LORA_TARGETS = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"


def build(run: RunArguments):
    """(tokenizer, model, image_processor) of a run. All weights are loaded, and requires_grad says which are trained.

    Sets run.model.version if the command line does not. UserError for bad checkpoints and arguments that do not fit.
    """
    # 1. Seed and dtype.
    model_args, data_args, training = run.model, run.data, run.training
    set_seed(training.seed)  # a new projector starts from random weights
    folder = checkpoint_folder(model_args.model_name_or_path)
    # Small updates are lost in half-precision weights. DeepSpeed's optimizer keeps float32 copies of them; without
    # DeepSpeed the weights stay in float32.
    half = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    dtype = half if training.deepspeed else torch.float32
    # 2. Weights.
    with _whole_weights(training):
        if Checkpoint.is_llava(folder):
            _refuse_settings_of_a_llava(run)
            tokenizer, model, image_processor, _ = load_pretrained_model(
                folder, config=run.selection, device_map=None, torch_dtype=dtype
            )
        else:
            tokenizer, model, image_processor = _from_llm(run, dtype)
        if model_args.pretrain_mm_mlp_adapter:
            path = Path(model_args.pretrain_mm_mlp_adapter)
            if not path.is_file():
                raise UserError(f"--pretrain_mm_mlp_adapter {path}: no such file")
            load_extra(model, path)
    if tokenizer is None or image_processor is None:
        raise UserError(f"{folder}: has no tokenizer or no image processor, and training needs both")
    # 3. How images are prepared. A LLaVA keeps its own way, apart from square and pad, which need no other weights.
    if data_args.image_aspect_ratio not in (None, model.config.image_aspect_ratio):
        if is_hf(model.config) or model.config.image_aspect_ratio == "anyres":
            raise UserError(
                f'{folder}: its images are prepared as "{model.config.image_aspect_ratio}", so --image_aspect_ratio '
                f'"{data_args.image_aspect_ratio}" must not be given'
            )
        model.config.image_aspect_ratio = data_args.image_aspect_ratio
    # 4. Template, and what LLaVA writes into config.json.
    if model_args.version is None:
        model_args.version = default_conv_mode(model.config, tokenizer)
    tokenizer.padding_side = "right"
    give_words(model, model_args.version, tokenizer)
    model.config.tokenizer_model_max_length = training.model_max_length
    model.config.tokenizer_padding_side = "right"
    model.config.tune_mm_mlp_adapter = model_args.tune_mm_mlp_adapter
    model.config.freeze_mm_mlp_adapter = training.freeze_mm_mlp_adapter
    model.config.unfreeze_mm_vision_tower = model_args.unfreeze_mm_vision_tower
    model.config.use_cache = False  # training reads no KV cache, and gradient checkpointing does not allow one
    # 5. What is trained.
    _choose_what_learns(model, run)
    if run.kind == "lora":
        model = _with_lora(model, training, dtype)
    return tokenizer, model, image_processor


def _from_llm(run: RunArguments, dtype):
    """(tokenizer, model, image_processor) from an LLM, the tower of --vision_tower and an untrained projector."""
    model_args, data_args = run.model, run.data
    if not model_args.vision_tower:
        raise UserError(f"{model_args.model_name_or_path}: is a plain LLM, so --vision_tower must name a CLIP")
    settings = {
        "mm_vision_tower": model_args.vision_tower,
        "mm_projector_type": model_args.mm_projector_type,
        "mm_vision_select_layer": model_args.mm_vision_select_layer,
        "mm_vision_select_feature": model_args.mm_vision_select_feature,
        "mm_patch_merge_type": model_args.mm_patch_merge_type,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        "image_aspect_ratio": data_args.image_aspect_ratio or "square",
    }
    if data_args.image_grid_pinpoints is not None:
        settings["image_grid_pinpoints"] = data_args.image_grid_pinpoints
    source = Checkpoint.of_llm(model_args.model_name_or_path, **settings)
    config = source.model_config()
    if config.image_grid_pinpoints is not None:
        config.image_grid_pinpoints = read_pinpoints(
            config.image_grid_pinpoints, config.mm_tile_size, "--image_grid_pinpoints"
        )
    config.mm_anyres = run.selection.option("anyres")
    model = source.load(MODEL_CLASSES[config.model_type], config, None, dtype)
    model.adav_config = run.selection
    return load_tokenizer([source.folder]), model, source.image_processor()


def _refuse_settings_of_a_llava(run: RunArguments) -> None:
    """Raise UserError for settings that a LLaVA checkpoint fixes: another grid would make it a different model."""
    if run.data.image_grid_pinpoints is not None:
        raise UserError(
            f"{run.model.model_name_or_path}: is a LLaVA already, so --image_grid_pinpoints must not be given"
        )
    if run.data.image_aspect_ratio not in (None, "pad", "square"):
        raise UserError(
            f'{run.model.model_name_or_path}: is a LLaVA already, so --image_aspect_ratio "{run.data.image_aspect_ratio}" '
            "must not be given, allowed are pad and square"
        )


def _choose_what_learns(model, run: RunArguments) -> None:
    """Set requires_grad of every weight by LLaVA's rules. The newline token follows the projector."""
    base, kind = model.model, run.kind
    # The order matters: the first line also sets tower and projector, which are parts of the model.
    model.requires_grad_(kind == "full" and not run.model.freeze_backbone)
    base.vision_tower.requires_grad_(run.model.unfreeze_mm_vision_tower)
    base.mm_projector.requires_grad_(not run.training.freeze_mm_mlp_adapter)
    if hasattr(base, "image_newline"):
        # Selection keeps no newline token, so most batches would give this weight no gradient, and DDP would fail.
        reads_newlines = run.selection.method == "none" and model.config.image_aspect_ratio == "anyres"
        base.image_newline.requires_grad_(reads_newlines and not run.training.freeze_mm_mlp_adapter)
    if kind != "lora" and not any(p.requires_grad for p in model.parameters()):
        raise UserError("every part of the model is frozen, so there is nothing to train")


def _with_lora(model, training, dtype):
    """The model with LoRA adapters in the LLM. UserError for values that peft does not accept."""
    from peft import LoraConfig, get_peft_model

    if training.lora_r < 1 or training.lora_alpha < 1 or not 0 <= training.lora_dropout < 1:
        raise UserError(
            f"--lora_r {training.lora_r} --lora_alpha {training.lora_alpha} --lora_dropout {training.lora_dropout}: allowed "
            "are whole numbers of at least 1, and a dropout from 0 to below 1"
        )
    learning = [p for p in model.parameters() if p.requires_grad]
    adapted = get_peft_model(
        model,
        LoraConfig(
            r=training.lora_r,
            lora_alpha=training.lora_alpha,
            target_modules=LORA_TARGETS,
            lora_dropout=training.lora_dropout,
            bias=training.lora_bias,
            task_type="CAUSAL_LM",
        ),
        # By default peft makes adapters float32. Under DeepSpeed all weights need one dtype.
        autocast_adapter_dtype=dtype == torch.float32,
    )
    for parameter in learning:  # get_peft_model freezes everything but the adapters, the projector included
        parameter.requires_grad_(True)
    # With frozen embeddings, a checkpointed layer's input needs no gradient, and its adapters would get none either.
    if training.gradient_checkpointing:
        adapted.enable_input_require_grads()
    return adapted


@contextmanager
def _whole_weights(training):
    """Context in which transformers loads whole weights although DeepSpeed ZeRO-3 is on.

    Under ZeRO-3, transformers partitions every weight over the ranks while it loads it. Tower and projector are filled
    in later and would find empty tensors. In this context each rank loads the whole model into host memory, and
    DeepSpeed partitions it when training starts.
    """
    config = getattr(training, "hf_deepspeed_config", None)
    if config is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)

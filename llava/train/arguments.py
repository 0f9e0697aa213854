"""Command line of training: LLaVA's flags under their own names, transformers' TrainingArguments, and their checks.

Some flags of LLaVA's published command lines have no effect here. They are accepted, and their help says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.conversation import conv_templates
from llava.methods.inside_llm import dropper_names


def _flag(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    """Flags about the model: what is trained, and from which checkpoints."""

    model_name_or_path: str | None = _flag(None, "an LLM (Vicuna, Llama, Mistral) or a LLaVA, folder or hub name")
    version: str | None = _flag(None, "conversation template: v1, plain, chatml_direct, mistral_instruct")
    vision_tower: str | None = _flag(None, "CLIP folder or hub name; a LLaVA brings its own")
    pretrain_mm_mlp_adapter: str | None = _flag(None, "mm_projector.bin of the pretraining")
    mm_projector_type: str = _flag("linear", "linear or mlpNx_gelu")
    mm_vision_select_layer: int = _flag(-1, "hidden state of the tower that is used; published models use -2")
    mm_vision_select_feature: str = _flag("patch", "only patch")
    mm_patch_merge_type: str = _flag("flat", "flat, spatial or spatial_unpad")
    tune_mm_mlp_adapter: bool = _flag(False, "train the projector alone (pretraining)")
    freeze_backbone: bool = _flag(False, "leave the LLM as it is")
    unfreeze_mm_vision_tower: bool = _flag(False, "train the vision tower too, as LLaVA 1.6 does")
    mm_use_im_start_end: bool = _flag(False, "only False: no LLaVA from 1.5 on has these tokens")
    mm_use_im_patch_token: bool = _flag(False, "only False: no LLaVA from 1.5 on has this token")


@dataclass
class DataArguments:
    """Flags about the data."""

    data_path: str | None = _flag(None, "JSON list of conversations")
    image_folder: str | None = _flag(None, "where the images of data_path lie")
    image_aspect_ratio: str | None = _flag(
        None, "square, pad or anyres; a LLaVA brings its own, an LLM starts at square"
    )
    image_grid_pinpoints: str | None = _flag(None, "canvas sizes under anyres: [[336, 672], ...] as (width, height)")
    lazy_preprocess: bool = _flag(True, "decides nothing: samples are always read when their batch comes")
    is_multimodal: bool = _flag(True, "decides nothing: samples say themselves whether they have images")
    adav_config: str | None = _flag(None, "configuration file for selection during training (or flags like --method)")


@dataclass
class LlavaTrainingArguments(TrainingArguments):
    """transformers' arguments with LLaVA's additions."""

    model_max_length: int = _flag(2048, "tokens of a sample, vision tokens included; what is longer is cut at the end")
    group_by_modality_length: bool = _flag(False, "batches of one modality, and of samples of like length")
    freeze_mm_mlp_adapter: bool = _flag(False, "leave the projector as it is")
    mm_projector_lr: float | None = _flag(None, "learning rate of the projector; learning_rate where none is given")
    mm_vision_tower_lr: float | None = _flag(None, "learning rate of the tower; learning_rate where none is given")
    lora_enable: bool = _flag(False, "train LoRA adapters in the LLM (arXiv 2106.09685) in place of its weights")
    lora_r: int = _flag(64, "rank")
    lora_alpha: int = _flag(16, "scale")
    lora_dropout: float = _flag(0.05, "dropout in front of the adapters")
    lora_bias: str = _flag("none", "which biases are trained: none, all or lora_only")
    warmup_ratio: float | None = _flag(None, "share of the steps in which the learning rate rises")
    evaluation_strategy: str = _flag("no", "only no: accuracy is measured by the benchmarks")

    def __post_init__(self):
        if self.warmup_ratio is not None:
            if not 0 <= self.warmup_ratio < 1:
                raise UserError(f"--warmup_ratio is {self.warmup_ratio}, allowed is a share from 0 to below 1")
            self.warmup_steps = self.warmup_ratio  # transformers 5 reads a number below 1 as a share of the steps
        # Otherwise Trainer removes what forward() does not name, and the pixels never reach the collator.
        self.remove_unused_columns = False
        if self.ddp_find_unused_parameters is None:
            # Every weight that learns has a gradient in every step (ConversationDataset.blank); looking for others costs a
            # pass over the graph, and torch warns that it found none.
            self.ddp_find_unused_parameters = False
        super().__post_init__()


@dataclass
class RunArguments:
    """All arguments of one training run. selection: how vision tokens are chosen during training."""

    model: ModelArguments
    data: DataArguments
    training: LlavaTrainingArguments
    selection: AdaVConfig

    @property
    def kind(self) -> str:
        """The part that is trained and saved: "projector", "lora" or "full"."""
        if self.model.tune_mm_mlp_adapter:
            return "projector"
        return "lora" if self.training.lora_enable else "full"

    def check(self) -> None:
        """Raise UserError for missing arguments and for arguments that contradict each other."""
        # 1. What every run needs.
        for owner, name in (
            (self.model, "model_name_or_path"),
            (self.data, "data_path"),
            (self.training, "output_dir"),
        ):
            if not getattr(owner, name):
                raise UserError(f"--{name} is missing, and training needs it")
        if self.model.version is not None and self.model.version not in conv_templates:
            raise UserError(f'--version is "{self.model.version}", allowed are {", ".join(conv_templates)}')
        for owner, name, allowed in (
            (self.model, "mm_use_im_start_end", False),
            (self.model, "mm_use_im_patch_token", False),
            (self.model, "mm_vision_select_feature", "patch"),
            (self.training, "evaluation_strategy", "no"),
            (self.training, "eval_strategy", "no"),
        ):
            found = getattr(owner, name)
            if found != allowed:
                raise UserError(f"--{name} is {getattr(found, 'value', found)}, allowed is {allowed}")
        if self.kind == "projector" and self.training.lora_enable:
            raise UserError("--tune_mm_mlp_adapter trains the projector alone, so --lora_enable does not go with it")
        if self.kind == "projector" and self.training.freeze_mm_mlp_adapter:
            raise UserError(
                "--tune_mm_mlp_adapter trains the projector alone, and --freeze_mm_mlp_adapter leaves nothing to train"
            )
        if self.kind == "projector" and self.model.unfreeze_mm_vision_tower:
            raise UserError(
                "--tune_mm_mlp_adapter saves the projector alone, so --unfreeze_mm_vision_tower does not go with it"
            )
        _check_numbers(self.training)
        resumed = self.training.resume_from_checkpoint
        if resumed and not (Path(resumed) / TRAINER_STATE_NAME).is_file():
            raise UserError(
                f"--resume_from_checkpoint {resumed}: has no {TRAINER_STATE_NAME}, allowed is a folder checkpoint-N that "
                "training wrote"
            )
        refuse_selection(self.selection)


def _check_numbers(training: LlavaTrainingArguments) -> None:
    """UserError for numbers with which nothing could be trained."""
    for name, least in (
        ("model_max_length", 1),
        ("per_device_train_batch_size", 1),
        ("gradient_accumulation_steps", 1),
        ("dataloader_num_workers", 0),
    ):
        value = getattr(training, name)
        if value < least:
            raise UserError(f"--{name} is {value}, allowed is {least} or more")
    if training.max_steps < 1 and not training.num_train_epochs > 0:
        raise UserError(f"--num_train_epochs is {training.num_train_epochs}, allowed is more than 0")
    if training.lora_bias not in ("none", "all", "lora_only"):
        raise UserError(f'--lora_bias is "{training.lora_bias}", allowed are none, all and lora_only')


def refuse_selection(config: AdaVConfig) -> None:
    """Raise UserError for settings of AdaV that have no meaning during training."""
    if config.method == "no_image":
        raise UserError('method is "no_image", so no image would be seen: leave the images out of the data instead')
    if config.method in dropper_names():
        raise UserError(
            f'method is "{config.method}", which ranks vision tokens by attention of the prompt\'s last words: in training '
            "those are the answer, so allowed are none and the methods that choose before the LLM"
        )
    for name in ("vision_adaptive_attention", "prefill_filter_flag", "text_pruning_flag", "all_use_h2o"):
        if getattr(config, name):
            raise UserError(f'"{name}" is true, but it acts while an answer is generated; training generates none')
    if "text_tower" in config.options:
        raise UserError('"options.text_tower" reads the question with a second model, which training does not load')


def selection_config(path: str | None, overrides: dict) -> AdaVConfig:
    """Configuration of the selection in training. Without --adav_config and without a key's flag, method none."""
    # AdaVConfig.load reads the repository's adav_configs.json if it gets no path, and training would select tokens.
    if path is None and not overrides:
        return AdaVConfig(method="none")
    return AdaVConfig.load(path, **overrides)

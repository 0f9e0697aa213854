"""transformers' Trainer with LLaVA's batches of one modality, learning rates per part and checkpoint formats.

The files of a checkpoint depend on what is trained. `load_pretrained_model` reads all three kinds:
    projector  mm_projector.bin, needs a model_base
    lora       the adapter and non_lora_trainables.bin, needs a model_base
    full       the whole model
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from llava.model.checkpoint import load_extra, load_whole
from llava.model.export import llava_settings, save_processors, write_json, write_llava
from llava.train.sampler import ModalityGroupedSampler

PROJECTOR_FILE, OTHERS_FILE = "mm_projector.bin", "non_lora_trainables.bin"


class LlavaTrainer(Trainer):
    """Trainer of LLaVA. kind: "projector", "lora" or "full". image_processor: saved in every checkpoint."""

    def __init__(self, *args, kind: str, image_processor, **kwargs):
        super().__init__(*args, **kwargs)
        self.kind, self.image_processor = kind, image_processor

    @property
    def llava(self):
        """The model itself, without peft's wrapper."""
        return self.model.get_base_model() if self.kind == "lora" else self.model

    # --- order and optimizer ----------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self.args.group_by_modality_length:
            return super()._get_train_sampler(dataset)
        # data_seed, if given, changes the order of the data without changing the initial weights.
        parts = self.args.world_size * self.args.gradient_accumulation_steps
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # The state's epoch is a float and can lie just below a whole number after a resume.
        return ModalityGroupedSampler(
            dataset.lengths, self.args.train_batch_size, parts, seed, lambda: int((self.state.epoch or 0) + 1e-6)
        )

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            model = self.model if model is None else model
            decaying = set(self.get_decay_parameter_names(model))
            rates = {"mm_projector": self.args.mm_projector_lr, "vision_tower": self.args.mm_vision_tower_lr}
            # One group per learning rate and weight decay. Trainer's own optimizer has one learning rate for all parts.
            groups: dict[tuple, list] = {}
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    rate = next((rate for part, rate in rates.items() if part in name and rate is not None), None)
                    groups.setdefault((rate, name in decaying), []).append(parameter)
            optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = optimizer(
                [
                    {"params": parameters, "weight_decay": self.args.weight_decay if decays else 0.0}
                    | ({} if rate is None else {"lr": rate})
                    for (rate, decays), parameters in groups.items()
                ],
                **settings,
            )
        return self.optimizer

    # --- checkpoints ------------------------------------------------------------------------------------------

    def _save(self, output_dir=None, state_dict=None):
        """Save weights, settings and processors, on rank 0 only. state_dict: the gathered weights under DeepSpeed."""
        # Without this, every rank would write the same files at the same time.
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if self.kind == "full":
            write_llava(self.llava.state_dict() if state_dict is None else state_dict, self.llava.config, folder)
        else:
            state = self.model.state_dict() if state_dict is None else state_dict
            learning = {name for name, p in self.model.named_parameters() if p.requires_grad and "lora_" not in name}
            others = {name: value.detach().cpu().clone() for name, value in state.items() if name in learning}
            torch.save(others, folder / (PROJECTOR_FILE if self.kind == "projector" else OTHERS_FILE))
            if self.kind == "lora":
                # peft's default, "auto", looks for the base model's config on the hub. No embeddings are resized here.
                self.model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
            write_json(folder / "config.json", llava_settings(self.llava.config, whole=False))
        save_processors(self.processing_class, self.image_processor, folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        """Load the weights of an interrupted run. Under DeepSpeed, Trainer reads DeepSpeed's own files instead."""
        folder = Path(resume_from_checkpoint)
        if self.kind == "full":
            load_whole(self.llava, folder)
        elif self.kind == "projector":
            load_extra(self.llava, folder / PROJECTOR_FILE)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            saved = torch.load(folder / OTHERS_FILE, map_location="cpu", weights_only=True)
            self.model.load_state_dict(saved, strict=False)  # the file has only what is trained beside the adapter

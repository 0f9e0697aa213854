"""Trains a LLaVA: projector pretraining, full fine-tuning or LoRA, with LLaVA's flags and data format.

    bash scripts/v1_5/finetune.sh                        # torchrun over all GPUs, DeepSpeed ZeRO-3
    python -m llava.train.train --model_name_or_path playground/llava-shapes-v1.5 --data_path FILE --image_folder DIR \\
        --output_dir DIR --learning_rate 2e-4 --max_steps 50 [--method adav --overall_tokens 36]

The same command resumes a stopped run from its last checkpoint.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from transformers import HfArgumentParser
from transformers.trainer import TRAINER_STATE_NAME

from llava.common.errors import UserError, exits_cleanly
from llava.common.files import as_user_error_on_write
from llava.config import add_config_flags, config_overrides
from llava.train.arguments import (
    DataArguments,
    LlavaTrainingArguments,
    ModelArguments,
    RunArguments,
    selection_config,
)
from llava.train.dataset import Collator, ConversationDataset, check_captions, read_samples
from llava.train.model import build
from llava.train.trainer import LlavaTrainer

# What transformers' own checks of its arguments raise.
_REFUSED = (ValueError, TypeError, ImportError, RuntimeError)


def _cannot_be_used(error: Exception) -> UserError:
    return UserError(f"the training arguments cannot be used ({' '.join(str(error).split())})")


def parse(argv: list[str] | None = None) -> RunArguments:
    """Checked arguments of the command line. UserError for bad ones."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, LlavaTrainingArguments),
        prog="python -m llava.train.train",
        usage="%(prog)s --model_name_or_path MODEL --data_path FILE --output_dir FOLDER [flags, see --help]",
        allow_abbrev=False,
    )
    add_config_flags(parser)
    # Before parsing: TrainingArguments imports deepspeed, and its error says nothing about the extra to install.
    _need_deepspeed(sys.argv[1:] if argv is None else argv)
    try:
        model, data, training, flags, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except _REFUSED as error:
        raise _cannot_be_used(error) from error
    if unknown:
        raise UserError(f"training has no {' '.join(unknown)}; --help lists its flags")
    run = RunArguments(model, data, training, selection_config(data.adav_config, config_overrides(flags)))
    run.check()
    if not sys.stderr.isatty():
        run.training.disable_tqdm = True  # a bar would fill a log file; losses are printed without it, too
    return run


def _need_deepspeed(argv: list[str]) -> None:
    if any(flag.split("=")[0] == "--deepspeed" for flag in argv):
        try:
            import deepspeed  # noqa: F401
        except ImportError as error:
            raise UserError('--deepspeed needs the extra "train": pip install -e ".[train]"') from error


def train(run: RunArguments) -> LlavaTrainer:
    """Train and save; returns the trainer, whose state.log_history has the loss of every logged step."""
    with as_user_error_on_write(run.training.output_dir):
        os.makedirs(run.training.output_dir, exist_ok=True)
    samples = read_samples(run.data.data_path, run.data.image_folder)
    if run.model.version == "plain":
        check_captions(samples)
    # 2. Model, data set and trainer.
    tokenizer, model, image_processor = build(run)
    dataset = ConversationDataset(
        samples,
        run.model.version,
        tokenizer,
        image_processor,
        model.config,
        run.selection,
        run.training.model_max_length,
    )
    try:
        trainer = LlavaTrainer(
            model=model,
            args=run.training,
            train_dataset=dataset,
            data_collator=Collator(dataset.blank),
            processing_class=tokenizer,
            kind=run.kind,
            image_processor=image_processor,
        )
    except _REFUSED as error:
        raise _cannot_be_used(error) from error
    try:
        trainer.train(resume_from_checkpoint=run.training.resume_from_checkpoint or _last_checkpoint(run.training))
    except UserError as error:
        # An error in a data loader's worker arrives as the text of its traceback, with the sentence at its end.
        raise UserError(str(error).strip().rsplit("UserError: ", 1)[-1]) from error
    trainer.save_state()
    trainer.save_model()
    return trainer


def _last_checkpoint(training) -> str | None:
    """Newest complete checkpoint of the output folder, None if there is none."""
    # Trainer writes its state file last, so a folder without it is from an interrupted save.
    folders = Path(training.output_dir).glob("checkpoint-*")
    done = {
        int(f.name.split("-")[1]): f for f in folders if f.name[11:].isdigit() and (f / TRAINER_STATE_NAME).is_file()
    }
    return str(done[max(done)]) if done else None


@exits_cleanly
def main() -> None:
    trainer = train(parse())
    if trainer.args.should_save:
        print(f"checkpoint written to {trainer.args.output_dir}")
        if trainer.train_dataset.samples.note:
            print(trainer.train_dataset.samples.note)
    if torch.distributed.is_initialized():
        # All ranks leave together: gloo aborts a rank whose peers have exited already.
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the data loader forks
    main()

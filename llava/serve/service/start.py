"""What the page and the terminal chat start with: a checkpoint (the demo's without another), a configuration, a service."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from llava.common.command_line import add_checkpoint_flags, positive
from llava.common.find_checkpoint import EvalCheckpoint, find_checkpoint
from llava.config import AdaVConfig, add_config_flags, config_of_flags
from llava.shapes.checkpoints import SCENES
from llava.shapes.tokenizer import is_demo_vocabulary

if TYPE_CHECKING:
    from llava.model.decoding.sampling import Sampling
    from llava.serve.service.service import Service

DEMO = SCENES[-1]  # several tiles
DEMO_ANSWER = 16  # new tokens: its answers are one word
LIMITS = (
    "This demo checkpoint is tiny and knows some seventy words about drawn shapes, digits and letters: on a photograph, or "
    "asked freely, it answers nonsense. Text-guided selection (adav, t2i, mix) is flattered: the checkpoint was trained "
    "with a loss on the very similarity that it reads, and no real LLaVA was. It shows how pruning works and what it costs "
    "on this task; it is no evidence for one method over another on real data."
)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """--model-path and what goes with it, the keys of adav_configs.json, and how answers are decoded."""
    parser.add_argument("--model-path", help=f"folder or hub name (default: the demo, {DEMO.checkpoint})")
    add_checkpoint_flags(parser, conversation=False)
    parser.add_argument("--max-new-tokens", type=positive, help=f"of an answer (512; demo: {DEMO_ANSWER})")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="with a temperature (1)")
    parser.add_argument("--seed", type=int, default=0, help="with a temperature (0)")
    add_config_flags(parser, f"the demo with neither this nor --overall-tokens keeps {DEMO.tokens} tokens")


def configuration(args: argparse.Namespace) -> AdaVConfig:
    """The configuration file with the flags' overrides."""
    config = config_of_flags(args)
    given = args.config or os.environ.get("ADAV_CONFIG") or args.overall_tokens is not None
    if args.model_path is None and not given:
        return config.replaced(overall_tokens=DEMO.tokens)
    return config


def sampling(args: argparse.Namespace) -> Sampling:
    """How answers are decoded; UserError for values that cannot be."""
    from llava.model.decoding.sampling import Sampling

    most = args.max_new_tokens or (DEMO_ANSWER if args.model_path is None else 512)
    return Sampling(most, args.temperature, args.top_p, args.seed)


def checkpoint_of(args: argparse.Namespace) -> EvalCheckpoint:
    """The checkpoint that the flags name; UserError where there is none."""
    return find_checkpoint(args.model_path or DEMO.checkpoint)


def load(checkpoint: EvalCheckpoint, args: argparse.Namespace, config: AdaVConfig, **limits) -> Service:
    """A service of the checkpoint; limits: its keyword arguments. UserError for whatever is wrong with it.

    Without transformers' loading bar: who waits has been told what is loaded.
    """
    from transformers.utils import logging

    from llava.serve.service.service import Service

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return Service.load(checkpoint.folder, model_base=args.model_base, config=config, dtype=args.dtype, **limits)
    finally:
        if bar:
            logging.enable_progress_bar()


def limits_of(tokenizer) -> str:
    """What the answers of a checkpoint are worth, where that has to be said; "" for others. Its tokenizer tells which it is."""
    return LIMITS if is_demo_vocabulary(tokenizer) else ""

"""Start of the page and of the terminal chat: flags, checkpoint (by default the demo), configuration and service."""

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

DEMO = SCENES[-1]  # the checkpoint with several tiles
DEMO_ANSWER = 16  # new tokens; its answers are one word
# The page and the chat show this before the first answer, so that nobody takes the demo for a real model.
LIMITS = (
    "This demo checkpoint is tiny. It knows about seventy words, all about drawn shapes, digits and letters, and cannot "
    "answer questions about photographs. It favours text-guided selection (adav, t2i, mix), because it was trained with a "
    "loss on the similarity that these methods read. No real LLaVA was. The demo shows how pruning works and what it costs "
    "on this task. It does not show which method is better on real data."
)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of checkpoint, decoding and configuration to a parser."""
    parser.add_argument("--model-path", help=f"folder or hub name (default: the demo, {DEMO.checkpoint})")
    add_checkpoint_flags(parser, conversation=False)
    parser.add_argument("--max-new-tokens", type=positive, help=f"of an answer (512; demo: {DEMO_ANSWER})")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (0)")
    parser.add_argument("--top-p", type=float, default=1.0, help="with a temperature (1)")
    parser.add_argument("--seed", type=int, default=0, help="with a temperature (0)")
    add_config_flags(parser, f"the demo with neither this nor --overall-tokens keeps {DEMO.tokens} tokens")


def configuration(args: argparse.Namespace) -> AdaVConfig:
    """The configuration file with the overrides of the flags. The demo has its own default of overall_tokens."""
    config = config_of_flags(args)
    # The file's default is meant for LLaVA's larger images, and would drop few tokens of a demo image.
    given = args.config or os.environ.get("ADAV_CONFIG") or args.overall_tokens is not None
    if args.model_path is None and not given:
        return config.replaced(overall_tokens=DEMO.tokens)
    return config


def sampling(args: argparse.Namespace) -> Sampling:
    """The Sampling of the flags. UserError for values that cannot be used."""
    from llava.model.decoding.sampling import Sampling

    most = args.max_new_tokens or (DEMO_ANSWER if args.model_path is None else 512)
    return Sampling(most, args.temperature, args.top_p, args.seed)


def checkpoint_of(args: argparse.Namespace) -> EvalCheckpoint:
    """The checkpoint that the flags name. UserError if there is none."""
    return find_checkpoint(args.model_path or DEMO.checkpoint)


def load(checkpoint: EvalCheckpoint, args: argparse.Namespace, config: AdaVConfig, **limits) -> Service:
    """A service of the checkpoint. limits: keyword arguments of Service.load. UserError for a bad checkpoint.

    transformers' loading bar is off: the command has already said what it loads.
    """
    from transformers.utils import logging

    from llava.serve.service.service import Service

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        settings = {"model_base": args.model_base, "config": config, "dtype": args.dtype, "threads": args.threads}
        return Service.load(checkpoint.folder, **settings, **limits)
    finally:
        if bar:
            logging.enable_progress_bar()


def limits_of(tokenizer) -> str:
    """LIMITS for a demo checkpoint, "" for any other. The vocabulary decides, not the name of the folder."""
    return LIMITS if is_demo_vocabulary(tokenizer) else ""

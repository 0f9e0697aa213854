"""The overlay command: one image, one question, several methods, one picture.

    python -m llava.serve.overlay --image X --question Q [--methods adav,none,...] [--tokens 144] -o out.png
        [--model-path M] [--model-base B] [--conv-mode C] [--config FILE] [--repeats 5] [--steps 6] [--layer L] [flags]

For each method the picture shows the patches that it kept, its answer and its cost. It also shows heat maps of AdaV's
scores, the tokens that stay after each cut of a method inside the LLM, and, under A-VL (--vision-adaptive-attention
true), the KV cache after each decode step. -o out.gif shows these steps as an animation. Every key of adav_configs.json
is a flag and applies to all methods.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llava.common.command_line import Parser, add_checkpoint_flags, names, positive
from llava.common.errors import UserError, exits_cleanly
from llava.common.find_checkpoint import find_checkpoint
from llava.common.threads import wait_passively
from llava.config import AdaVConfig, add_config_flags, config_of_flags, config_overrides
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import get_conversation

DEMO = "playground/llava-shapes-v1.6"
SUFFIXES = (".png", ".gif")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The parsed command line. UserError for arguments that cannot be used."""
    parser = Parser(prog="python -m llava.serve.overlay", description=__doc__.split("\n")[0])
    parser.add_argument("--image", type=Path, required=True)
    parser.add_argument("--question", required=True)
    parser.add_argument("--methods", type=names, default="adav,none", help="names with commas between them (adav,none)")
    parser.add_argument("--tokens", type=positive, help="vision tokens per image, all tiles together: overall_tokens")
    parser.add_argument("-o", "--output", type=Path, required=True, help="a .png, or under A-VL a .gif")
    parser.add_argument(
        "--model-path", "--ckpt", default=DEMO, help=f"folder or hub name (default: the demo checkpoint {DEMO})"
    )
    add_checkpoint_flags(parser)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=positive, default=64, help="(64)")
    parser.add_argument("--repeats", type=positive, default=5, help="timed runs of each method (5)")
    parser.add_argument("--steps", type=positive, default=6, help="decode steps of A-VL's cache to show (6)")
    parser.add_argument("--layer", type=positive, help="layer whose cache is shown, from 1 (default: most layers)")
    parser.add_argument("--columns", type=positive, default=4, help="methods beside each other (4)")
    add_config_flags(parser)
    return parser.parse_args(argv)


def configurations(args: argparse.Namespace) -> dict[str, AdaVConfig]:
    """Method -> its configuration: the file, the flags of the command line, and this method."""
    if "method" in config_overrides(args):
        raise UserError("--method names one method, allowed here is --methods with one or several")
    return {name: config_of_flags(args, args.tokens, "--tokens", method=name) for name in args.methods}


def check(args: argparse.Namespace, configs: dict[str, AdaVConfig]) -> None:
    """Raise UserError for every mistake that shows without the checkpoint, whose loading takes long."""
    if args.output.suffix.lower() not in SUFFIXES:
        raise UserError(f"-o is {args.output}, allowed are names that end in {' or '.join(SUFFIXES)}")
    if not args.output.parent.is_dir():
        raise UserError(f"-o is {args.output}, but there is no folder {args.output.parent}")
    if not args.question.strip():
        raise UserError("--question is empty, allowed is some text")
    if DEFAULT_IMAGE_TOKEN in args.question:
        raise UserError(
            f"--question has {DEFAULT_IMAGE_TOKEN} in it, allowed is text alone: the image is put before it"
        )
    first = next(iter(configs.values()))
    adaptive = first.vision_adaptive_attention and first.cache_policy == "avl"
    if args.output.suffix.lower() == ".gif" and not adaptive:
        raise UserError(
            f"-o is {args.output}: a .gif shows A-VL's cache step by step, which the configuration does not switch on; "
            "add --vision-adaptive-attention true, or name a .png"
        )
    if args.layer and not adaptive:
        raise UserError("--layer picks a layer of A-VL's cache, which needs --vision-adaptive-attention true")
    if args.conv_mode is not None:
        get_conversation(args.conv_mode)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Run the methods, print their answers and costs, and write the picture."""
    # 1. Arguments. torch is imported only when they are right.
    args = parse(argv)
    wait_passively()
    configs = configurations(args)
    check(args, configs)
    checkpoint = find_checkpoint(args.model_path)

    from llava.common.progress import progress_bar
    from llava.overlay.lettering import legible
    from llava.overlay.measure_methods import MethodMeasurer
    from llava.serve.service.image_input import ImageLimits, ImageRefused, picture_from_file

    try:
        image = picture_from_file(args.image, ImageLimits())
    except ImageRefused as error:
        raise UserError(f"--image: {error}") from None
    # 2. Measure.
    first = next(iter(configs.values()))
    run = MethodMeasurer(
        checkpoint.folder,
        image,
        args.question,
        first,
        model_base=args.model_base,
        conversation=args.conv_mode,
        device=args.device,
        dtype=args.dtype,
        threads=args.threads,
    )
    layers = run.model.config.num_hidden_layers
    if args.layer and args.layer > layers:
        raise UserError(f"--layer is {args.layer}, allowed is 1 to {layers}")
    # Runs per method: one warm-up, the timed ones, and the one whose answer is shown.
    with progress_bar("overlay", total=len(configs) * (args.repeats + 2), unit=" runs") as bar:
        looks = run.looks(configs, args.max_new_tokens, args.repeats, args.steps, bar.update)
    # 3. Print the numbers before the picture is written, so that they are not lost if writing fails.
    for name, look in looks.items():
        print(
            f"{name}: {look.answer or '(empty)'}",
            f"{look.kept} of {look.total} vision tokens",
            *look.notes(),
            sep="\n  ",
        )
    print(f"{checkpoint.short_name}. {run.conditions(args.repeats)}")
    if not legible(args.question):
        print(
            "note: no installed font has all letters of the question; boxes stand for those it lacks", file=sys.stderr
        )
    try:
        save(args, run, looks, f"{checkpoint.short_name}. {describe(run, first)}", caveat_of(run))
    except OSError as error:
        raise UserError(f"-o is {args.output}, which cannot be written ({error.strerror or error})") from None
    print(f"picture: {args.output}")


def caveat_of(run) -> str:
    """Return the caveat about the demo checkpoint's answers for a picture that is not the demo's; "" otherwise."""
    from llava.eval.benchmarks.shapes import Shapes
    from llava.serve.service.start import limits_of
    from llava.shapes.dataset import is_test_picture

    limits = limits_of(run.tokenizer)
    return "" if not limits or is_test_picture(run.image, Shapes.questions) else limits


def save(args: argparse.Namespace, run, looks: dict, subtitle: str, caveat: str) -> None:
    """Draw the page, or the frames of a GIF, and write it."""
    from llava.overlay.cache_strip import cache_frames, draw_caches, save_frames
    from llava.overlay.page import draw_overlay, width_of

    caches = {name: look.cache for name, look in looks.items() if look.cache is not None}
    ending = past_the_end(looks, args.steps) if caches else ""
    seen = {"image": run.image, "plan": run.plan, "side": run.side}
    if args.output.suffix.lower() == ".gif":
        if not caches:
            raise UserError(f"-o is {args.output}, but the LLM reads no vision token under {', '.join(looks)}")
        told = {"title": args.question, "columns": args.columns, "footer": f"{subtitle} {ending}", "caveat": caveat}
        save_frames(cache_frames(**seen, caches=caches, layer=args.layer, **told), args.output)
        return
    room = width_of(min(args.columns, len(looks)))
    strips = draw_caches(**seen, caches=caches, layer=args.layer, width=room) if caches else None
    page = draw_overlay(
        **seen,
        selections={name: look.selection for name, look in looks.items()},
        answers={name: look.answer for name, look in looks.items()},
        title=args.question,
        columns=args.columns,
        subtitle=subtitle,
        caveat=caveat,
        notes={name: look.notes() for name, look in looks.items()},
        why=True,
        sections={"A-VL: the image in the KV cache while answering": strips} if caches else None,
        footer=f"{run.conditions(args.repeats)} {ending}",
    )
    page.save(args.output)


def describe(run, config: AdaVConfig) -> str:
    """One line about the image, its tiles, the budget and the cache policy."""
    plan = run.plan
    tiles = "one tile" if plan.grid is None else f"1 + {plan.grid[0]} x {plan.grid[1]} tiles"
    width, height = plan.image_size
    cache = {"full": "", "avl": " KV cache: A-VL.", "h2o": " KV cache: H2O."}[config.cache_policy]
    return f"Image of {width} x {height} pixels as {tiles}. overall_tokens {config.overall_tokens}.{cache}"


def past_the_end(looks: dict, steps: int) -> str:
    """Return a sentence if the cache states continue after the end of an answer; "" otherwise."""
    # The first token comes from prefill, so an answer of n tokens has n - 1 decode steps.
    shortest = min(look.new_tokens for look in looks.values())
    if shortest > steps:
        return ""
    return f"For the KV cache, decoding went on past the end of answers ({shortest} tokens), so that {steps} steps can be seen."


if __name__ == "__main__":
    main()

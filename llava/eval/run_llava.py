"""One question about one or several image files, answered on the command line.

    python -m llava.eval.run_llava --model-path M --image-file a.jpg[,b.jpg] --query "What is in the image?"
        [--conv-mode C] [--sep ,] [--visual-token-num K] [--temperature 0] [--max_new_tokens 512] [flags]

Each image gets its placeholder before the query, in the order of the files, unless the query places them itself with
<image>. Files alone: an address is refused, since what a model is asked about should not depend on the network. A
picture is as a person sees it: upright as its EXIF data says, and on white where it is transparent.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llava.common.command_line import Parser, positive
from llava.common.errors import UserError, exits_cleanly
from llava.common.progress import progress_bar
from llava.common.threads import wait_passively
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import get_conversation, single_turn
from llava.eval.runs.llava_commands import add_model_flags, configuration, sampling


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava.eval.run_llava", description=__doc__.split("\n")[0])
    add_model_flags(parser)
    parser.add_argument("--image-file", required=True, help="paths, with --sep between them")
    parser.add_argument("--query", required=True)
    parser.add_argument("--sep", default=",", help="between image files (,)")
    parser.add_argument("--max_new_tokens", "--max-new-tokens", type=positive, default=512)
    return parser.parse_args(argv)


def image_files(text: str, sep: str) -> list[Path]:
    """Return the paths in --image-file. Raises UserError for an address or a missing file."""
    names = [name.strip() for name in (text.split(sep) if sep else [text])]
    for name in names:
        if "://" in name:
            raise UserError(f"--image-file names the address {name}, allowed are files: download it first")
        if not Path(name).is_file():
            raise UserError(f"--image-file: {name or 'an empty name'} is no file")
    return [Path(name) for name in names]


def question(query: str, images: int) -> str:
    """Return the query with one placeholder per image. Raises UserError if it has another number of them."""
    placed = query.count(DEFAULT_IMAGE_TOKEN)
    if placed not in (0, images):
        raise UserError(f"--query places {placed} images with {DEFAULT_IMAGE_TOKEN}, but --image-file names {images}")
    return query if placed else (DEFAULT_IMAGE_TOKEN + "\n") * images + query


def completed(args) -> argparse.Namespace:
    """Arguments as LLaVA's users write them, an object with attributes, with the flags' defaults for what it lacks."""
    for name in ("model_path", "image_file", "query"):
        if getattr(args, name, None) is None:
            raise UserError(f"eval_model: the arguments have no {name}")
    whole = parse([f"--model-path={args.model_path}", f"--image-file={args.image_file}", f"--query={args.query}"])
    for name in vars(whole):
        setattr(whole, name, getattr(args, name, getattr(whole, name)))
    return whole


def eval_model(args) -> None:
    """LLaVA's function: print the answer to one question. args: an object whose attributes are named like the flags."""
    # 1. Check all input before torch is imported. get_conversation raises for an unknown template.
    args = completed(args)
    files = image_files(args.image_file, args.sep)
    asked = question(args.query, len(files))
    config, decoding = configuration(args), sampling(args)
    if args.conv_mode is not None:
        get_conversation(args.conv_mode)
    from llava.common.pictures import as_seen
    from llava.eval.runs.image_reader import UnreadableImage, read_image
    from llava.inference.loaded_checkpoint import LoadedCheckpoint
    from llava.mm_utils import tokenizer_image_token
    from llava.model.decoding.sampling import Sampling

    # 2. Images and checkpoint.
    try:
        images = [read_image(path, as_seen) for path in files]
    except UnreadableImage as error:
        raise UserError(f"--image-file: cannot be read as an image ({error})") from None
    checkpoint = LoadedCheckpoint(
        args.model_path,
        args.model_base,
        config,
        dtype=args.dtype,
        threads=args.threads,
        purpose="a question about an image",
    )
    prompt = single_turn(args.conv_mode or checkpoint.conversation, asked)
    ids = tokenizer_image_token(prompt, checkpoint.tokenizer, return_tensors="pt")
    encoded = checkpoint.encode([checkpoint.pixels(image, config) for image in images], config)
    prepared = checkpoint.prepare_ids([ids], encoded, config)
    wanted = Sampling(args.max_new_tokens)
    if decoding:
        wanted = Sampling(args.max_new_tokens, args.temperature, args.top_p or 1.0, decoding["seed"])
    answering = checkpoint.engine.stream(prepared, wanted)
    for _ in progress_bar("answering", answering, total=args.max_new_tokens, unit=" tokens"):
        pass
    (answer,) = answering.result().answers
    print(answer.text.strip())


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    wait_passively()
    eval_model(args)


if __name__ == "__main__":
    main()

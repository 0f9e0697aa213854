"""Does a checkpoint compute here what it should? One command for somebody who has the real weights.

    python -m llava.analysis.self_check CHECKPOINT [--image X] [--question Q] [--method adav --tokens K]

The command prints how the prompt is built (tokens before the image, ids around it, tiles, vision tokens). It then
compares our logits, with all vision tokens kept, with those of transformers' own model class on the same weights and
pixels. It prints the largest difference and PASS or FAIL. Exit codes: 0 for PASS, 1 for FAIL, 2 for bad input. The two
models run one after the other, so memory for one is enough. With --method, the command also counts what that method
keeps.
"""

from __future__ import annotations

import argparse
import gc
import re
from dataclasses import dataclass

import torch
import transformers
from PIL import Image, ImageDraw
from torch import Tensor

from llava.common.command_line import Parser, add_checkpoint_flags
from llava.common.errors import UserError, exits_cleanly, first_line
from llava.common.pictures import rgb
from llava.config import AdaVConfig, add_plugin_flag
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import single_turn
from llava.inference.loaded_checkpoint import LoadedCheckpoint
from llava.integrations.transformers.reference import build_reference, kind_of
from llava.mm_utils import process_images, tile_plan, tokenizer_image_token
from llava.model.checkpoint import Checkpoint

QUESTION = "What is in the picture? Answer the question using a single word or phrase."
FLOAT32_LIMIT = 1e-4  # largest allowed absolute difference of a logit
# Half precision rounds each layer's output to 11 bits (float16) or 8 bits (bfloat16), so single logits can differ much.
# The limit is relative: RMS of the difference, divided by the RMS of the logits around their mean.
HALF_LIMITS = {torch.float16: 0.01, torch.bfloat16: 0.05}


@dataclass
class OurSide:
    """Results of our model, which outlive the model itself.

    ids: token ids with the placeholder. logits: [S, V] float32 over the sequence with the vision tokens spliced in.
    span: (start, count) of the vision tokens. pixels: result of process_images, in float32.
    image_processor: name of its class. kept_right: whether --method kept as many tokens as it should.
    config: our model's configuration. weights: our model's tensors, if no single folder on disk holds them, else None.
    """

    ids: list[int]
    logits: Tensor
    span: tuple[int, int]
    pixels: Tensor
    image_processor: str
    kept_right: bool
    config: object
    dtype: torch.dtype
    weights: dict[str, Tensor] | None


def built_in_image() -> Image.Image:
    """A 640 x 480 picture of a house. Its sides are 4 : 3, so that anyres checkpoints have to unpad it."""
    image = Image.new("RGB", (640, 480), (120, 180, 240))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 320, 640, 480), fill=(80, 150, 70))
    draw.ellipse((480, 40, 580, 140), fill=(250, 220, 60))
    draw.rectangle((150, 200, 350, 380), fill=(190, 70, 60))
    draw.polygon(((130, 200), (250, 110), (370, 200)), fill=(90, 60, 50))
    draw.rectangle((225, 290, 275, 380), fill=(60, 40, 30))
    return image


def _open_image(path: str | None) -> Image.Image:
    if path is None:
        return built_in_image()
    try:
        with Image.open(path) as image:
            return rgb(image)
    except FileNotFoundError:
        raise UserError(f"{path}: no such image") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({first_line(error)})") from None


def say(name: str, text: object) -> None:
    print(f"{name:<20}{text}")


@torch.no_grad()
def run_ours(args: argparse.Namespace, source: Checkpoint, image: Image.Image, device_map) -> OurSide:
    """Load our model, report the prompt, and compute the logits with all vision tokens kept."""
    # 1. Load.
    config = AdaVConfig(method="none")
    checkpoint = LoadedCheckpoint(
        args.checkpoint,
        args.model_base,
        config,
        device_map=device_map,
        dtype=args.dtype,
        threads=args.threads,
        purpose="a self-check",
    )
    tokenizer, model, image_processor = checkpoint.tokenizer, checkpoint.model, checkpoint.image_processor
    if not source.hf:
        kind_of(model.config)
    device = checkpoint.device
    dtype = model.get_input_embeddings().weight.dtype
    say("checkpoint", f"{args.checkpoint} ({'llava-hf' if source.hf else 'original LLaVA'} format)")
    say("computed in", f"{str(dtype).removeprefix('torch.')} on {device}")

    template = args.conv_mode or checkpoint.conversation
    ids = tokenizer_image_token(single_turn(template, "<image>\n" + args.question), tokenizer)
    pixels = process_images([image], image_processor, model.config)
    prepared = model.prepare(torch.tensor([ids]), pixels, [image.size])
    span = prepared.image_spans[0][0]
    _report_prompt(tokenizer, template, ids, span, prepared, tile_plan(image.size, model.config))
    logits = model(
        inputs_embeds=prepared.inputs_embeds,
        attention_mask=prepared.attention_mask,
        position_ids=prepared.position_ids,
    ).logits
    # 3. What must outlive the model: a merged LoRA or projector exists only in its tensors.
    kept_right = args.method is None or _report_method(args, model, tokenizer, pixels, ids, image)
    weights = dict(model.state_dict()) if source.kind != "full" else None
    kind = type(image_processor).__name__
    return OurSide(ids, logits[0].float().cpu(), span, pixels, kind, kept_right, model.config, dtype, weights)


def _report_prompt(tokenizer, template: str, ids: list[int], span, prepared, plan) -> None:
    place = ids.index(IMAGE_TOKEN_INDEX)
    before, after = ids[:place], ids[place + 1 :]
    say("template", template)
    say("prefix", f"{place} tokens before the image")
    say("ids around it", f"{' '.join(map(str, before[-6:]))} [image] {' '.join(map(str, after[:6]))}")
    pieces = [[repr(piece) for piece in tokenizer.convert_ids_to_tokens(part)] for part in (before[-6:], after[:6])]
    say("which are", f"{' '.join(pieces[0])} [image] {' '.join(pieces[1])}")
    width, height = plan.image_size
    if plan.grid is None:
        say("tiles", f"1 of {plan.tile_size} x {plan.tile_size}, for an image of {width} x {height}")
    else:
        grid = f"{plan.grid[0]} x {plan.grid[1]} crops on a canvas of {plan.canvas[0]} x {plan.canvas[1]}"
        say("tiles", f"{plan.tiles}: the whole image and {grid}, for an image of {width} x {height}")
    selection = prepared.selections[0][0]
    newlines = int((selection.tile < 0).sum())
    say("image tokens", f"{span[1]}: {span[1] - newlines} patches, {newlines} newline tokens")
    say("sequence", f"{prepared.lengths[0]} tokens: {place} + {span[1]} + {len(after)}")


def _report_method(args, model, tokenizer, pixels: Tensor, ids: list[int], image: Image.Image) -> bool:
    """Print what --method keeps and what the model then answers. Returns True if it keeps as many tokens as asked."""
    config = AdaVConfig(method=args.method, overall_tokens=args.tokens)
    prepared = model.prepare(torch.tensor([ids]), pixels, [image.size], config=config)
    tokens = model.generate(prepared=prepared, do_sample=False, max_new_tokens=16)
    selection, dropping = prepared.selections[0][0], prepared.dropping
    # A dropper has survivors after each cut. The last count is compared with the budget.
    survivors = [selection.indices, *(dropping.survivors(0, 0) if dropping else [])][-1]
    tile = selection.tile[survivors[survivors >= 0]] if dropping else selection.tile
    per_tile = [int((tile == number).sum()) for number in range(len(pixels[0]) if pixels.dim() == 5 else 1)]
    say("method", f"{args.method} keeps {len(survivors)} of {selection.total} tokens, in tiles {per_tile}")
    say("its answer", repr(tokenizer.decode(tokens[0], skip_special_tokens=True).strip()))
    if not config.make_method().uses_budget:
        return True
    whole = model.prepare(torch.tensor([ids]), pixels, [image.size]).selections[0][0]
    # A dropper also counts newline tokens. A selector chooses from patches alone, and all patches mean all tokens.
    candidates = whole.total if dropping else int((whole.tile >= 0).sum())
    asked = args.tokens if args.tokens < candidates else whole.total
    if len(survivors) != asked:
        say("", f"but {asked} were asked for")
    return len(survivors) == asked


@torch.no_grad()
def run_reference(source: Checkpoint, ours: OurSide, image: Image.Image, device_map) -> tuple[Tensor, float]:
    """Logits [S, V] of transformers for the same prompt, and the largest difference between its pixels and ours.

    For a llava-hf checkpoint, the pixels come from transformers' own processor. An original checkpoint has no such
    processor, so both models get our pixels. UserError if both unpad the image differently.
    """
    # 1. Pixels.
    reference = build_reference(source, ours.config, ours.weights, ours.dtype, device_map)
    anyres = reference.config.model_type == "llava_next"
    pixels = ours.pixels
    if source.hf:
        processor = getattr(transformers, ours.image_processor).from_pretrained(source.folder)
        pixels = processor([image], return_tensors="pt")["pixel_values"]
        if pixels.shape != ours.pixels.shape:
            return torch.empty(0, ours.logits.shape[1]), float("inf")
    batch = {"pixel_values": pixels.to(reference.device, ours.dtype)}
    if anyres:
        batch["image_sizes"] = torch.tensor([[image.height, image.width]], device=reference.device)
    # 2. Ids: one placeholder per vision token, as the class expects them.
    features = reference.get_image_features(**batch, return_dict=True).pooler_output
    count = sum(len(of_image) for of_image in features)
    if count != ours.span[1] and not source.hf:
        raise UserError(
            f"an image of {image.width} x {image.height} is one of the few that LLaVA and transformers unpad "
            f"differently ({ours.span[1]} and {count} tokens), so there is nothing to compare; use another --image"
        )
    place, image_id = ours.ids.index(IMAGE_TOKEN_INDEX), reference.config.image_token_index
    if image_id >= reference.config.text_config.vocab_size or image_id in ours.ids:
        # The class replaces every token with this id by a feature, so the prompt must not use the id elsewhere.
        image_id = next(i for i in range(reference.config.text_config.vocab_size) if i not in ours.ids)
        reference.config.image_token_index = image_id
    ids = ours.ids[:place] + [image_id] * count + ours.ids[place + 1 :]
    # 3. Logits.
    logits = reference(input_ids=torch.tensor([ids], device=reference.device), **batch).logits
    return logits[0].float().cpu(), float((pixels - ours.pixels).abs().max())


def compare(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Print the difference of two sets of logits [S, V]. Returns True if it is within the limit for `dtype`."""
    if ours.shape != theirs.shape:
        say("logits", f"ours {list(ours.shape)}, transformers' {list(theirs.shape)}: the sequences differ")
        return False
    largest = float((ours - theirs).abs().max())
    spread = float((theirs - theirs.mean(dim=-1, keepdim=True)).square().mean().sqrt())
    relative = float((ours - theirs).square().mean().sqrt()) / spread if spread else float("inf")
    same = int(ours[-1].argmax()) == int(theirs[-1].argmax())
    say("logits", f"{ours.shape[0]} positions x {ours.shape[1]}, spread {spread:.3g}")
    name = str(dtype).removeprefix("torch.")
    if dtype in HALF_LIMITS:
        limit = HALF_LIMITS[dtype]
        say("difference", f"{relative:.2e} of the spread (largest {largest:.2e}), allowed in {name} is {limit:g}")
        close = relative <= limit
    else:
        say("difference", f"largest {largest:.2e}, allowed in {name} is {FLOAT32_LIMIT:g}")
        close = largest <= FLOAT32_LIMIT
    say("next token", "the same" if same else f"ours {int(ours[-1].argmax())}, theirs {int(theirs[-1].argmax())}")
    return close and same


def check(args: argparse.Namespace) -> bool:
    """Run the whole check. Returns True for PASS; UserError for bad arguments."""
    # Arguments are checked before the model is loaded, which can take minutes.
    if args.tokens is not None and args.method is None:
        raise UserError("--tokens says how many vision tokens a method keeps, so it needs --method")
    if args.method is not None:
        args.tokens = 144 if args.tokens is None else args.tokens
        AdaVConfig(method=args.method, overall_tokens=args.tokens)
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", args.device):
        raise UserError(f'--device is "{args.device}", allowed are auto, cpu, cuda and cuda:N')
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device is {args.device}, but this torch sees no GPU")
    image = _open_image(args.image)
    source = Checkpoint.open(args.checkpoint, args.model_base)
    ours = run_ours(args, source, image, args.device)
    gc.collect()  # frees our model before the second one is loaded; modules can be in reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    theirs, pixel_difference = run_reference(source, ours, image, args.device)
    passed = compare(ours.logits, theirs, ours.dtype) and ours.kept_right
    if source.hf:
        say("pixels", f"largest difference from transformers' processor {pixel_difference:.2e}, allowed is 0")
        passed = passed and pixel_difference == 0
    return passed


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m llava.analysis.self_check", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="folder or hub name, in either format")
    add_checkpoint_flags(parser)
    parser.add_argument("--image", help="default: a built-in picture of 640 x 480")
    parser.add_argument("--question", default=QUESTION, help="default: %(default)r")
    add_plugin_flag(parser)
    parser.add_argument("--method", help="also show what this token selection keeps")
    parser.add_argument("--tokens", type=int, help="vision tokens that --method keeps per image (default: 144)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser


@exits_cleanly
def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    passed = check(args)
    print("PASS" if passed else "FAIL")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())

"""Train one demo checkpoint: `python -m llava.shapes.training --recipe v1.5`.

Working files (drawn pictures, weights after each stage, log) go under playground/train/; the checkpoint goes to
playground/llava-shapes-<recipe>. A run that was stopped goes on after its last finished stage.
"""

import argparse
import dataclasses
import json
import os
import socket
import time
from pathlib import Path

import torch
from torch import distributed, multiprocessing

from llava.common.command_line import Parser
from llava.common.errors import UserError, exits_cleanly
from llava.shapes.training.checkpoint import load_demo_model, write_checkpoint
from llava.shapes.training.model import DemoModel
from llava.shapes.training.recipe import RECIPES
from llava.shapes.training.stages import run_stage, validate

PLAYGROUND = Path("playground")


def train(recipe, work, out, start_folder=None):
    """Run all stages of `recipe` and return the model. UserError if `work` has stages of another recipe.

    work: folder of working files. out: folder of the checkpoint. start_folder: initial weights, if the recipe has any.
    """
    work = Path(work)
    work.mkdir(parents=True, exist_ok=True)
    described = json.dumps(dataclasses.asdict(recipe))
    model = None
    # Only rank 0 writes. The others open the null device, so that the loop below is the same for all.
    first = not distributed.is_initialized() or distributed.get_rank() == 0
    with open(work / "log.jsonl" if first else os.devnull, "a", encoding="utf-8") as log:
        for number, stage in enumerate(recipe.stages):
            file = work / f"stage_{stage.name}.pt"
            # 1. Reuse a finished stage. Its weights are valid only if all stages up to it are still the same.
            key = json.dumps([dataclasses.asdict(s) for s in recipe.stages[: number + 1]]) + str(recipe.alignment)
            if file.is_file():
                saved = torch.load(file, weights_only=True)
                if saved["key"] != key:
                    raise UserError(f"{file} was made by another recipe; remove {work} to train afresh")
                model = DemoModel(recipe.sizes, _layers(saved["state"]))
                model.load_state_dict(saved["state"])
                continue
            # 2. The first stage makes the model.
            if model is None:
                torch.manual_seed(stage.seed)
                model = (
                    load_demo_model(start_folder, recipe.sizes)
                    if recipe.start
                    else DemoModel(recipe.sizes, stage.fresh_llm)
                )
            # 3. Train, save and validate.
            started = time.monotonic()
            run_stage(model, recipe, stage, work.parent / "pictures", log)
            if not first:
                continue
            torch.save({"key": key, "state": model.state_dict()}, file)
            row = {"stage": stage.name, "finished": round(time.monotonic() - started, 1), "validation": None}
            if stage.answers:
                row["validation"] = validate(model, recipe, work.parent / "pictures", stage.captions)
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(json.dumps(row), flush=True)
    if not first:
        return model
    write_checkpoint(model, recipe, out)
    (work / "recipe.json").write_text(described + "\n", encoding="utf-8")
    return model


def _layers(state):
    return 1 + max(int(name.split(".")[3]) for name in state if name.startswith("llm.model.layers."))


def _train_part(rank, threads, port, job):
    """Body of one of several training processes. Rank 0 writes the files."""
    torch.set_num_threads(threads)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=job[0].processes)
    train(*job)
    distributed.destroy_process_group()


def _free_port():
    # Port 0 lets the system choose. All processes are on this machine, so no other port has to be agreed on.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@exits_cleanly
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, choices=sorted(RECIPES))
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads (default 1, as for the shipped checkpoints)"
    )
    parser.add_argument("--playground", default=str(PLAYGROUND), help="folder of checkpoints (default playground)")
    parser.add_argument("--out", help="checkpoint folder (default <playground>/llava-shapes-<recipe>)")
    args = parser.parse_args(argv)
    if args.threads < 1:
        raise UserError(f"--threads is {args.threads}, allowed is 1 or more")
    torch.set_num_threads(args.threads)
    recipe, playground = RECIPES[args.recipe], Path(args.playground)
    if not playground.is_dir():
        raise UserError(f"no folder {playground}; run this in the repository root or name one with --playground")
    # An ablation is only measured, so it goes to the working files unless --out names another place.
    name = f"llava-shapes-{args.recipe}"
    out = Path(args.out) if args.out else (playground if recipe.shipped else playground / "train") / name
    job = (recipe, playground / "train" / args.recipe, out, playground / recipe.start if recipe.start else None)
    if recipe.processes == 1:
        train(*job)
    else:
        multiprocessing.spawn(_train_part, (args.threads, _free_port(), job), nprocs=recipe.processes)
    print(f"checkpoint written to {out}")

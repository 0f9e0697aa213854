"""Measures a demo checkpoint and writes its model card (README.md in the checkpoint's folder).

    python -m llava.shapes.training.card --family v1.5 --ablation playground/train/llava-shapes-v1.5-no-alignment

Figures are kept in playground/train/card-<family>.json; `--text-only` writes the card anew from them.
"""

import argparse
import json
import platform
from pathlib import Path

import torch
import transformers

from llava.common.errors import UserError, exits_cleanly
from llava.shapes.scenes import FAMILIES
from llava.shapes.training.recipe import RECIPES

# About 25, 10 and 5 % of the vision tokens.
BUDGETS = {"v1.5": (36, 14, 7), "v1.6": (144, 58, 29)}
METHODS = {
    "v1.5": ("random", "cls", "t2i", "mix", "adav"),
    "v1.6": ("random", "cls", "fastervlm", "t2i", "mix", "adav"),
}
LIMITS = """## Limits: read this before quoting a figure

- **Text-guided selection is flattered here.** Training loss 2 shapes exactly the cosine that `t2i`, `mix` and `adav` read, and no real
  LLaVA was trained with such a loss. The demo shows that the pipeline works and what pruning costs on this task. It is no
  evidence for one method over another on real data.
- The vocabulary is closed ({words} tokens). A photograph or a free question gives nonsense, stated with confidence.
- The pictures come from the generator that the model was trained on (`llava/shapes`, other seeds); nothing else was tested.
- From some stage on, pictures lose background patches in training (recipe below). Without it a pruned picture left the LLM at chance;
  real LLaVA was trained on whole pictures only.
- With few vision tokens the model sometimes goes on after its one-word answer; the benchmark reads the first word.
- The tower's last layer was never trained: LLaVA reads the layer before it, and so does the contrastive loss.
"""


def measure(family, checkpoint, ablation, work):
    """Dictionary with all numbers of the card. ablation: checkpoint without the alignment loss, or None."""
    # Imported late: --text-only loads no model.
    from llava.shapes.training.figures import all_token_figures, method_figures

    budgets = BUDGETS[family]
    figures = {"sets": all_token_figures(checkpoint, family, work)}
    figures["methods"] = method_figures(checkpoint, family, work, budgets, METHODS[family])
    if ablation:
        figures["ablation"] = method_figures(ablation, family, work, budgets[1:2], METHODS[family])
    figures["versions"] = (
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    return figures


def card_text(family, figures, log):
    """Markdown of the card. figures: of `measure`. log: rows of the training log, [] if there is none."""
    # 1. Accuracy, with all tokens and with selected ones.
    recipe = RECIPES[family]
    methods = figures["methods"]
    parts = [
        f"# llava-shapes-{family}\n",
        "A LLaVA of 1.7 million parameters in the original LLaVA checkpoint format: CLIP ViT (patch 8, width 128, 5 layers), two-layer "
        "GELU projector, Llama (width 128, 4 layers), word-level tokenizer. Trained by this repository on pictures that it draws itself; "
        "made to try out and to test vision-token pruning where no real checkpoint fits.\n",
        _inputs(family, methods),
        "## Accuracy with all tokens\n",
        "Three disjoint test sets (`python -m llava.shapes.dataset --split test --set 0..2 --questions 4000`), float32 arithmetic on the "
        "float16 weights of this folder. Prior: always the commonest answer of the question's type.\n",
        _table(
            ("set", "questions", "all", "color", "exists", "where", "count", "prior"),
            [
                (
                    row["set"],
                    row["questions"],
                    *(_percent(row[k]) for k in ("all", "color", "exists", "where", "count", "prior")),
                )
                for row in figures["sets"]
            ],
        ),
        f"With the picture of another question: {_percent(methods['wrong_image'])} %; with a blank picture: "
        f"{_percent(methods['blank_image'])} % (first {methods['questions']:,} questions of set 0).\n",
        "## Accuracy with pruned tokens\n",
        f"First {methods['questions']:,} questions of set 0 (all tokens: {_percent(methods['all_tokens'])} %). Each cell: kept tokens "
        "re-numbered / original positions kept. `random` is the mean of three seeds. *Wrong question*: the selector reads the question of another "
        "picture, the LLM the right one.\n",
        _method_table(methods),
        f"Measured with the repository's own tower, selection and LLM code, first answer token from one forward pass; `model.generate` gave "
        f"the same answer in {_percent(methods['agreement'])} % of 200 questions.\n",
    ]
    # 2. The ablation, the limits and the recipe.
    if "ablation" in figures:
        parts += [
            "## Without the alignment loss\n",
            "The same recipe, steps and seeds without loss 2 (`bash scripts/demo/train.sh v1.5-no-alignment`), same questions. All tokens: "
            f"{_percent(figures['ablation']['all_tokens'])} %.\n",
            _method_table(figures["ablation"]),
        ]
    parts += [LIMITS.format(words=_vocabulary_size()), _recipe_text(family, recipe, log, figures["versions"])]
    return "\n".join(parts)


def _inputs(family, methods):
    if family == "v1.5":
        return "Input: one 96x96 picture, one tile, 144 vision tokens (`image_aspect_ratio: pad`).\n"
    return (
        "Input: pictures of up to 192x192 pixels (strips up to 288x96), `anyres` tiles of 96x96 with five grids, 3 to 5 tiles, `spatial_unpad` with "
        f"the newline token: {methods['tokens_mean']:.0f} vision tokens on average, newlines included.\n"
    )


def _method_table(methods):
    cells = {(row["method"], row["budget"], row["positions"]): row["all"] for row in methods["table"]}
    budgets = list(dict.fromkeys(row["budget"] for row in methods["table"]))
    names = list(dict.fromkeys(row["method"] for row in methods["table"]))
    rows = [
        (name, *(" / ".join(_percent(cells[name, b, p]) for p in ("reindexed", "original")) for b in budgets))
        for name in names
    ]
    return _table(("method", *(f"{budget} tokens" for budget in budgets)), rows)


def _recipe_text(family, recipe, log, versions):
    # 1. Losses and optimizers, in words.
    start = f"It starts from the weights of `{recipe.start}`. " if recipe.start else ""
    lines = [
        "## Recipe\n",
        f"`bash scripts/demo/train.sh {family}` (PLACE). {start}Losses: (1) InfoNCE between the [CLS] state of the layer whose features "
        "are used and a throw-away text encoder on captions, (2) alignment: binary cross-entropy on the scaled cosine of projected patches and "
        "word embeddings, the words of the object under the patch being positive, with words that name nothing kept flat, (3) answer "
        "cross-entropy, several questions packed per picture. Muon (float32) on matrices, AdamW on the rest, linear warm-up, cosine decay.\n",
    ]
    lines[1] = lines[1].replace("(PLACE)", f"on two CPU cores, one thread; {versions}")
    # 2. One row per stage. The log of a resumed run has several rows of a stage, and the last one counts.
    seconds = {row["stage"]: row["finished"] for row in log if "finished" in row}
    after = {row["stage"]: row["validation"] for row in log if row.get("validation")}
    rows = []
    for stage in recipe.stages:
        trained = "tower, projector, LLM" if stage.train_tower else "projector, LLM (tower frozen)"
        notes = [f"LLM of {stage.fresh_llm} layers from nothing"] if stage.fresh_llm else []
        notes += [f"LLM grows to {stage.grow_to} layers"] if stage.grow_to else []
        notes += (
            ["caption loss on what [CLS] attends to, wrong captions differ in one word"] if stage.hard_captions else []
        )
        notes += [f"image positions jittered for {stage.jitter:.0%} of the pictures"] if stage.jitter else []
        notes += [f"background patches dropped from {stage.sparse:.0%} of the pictures"] if stage.sparse else []
        notes += ["lookup practice for existence questions"] if stage.lookup else []
        notes += [f"alignment: flatness {stage.flatness:g}, evenness {stage.evenness:g}"] if stage.evenness else []
        took = f"{seconds[stage.name]:.0f} s" if stage.name in seconds else "-"
        score = _percent(after[stage.name]["all"]) if stage.name in after else "-"
        shape = f"{stage.batch} x {stage.questions}"
        rows.append(
            (stage.name, trained, "; ".join(notes) or "-", stage.steps, shape, stage.lr, stage.seed, took, score)
        )
    head = ("stage", "trained", "what is new", "steps", "pictures x questions", "peak lr", "seed", "time", "validation")
    lines.append(_table(head, rows))
    lines.append(
        "Dropped background: a random share, 0 to 1, of the patches that show no object; a patch that shows one is never dropped. "
        "Times are wall-clock on a machine that other jobs shared. Step counts and seeds are fixed; nothing looks at the clock.\n"
    )
    return "\n".join(lines)


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def _percent(share):
    return f"{100 * share:.1f}"


def _vocabulary_size():
    from llava.shapes.tokenizer import vocabulary

    return len(vocabulary())


@exits_cleanly
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True, choices=FAMILIES)
    parser.add_argument("--checkpoint", help="default playground/llava-shapes-<family>")
    parser.add_argument("--ablation", help="checkpoint trained without the alignment loss")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--text-only", action="store_true", help="write the card from figures measured before")
    args = parser.parse_args(argv)
    if args.threads < 1:
        raise UserError(f"--threads is {args.threads}, allowed is 1 or more")
    torch.set_num_threads(args.threads)
    checkpoint = Path(args.checkpoint or f"playground/llava-shapes-{args.family}")
    work = Path("playground/train")
    saved = work / f"card-{args.family}.json"
    if args.text_only:
        if not saved.is_file():
            raise UserError(f"{saved} is missing; run once without --text-only")
        figures = json.loads(saved.read_text(encoding="utf-8"))
    else:
        figures = measure(args.family, checkpoint, args.ablation, work)
        saved.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    log = work / args.family / "log.jsonl"
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    (checkpoint / "README.md").write_text(card_text(args.family, figures, rows), encoding="utf-8")
    print(f"card written to {checkpoint / 'README.md'}")


if __name__ == "__main__":
    main()

"""Does options.detail_share protect text? Strokes of digits and letters that stay visible, and answers, on demo scenes.

    python -m llava.analysis.detail_share v1.5 [--pictures 250] [--methods adav,...] [--budgets 25,10,5] [--shares 0,0.25,0.5]

The scenes have drawn digits, letters and shapes among grey clutter, on a noisy background. Per method, budget and share:
the stroke pixels of digits and letters that lie in kept patches, the accuracy of questions that name or ask for a digit
or a letter, and the accuracy of all other questions, which is what the option may cost. Differences are to the same
method without the option. Intervals are 95 % bootstrap over pictures. The command prints a table and writes
detail_share-<family>.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from llava.analysis.prompts import write_csv
from llava.common.command_line import Parser, names, percents, positive
from llava.common.errors import UserError, exits_cleanly
from llava.common.files import BASE, as_user_error_on_write
from llava.common.find_checkpoint import find_checkpoint
from llava.common.progress import progress_bar
from llava.common.rounding import floor_share
from llava.common.text_table import markdown_table
from llava.config import AdaVConfig
from llava.eval.scoring.bootstrap import ratio_intervals
from llava.methods.before_llm import selector_names
from llava.overlay.views import on_view, places_of, views_of
from llava.shapes.dataset import scene_questions
from llava.shapes.questions import Question
from llava.shapes.scenes import FAMILIES, Scene
from llava.shapes.vocabulary import DIGITS, LETTERS, category_of

FOLDER = BASE / "playground" / "analyses"
BATCH = 16  # pictures at a time
MEASURES = ("strokes", "text", "other")
_TEXT = {*DIGITS, *LETTERS, "digit", "letter"}


@dataclass
class Asked:
    """One picture with its questions. pixels: as LoadedCheckpoint.pixels returns them. strokes: bool [height, width]."""

    scene: Scene
    questions: list[Question]
    pixels: object
    strokes: np.ndarray


@dataclass
class Setting:
    """One configuration and, per question, whether its answer is right, and the share of the strokes that stay visible
    (NaN in a picture without text)."""

    percent: float | None
    config: AdaVConfig
    right: list[bool] = field(default_factory=list)
    visible: list[float] = field(default_factory=list)

    @property
    def name(self) -> tuple:
        return self.config.method, self.percent, self.config.options.get("detail_share", 0)


def about_text(question: Question) -> bool:
    """Return whether a question names or asks for a digit or a letter. A count of shapes does not."""
    return not _TEXT.isdisjoint(question.text.lower().rstrip("?").split())


def strokes_of(scene: Scene) -> np.ndarray:
    """Return the pixels of digits and letters, bool [height, width]."""
    of_text = [number for number, placed in enumerate(scene.objects) if category_of(placed.kind) != "shape"]
    return np.isin(scene.owner, of_text)


def visible_share(strokes: np.ndarray, plan, side: int, selection) -> float:
    """Return the share of the pixels `strokes` [height, width] that lie in kept patches; NaN if there are none.

    plan: TilePlan of the picture; side: patches per side of a tile. In a picture of several tiles, the patches of the
    crops count, which show it at full size. A merged token shows no patch.
    """
    view = views_of(plan, side)[-1]
    places = places_of(selection)
    kept = on_view(view, side, places, np.ones(len(places), bool), False)
    at = []
    for axis, patches in ((1, view.rows), (0, view.columns)):
        # The centre of each pixel on the canvas, and the patch that has it.
        pixel = (np.arange(strokes.shape[1 - axis]) + 0.5) * view.resized[axis] / strokes.shape[1 - axis]
        at.append(((pixel + view.offset[axis]) * patches / view.canvas[axis]).astype(int).clip(0, patches - 1))
    return float(kept[np.ix_(*at)][strokes].mean()) if strokes.any() else float("nan")


def settings(args: argparse.Namespace, tokens: float) -> list[Setting]:
    """Return all configurations: `none`, then each method at each budget and share. tokens: mean number per picture."""
    found = [Setting(None, AdaVConfig(method="none"))]
    for method in args.methods:
        for percent in args.budgets:
            budget = max(1, floor_share(percent / 100, tokens))
            found += [
                Setting(percent, AdaVConfig(method=method, overall_tokens=budget, options={"detail_share": share}))
                for share in args.shares
            ]
    return found


def answer(loaded, asked: list[Asked], setting: Setting) -> None:
    """Ask every question under one configuration, and note what was right and what stayed visible."""
    from llava.mm_utils import tile_plan
    from llava.model.decoding.sampling import Sampling

    side = loaded.model.get_vision_tower().num_patches_per_side
    for start in range(0, len(asked), BATCH):
        group = asked[start : start + BATCH]
        encoded = loaded.encode([one.pixels for one in group], setting.config)
        rows = [(one, image, question) for one, image in zip(group, encoded, strict=True) for question in one.questions]
        prepared = loaded.splice(
            [question.text for *_, question in rows], [[image] for _, image, _ in rows], setting.config
        )
        answers = loaded.engine.generate(prepared, Sampling(2)).answers
        for (one, _, question), (selection,), said in zip(rows, prepared.selections, answers, strict=True):
            plan = tile_plan(one.scene.size, loaded.model.config)
            setting.right.append(said.text.lower().split()[:1] == [question.answer.lower()])
            setting.visible.append(visible_share(one.strokes, plan, side, selection))


def rows_of(done: list[Setting], questions: list[Question], pictures: list[int]) -> list[dict]:
    """Return one row per setting. questions, pictures: [Q] each question, and the number of its picture."""
    # 1. Three ratios per setting: strokes over pictures with text, right answers over both kinds of questions.
    text = np.array([about_text(question) for question in questions])
    above, below = [], []
    for one in done:
        visible, right = np.array(one.visible), np.array(one.right)
        seen = ~np.isnan(visible)
        above += [np.nan_to_num(visible), right & text, right & ~text]
        below += [seen, text, ~text]
    # 2. Each ratio, and its difference to that of the same method and budget without the option.
    size = len(above)
    plain = {one.name[:2]: n for n, one in enumerate(done) if one.name[2] == 0}
    combine = np.hstack([np.eye(size), np.eye(size)])
    for n, one in enumerate(done):
        for nth in range(len(MEASURES)):
            combine[len(MEASURES) * plain[one.name[:2]] + nth, size + len(MEASURES) * n + nth] -= 1
    found = ratio_intervals(*(np.stack(part, axis=1).astype(float) for part in (above, below)), combine, pictures)
    # 3. The rows.
    rows = []
    for n, one in enumerate(done):
        method, percent, share = one.name
        row = {
            "method": method,
            "budget_percent": percent or 100,
            "tokens": one.config.overall_tokens if percent else "all",
            "detail_share": share,
        }
        for nth, measure in enumerate(MEASURES):
            for start, suffix in ((0, ""), (size, "_difference")):
                column = start + len(MEASURES) * n + nth
                for values, end in zip(found, ("", "_low", "_high"), strict=True):
                    row[measure + suffix + end] = float(values[column])
        rows.append(
            row
            | {"pictures": len(set(pictures)), "text_questions": int(text.sum()), "other_questions": int((~text).sum())}
        )
    return rows


def table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table, in per cent and points."""
    head = ("method", "tokens", "detail_share", "strokes visible", "text", "change", "other", "change")
    lines = [head]
    for row in rows:
        cells = [f"{100 * row['strokes']:.1f}"]
        for measure in MEASURES[1:]:
            low, high = (100 * row[f"{measure}_difference_{end}"] for end in ("low", "high"))
            change = (
                f"{100 * row[measure + '_difference']:+.1f} [{low:+.1f}, {high:+.1f}]" if row["detail_share"] else ""
            )
            cells += [f"{100 * row[measure]:.1f}", change]
        lines.append((row["method"], str(row["tokens"]), f"{row['detail_share']:g}", *cells))
    return markdown_table(lines, left=1)


def shares(text: str) -> list[float]:
    """argparse type of different shares from 0 to 1 with commas between them; 0, the reference, is added."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]  # fails the check below, so all mistakes get the same sentence
    if len(set(values)) < len(values) or not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}, allowed are different numbers from 0 to 1, as in 0.25,0.5")
    return sorted({0.0, *values})


def _asked(loaded, family: str, pictures: int) -> Iterator[Asked]:
    config = AdaVConfig(method="none")
    for index in range(pictures):
        scene, questions = scene_questions(family, "test", index)
        yield Asked(scene, questions, loaded.pixels(Image.fromarray(scene.pixels), config), strokes_of(scene))


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m llava.analysis.detail_share", description=__doc__.split("\n")[0])
    parser.add_argument("family", choices=FAMILIES, help="scenes, and the demo checkpoint that reads them")
    parser.add_argument("--pictures", type=positive, default=250, help="four questions each (250)")
    parser.add_argument("--methods", type=names, default=["adav", "fastervlm", "visionzip", "divprune"])
    parser.add_argument("--budgets", type=percents, default=[25.0, 10.0, 5.0], help="per cent of the tokens (25,10,5)")
    parser.add_argument("--shares", type=shares, default=[0.0, 0.25, 0.5], help="values of detail_share (0,0.25,0.5)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the .csv file (playground/analyses)")
    args = parser.parse_args(argv)
    for method in args.methods:
        if method not in selector_names() or method in ("none", "no_image", "downsample"):
            raise UserError(f'--methods: "{method}" chooses no tokens before the LLM, allowed are methods that do')
    with as_user_error_on_write(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
    # 1. The pictures.
    from llava.inference.loaded_checkpoint import LoadedCheckpoint

    checkpoint = find_checkpoint(f"playground/llava-shapes-{args.family}")
    loaded = LoadedCheckpoint(str(checkpoint.folder), config=AdaVConfig(method="none"), purpose="an analysis")
    asked = list(_asked(loaded, args.family, args.pictures))
    tokens = np.mean(loaded.model.slots([one.pixels.pixels for one in asked], [one.scene.size for one in asked]))
    # 2. The answers under every configuration.
    done = settings(args, float(tokens))
    for setting in progress_bar("settings", done, unit=" settings"):
        answer(loaded, asked, setting)
    # 3. The figures.
    questions = [(number, question) for number, one in enumerate(asked) for question in one.questions]
    rows = rows_of(done, [question for _, question in questions], [number for number, _ in questions])
    path = args.out / f"detail_share-{args.family}.csv"
    write_csv(rows, path)
    print(table(rows))
    print(path)


if __name__ == "__main__":
    main()

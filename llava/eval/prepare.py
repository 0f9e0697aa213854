"""Build a benchmark's files in LLaVA's layout from its public data set on the Hugging Face hub.

    python -m llava.eval.prepare BENCHMARK [--split S] [--source DIR] [--data-root DIR]

Needs the datasets library: pip install "adav[prepare]". The same command continues an interrupted download or
conversion. --source reads a copy of the data set's repository on disk instead of the hub.
Exit codes: 0 done, 2 bad input (one sentence).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from llava.common.command_line import Parser
from llava.common.errors import UserError, exits_cleanly, first_line
from llava.common.files import BASE, read_json, write_json
from llava.common.hub import HubSilent, files_on_hub
from llava.common.progress import progress_bar
from llava.eval.benchmarks import BENCHMARKS, Benchmark
from llava.eval.benchmarks.recipes import RECIPES, Recipe
from llava.eval.scoring.annotations import told_when_malformed


def prepare(benchmark: Benchmark, source: Path | None = None, partial: bool = False) -> str:
    """Write the files of one split of a benchmark; return a line of text about the result.

    source: a copy of the data set's repository; None is the hub. partial: accept another number of questions.
    Raises UserError if the split has no recipe, if the question file exists and was not made here, and for a malformed
    data set.
    """
    # 1. Is there something to do? The stamp tells files of this command from files that the user has downloaded.
    recipe = RECIPES.get(benchmark.name)
    if recipe is None or benchmark.split not in recipe.parts:
        known = ", ".join(f"{name} {'/'.join(entry.parts)}" for name, entry in RECIPES.items())
        page = f"; {benchmark.download_page} says where its files are" if benchmark.download_page else ""
        raise UserError(f"{benchmark.name} {benchmark.split} cannot be prepared, allowed are {known}{page}")
    stamp = benchmark.question_file.with_suffix(".prepared.json")
    if benchmark.question_file.exists():
        if not stamp.is_file():
            raise UserError(f"{benchmark.question_file} is there already, and not from here; move it away first")
        if (count := read_json(stamp)["questions"]) is not None:
            return f"{benchmark.name} {benchmark.split}: {count:,} questions, prepared before"
    # 2. Convert. The stamp comes first: after a kill, the question file is known as this command's own.
    made = {"from": str(source or recipe.repo), "split": benchmark.split}
    write_json(stamp, made | {"questions": None})
    parts, expected = recipe.parts[benchmark.split]
    tables = [rows(recipe, config, split, source) for config, split in parts]
    with told_when_malformed(Path(source or recipe.repo)):
        count = recipe.convert(benchmark, *tables)
    # 3. Check the number. Without the question file, the next start converts again.
    if count != expected and not partial:
        benchmark.question_file.unlink()
        raise UserError(
            f"{source or recipe.repo}: makes {count:,} questions of {benchmark.name} {benchmark.split}, allowed are "
            f"{expected:,} (--partial takes what is there)"
        )
    write_json(stamp, made | {"questions": count})
    note = f" ({recipe.note})" if recipe.note else ""
    return f"{benchmark.name} {benchmark.split}: {count:,} questions below {benchmark.folder}{note}"


def rows(recipe: Recipe, config: str, split: str, source: Path | None) -> Iterable[dict]:
    """Return the rows of one part of a data set, with a progress bar. Images are the uploaded files, not decoded.

    config, split: names in the data set. source: a copy of its repository, or None for the hub.
    """
    try:
        import datasets
    except ImportError:
        raise UserError('prepare needs the datasets library: pip install "adav[prepare]"') from None
    # The library logs the same text that its exceptions have, and draws progress bars into log files too.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if source is None:
        _need_hub(recipe.repo)
        try:
            table = datasets.load_dataset(recipe.repo, config, split=split)
        except Exception as error:  # hub, network and disk raise many types, without a common base
            raise UserError(f"{recipe.repo}, {config} {split}: cannot be loaded ({first_line(error)})") from None
    else:
        folder = source / ("data" if config == "default" else config)
        files = sorted(map(str, folder.glob(f"{split}-*.parquet")))
        if not files:
            raise UserError(f"{folder}: has no {split}-*.parquet, allowed is a copy of {recipe.repo}")
        try:
            table = datasets.Dataset.from_parquet(files)
        except Exception as error:  # pyarrow and datasets have no common exception for a damaged file
            raise UserError(f"{folder}: cannot be read as parquet ({first_line(error)})") from None
    # decode=False: the recipes write the uploaded files. The second case is a column of lists of images (SEED-Bench).
    for name, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(name, datasets.Image(decode=False))
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            table = table.cast_column(name, datasets.List(datasets.Image(decode=False)))
    return progress_bar(f"{recipe.repo} {split}", table, unit=" rows")


def _need_hub(repo: str) -> None:
    """UserError at once where the hub cannot be reached: the datasets library would ask for half a minute."""
    if os.environ.get("HF_HUB_OFFLINE") or os.environ.get("HF_DATASETS_OFFLINE"):
        return  # what is in the library's cache is enough
    try:
        files_on_hub(repo, "dataset")
    except HubSilent as error:
        raise UserError(
            f"{repo}: {error}; allowed are --source with a copy of it, HF_ENDPOINT=URL for a mirror, and HF_HUB_OFFLINE=1 "
            "where it was downloaded before"
        ) from None


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m llava.eval.prepare", description=__doc__.split("\n")[0])
    parser.add_argument("benchmark", help=", ".join(RECIPES))
    parser.add_argument("--split", help="default: the benchmark's first that a data set has")
    parser.add_argument("--source", type=Path, help="a copy of the data set's repository (default: the hub)")
    parser.add_argument("--partial", action="store_true", help="take a data set with another number of questions")
    parser.add_argument(
        "--data-root",
        type=Path,
        default=os.environ.get("DATA_ROOT") or BASE / "playground" / "data" / "eval",
        help="default: $DATA_ROOT, else playground/data/eval",
    )
    return parser.parse_args(argv)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.benchmark not in RECIPES:
        raise UserError(f'unknown benchmark "{args.benchmark}", allowed are {", ".join(RECIPES)}')
    split = args.split or next(iter(RECIPES[args.benchmark].parts))
    benchmark = BENCHMARKS[args.benchmark](Path(args.data_root), None, split)
    print(prepare(benchmark, args.source, args.partial))


if __name__ == "__main__":
    main()

"""Tables of FitPrune (arXiv 2409.10197): vision tokens that each layer drops, per model and FLOPs reduction.

A table file is JSON. It says what the tables were fitted on (model, layers, sizes, vision tokens) and their source. For
each FLOPs reduction in percent it lists the tokens that each layer drops. The authors' tables are in tables/.
`python -m llava.analysis.fit_fitprune_table` fits one and writes it. This file imports no torch.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from llava.common.errors import UserError

FOLDER = Path(__file__).resolve().parent / "tables"
SIZES = ("layers", "hidden_size", "intermediate_size")


@dataclass(frozen=True)
class Table:
    """One table: drops[l] is the number of vision tokens that layer l drops.

    model: name of the model that the table was fitted on
    ratio: FLOPs reduction in percent
    image_tokens: vision tokens of the image that the counts are for
    sizes: layers, hidden size and MLP size of that model's LLM
    """

    model: str
    ratio: float
    image_tokens: int
    sizes: tuple[int, int, int]
    drops: tuple[int, ...]

    @property
    def share(self) -> float:
        """Share of the vision tokens that all layers together drop."""
        return sum(self.drops) / self.image_tokens

    def over(self, layers: int) -> list[float]:
        """Return the drops per layer for an LLM of `layers` layers, as fractions of tokens.

        This model's depth is cut into `layers` equal parts. Each part gets the drops that fall into it.
        """
        own = len(self.drops)
        if layers == own:
            return list(map(float, self.drops))
        total = [0.0]
        for drop in self.drops:
            total.append(total[-1] + drop)

        def up_to(depth: float) -> float:
            # min: at the full depth the last layer counts whole, and there is no layer behind it to index.
            whole = min(int(depth), own - 1)
            return total[whole] + (depth - whole) * self.drops[whole]

        ends = [up_to(layer * own / layers) for layer in range(layers + 1)]
        return [end - start for start, end in zip(ends, ends[1:], strict=False)]


def read_tables(path: str | Path | None = None) -> tuple[Table, ...]:
    """Return the tables of a file, or of all shipped files. Raises UserError for a file that is no table file."""
    if path is None:
        return tuple(table for file in sorted(FOLDER.glob("*.json")) for table in read_tables(file))
    try:
        # The time of the last change is part of the cache key, so a table that was fitted again is read again.
        return _read(Path(path), Path(path).stat().st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path}: no FitPrune table can be read there ({error.strerror})") from None


@lru_cache(maxsize=64)
def _read(path: Path, _changed: int) -> tuple[Table, ...]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{path}: is no JSON file ({error})") from None
    try:
        sizes = tuple(int(content[name]) for name in SIZES)
        tables = tuple(
            Table(str(content["model"]), float(ratio), int(content["image_tokens"]), sizes, tuple(map(int, drops)))
            for ratio, drops in content["tables"].items()
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: is no FitPrune table file ({type(error).__name__}: {error})") from None
    for table in tables:
        if len(table.drops) != sizes[0] or min(table.drops) < 0 or not 0 < sum(table.drops) < table.image_tokens:
            raise UserError(
                f"{path}: the table for {table.ratio:g} % is not one count of at least 0 for each of {sizes[0]} layers "
                f"that leaves some of {table.image_tokens} tokens"
            )
    if not tables:
        raise UserError(f"{path}: holds no table")
    return tables


def write_table(path: Path, table: Table, source: str) -> None:
    """Write `table` to a file, and keep the tables of other ratios that are already there.

    Raises UserError where the file has tables of another model, LLM size or number of vision tokens.
    """
    path, tables = Path(path), {}
    if path.exists():
        for old in read_tables(path):
            if (old.model, old.sizes, old.image_tokens) != (table.model, table.sizes, table.image_tokens):
                raise UserError(
                    f"{path}: holds tables of {old.model} with {old.image_tokens} image tokens, so a table of "
                    f"{table.model} with {table.image_tokens} belongs into another file"
                )
            tables[old.ratio] = old.drops
    tables[table.ratio] = table.drops
    head = {"model": table.model, "source": source, **dict(zip(SIZES, table.sizes, strict=True))}
    head["image_tokens"] = table.image_tokens
    # One line per ratio, by hand: json.dumps with an indent would give every count its own line.
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    rows = [f'    "{ratio:g}": {json.dumps(list(tables[ratio]))}' for ratio in sorted(tables)]
    text = "\n".join(["{", *lines, '  "tables": {', ",\n".join(rows), "  }", "}", ""])
    path.write_text(text, encoding="utf-8")


def nearest_in_share(tables: tuple[Table, ...], share: float, n: int) -> Table:
    """Return the table whose dropped share is nearest to `share`; of equals the one fitted nearest to n tokens."""
    return min(tables, key=lambda table: (abs(table.share - share), _distance(table, n)))


def with_ratio(tables: tuple[Table, ...], ratio: float, n: int) -> Table:
    """Return the table for a FLOPs reduction of `ratio` %; of several the one fitted nearest to n vision tokens."""
    return min((table for table in tables if table.ratio == ratio), key=lambda table: _distance(table, n))


def _distance(table: Table, n: int) -> float:
    # On a log scale: half as many tokens are as far away as twice as many.
    return abs(math.log(table.image_tokens / n))

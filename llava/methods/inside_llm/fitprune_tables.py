"""FitPrune's tables: how many image tokens each layer drops, per model and FLOPs reduction. Imports no torch.

A table file is JSON: what the table was fitted on (model, its layers and sizes, image tokens), its source, and for each
FLOPs reduction in percent the tokens that each layer drops. Those of the authors lie in tables/;
`python -m llava.analysis.fit_fitprune_table` fits and writes one.
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
    """drops[l]: image tokens that layer l drops of an image of `image_tokens`, so that `ratio` % of the FLOPs go.

    sizes: layers, hidden size and MLP size of the LLM that it was fitted on.
    """

    model: str
    ratio: float
    image_tokens: int
    sizes: tuple[int, int, int]
    drops: tuple[int, ...]

    @property
    def share(self) -> float:
        """Share of the image tokens that are dropped, all layers together."""
        return sum(self.drops) / self.image_tokens

    def over(self, layers: int) -> list[float]:
        """The drops over another depth: what falls into each of `layers` equal parts of this model's depth."""
        own = len(self.drops)
        if layers == own:
            return list(map(float, self.drops))
        total = [0.0]
        for drop in self.drops:
            total.append(total[-1] + drop)

        def up_to(depth: float) -> float:
            whole = min(int(depth), own - 1)
            return total[whole] + (depth - whole) * self.drops[whole]

        ends = [up_to(layer * own / layers) for layer in range(layers + 1)]
        return [end - start for start, end in zip(ends, ends[1:], strict=False)]


def read_tables(path: str | Path | None = None) -> tuple[Table, ...]:
    """The tables of a file, or of all files that ship. Raises UserError for a file that is none."""
    if path is None:
        return tuple(table for file in sorted(FOLDER.glob("*.json")) for table in read_tables(file))
    try:
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
    """Write a table file, or add to the one that is there if it is of the same model; the same ratio is replaced."""
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
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    rows = [f'    "{ratio:g}": {json.dumps(list(tables[ratio]))}' for ratio in sorted(tables)]
    text = "\n".join(["{", *lines, '  "tables": {', ",\n".join(rows), "  }", "}", ""])
    path.write_text(text, encoding="utf-8")


def nearest_in_share(tables: tuple[Table, ...], share: float, n: int) -> Table:
    """The table that drops most nearly `share` of the image tokens; ties: fitted on most nearly n tokens."""
    return min(tables, key=lambda table: (abs(table.share - share), _distance(table, n)))


def with_ratio(tables: tuple[Table, ...], ratio: float, n: int) -> Table:
    """The table for a FLOPs reduction of `ratio` %, of several the one fitted on most nearly n image tokens."""
    return min((table for table in tables if table.ratio == ratio), key=lambda table: _distance(table, n))


def _distance(table: Table, n: int) -> float:
    return abs(math.log(table.image_tokens / n))

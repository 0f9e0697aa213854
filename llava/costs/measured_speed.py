"""Hours of an evaluation, predicted from speeds that were measured on a GPU (benchmarks/results/*-cuda.csv).

Two measured points are enough: the same model with all vision tokens, and with few. Between and beyond them, the time to
the first token is linear in the predicted FLOPs, and the time of a decode step is linear in the tokens that it reads.
Reading of images, scoring and loading of the checkpoint are not in the prediction.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.costs.flops import Cost, predict
from llava.costs.model_shape import ImageCounts, ModelShape
from llava.costs.presets import PRESETS
from llava.mm_utils import tile_plan


@dataclass(frozen=True)
class Line:
    """y = start + slope * x, through two measured points."""

    start: float
    slope: float

    @classmethod
    def through(cls, a: tuple[float, float], b: tuple[float, float]) -> Line:
        slope = (b[1] - a[1]) / (b[0] - a[0])
        return cls(a[1] - slope * a[0], slope)

    def at(self, x: float) -> float:
        return self.start + self.slope * x


@dataclass(frozen=True)
class MeasuredSpeed:
    """Speed of a GPU at one batch size. first: seconds of one question to its first token, by FLOPs. step: seconds of
    one further token, by the tokens that it reads per layer. device, batch, source: where it was measured."""

    first: Line
    step: Line
    device: str
    batch: int
    source: str

    @classmethod
    def read(cls, path: Path, batch: int = 8) -> MeasuredSpeed:
        """Read a table of benchmarks/end_to_end.py: the engine's rows without a cache policy, at this batch size.

        Raises UserError if the file does not have two such rows.
        """
        try:
            with open(path, encoding="utf-8", newline="") as file:
                rows = [row for row in csv.DictReader(file) if _usable(row, batch)]
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{path}: is no table of benchmarks/end_to_end.py ({error})") from None
        rows.sort(key=lambda row: float(row["layer_mean_tokens"]))
        if len(rows) < 2:
            raise UserError(f"{path}: has {len(rows)} measured rows at batch {batch}, two are needed")
        few, whole = rows[0], rows[-1]
        points = []
        for row in (few, whole):
            method, tokens = row["config"].removeprefix("method=").split()[0], round(float(row["layer_mean_tokens"]))
            config = AdaVConfig(method=method, overall_tokens=tokens)
            cost = preset_cost(row["preset"], config, int(row["text_tokens"]))
            read = float(row["layer_mean_tokens"]) + int(row["text_tokens"])
            points.append(
                (cost.total, float(row["ttft_ms"]) / 1000 / batch, read, float(row["step_ms"]) / 1000 / batch)
            )
        (a, first_a, read_a, step_a), (b, first_b, read_b, step_b) = points
        first, step = Line.through((a, first_a), (b, first_b)), Line.through((read_a, step_a), (read_b, step_b))
        return cls(first, step, whole["device"], batch, path.name)

    def seconds(self, cost: Cost, text_tokens: int, new_tokens: int) -> float:
        """Return the predicted seconds of one question."""
        return self.first.at(cost.total) + (new_tokens - 1) * self.step.at(cost.layer_mean + text_tokens)


def preset_cost(preset: str, config: AdaVConfig, text_tokens: int) -> Cost:
    """Return the predicted cost of one question about one image that fills the preset's tiles."""
    model_config = PRESETS[preset].model_config(newline=True)
    shape = ModelShape.from_config(model_config)
    image = ImageCounts.from_plan(tile_plan(PRESETS[preset].size, model_config, config.option("anyres")), shape.side)
    return predict(shape, config, [image], text_tokens, [text_tokens // 2])


def _usable(row: dict, batch: int) -> bool:
    """Whether a row is a measured one of the engine. A row with a cache policy has other decode steps."""
    plain = row["config"].removeprefix("method=").split()
    here = row["provider"] == "engine" and row["status"] == "measured" and int(row["batch"]) == batch
    return here and not any(part.startswith("vision_adaptive") for part in plain[1:])

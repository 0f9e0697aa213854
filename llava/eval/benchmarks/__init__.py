"""One file per benchmark: where its files lie, what is asked, how answers are scored. Imports no torch."""

from llava.eval.benchmarks.base import Benchmark
from llava.eval.benchmarks.shapes import Shapes
from llava.eval.benchmarks.vqav2 import VQAv2

BENCHMARKS: dict[str, type[Benchmark]] = {
    "shapes": Shapes,
    "vqav2": VQAv2,
}

__all__ = ["BENCHMARKS", "Benchmark"]

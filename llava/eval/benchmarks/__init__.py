"""Benchmarks, one file each: where its files are, its questions and its score. Imports no torch."""

from llava.eval.benchmarks.base import Benchmark
from llava.eval.benchmarks.gqa import GQA
from llava.eval.benchmarks.mmbench import MMBench
from llava.eval.benchmarks.mmbench_cn import MMBenchCN
from llava.eval.benchmarks.mme import MME
from llava.eval.benchmarks.mmvet import MMVet
from llava.eval.benchmarks.pope import POPE
from llava.eval.benchmarks.seed import SEED
from llava.eval.benchmarks.shapes import Shapes
from llava.eval.benchmarks.shapes_captions import ShapesCaptions
from llava.eval.benchmarks.sqa import ScienceQA
from llava.eval.benchmarks.textvqa import TextVQA
from llava.eval.benchmarks.vizwiz import VizWiz
from llava.eval.benchmarks.vqav2 import VQAv2

_CLASSES = (Shapes, ShapesCaptions, VQAv2, GQA, VizWiz, ScienceQA, TextVQA, POPE, MME, MMBench, MMBenchCN, MMVet, SEED)
BENCHMARKS: dict[str, type[Benchmark]] = {benchmark.name: benchmark for benchmark in _CLASSES}

__all__ = ["BENCHMARKS", "Benchmark"]

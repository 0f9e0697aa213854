"""Pictures of the demo and questions about them, for benchmarks that answer questions. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from llava.common.progress import progress_bar
from llava.eval.runs.work_order import OrderedSample
from llava.shapes.questions import ask
from llava.shapes.scenes import draw_scene, scene_rng
from llava.shapes.vocabulary import QUESTION_TYPES


def make_questions(folder: Path, family: str, pictures: int, each: int, first: int = 0) -> list[OrderedSample]:
    """Samples in the launcher's order, `each` questions per picture. Draws the pictures into `folder`.

    family: "v1.5" or "v1.6". first: number of the first picture, for pictures that no earlier call has drawn.
    """
    samples = []
    for index in progress_bar("drawing", range(first, first + pictures), unit=" pictures"):
        scene, name = draw_scene(family, "test", index), f"{index:04d}.png"
        Image.fromarray(scene.pixels).save(folder / name)
        for n in range(each):
            category = QUESTION_TYPES[n % len(QUESTION_TYPES)]
            rng = scene_rng(family, "test", index, stream=1 + n // len(QUESTION_TYPES))
            question = ask(scene, category, rng) or ask(scene, "exists", rng)
            samples.append(OrderedSample((index, n), name, question.text))
    return samples

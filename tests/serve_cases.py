"""What several tests of llava.serve need: pictures with questions whose answers are known, and waiting for a condition."""

import time

from PIL import Image

from llava.demo.dataset import scene_questions


def coloured_pictures(family, folder):
    """[(path, colour question, its answer)] of two pictures of the demo's test split, "v1.5" or "v1.6", answered differently."""
    found, index = [], 0
    while len(found) < 2:
        scene, questions = scene_questions(family, "test", index)
        index += 1
        if questions[0].category == "color" and questions[0].answer not in [answer for *_, answer in found]:
            path = folder / f"scene {index}.png"
            Image.fromarray(scene.pixels).save(path)
            found.append((path, questions[0].text, questions[0].answer))
    return found


def wait_for(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("what was waited for did not come")

"""What several tests of llava.serve need: pictures with known answers, checkpoints with another end token, waiting."""

import json
import shutil
import time

from PIL import Image
from transformers import AutoTokenizer

from llava.common.files import REPOSITORY
from llava.shapes.dataset import scene_questions


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


def ended_by(folder, token):
    """A copy of the demo checkpoint v1.5 with another end token, in a new folder."""
    model = REPOSITORY / "playground" / "llava-shapes-v1.5"
    shutil.copytree(model, folder)
    number = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids(token)
    for name, key, value in (
        ("config.json", "eos_token_id", number),
        ("generation_config.json", "eos_token_id", number),
        ("tokenizer_config.json", "eos_token", token),
        ("special_tokens_map.json", "eos_token", token),
    ):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | {key: value}))
    return folder


def wait_for(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("what was waited for did not come")

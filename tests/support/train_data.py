"""Tiny training runs: an LLM and a tower to start from, a few conversations with images, and a command line."""

import json
from pathlib import Path

import tiny_checkpoints as tiny

from llava.train.train import parse, train

COLOURS = ("red", "green", "blue")
WORDS = ("What colour is the shape on the left?", "How many digits are there in the picture?")


def start(folder: Path, kind: str = "llava", text: str = "llama") -> dict:
    """Folders `llm`, `tower` and `llava` (LLaVA's format) of one random model."""
    reference = tiny.build_reference(kind, text, seed=3)
    tower = tiny.save_clip_tower(reference, folder / "tower")
    return {
        "llm": tiny.save_plain_llm(reference, folder / "llm"),
        "tower": tower,
        "llava": tiny.save_original(reference, folder / "llava", tower),
    }


def write_samples(folder: Path, count: int = 12, texts: int = 0, captions: bool = False) -> Path:
    """`count` conversations about pictures, then `texts` without: folder/data.json, folder/images. Returns the folder."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(count):
        tiny.make_image(60 + 9 * i, 97 - 4 * i, seed=i).save(folder / "images" / f"{i}.png")
        turns = [("human", f"{WORDS[0]}\n<image>"), ("gpt", COLOURS[i % 3])]
        if captions:
            turns = [("human", "Render it.\n<image>"), ("gpt", f"{COLOURS[i % 3]} circle and star")]
        elif i % 2:
            turns += [("human", WORDS[1]), ("gpt", "two")]
        rows.append({"id": str(i), "image": f"{i}.png", "conversations": _turns(turns)})
    rows += [{"id": f"t{i}", "conversations": _turns([("human", WORDS[i % 2]), ("gpt", "Yes")])} for i in range(texts)]
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def _turns(turns):
    return [{"from": role, "value": text} for role, text in turns]


def flags(data: Path, output: Path, **changes) -> list[str]:
    """A command line for one process on the CPU; a flag that is None is left out."""
    values = {
        "version": "v1",
        "data_path": data / "data.json",
        "image_folder": data / "images",
        "output_dir": output,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "save_strategy": "no",
        "optim": "adamw_torch",
        "lr_scheduler_type": "constant",
        "dataloader_pin_memory": False,
        "max_grad_norm": 1.0,
    } | changes
    return [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]


def from_llm(folders: dict) -> dict:
    """Flags that make a LLaVA of the LLM."""
    return {
        "model_name_or_path": folders["llm"],
        "vision_tower": folders["tower"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "image_aspect_ratio": "pad",
    }


def run(data: Path, output: Path, **changes):
    """(trainer, losses of its logged steps) of a run in this process."""
    trainer = train(parse(flags(data, output, **changes)))
    return trainer, [row["loss"] for row in trainer.state.log_history if "loss" in row]

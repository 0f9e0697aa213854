"""The trainer under torchrun: DeepSpeed ZeRO-2 and ZeRO-3 on one and two gloo ranks, against one plain process.

Needs the extra `train` (make test-all installs it); DeepSpeed builds its collectives once, which takes about a minute.
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_data

from llava.model.builder import load_pretrained_model

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason='needs the extra "train" (make test-all)'),
]
ROOT = Path(__file__).resolve().parents[2]
STEPS = 20


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """(folders of the model, data with images and texts)."""
    folder = tmp_path_factory.mktemp("start")
    return train_data.start(folder), train_data.write_samples(folder / "data", count=16, texts=4)


def command(start, output, **changes):
    settings = {"max_steps": STEPS, "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1}
    return train_data.flags(start[1], output, **(train_data.from_llm(start[0]) | settings | changes))


def launch(start, output, ranks, zero=None, **changes):
    """Losses of a run under torchrun; the global batch is 4 whatever the number of ranks."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    changes = {"per_device_train_batch_size": 4 // ranks} | changes
    if zero:
        changes["deepspeed"] = ROOT / "scripts" / f"zero{zero}.json"
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        str(ranks),
        "--master_port",
        str(port),
    ]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja lies there
    done = subprocess.run(
        [*torchrun, "-m", "llava.train.train", *command(start, output, **changes)],
        cwd=ROOT,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return losses_of(output)


def losses_of(output):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


@pytest.fixture(scope="module")
def plain(start, tmp_path_factory):
    """(losses, weights) of one process without DeepSpeed."""
    output = tmp_path_factory.mktemp("plain")
    losses = launch(start, output, 1)
    assert len(losses) == STEPS and losses[-1] < 0.5 * losses[0]
    return losses, weights(output)


def weights(folder, base=None):
    return load_pretrained_model(folder, base, device_map="cpu")[1].state_dict()


def close(found, expected, tolerance=1e-3):
    assert len(found) == len(expected)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < tolerance, (found, expected)


@pytest.mark.parametrize("zero", [None, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_loss_curve_is_that_of_one_process(start, plain, tmp_path, zero, ranks):
    """Same global batch, same order, float32: the same losses over 20 steps; and the checkpoint is the same model."""
    close(launch(start, tmp_path, ranks, zero), plain[0])
    for name, value in weights(tmp_path).items():
        torch.testing.assert_close(value, plain[1][name], atol=1e-3, rtol=0)


@pytest.mark.parametrize("zero", [2, 3])
def test_grouped_batches_of_images_and_of_texts(start, tmp_path, zero):
    """A rank whose batch has no image takes part in everything that the others compute."""
    changes = {"group_by_modality_length": True, "gradient_accumulation_steps": 2, "max_steps": 6}
    one = launch(start, tmp_path / "one", 1, zero, per_device_train_batch_size=2, **changes)
    changes["gradient_accumulation_steps"] = 1
    two = launch(start, tmp_path / "two", 2, zero, **changes)
    close(two, one)


@pytest.mark.parametrize("zero", [2, 3])
@pytest.mark.parametrize("kind", ["full", "lora", "projector"])
def test_a_stopped_run_goes_on(start, tmp_path, zero, kind):
    """On two ranks, stopped after 3 of 5 steps; what it saves loads back."""
    changes = {"full": {}, "lora": {"lora_enable": True}, "projector": {"tune_mm_mlp_adapter": True}}[kind]
    changes |= {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}
    whole = launch(start, tmp_path / "whole", 2, zero, **changes)
    (tmp_path / "stopped").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "stopped" / "checkpoint-3")
    close(launch(start, tmp_path / "stopped", 2, zero, **changes), whole, 1e-6)
    base = None if kind == "full" else start[0]["llm"]
    first, second = weights(tmp_path / "whole", base), weights(tmp_path / "stopped", base)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("zero", [2, 3])
def test_several_tiles_with_selection(tmp_path, zero):
    """A model with a newline token, its tokens selected, on two ranks as on one."""
    folders = train_data.start(tmp_path, "llava_next")
    start = folders, train_data.write_samples(tmp_path / "data", count=6, texts=2)  # two whole batches
    changes = {"model_name_or_path": folders["llava"], "vision_tower": None, "image_aspect_ratio": None, "max_steps": 4}
    for number, selection in enumerate(({"method": "adav", "overall_tokens": 11}, {})):
        one = launch(start, tmp_path / f"one{number}", 1, zero, **changes, **selection)
        close(launch(start, tmp_path / f"two{number}", 2, zero, **changes, **selection), one)


SCRIPTS = {  # published settings: arXiv 2310.03744 and github.com/haotian-liu/LLaVA, scripts/v1_5
    "pretrain": {"learning_rate": 1e-3, "batch": 32, "zero": 2},
    "finetune": {"learning_rate": 2e-5, "batch": 16, "zero": 3},
    "finetune_lora": {"learning_rate": 2e-4, "batch": 16, "zero": 3},
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_scripts(start, tmp_path, script):
    """As published but for the model, the data and the device: bfloat16, two ranks, a worker for the images."""
    folders, data = start
    captions = script == "pretrain"
    if captions:
        data = train_data.write_samples(tmp_path / "captions", count=4, captions=True)
    changes = {"model_name_or_path": folders["llm"], "vision_tower": folders["tower"], "use_cpu": True, "tf32": False}
    changes |= {"data_path": data / "data.json", "image_folder": data / "images", "output_dir": tmp_path / "out"}
    changes |= {"max_steps": 1, "dataloader_pin_memory": False}
    if not captions:
        projector = load_pretrained_model(folders["llava"], device_map="cpu")[1].model.mm_projector.state_dict()
        torch.save({f"model.mm_projector.{k}": v for k, v in projector.items()}, tmp_path / "mm_projector.bin")
        changes["pretrain_mm_mlp_adapter"] = tmp_path / "mm_projector.bin"
    command = [part for name, value in changes.items() for part in (f"--{name}", str(value))]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        environment = {"PROCESSES": "2", "MASTER_PORT": str(listener.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "v1_5" / f"{script}.sh"), *command],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    used = torch.load(tmp_path / "out" / "training_args.bin", weights_only=False)
    published = SCRIPTS[script]
    assert (used.learning_rate, used.per_device_train_batch_size) == (published["learning_rate"], published["batch"])
    assert (used.num_train_epochs, used.weight_decay, used.warmup_ratio, used.model_max_length) == (1, 0, 0.03, 2048)
    assert used.lr_scheduler_type == "cosine" and used.bf16 and used.deepspeed.endswith(f"zero{published['zero']}.json")
    assert used.group_by_modality_length is not captions
    if script == "finetune_lora":
        assert (used.lora_r, used.lora_alpha, used.mm_projector_lr) == (128, 256, 2e-5)
    base = None if script == "finetune" else folders["llm"]
    assert weights(tmp_path / "out", base)["model.mm_projector.0.weight"].isfinite().all()


def test_bad_input_is_one_sentence_on_every_rank(start, tmp_path):
    with pytest.raises(AssertionError, match='error: --version is "v7"'):
        launch(start, tmp_path, 2, 2, version="v7")

"""The trainer on tiny models, one process on the CPU: the loss falls, checkpoints load back in both formats, runs resume."""

import json
import shutil
import sys

import pytest
import tiny_checkpoints as tiny
import torch
import train_data
from train_data import from_llm
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from llava.common.errors import UserError
from llava.constants import IGNORE_INDEX
from llava.methods.before_llm import selector_names
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.export import load_and_save
from llava.train.train import main, parse

PROMPT = "USER: <image>\nWhat colour is the shape? ASSISTANT:"
KINDS = {
    "projector": {"tune_mm_mlp_adapter": True, "version": "plain", "learning_rate": 1e-2},
    "full": {},
    "lora": {"lora_enable": True, "lora_r": 4, "lora_alpha": 8, "learning_rate": 1e-2, "mm_projector_lr": 1e-3},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return train_data.start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def anyres(tmp_path_factory):
    """The folders of a model with several tiles and a newline token."""
    return train_data.start(tmp_path_factory.mktemp("anyres"), "llava_next")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return train_data.write_samples(tmp_path_factory.mktemp("data"), texts=3)


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    return train_data.write_samples(tmp_path_factory.mktemp("captions"), captions=True)


@pytest.fixture(scope="module")
def trained(folders, data, captions, tmp_path_factory):
    """kind -> (output folder, trainer, losses) of a short run of each kind."""
    done = {}
    for kind, changes in KINDS.items():
        output = tmp_path_factory.mktemp(kind)
        source = captions if kind == "projector" else data
        trainer, losses = train_data.run(source, output, **(from_llm(folders) | changes))
        done[kind] = output, trainer, losses
    return done


def logits(loaded, size=(103, 97)):
    tokenizer, model, image_processor, _ = loaded
    image = tiny.make_image(*size)
    ids = tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt")[None]
    pixels = process_images([image], image_processor, model.config)
    with torch.no_grad():
        return model.eval()(input_ids=ids, images=pixels, image_sizes=[image.size]).logits


# ------------------------------------------------------------------------------------------------ what is trained
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls(trained, kind):
    losses = trained[kind][2]
    assert len(losses) == 6 and losses[-1] < 0.85 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_should_learn_changes(folders, trained, kind):
    """Against the LLM and tower that the run started from."""
    output, _, _ = trained[kind]
    base = None if kind == "full" else folders["llm"]
    _, model, _, _ = load_pretrained_model(output, base, device_map="cpu")
    _, before, _, _ = load_pretrained_model(folders["llava"], device_map="cpu")
    old = before.state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, old[name])}
    llm = {name for name in changed if "mm_projector" not in name}
    assert changed - llm and not any("vision_tower" in name for name in changed)
    if kind == "projector":
        assert not llm
    elif kind == "lora":
        assert llm == {n for n in old if n.startswith("model.layers.") and "_proj." in n}
    else:
        assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= llm


def test_learning_rates_per_part(folders, data, tmp_path):
    changes = from_llm(folders) | {"mm_projector_lr": 3e-4, "weight_decay": 0.1, "max_steps": 1}
    changes |= {"unfreeze_mm_vision_tower": True, "mm_vision_tower_lr": 2e-6}
    trainer, _ = train_data.run(data, tmp_path, **changes)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            rate = 3e-4 if "mm_projector" in name else 2e-6 if "vision_tower" in name else 2e-3
            assert group["lr"] == rate
            assert group["weight_decay"] == (0.0 if "norm" in name or name.endswith("bias") else 0.1)
    assert all(not p.requires_grad for n, p in trainer.model.named_parameters() if id(p) in names)


# -------------------------------------------------------------------------------------------------- both formats
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_load_back_in_both_formats(folders, trained, tmp_path, kind):
    """What was trained, what load_pretrained_model reads, and what is exported whole, in both layouts, are one model."""
    output, trainer, _ = trained[kind]
    base = None if kind == "full" else str(folders["llm"])
    loaded = load_pretrained_model(output, base, device_map="cpu")
    expected = logits(loaded)
    tokenizer, _, image_processor, _ = loaded
    live = logits((tokenizer, trainer.llava, image_processor, 0))
    torch.testing.assert_close(expected, live, atol=2e-5, rtol=0)
    for layout in ("llava", "llava-hf"):
        load_and_save(str(output), base, str(tmp_path / layout), layout, "float32")
        found = logits(load_pretrained_model(tmp_path / layout, device_map="cpu"))
        torch.testing.assert_close(found[..., : expected.shape[-1]], expected, atol=1e-6, rtol=0)


def test_the_original_format_has_llavas_names(trained):
    from safetensors.torch import load_file

    output = trained["full"][0]
    names = load_file(output / "model.safetensors").keys()
    assert "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight" in names
    assert {"model.mm_projector.0.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"} <= names
    config = json.loads((output / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llava_llama", ["LlavaLlamaForCausalLM"])
    assert config["use_cache"] and config["mm_projector_type"] == "mlp2x_gelu" and config["image_aspect_ratio"] == "pad"
    projector = torch.load(trained["projector"][0] / "mm_projector.bin", weights_only=True)
    assert sorted(projector) == [f"model.mm_projector.{i}.{part}" for i in (0, 2) for part in ("bias", "weight")]
    others = torch.load(trained["lora"][0] / "non_lora_trainables.bin", weights_only=True)
    assert all(name.startswith("base_model.model.model.mm_projector.") for name in others) and len(others) == 4


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
def test_transformers_reads_the_export(folders, anyres, tmp_path, kind):
    """transformers' own class and processor, on the same picture: nothing missing, and our logits."""
    from transformers import AutoProcessor

    source = (folders if kind == "llava" else anyres)["llava"]
    load_and_save(str(source), None, str(tmp_path), "llava-hf", "float32")
    ours = load_pretrained_model(tmp_path, device_map="cpu")
    name = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}[kind]
    theirs, info = name.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    tokenizer, image_processor = AutoProcessor.from_pretrained(tmp_path).tokenizer, ours[2]
    image = tiny.make_image(103, 97)
    batch = image_processor([image], return_tensors="pt")
    if kind == "llava_next":
        batch["image_sizes"] = torch.tensor([[97, 103]])
    count = len(theirs.get_image_features(**batch, return_dict=True).pooler_output[0])
    ids = tokenizer(PROMPT).input_ids
    at, image_id = ids.index(theirs.config.image_token_index), theirs.config.image_token_index
    ids = torch.tensor([ids[:at] + [image_id] * count + ids[at + 1 :]])
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(input_ids=ids, **batch).logits, logits(ours), atol=1e-4, rtol=0)


def test_merge_script(folders, trained, tmp_path):
    import subprocess
    import sys

    command = [sys.executable, "scripts/merge_lora_weights.py", "--dtype", "float32"]
    command += ["--model-path", str(trained["lora"][0]), "--model-base", str(folders["llm"])]
    subprocess.run([*command, "--save-model-path", str(tmp_path)], check=True, capture_output=True)
    merged = logits(load_pretrained_model(tmp_path, device_map="cpu"))
    expected = logits(load_pretrained_model(trained["lora"][0], folders["llm"], device_map="cpu"))
    torch.testing.assert_close(merged, expected, atol=1e-6, rtol=0)


def test_a_pretrained_projector_is_taken_over(folders, trained, data, tmp_path):
    path = trained["projector"][0] / "mm_projector.bin"
    changes = from_llm(folders) | {"pretrain_mm_mlp_adapter": path, "freeze_mm_mlp_adapter": True, "max_steps": 1}
    trainer, _ = train_data.run(data, tmp_path, **changes)
    for name, value in torch.load(path, weights_only=True).items():
        assert torch.equal(trainer.model.state_dict()[name], value)


# ------------------------------------------------------------------------------------------------------ resuming
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grouped", [False, True])
def test_a_stopped_run_goes_on_as_if_it_had_not(folders, data, captions, tmp_path, kind, grouped):
    """Stopped after 5 of 8 steps, in the second epoch: the same losses from there on, and the same weights in the end."""
    source = captions if kind == "projector" else data
    changes = from_llm(folders) | KINDS[kind] | {"max_steps": 8, "group_by_modality_length": grouped}
    changes |= {"save_strategy": "steps", "save_steps": 5, "lr_scheduler_type": "cosine"}
    if kind == "full":  # the other kinds go without accumulation
        changes |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole, losses = train_data.run(source, tmp_path / "run", **changes)
    expected = {name: value.clone() for name, value in whole.model.state_dict().items()}
    (tmp_path / "stopped").mkdir()
    shutil.copytree(tmp_path / "run" / "checkpoint-5", tmp_path / "stopped" / "checkpoint-5")
    (tmp_path / "stopped" / "checkpoint-7").mkdir()  # killed while it was being written
    again, resumed = train_data.run(source, tmp_path / "stopped", **changes)
    assert resumed == losses and again.state.global_step == 8
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


# ----------------------------------------------------------------------------------------- selection in training
@pytest.mark.parametrize("method", [name for name in selector_names() if name != "no_image"])
def test_every_selector_trains(anyres, data, tmp_path, method):
    """With its tokens selected the model learns, and every part that should learn does."""
    changes = {"model_name_or_path": anyres["llava"], "method": method, "overall_tokens": 11, "max_steps": 3}
    trainer, losses = train_data.run(data, tmp_path, **changes)
    assert losses[-1] < losses[0]
    assert trainer.model.adav_config.method == method
    newline = trainer.model.model.image_newline
    assert newline.requires_grad == (method == "none")
    _, before, _, _ = load_pretrained_model(anyres["llava"], device_map="cpu")
    after = trainer.model.state_dict()
    still = [n for n, p in before.state_dict().items() if torch.equal(p, after[n])]
    assert all("vision_tower" in name or (method != "none" and "newline" in name) for name in still)


def test_labels_follow_the_kept_tokens(anyres, data, tmp_path):
    """The spliced prompt is shorter by what was dropped, and the same tokens are learnt."""
    run = parse(train_data.flags(data, tmp_path, model_name_or_path=anyres["llava"], method="adav", overall_tokens=7))
    _, model, _, _ = load_pretrained_model(anyres["llava"], config=run.selection, device_map="cpu")
    batch = _batch(anyres, data)
    pruned = model.prepare(**batch)
    assert pruned.image_spans[0][0][1] == 7
    learnt = batch["labels"][batch["labels"] != IGNORE_INDEX]
    assert torch.equal(pruned.labels[pruned.labels != IGNORE_INDEX], learnt)
    for row, (start, count) in enumerate(spans[0] for spans in pruned.image_spans):
        assert bool((pruned.labels[row, start : start + count] == IGNORE_INDEX).all())


def test_the_answer_does_not_choose_the_tokens(anyres, data):
    """A selector that reads the question sees the question alone: another answer leaves the choice as it is."""
    run = parse(train_data.flags(data, "x", model_name_or_path=anyres["llava"], method="t2i", overall_tokens=7))
    _, model, _, _ = load_pretrained_model(anyres["llava"], config=run.selection, device_map="cpu")
    batch = _batch(anyres, data)
    other = batch["input_ids"].clone()
    learnt = batch["labels"] != IGNORE_INDEX
    other[learnt] = torch.where(other[learnt] == 2, other[learnt], (other[learnt] * 7) % 60 + 5)
    assert not torch.equal(other, batch["input_ids"])
    chosen = [model.prepare(**(batch | {"input_ids": ids})).selections for ids in (batch["input_ids"], other)]
    told = [
        model.prepare(**(batch | {"input_ids": ids, "labels": None})).selections for ids in (batch["input_ids"], other)
    ]

    def same(pair):
        return all(
            torch.equal(a.indices, b.indices) for x, y in zip(*pair, strict=True) for a, b in zip(x, y, strict=True)
        )

    assert same(chosen) and not same(told)


def _batch(folders, data):
    from llava.config import AdaVConfig
    from llava.train.dataset import Collator, ConversationDataset, read_samples

    tokenizer, model, image_processor, _ = load_pretrained_model(folders["llava"], device_map="cpu")
    samples = read_samples(data / "data.json", data / "images")
    plain = AdaVConfig(method="none")
    dataset = ConversationDataset(samples, "vicuna_v1", tokenizer, image_processor, model.config, plain, 2048)
    return Collator(dataset.blank)([dataset[i] for i in range(4)])


# -------------------------------------------------------------------------------------------- what a user reads
def test_the_end_counts_what_was_not_learnt(folders, tmp_path, monkeypatch, capsys):
    """Said before training, as a warning, and again behind the checkpoint's line."""
    data = train_data.write_samples(tmp_path, count=4, texts=2)
    rows = json.loads((data / "data.json").read_text())
    rows[2]["conversations"][1]["value"] = ""
    (data / "data.json").write_text(json.dumps(rows))
    flags = train_data.flags(data, tmp_path / "out", **(from_llm(folders) | {"max_steps": 1}))
    monkeypatch.setattr(sys, "argv", ["train", *flags])
    with pytest.warns(UserWarning, match="1 of 6 samples are left out"):
        main()
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith(f"{data}/data.json: 1 of 6 samples are left out: 1 have no")
    )


def test_torch_does_not_look_for_weights_without_gradient(data, tmp_path):
    """It would warn that it found none; who asks for it gets it."""
    wanted = {None: False, True: True}
    for given, found in wanted.items():
        run = parse(train_data.flags(data, tmp_path, model_name_or_path="x", ddp_find_unused_parameters=given))
        assert run.training.ddp_find_unused_parameters is found


# ----------------------------------------------------------------------------------------------------- bad input
BAD = {
    "a dropper": ({"method": "fastv"}, "in training those are the answer"),
    "no image": ({"method": "no_image"}, "no image would be seen"),
    "an adaptive cache": ({"method": "none", "vision_adaptive_attention": "true"}, "training generates none"),
    "a second model": ({"method": "cdpruner", "options": '{"text_tower": "x"}'}, "does not load"),
    "a version": ({"version": "v7"}, 'version is "v7", allowed are v1, '),
    "nothing to train": ({"freeze_backbone": True, "freeze_mm_mlp_adapter": True}, "nothing to train"),
    "projector and lora": ({"tune_mm_mlp_adapter": True, "lora_enable": True}, "does not go with it"),
    "start and end tokens": ({"mm_use_im_start_end": True}, "allowed is False"),
    "no model": ({"model_name_or_path": None}, "--model_name_or_path is missing"),
    "no such model": ({"model_name_or_path": "./nowhere"}, "no such folder"),
    "no tower": ({"vision_tower": None}, "--vision_tower must name a CLIP"),
    "no projector": ({"pretrain_mm_mlp_adapter": "none.bin"}, "none.bin: no such file"),
    "a grid": (
        {"image_aspect_ratio": "anyres", "image_grid_pinpoints": "[[50, 100]]", "mm_patch_merge_type": "spatial_unpad"},
        "multiple of the tower's 56 pixels",
    ),
    "a grid for a llava": (
        {"model_name_or_path": "LLAVA", "image_grid_pinpoints": "[[56, 112]]"},
        "is a LLaVA already",
    ),
    "tiles for a llava": (
        {"model_name_or_path": "LLAVA", "image_aspect_ratio": "anyres"},
        "allowed are pad and square",
    ),
    "a warm-up": ({"warmup_ratio": 2}, "allowed is a share from 0 to below 1"),
    "an unknown flag": ({"learning_rte": 1}, "training has no --learning_rte 1; --help lists its flags"),
    "no batch": ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size is 0, allowed is 1 or more"),
    "no accumulation": ({"gradient_accumulation_steps": 0}, "--gradient_accumulation_steps is 0, allowed is 1 or more"),
    "workers": ({"dataloader_num_workers": -1}, "--dataloader_num_workers is -1, allowed is 0 or more"),
    "epochs": ({"num_train_epochs": 0, "max_steps": -1}, "--num_train_epochs is 0.0, allowed is more than 0"),
    "a bias": (
        {"lora_enable": True, "lora_bias": "some"},
        '--lora_bias is "some", allowed are none, all and lora_only',
    ),
    "an evaluation": ({"eval_strategy": "steps", "eval_steps": 1}, "--eval_strategy is steps, allowed is no"),
    "no checkpoint": ({"resume_from_checkpoint": "nowhere"}, "nowhere: has no trainer_state.json, allowed is a folder"),
    "an output that is a file": ({"output_dir": __file__}, "test_train.py: cannot be written, File exists"),
    "a report": ({"report_to": "paper"}, "cannot be used .paper is not supported"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(folders, data, tmp_path, case):
    changes, message = BAD[case]
    if changes.get("model_name_or_path") == "LLAVA":
        changes = changes | {"model_name_or_path": folders["llava"]}
    with pytest.raises(UserError, match=message) as error:
        train_data.run(data, tmp_path, **(from_llm(folders) | changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read(folders, data, tmp_path, workers):
    """Named in one sentence, also out of a worker; the checkpoints before it stay."""
    broken = shutil.copytree(data, tmp_path / "data")
    (broken / "images" / "3.png").write_bytes(b"no picture")
    changes = from_llm(folders) | {"max_steps": 9, "dataloader_num_workers": workers}
    with pytest.raises(UserError) as error:
        train_data.run(broken, tmp_path / "out", **changes, save_strategy="steps", save_steps=1)
    assert str(error.value).startswith(
        f'{broken}/data.json, sample 3 (id "3"): image {broken}/images/3.png cannot be read'
    )
    assert "\n" not in str(error.value)

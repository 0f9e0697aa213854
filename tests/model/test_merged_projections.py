"""Saving a model whose projections are views of one weight (merge_projections, which loading does on a GPU).

Files are those of the model as it was loaded, byte for byte, and hold no weight twice."""

import json
import math

import pytest
import tiny_checkpoints as tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open

from llava.model.builder import load_pretrained_model
from llava.model.decoding.decode_step import merge_projections
from llava.model.export import LAYOUTS, save_checkpoint

MODELS = {
    "llama": ("llava", {}),
    "grouped mistral": ("llava_next", {"text": "mistral"}),
    "biased": ("llava_next", {"attention_bias": True, "mlp_bias": True}),
    "tied": ("llava", {"tie_word_embeddings": True}),
}
GROUPS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))
TARGETS = [name for _, names in GROUPS for name in names]


def load(folder, base=None, merged=False):
    """(tokenizer, model, image processor); merged: with the projections that read one input behind one another."""
    tokenizer, model, image_processor, _ = load_pretrained_model(folder, base, device_map="cpu")
    if merged:
        merge_projections(model)
        assert shared(model) == [True] * len(GROUPS) * model.config.num_hidden_layers
    return tokenizer, model, image_processor


def shared(model) -> list[bool]:
    """Of each group of each layer, whether its weights lie in one allocation and fill it."""
    found = []
    for layer in model.model.layers:
        for part, names in GROUPS:
            weights = [getattr(getattr(layer, part), name).weight for name in names]
            storages = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights}
            found.append(len(storages) == 1 and sum(storages.values()) == sum(weight.nbytes for weight in weights))
    return found


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    kind, options = MODELS[request.param]
    return tiny.save_llava_hf(tiny.build_reference(kind, **options), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """(folder of a LoRA checkpoint, its base, a whole checkpoint of that base)."""
    root, reference = tmp_path_factory.mktemp("lora"), tiny.build_reference("llava")
    tower = tiny.save_clip_tower(reference, root / "tower")
    tiny.save_lora(reference, root / "lora", tower)
    whole = tiny.save_original(reference, root / "whole", tower)
    return root / "lora", tiny.save_plain_llm(reference, root / "base"), whole


def weights_in(folder) -> dict[str, torch.Tensor]:
    """What the safetensors files of a folder hold: each name once, and no file more than its weights."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            inside = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        assert not inside.keys() & found.keys()
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size - header == sum(value.nbytes for value in inside.values())
        found |= inside
    return found


def same_files(found, expected) -> None:
    """The same files with the same bytes."""
    names = sorted(path.name for path in expected.iterdir())
    assert names == sorted(path.name for path in found.iterdir()) and any(
        name.endswith(".safetensors") for name in names
    )
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def holds(folder, model) -> None:
    """The files hold every weight of `model` once, tied ones once in all."""
    sizes = {value.data_ptr(): value.nbytes for value in model.state_dict().values()}
    found = weights_in(folder)
    assert sum(value.nbytes for value in found.values()) == sum(sizes.values())
    projections = [key for key in found if key.startswith("model.layers.") and key.split(".")[-2] in TARGETS]
    weights = [key for key in projections if key.endswith(".weight")]
    assert len(weights) == len(TARGETS) * model.config.num_hidden_layers


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_writes_what_was_loaded(folder, tmp_path, layout):
    for name in ("plain", "merged"):
        tokenizer, model, image_processor = load(folder, merged=name == "merged")
        save_checkpoint(model, tokenizer, image_processor, tmp_path / name, layout)
    same_files(tmp_path / "merged", tmp_path / "plain")
    if layout == "llava":
        holds(tmp_path / "merged", model)
    else:
        weights_in(tmp_path / "merged")


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_save_pretrained_writes_what_was_loaded(folder, tmp_path, shard):
    """In one file and in several: transformers keeps weights of one allocation in one file."""
    for name in ("plain", "merged"):
        _, model, _ = load(folder, merged=name == "merged")
        model.save_pretrained(tmp_path / name, max_shard_size=shard)
    holds(tmp_path / "merged", model)
    found, expected = (weights_in(tmp_path / name) for name in ("merged", "plain"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    if shard == "1GB":
        same_files(tmp_path / "merged", tmp_path / "plain")
    else:
        files = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())["weight_map"]
        assert files.keys() == found.keys() and len(set(files.values())) > 2
    again, once = (load(tmp_path / name)[1].state_dict() for name in ("merged", "plain"))
    assert all(torch.equal(again[name], once[name]) for name in once)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lora_checkpoint_is_exported_as_without(lora, tmp_path, layout):
    """As scripts/merge_lora_weights.py does it: adapters are merged while loading, projections after that."""
    adapter, base, _ = lora
    for name in ("plain", "merged"):
        tokenizer, model, image_processor = load(adapter, base, merged=name == "merged")
        save_checkpoint(model, tokenizer, image_processor, tmp_path / name, layout)
    same_files(tmp_path / "merged", tmp_path / "plain")
    weights_in(tmp_path / "merged")


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # of the tower, whose projections have the LLM's names
def test_adapters_are_merged_into_merged_projections(lora, tmp_path):
    """peft adds to a weight where it is, here inside a view; what lies beside it keeps its values."""
    adapter, _, whole = lora
    for name in ("plain", "merged"):
        tokenizer, model, image_processor = load(whole, merged=name == "merged")
        before = {key: value.clone() for key, value in model.state_dict().items()}
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        assert len(changed) == 7 * model.config.num_hidden_layers
        save_checkpoint(model, tokenizer, image_processor, tmp_path / name)
    same_files(tmp_path / "merged", tmp_path / "plain")
    holds(tmp_path / "merged", model)


def test_adapters_of_merged_projections_are_saved_alone(lora, tmp_path):
    """A new adapter on one projection of each group: its file holds no weight of the model."""
    _, _, whole = lora
    settings = LoraConfig(
        r=2, target_modules=r"model\.layers\.\d+\.(self_attn\.k_proj|mlp\.up_proj)", init_lora_weights=False
    )
    for name in ("plain", "merged"):
        tokenizer, model, image_processor = load(whole, merged=name == "merged")
        torch.manual_seed(0)
        adapted = get_peft_model(model, settings)
        adapted.save_pretrained(tmp_path / name)
        save_checkpoint(adapted.merge_and_unload(), tokenizer, image_processor, tmp_path / f"{name}-whole")
    adapters = weights_in(tmp_path / "merged")
    assert len(adapters) == 2 * 2 * model.config.num_hidden_layers
    assert all(math.prod(value.shape) == 2 * max(value.shape) for value in adapters.values())
    expected = weights_in(tmp_path / "plain")
    assert all(torch.equal(value, expected[name]) for name, value in adapters.items())
    same_files(tmp_path / "merged-whole", tmp_path / "plain-whole")

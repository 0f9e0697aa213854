"""Loading: every kind of checkpoint gives the model it was written from, and every broken one gives one clear sentence."""

import json
import shutil
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import make_image
from transformers import BertConfig, BertForMaskedLM

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token
from llava.model import builder
from llava.model.builder import load_pretrained_model

PROMPT = "USER: <image>\nWhat colour is the shape? ASSISTANT:"
KINDS = {
    "1.5": {"kind": "llava"},
    "1.6": {"kind": "llava_next"},
    "1.6-mistral": {"kind": "llava_next", "text": "mistral"},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Name -> (transformers model, folder of its vision tower), built when first asked for."""
    built = {}

    def get(name: str):
        if name not in built:
            reference = tiny.build_reference(**KINDS[name], seed=21)
            built[name] = reference, tiny.save_clip_tower(reference, tmp_path_factory.mktemp("tower"))
        return built[name]

    return get


def load(path, **kwargs):
    return load_pretrained_model(path, device_map="cpu", **kwargs)


def same_answer(loaded, reference, prompt_ids=None):
    """The logits of the loaded model on one image are the reference's, whose pixels and image tokens are ours."""
    tokenizer, model, image_processor, _ = loaded
    image = make_image(103, 97)
    ids = tokenizer_image_token(PROMPT, tokenizer) if prompt_ids is None else prompt_ids
    pixels = process_images([image], image_processor, model.config)
    with torch.no_grad():
        found = model(input_ids=torch.tensor([ids]), images=pixels, image_sizes=[image.size]).logits
        batch = {"pixel_values": pixels}
        if reference.config.model_type == "llava_next":
            batch["image_sizes"] = torch.tensor([[97, 103]])
        count = len(reference.get_image_features(**batch, return_dict=True).pooler_output[0])
        at, image_id = ids.index(IMAGE_TOKEN_INDEX), reference.config.image_token_index
        expanded = torch.tensor([ids[:at] + [image_id] * count + ids[at + 1 :]])
        expected = reference(input_ids=expanded, **batch).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------------------------------ whole checkpoints
@pytest.mark.parametrize("layout", ["current", "published", "runtime"])
@pytest.mark.parametrize("name", KINDS)
def test_llava_hf_layouts(sources, tmp_path, name, layout):
    same_answer(load(tiny.save_llava_hf(sources(name)[0], tmp_path, layout)), sources(name)[0])


@pytest.mark.parametrize("weights", ["safetensors", "sharded_safetensors", "bin", "sharded_bin"])
@pytest.mark.parametrize("name", KINDS)
def test_original_files(sources, tmp_path, name, weights):
    reference, tower = sources(name)
    same_answer(load(tiny.save_original(reference, tmp_path, tower, weights)), reference)


def test_tower_weights_of_the_checkpoint_win(sources, tmp_path):
    """1.6 trained its tower: the named one gives configuration and image processor, not weights."""
    reference, _ = sources("1.6")
    other = tiny.build_reference("llava_next", seed=5)
    tower = tiny.save_clip_tower(other, tmp_path / "tower")
    loaded = load(tiny.save_original(reference, tmp_path / "llava", tower, vision_in_checkpoint=True))
    same_answer(loaded, reference)


@pytest.mark.parametrize("name", ["1.5", "1.6"])
@pytest.mark.parametrize("files", ["bin", "safetensors"])
def test_tower_weights_come_from_the_named_tower_otherwise(sources, tmp_path, name, files):
    reference, _ = sources(name)
    tower = tiny.save_clip_tower(reference, tmp_path / "tower", files)
    loaded = load(tiny.save_original(reference, tmp_path / "llava", tower, vision_in_checkpoint=False))
    same_answer(loaded, reference)


def test_tower_inside_the_checkpoint_folder(sources, tmp_path):
    """A relative mm_vision_tower is looked for beside config.json, whatever the working directory is."""
    reference, tower = sources("1.5")
    tiny.save_original(reference, tmp_path, "tower")
    shutil.copytree(tower, tmp_path / "tower")
    same_answer(load(tmp_path), reference)


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_both_names_of_the_llama_type(sources, tmp_path, model_type):
    reference, tower = sources("1.6")
    same_answer(load(tiny.save_original(reference, tmp_path, tower, model_type=model_type)), reference)


def test_a_bare_sentencepiece_model(sources, tmp_path):
    """tokenizer.model alone, as liuhaotian repositories have it; ids beyond the tiny vocabulary are folded into it."""
    reference, tower = sources("1.5")
    loaded = load(tiny.save_original(reference, tmp_path, tower, tokenizer="sentencepiece"))
    assert not (tmp_path / "tokenizer.json").exists()
    ids = tokenizer_image_token(PROMPT, loaded[0])
    assert len(set(ids)) > 10
    same_answer(loaded, reference, [i if i < 0 else i % tiny.word_ids().image for i in ids])


def test_without_tokenizer_and_image_processor(sources, tmp_path):
    tiny.save_llava_hf(sources("1.6")[0], tmp_path, processor=False)
    tokenizer, model, image_processor, context_len = load(tmp_path)
    assert tokenizer is None and image_processor is None
    assert context_len == 1024
    assert model.generate(torch.tensor([[1, 7, 8]]), do_sample=False, max_new_tokens=3).shape == (1, 3)


@pytest.mark.parametrize("name", KINDS)
def test_saved_by_us_and_loaded_again(sources, tmp_path, name):
    """save_pretrained of the loaded model writes a checkpoint that needs no other folder."""
    reference, tower = sources(name)
    tokenizer, model, image_processor, _ = load(tiny.save_original(reference, tmp_path / "a", tower))
    model.save_pretrained(tmp_path / "b")
    tokenizer.save_pretrained(tmp_path / "b")
    image_processor.save_pretrained(tmp_path / "b")
    same_answer(load(tmp_path / "b"), reference)


# ------------------------------------------------------------------------------------------- on top of a model_base
@pytest.mark.parametrize("name", ["1.5"])
def test_projector_only(sources, tmp_path, name):
    reference, tower = sources(name)
    base = tiny.save_plain_llm(reference, tmp_path / "base")
    projector = tiny.save_projector_only(reference, tmp_path / "projector", tower)
    same_answer(load(projector, model_base=base), reference)


@pytest.mark.parametrize("adapter_file", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("name", KINDS)
def test_lora(sources, tmp_path, name, adapter_file):
    """Adapters merged into the base, projector and newline from non_lora_trainables.bin."""
    reference, tower = sources(name)
    base = tiny.save_plain_llm(reference, tmp_path / "base")
    merged = tiny.save_lora(reference, tmp_path / "lora", tower, adapter_file)
    with_adapter, without = (m.model.language_model.layers[0].self_attn.q_proj.weight for m in (merged, reference))
    assert (with_adapter - without).abs().max() > 0.01
    loaded = load(str(tmp_path / "lora"), model_base=str(base), model_name="llava-tiny-lora")
    assert not any("lora" in key for key in loaded[1].state_dict())
    same_answer(loaded, merged)


def test_lora_over_a_whole_llava(sources, tmp_path):
    """model_base may be a LLaVA itself; the checkpoint's own projector wins over the base's."""
    reference, tower = sources("1.6")
    other = tiny.build_reference("llava_next", seed=77)
    other.model.language_model.load_state_dict(reference.model.language_model.state_dict())
    other.lm_head.load_state_dict(reference.lm_head.state_dict())
    base = tiny.save_original(other, tmp_path / "base", tower, vision_in_checkpoint=False)
    merged = tiny.save_lora(reference, tmp_path / "lora", tower)
    same_answer(load(tmp_path / "lora", model_base=base), merged)


def test_lora_with_words_of_its_own(sources, tmp_path):
    """Training added tokens: embedding and head of the checkpoint are longer than the base's, and complete."""
    reference, tower = sources("1.5")
    ids = tiny.word_ids()
    longer = tiny.build_reference("llava", seed=21, ids=tiny.Ids(image=ids.image, pad=ids.pad, size=ids.size + 3))
    base = tiny.save_plain_llm(reference, tmp_path / "base")
    merged = tiny.save_lora(reference, tmp_path / "lora", tower)
    edit_config(tmp_path / "lora", vocab_size=ids.size + 3)
    trained = torch.load(tmp_path / "lora" / "non_lora_trainables.bin", weights_only=True)
    trained["base_model.model.model.embed_tokens.weight"] = longer.model.language_model.embed_tokens.weight.detach()
    trained["base_model.model.lm_head.weight"] = longer.lm_head.weight.detach()
    torch.save(tiny.contiguous(trained), tmp_path / "lora" / "non_lora_trainables.bin")
    layers = {k: v for k, v in merged.state_dict().items() if "embed_tokens" not in k and "lm_head" not in k}
    longer.load_state_dict(layers, strict=False)
    same_answer(load(tmp_path / "lora", model_base=base), longer)
    del trained["base_model.model.lm_head.weight"]
    torch.save(tiny.contiguous(trained), tmp_path / "lora" / "non_lora_trainables.bin")
    refused(tmp_path / "lora", "missing", "lm_head", model_base=base)


def adapter_folder(reference, tower, folder, change=None, **lora):
    """A LoRA checkpoint made by peft from our own model, `change`d before peft sees it. Returns the base's folder, and the
    model with everything merged."""
    from peft import LoraConfig, get_peft_model

    base = tiny.save_original(reference, folder / "base", tower, vision_in_checkpoint=True)
    model = load(base)[1]
    if change is not None:
        change(model)
    settings = {"r": 2, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | lora
    adapted = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if weight.requires_grad and "lora_" not in name:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    return base, adapted


def save_adapter(adapted, reference, tower, folder, **save):
    adapted.save_pretrained(folder, **save)
    torch.save(
        {f"base_model.model.{k}": v for k, v in tiny.contiguous(tiny.projector_tensors(reference)).items()},
        folder / "non_lora_trainables.bin",
    )
    tiny.write_json(
        folder / "config.json",
        tiny.original_config(reference, tower, "llava_llama", vocab_size=adapted.config.vocab_size),
    )
    return adapted.merge_and_unload()


def grow(model):
    model.resize_token_embeddings(model.config.vocab_size + 3, mean_resizing=False)


@pytest.mark.parametrize(
    "change,lora,save",
    [
        (grow, {}, {"save_embedding_layers": True}),
        (grow, {"modules_to_save": ["embed_tokens", "lm_head"]}, {}),
        (grow, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"save_embedding_layers": True}),
        (grow, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, {"save_embedding_layers": True}),
        (grow, {"trainable_token_indices": [3, 5]}, {"save_embedding_layers": True}),
        (None, {"trainable_token_indices": [3, 5]}, {}),
        (None, {"use_dora": True}, {}),
        (None, {"rank_pattern": {"layers.1.self_attn.q_proj": 4}, "alpha_pattern": {"down_proj": 3}}, {}),
        (None, {"modules_to_save": ["mm_projector"]}, {}),
        (None, {"bias": "all"}, {}),
    ],
)
def test_adapter_files_of_peft(sources, tmp_path, change, lora, save):
    """Embeddings of a grown vocabulary, modules trained as a whole and single tokens lie in the adapter file."""
    reference, tower = sources("1.5")
    base, adapted = adapter_folder(reference, tower, tmp_path, change, **lora)
    merged = save_adapter(adapted, reference, tower, tmp_path / "lora", **save)
    if lora.get("modules_to_save") == ["mm_projector"]:
        torch.save({}, tmp_path / "lora" / "non_lora_trainables.bin")
    loaded = load(tmp_path / "lora", model_base=base)[1]
    assert loaded.config.vocab_size == merged.config.vocab_size
    found, expected = loaded.state_dict(), merged.state_dict()
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("vision_in_base", [True, False])
def test_adapters_inside_the_tower(sources, tmp_path, vision_in_base):
    """LLaVA names them with the level "vision_model", and has some in the tower's last layer, which nobody reads."""
    reference, tower = sources("1.5")
    _, adapted = adapter_folder(
        reference,
        tower,
        tmp_path,
        rank_pattern={"encoder.layers.1.mlp.fc1": 3},
        target_modules=["q_proj", "fc1"],
    )
    merged = save_adapter(adapted, reference, tower, tmp_path / "lora").state_dict()
    base = tiny.save_original(reference, tmp_path / "other", tower, vision_in_checkpoint=vision_in_base)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    ours, level = "vision_tower.vision_tower.", "vision_model."
    theirs = {name.replace(ours, ours + level): value for name, value in load_file(file).items()}
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    settings["rank_pattern"] = {"vision_model.encoder.layers.1.mlp.fc1": 3}
    tiny.write_json(tmp_path / "lora" / "adapter_config.json", settings)
    last = {name.replace("layers.1", "layers.2"): value for name, value in theirs.items() if level in name}
    assert len(last) == 2 * 2 + 2 * 2
    misnamed = {name.replace("q_proj", "query"): value for name, value in theirs.items() if level in name}
    save_file(tiny.contiguous(misnamed), file)
    refused(tmp_path / "lora", "have no place in the model", "query", model_base=base)
    save_file(tiny.contiguous(theirs | last), file)
    found = load(tmp_path / "lora", model_base=base)[1].state_dict()
    plain = load(base)[1].state_dict()
    changed = {name for name in merged if not torch.equal(plain[name], merged[name])}
    assert len(changed) == 2 * 2 + 3 and all("q_proj" in name or "fc1" in name for name in changed)
    for name in merged:
        torch.testing.assert_close(found[name], merged[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("lora", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": ["lm_head"]}])
def test_an_adapter_that_parts_head_and_embeddings(tmp_path, lora):
    """The demo has one tensor for both; what is trained apart stays apart."""
    from peft import LoraConfig, get_peft_model

    base = "playground/llava-shapes-v1.5"
    adapted = get_peft_model(
        load(base)[1], LoraConfig(**({"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False} | lora))
    )
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "modules_to_save" in name:
                weight.add_(0.1 if "lm_head" in name else -0.1)
        expected = (
            adapted(inputs_embeds=torch.ones(1, 2, 128)).logits,
            adapted.get_input_embeddings()(torch.tensor([5])),
        )
    adapted.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "non_lora_trainables.bin")
    shutil.copy(f"{base}/config.json", tmp_path)
    model = load(tmp_path, model_base=base)[1]
    found = model(inputs_embeds=torch.ones(1, 2, 128)).logits, model.get_input_embeddings()(torch.tensor([5]))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert not model.config.tie_word_embeddings


def test_adapters_that_do_not_fit(sources, tmp_path):
    reference, tower = sources("1.5")
    base, adapted = adapter_folder(reference, tower, tmp_path, trainable_token_indices=[3, 5])
    save_adapter(adapted, reference, tower, tmp_path / "lora")
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    for listed in ([3], [3, 5000], [3, "x"], {"other": [3, 5]}, {"embed_tokens": 3}, 7, None):
        tiny.write_json(tmp_path / "lora" / "adapter_config.json", settings | {"trainable_token_indices": listed})
        refused(tmp_path / "lora", "token embeddings", "adapter_config.json", model_base=base)
    tiny.write_json(tmp_path / "lora" / "adapter_config.json", settings)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    whole = load_file(file)
    lacking = next(name for name in whole if "lora_B" in name)
    save_file({name: value for name, value in whole.items() if name != lacking}, file)
    refused(tmp_path / "lora", "missing", "lora_B", model_base=base)
    file.unlink()
    refused(tmp_path / "lora", "no adapter weights", model_base=base)


def test_adapters_of_another_kind(sources, tmp_path):
    """IA3's scales are merged too."""
    from peft import IA3Config, get_peft_model

    reference, tower = sources("1.5")
    base = tiny.save_original(reference, tmp_path / "base", tower, vision_in_checkpoint=True)
    settings = IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    )
    adapted = get_peft_model(load(base)[1], settings)
    expected = save_adapter(adapted, reference, tower, tmp_path / "ia3").state_dict()
    found = load(tmp_path / "ia3", model_base=base)[1].state_dict()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("files", ["safetensors", "sharded_bin"])
@pytest.mark.parametrize("kind", ["llava", "llava-hf"])
def test_names_of_a_wrapped_model(sources, tmp_path, kind, files):
    """DistributedDataParallel's "module." before every name; what is saved again has LLaVA's names."""
    reference, tower = sources("1.6")
    if kind == "llava-hf":
        folder = tiny.save_llava_hf(reference, tmp_path / "a", "published")
    else:
        folder = tiny.save_original(reference, tmp_path / "a", tower, vision_in_checkpoint=True)
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= {f"module.{name}": value for name, value in load_file(file).items()}
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    if files == "safetensors":
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        tiny.save_sharded_bin(tensors, folder)
    loaded = load(folder)
    same_answer(loaded, reference)
    loaded[1].save_pretrained(tmp_path / "b")
    names = load_file(tmp_path / "b" / "model.safetensors").keys()
    assert "model.mm_projector.0.weight" in names and not any("module." in name for name in names)


@pytest.mark.parametrize(
    "before", ["module.", "module.base_model.model.", "base_model.model.module.", "module.model.", ""]
)
def test_names_of_a_wrapped_projector(sources, tmp_path, before):
    reference, tower = sources("1.5")
    base = tiny.save_plain_llm(reference, tmp_path / "base")
    folder = tiny.save_projector_only(reference, tmp_path / "projector", tower)
    saved = torch.load(folder / "mm_projector.bin")
    torch.save({before + name: value for name, value in saved.items()}, folder / "mm_projector.bin")
    same_answer(load(folder, model_base=base), reference)
    tiny.save_lora(reference, tmp_path / "lora", tower)
    extras = tmp_path / "lora" / "non_lora_trainables.bin"
    torch.save({before + name: value for name, value in torch.load(extras).items()}, extras)
    load(tmp_path / "lora", model_base=base)


# --------------------------------------------------------------------------------- where a tower's files are looked for
@pytest.fixture
def no_hub(monkeypatch):
    """No tower is looked up outside the folders of the checkpoint and its model_base."""

    def refuse(name, weights=True):
        raise UserError(f"{name}: looked up")

    monkeypatch.setattr("llava.model.tower_files.checkpoint_folder", refuse)


@pytest.mark.parametrize("name", ["1.5", "1.6"])
@pytest.mark.parametrize(
    "named", ["/gone/clip", r"C:\models\clip", "D:/clip", "openai/clip-vit-large-patch14-336", "clip"]
)
def test_a_checkpoint_that_has_everything_asks_for_no_tower(sources, tmp_path, no_hub, name, named):
    """As training and export write it: tower weights, mm_vision_config and image processor lie in the folder."""
    reference, tower = sources(name)
    vision = reference.config.vision_config.to_dict()
    tiny.save_original(reference, tmp_path, named, vision_in_checkpoint=True, mm_vision_config=vision)
    shutil.copy(tower / "preprocessor_config.json", tmp_path)
    same_answer(load(tmp_path), reference)


@pytest.mark.parametrize("lacking", ["configuration", "weights", "image processor"])
def test_what_is_missing_is_looked_for_in_the_tower(sources, tmp_path, no_hub, lacking):
    reference, tower = sources("1.5")
    has_weights = lacking != "weights"
    vision = {} if lacking == "configuration" else {"mm_vision_config": reference.config.vision_config.to_dict()}
    tiny.save_original(reference, tmp_path, "/gone/clip", vision_in_checkpoint=has_weights, **vision)
    if lacking != "image processor":
        shutil.copy(tower / "preprocessor_config.json", tmp_path)
    refused(tmp_path, tmp_path, f"no {lacking}", "/gone/clip: looked up")
    edit_config(tmp_path, mm_vision_tower="tower")
    shutil.copytree(tower, tmp_path / "tower")
    same_answer(load(tmp_path), reference)


def save_base(reference, tower, folder, kind):
    """A whole LLaVA to train on, whose tower no other folder has."""
    if kind == "llava-hf":
        return tiny.save_llava_hf(reference, folder)
    if kind == "tower in its folder":
        tiny.save_original(reference, folder, "vision_tower", vision_in_checkpoint=False)
        shutil.copytree(tower, folder / "vision_tower")
        return folder
    vision = reference.config.vision_config.to_dict()
    tiny.save_original(reference, folder, None, vision_in_checkpoint=True, mm_vision_config=vision)
    edit_config(folder, mm_vision_tower=None)
    shutil.copy(tower / "preprocessor_config.json", folder)
    return folder


@pytest.mark.parametrize("named", ["vision_tower", "/gone/clip", None])
@pytest.mark.parametrize("base", ["tower in its folder", "exported", "llava-hf"])
@pytest.mark.parametrize("kind", ["lora", "projector"])
def test_the_tower_of_a_model_base(sources, tmp_path, no_hub, kind, base, named):
    """Configuration, weights and image processor of the tower come from the LLaVA that was trained on."""
    reference, tower = sources("1.5")
    folder = save_base(reference, tower, tmp_path / "base", base)
    if kind == "lora":
        expected = tiny.save_lora(reference, tmp_path / "trained", named or "")
    else:
        expected = reference
        tiny.save_projector_only(reference, tmp_path / "trained", named or "")
    if named is None:
        edit_config(tmp_path / "trained", mm_vision_tower=None)
    ids = None
    if base == "llava-hf":  # its tokenizer has words of its own for <image>
        ids = tokenizer_image_token(PROMPT, load(folder)[0])
    same_answer(load(tmp_path / "trained", model_base=folder), expected, ids)


@pytest.mark.parametrize("demo", ["llava-shapes-v1.5", "llava-shapes-v1.6"])
def test_what_is_trained_on_the_demo_loads_and_exports(tmp_path, demo):
    """The demo's tower lies in its own folder, and its head shares the tensor of its embeddings."""
    from peft import LoraConfig, get_peft_model

    from llava.model.export import load_and_save

    base = f"playground/{demo}"
    tokenizer, model, image_processor, _ = load(base)
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora")
    state = {name: value for name, value in adapted.state_dict().items() if "mm_projector" in name}
    torch.save(state, tmp_path / "lora" / "non_lora_trainables.bin")
    settings = json.loads((Path(base) / "config.json").read_text())
    tiny.write_json(tmp_path / "lora" / "config.json", settings)
    merged = adapted.merge_and_unload()
    assert not torch.equal(merged.model.layers[0].self_attn.q_proj.weight, before)
    image = make_image(103, 97)
    pixels = process_images([image], image_processor, merged.config)
    ids = tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt")[None]

    def logits(model):
        with torch.no_grad():
            return model(input_ids=ids, images=pixels, image_sizes=[image.size]).logits

    loaded = load(tmp_path / "lora", model_base=base)
    assert loaded[2] is not None
    torch.testing.assert_close(logits(loaded[1]), logits(merged), atol=1e-4, rtol=0)
    for layout in ("llava", "llava-hf"):
        load_and_save(str(tmp_path / "lora"), base, tmp_path / layout, layout, "float32")
        whole = logits(load(tmp_path / layout)[1])[..., : merged.config.vocab_size]
        torch.testing.assert_close(whole, logits(merged), atol=1e-4, rtol=0)


# --------------------------------------------------------------------------------------------------------- settings
@pytest.mark.parametrize("name", ["1.5", "1.6"])
def test_loading_alarms_nobody(sources, tmp_path, capfd, caplog, recwarn, name):
    """What transformers did not find at first and we loaded afterwards is no warning, nor are stale buffers."""
    reference, tower = sources(name)
    folder = tiny.save_original(reference, tmp_path / "llava", tower, "sharded_bin")
    tiny.save_lora(reference, tmp_path / "lora", tower)
    base = tiny.save_plain_llm(reference, tmp_path / "base")
    capfd.readouterr(), caplog.clear(), recwarn.clear()
    load(folder)
    load(tmp_path / "lora", model_base=base)
    assert "".join(capfd.readouterr()) == "" and caplog.text == ""
    assert [str(w.message) for w in recwarn] == []


def test_safetensors_come_first(sources, tmp_path):
    """Where a folder has both, the pickle is not even opened."""
    reference, tower = sources("1.5")
    folder = tiny.save_original(reference, tmp_path, tower, "safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    same_answer(load(folder), reference)


def test_newline_token_that_the_settings_do_not_use(sources, tmp_path):
    """Turning unpadding off in config.json leaves `image_newline` in the files; that is no error."""
    reference, tower = sources("1.6")
    folder = tiny.save_original(reference, tmp_path, tower, mm_patch_merge_type="spatial")
    tokenizer, model, image_processor, _ = load(folder)
    pixels = process_images([make_image(110, 70)], image_processor, model.config)
    prepared = model.prepare(tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt"), pixels, [(110, 70)])
    assert prepared.image_spans[0][0][1] == 16 + 64


def test_dtype(sources, tmp_path):
    reference, tower = sources("1.5")
    folder = tiny.save_original(reference, tmp_path, tower, torch_dtype="float16")
    for asked, given in (("auto", torch.float32), ("bfloat16", torch.bfloat16), (torch.float16, torch.float16)):
        model = load(folder, torch_dtype=asked)[1]
        assert {p.dtype for p in model.parameters()} == {given}, asked
    for asked in ("float99", "int8"):
        with pytest.raises(UserError, match=f'"{asked}".*float32'):
            load(folder, torch_dtype=asked)


def test_half_precision_files_are_float32_on_the_cpu(sources, tmp_path):
    """What is published is float16; "auto" computes in float32, with the stored values."""
    reference, tower = sources("1.5")
    folder = tiny.save_original(reference, tmp_path, tower, torch_dtype="float16")
    tensors = {name: value.half() for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder)[1]
    assert model.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, reference.lm_head.weight.half().float())


def test_generation_config_of_old_checkpoints(sources, tmp_path):
    """generation_config.json has temperature and top_p without do_sample and max_length 4096; greedy stays greedy."""
    reference, tower = sources("1.5")
    tokenizer, model, image_processor, _ = load(tiny.save_original(reference, tmp_path, tower))
    ids = tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt")
    pixels = process_images([make_image(60, 40)], image_processor, model.config)
    torch.manual_seed(0)
    first = model.generate(ids, images=pixels, max_new_tokens=12)
    torch.manual_seed(1)
    assert first.tolist() == model.generate(ids, images=pixels, do_sample=False, max_new_tokens=12).tolist()


def test_arguments_in_llavas_order(sources, tmp_path, monkeypatch):
    folder = str(tiny.save_llava_hf(sources("1.5")[0], tmp_path))
    name = get_model_name_from_path(folder)
    same_answer(load_pretrained_model(folder, None, name, False, False, "auto", "cpu"), sources("1.5")[0])
    model = load_pretrained_model(
        folder, None, name, load_8bit=False, load_4bit=False, device_map="auto", device="cpu"
    )[1]
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    with pytest.raises(UserError, match="load_8bit and load_4bit are both true"):
        load_pretrained_model(folder, None, name, True, True)
    with monkeypatch.context() as patch:
        patch.setattr(builder, "is_bitsandbytes_available", lambda: False)
        with pytest.raises(UserError, match="load_4bit is true, but bitsandbytes is not installed"):
            load_pretrained_model(folder, None, name, load_4bit=True)
    with pytest.raises(UserError, match='device is "gpu", allowed are cpu, cuda'):
        load_pretrained_model(folder, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="sees no GPU"):
            load_pretrained_model(folder, device="cuda")
    with pytest.raises(TypeError):  # LLaVA's fourth argument is load_8bit
        load_pretrained_model(folder, None, name, False, False, "auto", "cpu", AdaVConfig(method="none"))


def test_configuration_arrives(sources, tmp_path):
    folder = tiny.save_llava_hf(sources("1.5")[0], tmp_path)
    config = AdaVConfig(method="random", overall_tokens=5)
    tokenizer, model, image_processor, _ = load(folder, config=config)
    ids = tokenizer_image_token(PROMPT, tokenizer, return_tensors="pt")
    pixels = process_images([make_image(60, 40)], image_processor, model.config)
    model.generate(ids, images=pixels, max_new_tokens=1)
    assert [len(s.indices) for s in model.last_selection] == [5]
    # The default is the plain model.
    plain = load(folder)[1]
    plain.generate(ids, images=pixels, max_new_tokens=1)
    assert [len(s.indices) for s in plain.last_selection] == [16]


def test_device_map_auto(sources, tmp_path):
    folder = tiny.save_llava_hf(sources("1.5")[0], tmp_path)
    model = load_pretrained_model(folder)[1]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert {p.device.type for p in model.parameters()} == {device}


# ------------------------------------------------------------------------------------------------------- bad input
def refused(path, *words, **kwargs):
    """load() must raise a UserError of one sentence (one line, not too long, no advice of a library) with `words`."""
    with pytest.raises(UserError) as caught:
        load(path, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and 20 < len(message) < 500, message
    for word in words:
        assert str(word) in message, message
    return message


@pytest.fixture
def llava(sources, tmp_path):
    """A good checkpoint in the original format, to be broken."""
    reference, tower = sources("1.6")
    return tiny.save_original(reference, tmp_path / "llava", tower, "sharded_safetensors")


@pytest.fixture
def llava_hf(sources, tmp_path):
    return tiny.save_llava_hf(sources("1.6")[0], tmp_path / "llava-hf", "current")


def edit_config(folder, **changes):
    settings = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        if value is None:
            settings.pop(key)
        else:
            settings[key] = value
    tiny.write_json(folder / "config.json", settings)


def test_missing_folder(tmp_path):
    refused(tmp_path / "nowhere", tmp_path / "nowhere", "no such")
    refused("./nowhere", "nowhere", "no such")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    refused(tmp_path / "weights.bin", "weights.bin")


def test_empty_folder(tmp_path):
    refused(tmp_path, tmp_path, "config.json")


def test_configuration_that_is_no_json(llava):
    (llava / "config.json").write_text('{"model_type": "llava", ')
    refused(llava, "config.json", "JSON")
    (llava / "config.json").write_text("[1, 2]")
    refused(llava, "config.json")


def test_bert(tmp_path):
    config = BertConfig(vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    BertForMaskedLM(config).save_pretrained(tmp_path)
    refused(tmp_path, "BertForMaskedLM", "bert", "LLaVA")


def test_plain_llama(sources, tmp_path):
    refused(tiny.save_plain_llm(sources("1.5")[0], tmp_path), "LlamaForCausalLM", "LLaVA")


def test_a_vision_tower_is_no_llava(sources):
    refused(sources("1.5")[1], "CLIPModel", "LLaVA")


def test_llava_hf_around_another_language_model(llava_hf):
    settings = json.loads((llava_hf / "config.json").read_text())
    settings["text_config"]["model_type"] = "qwen2"
    tiny.write_json(llava_hf / "config.json", settings)
    refused(llava_hf, "qwen2", "llama")


def test_llava_hf_around_another_tower(llava_hf):
    settings = json.loads((llava_hf / "config.json").read_text())
    settings["vision_config"]["model_type"] = "siglip_vision_model"
    tiny.write_json(llava_hf / "config.json", settings)
    refused(llava_hf, "siglip_vision_model", "clip_vision_model")


def test_no_weights(llava):
    for file in llava.glob("*.safetensors*"):
        file.unlink()
    refused(llava, llava, "weights")


def test_missing_shard(llava):
    (llava / "model-00002-of-00002.safetensors").unlink()
    refused(llava, "model-00002-of-00002.safetensors", "missing")


def test_missing_bin_shard(sources, tmp_path):
    reference, tower = sources("1.5")
    folder = tiny.save_original(reference, tmp_path, tower, "sharded_bin")
    (folder / "pytorch_model-00001-of-00002.bin").unlink()
    refused(folder, "pytorch_model-00001-of-00002.bin", "missing")


@pytest.mark.parametrize("kept", [0, 5, 0.3, 0.999])
def test_truncated_safetensors(llava, kept):
    """A download that broke off: nothing, half a header, half the tensors, the last bytes missing."""
    file = llava / "model-00001-of-00002.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refused(llava, "model-00001-of-00002.safetensors")


def test_corrupt_safetensors(llava):
    file = llava / "model-00001-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[8:200] = bytes(192)
    file.write_bytes(content)
    refused(llava, "model-00001-of-00002.safetensors")


def test_an_html_page_instead_of_weights(llava_hf):
    (llava_hf / "model.safetensors").write_text("<!DOCTYPE html><html><body>Not found</body></html>")
    refused(llava_hf, "model.safetensors")


@pytest.mark.parametrize("kept", [0, 0.5, 0.999])
def test_truncated_bin(sources, tmp_path, kept):
    reference, tower = sources("1.5")
    folder = tiny.save_original(reference, tmp_path, tower, "sharded_bin")
    file = folder / "pytorch_model-00002-of-00002.bin"
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content))])
    refused(folder, folder)


def test_a_pickle_that_runs_code_is_not_run(sources, tmp_path):
    reference, tower = sources("1.5")
    folder = tiny.save_original(reference, tmp_path / "llava", tower, "bin")
    mark = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (open, (str(mark), "w"))

    torch.save({"model.embed_tokens.weight": Bomb()}, folder / "pytorch_model.bin")
    refused(folder, folder)
    assert not mark.exists()


def test_index_that_is_no_json(llava):
    (llava / "model.safetensors.index.json").write_text("{")
    refused(llava, "model.safetensors.index.json")


@pytest.mark.parametrize(
    "changes",
    [{"vocab_size": 60}, {"hidden_size": 64}, {"intermediate_size": 96}, {"num_key_value_heads": 2}],
    ids=lambda c: next(iter(c)),
)
def test_weights_of_other_shapes(llava, changes):
    edit_config(llava, **changes)
    refused(llava, llava)


def test_weights_of_other_shapes_hf(llava_hf):
    settings = json.loads((llava_hf / "config.json").read_text())
    settings["text_config"]["intermediate_size"] = 96
    tiny.write_json(llava_hf / "config.json", settings)
    refused(llava_hf, llava_hf)


def test_more_layers_than_weights(llava):
    edit_config(llava, num_hidden_layers=4)
    refused(llava, llava, "missing", "layers.3")


def test_fewer_layers_than_weights(llava, llava_hf):
    """Weights that nobody asked for: silently running half of an LLM would be worse than stopping."""
    edit_config(llava, num_hidden_layers=2)
    refused(llava, llava, "layers.2")
    settings = json.loads((llava_hf / "config.json").read_text())
    settings["text_config"]["num_hidden_layers"] = 2
    tiny.write_json(llava_hf / "config.json", settings)
    refused(llava_hf, llava_hf, "layers.2")


def test_projector_weights_missing(sources, tmp_path):
    reference, tower = sources("1.5")
    folder = tiny.save_original(reference, tmp_path, tower, "safetensors")
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if "mm_projector" not in k}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, folder, "missing", "mm_projector")


def test_newline_token_missing(sources, tmp_path):
    reference, tower = sources("1.6")
    folder = tiny.save_original(reference, tmp_path, tower, "safetensors")
    tensors = {k: v for k, v in load_file(folder / "model.safetensors").items() if "image_newline" not in k}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, "image_newline")


def test_tower_folder_missing(sources, tmp_path):
    refused(tiny.save_original(sources("1.5")[0], tmp_path, tmp_path / "no-tower"), tmp_path / "no-tower")


def test_tower_of_another_width(sources, tmp_path):
    other = tiny.build_reference("llava", vision={"hidden_size": 48})
    tower = tiny.save_clip_tower(other, tmp_path / "tower")
    refused(tiny.save_original(sources("1.5")[0], tmp_path / "llava", tower, mm_hidden_size=32))


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"mm_projector_type": "qformer"}, ["qformer", "mlp"]),
        ({"image_aspect_ratio": "anyres_max_9"}, ["anyres_max_9", "anyres"]),
        ({"mm_patch_merge_type": "spatial_unpad_max"}, ["spatial_unpad_max", "spatial_unpad"]),
        ({"mm_vision_select_feature": "cls_patch"}, ["cls_patch", "patch"]),
        ({"mm_vision_select_layer": -9}, ["-9"]),
        ({"mm_vision_tower": None}, ["vision tower"]),
        ({"image_grid_pinpoints": None}, ["image_grid_pinpoints"]),
        ({"hidden_size": "wide"}, ["config.json"]),
        ({"mm_use_im_start_end": True}, ["mm_use_im_start_end"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_we_do_not_run(llava, changes, words):
    edit_config(llava, **changes)
    refused(llava, llava, *words)


@pytest.mark.parametrize(
    "value",
    [
        "[[56, 112], [112",
        "mobile",
        "(axb)",
        "(1x2),(0x1)",
        "(1x1),...,(9999999x9999999)",
        "__import__('os')",
        7,
        [56, 112],
        [[56]],
        [["wide", 56]],
        [[56, 28]],
        [[56, 112], [60, 112]],
        [[56, 112.5]],
        [[0, 56]],
        [[-56, 56]],
    ],
    ids=str,
)
def test_grids_that_cannot_be_read(llava, value):
    edit_config(llava, image_grid_pinpoints=value)
    refused(llava, llava, "image_grid_pinpoints")


@pytest.mark.parametrize(
    "value, sizes",
    [
        ("[[56, 112], [112, 56]]", [[56, 112], [112, 56]]),
        ("((56, 112),)", [[56, 112]]),
        ([[56.0, 112]], [[56, 112]]),
        ("(1x1),...,(2x3)", [[56, 56], [56, 112], [56, 168], [112, 56], [112, 112], [112, 168]]),
    ],
)
def test_grids_as_llava_writes_them(llava, value, sizes):
    """A list, its text, or LLaVA-NeXT's range of grids, whose order is that of LLaVA-NeXT."""
    edit_config(llava, image_grid_pinpoints=value)
    assert load(llava)[1].config.image_grid_pinpoints == sizes


def test_json_with_a_byte_order_mark(sources, tmp_path):
    """As Windows' editors save it."""
    reference, tower = sources("1.5")
    base = tiny.save_original(reference, tmp_path / "base", "tower", vision_in_checkpoint=False)
    shutil.copytree(tower, base / "tower")
    merged = tiny.save_lora(reference, tmp_path / "lora", "tower")
    files = [base / "config.json", *(base / "tower").glob("*.json"), *(tmp_path / "lora").glob("*config.json")]
    assert len(files) == 5
    for file in files:
        file.write_text(file.read_text(), encoding="utf-8-sig")
    same_answer(load(base), reference)
    same_answer(load(tmp_path / "lora", model_base=base), merged)


def test_lora_without_model_base(sources, tmp_path):
    reference, tower = sources("1.5")
    tiny.save_lora(reference, tmp_path / "lora", tower)
    refused(tmp_path / "lora", "LoRA", "model_base")


def test_projector_without_model_base(sources, tmp_path):
    reference, tower = sources("1.5")
    refused(tiny.save_projector_only(reference, tmp_path, tower), "projector", "model_base")


def test_model_base_missing(sources, tmp_path):
    reference, tower = sources("1.5")
    folder = tiny.save_projector_only(reference, tmp_path / "projector", tower)
    refused(folder, tmp_path / "nowhere", "no such", model_base=tmp_path / "nowhere")


def test_model_base_that_nobody_needs(llava, sources, tmp_path):
    base = tiny.save_plain_llm(sources("1.6")[0], tmp_path / "base")
    refused(llava, "model_base", model_base=base)


def test_lora_without_its_other_weights(sources, tmp_path):
    reference, tower = sources("1.5")
    base = tiny.save_plain_llm(reference, tmp_path / "base")
    tiny.save_lora(reference, tmp_path / "lora", tower)
    (tmp_path / "lora" / "non_lora_trainables.bin").unlink()
    refused(tmp_path / "lora", "non_lora_trainables.bin", "missing", model_base=base)


def test_lora_weights_cut_short(sources, tmp_path):
    reference, tower = sources("1.5")
    base = tiny.save_plain_llm(reference, tmp_path / "base")
    tiny.save_lora(reference, tmp_path / "lora", tower)
    for name in ("adapter_model.safetensors", "non_lora_trainables.bin"):
        content = (tmp_path / "lora" / name).read_bytes()
        (tmp_path / "lora" / name).write_bytes(content[: len(content) // 2])
        refused(tmp_path / "lora", tmp_path / "lora", model_base=base)
        (tmp_path / "lora" / name).write_bytes(content)


def test_lora_over_another_base(sources, tmp_path):
    reference, tower = sources("1.5")
    wide = tiny.build_reference("llava", hidden_size=64)
    base = tiny.save_plain_llm(wide, tmp_path / "base")
    tiny.save_lora(reference, tmp_path / "lora", tower)
    refused(tmp_path / "lora", "base", model_base=base)


def test_lora_whose_adapters_are_not_there(sources, tmp_path):
    """An adapter of other modules would change nothing, and nobody would see it."""
    reference, tower = sources("1.5")
    base = tiny.save_plain_llm(reference, tmp_path / "base")
    tiny.save_lora(reference, tmp_path / "lora", tower)
    adapters = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    renamed = {key.replace("self_attn", "attention"): value for key, value in adapters.items()}
    save_file(renamed, tmp_path / "lora" / "adapter_model.safetensors")
    refused(tmp_path / "lora", tmp_path / "lora", model_base=base)


def test_broken_tokenizer_and_image_processor(llava_hf):
    good = (llava_hf / "preprocessor_config.json").read_text()
    (llava_hf / "preprocessor_config.json").write_text("{")
    refused(llava_hf, "preprocessor_config.json")
    (llava_hf / "preprocessor_config.json").write_text(good.replace("LlavaNextImageProcessor", "SiglipImageProcessor"))
    refused(llava_hf, "SiglipImageProcessor", "LlavaNextImageProcessor")
    (llava_hf / "preprocessor_config.json").write_text(good)
    (llava_hf / "tokenizer.json").write_text("{}")
    refused(llava_hf, "tokenizer")

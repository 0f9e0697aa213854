"""8- and 4-bit weights of bitsandbytes on a CPU: under compress(), and in load_pretrained_model()."""

import logging

import pytest
import tiny_checkpoints as tiny
import torch
from family_cases import CASES, IMAGE
from tiny_checkpoints import QUESTIONS, make_image
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.integrations.transformers import compress
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra `quantised` is not installed")
BITS = {
    "4": {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32},
    "8": {"load_in_8bit": True},
}
NAMES = ("qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision")


@pytest.fixture(autouse=True)
def quiet():
    """bitsandbytes warns of float32 inputs at every 8-bit product."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family -> folder with its tiny model."""
    found = {}
    for name in NAMES:
        found[name] = tmp_path_factory.mktemp(name)
        CASES[name].model().save_pretrained(found[name])
    return found


def quantised(name, folder, bits):
    model = CASES[name].model_class.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**BITS[bits]), device_map="cpu"
    )
    model.generation_config = CASES[name].model().generation_config
    return model.eval()


@torch.no_grad()
def choice_and_answer_by_masking(model, inputs, kept, steps):
    """Greedy tokens of the whole prompt in which all vision tokens but `kept` are hidden by a mask."""
    sequence, ids = inputs["input_ids"], inputs["input_ids"]
    positions = model._prepare_position_ids_for_generation(ids, dict(inputs))
    place = torch.nonzero(ids[0] == IMAGE).flatten()
    gone = sorted(set(range(len(place))) - set(kept))
    given = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
    for _ in range(steps):
        size = sequence.shape[1]
        allowed = torch.ones(size, size, dtype=torch.bool).tril()
        allowed[:, place[gone]] = False
        allowed.fill_diagonal_(True)
        mask = torch.zeros(size, size).masked_fill(~allowed, float("-inf"))[None, None]
        logits = model(**given | {"input_ids": sequence, "attention_mask": mask, "position_ids": positions}).logits
        logits[..., IMAGE] = float("-inf")
        sequence = torch.cat([sequence, logits[:, -1:].argmax(-1)], dim=1)
        positions = torch.cat([positions, positions[..., -1:] + 1], dim=-1)
    return sequence


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", NAMES)
def test_dropping_is_hiding(folders, name, bits):
    """The quantised model keeps its own choice, and answers as it does itself with the other tokens hidden."""
    model, inputs = quantised(name, folders[name], bits), CASES[name].prompt([4, "large", 5])
    kinds = {type(module) for module in model.modules() if "Linear" in type(module).__name__}
    assert any("bit" in kind.__name__ for kind in kinds), "weights are quantised"
    generation = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE]}
    stock = model.generate(**inputs, **generation)
    with compress(model, AdaVConfig(method="none")) as compression:
        assert torch.equal(model.generate(**inputs, **generation), stock)
        (whole,) = compression.last_selection
    with compress(model, AdaVConfig(method="cls", overall_tokens=3)) as compression:
        found = model.generate(**inputs, **generation)
        (selection,) = compression.last_selection
    order = whole.saliency.nan_to_num(-1).argsort(descending=True)[:3]
    assert selection.indices.tolist() == sorted(order.tolist())
    assert torch.equal(found, choice_and_answer_by_masking(model, inputs, selection.indices.tolist(), steps=4))


# --- LLaVA -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return tiny.save_llava_hf(tiny.build_reference("llava", "llama", seed=4), tmp_path_factory.mktemp("llava"))


@pytest.mark.parametrize("bits", BITS)
def test_load_pretrained_model(llava, bits):
    """The LLM is quantised, tower, projector and head are not; every kind of method answers as under compress()."""
    arguments = {"device_map": "cpu", "torch_dtype": "float32", f"load_{bits}bit": True}
    tokenizer, model, image_processor, _ = load_pretrained_model(llava, **arguments)
    layers = {name for name, module in model.named_modules() if "bit" in type(module).__name__}
    assert {name.split(".")[1] for name in layers} == {"layers"} and len(layers) % 7 == 0
    skip = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    stock = LlavaForConditionalGeneration.from_pretrained(
        llava,
        quantization_config=BitsAndBytesConfig(
            **BITS[bits] | {"bnb_4bit_quant_type": "nf4"}, llm_int8_skip_modules=skip
        ),
        device_map="cpu",
    ).eval()
    ids = tokenizer_image_token(f"USER: <image>\n{QUESTIONS[0]} ASSISTANT:", tokenizer, return_tensors="pt")[None]
    images = process_images([make_image(97, 61)], image_processor, model.config)
    placeholders = torch.cat(
        [one.new_full((16,), stock.config.image_token_id) if one == -200 else one[None] for one in ids[0]]
    )[None]
    for method in ("none", "adav", "fastv"):
        settings = AdaVConfig(method=method, overall_tokens=5)
        found = model.generate(ids, images=images, config=settings, max_new_tokens=5, do_sample=False)
        with compress(stock, settings) as compression:
            expected = stock.generate(
                input_ids=placeholders,
                attention_mask=torch.ones_like(placeholders),
                pixel_values=images,
                max_new_tokens=5,
                do_sample=False,
            )
        assert found[0].tolist() == expected[0, placeholders.shape[1] :].tolist()
        assert torch.equal(model.last_selection[0].indices, compression.last_selection[0].indices)


def test_a_checkpoint_beside_its_base(tmp_path):
    """Weights in few bits cannot take an adapter or the rows of a grown vocabulary."""
    reference = tiny.build_reference("llava", "llama")
    base = tiny.save_plain_llm(reference, tmp_path / "base")
    folder = tiny.save_projector_only(reference, tmp_path / "projector", tower=tmp_path / "tower")
    with pytest.raises(UserError, match="load_8bit is true, but .* needs a model_base: merge both first"):
        load_pretrained_model(folder, base, load_8bit=True)

"""How often a request waits for the device before the LLM, counted on a CPU.

Tensors are told apart by where they would be on a GPU: weights, and all that is computed from them or sent there, are the
device's. What reads such a tensor on the host is a wait.
"""

import sys
from contextlib import contextmanager

import pytest
import torch
from shapes import PRESETS, Prompts, random_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llava.common import transfer
from llava.config import AdaVConfig
from llava.methods.before_llm import SELECTORS
from llava.methods.before_llm.coverage import Coverage
from llava.model import image_tokens
from llava.model.image_tokens import sample_key

aten = torch.ops.aten
# What gives the host a number, or a tensor whose size depends on numbers.
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
    aten.equal.default,
}
SHARES = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class Waits(TorchDispatchMode):
    """Counts what waits for the device. device: tensors that are there from the beginning.

    A tensor is the device's, the host's, or neither: where a factory (torch.zeros) puts its result nobody can tell on a CPU.
    """

    def __init__(self, device):
        super().__init__()
        self._of = {_storage(tensor): "device" for tensor in device}
        self._kept = []  # while they live, no other tensor gets their addresses
        self.found = []

    def mark(self, tensor, side):
        if tensor.numel():  # all empty tensors have one address
            self._of.pop(_storage(tensor), None)
            if side is not None:
                self._of[_storage(tensor)] = side
                self._kept.append(tensor)
        return tensor

    def on(self, side, tensor):
        return tensor.numel() > 0 and self._of.get(_storage(tensor)) == side

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        device, host = ([tensor for tensor in given if self.on(side, tensor)] for side in ("device", "host"))
        if device and func in READS:
            self.found.append(str(func))
        if func in SHARES:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype == torch.bool and self.on("device", index) for index in indices):
                self.found.append(f"{func} by a mask")
            if device and any(self.on("host", index) for index in indices):
                self.found.append(f"{func} by an index of the host")
        elif device:
            assert not any(tensor.dim() for tensor in host), f"{func} mixes tensors of host and device"
        result = func(*args, **(kwargs or {}))
        side = "device" if device else "host" if host or func == aten.lift_fresh.default else None
        for out in tree_leaves(result):
            if isinstance(out, torch.Tensor):
                self.mark(out, side)
        return result


def _storage(tensor):
    return tensor.untyped_storage().data_ptr()


@contextmanager
def counted(model, monkeypatch):
    """A Waits for what happens within, in which transfers go where they say."""
    waits = Waits([*model.parameters(), *model.buffers()])

    def to_device(tensor, device):
        return tensor if waits.on("device", tensor) else waits.mark(tensor.clone(), "device")

    def to_host(tensor):
        if not waits.on("device", tensor):
            return tensor
        waits.found.append("to_host")
        return waits.mark(tensor.clone(), "host")

    def read(name, method):
        def reading(tensor, *args, **kwargs):
            if waits.on("device", tensor):
                waits.found.append(name)
            return method(tensor, *args, **kwargs)

        return reading

    with monkeypatch.context() as patch:
        for module in [module for name, module in sys.modules.items() if name.startswith("llava.")]:
            for name, function in (("to_device", to_device), ("to_host", to_host)):
                # vars, not hasattr: the packages of methods import what they are asked for.
                if name in vars(module):
                    patch.setattr(module, name, function)
        for name in ("tolist", "numpy", "cpu"):
            patch.setattr(torch.Tensor, name, read(name, getattr(torch.Tensor, name)))
        with waits:
            yield waits


@pytest.fixture(scope="module")
def model():
    # Newline tokens and five tiles of 16 patches.
    return random_model(PRESETS["tiny"].model_config(newline=True), "cpu", torch.float32, seed=0)


def waits_of(model, monkeypatch, method, batch, tokens=12, **options):
    prompts = Prompts.random(PRESETS["tiny"], model.config, model.lm_head.weight, batch, seed=batch)
    config = AdaVConfig(method=method, overall_tokens=tokens, options=options)
    image_tokens.layout_of.cache_clear()
    image_tokens.part_layout_of.cache_clear()
    monkeypatch.setattr(Coverage, "all_rows", True)  # as on a GPU
    with torch.inference_mode(), counted(model, monkeypatch) as waits:
        waits.mark(prompts.ids, "host")
        model.prepare(prompts.ids, prompts.pixels, prompts.sizes, config=config)
    return waits.found


# PruneSID also waits inside torch.linalg.eigh, once per image on a GPU, which a CPU does not show.
# One wait for what both lists hold, or for what VisionZip and ApET merged; two for the fill and the report of adav_cover,
# and two of adav_zoom: the importance of all crops, and AdaV's one.
ALLOWED = dict.fromkeys(SELECTORS, 0)
ALLOWED |= {"adav": 1, "mix": 1, "visionzip": 1, "apet": 1, "adav_cover": 2, "adav_zoom": 2}


@pytest.mark.parametrize("batch", [1, 4, 8])
@pytest.mark.parametrize("method", ALLOWED)
def test_waits_before_the_llm(model, monkeypatch, method, batch):
    """However large the batch is. AdaV's may be three at most. 40 tokens: VisionZip merges some."""
    assert len(waits_of(model, monkeypatch, method, batch, tokens=40)) == ALLOWED[method]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("method", ["fastervlm", "divprune", "visionzip", "adav"])
def test_one_more_wait_for_patches_with_detail(model, monkeypatch, method, batch):
    # 60 tokens: VisionZip still merges some with what is left of them.
    waits = waits_of(model, monkeypatch, method, batch, tokens=60, detail_share=0.3)
    assert waits == ["to_host"] * (ALLOWED[method] + 1)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("method, waits", [("fastervlm", 1), ("visionzip", 2)])
def test_crops_are_ranked_in_one_wait(model, monkeypatch, method, waits, batch):
    found = waits_of(model, monkeypatch, method, batch, tokens=40, crops=2)
    assert found == ["to_host"] * waits


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("method, options", [("adav", {"anyres": "fastervlm"}), ("holov", {})])
def test_waits_of_the_public_code(model, monkeypatch, method, options, batch):
    waits = waits_of(model, monkeypatch, method, batch, compat="public", **options)
    assert waits == ["to_host"]


def test_a_key_of_ids_on_the_device(model, monkeypatch):
    """As Qwen's prompts ask for one."""
    ids = torch.arange(5)
    with counted(model, monkeypatch) as waits:
        assert sample_key(waits.mark(ids.clone(), "device"), (3, 4), 0) == sample_key(ids, (3, 4), 0)
    assert waits.found == ["to_host"]


@pytest.mark.parametrize("share", [0, 0.5])
@pytest.mark.parametrize("method", ["none", "adav", "cdpruner", "visionzip", "apet"])
def test_training_after_inference(model, method, share):
    """What a layout keeps for the next request of its tile plan serves autograd, too."""
    prompts = Prompts.random(PRESETS["tiny"], model.config, model.lm_head.weight, 1, seed=0)
    config = AdaVConfig(method=method, overall_tokens=12, options={"detail_share": share})
    image_tokens.layout_of.cache_clear()
    with torch.inference_mode():
        expected = model.prepare(prompts.ids, prompts.pixels, prompts.sizes, config=config).inputs_embeds
    found = model.prepare(prompts.ids, prompts.pixels, prompts.sizes, config=config).inputs_embeds
    weight = next(model.model.mm_projector.parameters())
    (gradient,) = torch.autograd.grad(found.square().sum(), weight)
    assert torch.equal(found, expected) and gradient.any()


@pytest.mark.parametrize("positions", ["reindexed", "original"])
@pytest.mark.parametrize("scope", ["after", "turn"])
def test_waits_of_adav_under_its_options(model, monkeypatch, positions, scope):
    assert len(waits_of(model, monkeypatch, "adav", 4, positions=positions, text_scope=scope)) <= 1


def test_ids_that_are_on_the_device_come_over_once(model, monkeypatch):
    prompts = Prompts.random(PRESETS["tiny"], model.config, model.lm_head.weight, 4, seed=1)
    config = AdaVConfig(method="adav", overall_tokens=12)
    with torch.inference_mode(), counted(model, monkeypatch) as waits:
        ids = waits.mark(prompts.ids.clone(), "device")
        mask = waits.mark(torch.ones_like(prompts.ids), "device")
        model.prepare(ids, prompts.pixels, prompts.sizes, mask, config=config)
    assert waits.found == ["to_host"] * 2, "ids and mask together; and AdaV's two lists"


def test_the_counter_counts(model, monkeypatch):
    weight = model.lm_head.weight.detach()
    with counted(model, monkeypatch) as waits:
        weight.sum().item()
        weight[weight > 0]
        weight[torch.tensor([0, 1])]
        weight.tolist()
        torch.ones(3).tolist()
        transfer.to_host(weight)
    assert [name.split(".")[0] for name in waits.found[:1]] == ["aten"] and len(waits.found) == 5
    with counted(model, monkeypatch), pytest.raises(AssertionError, match="mixes tensors of host and device"):
        weight + torch.tensor([1.0] * weight.shape[1])

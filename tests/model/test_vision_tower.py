"""The tower gives the features, the gradients and the [CLS] row that transformers gives, without eager attention or
unused layers."""

import copy
import pickle

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.activations import GELUActivation, QuickGELUActivation

from llava.kernels import backend, quick_gelu_triton
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower, QuickGELU, middle_layer

CONFIG = CLIPVisionConfig(
    hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4, image_size=56, patch_size=14
)


@pytest.fixture(scope="module")
def eager():
    torch.manual_seed(0)
    model = CLIPVisionModel._from_config(CONFIG, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model


@pytest.mark.parametrize("select_layer", [-1, -2, -3, 4, 1])
def test_features_and_cls_row_are_those_of_the_layer_that_is_used(eager, select_layer):
    tower = CLIPVisionTower(CONFIG, select_layer).eval()
    tower.vision_tower.load_state_dict(eager.state_dict(), strict=False)
    pixels = torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        features, row, states = tower(pixels)
        want = eager(pixels, output_hidden_states=True, output_attentions=True)
    used = select_layer if select_layer >= 0 else 6 + select_layer
    assert len(tower.vision_tower.encoder.layers) == used
    torch.testing.assert_close(features, want.hidden_states[select_layer][:, 1:], rtol=0, atol=1e-5)
    attention = want.attentions[used - 1].mean(dim=1)[:, 0, 1:]
    torch.testing.assert_close(row, attention, rtol=0, atol=1e-6)
    assert features.shape == (3, 16, 32) and row.shape == (3, 16) and row.dtype == torch.float32
    assert states == {}


@pytest.mark.parametrize("select_layer", [-1, -2, 1])
def test_states_on_request_come_out_of_the_same_pass(eager, select_layer):
    tower = CLIPVisionTower(CONFIG, select_layer).eval()
    tower.vision_tower.load_state_dict(eager.state_dict(), strict=False)
    pixels = torch.randn(3, 3, 56, 56)
    keys = []
    used = select_layer if select_layer >= 0 else 6 + select_layer
    reference = eager.encoder.layers[used - 1].self_attn.k_proj.register_forward_hook(
        lambda *args: keys.append(args[2])
    )
    with torch.no_grad():
        features, row, states = tower(pixels, ("keys", "hidden"))
        want = eager(pixels, output_hidden_states=True)
        plain = tower(pixels)
    reference.remove()
    assert set(states) == {"hidden", "keys"} and states["keys"].dtype == torch.float32
    torch.testing.assert_close(states["hidden"], want.hidden_states[select_layer], rtol=0, atol=1e-5)
    # Four heads of width eight: raw keys, [CLS] first, mean over heads.
    mean = keys[0].view(3, 17, 4, 8).mean(dim=2)
    torch.testing.assert_close(states["keys"], mean, rtol=0, atol=1e-5)
    assert torch.equal(features, plain[0]) and torch.equal(row, plain[1])
    with torch.no_grad():
        assert set(tower(pixels, ("hidden",))[2]) == {"hidden"}


@pytest.mark.parametrize("select_layer, middle", [(-1, 2), (-2, 2), (1, 1)])
def test_received_attention_is_that_of_eager_maps(eager, select_layer, middle):
    """9 of 23 layers are 2 of 5, 2 of 4 (1.57 rounded) and the one of 1."""
    tower = CLIPVisionTower(CONFIG, select_layer).eval()
    tower.vision_tower.load_state_dict(eager.state_dict(), strict=False)
    pixels = torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        features, row, states = tower(pixels, ("received",))
        maps = eager(pixels, output_attentions=True).attentions
        plain = tower(pixels)
    used = select_layer if select_layer >= 0 else 6 + select_layer
    assert set(states) == {"received"} and states["received"].dtype == torch.float32
    want = torch.stack([maps[layer - 1].mean(dim=(1, 2))[:, 1:] for layer in (middle, used)], dim=-1)
    torch.testing.assert_close(states["received"], want, rtol=0, atol=1e-6)
    assert torch.equal(features, plain[0]) and torch.equal(row, plain[1])
    # A tile alone has the same.
    with torch.no_grad():
        alone = torch.cat([tower(pixels[i : i + 1], ("received",))[2]["received"] for i in range(3)])
    torch.testing.assert_close(alone, states["received"], rtol=0, atol=1e-7)


def test_the_middle_layer_of_clip_l_is_the_ninth():
    assert [middle_layer(used) for used in (23, 24, 22, 11, 1)] == [9, 9, 9, 4, 1]


def test_tiles_do_not_see_each_other_and_nothing_is_left_behind(eager):
    tower = CLIPVisionTower(CONFIG).eval()
    tower.vision_tower.load_state_dict(eager.state_dict(), strict=False)
    pixels = torch.randn(4, 3, 56, 56)
    with torch.no_grad():
        features, row, _ = tower(pixels)
        for i in range(4):
            alone = tower(pixels[i : i + 1])
            torch.testing.assert_close(alone[0][0], features[i])
            torch.testing.assert_close(alone[1][0], row[i])


def test_half_precision_scores_stay_float32(eager):
    tower = CLIPVisionTower(CONFIG).to(torch.bfloat16).eval()
    tower.vision_tower.load_state_dict(eager.state_dict(), strict=False)
    with torch.no_grad():
        features, row, _ = tower(torch.randn(1, 3, 56, 56))
    assert (features.dtype, row.dtype) == (torch.bfloat16, torch.float32)


def test_a_layer_that_is_not_there_is_refused():
    for select_layer in (6, 0, -6, -9):
        with pytest.raises(ValueError, match="select_layer"):
            CLIPVisionTower(CONFIG, select_layer)


# --- the activation ----------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """Shapes that the Triton kernel of the activation gets, which is chosen as on a GPU. It has no gradient."""
    found = []

    def counted(hidden, out):
        found.append(tuple(hidden.shape))
        out.copy_(QuickGELUActivation()(hidden.detach()))

    monkeypatch.setattr(backend, "backend_for", lambda tensor, requested=None: requested or "triton")
    monkeypatch.setattr(quick_gelu_triton, "launch", counted)
    return found


def stock(eager):
    """transformers' tower with the weights of `eager` and the attention that ours has."""
    model = CLIPVisionModel._from_config(eager.config, attn_implementation="sdpa")
    model.load_state_dict(eager.state_dict())
    return model


def ours(eager, config=CONFIG):
    tower = CLIPVisionTower(config)
    tower.vision_tower.load_state_dict(eager.state_dict(), strict=False)
    return tower


def activations(tower):
    return [layer.mlp.activation_fn for layer in tower.vision_tower.encoder.layers]


def test_weights_and_parts_have_transformers_names(eager):
    tower, model = ours(eager).vision_tower, stock(eager)
    used = {name for name in model.state_dict() if not name.startswith(("encoder.layers.4", "post_layernorm"))}
    assert set(tower.state_dict()) == used
    assert "encoder.layers.0.mlp.activation_fn" in dict(tower.named_modules())


def test_features_and_gradients_are_bit_for_bit_those_of_transformers(eager):
    pixels = torch.randn(2, 3, 56, 56)
    for training in (True, False):
        tower, model = ours(eager).train(training), stock(eager).train(training)
        features = tower(pixels)[0]
        want = model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        assert torch.equal(features, want)
        features.square().sum().backward()
        want.square().sum().backward()
        theirs = dict(model.named_parameters())
        for name, weight in tower.vision_tower.named_parameters():
            assert torch.equal(weight.grad, theirs[name].grad), name


def test_the_kernel_runs_where_no_gradient_is_needed(eager, launches):
    pixels = torch.randn(1, 3, 56, 56)
    tower, model = ours(eager), stock(eager)
    want = model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    with torch.no_grad():
        torch.testing.assert_close(tower(pixels)[0], want, rtol=0, atol=1e-5)
    assert launches == [(1, 17, 64)] * 4
    # A frozen tower in training, in which one adapter learns: layers from there on have gradients.
    tower.requires_grad_(False)
    tower.vision_tower.encoder.layers[2].mlp.fc1.weight.requires_grad_()
    tower(pixels)[0].sum().backward()
    assert launches == [(1, 17, 64)] * 6
    want.sum().backward()
    found, expected = (part.encoder.layers[2].mlp.fc1.weight.grad for part in (tower.vision_tower, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    del launches[:]
    torch.testing.assert_close(ours(eager)(pixels)[0], want)
    assert launches == []


def test_another_activation_stays(eager):
    config = copy.deepcopy(CONFIG)
    config.hidden_act = "gelu"
    assert {type(part) for part in activations(ours(eager, config))} == {GELUActivation}
    assert {type(part) for part in activations(ours(eager))} == {QuickGELU}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tower: pickle.loads(pickle.dumps(tower))])
def test_copies_of_the_tower(eager, copied):
    tower, pixels = ours(eager), torch.randn(1, 3, 56, 56)
    other = copied(tower)
    assert {type(part) for part in activations(other)} == {QuickGELU}
    assert torch.equal(other(pixels)[0], tower(pixels)[0])


def test_hooks_see_the_activation_and_may_return_other_strides(eager):
    tower, pixels, seen = ours(eager), torch.randn(1, 3, 56, 56), []
    want = tower(pixels)[0]
    mlp = tower.vision_tower.encoder.layers[0].mlp
    mlp.fc1.register_forward_hook(lambda module, given, found: found.mT.contiguous().mT)
    mlp.activation_fn.register_forward_hook(lambda module, given, found: seen.append(found.shape))
    torch.testing.assert_close(tower(pixels)[0], want)
    assert seen == [(1, 17, 64)]

"""The tower gives the features and the [CLS] row that transformers gives, without eager attention or unused layers."""

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower

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

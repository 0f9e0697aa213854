"""The overlay command: what it runs and measures, what it reads of the cache, and what it says to bad input."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from serve_cases import ended_by

from llava.common.files import REPOSITORY
from llava.config import AdaVConfig
from llava.overlay.cache_trace import image_classes, trace, traceable
from llava.overlay.lettering import font_for, legible, text_block, wrapped
from llava.overlay.measure_methods import MethodMeasurer
from llava.overlay.views import ABSENT, CORE, MINOR, SECONDARY
from llava.serve import overlay as overlay_command
from llava.shapes.scenes import draw_scene

CHECKPOINTS = {family: str(REPOSITORY / "playground" / f"llava-shapes-{family}") for family in ("v1.5", "v1.6")}
QUESTION = "What color is the t?"
AVL = {"vision_adaptive_attention": True, "vision_adaptive_attention_update_interval": 2}


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "scene.png"
    Image.fromarray(draw_scene("v1.5", "test", 0).pixels).save(path)
    return path


@pytest.fixture(scope="module")
def run():
    image = Image.fromarray(draw_scene("v1.5", "test", 0).pixels)
    return MethodMeasurer(CHECKPOINTS["v1.5"], image, QUESTION, AdaVConfig(), device="cpu")


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "adav", "overall_tokens": 40},
        {"method": "none"},
        {"method": "fastv", "overall_tokens": 40},
        {"method": "pyramiddrop", "overall_tokens": 40},
        {"method": "sparsevlm", "overall_tokens": 40},
        {"method": "visionzip", "overall_tokens": 40, "prefill_filter_flag": True, "prefill_filter_layer": 2},
        {"method": "adav", "overall_tokens": 40, "vision_adaptive_attention_update_interval": -1},
        {"method": "adav", "overall_tokens": 40, "text_pruning_flag": True, "text_init_cache": 4},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
@torch.inference_mode()
def test_classes_are_what_the_cache_holds(run, settings):
    """A patch is core or secondary exactly where its own key, as the same prefill leaves it, is stored in such a slot."""
    config = AdaVConfig(**{**AVL, **settings})
    prepared, whole = run._prepare(config), run._prepare(AdaVConfig(**settings))
    tokens = prepared.image_spans[0][0][1]
    caches = [one.caching.cache(4) for one in (prepared, whole)]
    for one, cache in zip((prepared, whole), caches, strict=True):
        run.model.prefill(one, cache)
    classes = image_classes(caches[0], prepared)
    assert classes.shape == (run.model.config.num_hidden_layers, tokens)
    start = whole.image_spans[0][0][0]
    for number, (layer, full) in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        # Which tokens the layer saw, from the schedule of the dropping itself.
        seen = np.arange(tokens)
        if whole.dropping is not None and whole.dropping.stage_of[number]:
            seen = whole.dropping.survivors(0, 0)[whole.dropping.stage_of[number] - 1].numpy()
        keys = full.keys[0, :, start : start + len(seen)]
        stored = layer.keys[0, :, : layer.plans[0].front + layer.plans[0].image]
        core = set(layer.core[0, : layer.plans[0].core].tolist()) or set(range(stored.shape[1]))
        expected = np.full(tokens, ABSENT)
        for at, token in enumerate(seen.tolist()):
            (slots,) = np.nonzero((stored == keys[:, at, None]).all(-1).all(0).numpy())
            if token >= 0:
                expected[token] = MINOR if not len(slots) else CORE if int(slots[0]) in core else SECONDARY
        assert classes[number].tolist() == expected.tolist()
        counts = {name: int((classes[number] == name).sum()) for name in (CORE, SECONDARY, MINOR)}
        if (seen >= 0).all() and layer.plans[0].image:
            plan = layer.plans[0]
            assert counts == {CORE: plan.core, SECONDARY: plan.image - plan.core, MINOR: len(seen) - plan.image}


def test_core_changes_where_it_is_re_ranked_and_nowhere_else(run):
    config = AdaVConfig(method="adav", overall_tokens=60, **AVL)
    states = trace(run.model, run._prepare(config), steps=6)
    assert len(states) == 7
    changed = [not np.array_equal(a, b) for a, b in zip(states, states[1:], strict=False)]
    assert not any(changed[::2]) and any(changed[1::2]), "interval 2: after steps 2, 4 and 6"
    for state in states:
        assert np.array_equal(state == MINOR, states[0] == MINOR), "evicted is evicted"
        assert ((state == CORE).sum(1) == (states[0] == CORE).sum(1)).all()


def test_what_has_no_classes(run):
    assert traceable(run._prepare(AdaVConfig(**AVL)))
    for settings in ({}, {"all_use_h2o": True}, {"text_pruning_flag": True}):
        assert not traceable(run._prepare(AdaVConfig(**settings)))


def test_looks_agree_with_the_engine_and_the_plan(run):
    configs = {name: AdaVConfig(method=name, overall_tokens=14) for name in ("none", "no_image", "adav", "pyramiddrop")}
    ticks = []
    looks = run.looks(configs, max_new_tokens=4, repeats=2, tick=lambda: ticks.append(1))
    assert len(ticks) == 4 * (2 + 2)
    assert [look.kept for look in looks.values()] == [144, 0, 14, 14] and {look.total for look in looks.values()} == {
        144
    }
    assert looks["none"].answer == "blue" and looks["no_image"].cache is None
    for look in looks.values():
        assert any("ms" in note for note in look.notes()) and look.notes()[-1].endswith("(predicted)")
    assert looks["adav"].kv_bytes < looks["pyramiddrop"].kv_bytes < looks["none"].kv_bytes
    assert looks["adav"].flops < looks["pyramiddrop"].flops < looks["none"].flops
    assert len(looks["pyramiddrop"].selection.report["cuts"]) == 3 and looks["pyramiddrop"].layer_mean > 14
    assert any("mean over layers" in note for note in looks["pyramiddrop"].notes())
    assert not any("mean over layers" in note for note in looks["adav"].notes())


def ask(picture, output, *flags):
    required = ["--image", str(picture), "--question", QUESTION, "--model-path", CHECKPOINTS["v1.5"], "-o", str(output)]
    required += ["--device", "cpu"]
    overlay_command.main([*required, "--repeats", "1", *flags])


def test_command_writes_a_picture(picture, tmp_path, capsys):
    ask(picture, tmp_path / "out.png", "--methods", "adav,fastv,visionzip", "--tokens", "14")
    said = capsys.readouterr()
    assert "adav: blue" in said.out and "14 of 144 vision tokens" in said.out and "median of 1" in said.out
    assert said.err == "", "no progress where there is no terminal"
    with Image.open(tmp_path / "out.png") as page:
        assert page.width > 1100 and page.height > 800
    ask(picture, tmp_path / "avl.png", "--methods", "adav", "--tokens", "40", "--vision-adaptive-attention", "true")
    ask(picture, tmp_path / "one.png", "--methods", "adav", "--tokens", "40")
    with Image.open(tmp_path / "avl.png") as with_strip, Image.open(tmp_path / "one.png") as without:
        assert with_strip.height > without.height + 100


def test_methods_are_adav_and_none_by_default(picture, tmp_path, capsys):
    ask(picture, tmp_path / "out.png", "--tokens", "14")
    said = capsys.readouterr().out
    assert "14 of 144 vision tokens" in said and "144 of 144 vision tokens" in said
    assert re.findall(r"^(\w+): ", said, re.M)[:2] == ["adav", "none"]


def test_the_demos_caveat_stands_in_a_picture_that_is_none_of_the_demos(picture, tmp_path, monkeypatch):
    from llava.overlay import cache_strip, page

    photo, seen = tmp_path / "photo.png", []
    Image.open(picture).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photo)  # of the same size

    def watched(draw):
        def drawn(*args, caveat, **more):
            seen.append((caveat, draw(*args, caveat=caveat, **more)))
            return seen[-1][1]

        return drawn

    for module, name in ((page, "draw_overlay"), (cache_strip, "cache_frames")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    for flags in (("out.png",), ("out.gif", "--vision-adaptive-attention", "true", "--steps", "1")):
        for image in (picture, photo):
            ask(image, tmp_path / flags[0], "--methods", "adav", "--tokens", "14", *flags[1:])
    own, other, own_frames, other_frames = seen
    assert own[0] == own_frames[0] == "" and "cannot answer questions about photographs" in other[0] and other[0] == other_frames[0]
    assert other[1].height > own[1].height and other_frames[1][0].height > own_frames[1][0].height


def test_a_time_whose_repeats_scatter_is_marked(run, monkeypatch):
    """Of five repeats two are ten times as slow: nothing is wrong with the median, but it is not to be quoted."""
    times = iter([0.030] + [0.025, 0.250, 0.026, 0.260, 0.025] + [0.030] + [0.025, 0.026, 0.025, 0.250, 0.025])
    monkeypatch.setattr(run, "_first_token", lambda config, most: (next(times), 0.02))
    marked, steady = (
        run.looks({"adav": AdaVConfig(method="adav", overall_tokens=14)}, max_new_tokens=1).pop("adav")
        for _ in range(2)
    )
    mark = "do not quote this time: its repeats lie between 25.0 and 260.0 ms"
    assert marked.notes()[:2] == ["first token after 26.0 ms, of which prefill 20.0 ms", mark]
    assert not any("do not quote" in note for note in steady.notes())  # one of five is slow


def test_an_empty_answer_is_told(picture, tmp_path, capsys):
    silent = ended_by(tmp_path / "silent", "blue")
    ask(picture, tmp_path / "out.png", "--methods", "adav", "--tokens", "14", "--model-path", str(silent))
    assert capsys.readouterr().out.startswith("adav: (empty)\n")


def test_command_writes_a_gif(picture, tmp_path):
    flags = ["--methods", "adav,none", "--tokens", "40", "--vision-adaptive-attention", "true", "--layer", "2"]
    ask(picture, tmp_path / "out.gif", *flags, "--steps", "4")
    with Image.open(tmp_path / "out.gif") as frames:
        assert frames.n_frames == 5


@pytest.mark.parametrize(
    "change, words",
    [
        ({"--image": "nowhere.png"}, "nowhere.png"),
        ({"--methods": "adav,fastvlm"}, "fastvlm"),
        ({"--methods": "adav,,t2i"}, "--methods"),
        ({"--methods": "adav,adav"}, "each once"),
        ({"--tokens": "0"}, "at least 1"),
        ({"--tokens": "14", "--overall-tokens": "15"}, "give one of them"),
        ({"--method": "adav"}, "--methods"),
        ({"-o": "nowhere/out.png"}, "no folder nowhere"),
        ({"-o": "out.tiff"}, ".png or .gif"),
        ({"-o": "out.gif"}, "--vision-adaptive-attention true"),
        ({"--layer": "2"}, "--vision-adaptive-attention true"),
        ({"--question": " "}, "--question is empty"),
        ({"--question": "what is in <image>?"}, "text alone"),
        ({"--model-path": "playground/nowhere"}, "no such checkpoint"),
        ({"--conv-mode": "nonsense"}, "conversation template"),
        ({"--temperature": "1"}, "--temperature"),
        ({"--options": json.dumps({"min_share": 2})}, "min_share"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_input_is_one_sentence(picture, tmp_path, monkeypatch, capsys, change, words):
    monkeypatch.chdir(tmp_path)
    flags = {"--image": str(picture), "--question": QUESTION, "--methods": "adav", "-o": "out.png"} | change
    with pytest.raises(SystemExit) as stop:
        overlay_command.main([part for flag in flags.items() for part in flag])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and words in said
    assert not list(tmp_path.iterdir())


def test_unreadable_image_and_layer_out_of_range(picture, tmp_path, capsys):
    (tmp_path / "text.png").write_text("no picture")
    for flags, words in (
        (["--image", str(tmp_path / "text.png")], "text.png"),
        (["--layer", "9", "--vision-adaptive-attention", "true"], "allowed is 1 to 4"),
    ):
        with pytest.raises(SystemExit) as stop:
            ask(picture, tmp_path / "out.png", "--methods", "adav", *flags)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and words in said
    assert not (tmp_path / "out.png").exists()


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "llava.serve.overlay"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "--image" in done.stderr


def test_lines_fit_and_lose_nothing():
    text = "What colour is the shape on the left of the picture, and how many digits are there beside it?"
    for width in (60, 200, 5000):
        lines = wrapped(text, width, lines=50)
        assert " ".join(lines) == text and all(font_for(line).getlength(line) <= width for line in lines)
    short = wrapped(text, 200, lines=2)
    assert len(short) == 2 and short[1].endswith("…") and all(font_for(line).getlength(line) <= 200 for line in short)
    assert wrapped("x" * 100, 90, lines=50) and "".join(wrapped("x" * 100, 90, lines=50)) == "x" * 100
    assert wrapped("", 50) == [""] and text_block("", 50).width == 50


def test_letters_of_other_scripts():
    for text in ("Où est l'été?", "Какого цвета?", "Ποιο χρώμα;", "ما اللون؟"):
        assert legible(text) and np.ptp(np.asarray(text_block(text, 300))) > 100
    assert not legible("\U0010fffd\U0010fffe"), "no font has letters there"

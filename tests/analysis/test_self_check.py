"""`python -m llava.analysis.self_check`: PASS on every kind of checkpoint, FAIL where something computes wrongly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_checkpoints as tiny
import torch
from tiny_checkpoints import make_image

import llava.mm_utils
from llava.analysis import self_check
from llava.inference.loaded_checkpoint import LoadedCheckpoint
from llava.model import image_tokens, llava_arch
from llava.model.builder import load_pretrained_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with one checkpoint of each kind."""
    root = tmp_path_factory.mktemp("self_check")
    for version, build in (("1.5", {"kind": "llava"}), ("1.6", {"kind": "llava_next", "text": "mistral"})):
        model = tiny.build_reference(**build, seed=31)
        tiny.save_llava_hf(model, root / f"hf-{version}", "published")
        tower = tiny.save_clip_tower(model, root / f"tower-{version}")
        tiny.save_original(model, root / f"original-{version}", tower, "sharded_bin")
        tiny.save_plain_llm(model, root / f"base-{version}")
        tiny.save_lora(model, root / f"lora-{version}", tower)
    tied = tiny.build_reference("llava_next", tie_word_embeddings=True)
    tower = tiny.save_clip_tower(tied, root / "tower-tied")
    tiny.save_original(tied, root / "half-way", tower, tie_word_embeddings=True)
    tokenizer, ours, image_processor, _ = load_pretrained_model(root / "half-way", device_map="cpu")
    for part in (ours, tokenizer, image_processor):  # one folder with everything in it, as the demo checkpoints are
        part.save_pretrained(root / "saved-by-us")
    return root


@pytest.fixture(autouse=True)
def quiet_again():
    """main() silences transformers; other tests read its warnings."""
    import transformers

    before = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


def run(capsys, *args):
    """(exit code, lines printed, error output) of the command."""
    try:
        code = self_check.main(["--device", "cpu", *map(str, args)])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


def value(lines, name):
    found = [line[20:] for line in lines if line[:20].strip() == name]
    assert len(found) == 1, (name, lines)
    return found[0]


@pytest.mark.parametrize("name", ["hf-1.5", "hf-1.6", "original-1.5", "original-1.6", "saved-by-us"])
def test_pass(capsys, folders, name):
    code, lines, _ = run(capsys, folders / name)
    assert (code, lines[-1]) == (0, "PASS")
    assert float(value(lines, "difference").split()[1].rstrip(",")) <= 1e-4
    assert "allowed in float32 is 0.0001" in value(lines, "difference")
    # 640 x 480 in 4 x 4 patches a tile: 16, or 16 + 6 rows of 8 and their newline tokens.
    assert value(lines, "image tokens").startswith("16: 16 patches, 0" if "1.5" in name else "70: 64 patches, 6")
    assert value(lines, "tiles").startswith("1 of 56 x 56" if "1.5" in name else "5: the whole image and 2 x 2 crops")


def test_padding_processor_of_llava_hf(capsys, tmp_path):
    """transformers 5's own processor for 1.5, which pads where CLIP's crops."""
    tiny.save_llava_hf(tiny.build_reference(), tmp_path)
    tiny.nest_image_processor(tmp_path, image_processor_type="LlavaImageProcessor", do_pad=True)
    code, lines, _ = run(capsys, tmp_path)
    assert (code, lines[-1]) == (0, "PASS")


@pytest.mark.parametrize("version", ["1.5", "1.6"])
def test_lora(capsys, folders, version):
    code, lines, _ = run(capsys, folders / f"lora-{version}", "--model-base", folders / f"base-{version}")
    assert (code, lines[-1]) == (0, "PASS")


def test_prompt_is_reported(capsys, folders):
    code, lines, _ = run(capsys, folders / "original-1.5", "--question", "What colour is it?")
    assert code == 0
    assert value(lines, "template") == "vicuna_v1"
    prefix = int(value(lines, "prefix").split()[0])
    before, after = value(lines, "ids around it").split(" [image] ")
    assert (
        value(lines, "which are")
        == "\"'\" 's' 'questions' '.' 'USER' ':' [image] '\\n' 'What' 'colour' 'is' '<unk>' '?'"
    )
    assert len(before.split()) == 6 and after.split()[0] == "3"
    suffix = 8  # \n What colour is <unk> ? ASSISTANT :
    assert value(lines, "sequence") == f"{prefix + 16 + suffix} tokens: {prefix} + 16 + {suffix}"


def test_own_image_and_template(capsys, folders, tmp_path):
    make_image(37, 167).save(tmp_path / "tall.png")
    code, lines, _ = run(capsys, folders / "hf-1.6", "--image", tmp_path / "tall.png", "--conv-mode", "vicuna_v1")
    assert (code, lines[-1]) == (0, "PASS")
    assert value(lines, "template") == "vicuna_v1"
    assert value(lines, "tiles").startswith("4: the whole image and 1 x 3 crops on a canvas of 56 x 168")


@pytest.mark.parametrize("dtype,limit", [("float16", "0.01"), ("bfloat16", "0.05")])
def test_half_precision(capsys, folders, dtype, limit):
    code, lines, _ = run(capsys, folders / "original-1.6", "--dtype", dtype)
    assert (code, lines[-1]) == (0, "PASS")
    assert value(lines, "computed in") == f"{dtype} on cpu"
    assert "of the spread" in value(lines, "difference") and value(lines, "difference").endswith(f"{dtype} is {limit}")


@pytest.mark.parametrize(
    "method,tokens,kept",
    [
        ("adav", 13, 13),
        ("adav", 999, 70),
        ("none", 13, 70),
        ("no_image", 1, 0),
        ("sparsevlm", 13, 13),
        ("pyramiddrop", 69, 69),
    ],
)
def test_method(capsys, folders, method, tokens, kept):
    code, lines, _ = run(capsys, folders / "original-1.6", "--method", method, "--tokens", tokens)
    assert (code, lines[-1]) == (0, "PASS")
    assert value(lines, "method").startswith(f"{method} keeps {kept} of ")


# ------------------------------------------------------------------------------------------------------------ FAIL
def failed(result):
    code, lines, _ = result
    return code == 1 and lines[-1] == "FAIL"


def test_fails_where_patches_are_out_of_order(capsys, folders, monkeypatch):
    right = llava.mm_utils.merge_order

    def swapped(plan, side, tiles=None):
        order = right(plan, side, tiles).clone()
        order[[3, 4]] = order[[4, 3]]
        return order

    monkeypatch.setattr(image_tokens, "merge_order", swapped)
    uncached = image_tokens.layout_of.__wrapped__  # nothing of it is kept, before or after
    monkeypatch.setattr(llava_arch, "layout_of", uncached)
    for name in ("hf-1.5", "hf-1.6", "original-1.6"):
        assert failed(run(capsys, folders / name)), name


def test_fails_where_a_weight_differs(capsys, folders, monkeypatch):
    build = self_check.build_reference

    def other(*args):
        reference = build(*args)
        with torch.no_grad():
            reference.model.language_model.layers[2].mlp.down_proj.weight[0, 0] += 0.05
        return reference

    monkeypatch.setattr(self_check, "build_reference", other)
    assert failed(run(capsys, folders / "original-1.5"))


def test_fails_in_half_precision_too(capsys, folders, monkeypatch):
    def other(*args, **kwargs):
        loaded = LoadedCheckpoint(*args, **kwargs)
        with torch.no_grad():
            loaded.model.model.mm_projector[0].bias += 0.3
        return loaded

    monkeypatch.setattr(self_check, "LoadedCheckpoint", other)
    assert failed(run(capsys, folders / "original-1.6", "--dtype", "bfloat16"))


def test_fails_where_pixels_differ(capsys, folders, monkeypatch):
    process = self_check.process_images

    def other(*args, **kwargs):
        pixels = process(*args, **kwargs).clone()
        pixels[..., 0, 0] += 1e-6
        return pixels

    monkeypatch.setattr(self_check, "process_images", other)
    code, lines, _ = run(capsys, folders / "hf-1.6")
    assert failed((code, lines, "")) and "allowed is 0" in value(lines, "pixels")


def test_fails_where_the_sequences_differ(capsys, folders, monkeypatch):
    """Truncating where transformers rounds: 188 x 47 loses two rows."""
    monkeypatch.setattr(llava.mm_utils, "is_hf", lambda config: False)
    image = folders / "wide.png"
    make_image(188, 47).save(image)
    code, lines, _ = run(capsys, folders / "hf-1.6", "--image", image)
    assert failed((code, lines, "")) and "the sequences differ" in value(lines, "logits")


def test_fails_where_a_method_keeps_another_number(capsys, folders, monkeypatch):
    from llava.methods.before_llm import SELECTORS
    from llava.methods.before_llm.base import take

    monkeypatch.setattr(SELECTORS["cls"], "keep", lambda self, image, text, budget: take(image, image.patches[:5]))
    code, lines, _ = run(capsys, folders / "original-1.6", "--method", "cls", "--tokens", "7")
    assert failed((code, lines, "")) and any("7 were asked for" in line for line in lines)


# ------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "arguments,words",
    [
        (["nowhere"], "nowhere: no such folder"),
        (["original-1.5", "--image", "nowhere.png"], "nowhere.png: no such image"),
        (["original-1.5", "--image", "original-1.5/config.json"], "cannot be read as an image"),
        (["original-1.5", "--device", "cude"], '--device is "cude"'),
        (["original-1.5", "--dtype", "float31"], "float31"),
        (["original-1.5", "--conv-mode", "llama_9"], "llama_9"),
        (["original-1.5", "--tokens", "5"], "--method"),
        (["original-1.5", "--method", "adav", "--tokens", "0"], "overall_tokens"),
        (["original-1.5", "--method", "adavv"], "adavv"),
        (["lora-1.5"], "model_base"),
        (["base-1.5"], "no LLaVA"),
        (["tower-1.5"], "no LLaVA"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, folders, monkeypatch, arguments, words):
    monkeypatch.chdir(folders)
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_no_tokenizer(capsys, tmp_path):
    tiny.save_llava_hf(tiny.build_reference(), tmp_path, processor=False)
    code, _, err = run(capsys, tmp_path)
    assert code == 2 and "has no tokenizer" in err


def test_a_size_that_transformers_unpads_differently(capsys, folders, tmp_path):
    make_image(188, 47).save(tmp_path / "wide.png")
    code, _, err = run(capsys, folders / "original-1.6", "--image", tmp_path / "wide.png")
    assert code == 2 and "188 x 47" in err and "another --image" in err


def test_nothing_to_compare_with(capsys, folders, tmp_path):
    model = tiny.build_reference("llava_next")
    folder = tiny.save_original(model, tmp_path, folders / "tower-1.6", mm_patch_merge_type="spatial")
    code, _, err = run(capsys, folder)
    assert code == 2 and "mm_patch_merge_type spatial" in err


def test_the_command(folders):
    """As a user starts it: the exit code is the process's, and nothing but the report is printed."""
    done = subprocess.run(
        [sys.executable, "-m", "llava.analysis.self_check", str(folders / "original-1.5"), "--device", "cpu"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "PASS"
    assert done.stderr == ""

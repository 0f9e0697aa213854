"""A-VL's command line for lmms-eval, translated; nothing of lmms-eval is needed for that."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from llava.common.errors import UserError
from llava.integrations.lmms_eval.command import SAME, main, split_model_args, translate

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL_ARGS = "pretrained=llava-hf/llava-1.5-7b-hf,device_map=auto,attn_implementation=eager"


def model_args(command: list[str]) -> dict[str, str]:
    return dict(part.split("=", 1) for part in split_model_args(command[command.index("--model_args") + 1]))


def test_the_published_command_line():
    rest = ["--batch_size", "1", "--log_samples", "--output_path", "./logs/", "--log_samples_suffix", "llava_1_5_7b"]
    line = (
        f"--model llava_hf --model_args {MODEL_ARGS} --tasks docvqa {' '.join(rest)} "
        "--vision_adaptive_attention true --vision_adaptive_attention_rate 0.6 "
        "--vision_adaptive_attention_compute_rate 0.7 --vision_adaptive_attention_update_interval 3 "
        "--prefill_filter_flag true --prefill_filter_rate 0.3 --text_pruning_flag true --text_pruning_rate 0.3"
    )
    command, notes = translate(line.split())
    assert command[:2] == ["--model", "adav_llava"] and command[4:6] == ["--tasks", "docvqa"]
    assert command[6:] == rest
    assert model_args(command) == {
        "pretrained": "llava-hf/llava-1.5-7b-hf",
        "device_map": "auto",
        "attn_implementation": "eager",
        "method": "none",
        "vision_adaptive_attention": "true",
        "vision_adaptive_attention_rate": "0.6",
        "vision_adaptive_attention_compute_rate": "0.7",
        "vision_adaptive_attention_update_interval": "3",
        "text_pruning_flag": "true",
        "text_pruning_rate": "0.3",
        "text_init_cache": "20",
        "prefill_filter_flag": "true",
        "prefill_filter_layer": "3",
        "prefill_filter_rate": "0.3",
        "all_use_h2o": "false",
    }
    assert len(notes) == 1 and "--model llava_hf is A-VL alone" in notes[0]


def test_what_is_not_written_has_the_defaults_of_avl():
    """Taken from its command line, not from adav_configs.json: the same line means the same thing."""
    command, _ = translate(["--model", "llava_hf", "--model_args", MODEL_ARGS])
    found = model_args(command)
    assert found["vision_adaptive_attention_update_interval"] == "-1"
    assert found["vision_adaptive_attention_compute_rate"] == "0.6" and found["text_pruning_rate"] == "0.5"
    assert set(SAME) <= set(found)


def test_a_configuration_file_takes_the_place_of_those_defaults(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text('{"method": "fastervlm", "overall_tokens": 58}')
    for model in ("llava_hf", "adav_llava"):
        arguments = ["--model", model, "--model_args", f"pretrained=x,config={path}", "--text_init_cache", "8"]
        command, notes = translate(arguments)
        assert model_args(command) == {"pretrained": "x", "config": str(path), "text_init_cache": "8"} and not notes


@pytest.mark.parametrize(
    "options, keys",
    [
        (["--text_use_h2o", "true"], {"text_rule": "h2o"}),
        (["--text_use_h2o", "false"], {"text_rule": "history"}),
        (["--text_use_h2o", "false", "--compare_text_direct_pruning", "true"], {"text_rule": "direct"}),
        (["--compare_text_direct_pruning", "true"], {"text_rule": "direct"}),
        (["--text_h20_hh_rate_in_cache", "0.5"], {"text_heavy_share": "0.5"}),
    ],
)
def test_renamed_options(options, keys):
    command, notes = translate(["--model", "adav_llava", "--model_args", "pretrained=x", *options])
    assert model_args(command) == {"pretrained": "x", **keys}
    assert len(notes) == 1 and next(iter(keys)) in notes[0] and options[0] in notes[0]


@pytest.mark.parametrize(
    "name", ["text_pruning_interval", "h2o_hh_size", "h2o_recent_size", "auto_half_h2o", "weaken_factor", "merge_rate"]
)
def test_options_without_effect_are_named(name):
    arguments = ["--model", "adav_llava", "--model_args", "pretrained=x", f"--{name}", "8", "--limit", "2"]
    command, notes = translate(arguments)
    assert command == ["--model", "adav_llava", "--model_args", "pretrained=x", "--limit", "2"]
    assert len(notes) == 1 and f"--{name}" in notes[0] and "does nothing, here as in A-VL" in notes[0]


@pytest.mark.parametrize(
    "options, said",
    [
        (["--model", "qwen2_vl"], '--model is "qwen2_vl", allowed are llava_hf and adav_llava'),
        (["--model", "llava"], "; type --model adav_llava for a LLaVA checkpoint of either format"),
        (
            ["--model", "llava_onevision", "--model_args", "pretrained=a/b,conv_template=v1"],
            "; type --model adav_llava --model_args pretrained=a/b,conv_template=v1 for",
        ),
        (["--vision_adaptive_attention", "yes"], '--vision_adaptive_attention is "yes", allowed are true and false'),
        (["--text_init_cache", "2.5"], '--text_init_cache is "2.5", allowed is a whole number'),
        (["--prefill_filter_rate", "1.5"], '"prefill_filter_rate" is 1.5, allowed is'),
        (["--vision_adaptive_attention_rate", "0.7"], "what is evicted cannot be read"),
        (["--text_use_h2o", "true", "--compare_text_direct_pruning", "true"], "are both true, allowed is one"),
        (["--model_args", "pretrained=x,text_init_cache=8", "--text_init_cache", "9"], "give one of them"),
        (["--model_args", "pretrained=x,method=best"], '"method" is "best", allowed is'),
    ],
)
def test_bad_values_are_told_before_anything_starts(options, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--tasks", "docvqa", *options])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


FIRST = """
from llava.methods.before_llm import Selector
from llava.methods.before_llm.base import take

class First(Selector):
    def keep(self, image, text, budget):
        return take(image, image.patches[:budget])
"""


def test_a_method_from_a_file(tables, tmp_path):
    plugin = tmp_path / "first_ones.py"
    plugin.write_text(FIRST)
    text = f"pretrained=x,plugin={plugin},method=first_ones,overall_tokens=36"
    command, _ = translate(["--model", "adav_llava", "--model_args", text])
    assert model_args(command)["plugin"] == str(plugin) and model_args(command)["method"] == "first_ones"
    with pytest.raises(UserError, match="plugin: there is no file"):
        translate(["--model", "adav_llava", "--model_args", "pretrained=x,plugin=nowhere.py,method=nowhere"])


def test_braces_hold_a_model_argument_together():
    text = 'pretrained=x, options={"min_share": 0.1, "positions": "original"},overall_tokens=36'
    assert split_model_args(text) == [
        "pretrained=x",
        'options={"min_share": 0.1, "positions": "original"}',
        "overall_tokens=36",
    ]
    command, _ = translate(["--model", "adav_llava", "--model_args", text])
    assert model_args(command)["options"] == '{"min_share": 0.1, "positions": "original"}'
    with pytest.raises(UserError, match="options.min_share"):
        translate(["--model", "adav_llava", "--model_args", 'pretrained=x,options={"min_share": 2}'])


TASKS = {
    "docvqa": "docvqa_val",
    "flickr30k": "flickr30k_test",
    "nocaps": "nocaps_val",
    "ocrbench": "ocrbench",
    "textvqa": "textvqa_val",
    "vqav2_val": "vqav2_val",
}


def test_the_scripts_are_this_command(tmp_path):
    """With a python that shows what it is asked to run."""
    scripts = REPOSITORY / "scripts" / "lmms_eval"
    assert {path.stem for path in scripts.glob("*.sh")} == {*TASKS, "run", "vllm"}
    checkout = tmp_path / "checkout"
    (checkout / ".venv" / "bin").mkdir(parents=True)
    python = checkout / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    shutil.copytree(scripts, checkout / "scripts" / "lmms_eval")
    environment = {"PATH": os.environ["PATH"], "CKPT": "some/where", "BATCH_SIZE": "4", "MODEL_ARGS": "method=cls"}
    for script, task in TASKS.items():
        command = ["bash", str(checkout / "scripts" / "lmms_eval" / f"{script}.sh"), "144", "--limit", "2"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        config = checkout / "adav_configs.json"
        assert done.stdout.splitlines() == [
            *["-m", "llava.integrations.lmms_eval.command", "--model", "adav_llava", "--model_args"],
            f"pretrained=some/where,config={config},overall_tokens=144,method=cls",
            *["--tasks", task, "--batch_size", "4", "--log_samples"],
            *["--output_path", str(checkout / "runs" / "lmms_eval"), "--limit", "2"],
        ]
    done = subprocess.run(command[:2], env={**environment, "RANKS": "2"}, capture_output=True, text=True, check=True)
    ranks = [
        "-m",
        "llava.common.torchrun",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "llava.integrations.lmms_eval.command",
    ]
    assert done.stdout.splitlines()[:7] == ranks and "overall_tokens" not in done.stdout


def test_the_script_of_vllm_names_a_file_with_the_configuration(tmp_path):
    """Model arguments are split at commas, so the configuration goes through a file, which is gone afterwards."""
    python = tmp_path / "python"
    # It writes the configuration as our own Python does, and shows what lmms-eval is asked and what the file has.
    python.write_text(
        f"""#!/bin/sh
if [ "$2" = llava.config ]; then exec {sys.executable} "$@"; fi
printf "%s\\n" "$@"
cat "$(printf "%s" "$6" | sed 's/.*adav": "//; s/"}}.*//')"
"""
    )
    python.chmod(0o755)
    script = REPOSITORY / "scripts" / "lmms_eval" / "vllm.sh"
    environment = {
        "PATH": os.environ["PATH"],
        "CKPT": "some/where",
        "VLLM_PYTHON": str(python),
        "TMPDIR": str(tmp_path),
    }
    environment |= {"BATCH_SIZE": "4", "MODEL_ARGS": "dtype=float32,enforce_eager=True"}
    done = subprocess.run(
        ["bash", str(script), "docvqa_val", "58", "--limit", "2"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[:5] == ["-m", "lmms_eval", "--model", "vllm", "--model_args"]
    model, settings, *more = split_model_args(lines[5])
    assert model == "model=some/where" and more == ["dtype=float32", "enforce_eager=True"]
    path = Path(json.loads(settings.removeprefix("mm_processor_kwargs="))["adav"])
    rest = ["--tasks", "docvqa_val", "--batch_size", "4", "--log_samples"]
    assert lines[6:11] == rest and lines[13:15] == ["--limit", "2"]
    written = json.loads("".join(lines[15:]))
    assert written["overall_tokens"] == 58 and written["method"] == "adav"
    assert path.parent == tmp_path and not path.exists()

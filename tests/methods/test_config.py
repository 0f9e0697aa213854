"""adav_configs.json: every key checked, every error one sentence that says what, where, and what is allowed."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from llava.config import DEFAULT_FILE, AdaVConfig, ConfigError

ROOT = Path(__file__).resolve().parents[2]


def write(tmp_path, content) -> Path:
    path = tmp_path / "adav_configs.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_the_shipped_file_is_valid_and_is_the_documented_one():
    config = AdaVConfig.load()
    assert (config.method, config.overall_tokens) == ("adav", 144)
    written = json.loads(DEFAULT_FILE.read_text())
    assert {k: v for k, v in config.to_dict().items() if k in written} == written
    link = ROOT / "scripts" / "adav_configs.json"
    assert link.is_symlink() and link.resolve() == DEFAULT_FILE


def test_overrides_win_and_the_digest_tells_settings_apart(tmp_path):
    path = write(tmp_path, {"method": "cls", "overall_tokens": 58})
    assert AdaVConfig.load(path).overall_tokens == 58
    assert AdaVConfig.load(path, overall_tokens=29).overall_tokens == 29
    configs = [
        AdaVConfig.load(path),
        AdaVConfig.load(path, overall_tokens=29),
        AdaVConfig.load(path, method="t2i"),
        AdaVConfig.load(path, options={"positions": "original"}),
        AdaVConfig.load(path, text_init_cache=21),
    ]
    assert len({c.digest for c in configs}) == len(configs)
    assert AdaVConfig.load(path).digest == AdaVConfig(method="cls", overall_tokens=58).digest


def test_a_file_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_text(AdaVConfig(overall_tokens=7).__str__(), encoding="utf-8-sig")
    assert AdaVConfig.load(tmp_path / "a.json").overall_tokens == 7


def test_environment_names_another_file(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAV_CONFIG", str(write(tmp_path, {"overall_tokens": 7})))
    assert AdaVConfig.load().overall_tokens == 7


BAD = [
    ('{\n "method": "adav",\n', ["line 3", "the file ends"]),
    ({"method": "fastvlm"}, ["method", '"fastvlm"', "adav", "fastervlm", "none"]),
    ({"overall_token": 3}, ["overall_token", "overall_tokens"]),
    ({"overall_tokens": 0}, ["overall_tokens", "0", "at least 1"]),
    ({"overall_tokens": -5}, ["overall_tokens", "-5"]),
    ({"overall_tokens": "144"}, ["overall_tokens", '"144"']),
    ({"overall_tokens": 14.5}, ["overall_tokens", "14.5"]),
    ({"overall_tokens": True}, ["overall_tokens", "true"]),
    ({"vision_adaptive_attention": 1}, ["vision_adaptive_attention", "true or false"]),
    ({"vision_adaptive_attention_rate": 1.5}, ["vision_adaptive_attention_rate", "1.5", "from 0"]),
    ({"vision_adaptive_attention_rate": -0.1}, ["vision_adaptive_attention_rate", "-0.1"]),
    ({"vision_adaptive_attention_rate": 0.8}, ["compute_rate", "0.7", "0.8"]),
    ({"vision_adaptive_attention_compute_rate": 0.3}, ["compute_rate", "0.3", "0.5"]),
    ({"vision_adaptive_attention_update_interval": 0}, ["update_interval", "0", "at least 1", "-1"]),
    ({"prefill_filter_layer": 0}, ["prefill_filter_layer"]),
    ({"prefill_filter_rate": 1}, ["prefill_filter_rate"]),
    (
        {"vision_adaptive_attention": True, "prefill_filter_flag": True, "prefill_filter_rate": 0.6},
        ["prefill_filter_rate", "0.6", "0.5"],
    ),
    ({"text_pruning_rate": "half"}, ["text_pruning_rate", "half"]),
    ({"text_init_cache": -1}, ["text_init_cache"]),
    ({"text_rule": "h3o"}, ["text_rule", "h3o", "history", "direct"]),
    ({"text_heavy_share": 1.1}, ["text_heavy_share"]),
    ({"all_use_h2o": None}, ["all_use_h2o", "null"]),
    ({"h2o_heavy_share": 0.1}, ["h2o_heavy_share", "h2o_recent_share"]),
    ({"h2o_heavy_share": 0.6, "h2o_recent_share": 0.6}, ["h2o_heavy_share", "at most 1"]),
    ({"options": []}, ["options", "object"]),
    ({"options": {"min_share": 0.6}}, ["options.min_share", "0.6", "0.5"]),
    ({"options": {"temperature": 0}}, ["options.temperature"]),
    ({"options": {"compat": "publik"}}, ["options.compat", "publik", "public"]),
    ({"options": {"positions": "orig"}}, ["options.positions", "reindexed", "original"]),
    ({"options": {"text_scope": "all"}}, ["options.text_scope", "after", "turn"]),
    ({"options": {"anyres": "fast"}}, ["options.anyres", "official", "fastervlm"]),
    ({"options": {"compat": "public", "anyres": "official"}}, ["compat", "anyres"]),
    ({"method": "hiprune", "options": {"compat": "public", "anyres": "official"}}, ["compat", "anyres"]),
    ({"options": {"dominant": 0, "contextual": 10}}, ["options.dominant", "0", "at least 1"]),
    ({"options": {"dominant": 54, "contextual": 10.0}}, ["options.contextual", "10.0", "whole number"]),
    ({"options": {"dominant": 54}}, ["options.dominant", "options.contextual", "together"]),
    ({"options": {"contextual": 10}}, ["options.dominant", "options.contextual", "together"]),
    ({"options": {"crops": -1}}, ["options.crops", "-1", "at least 0"]),
    ({"options": {"crops": 1.5}}, ["options.crops", "1.5", "whole number"]),
    ({"options": {"crop_share": 1.2}}, ["options.crop_share", "1.2", "0 to 1"]),
    ({"options": {"crops": 1, "crop_share": 0.5}}, ["options.crops", "options.crop_share", "one of them"]),
    ({"options": {"relevance": "cosine"}}, ["options.relevance", "cosine", "clip", "embeddings"]),
    ({"options": {"relevance": "clip"}}, ["options.relevance", "options.text_tower"]),
    ({"options": {"text_tower": " "}}, ["options.text_tower", "CLIP"]),
    ({"options": {"theta": 1}}, ["options.theta", "1", "below 1"]),
    ({"options": {"alpha": -0.5}}, ["options.alpha", "-0.5", "at least 0"]),
    ({"options": {"strength": "1"}}, ["options.strength", '"1"', "at least 0"]),
    ('{"method": "adav", // the method\n "overall_tokens": 144}', ["line 1, column 20", "comments"]),
    ('{\n  "method": "adav",\n  # tokens\n  "overall_tokens": 144\n}', ["line 3, column 3", "comments"]),
    ('{"method": "adav",}', ["line 1"]),
    ("", ["line 1, column 1", "ends"]),
    ("[1]", ["object"]),
    ('{"method": "adav", "method": "cls"}', ["method", "twice"]),
    ('{"vision_adaptive_attention_rate": NaN}', ["NaN"]),
]


@pytest.mark.parametrize("content, words", BAD, ids=[str(c)[:60] for c, _ in BAD])
def test_bad_configuration_is_one_clear_sentence(tmp_path, content, words):
    path = write(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        AdaVConfig.load(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message, message


def test_bad_overrides_and_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        AdaVConfig.load(tmp_path / "nowhere.json")
    path = write(tmp_path, {})
    with pytest.raises(ConfigError, match="overall_tokens"):
        AdaVConfig.load(path, overall_tokens=0)
    with pytest.raises(ConfigError, match="budget"):
        AdaVConfig.load(path, budget=3)
    with pytest.raises(ConfigError):
        AdaVConfig(method="adaw")


def test_limits_themselves_are_allowed(tmp_path):
    good = {
        "overall_tokens": 1,
        "vision_adaptive_attention_rate": 0,
        "vision_adaptive_attention_compute_rate": 0,
        "vision_adaptive_attention_update_interval": -1,
        "text_heavy_share": 1,
        "text_init_cache": 0,
        "h2o_heavy_share": 0.125,
        "h2o_recent_share": 0.375,
        "prefill_filter_flag": True,
        "prefill_filter_rate": 0.9,  # only compared with the vision rate where both are on
        "options": {"min_share": 0.5, "temperature": 1e-3, "compat": None},
    }
    config = AdaVConfig.load(write(tmp_path, good))
    assert all(getattr(config, key) == value for key, value in good.items())
    AdaVConfig.load(write(tmp_path, {"options": {"min_share": 0, "theta": 0, "alpha": 0, "strength": 0}}))
    AdaVConfig.load(write(tmp_path, {"options": {"dominant": 1, "contextual": 0, "relevance": "embeddings"}}))
    AdaVConfig.load(
        write(tmp_path, {"options": {"text_tower": "openai/clip-vit-large-patch14-336", "relevance": "clip"}})
    )


def test_command_prints_the_configuration_and_imports_no_torch(tmp_path):
    path = write(tmp_path, {"method": "t2i"})
    code = f"import sys; sys.argv[1:] = [{str(path)!r}, '--overall-tokens', '9']; import runpy; "
    code += "runpy.run_module('llava.config', run_name='__main__'); assert 'torch' not in sys.modules"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    printed = json.loads(out)
    assert (printed["method"], printed["overall_tokens"]) == ("t2i", 9)
    assert list(printed) == [f.name for f in fields(AdaVConfig)]
    bad = subprocess.run(
        [sys.executable, "-m", "llava.config", str(path), "--overall-tokens", "abc"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and "overall_tokens" in bad.stderr


@pytest.mark.parametrize(
    ("given", "code", "words"),
    [
        ({"options": {"min_shre": 0.2}}, 0, ["warning: options.min_shre is set", '"adav" does not use it']),
        ({"method": "visionzip", "options": {"positions": "original"}}, 2, ["error:", "makes tokens"]),
        ({"method": "adav_zoom", "options": {"detail_share": 0.1}}, 2, ["error:", "leaves crops unencoded"]),
        (
            {"method": "prunesid", "options": {"positions": "original", "compat": "public"}},
            2,
            ["error:", "makes tokens"],
        ),
    ],
)
def test_command_tells_of_options_that_do_not_fit(tmp_path, given, code, words):
    done = subprocess.run(
        [sys.executable, "-m", "llava.config", str(write(tmp_path, given))], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == code and done.stderr.count("\n") == 1 and all(word in done.stderr for word in words)


def test_compat_public_leaves_the_tiles_of_apet_and_dart():
    """Their public code runs on the checkpoint's own tiles, newline tokens included."""
    for anyres in ("official", "fastervlm"):
        chosen = AdaVConfig(method="dart", options={"compat": "public", "anyres": anyres})
        assert chosen.option("anyres") == anyres
    for method in ("apet", "dart"):
        assert AdaVConfig(method=method, options={"compat": "public"}).option("anyres") == "official"
    assert AdaVConfig(method="hiprune", options={"compat": "public"}).option("anyres") == "fastervlm"

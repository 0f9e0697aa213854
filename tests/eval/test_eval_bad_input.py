"""Bad input on the evaluation path: one sentence on stderr and exit code 2, before any model is loaded."""

import importlib
import json
import runpy
import subprocess
import sys

import pytest
from benchmark_data import make_benchmark
from eval_data import REPOSITORY, SPLIT, environment, make_place, make_vqav2

from llava.eval import launch


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Everything that a good command line needs, so that each test spoils one thing."""
    make_place(tmp_path, monkeypatch)
    make_vqav2(tmp_path / "data")
    return tmp_path


def refused(place, capsys, *extra, benchmark="vqav2", **replaced) -> str:
    """The sentence with which the launcher refuses."""
    flags = {"checkpoint": "llava", "data-root": "data", "output": "runs", "config": "config.json", **replaced}
    argv = [
        benchmark,
        *(part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))),
    ]
    with pytest.raises(SystemExit) as stopped:
        launch.main([*argv, *map(str, extra)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2, said
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert not (place / "runs").exists(), "a run that cannot start leaves no folder"
    return said


def test_the_good_command_line_is_good(place):
    argv = ["vqav2", "14", "--checkpoint", "llava", "--data-root", "data", "--config", "config.json", "--method", "cls"]
    (run,) = launch.plan(launch.parse(argv), shards=1, devices=[])
    assert run.generation.device == "cpu" and len(run.samples) == 12
    assert (run.config.method, run.config.overall_tokens) == ("cls", 14)


@pytest.mark.parametrize("tokens", ["0", "-5", "abc", "1.5", "²"])
def test_tokens(place, capsys, tokens):
    assert f"<tokens> is '{tokens}', allowed is a whole number of at least 1" in refused(place, capsys, tokens)


@pytest.mark.parametrize(
    "content, says",
    [
        ('{"method": "best"}', '"method" is "best", allowed is one of'),
        ('{"metod": "adav"}', 'unknown key "metod"'),
        ('{"text_pruning_rate": 1.4}', '"text_pruning_rate" is 1.4, allowed is'),
        ('{\n  // the method\n  "method": "adav"\n}', "line 2, column 3"),
        ('{"method": "adav",}', "line 1, column"),
    ],
)
def test_configuration(place, capsys, content, says):
    (place / "config.json").write_text(content)
    assert says in refused(place, capsys)


def test_missing_configuration(place, capsys):
    assert "nowhere.json: no such configuration file" in refused(place, capsys, config="nowhere.json")


def test_configuration_named_by_the_environment(place, capsys, monkeypatch):
    (place / "mine.json").write_text('{"method": "best"}')
    monkeypatch.setenv("ADAV_CONFIG", str(place / "mine.json"))
    assert "mine.json" in refused(place, capsys, config=None)


@pytest.mark.parametrize("flags", [["--shards", "0"], ["--nonsense"], ["--method"], ["--dtype", "int8"], ["14", "15"]])
def test_flags(place, capsys, flags):
    refused(place, capsys, *flags)


def test_tokens_and_flag_that_differ(place, capsys):
    assert "give one of them" in refused(place, capsys, 14, "--overall-tokens", 15)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--split", "train"], 'has no split "train", allowed are test-dev, val'),
        (["--split", "val"], "missing, benchmark vqav2 needs it"),
        (["--subset", "0"], "--subset"),
        (["--subset", "3", "--limit", "3"], "give one of them"),
        (["--subset", "3", "--subset-seed", "x"], "--subset-seed"),
    ],
)
def test_which_questions(place, capsys, flags, says):
    assert says in refused(place, capsys, *flags)


def test_subset_of_the_environment(place, capsys, monkeypatch):
    monkeypatch.setenv("SUBSET", "many")
    assert "--subset" in refused(place, capsys)


def test_all_benchmarks_take_no_split(place, capsys):
    with pytest.raises(SystemExit):
        launch.main(["all", "--checkpoint", "llava", "--split", "val", "--config", "config.json"])
    assert "--split goes with one benchmark" in capsys.readouterr().err


def test_a_wrong_image_root(place, capsys):
    folder = place / "data" / "vqav2"
    (folder / "test2015").rename(folder / "elsewhere")
    assert "test2015: missing, benchmark vqav2 needs it" in refused(place, capsys)
    (folder / "test2015").mkdir()
    assert "(4 of 4 images are missing)" in refused(place, capsys)


def test_conversation_template(place, capsys):
    assert 'unknown conversation template "v9"' in refused(place, capsys, "--conv-mode", "v9")


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "data/nowhere", "a/b/c", "playground/nowhere"])
def test_missing_checkpoint(place, capsys, name):
    said = refused(place, capsys, checkpoint=name)
    assert f"{name}: no such" in said and "folder" in said


def test_no_checkpoint_named(place, capsys):
    assert "no checkpoint is named" in refused(place, capsys, checkpoint=None)


def test_folder_that_is_no_checkpoint(place, capsys):
    assert "data: has no config.json" in refused(place, capsys, checkpoint="data")


def test_missing_benchmark_files_come_with_the_download_page(place, capsys):
    (place / "elsewhere").mkdir()
    said = refused(place, capsys, **{"data-root": "elsewhere"})
    assert f"{SPLIT}.jsonl: missing" in said and "https://" in said


def test_all_missing_files_are_named_at_once(place, capsys):
    """Of one benchmark, and with `all` of every benchmark; --plan says the same."""
    (place / "elsewhere").mkdir()
    files = {
        "mme": ("MME/llava_mme.jsonl", "MME/MME_Benchmark_release_version"),
        "textvqa": tuple(
            f"textvqa/{n}" for n in ("llava_textvqa_val_v051_ocr.jsonl", "train_images", "TextVQA_0.5.1_val.json")
        ),
    }
    for name, missing in files.items():
        said = refused(place, capsys, "--plan", benchmark=name, **{"data-root": "elsewhere"})
        assert all(f"elsewhere/{file}" in said for file in missing), said
    for extra in ([], ["--plan"]):
        said = refused(place, capsys, *extra, benchmark="all", **{"data-root": "elsewhere"})
        assert all(f"elsewhere/{file}" in said for missing in files.values() for file in missing), said


def test_all_missing_images_are_named(place, capsys):
    folder = place / "data" / "vqav2" / "test2015"
    names = sorted(path.name for path in folder.iterdir())
    for name in names[1:]:
        (folder / name).unlink()
    said = refused(place, capsys, "--plan")
    assert all(name in said for name in names[1:]) and f"({len(names) - 1} of {len(names)} images are missing)" in said


def test_a_place_for_data_that_is_named_must_be_there(place, capsys, monkeypatch):
    assert "--data-root: there is no folder nowhere" in refused(place, capsys, **{"data-root": "nowhere"})
    monkeypatch.setenv("DATA_ROOT", "nowhere")
    for name in ("shapes", "vqav2"):  # the first draws its own data
        assert "there is no folder nowhere" in refused(place, capsys, benchmark=name, **{"data-root": None})
    assert not (place / "nowhere").exists()


def test_question_file(place, capsys):
    path = place / "data" / "vqav2" / f"{SPLIT}.jsonl"
    good = path.read_text()
    path.write_text(good + "{not json\n")
    assert "line 13: is no JSON" in refused(place, capsys)
    path.write_text(good + good.splitlines()[3] + "\n")
    assert "line 13: is identical to line 4" in refused(place, capsys)
    path.write_text(good + json.dumps({"question_id": 1000, "text": "again"}) + "\n")
    assert "line 13: question_id 1000 is already in line 1" in refused(place, capsys)
    path.write_text(good + json.dumps({"question_id": 77, "text": "not in the split"}) + "\n")
    assert "lacks 1 of the 13 question_ids" in refused(place, capsys)


def test_labels_that_do_not_match_the_questions(place, capsys):
    make_benchmark("gqa", place / "data")
    path = place / "data" / "gqa" / "data" / "testdev_balanced_questions.json"
    labels = json.loads(path.read_text())
    labels["1"] = labels.pop("20000001")
    path.write_text(json.dumps(labels))
    said = refused(place, capsys, benchmark="gqa")
    assert "has no label for 1 of 8 questions (the first: 20000001, line 2 of llava_gqa_testdev_balanced.jsonl)" in said
    assert "and has 1 labels of questions that are not asked (the first: 1); --partial scores" in said
    argv = ["gqa", "--checkpoint", "llava", "--data-root", "data", "--config", "config.json", "--partial"]
    (run,) = launch.plan(launch.parse(argv), shards=1, devices=[])
    assert len(run.samples) == 8, "they are asked all the same"


def test_images(place, capsys):
    path = place / "data" / "vqav2" / f"{SPLIT}.jsonl"
    good = path.read_text()
    path.write_text(good.replace("COCO_test2015_000000000001.jpg", "../test.jpg", 1))
    assert 'line 2: image "../test.jpg" leaves the image folder' in refused(place, capsys)
    path.write_text(good)
    (place / "data" / "vqav2" / "test2015" / "COCO_test2015_000000000002.jpg").unlink()
    assert 'line 3: image "COCO_test2015_000000000002.jpg" is not in' in refused(place, capsys)


def test_unwritable_output(place, capsys):
    (place / "file").write_text("")
    assert "cannot be written" in refused(place, capsys, output="file/runs")


# ------------------------------------------------------------------------------------------------------ other commands
@pytest.mark.parametrize(
    "command",
    [
        "llava.eval.demo",
        "llava.analysis.fit_fitprune_table",
        "llava.costs.flops",
        "llava.analysis.self_check",
        "llava.model.export",
        "llava.shapes.training.run",
        "scripts/merge_lora_weights.py",
    ],
)
def test_an_unknown_flag_is_one_sentence_without_the_usage_text(monkeypatch, capsys, command):
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script adds its checkout
    if command.endswith(".py"):
        main = runpy.run_path(str(REPOSITORY / command))["main"]
    else:
        main = importlib.import_module(command).main
    monkeypatch.setattr(sys, "argv", ["command", "--nonsense", "1"])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["--plan"]])
def test_eval_all_says_that_it_needs_a_family(arguments):
    script = ["bash", str(REPOSITORY / "scripts" / "eval_all.sh")]
    done = subprocess.run([*script, *arguments], env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "needs a family first, v1_5, v1_6 or v1_6_34B" in done.stderr

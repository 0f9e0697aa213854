"""The commands around the scorers: llava.eval.score, and LLaVA's names with LLaVA's flags."""

import importlib.util
import json
from pathlib import Path

import pytest
from benchmark_data import make_benchmark, write_rows, yes_no
from test_benchmarks import drop_label

from llava.eval import eval_pope, eval_science_qa, eval_textvqa, score
from llava.eval.benchmarks import BENCHMARKS

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def script(name):
    """scripts/<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def answers(tmp_path):
    """answers(name, texts) -> an answer file as LLaVA's workers write it; the data lie in tmp_path / "data"."""

    def write(name, text, split=None, path="answers.jsonl"):
        make_benchmark(name, tmp_path / "data")
        samples = BENCHMARKS[name](tmp_path / "data", None, split).load()
        rows = [
            {
                "question_id": sample.question_id,
                "prompt": sample.text,
                "text": text(i),
                "answer_id": "x",
                "metadata": {},
            }
            for i, sample in enumerate(samples)
        ]
        path = tmp_path / path
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rows(path, rows)
        return path

    return write


def refused(main, argv, capsys) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(map(str, argv)))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


def test_score_prints_json(answers, tmp_path, capsys):
    path = answers("pope", yes_no)
    score.main(["pope", str(path), "--data-root", str(tmp_path / "data"), "--output", str(tmp_path / "score.json")])
    printed = json.loads(capsys.readouterr().out)
    assert printed["f1"] == 1.0 and printed == json.loads((tmp_path / "score.json").read_text())


def test_score_says_in_one_sentence_what_is_wrong(answers, tmp_path, capsys):
    path = answers("gqa", yes_no)
    data = ["--data-root", tmp_path / "data"]
    assert 'unknown benchmark "gqq", allowed are shapes, shapes_captions, vqav2' in refused(score.main, ["gqq", path], capsys)
    assert "has no split" in refused(score.main, ["gqa", path, "--split", "val", *data], capsys)
    assert "no folder nowhere" in refused(score.main, ["gqa", path, "--data-root", "nowhere"], capsys)
    assert "nowhere.jsonl: no such file" in refused(score.main, ["gqa", "nowhere.jsonl", *data], capsys)
    assert "missing, benchmark seed needs it; https://" in refused(score.main, ["seed", path, *data], capsys)
    path.write_text("")
    assert "holds no answer" in refused(score.main, ["gqa", path, *data], capsys)


def test_a_part_is_scored_only_when_asked_for(answers, tmp_path, capsys):
    path = answers("gqa", lambda i: "red")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    argv = ["gqa", path, "--data-root", tmp_path / "data"]
    assert "4 of 8 questions have no answer (--partial" in refused(score.main, argv, capsys)
    score.main([*map(str, argv), "--partial"])
    assert json.loads(capsys.readouterr().out) == {
        "partial": "4 of 8 questions",
        "accuracy": 0.25,
        "questions": 4,
        "per_kind": {"binary": 0.0, "open": 0.5},
    }


def test_eval_pope(answers, tmp_path, capsys):
    path, folder = answers("pope", yes_no), tmp_path / "data" / "pope"
    argv = ["--annotation-dir", folder / "coco", "--question-file", folder / "llava_pope_test.jsonl"]
    eval_pope.main([*map(str, argv), "--result-file", str(path)])
    out = capsys.readouterr().out
    assert "Category: adversarial, # samples: 3\nf1: 1.0000" in out and "Mean F1: 100.00" in out
    (folder / "coco" / "coco_pope_random.json").unlink()
    assert "coco_pope_random.json: no such file" in refused(eval_pope.main, [*argv, "--result-file", path], capsys)


def test_eval_textvqa(answers, tmp_path, capsys):
    path = answers("textvqa", lambda i: "Unanswerable", path="results/model.jsonl")
    annotation = ["--annotation-file", str(tmp_path / "data" / "textvqa" / "TextVQA_0.5.1_val.json")]
    for flags in (["--result-file", str(path)], ["--result-dir", str(path.parent)]):
        eval_textvqa.main(annotation + flags)
        assert capsys.readouterr().out == "model\nSamples: 8\nAccuracy: 90.00%\n\n"
    assert "no answer file is named" in refused(eval_textvqa.main, annotation, capsys)


def test_eval_science_qa(answers, tmp_path, capsys):
    path = answers("sqa", lambda i: "A")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    images = [row | {"prompt": "<image>\n" + row["prompt"]} if i % 3 != 2 else row for i, row in enumerate(rows)]
    write_rows(path, images)
    base = ["--base-dir", str(tmp_path / "data" / "scienceqa"), "--result-file", str(path)]
    outputs = ["--output-file", str(tmp_path / "out.jsonl"), "--output-result", str(tmp_path / "result.json")]
    eval_science_qa.main(base + outputs)
    assert capsys.readouterr().out == "Total: 8, Correct: 4, Accuracy: 50.00%, IMG-Accuracy: 50.00%\n"
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["acc"] == 50.0 and result["results"] == {str(10 + i): 0 for i in range(8)}
    assert len(json.loads((tmp_path / "out.jsonl").read_text())["incorrect"]) == 4
    write_rows(path, images[1:])
    assert "1 of its 8 questions have no answer" in refused(eval_science_qa.main, base, capsys)


def test_llavas_names_score_in_part_where_a_label_is_missing(answers, tmp_path, capsys):
    path, data = answers("sqa", lambda i: "A"), tmp_path / "data"
    base = ["--base-dir", str(data / "scienceqa"), "--result-file", str(path)]
    drop_label("sqa", data)
    assert "1 of 8 answered questions are not in it" in refused(eval_science_qa.main, base, capsys)
    eval_science_qa.main([*base, "--partial"])
    assert capsys.readouterr().out.startswith("Total: 7, Correct: 4,")

    path, file = answers("textvqa", lambda i: "Unanswerable"), data / "textvqa" / "TextVQA_0.5.1_val.json"
    drop_label("textvqa", data)
    eval_textvqa.main(["--annotation-file", str(file), "--result-file", str(path), "--partial"])
    assert "Samples: 7\nAccuracy: 90.00%" in capsys.readouterr().out

    path, folder = answers("pope", yes_no), data / "pope"
    drop_label("pope", data)
    files = ["--annotation-dir", folder / "coco", "--question-file", folder / "llava_pope_test.jsonl"]
    eval_pope.main([*map(str, files), "--result-file", str(path), "--partial"])
    assert "Mean F1: 100.00, accuracy: 100.00, of 7 questions" in capsys.readouterr().out

    path, file = answers("seed", lambda i: "AB"[i % 2]), data / "seed_bench" / "SEED-Bench.json"
    drop_label("seed", data)
    argv = ["--annotation-file", file, "--result-file", path, "--result-upload-file", tmp_path / "u", "--partial"]
    script("convert_seed_for_submission").main(list(map(str, argv)))
    assert json.loads(capsys.readouterr().out)["questions"] == 7
    write_rows(path, [json.loads(path.read_text().splitlines()[0])] * 2)
    said = refused(script("convert_seed_for_submission").main, argv, capsys)
    assert "1 of 2 answers are to questions that are answered already" in said


def test_convert_gqa(answers, tmp_path):
    path = answers("gqa", lambda i: "Red.")
    script("convert_gqa_for_eval").main(["--src", str(path), "--dst", str(tmp_path / "p.json")])
    assert json.loads((tmp_path / "p.json").read_text())[1] == {"questionId": "20000001", "prediction": "red"}


def test_convert_mmvet(answers, tmp_path, capsys):
    path = answers("mmvet", str)
    argv = ["--src", str(path), "--dst", str(tmp_path / "new" / "r.json")]
    main = script("convert_mmvet_for_eval").main
    main(argv)
    assert json.loads((tmp_path / "new" / "r.json").read_text()) == {f"v1_{i}": str(i) for i in range(8)}
    path.write_text(path.read_text() * 2)
    assert "8 of 16 answers are to questions that are answered already" in refused(main, argv, capsys)


def test_convert_vqav2(answers, tmp_path, capsys):
    answers("vqav2", lambda i: "Two dogs.", path="data/vqav2/answers/SPLIT/CKPT/merge.jsonl")
    folder = tmp_path / "data" / "vqav2"
    argv = ["--dir", str(folder), "--ckpt", "CKPT", "--split", "SPLIT"]
    main = script("convert_vqav2_for_submission").main
    main(argv)
    upload = json.loads((folder / "answers_upload" / "SPLIT" / "CKPT.json").read_text())
    assert upload[0] == {"question_id": 1000, "answer": "2 dogs"}
    assert upload[-1] == {"question_id": 9999, "answer": ""} and len(upload) == 9
    whole = folder / "llava_vqav2_mscoco_test2015.jsonl"
    whole.write_text("".join(whole.read_text().splitlines(keepends=True)[2:]))
    assert "2 of 8 answers are to none of the split's questions" in refused(main, argv, capsys)


def test_convert_vizwiz(answers, tmp_path, capsys):
    path = answers("vizwiz", lambda i: "The Cat")
    questions = tmp_path / "data" / "vizwiz" / "llava_test.jsonl"
    argv = [
        "--annotation-file",
        str(questions),
        "--result-file",
        str(path),
        "--result-upload-file",
        str(tmp_path / "u"),
    ]
    main = script("convert_vizwiz_for_submission").main
    main(argv)
    assert json.loads((tmp_path / "u").read_text())[0] == {"image": "VizWiz_test_00000000.jpg", "answer": "cat"}
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:7]))
    assert "1 of 8 questions have no answer" in refused(main, argv, capsys)


def test_convert_mmbench(answers, tmp_path, capsys):
    openpyxl = pytest.importorskip("openpyxl", reason="MMBench's upload is an .xlsx file")
    path = answers("mmbench", lambda i: "B", path="answers/run.jsonl")
    argv = ["--annotation-file", tmp_path / "data" / "mmbench" / "mmbench_dev_20230712.tsv"]
    argv += ["--result-dir", path.parent, "--upload-dir", tmp_path / "up", "--experiment", "run"]
    main = script("convert_mmbench_for_submission").main
    main(list(map(str, argv)))
    table = list(openpyxl.load_workbook(tmp_path / "up" / "run.xlsx").active.values)
    assert table[0][4] == "prediction" and [row[4] for row in table[1:]] == ["B"] * 8
    path.write_text(path.read_text().replace('"question_id": 241,', '"question_id": 7,'))
    assert "1 of 8 answered questions are not in it" in refused(main, argv, capsys)


def test_convert_seed(answers, tmp_path, capsys):
    path = answers("seed", lambda i: "AB"[i % 2])
    argv = ["--annotation-file", str(tmp_path / "data" / "seed_bench" / "SEED-Bench.json")]
    argv += ["--result-file", str(path), "--result-upload-file", str(tmp_path / "u.jsonl")]
    main = script("convert_seed_for_submission").main
    main(argv)
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1.0
    assert json.loads((tmp_path / "u.jsonl").read_text().splitlines()[1]) == {
        "question_id": "101001",
        "prediction": "B",
    }
    with open(path, "a") as file:
        file.write(json.dumps({"question_id": "v8", "text": "A"}) + "\n")
    main(argv)
    assert json.loads(capsys.readouterr().out)["questions"] == 9, "with the videos, where they are answered"


def test_convert_mme(answers, tmp_path, capsys):
    path = answers("mme", lambda i: ("Yes", "No")[i % 2], path="data/MME/answers/run.jsonl")
    argv = ["--experiment", "run", "--folder", str(tmp_path / "data" / "MME")]
    main = script("convert_answer_to_mme").main
    main(argv)
    written = tmp_path / "data" / "MME" / "eval_tool" / "answers" / "run" / "existence.txt"
    assert written.read_text().splitlines()[0] == "0000.txt\tIs there a shape? Please answer yes or no.\tYes\tYes"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert "1 of its 8 questions have no answer" in refused(main, argv, capsys)

"""Question files, answer files and run folders: everything of the evaluation that needs no model."""

import json
import subprocess
import sys

import pytest
from benchmark_data import make_benchmark
from eval_data import SPLIT, environment, make_folder_only_checkpoint, make_vqav2, write_rows

from llava.common.errors import UserError
from llava.common.files import repair
from llava.common.find_checkpoint import find_checkpoint
from llava.config import AdaVConfig
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.benchmarks.questions import check_images, read_questions
from llava.eval.benchmarks.subset import Subset
from llava.eval.runs.run import Run
from llava.eval.runs.shard_answers import AnswerFile, collect, merge
from llava.eval.runs.shard_progress import Progress
from llava.eval.runs.work_order import Generation


def test_the_launcher_imports_no_torch():
    code = "import sys, llava.eval.launch; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# ----------------------------------------------------------------------------------------------- question files
def questions(tmp_path, *rows):
    path = tmp_path / "questions.jsonl"
    write_rows(path, rows)
    return path


def test_a_sample_is_told_apart_by_id_image_and_text_and_by_its_line_where_they_repeat(tmp_path):
    row = {"question_id": 7, "image": "a.jpg", "text": "Is it red?"}
    path = questions(
        tmp_path, row, {**row, "text": "Is it blue?"}, {**row, "category": "popular"}, {**row, "image": "b.jpg"}
    )
    keys = [sample.key for sample in read_questions(path)]
    assert keys == [
        (7, "a.jpg", "Is it red?", 1),
        (7, "a.jpg", "Is it blue?"),
        (7, "a.jpg", "Is it red?", 3),
        (7, "b.jpg", "Is it red?"),
    ]


def test_a_question_file_with_a_byte_order_mark(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question_id": 1, "text": "What?"}\n', encoding="utf-8-sig")
    assert [sample.text for sample in read_questions(tmp_path / "q.jsonl")] == ["What?"]


@pytest.mark.parametrize(
    "line, says",
    [
        ('{"question_id": 1, "text": "x"', "line 2: is no JSON"),
        ("[1, 2]", "line 2: found list"),
        ('{"text": "x"}', 'line 2: has no "question_id"'),
        ('{"question_id": 1.5, "text": "x"}', 'line 2: "question_id" is 1.5'),
        ('{"question_id": 2}', 'line 2: has no "text"'),
        ('{"question_id": 2, "text": "x", "image": 3}', 'line 2: "image" is 3'),
        ('{"question_id": 2, "text": "<image> x"}', 'line 2: "text" holds <image>'),
        ('{"text": "x", "question_id": 1}', "line 2: is identical to line 1"),
    ],
)
def test_a_bad_line_is_named_by_its_number(tmp_path, line, says):
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question_id": 1, "text": "x"}\n' + line + "\n")
    with pytest.raises(UserError, match=says):
        read_questions(path)


@pytest.mark.parametrize(
    "image", ["../secret.jpg", "/etc/hostname", "sub/../../secret.jpg", "link.jpg", "away/secret.jpg", ".."]
)
def test_an_image_path_stays_inside_the_folder(tmp_path, image):
    folder = tmp_path / "images"
    folder.mkdir()
    (tmp_path / "secret.jpg").write_bytes(b"x")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "away").symlink_to(tmp_path)
    path = questions(tmp_path, {"question_id": 1, "image": image, "text": "x"})
    with pytest.raises(UserError, match="line 1: image .* leaves the image folder"):
        check_images(read_questions(path), folder, path)


def test_the_image_folder_may_be_a_link_and_missing_images_are_counted(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jpg").write_bytes(b"x")
    (tmp_path / "images").symlink_to(tmp_path / "real")
    rows = [
        {"question_id": i, "image": name, "text": "x"} for i, name in enumerate(["a.jpg", "b.jpg", "c.jpg", "c.jpg"])
    ]
    path = questions(tmp_path, *rows)
    check_images(read_questions(path)[:1], tmp_path / "images", path)
    with pytest.raises(UserError, match=r'line 2: image "b.jpg" is not in .* \(2 of 3 images are missing\)'):
        check_images(read_questions(path), tmp_path / "images", path)


# ------------------------------------------------------------------------------------------------- answer files
def answer(sample, text="yes"):
    return {"key": list(sample.key), "answer": text, "kept": [5], "total": [16]}


@pytest.fixture
def three(tmp_path):
    return read_questions(questions(tmp_path, *({"question_id": i, "text": f"question {i}"} for i in range(3))))


def test_a_torn_line_is_redone_and_nothing_else(tmp_path, three):
    file = AnswerFile(tmp_path / "shard-0.jsonl")
    file.append([answer(three[0]), answer(three[1])])
    file.close()
    whole = file.path.read_bytes()
    for cut in range(len(whole)):
        file.path.write_bytes(whole[:cut])
        complete = whole[:cut].count(b"\n")
        assert len(collect(tmp_path)[0]) == complete
        repair(file.path)
        assert file.path.read_bytes().count(b"\n") == complete
        again = AnswerFile(file.path)
        again.append([answer(sample) for sample in three[complete:2]])
        again.close()
        assert file.path.read_bytes() == whole


def test_a_damaged_line_before_the_last_is_an_error(tmp_path, three):
    (tmp_path / "shard-0.jsonl").write_text('{"key": [0\n' + json.dumps(answer(three[0])) + "\n")
    with pytest.raises(UserError, match="shard-0.jsonl, line 1: is damaged"):
        collect(tmp_path)


def test_merge_wants_every_sample_exactly_once(tmp_path, three):
    rows = [answer(three[i], f"answer {i}") for i in (2, 0, 1)]
    path = tmp_path / "merge.jsonl"

    def merged(shard_files):
        for i, file_rows in enumerate(shard_files):
            write_rows(tmp_path / f"shard-{i}.jsonl", file_rows)
        return merge(three, collect(tmp_path)[0], path, "model", "salt")

    assert [row["text"] for row in merged([rows[:2], rows[2:]])] == ["answer 0", "answer 1", "answer 2"]
    first = path.read_bytes()
    assert set(json.loads(first.splitlines()[0])) == {
        "question_id",
        "prompt",
        "text",
        "answer_id",
        "model_id",
        "metadata",
    }
    merged([rows, []])
    assert path.read_bytes() == first, "the merged file depends on who answered what"
    with pytest.raises(UserError, match="question 2 is answered twice"):
        merged([rows, rows[:1]])
    with pytest.raises(UserError, match="1 of 3 questions have no answer, the first in line 2"):
        merged([rows[:2], []])
    stranger = {**rows[0], "key": [99, None, "who?"]}
    with pytest.raises(UserError, match="1 answers belong to no question"):
        merged([rows, [stranger]])


def test_an_unreadable_image_counts_as_not_answered_until_it_is(tmp_path, three):
    bad = {"key": list(three[0].key), "error": "truncated"}
    write_rows(tmp_path / "shard-0.jsonl", [bad, answer(three[1])])
    answered, errors = collect(tmp_path)
    assert set(answered) == {three[1].key} and errors == {three[0].key: "truncated"}
    write_rows(tmp_path / "shard-1.jsonl", [answer(three[0])])
    answered, errors = collect(tmp_path)
    assert set(answered) == {three[0].key, three[1].key} and not errors


def test_progress_counts_new_lines_over_all_shards(tmp_path, capsys):
    paths = [tmp_path / "shard-0.jsonl", tmp_path / "shard-1.jsonl"]
    paths[0].write_text("old\n")
    progress = Progress("shapes", 10, paths, 2)
    assert "2 shards loading" in progress.line()
    paths[0].write_text("old\nnew\n")
    paths[1].write_text("new\nnew\ntor")
    progress.update()
    assert progress.done == 3 and progress.line().startswith("shapes: 3/10 on 2 shards")


# -------------------------------------------------------------------------------------------------- run folders
def test_no_two_settings_share_a_folder(tmp_path):
    data = make_vqav2(tmp_path / "data")
    one = make_folder_only_checkpoint(tmp_path / "a" / "llava")
    two = make_folder_only_checkpoint(tmp_path / "b" / "llava", hidden_size=64)
    config = AdaVConfig(method="adav", overall_tokens=14)

    def folder(checkpoint=one, config=config, limit=None, subset=None, **generation):
        found = find_checkpoint(str(checkpoint))
        benchmark = BENCHMARKS["vqav2"](data, found)
        generation = Generation(**{"max_new_tokens": 128, **generation})
        return Run(benchmark, config, found, generation, tmp_path, limit=limit, subset=subset).folder

    folders = [
        folder(),
        folder(checkpoint=two),
        folder(config=AdaVConfig(method="adav", overall_tokens=15)),
        folder(config=AdaVConfig(method="adav", overall_tokens=14, options={"seed": 1})),
        folder(config=AdaVConfig(method="none", overall_tokens=14)),
        folder(limit=3),
        folder(subset=Subset(3)),
        folder(subset=Subset(3, seed=1)),
        folder(temperature=0.5),
        folder(max_new_tokens=16),
        folder(conversation="plain"),
        folder(dtype="float16"),
        folder(device="cuda"),
    ]
    assert len(set(folders)) == len(folders)
    assert folder() == folders[0] and folders[0].name.startswith("adav-14-") and folders[4].name.startswith("none-all-")
    questions = data / "vqav2" / f"{SPLIT}.jsonl"
    questions.write_text(questions.read_text().replace("colour", "shade", 1))
    assert folder() != folders[0], "another question, the same folder"


def test_a_run_is_scored_without_the_groups_of_unreadable_images_only_when_told_to(tmp_path):
    make_benchmark("mme", tmp_path / "data", 8)
    found = find_checkpoint(str(make_folder_only_checkpoint(tmp_path / "llava")))
    benchmark = BENCHMARKS["mme"](tmp_path / "data", found)
    run = Run(benchmark, AdaVConfig(), found, Generation(8), tmp_path / "runs", subset=Subset(6))
    assert len(run.samples) == 6 and run.folder.name.startswith("adav-144-subset6-")
    assert run.asked == {"limit": None, "subset": 6, "seed": 0}
    run.open()
    bad = run.samples[0]
    rows = [{**answer(sample, "Yes"), "key": list(sample.key)} for sample in run.samples[1:]]
    write_rows(run.answers_of(0), [*rows, {"key": list(bad.key), "error": "truncated"}])
    with pytest.raises(UserError, match="cannot be read .*5 of 6 questions are answered, nothing is scored"):
        run.finish()
    assert not (run.folder / "score.json").exists()
    score = run.finish(partial=True)
    partial = "4 questions without an unreadable image, out of 6 of 8 questions, drawn with seed 0"
    assert score["partial"] == partial and score["questions"] == 4, "both questions of the image are left out"
    assert len((run.folder / "merge.jsonl").read_text().splitlines()) == 4
    run.close()


def test_a_run_with_a_missing_label_answers_all_and_is_scored_in_part_only_when_told_to(tmp_path):
    make_benchmark("gqa", tmp_path / "data", 8)
    found = find_checkpoint(str(make_folder_only_checkpoint(tmp_path / "llava")))

    def run(partial):
        benchmark = BENCHMARKS["gqa"](tmp_path / "data", found)
        return Run(benchmark, AdaVConfig(), found, Generation(8), tmp_path / "runs", partial=partial)

    whole, labels = run(False), tmp_path / "data" / "gqa" / "data" / "testdev_balanced_questions.json"
    known = json.loads(labels.read_text())
    labels.write_text(json.dumps({key: label for key, label in known.items() if key != "20000002"}))
    with pytest.raises(UserError, match="has no label for 1 of 8 questions"):
        run(False)
    part = run(True)
    assert part.folder == whole.folder, "answers stay good where the label is added later"
    part.open()
    write_rows(part.answers_of(0), [answer(sample, "red") for sample in part.samples])
    with pytest.raises(UserError, match="has no label for 1 of 8 questions"):
        part.finish()
    score = part.finish(partial=True)
    assert score["partial"] == "7 questions with a label, out of 8 questions" and score["questions"] == 7
    assert len((part.folder / "merge.jsonl").read_text().splitlines()) == 7
    part.close()


def test_a_subset_that_is_the_whole_is_the_whole(tmp_path):
    data = make_vqav2(tmp_path / "data")
    found = find_checkpoint(str(make_folder_only_checkpoint(tmp_path / "llava")))
    runs = [
        Run(BENCHMARKS["vqav2"](data, found), AdaVConfig(), found, Generation(8), tmp_path, subset=subset)
        for subset in (None, Subset(500))
    ]
    assert runs[0].folder == runs[1].folder and runs[0].asked == runs[1].asked
    assert runs[1].benchmark.partial is None


def test_another_split_has_a_folder_of_its_own(tmp_path):
    make_benchmark("vqav2", tmp_path / "data", 4)
    found = find_checkpoint(str(make_folder_only_checkpoint(tmp_path / "llava")))
    folders = [
        Run(BENCHMARKS["vqav2"](tmp_path / "data", found, split), AdaVConfig(), found, Generation(8), tmp_path).folder
        for split in ("test-dev", "val")
    ]
    assert "-val-" in folders[1].name and "-test-dev-" not in folders[0].name


def test_one_run_at_a_time_in_a_folder(tmp_path):
    data = make_vqav2(tmp_path / "data")
    found = find_checkpoint(str(make_folder_only_checkpoint(tmp_path / "llava")))
    runs = [
        Run(BENCHMARKS["vqav2"](data, found), AdaVConfig(), found, Generation(8), tmp_path / "runs") for _ in range(2)
    ]
    runs[0].open()
    with pytest.raises(UserError, match="another process is at work on this very run"):
        runs[1].open()
    runs[0].close()
    runs[1].open()
    runs[1].close()


def test_work_is_ordered_by_image(tmp_path):
    data = make_vqav2(tmp_path / "data", questions=9, images=2)
    found = find_checkpoint(str(make_folder_only_checkpoint(tmp_path / "llava")))
    run = Run(BENCHMARKS["vqav2"](data, found), AdaVConfig(), found, Generation(8), tmp_path / "runs")
    assert [sample.line for sample in run.todo()] == [1, 3, 5, 7, 2, 4, 6, 8, 9]


def test_vqav2_upload_covers_the_whole_split(tmp_path):
    data = make_vqav2(tmp_path / "data", questions=4)
    benchmark = BENCHMARKS["vqav2"](data, find_checkpoint(str(make_folder_only_checkpoint(tmp_path / "llava"))))
    samples = benchmark.load()
    rows = [{"text": text} for text in ("A red, car.", "Two", "dont", "1,000")]
    score = benchmark.finish(samples, rows, tmp_path / "adav-14-abc")
    upload = json.loads((data / "vqav2" / "answers_upload" / SPLIT / "llava" / "adav-14-abc.json").read_text())
    assert upload == [
        {"question_id": 1000, "answer": "red car"},
        {"question_id": 1001, "answer": "2"},
        {"question_id": 1002, "answer": "don't"},
        {"question_id": 9000, "answer": "1000"},
        {"question_id": 9999, "answer": ""},
    ]
    assert score["answered"] == 4 and score["empty"] == 1

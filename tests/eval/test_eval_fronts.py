"""LLaVA's answer commands: chunks, answer rows, going on after an interruption, and what they refuse."""

import json
import random

import pytest
from benchmark_data import make_benchmark
from eval_data import environment, make_folder_only_checkpoint
from PIL import Image
from tiny_checkpoints import build_reference, save_clip_tower, save_original

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, conv_templates
from llava.eval import run_llava
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.benchmarks.answer_file import score_file
from llava.eval.runs import llava_commands as front
from llava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.utils import disable_torch_init

pytestmark = pytest.mark.usefixtures("warm")
ROW = {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model = build_reference("llava")
    return save_original(model, folder / "tiny-v1.5", save_clip_tower(model, folder / "tower"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for name in ("pope", "sqa", "mmbench"):
        make_benchmark(name, root, 7)
    return root


@pytest.fixture(autouse=True)
def shell(monkeypatch):
    """The environment without a developer's settings; workers inherit it."""
    kept = environment()
    for name in set(front.os.environ) - set(kept):
        monkeypatch.delenv(name)
    for name, value in kept.items():
        monkeypatch.setenv(name, value)


def flags(**values) -> list[str]:
    return [part for name, value in values.items() for part in ("--" + name.replace("_", "-"), str(value))]


def pope(data, checkpoint, answers, *extra, **replaced) -> list[str]:
    values = {
        "model_path": checkpoint,
        "question_file": data / "pope" / "llava_pope_test.jsonl",
        "image_folder": data / "pope" / "val2014",
        "answers_file": answers,
        "visual_token_num": 5,
        "conv_mode": "vicuna_v1",
        **replaced,
    }
    return [*flags(**values), "--max_new_tokens", "3", "--temperature", "0", *extra]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("seed", range(30))
def test_chunks_are_llavas_and_never_out_of_range(seed):
    chance = random.Random(seed)
    n, chunks = chance.randint(0, 40), chance.randint(1, 12)
    items = list(range(n))
    pieces = [front.chunk(items, chunks, index) for index in range(chunks)]
    assert sum(pieces, []) == items
    size = -(-n // chunks)
    assert [len(piece) for piece in pieces] == [max(0, min(size, n - index * size)) for index in range(chunks)]


def test_chunks_put_together_are_the_whole_and_a_command_goes_on(data, checkpoint, tmp_path, capsys):
    whole = tmp_path / "whole.jsonl"
    front.main("model_vqa_loader", pope(data, checkpoint, whole))
    said = capsys.readouterr()
    assert "note: --visual-token-num 5 means overall_tokens: 5 per image, all tiles together" in said.err
    assert f"7 answers in {whole}" in said.out
    questions = rows(data / "pope" / "llava_pope_test.jsonl")
    assert [(row["question_id"], row["prompt"]) for row in rows(whole)] == [
        (question["question_id"], question["text"]) for question in questions
    ]
    assert all(set(row) == ROW and row["metadata"]["vision_tokens"] == 5 for row in rows(whole))
    assert score_file(BENCHMARKS["pope"](data, None), whole)["questions"] == 7

    # Interrupted after two answers: they are not asked again, and the file comes out the same.
    shard = tmp_path / "whole.jsonl.run" / "shards" / "shard-0.jsonl"
    content = whole.read_bytes()
    first = shard.read_text().splitlines()[:2]
    shard.write_text("\n".join(first) + "\n" + '{"key": [torn')
    whole.unlink()
    front.main("model_vqa_loader", pope(data, checkpoint, whole))
    assert whole.read_bytes() == content and shard.read_text().splitlines()[:2] == first
    report = json.loads((tmp_path / "whole.jsonl.run" / "run.json").read_text())
    assert (report["sessions"][-1]["reused"], report["sessions"][-1]["answered"]) == (2, 5)

    # Seven questions in five chunks of two: the last one is empty, which LLaVA's own code ends in an IndexError.
    parts = []
    for index in (3, 4):
        part = tmp_path / f"5_{index}.jsonl"
        front.main("model_vqa_loader", pope(data, checkpoint, part, num_chunks=5, chunk_idx=index))
        parts.append([(row["question_id"], row["text"]) for row in rows(part)])
    answers = [(row["question_id"], row["text"]) for row in rows(whole)]
    assert parts == [answers[6:], []]


def refused(capsys, name, argv) -> str:
    with pytest.raises(SystemExit) as stopped:
        front.main(name, argv)
    said = capsys.readouterr().err.splitlines()
    errors = [line for line in said if not line.startswith("note: ")]
    assert stopped.value.code == 2 and len(errors) == 1 and errors[0].startswith("error: "), said
    return errors[0]


def test_answers_of_another_run_are_never_written_over(data, tmp_path, capsys):
    checkpoint = make_folder_only_checkpoint(tmp_path / "llava")
    answers = tmp_path / "answers.jsonl"
    record = tmp_path / "answers.jsonl.run" / "identity.json"
    record.parent.mkdir()
    record.write_text("{}")
    said = refused(capsys, "model_vqa_loader", pope(data, checkpoint, answers))
    assert "answers.jsonl: holds answers of another run" in said and "remove it and answers.jsonl.run" in said
    record.unlink()
    answers.write_text("precious\n")
    said = refused(capsys, "model_vqa_loader", pope(data, checkpoint, answers))
    assert "is there already and was not written by this command" in said and answers.read_text() == "precious\n"


@pytest.mark.parametrize(
    "replaced, extra, says",
    [
        ({"question_file": "nowhere.jsonl"}, [], "--question-file: there is no file nowhere.jsonl"),
        ({"image_folder": "nowhere"}, [], "--image-folder: there is no folder nowhere"),
        ({"image_folder": "pope"}, [], "is not in"),
        ({"num_chunks": 3, "chunk_idx": 3}, [], "--chunk-idx is 3, allowed is 0 to 2"),
        ({"num_chunks": 0}, [], "--num-chunks"),
        ({"visual_token_num": 0}, [], "--visual-token-num"),
        ({}, ["--overall-tokens", "6"], "--visual-token-num is 5, but --overall-tokens is 6"),
        ({"conv_mode": "v9"}, [], 'unknown conversation template "v9"'),
        ({}, ["--num_beams", "3"], "--num_beams is 3, allowed is 1"),
        ({}, ["--temperature", "-1"], "--temperature is at least 0"),
        ({"model_path": "./nowhere"}, [], "./nowhere: no such"),
        ({}, ["--nonsense"], "--nonsense"),
    ],
)
def test_bad_input(data, tmp_path, capsys, replaced, extra, says):
    checkpoint = make_folder_only_checkpoint(tmp_path / "llava")
    if replaced.get("image_folder") == "pope":
        replaced = {"image_folder": data / "pope"}
    argv = pope(data, checkpoint, tmp_path / "out" / "answers.jsonl", *extra, **replaced)
    assert says in refused(capsys, "model_vqa_loader", argv)
    assert not list(tmp_path.rglob("answers.jsonl*"))


COMMON = ["--single-pred-prompt", "--max_new_tokens", "3"]


def test_science_writes_what_llavas_scorer_reads(data, checkpoint, tmp_path, cold):
    answers = tmp_path / "science.jsonl"
    folder = data / "scienceqa"
    science = {
        "model_path": checkpoint,
        "question_file": folder / "llava_test_CQM-A.json",
        "image_folder": folder / "images" / "test",
    }
    front.main("model_vqa_science", [*flags(**science, answers_file=answers), *COMMON])
    samples = BENCHMARKS["sqa"](data, None).read()
    assert [row["prompt"] for row in rows(answers)] == [
        ("<image>\n" if sample.image else "") + sample.prompt for sample in samples
    ]
    assert score_file(BENCHMARKS["sqa"](data, None), answers)["questions"] == 7


def test_mmbench_writes_what_llavas_scorer_reads(data, checkpoint, tmp_path):
    answers = tmp_path / "mmbench.jsonl"
    table = {"model_path": checkpoint, "question_file": data / "mmbench" / "mmbench_dev_20230712.tsv"}
    front.main("model_vqa_mmbench", [*flags(**table, answers_file=answers, lang="en"), *COMMON])
    found = rows(answers)
    assert set(found[0]) == ROW | {"round_id", "options", "option_char"}
    assert (found[0]["options"], found[0]["option_char"]) == (["red", "blue"], ["A", "B"])
    assert score_file(BENCHMARKS["mmbench"](data, None), answers)["rows"] == 8


def test_all_rounds_rotate_the_options(data, checkpoint, tmp_path):
    """LLaVA's --all-rounds: a row per rotation; option_char says which option a letter of the answer stands for."""
    answers, once = tmp_path / "rounds.jsonl", tmp_path / "once.jsonl"
    table = {"model_path": checkpoint, "question_file": data / "mmbench" / "mmbench_dev_20230712.tsv"}
    common = ["--single-pred-prompt", "--max_new_tokens", "1", "--visual_token_num", "5"]
    front.main("model_vqa_mmbench", [*flags(**table, answers_file=once), *common])
    front.main("model_vqa_mmbench", [*flags(**table, answers_file=answers), *common, "--all-rounds"])
    single, found = rows(once), rows(answers)
    assert len(found) == sum(len(row["options"]) for row in single) > len(single)
    first = [row for row in found if row["question_id"] == single[0]["question_id"]]
    assert [(row["round_id"], row["options"], row["option_char"]) for row in first] == [
        (0, ["red", "blue"], ["A", "B"]),
        (1, ["blue", "red"], ["B", "A"]),
    ]
    assert "A. red\nB. blue" in first[0]["prompt"] and "A. blue\nB. red" in first[1]["prompt"]
    assert first[0]["prompt"] == single[0]["prompt"] and first[0]["text"] == single[0]["text"]
    assert {row["metadata"]["vision_tokens"] for row in found} == {5}


def test_the_prompt_asks_for_a_letter_only_when_told_to(data, checkpoint, tmp_path):
    found = front.find_checkpoint(str(checkpoint))
    asked = {}
    for name, file in (
        ("model_vqa_science", "scienceqa/llava_test_CQM-A.json"),
        ("model_vqa_mmbench", "mmbench/mmbench_dev_20230712.tsv"),
    ):
        for extra in ([], ["--single-pred-prompt"]):
            argv = flags(model_path=checkpoint, question_file=data / file, answers_file=tmp_path / "a.jsonl")
            argv += ["--image-folder", str(data)] if name == "model_vqa_science" else ["--lang", "cn"]
            benchmark = front.COMMANDS[name].reads(front.parse(name, [*argv, *extra]), found)
            asked[name, bool(extra)] = benchmark.read()[0].prompt
    plain = asked["model_vqa_science", False]
    assert (
        asked["model_vqa_science", True] == plain + "\nAnswer with the option's letter from the given choices directly."
    )
    assert asked["model_vqa_mmbench", True] == asked["model_vqa_mmbench", False] + "\n请直接回答选项字母。"


# ------------------------------------------------------------------------------------------------------ run_llava
def test_one_question_on_the_command_line(data, checkpoint, capsys):
    image = data / "pope" / "val2014" / "COCO_val2014_000000000000.jpg"
    common = ["--model-path", str(checkpoint), "--query", "Is it red?", "--max_new_tokens", "4"]

    def ask(*argv):
        run_llava.main([*common, *argv])
        return capsys.readouterr().out

    one = ask("--image-file", str(image), "--visual-token-num", "5")
    assert one == ask("--image-file", str(image), "--overall-tokens", "5") and one.endswith("\n")
    assert ask("--image-file", f"{image};{image}", "--sep", ";")
    sampled = ["--image-file", str(image), "--temperature", "2", "--seed"]
    assert ask(*sampled, "1") == ask(*sampled, "1")
    assert len({ask(*sampled, str(seed)) for seed in range(4)}) > 1


def test_llavas_quick_start(data, checkpoint, capsys):
    """eval_model with an object of LLaVA's attributes answers as the command does, and as generate() in LLaVA's words."""
    image = data / "pope" / "val2014" / "COCO_val2014_000000000000.jpg"
    values = {
        "model_path": str(checkpoint),
        "model_base": None,
        "model_name": get_model_name_from_path(str(checkpoint)),
        "query": "Is it red?",
        "conv_mode": None,
        "image_file": str(image),
        "sep": ",",
        "temperature": 0,
        "top_p": None,
        "num_beams": 1,
        "max_new_tokens": 4,
    }
    run_llava.eval_model(type("Args", (), values)())
    said = capsys.readouterr().out
    run_llava.main([*flags(model_path=checkpoint, image_file=image, query="Is it red?"), "--max_new_tokens", "4"])
    assert said == capsys.readouterr().out and said.strip()

    disable_torch_init()
    tokenizer, model, image_processor, _ = load_pretrained_model(
        values["model_path"], None, values["model_name"], config=AdaVConfig.load()
    )
    conversation = conv_templates["v1"].copy()
    conversation.append_message(conversation.roles[0], DEFAULT_IMAGE_TOKEN + "\nIs it red?")
    conversation.append_message(conversation.roles[1], None)
    stop = conversation.sep if conversation.sep_style != SeparatorStyle.TWO else conversation.sep2
    prompt = conversation.get_prompt()
    ids = tokenizer_image_token(prompt, tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt").unsqueeze(0)
    picture = Image.open(image).convert("RGB")
    asked = {
        "inputs": ids,
        "images": process_images([picture], image_processor, model.config),
        "image_sizes": [picture.size],
        "do_sample": False,
        "max_new_tokens": 4,
        "use_cache": True,
    }
    output = model.generate(**asked, stopping_criteria=[KeywordsStoppingCriteria([stop], tokenizer, ids)])
    assert tokenizer.batch_decode(output, skip_special_tokens=True)[0].strip() == said.strip()
    word = tokenizer.decode(output[0, 1])
    stopped = model.generate(**asked, stopping_criteria=[KeywordsStoppingCriteria([word], tokenizer, ids)])
    assert stopped.shape[1] < output.shape[1] and word in tokenizer.decode(stopped[0])

    values.pop("query")
    with pytest.raises(UserError, match="the arguments have no query"):
        run_llava.eval_model(type("Args", (), values)())


def test_bad_questions(data, checkpoint, tmp_path, capsys):
    image = str(data / "pope" / "val2014" / "COCO_val2014_000000000000.jpg")
    (tmp_path / "broken.jpg").write_text("no image")
    for file, query, says in (
        ("https://example.org/a.jpg", "x", "names the address https://example.org/a.jpg, allowed are files"),
        ("nowhere.jpg", "x", "nowhere.jpg is no file"),
        (f"{image},", "x", "an empty name is no file"),
        (image, "<image> and <image>", "places 2 images with <image>, but --image-file names 1"),
        (str(tmp_path / "broken.jpg"), "x", "cannot be read as an image"),
    ):
        with pytest.raises(SystemExit) as stopped:
            run_llava.main(["--model-path", str(checkpoint), "--image-file", file, "--query", query])
        assert stopped.value.code == 2 and says in capsys.readouterr().err

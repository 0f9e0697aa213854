"""llava.eval.prepare on small parquet files with the columns of the public data sets."""

import builtins
import io
from dataclasses import replace
from pathlib import Path

import pytest

datasets = pytest.importorskip("datasets", reason='the extra "prepare" is not installed')

from benchmark_data import picture  # noqa: E402

from llava.common.errors import UserError  # noqa: E402
from llava.eval import prepare, reproduce  # noqa: E402
from llava.eval.benchmarks import BENCHMARKS  # noqa: E402
from llava.eval.benchmarks.recipes import RECIPES  # noqa: E402
from llava.eval.results import reproduction  # noqa: E402
from llava.eval.results.published import TABLE  # noqa: E402

PARTS = [(name, split) for name, recipe in RECIPES.items() for split in recipe.parts]


def file_of(i: int) -> dict:
    buffer = io.BytesIO()
    picture(i).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def mmbench_row(i: int) -> dict:
    row = {"index": i // 2 + 1000000 * (i % 2), "question": "What is it?", "hint": "nan" if i % 4 < 2 else "Look."}
    row |= {"A": "red", "B": "blue", "C": None, "D": None, "answer": "AB"[i % 2], "category": "colour"}
    return row | {"image": file_of(i // 2), "source": "made", "L2-category": "all", "comment": None, "split": "dev"}


def sqa_row(i: int) -> dict:
    row = {"image": None if i == 2 else file_of(i), "question": "Which?", "choices": ["red", "blue"], "answer": i % 2}
    rest = ("task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")
    return row | {"hint": "A hint." if i % 2 else "", **dict.fromkeys(rest, "x")}


def mme_row(i: int) -> dict:
    name = ("artwork/images/1.jpg", "count/2.jpg")[i // 2 % 2]
    question = f"Is it {i}? Please answer yes or no."
    return {"question_id": name, "image": file_of(i // 2), "question": question, "answer": ("Yes", "No")[i % 2],
            "category": name.split("/")[0]}  # fmt: skip


def vqav2_row(i: int) -> dict:
    people = [{"answer": "red", "answer_confidence": "yes", "answer_id": j} for j in range(1, 11)]
    row = {"question_type": "what", "multiple_choice_answer": "red", "answers": people, "image_id": 9 + i // 2}
    return row | {"answer_type": "other", "question_id": 100 + i, "question": "What?", "image": file_of(i // 2)}


def textvqa_row(i: int) -> dict:
    row = {
        "image_id": f"abc{i // 2}",
        "question_id": i,
        "question": f"what does Sign {i} say?",
        "image": file_of(i // 2),
    }
    row |= {"question_tokens": ["what"], "image_width": 60, "image_height": 50, "flickr_original_url": "u"}
    return row | {"flickr_300k_url": "u", "answers": ["stop"] * 10, "image_classes": ["c"], "set_name": "val",
                  "ocr_tokens": ["STOP", "7"]}  # fmt: skip


def pope_row(i: int) -> dict:
    row = {"id": str(i), "question_id": str(i // 3), "question": f"Is there a thing {i} in the image?"}
    row |= {"answer": ("yes", "no")[i % 2], "image_source": "COCO_val2014_000000000007", "image": file_of(0)}
    return row | {"category": ("adversarial", "popular", "random")[i % 3]}


def seed_row(i: int) -> dict:
    kind = "video" if i == 3 else "image"
    row = {"answer": "AB"[i % 2], **{f"choice_{c}": f"option {c}" for c in "abcd"}, "data_id": f"{i}_77"}
    row |= {"data_type": kind, "question": "Which?", "question_id": str(i), "question_type_id": 1 + i % 2}
    return row | {"image": [file_of(i)], "segment": None}


def gqa_row(i: int) -> dict:
    types = {"structural": "query", "semantic": "attr", "detailed": "x"}
    row = {"id": f"20{i}", "imageId": f"n{i // 2}", "question": "What?", "answer": "red", "fullAnswer": "It is red."}
    return row | {"isBalanced": True, "types": types}


def vizwiz_row(split):
    def row(i: int) -> dict:
        answers = ["cat"] * 10 if split == "val" else []
        name = f"VizWiz_{split}_{i:08d}"
        return {"question_id": name, "image": file_of(i), "question": "What?", "answers": answers, "category": "other"}

    return row


ROWS = {
    ("vqav2", "val"): [vqav2_row],
    ("gqa", "testdev-balanced"): [gqa_row, lambda i: {"id": f"n{i}", "image": file_of(i)}],
    ("vizwiz", "test"): [vizwiz_row("test")],
    ("vizwiz", "val"): [vizwiz_row("val")],
    ("sqa", "test"): [sqa_row],
    ("textvqa", "val"): [textvqa_row],
    ("pope", "test"): [pope_row],
    ("mme", "test"): [mme_row],
    ("mmbench", "dev"): [mmbench_row],
    ("mmbench", "test"): [mmbench_row],
    ("mmbench_cn", "dev"): [mmbench_row],
    ("mmbench_cn", "test"): [mmbench_row],
    ("mmvet", "test"): [
        lambda i: {"question_id": f"v1_{i}", "image": file_of(i), "image_source": "u", "question": "What is it?",
                   "answer": "a<OR>b", "capability": "rec,ocr"}
    ],
    ("seed", "image"): [seed_row],
}  # fmt: skip
RIGHT = {
    "vqav2": lambda i: "red",
    "gqa": lambda i: "red",
    "vizwiz": lambda i: "cat",
    "sqa": lambda i: "AB"[i % 2],
    "textvqa": lambda i: "stop",
    "pope": lambda i: ("yes", "no")[i % 2],
    "mme": lambda i: ("yes", "no")[i % 2],
    "mmbench": lambda i: "AB"[i % 2],
    "mmbench_cn": lambda i: "AB"[i % 2],
    "mmvet": str,
    "seed": lambda i: "AB"[i % 2],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def copy_of(name, split, folder: Path) -> Path:
    """Four rows per part, as `hf download` lays a data set's repository out; images typed as the hub types them."""
    for (config, part), row in zip(RECIPES[name].parts[split][0], ROWS[name, split], strict=True):
        table = datasets.Dataset.from_list([row(i) for i in range(4)])
        if "image" in table.column_names:
            feature = datasets.List(datasets.Image()) if name == "seed" else datasets.Image()
            table = table.cast_column("image", feature)
        place = folder / ("data" if config == "default" else config)
        place.mkdir(parents=True, exist_ok=True)
        table.to_parquet(str(place / f"{part}-00000-of-00001.parquet"))
    return folder


@pytest.mark.parametrize("name, split", PARTS)
def test_prepare_makes_what_the_benchmark_reads(tmp_path, name, split):
    source = copy_of(name, split, tmp_path / "repo")
    benchmark = BENCHMARKS[name](tmp_path / "data", None, split)
    said = prepare.prepare(benchmark, source, partial=True)
    questions = 3 if name == "seed" else 4
    assert f"{name} {split}: {questions} questions below" in said
    samples = benchmark.load()
    assert len(samples) == questions
    image = benchmark.image_folder / samples[0].image
    assert image.read_bytes() == file_of(0)["bytes"], "the file as it was uploaded"
    score = benchmark.finish(samples, [{"text": RIGHT[name](i)} for i in range(questions)], tmp_path)
    if benchmark.headline in score:
        assert benchmark.published(score) == pytest.approx(
            {"mme": 400, "pope": 200 / 3}.get(name, 100)
        )  # POPE: no "yes" in one category
    assert "prepared before" in prepare.prepare(benchmark, tmp_path / "nowhere")


def test_reproduce_fetches_every_benchmark_of_the_table(tmp_path, monkeypatch, capsys):
    """--prepare of scripts/reproduce.sh, with copies on disk in place of the hub: each part is asked for by its name."""
    asked = []

    def load_dataset(repo, config, split):
        asked.append((repo, config, split))
        folder = tmp_path / repo.replace("/", "--") / ("data" if config == "default" else config)
        return datasets.Dataset.from_parquet([str(path) for path in folder.glob(f"{split}-*.parquet")])

    small = {}
    for name in TABLE:
        recipe, (split, (parts, _)) = RECIPES[name], next(iter(RECIPES[name].parts.items()))
        small[name] = replace(recipe, parts={split: (parts, 4)})
        copy_of(name, split, tmp_path / recipe.repo.replace("/", "--"))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(prepare, "_need_hub", lambda repo: None)
    monkeypatch.setattr(prepare, "RECIPES", small)
    root = tmp_path / "data"
    reproduce.fetch(needed := reproduction.needs(root, None, None))
    assert {each.name for each in needed if each.fetchable} == set(TABLE)
    expected = [
        (RECIPES[name].repo, *part)
        for name in TABLE
        for part in small[name].parts[BENCHMARKS[name](root, None).split][0]
    ]
    assert asked == expected
    assert not [each for each in reproduction.needs(root, None, None) if each.missing]
    assert len(capsys.readouterr().out.splitlines()) == len(TABLE)
    # Again: nothing is fetched twice.
    reproduce.fetch(reproduction.needs(root, None, None))
    assert asked == expected


def test_prompts(tmp_path):
    for name, split in (("textvqa", "val"), ("sqa", "test"), ("mmbench", "dev"), ("seed", "image"), ("mme", "test")):
        prepare.prepare(BENCHMARKS[name](tmp_path, None, split), copy_of(name, split, tmp_path / name), partial=True)
    asked = {name: BENCHMARKS[name](tmp_path, None).read() for name in ("textvqa", "sqa", "mmbench", "seed", "mme")}
    short = "\nAnswer the question using a single word or phrase."
    assert asked["textvqa"][0].text == "What does sign 0 say?\nReference OCR token: STOP, 7" + short
    assert asked["sqa"][1].text == "Context: A hint.\nWhich?\nA. red\nB. blue"
    assert asked["sqa"][2].image is None and asked["sqa"][1].image == "2/image.png"
    assert asked["mmbench"][0].text == "What is it?\nA. red\nB. blue"
    assert asked["mmbench"][2].text == "Look.\nWhat is it?\nA. red\nB. blue"
    assert asked["seed"][0].text.startswith("Which?\nA. option a\nB. option b\n")
    assert asked["mme"][1].text == "Is it 1?" + short


def test_another_number_of_questions_is_an_error_and_what_was_written_is_used_again(tmp_path, monkeypatch):
    source = copy_of("gqa", "testdev-balanced", tmp_path / "repo")
    benchmark = BENCHMARKS["gqa"](tmp_path / "data", None)
    with pytest.raises(UserError, match=r"repo: makes 4 questions of gqa testdev-balanced, allowed are 12,578"):
        prepare.prepare(benchmark, source)
    assert not benchmark.question_file.exists()
    image = benchmark.image_folder / "n0.jpg"
    before = image.stat().st_mtime_ns
    (benchmark.image_folder / "n1.jpg").write_bytes(b"torn")
    prepare.prepare(benchmark, source, partial=True)
    assert image.stat().st_mtime_ns == before, "written twice"
    benchmark.load()
    assert (benchmark.image_folder / "n1.jpg").read_bytes() == file_of(1)["bytes"]


def test_files_of_the_user_are_left_alone(tmp_path):
    benchmark = BENCHMARKS["mme"](tmp_path / "data", None)
    benchmark.folder.mkdir(parents=True)
    benchmark.question_file.write_text("mine")
    with pytest.raises(UserError, match="llava_mme.jsonl is there already, and not from here"):
        prepare.prepare(benchmark, copy_of("mme", "test", tmp_path / "repo"), partial=True)
    assert benchmark.question_file.read_text() == "mine"


def test_bad_copies_are_one_sentence(tmp_path, capsys):
    def refused(*argv):
        with pytest.raises(SystemExit) as stopped:
            prepare.main([*map(str, argv), "--data-root", str(tmp_path / "data")])
        *_, said = lines = capsys.readouterr().err.splitlines()  # progress bars come before
        assert stopped.value.code == 2 and [line for line in lines if "rror" in line] == [said], lines
        return said

    assert 'unknown benchmark "coco"' in refused("coco")
    assert "vqav2 test-dev cannot be prepared, allowed are vqav2 val, gqa" in refused("vqav2", "--split", "test-dev")
    assert "has no test-*.parquet, allowed is a copy of lmms-lab/POPE" in refused("pope", "--source", tmp_path)
    source = copy_of("pope", "test", tmp_path / "repo")
    file = source / "data" / "test-00000-of-00001.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    capsys.readouterr()
    assert "cannot be read as parquet" in refused("pope", "--source", source)
    datasets.Dataset.from_list([{"question": "Is it?"}]).to_parquet(str(file))
    capsys.readouterr()
    assert "an entry has no 'image'" in refused("pope", "--source", source)


def test_without_the_datasets_library(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r'prepare needs the datasets library: pip install "adav\[prepare\]"'):
        prepare.prepare(BENCHMARKS["gqa"](tmp_path, None))


def test_an_image_name_stays_inside_its_folder(tmp_path):
    row = {**mme_row(0), "question_id": "../../outside.jpg"}
    (tmp_path / "repo" / "data").mkdir(parents=True)
    table = datasets.Dataset.from_list([row])
    table.to_parquet(str(tmp_path / "repo" / "data" / "test-00000-of-00001.parquet"))
    with pytest.raises(UserError, match='image name "../../outside.jpg" leads out of'):
        prepare.prepare(BENCHMARKS["mme"](tmp_path / "data", None), tmp_path / "repo", partial=True)

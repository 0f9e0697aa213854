"""ScienceQA's accuracy of an answer file, with the flags of LLaVA's script of this name.

    python -m llava.eval.eval_science_qa --base-dir scienceqa --result-file A.jsonl
        [--output-file F] [--output-result F]

The score is that of llava.eval.benchmarks.sqa. A question had an image if its prompt has <image>, or, in an answer file
of this project, if its metadata has an image.
"""

from __future__ import annotations

from pathlib import Path

from llava.common.command_line import Parser
from llava.common.errors import exits_cleanly
from llava.common.files import write_json
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.eval.benchmarks import sqa
from llava.eval.benchmarks.answer_file import read_answers
from llava.eval.scoring.match_answers import only_labelled


def had_image(row: dict) -> bool:
    """Return whether the question of an answer row had an image."""
    return DEFAULT_IMAGE_TOKEN in str(row.get("prompt")) or "image" in (row.get("metadata") or {})


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m llava.eval.eval_science_qa", description=__doc__.split("\n")[0])
    parser.add_argument("--base-dir", type=Path, required=True, help="holds problems.json and pid_splits.json")
    parser.add_argument("--result-file", type=Path, required=True)
    parser.add_argument("--output-file", type=Path, help="right and wrong answers, one by one")
    parser.add_argument("--output-result", type=Path, help="the score and every chosen option")
    parser.add_argument("--split", default="test")
    parser.add_argument("--partial", action="store_true", help="score what is answered and has a label")
    args = parser.parse_args(argv)
    rows = read_answers(args.result_file)
    answers = [(str(row["question_id"]), (row["text"], had_image(row))) for row in rows]
    problems = sqa.read_problems(args.base_dir, args.split)
    if args.partial:
        answers = only_labelled(answers, problems.items())
    score = sqa.score(answers, args.base_dir, args.split, args.partial)
    correct = round(score["accuracy"] * score["questions"])
    images = f", IMG-Accuracy: {100 * score['image_accuracy']:.2f}%" if "image_accuracy" in score else ""
    print(f"Total: {score['questions']}, Correct: {correct}, Accuracy: {100 * score['accuracy']:.2f}%{images}")
    picked = {key: sqa.chosen(text, len(problems[key]["choices"])) for key, (text, _) in answers}
    # The two files have the keys of LLaVA's script, for tools that read them.
    if args.output_file:
        sides: dict[str, list] = {"correct": [], "incorrect": []}
        for key, (text, image) in answers:
            right = picked[key] == problems[key]["answer"]
            entry = {"question_id": key, "parsed_ans": picked[key], "ground_truth": problems[key]["answer"]}
            sides["correct" if right else "incorrect"].append({**entry, "pred": text, "is_multimodal": image})
        write_json(args.output_file, sides)
    if args.output_result:
        result = {"acc": 100 * score["accuracy"], "correct": correct, "count": score["questions"], "results": picked}
        write_json(args.output_result, {**result, "outputs": {key: text for key, (text, _) in answers}})


if __name__ == "__main__":
    main()

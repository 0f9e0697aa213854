"""POPE's F1 of an answer file, with the flags of LLaVA's script of this name.

    python -m llava.eval.eval_pope --annotation-dir pope/coco --question-file llava_pope_test.jsonl
        --result-file A.jsonl

The score is that of llava.eval.benchmarks.pope: answers are joined with labels by key, not by order. The mean of the
three F1 values is printed too.
"""

from __future__ import annotations

from pathlib import Path

from llava.common.command_line import Parser
from llava.common.errors import exits_cleanly
from llava.eval.benchmarks import pope
from llava.eval.benchmarks.answer_file import match, read_answers
from llava.eval.benchmarks.questions import read_questions
from llava.eval.scoring.match_answers import only_labelled


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m llava.eval.eval_pope", description=__doc__.split("\n")[0])
    parser.add_argument("--annotation-dir", type=Path, required=True)
    parser.add_argument("--question-file", type=Path, required=True)
    parser.add_argument("--result-file", type=Path, required=True)
    parser.add_argument("--partial", action="store_true", help="score what is answered and has a label")
    args = parser.parse_args(argv)
    questions = pope.with_category(read_questions(args.question_file), args.question_file)
    samples, rows = match(questions, read_answers(args.result_file), args.result_file, args.partial)
    answers = [(pope.key(sample), row["text"]) for sample, row in zip(samples, rows, strict=True)]
    if args.partial:
        answers = only_labelled(answers, pope.read_labels(args.annotation_dir))
    score = pope.score(answers, args.annotation_dir, args.partial)
    for category in pope.CATEGORIES:
        if category in score:
            measures = score[category]
            print(f"Category: {category}, # samples: {measures['questions']}")
            print("".join(f"{name}: {measures[name]:.4f}  " for name in ("f1", "precision", "recall")).rstrip())
    print(f"Mean F1: {100 * score['f1']:.2f}, accuracy: {100 * score['accuracy']:.2f}, of {len(answers)} questions")


if __name__ == "__main__":
    main()

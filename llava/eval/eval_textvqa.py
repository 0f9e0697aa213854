"""TextVQA's accuracy of answer files, with the flags of LLaVA's script of this name.

    python -m llava.eval.eval_textvqa --annotation-file TextVQA_0.5.1_val.json --result-file A.jsonl | --result-dir DIR

The score is that of llava.eval.benchmarks.textvqa: answers are joined by image id and the question in their prompt.
"""

from __future__ import annotations

from pathlib import Path

from llava.common.command_line import Parser
from llava.common.errors import UserError, exits_cleanly
from llava.eval.benchmarks import textvqa
from llava.eval.benchmarks.answer_file import read_answers
from llava.eval.scoring.annotations import read_part
from llava.eval.scoring.match_answers import only_labelled


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m llava.eval.eval_textvqa", description=__doc__.split("\n")[0])
    parser.add_argument("--annotation-file", type=Path, required=True)
    parser.add_argument("--result-file", type=Path)
    parser.add_argument("--result-dir", type=Path, help="every .jsonl file in it")
    parser.add_argument("--partial", action="store_true", help="score what is answered and has a label")
    args = parser.parse_args(argv)
    files = ([args.result_file] if args.result_file else []) + (
        sorted(args.result_dir.glob("*.jsonl")) if args.result_dir else []
    )
    if not files:
        raise UserError("no answer file is named; give --result-file or a --result-dir that holds .jsonl files")
    data = read_part(args.annotation_file, "data")
    for path in files:
        rows = read_answers(path)
        if any("prompt" not in row for row in rows):
            raise UserError(f'{path}: has answers without "prompt", which holds the question')
        answers = [((row["question_id"], textvqa.question(row["prompt"], path)), row["text"]) for row in rows]
        if args.partial:
            answers = only_labelled(answers, textvqa.read_labels(data, args.annotation_file))
        score = textvqa.score(answers, data, args.annotation_file, args.partial)
        print(f"{path.stem}\nSamples: {score['questions']}\nAccuracy: {100 * score['accuracy']:.2f}%\n")


if __name__ == "__main__":
    main()

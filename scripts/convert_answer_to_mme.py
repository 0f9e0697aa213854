"""Answers as MME's calculation.py reads them, from answers/E.jsonl to eval_tool/answers/E: convert_answer_to_mme.py --experiment E

Run it inside the MME folder, like LLaVA's script of the same name, or give the folder with --folder.
"""

from pathlib import Path

from llava.common.command_line import Parser
from llava.common.errors import UserError, exits_cleanly
from llava.eval.benchmarks import mme
from llava.eval.benchmarks.answer_file import read_answers
from llava.eval.scoring.match_answers import join


@exits_cleanly
def main(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--folder", type=Path, default=Path("."))
    args = parser.parse_args(argv)
    path = args.folder / "answers" / f"{args.experiment}.jsonl"
    rows = read_answers(path)
    if any("prompt" not in row for row in rows):
        raise UserError(f'{path}: has answers without "prompt", which holds the question')
    # MME asks two questions about an image under one id, so only the prompt tells them apart.
    answers = [(mme.key(row["question_id"], row["prompt"]), row["text"]) for row in rows]
    source = args.folder / "MME_Benchmark_release_version"
    release = mme.read_release(source)
    join(answers, release, source)
    mme.write_answers(answers, release, args.folder / "eval_tool" / "answers" / args.experiment)


if __name__ == "__main__":
    main()

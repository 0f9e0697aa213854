"""Answers as MM-Vet's grader reads them: convert_mmvet_for_eval.py --src answers.jsonl --dst results.json"""

from pathlib import Path

from llava.common.command_line import Parser
from llava.common.errors import exits_cleanly
from llava.eval.benchmarks import mmvet
from llava.eval.benchmarks.answer_file import answers_by_id


@exits_cleanly
def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--src", type=Path, required=True)
    parser.add_argument("--dst", type=Path, required=True)
    args = parser.parse_args(argv)
    mmvet.write_results(answers_by_id(args.src), args.dst)


if __name__ == "__main__":
    main()

"""Answers as GQA's official eval.py reads them: convert_gqa_for_eval.py --src answers.jsonl --dst predictions.json"""

from pathlib import Path

from llava.common.command_line import Parser
from llava.common.errors import exits_cleanly
from llava.eval.benchmarks import gqa
from llava.eval.benchmarks.answer_file import answers_by_id


@exits_cleanly
def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--src", type=Path, required=True)
    parser.add_argument("--dst", type=Path, required=True)
    args = parser.parse_args(argv)
    gqa.write_predictions(answers_by_id(args.src), args.dst)


if __name__ == "__main__":
    main()

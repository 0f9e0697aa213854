"""VizWiz's upload file: convert_vizwiz_for_submission.py --annotation-file Q --result-file A --result-upload-file U"""

from pathlib import Path

from llava.common.command_line import Parser
from llava.common.errors import exits_cleanly
from llava.eval.benchmarks import vizwiz
from llava.eval.benchmarks.answer_file import match, read_answers
from llava.eval.benchmarks.questions import read_questions


@exits_cleanly
def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--annotation-file", type=Path, required=True, help="the questions, llava_test.jsonl")
    parser.add_argument("--result-file", type=Path, required=True)
    parser.add_argument("--result-upload-file", type=Path, required=True)
    args = parser.parse_args(argv)
    samples, rows = match(read_questions(args.annotation_file), read_answers(args.result_file), args.result_file)
    # VizWiz's server identifies an answer by the name of its image.
    answers = [(sample.image, row["text"]) for sample, row in zip(samples, rows, strict=True)]
    print(vizwiz.write_upload(answers, args.result_upload_file))


if __name__ == "__main__":
    main()

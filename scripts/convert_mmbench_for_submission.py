"""MMBench's upload file: convert_mmbench_for_submission.py --annotation-file TSV --result-dir D --upload-dir U --experiment E"""

from pathlib import Path

from llava.common.command_line import Parser
from llava.common.errors import exits_cleanly
from llava.eval.benchmarks import mmbench
from llava.eval.benchmarks.answer_file import answers_by_id
from llava.eval.scoring.match_answers import join


@exits_cleanly
def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--annotation-file", type=Path, required=True)
    parser.add_argument("--result-dir", type=Path, required=True)
    parser.add_argument("--upload-dir", type=Path, required=True)
    parser.add_argument("--experiment", required=True)
    args = parser.parse_args(argv)
    answers = answers_by_id(args.result_dir / f"{args.experiment}.jsonl")
    table = mmbench.read_table(args.annotation_file)
    # join refuses missing, unknown and repeated answers: MMBench's server would count a missing one as wrong.
    join(answers, [(row["index"], row) for row in table], args.annotation_file)
    mmbench.write_upload(dict(answers), table, args.upload_dir / f"{args.experiment}.xlsx")


if __name__ == "__main__":
    main()

"""SEED-Bench's accuracy and upload file: convert_seed_for_submission.py --annotation-file S --result-file A --result-upload-file U"""

import json
from pathlib import Path

from llava.common.command_line import Parser
from llava.common.errors import exits_cleanly
from llava.common.files import write_rows
from llava.eval.benchmarks import seed
from llava.eval.benchmarks.answer_file import answers_by_id
from llava.eval.scoring.annotations import read_part, told_when_malformed
from llava.eval.scoring.match_answers import only_labelled


@exits_cleanly
def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--annotation-file", type=Path, required=True, help="SEED-Bench.json")
    parser.add_argument("--result-file", type=Path, required=True)
    parser.add_argument("--result-upload-file", type=Path, required=True)
    parser.add_argument("--partial", action="store_true", help="score what is answered and has a label")
    args = parser.parse_args(argv)
    answers = [(str(key), text) for key, text in answers_by_id(args.result_file)]
    with told_when_malformed(args.annotation_file):
        kinds = {
            str(entry["question_id"]): entry["data_type"] for entry in read_part(args.annotation_file, "questions")
        }
    # An answer file may leave out the videos. Only the kinds of questions that it has are then scored.
    asked = tuple(sorted({kinds.get(key, "image") for key, _ in answers}))  # an answer file may leave the videos out
    labelled = only_labelled(answers, seed.read_labels(args.annotation_file, asked)) if args.partial else answers
    print(json.dumps(seed.score(labelled, args.annotation_file, asked, args.partial), indent=2))
    write_rows(args.result_upload_file, [{"question_id": key, "prediction": text} for key, text in answers])


if __name__ == "__main__":
    main()

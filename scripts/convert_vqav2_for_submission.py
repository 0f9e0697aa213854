"""VQAv2's upload file from DIR/answers/SPLIT/CKPT/merge.jsonl: convert_vqav2_for_submission.py --split S --ckpt C [--dir D]"""

from pathlib import Path

from llava.common.command_line import Parser
from llava.common.errors import exits_cleanly
from llava.eval.benchmarks import vqav2
from llava.eval.benchmarks.answer_file import answers_by_id


@exits_cleanly
def main(argv=None):
    parser = Parser(description=__doc__)
    parser.add_argument("--dir", type=Path, default=Path("./playground/data/eval/vqav2"))
    parser.add_argument("--ckpt", required=True)
    parser.add_argument("--split", required=True)
    args = parser.parse_args(argv)
    answers = dict(answers_by_id(args.dir / "answers" / args.split / args.ckpt / "merge.jsonl"))
    # The server needs an answer to every question of test2015. test-dev asks only a part of them; the rest stays empty.
    ids = vqav2.split_ids(args.dir / "llava_vqav2_mscoco_test2015.jsonl")
    print(vqav2.write_upload(answers, ids, args.dir / "answers_upload" / args.split / f"{args.ckpt}.json"))


if __name__ == "__main__":
    main()

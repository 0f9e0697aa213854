"""Pictures and questions of the demo task as training data in LLaVA's format: four conversations of one question per picture.

    python -m llava.shapes.conversations --family v1.5 --pictures 1000 --out playground/train/conversations-v1.5

writes OUT/images/*.png and OUT/data.json, from the training split (no test picture is in it).
"""

import argparse
import json

from llava.common.errors import exits_cleanly
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.shapes.dataset import PER_IMAGE, write_dataset


def write_conversations(family, pictures, out):
    """Write the first `pictures` pictures of the training split as conversations. Returns the path of data.json."""
    out = write_dataset(family, "train", pictures * PER_IMAGE, out)
    lines = [(out / name).read_text(encoding="utf-8").splitlines() for name in ("questions.jsonl", "labels.jsonl")]
    samples = [
        {
            "id": str(question["question_id"]),
            "image": question["image"],
            "conversations": [
                {"from": "human", "value": f"{DEFAULT_IMAGE_TOKEN}\n{question['text']}"},
                {"from": "gpt", "value": label["answer"]},
            ],
        }
        for question, label in zip(*(map(json.loads, part) for part in lines), strict=True)
    ]
    path = out / "data.json"
    path.write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")
    return path


@exits_cleanly
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="v1.5", help="v1.5 (one tile) or v1.6 (several); default v1.5")
    parser.add_argument("--pictures", type=int, default=1000, help="number of pictures; default 1000")
    parser.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args(argv)
    print(f"{args.pictures * PER_IMAGE} conversations in {write_conversations(args.family, args.pictures, args.out)}")


if __name__ == "__main__":
    main()

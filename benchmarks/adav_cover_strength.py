"""Chooses adav_cover's one constant, `strength`, on the validation pictures of the demo task and on nothing else.

    python benchmarks/adav_cover_strength.py [--questions 1000]

For each demo checkpoint, budget and strength: accuracy on the validation split, through the shipped tower, selection and
LLM code (llava.shapes.training.figures.Exam). Strength 0 is `adav`. Writes benchmarks/results/adav_cover_strength.csv.
"""

import argparse
import csv
import platform
import sys
from itertools import product
from pathlib import Path

import torch
import transformers
from record import RESULTS

from llava.common.errors import UserError, exits_cleanly
from llava.common.machine import commit
from llava.common.progress import progress_bar
from llava.shapes.dataset import write_dataset
from llava.shapes.training.figures import Exam

ROOT = Path(__file__).resolve().parent.parent
BUDGETS = {"v1.5": (36, 14, 7), "v1.6": (135, 54, 27)}  # 25, 10 and 5 % of the tokens
STRENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)


@exits_cleanly
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1000, help="per checkpoint (default 1000)")
    parser.add_argument("--out", type=Path, default=RESULTS / "adav_cover_strength.csv")
    args = parser.parse_args()
    if args.questions < 4:
        raise UserError(f"--questions is {args.questions}, allowed is at least 4: four questions share a picture")
    # 1. How the rows are made. One thread, so that a rerun sums in the same order.
    torch.set_num_threads(1)
    made_with = {
        "command": " ".join(["python", "benchmarks/adav_cover_strength.py", *sys.argv[1:]]),
        "hardware": f"{platform.machine()} CPU, 1 thread",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}",
        "commit": commit(),
    }
    # 2. Accuracy of every cell. The test split stays unused: a constant chosen on it would flatter the method there.
    rows = []
    for family, budgets in BUDGETS.items():
        folder = ROOT / "playground" / "train" / f"validation-{family}"
        exam = Exam(
            ROOT / "playground" / f"llava-shapes-{family}",
            write_dataset(family, "validation", args.questions, folder),
        )
        cells = progress_bar(f"measuring {family}", [*product(budgets, STRENGTHS)], unit=" cells")
        for budget, strength in cells:
            scores = exam.score(exam.answer("adav_cover", budget, strength=strength))
            rows.append(
                {"checkpoint": f"llava-shapes-{family}", "split": "validation", "questions": len(exam.rows)}
                | {"tokens": budget, "strength": strength}
                | {f"accuracy_{name}": round(value, 4) for name, value in scores.items()}
                | made_with
            )
            cells.write(" ".join(str(rows[-1][key]) for key in ("checkpoint", "tokens", "strength", "accuracy_all")))
            sys.stdout.flush()
    # 3. Write the rows, and print the mean that decides.
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for strength in STRENGTHS:
        mean = [row["accuracy_all"] for row in rows if row["strength"] == strength]
        print(f"strength {strength:g}: mean over checkpoints and budgets {sum(mean) / len(mean):.4f}")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()

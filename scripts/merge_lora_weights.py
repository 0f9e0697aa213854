"""Merges a LoRA checkpoint into the model that it was trained on, with LLaVA's flags; other kinds are written whole too.

    python scripts/merge_lora_weights.py --model-path checkpoints/llava-v1.5-13b-lora --model-base lmsys/vicuna-13b-v1.5 \\
        --save-model-path checkpoints/llava-v1.5-13b-merged [--layout llava-hf]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, from any working directory

from llava.common.errors import exits_cleanly  # noqa: E402
from llava.model.export import argument_parser, load_and_save  # noqa: E402


@exits_cleanly
def main() -> None:
    parser = argument_parser(__doc__.split("\n")[0])
    parser.add_argument("--model-path", required=True, help="folder or hub name of the checkpoint")
    parser.add_argument("--save-model-path", required=True, help="where the merged checkpoint goes")
    args = parser.parse_args()
    load_and_save(args.model_path, args.model_base, args.save_model_path, args.layout, args.dtype)
    print(f"checkpoint written to {args.save_model_path}")


if __name__ == "__main__":
    main()

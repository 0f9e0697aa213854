"""LLaVA's command of this name: questions in LLaVA's .jsonl format, short answers (128 tokens).

llava.eval.runs.llava_commands describes it.
"""

from llava.eval.runs.llava_commands import main

if __name__ == "__main__":
    main("model_vqa_loader")

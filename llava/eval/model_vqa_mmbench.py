"""LLaVA's command of this name: the questions of MMBench's table.

llava.eval.runs.llava_commands describes it.
"""

from llava.eval.runs.llava_commands import main

if __name__ == "__main__":
    main("model_vqa_mmbench")

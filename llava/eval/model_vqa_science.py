"""LLaVA's command of this name: questions of ScienceQA in LLaVA's format, with or without image.

llava.eval.runs.llava_commands describes it.
"""

from llava.eval.runs.llava_commands import main

if __name__ == "__main__":
    main("model_vqa_science")

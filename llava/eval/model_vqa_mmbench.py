"""LLaVA's command of that name: MMBench's table (llava.eval.runs.llava_commands says more)."""

from llava.eval.runs.llava_commands import main

if __name__ == "__main__":
    main("model_vqa_mmbench")

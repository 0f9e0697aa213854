"""LLaVA's command of that name: MMBench's table (llava.eval.front says more)."""

from llava.eval.front import main

if __name__ == "__main__":
    main("model_vqa_mmbench")

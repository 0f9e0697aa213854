"""LLaVA's command of that name: ScienceQA in LLaVA's format, with or without image (llava.eval.front says more)."""

from llava.eval.front import main

if __name__ == "__main__":
    main("model_vqa_science")

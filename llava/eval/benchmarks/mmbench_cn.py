"""MMBench (arXiv 2307.06281) in Chinese: as the English one, with other tables and another instruction.

Files in mmbench/: mmbench_dev_cn_20231003.tsv or mmbench_test_cn_20231003.tsv.
"""

from __future__ import annotations

from llava.eval.benchmarks.mmbench import MMBench


class MMBenchCN(MMBench):
    """MMBench in Chinese. The instruction is that of LLaVA's model_vqa_mmbench with --lang cn."""

    name = "mmbench_cn"
    download_page = "https://github.com/haotian-liu/LLaVA/blob/main/docs/Evaluation.md#mmbench-cn"
    files = {"dev": "mmbench_dev_cn_20231003.tsv", "test": "mmbench_test_cn_20231003.tsv"}
    instruction = "\n请直接回答选项字母。"

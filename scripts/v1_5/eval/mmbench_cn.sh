#!/usr/bin/env bash
# MMBench-CN with LLaVA-1.5-7B: bash scripts/v1_5/eval/mmbench_cn.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" mmbench_cn --family v1_5 "$@"

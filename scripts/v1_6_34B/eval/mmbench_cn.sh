#!/usr/bin/env bash
# MMBench-CN with LLaVA-1.6-34B: bash scripts/v1_6_34B/eval/mmbench_cn.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" mmbench_cn --family v1_6_34B "$@"

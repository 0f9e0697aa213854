#!/usr/bin/env bash
# MMBench with LLaVA-1.6-34B: bash scripts/v1_6_34B/eval/mmbench.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" mmbench --family v1_6_34B "$@"

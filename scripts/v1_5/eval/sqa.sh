#!/usr/bin/env bash
# ScienceQA-IMG with LLaVA-1.5-7B: bash scripts/v1_5/eval/sqa.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" sqa --family v1_5 "$@"

#!/usr/bin/env bash
# GQA with LLaVA-1.6-7B: bash scripts/v1_6/eval/gqa.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" gqa --family v1_6 "$@"

#!/usr/bin/env bash
# TextVQA with LLaVA-1.6-7B: bash scripts/v1_6/eval/textvqa.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" textvqa --family v1_6 "$@"

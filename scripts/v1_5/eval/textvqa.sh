#!/usr/bin/env bash
# TextVQA with LLaVA-1.5-7B: bash scripts/v1_5/eval/textvqa.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" textvqa --family v1_5 "$@"

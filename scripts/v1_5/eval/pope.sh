#!/usr/bin/env bash
# POPE with LLaVA-1.5-7B: bash scripts/v1_5/eval/pope.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" pope --family v1_5 "$@"

#!/usr/bin/env bash
# POPE with LLaVA-1.6-7B: bash scripts/v1_6/eval/pope.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" pope --family v1_6 "$@"

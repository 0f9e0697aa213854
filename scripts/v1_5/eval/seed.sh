#!/usr/bin/env bash
# SEED-Bench (images) with LLaVA-1.5-7B: bash scripts/v1_5/eval/seed.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" seed --family v1_5 "$@"

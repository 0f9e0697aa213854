#!/usr/bin/env bash
# SEED-Bench (images) with LLaVA-1.6-34B: bash scripts/v1_6_34B/eval/seed.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" seed --family v1_6_34B "$@"

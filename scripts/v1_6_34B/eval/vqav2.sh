#!/usr/bin/env bash
# VQAv2 with LLaVA-1.6-34B: bash scripts/v1_6_34B/eval/vqav2.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" vqav2 --family v1_6_34B "$@"

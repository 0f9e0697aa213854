#!/usr/bin/env bash
# VQAv2 through lmms-eval: bash scripts/lmms_eval/vqav2_val.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" vqav2_val "$@"

#!/usr/bin/env bash
# OCRBench through lmms-eval: bash scripts/lmms_eval/ocrbench.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" ocrbench "$@"

#!/usr/bin/env bash
# DocVQA through lmms-eval: bash scripts/lmms_eval/docvqa.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" docvqa_val "$@"

#!/usr/bin/env bash
# TextVQA without OCR tokens through lmms-eval: bash scripts/lmms_eval/textvqa.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" textvqa_val "$@"

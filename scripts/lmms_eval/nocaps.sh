#!/usr/bin/env bash
# NoCaps through lmms-eval: bash scripts/lmms_eval/nocaps.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" nocaps_val "$@"

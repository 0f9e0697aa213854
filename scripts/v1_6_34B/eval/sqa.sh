#!/usr/bin/env bash
# ScienceQA-IMG with LLaVA-1.6-34B: bash scripts/v1_6_34B/eval/sqa.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" sqa --family v1_6_34B "$@"

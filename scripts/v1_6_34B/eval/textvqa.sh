#!/usr/bin/env bash
# TextVQA with LLaVA-1.6-34B: bash scripts/v1_6_34B/eval/textvqa.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" textvqa --family v1_6_34B "$@"

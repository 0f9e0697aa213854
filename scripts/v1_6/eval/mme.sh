#!/usr/bin/env bash
# MME with LLaVA-1.6-7B: bash scripts/v1_6/eval/mme.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" mme --family v1_6 "$@"

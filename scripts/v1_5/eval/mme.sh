#!/usr/bin/env bash
# MME with LLaVA-1.5-7B: bash scripts/v1_5/eval/mme.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" mme --family v1_5 "$@"

#!/usr/bin/env bash
# MM-Vet with LLaVA-1.5-7B: bash scripts/v1_5/eval/mmvet.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" mmvet --family v1_5 "$@"

#!/usr/bin/env bash
# MM-Vet with LLaVA-1.6-34B: bash scripts/v1_6_34B/eval/mmvet.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" mmvet --family v1_6_34B "$@"

#!/usr/bin/env bash
# VizWiz with LLaVA-1.5-7B: bash scripts/v1_5/eval/vizwiz.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" vizwiz --family v1_5 "$@"

#!/usr/bin/env bash
# VizWiz with LLaVA-1.6-34B: bash scripts/v1_6_34B/eval/vizwiz.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" vizwiz --family v1_6_34B "$@"

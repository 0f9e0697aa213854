#!/usr/bin/env bash
# The demo benchmark with a shipped demo checkpoint, 4,000 questions in one to two minutes: bash scripts/demo/eval/shapes.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" shapes --family demo "$@"

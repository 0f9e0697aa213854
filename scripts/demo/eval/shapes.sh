#!/usr/bin/env bash
# The demo benchmark with a shipped demo checkpoint: bash scripts/demo/eval/shapes.sh [tokens] [flags]
# It asks 4,000 questions: one to two minutes on two free cores, several on a busy machine. --limit N asks the first N.
echo "shapes: 4,000 questions, one to two minutes on two free cores; --limit N asks the first N" >&2
exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" shapes --family demo "$@"

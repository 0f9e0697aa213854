#!/usr/bin/env bash
# Trains a demo checkpoint from nothing: bash scripts/demo/train.sh [v1.5 | v1.6 | v1.5-no-alignment] [flags]
# v1.6 starts from the v1.5 checkpoint in playground/. Stopped runs go on after their last finished stage.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
# Waiting OpenMP threads that spin cost more than they save on a busy machine.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
recipe=v1.5
if [[ "${1:-}" == [!-]* ]]; then
    recipe="$1"
    shift
fi
exec "$python" -m llava.shapes.training --recipe "$recipe" "$@"

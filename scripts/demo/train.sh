#!/usr/bin/env bash
# Trains a demo checkpoint: bash scripts/demo/train.sh [v1.5 | v1.6 | captions | v1.5-no-alignment] [flags]
# v1.6 and captions start from the v1.5 checkpoint in playground/. A stopped run continues after its last finished stage.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
# By default, waiting OpenMP threads spin, which on a busy machine costs more than it saves.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
recipe=v1.5
if [[ "${1:-}" == [!-]* ]]; then
    recipe="$1"
    shift
fi
exec "$python" -m llava.shapes.training --recipe "$recipe" "$@"

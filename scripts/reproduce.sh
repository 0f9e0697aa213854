#!/usr/bin/env bash
# The published table in one command: bash scripts/reproduce.sh v1_5|v1_6|avl [--plan] [--prepare] [--subset N] [flags]
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m llava.eval.reproduce "$@"

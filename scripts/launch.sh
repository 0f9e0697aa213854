#!/usr/bin/env bash
# python -m llava.eval.launch with this checkout's code and environment, from any working directory.
# Paths on the command line are relative to the working directory. Defaults are in the checkout.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m llava.eval.launch "$@"

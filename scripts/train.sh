#!/usr/bin/env bash
# torchrun -m llava.train.train with this checkout's code and environment, from any working directory.
# One process per GPU (CUDA_VISIBLE_DEVICES, else all), or PROCESSES=n; on several machines also NNODES, NODE_RANK,
# MASTER_ADDR and MASTER_PORT. If a flag is given twice, the second value counts.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python=python3
export PATH="$root/.venv/bin:$PATH" # ninja, which DeepSpeed builds with
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
processes="${PROCESSES:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
exec "$python" -m llava.common.torchrun --nproc_per_node "$processes" --nnodes "${NNODES:-1}" \
    --node_rank "${NODE_RANK:-0}" --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "${MASTER_PORT:-29500}" \
    -m llava.train.train "$@"

#!/usr/bin/env bash
# One benchmark over several machines. Run the same command on each of them, with NODE_RANK counted from 0:
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 bash scripts/cluster/torchrun.sh vqav2 144 --family v1_6
# This checkout, the checkpoint, the images and runs/ (--output) must be in folders with the same path on all machines.
# One rank per machine uses all its devices (CUDA_VISIBLE_DEVICES), GPUS_PER_MODEL= of them per copy of the model.
# RANKS_PER_NODE= starts several ranks that share them. If a machine dies, run the same command again on all machines.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m llava.common.torchrun --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}" \
    --nproc-per-node "${RANKS_PER_NODE:-1}" --master-addr "${MASTER_ADDR:-127.0.0.1}" \
    --master-port "${MASTER_PORT:-29400}" --max-restarts 0 -m llava.eval.launch "$@"

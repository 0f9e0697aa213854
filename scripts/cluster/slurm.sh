#!/usr/bin/env bash
#SBATCH --job-name=adav
#SBATCH --ntasks-per-node=1
#SBATCH --output=adav-%j.log
# One benchmark over the nodes of a Slurm job, one rank per node with all its GPUs:
#   sbatch --nodes 2 --gpus-per-node 4 scripts/cluster/slurm.sh vqav2 144 --family v1_6
# This checkout, the checkpoint, the images and runs/ (--output) must be in folders with the same path on all nodes.
# GPUS_PER_MODEL=2 is for a model that does not fit on one GPU. If a node dies, the same command resumes the run.
set -euo pipefail
root="${SLURM_SUBMIT_DIR:-$PWD}" # sbatch runs a copy of this file: submit from the checkout
[ -f "$root/scripts/cluster/slurm.sh" ] || { echo "error: submit from the checkout, not from $root" >&2; exit 2; }
python="$root/.venv/bin/python"
[ -x "$python" ] || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" ADAV_PYTHON="$python"
export MASTER_ADDR="${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}"
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
# If a rank fails, srun ends the other ranks, which finish their current batches first.
exec srun --kill-on-bad-exit=1 --ntasks-per-node=1 bash -c '
    export RANK="$SLURM_PROCID" WORLD_SIZE="$SLURM_NTASKS" LOCAL_RANK="$SLURM_LOCALID" LOCAL_WORLD_SIZE=1
    exec "$ADAV_PYTHON" -m llava.eval.launch "$@"' rank "$@"

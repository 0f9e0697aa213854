#!/usr/bin/env bash
# One lmms-eval task: bash scripts/lmms_eval/run.sh TASK [tokens] [flags of python -m llava.integrations.lmms_eval.command]
# CKPT= names the checkpoint, ADAV_CONFIG= the configuration file, MODEL_ARGS= more model arguments
# (overall_tokens=144,...), BATCH_SIZE= the batch size, OUTPUT= the output folder. RANKS=4 starts four processes with one
# GPU each.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="$root/.venv/bin/python"
[ -x "$python" ] || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
task="${1:?usage: run.sh TASK [tokens] [flags]}"
shift
arguments="pretrained=${CKPT:-llava-hf/llava-1.5-7b-hf},config=${ADAV_CONFIG:-$root/adav_configs.json}"
if [[ "${1:-}" =~ ^[0-9]+$ ]]; then
    arguments+=",overall_tokens=$1"
    shift
fi
arguments+="${MODEL_ARGS:+,$MODEL_ARGS}"
launcher=("$python" -m)
[ "${RANKS:-1}" = 1 ] || launcher=("$python" -m llava.common.torchrun --standalone --nproc-per-node "$RANKS" -m)
exec "${launcher[@]}" llava.integrations.lmms_eval.command --model adav_llava --model_args "$arguments" --tasks "$task" \
    --batch_size "${BATCH_SIZE:-8}" --log_samples --output_path "${OUTPUT:-$root/runs/lmms_eval}" "$@"

#!/usr/bin/env bash
# One lmms-eval task on vLLM with this repository's plugin: bash scripts/lmms_eval/vllm.sh TASK [tokens] [flags of lmms-eval]
# Runs under $VLLM_PYTHON, else .venv-vllm, which needs lmms-eval beside vLLM (docs/lmms_eval.md). CKPT= names a checkpoint in
# transformers' format, ADAV_CONFIG= the configuration file, MODEL_ARGS= more arguments of lmms-eval's model vllm
# (tensor_parallel_size=2,...), BATCH_SIZE= the batch size, OUTPUT= the output folder.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
python="${VLLM_PYTHON:-$root/.venv-vllm/bin/python}"
[ -n "${VLLM_PYTHON:-}" ] || [ -x "$python" ] || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
task="${1:?usage: vllm.sh TASK [tokens] [flags]}"
shift
tokens=()
if [[ "${1:-}" =~ ^[0-9]+$ ]]; then
    tokens=(--overall-tokens "$1")
    shift
fi
# lmms-eval splits model arguments at commas, so they name a file: the configuration with the number of tokens.
settings="$(mktemp --suffix .json)"
trap 'rm -f "$settings"' EXIT
"$python" -m llava.config "${ADAV_CONFIG:-$root/adav_configs.json}" "${tokens[@]}" > "$settings"
arguments="model=${CKPT:-llava-hf/llava-1.5-7b-hf},mm_processor_kwargs={\"adav\": \"$settings\"}${MODEL_ARGS:+,$MODEL_ARGS}"
"$python" -m lmms_eval --model vllm --model_args "$arguments" --tasks "$task" --batch_size "${BATCH_SIZE:-64}" \
    --log_samples --output_path "${OUTPUT:-$root/runs/lmms_eval}" "$@"

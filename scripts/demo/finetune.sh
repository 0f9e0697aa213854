#!/usr/bin/env bash
# A short fine-tuning of a demo checkpoint on the CPU, with the trainer that trains real checkpoints:
#   bash scripts/demo/finetune.sh v1.5 [flags]            e.g. --method adav --overall_tokens 14: selection in training
# The data go to playground/train/conversations-<family>, the checkpoint goes to playground/train/finetuned-<family>.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
family="${1:-v1.5}"
work="$root/playground/train"
python="$root/.venv/bin/python"
[ -x "$python" ] || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
"$python" -m llava.shapes.conversations --family "$family" --pictures 1000 --out "$work/conversations-$family"
PROCESSES="${PROCESSES:-1}" exec bash "$root/scripts/train.sh" \
    --model_name_or_path "$root/playground/llava-shapes-$family" \
    --version v1 \
    --data_path "$work/conversations-$family/data.json" \
    --image_folder "$work/conversations-$family/images" \
    --output_dir "$work/finetuned-$family" \
    --use_cpu True \
    --num_train_epochs 1 \
    --per_device_train_batch_size 32 \
    --save_strategy steps \
    --save_steps 50 \
    --save_total_limit 1 \
    --learning_rate 5e-5 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 10 \
    --dataloader_pin_memory False \
    --report_to none "${@:2}"

#!/usr/bin/env bash
# Long answers: captions of the demo's pictures with the checkpoint of train.sh captions: bash scripts/demo/eval/shapes_captions.sh [tokens] [flags]
CKPT="${CKPT:-playground/llava-shapes-captions}" exec bash "$(dirname "${BASH_SOURCE[0]}")/../../launch.sh" shapes_captions --family demo "$@"

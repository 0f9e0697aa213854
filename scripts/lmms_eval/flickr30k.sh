#!/usr/bin/env bash
# Flickr30k captions through lmms-eval: bash scripts/lmms_eval/flickr30k.sh [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" flickr30k_test "$@"

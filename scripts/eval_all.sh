#!/usr/bin/env bash
# The seven benchmarks of the published table, and that table: bash scripts/eval_all.sh v1_5|v1_6|v1_6_34B [tokens] [flags]
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" all --family "$@"

#!/usr/bin/env bash
# The seven benchmarks of the published table, and that table: bash scripts/eval_all.sh v1_5|v1_6|v1_6_34B [tokens] [flags]
if [[ "${1:-}" != [!-]* ]]; then
    echo "error: scripts/eval_all.sh needs a family first, v1_5, v1_6 or v1_6_34B, as in: bash scripts/eval_all.sh v1_6 144" >&2
    exit 2
fi
exec bash "$(dirname "${BASH_SOURCE[0]}")/launch.sh" all --family "$@"

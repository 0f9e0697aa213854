#!/usr/bin/env bash
# One run on a GPU, in two commands. Each takes about five minutes on an H100, and ten at most:
#
#   bash benchmarks/gpu.sh a      tests on the GPU, decode kernel, profile
#   bash benchmarks/gpu.sh b      end to end at batches 1, 8 and 32; prefill of every method if time is left
#   python benchmarks/fill_performance.py "$OUT"      tables and plots of docs/performance.md
#
# Each part has its own time limit and writes its CSVs into $OUT as it goes. docs/performance.md says what is measured.
#   LIMIT         seconds for the whole command (570)
#   OUT           folder for results and logs (/tmp/gpu-out)         PY            Python (python3)
#   PRESET        sizes of the model (llava-v1.6-vicuna-7b)           KERNEL        preset of decode_kernel.py (gpu)
#   KERNEL_DTYPE  its flags for the dtype (--dtype bfloat16)          PROFILE       more flags for gpu_profile.py
#   XDIST         how the tests are spread (-n 12)                    SITE          folder of packages that are not installed
#   ADAV_EMULATE  1: CUDA graphs are emulated in the tests            ADAV_COMMIT   the commit, where there is no .git
# Without a GPU, to try it out:
#   ADAV_EMULATE=1 XDIST= PRESET=tiny KERNEL=tiny KERNEL_DTYPE= OUT=out PY=.venv/bin/python bash benchmarks/gpu.sh a
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
# The models switch cuDNN's attention off (llava.model.builder.prefer_flash_attention). This line does the same for code
# that runs before a model is loaded or without one.
export TORCH_CUDNN_SDPA_DEPRIORITIZED="${TORCH_CUDNN_SDPA_DEPRIORITIZED-1}"
export PYTHONPATH="${SITE:+$SITE:}$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
OUT="${OUT:-/tmp/gpu-out}" PY="${PY:-python3}" PRESET="${PRESET:-llava-v1.6-vicuna-7b}" KERNEL="${KERNEL:-gpu}"
LIMIT="${LIMIT:-570}"
# Several threads only wait for each other on a tiny model.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$([ "$PRESET" = tiny ] && echo 1 || echo 8)}"
mkdir -p "$OUT" || exit
logs="$(mktemp -d)" && trap 'rm -rf "$logs"' EXIT

part() { # seconds, name, lines that are shown, command ...
  local left=$((LIMIT - SECONDS)) limit=$1 name=$2 lines=$3 start=$SECONDS code
  shift 3
  if [ "$left" -lt 30 ]; then
    echo "== $name: left out, $left of $LIMIT s were left"
    return
  fi
  [ "$limit" -lt "$left" ] || limit=$left
  echo "== $name"
  timeout -k 5 "$limit" "$@" > "$logs/$name" 2>&1
  code=$?
  tail -n "$lines" "$logs/$name"
  { echo "== $name: exit code $code, $((SECONDS - start)) s"; cat "$logs/$name"; } >> "$OUT/log-$stage.txt"
  echo "== $name: exit code $code"
  [ "$code" = 0 ] || failed=1
}

stage="${1:-}" failed=0
case "$stage" in a | b) ;; *) echo 'error: benchmarks/gpu.sh takes one word, allowed are "a" and "b"' >&2; exit 2 ;; esac
: > "$OUT/log-$stage.txt"
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv,noheader 2> /dev/null
if [ "$stage" = a ]; then
  # shellcheck disable=SC2086 # variables hold any number of words
  part 200 tests 12 env OMP_NUM_THREADS=1 "$PY" -m pytest -q ${XDIST--n 12} -p no:cacheprovider -m "not long" \
    tests/kernels/test_decode_kernel.py tests/kernels/test_fused_kernels.py tests/model/test_cuda.py
  # shellcheck disable=SC2086
  part 100 kernel 70 "$PY" benchmarks/decode_kernel.py --preset "$KERNEL" ${KERNEL_DTYPE---dtype bfloat16} \
    --shares 0.3 0.1 --repeats 10 --output "$OUT/decode_kernel.csv"
  # shellcheck disable=SC2086
  part 190 profile 130 "$PY" benchmarks/gpu_profile.py --preset "$PRESET" --out "$OUT" ${PROFILE-}
else
  # Without expandable segments, freed memory is fragmented, and a batch of 32 needs almost all of it.
  export PYTORCH_CUDA_ALLOC_CONF="${PYTORCH_CUDA_ALLOC_CONF-expandable_segments:True}"
  # The baselines are generate() of transformers and of the published way. `ours` is only compared, not timed.
  part 420 end_to_end 40 "$PY" benchmarks/end_to_end.py --preset "$PRESET" --quick --batches 1 8 32 \
    --providers transformers upstream engine --config method=none --config "method=adav overall_tokens=144" \
    --config "A-VL, interval 16: method=none vision_adaptive_attention=true vision_adaptive_attention_compute_rate=0.89 vision_adaptive_attention_update_interval=16" \
    --output "$OUT/end_to_end.csv" --plot "$OUT/end_to_end.png"
  part 300 prefill 40 "$PY" benchmarks/prefill.py --preset "$PRESET" --shares 0.05 --repeats 3 \
    --output "$OUT/prefill.csv"
fi
exit "$failed"

#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under nine minutes, without a network: builds in place against the
# PyTorch of PYTHON (default python3), runs the CUDA tests and the sanitizer, measures every kernel against its limit.
#
#   bash bench/gpu.sh [FOLDER]     FOLDER takes gpu.json and the stages' logs too; bench/results/gpu.json is always written
#
# CUTLASS_PATH (or the wheel nvidia-cutlass), TORCH_CUDA_ARCH_LIST and MAX_JOBS are honoured by the build. Exit status:
# 0, 1 where the build, a test or the sanitizer failed, 2 without a GPU. A stage that fails or runs over its time is
# recorded; the others still run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python="${PYTHON:-python3}"

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "bench/gpu.sh: no CUDA device is visible to PyTorch of $python" >&2
  exit 2
fi

out="${1:-}"
if [ -z "$out" ]; then
  out="$(mktemp -d)"
  trap 'rm -rf "$out"' EXIT
fi
mkdir -p "$out"
out="$(cd "$out" && pwd)"
rm -f "$out"/section-*.json "$out/stages.txt"
failed=0
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

# stage NAME SECONDS COMMAND...: the last words of a failure are shown, all of them are in FOLDER/NAME.log.
stage() {
  local name=$1 limit=$2 began=$SECONDS status=0
  shift 2
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  local verdict="passed"
  [ "$status" -eq 0 ] || verdict="failed, status $status"
  [ "$status" -ne 124 ] && [ "$status" -ne 137 ] || verdict="over its $limit s"
  printf '%s\t%s\t%s s\n' "$name" "$verdict" "$((SECONDS - began))" >>"$out/stages.txt"
  echo "$name: $verdict after $((SECONDS - began)) s"
  [ "$status" -eq 0 ] || tail -n 15 "$out/$name.log"
  return "$status"
}

skip() {
  printf '%s\t%s\t0 s\n' "$1" "skipped: $2" >>"$out/stages.txt"
  echo "$1: skipped, $2"
}

# sanitize TOOL: every operator once on small shapes. Some virtual machines do not let the tool at their device.
sanitize() {
  if ! command -v compute-sanitizer >/dev/null; then
    skip "$1" "compute-sanitizer is not on PATH"
  elif ! stage "$1" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$python" bench/bench_gpu.py smoke; then
    if grep -q "Device not supported" "$out/$1.log"; then skip "$1" "this device is not supported"; else failed=1; fi
  fi
}

if ! GAPKERN_CUDA=on stage build 135 "$python" setup.py build_ext --inplace; then
  exit 1
fi
stage tests 75 "$python" -m pytest tests -m "cuda or gpu" -q --color=no || failed=1
sanitize memcheck
sanitize racecheck
stage ceilings 20 "$python" bench/bench_gpu.py ceilings --out "$out" --seconds 15
stage contrastive 70 "$python" bench/bench_gpu.py contrastive --out "$out" --seconds 55
stage sigmoid 25 "$python" bench/bench_gpu.py sigmoid --out "$out" --seconds 15
stage memory 20 "$python" bench/bench_gpu.py memory --out "$out" --seconds 15
stage rowwise 40 "$python" bench/bench_gpu.py rowwise --out "$out" --seconds 30
stage search 30 "$python" bench/bench_gpu.py search --out "$out" --seconds 20
"$python" bench/bench_gpu.py collect --out "$out" --also "$out" || failed=1
exit "$failed"

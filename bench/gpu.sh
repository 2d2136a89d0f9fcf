#!/usr/bin/env bash
# Everything that needs a GPU, in one command, ten minutes and without a network: builds in place against the PyTorch of
# PYTHON (default python3), checks the kernels, measures them against their limits and others, runs tests and sanitizer.
#
#   bash bench/gpu.sh [--dry] [FOLDER]   FOLDER takes gpu.json and the stages' logs too; bench/results/gpu.json is written
#
# Most wanted first: what is left undone when the time (GPU_SECONDS, default 590) is over is what matters least. Results
# are written after every case. CUTLASS_PATH (or the wheel nvidia-cutlass), TORCH_CUDA_ARCH_LIST and MAX_JOBS are
# honoured by the build; libraries built elsewhere for this PyTorch and carried here in gapkern/ are used as they are. WHEELS
# names a folder of others' wheels (memeff, siglip-kernel) to compare with.
#
# Exit status: 0, 1 where the build, a check, a test or the sanitizer failed, 2 without a GPU. A stage that fails or runs
# over its time is recorded; the others still run. --dry does all of it on the CPU, on tiny sizes, and builds nothing.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
python="${PYTHON:-python3}"
seconds="${GPU_SECONDS:-590}"
dry=""
if [ "${1:-}" = "--dry" ]; then
  dry=yes
  shift
elif ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "bench/gpu.sh: no CUDA device is visible to PyTorch of $python" >&2
  exit 2
fi

out="${1:-}"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
[ -n "$out" ] || out="$scratch/out"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
rm -f "$out"/section-*.json "$out/stages.txt"
failed=0
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

skip() {
  printf '%s\t%s\t0 s\n' "$1" "skipped: $2" >>"$out/stages.txt"
  echo "$1: skipped, $2"
}

# stage NAME SECONDS COMMAND...: the last words of a failure are shown, all of them are in FOLDER/NAME.log.
stage() {
  local name=$1 limit=$2 began=$SECONDS status=0 left=$((seconds - SECONDS))
  shift 2
  if [ "$left" -lt 5 ]; then
    skip "$name" "the $seconds s are over"
    return 0
  fi
  [ "$limit" -le "$left" ] || limit=$left
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
  local verdict="passed"
  [ "$status" -eq 0 ] || verdict="failed, status $status"
  [ "$status" -ne 124 ] && [ "$status" -ne 137 ] || verdict="over its $limit s"
  printf '%s\t%s\t%s s\n' "$name" "$verdict" "$((SECONDS - began))" >>"$out/stages.txt"
  echo "$name: $verdict after $((SECONDS - began)) s"
  [ "$status" -eq 0 ] || tail -n 15 "$out/$name.log"
  return "$status"
}

# measure SECTION SECONDS: a section of bench_gpu.py, which stops by itself shortly before.
measure() {
  stage "$1" "$2" "$python" bench/bench_gpu.py "$1" --out "$out" --seconds "$(($2 - 8))" "${sizes[@]}"
}

# sanitize TOOL: every operator once on small shapes. Some virtual machines do not let the tool at their device.
sanitize() {
  if ! command -v compute-sanitizer >/dev/null; then
    skip "$1" "compute-sanitizer is not on PATH"
  elif ! stage "$1" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$python" bench/bench_gpu.py smoke "${device[@]}"; then
    if grep -q "Device not supported" "$out/$1.log"; then skip "$1" "this device is not supported"; else failed=1; fi
  fi
}

for wheel in "${WHEELS:-/nowhere}"/*.whl; do
  [ -e "$wheel" ] || continue
  "$python" -m zipfile -e "$wheel" "$scratch/wheels" && export PYTHONPATH="$PYTHONPATH:$scratch/wheels"
done

sizes=() device=() tests=(-q --color=no)
if [ -n "$dry" ]; then
  sizes=(--device cpu --quick) device=(--device cpu) tests=(-q --color=no --collect-only)
  stage build 60 "$python" -c 'import gapkern, gapkern.ops' || exit 1
elif "$python" -c 'import sys; from gapkern.ops.contrastive import dispatch; sys.exit(not dispatch.built())' \
  2>/dev/null; then
  skip build "the libraries are there and load"
elif ! GAPKERN_CUDA=on stage build 300 "$python" setup.py build_ext --inplace; then
  exit 1
fi
stage smoke 60 "$python" bench/bench_gpu.py smoke "${device[@]}" || failed=1
measure ours 45
measure ceilings 25
measure rivals 75
measure contrastive 90
measure sigmoid 40
measure float32 45
measure masked 40
measure largest 30
measure rowwise 45
measure search 35
measure memory 25
stage tests 90 "$python" -m pytest tests -m "cuda or gpu" "${tests[@]}" || failed=1
sanitize memcheck
sanitize racecheck
"$python" bench/bench_gpu.py collect --out "$out" --also "$out" "${sizes[@]}" || failed=1
exit "$failed"

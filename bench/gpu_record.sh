#!/usr/bin/env bash
# A full record of a GPU within nine minutes: builds in place, runs the bench, the GPU tests and compute-sanitizer, keeps JSON, table and logs.
#
#   bench/gpu_record.sh [FOLDER]     results go to FOLDER (default: bench/results)
#   PYTHON=...                       the Python to use, with torch and triton installed (default: python3)
#
# Every part has its share of the time; one that fails does not stop the others. Exits 1 and names the parts that failed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
folder=${1:-bench/results}
failed=()

part() { # part NAME SECONDS COMMAND...
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  echo "== $name (at most $seconds s)"
  timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee "$folder/gpu-$name.log"
  local status=${PIPESTATUS[0]} reason
  case $status in
    0) reason="" ;;
    124 | 137) reason="ran out of its $seconds s" ;;
    *) reason="exit $status" ;;
  esac
  [ "$status" -eq 0 ] || failed+=("$name ($reason)")
  echo "== $name: exit $status after $((SECONDS - start)) s"
}

if ! capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null); then
  echo "bench/gpu_record.sh: torch in $python sees no CUDA device here" >&2
  exit 1
fi
mkdir -p "$folder" || exit 1

part device 10 nvidia-smi
# For this GPU alone; the intermediate code of a newer one is not needed to measure.
export FASTPPO_CUDA=1 FASTPPO_CUDA_ARCHS=$capability
part build 75 "$python" -m pip install -q --no-build-isolation --no-deps -e .
part info 10 "$python" -m fastppo info
# In three records: one that runs out of its time does not take the others with it.
ops=$("$python" -c 'from fastppo.bench.catalog import ops_on; print(*(f"--op {op}" for op in ops_on("cuda") if op not in ("rollout", "ppo_step")))')
part bench 125 "$python" -m fastppo.bench --device cuda $ops --rounds 7 --json "$folder" --check
part rollout 60 "$python" -m fastppo.bench --device cuda --op rollout --json "$folder/gpu-rollout.json" --check
part ppo_step 80 "$python" -m fastppo.bench --device cuda --op ppo_step --json "$folder/gpu-ppo-step.json" --check
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 8) # which share the GPU; most of a test's time is compiling
part tests 100 "$python" -m pytest -m gpu ${workers[@]+"${workers[@]}"} tests/test_gpu.py -k "not sanitizer"
part sanitizer 40 "$python" -m pytest -m gpu tests/test_gpu.py -k sanitizer

if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi

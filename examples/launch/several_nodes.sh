#!/usr/bin/env bash
# A run on several machines, started by hand on each of them with the same words:
#   NODES=2 HEAD=node0.cluster:29500 examples/launch/several_nodes.sh recipes/gsm8k.yaml output_dir=/shared/runs/gsm8k
# HEAD is a machine of them with a free port, which all can reach. fastppo, recipe, model and data lie at the same places everywhere, output_dir on
# a disk that all share. GPUS: of each machine (default: all that there are).
set -euo pipefail

nodes=${NODES:?number of machines}
head=${HEAD:?host:port of one of them}
gpus=${GPUS:-gpu}

exec torchrun \
  --nnodes "$nodes" \
  --nproc-per-node "$gpus" \
  --rdzv-backend c10d \
  --rdzv-endpoint "$head" \
  --rdzv-id "${RUN_ID:-fastppo}" \
  --max-restarts 3 \
  -m fastppo train "$@"

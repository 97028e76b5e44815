#!/usr/bin/env bash
# A run on the GPUs of one machine:  examples/launch/one_node.sh recipes/gsm8k.yaml [key=value ...]
# GPUS says how many (default: all that there are). A process that dies is started again with the others, and the run goes on from its newest
# checkpoint, three times at most.
set -euo pipefail

gpus=${GPUS:-gpu}

exec torchrun --standalone --nproc-per-node "$gpus" --max-restarts 3 -m fastppo train "$@"

#!/usr/bin/env bash
# What a launch does on the machine with the GPUs: the environment, the data, then the first hour or three seeds. What is
# worth keeping lies in RESULTS at the end, also when a step fails, and the exit code is that of the failed step.
# launch/skypilot.yaml and launch/slurm.sh run it. By hand: LAUNCH=seeds launch/job.sh
#
#   LAUNCH        first-hour (default) or seeds
#   RESULTS       folder for the results (default: results/$LAUNCH)
#   DATA_PATH     folder of the shards (default: data/sp8192)
#   TRAIN_SHARDS  shards of 100 million tokens to download (default: 20 for the first hour, 80 for seeds)
#   GPUS          ranks of each seed (default: 8)
#   PREPARE       0 leaves out environment and data, where this machine has no network
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

LAUNCH=${LAUNCH:-first-hour}
case $LAUNCH in
first-hour) shards=20 ;;
seeds) shards=80 ;;
*)
    echo "error: LAUNCH=$LAUNCH: must be first-hour or seeds" >&2
    exit 2
    ;;
esac
RESULTS=${RESULTS:-results/$LAUNCH}
export DEVICE=${DEVICE:-cuda} DATA_PATH=${DATA_PATH:-data/sp8192}
mkdir -p "$RESULTS"

# Runs a command and shows it. A failure is named, and ends the launch.
step() {
    local code=0
    echo "== $*"
    "$@" || code=$?
    if [ "$code" != 0 ]; then
        echo "error: exit code $code of: $*" >&2
        exit "$code"
    fi
}

work() {
    if [ "${PREPARE:-1}" != 0 ]; then
        step make venv-gpu
        step make data ARGS="sp8192-caseops --train-shards ${TRAIN_SHARDS:-$shards} --out $DATA_PATH"
    fi
    if [ "$LAUNCH" = first-hour ]; then
        step make first-hour ARGS="--out $RESULTS/first-hour"
    else
        export PRESET=${PRESET:-record}
        step make reproduce ARGS="--nproc ${GPUS:-8} --work $RESULTS/runs --out $RESULTS/submission --with-artifacts"
    fi
}

# The log is one of the results.
work 2>&1 | tee -a "$RESULTS/launch.log"

#!/usr/bin/env bash
# The first hour, or three seeds, on one node of eight GPUs, from the repository's root (launch/README.md):
#
#   sbatch launch/slurm.sh
#   sbatch --export=ALL,LAUNCH=seeds --partition=NAME --account=NAME launch/slurm.sh
#
# What job.sh writes goes to the node's own disk (SCRATCH, or a temporary folder there), and is brought back to
# results/LAUNCH-JOBID beside the repository's other folders: at the end, after a failure, and five minutes before the
# time limit. The exit code is job.sh's.
#SBATCH --job-name=golf
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --output=golf-%j.log
set -euo pipefail
# Slurm runs a copy of this script from a folder of its own.
cd "${SLURM_SUBMIT_DIR:?: run this with sbatch}"

export LAUNCH=${LAUNCH:-first-hour}
scratch=$(mktemp -d "${SCRATCH:-${TMPDIR:-/tmp}}/golf-$SLURM_JOB_ID-XXXXXX")
export RESULTS=$scratch/results
target=$SLURM_SUBMIT_DIR/results/$LAUNCH-$SLURM_JOB_ID

# Whatever ends the job, its results come back first. Scratch is kept where they do not.
bring_back() {
    local code=$?
    if mkdir -p "$RESULTS" "$target" && cp -R "$RESULTS/." "$target/"; then
        echo "results: $target"
        rm -rf "$scratch"
    else
        echo "error: the results are still in $RESULTS on $(hostname)" >&2
        [ "$code" != 0 ] || code=1
    fi
    exit "$code"
}
trap bring_back EXIT

# One task has the whole node: torchrun starts a process for each GPU. In the background, so that TERM is heard.
srun --ntasks=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-64}" --cpu-bind=none launch/job.sh &
job=$!
trap 'kill -TERM "$job" || true; wait "$job" || true; exit 143' TERM
wait "$job"

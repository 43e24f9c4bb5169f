#!/usr/bin/env bash
# Rents a machine of eight H100s with SkyPilot, runs launch/skypilot.yaml on it, brings the results back, ends it:
#
#   launch/skypilot.sh                                    # the first hour
#   LAUNCH=seeds launch/skypilot.sh --infra gcp           # three seeds; options are those of `sky launch`
#
# The results come back after a failure too, into results/LAUNCH-TIME, or TARGET. CLUSTER names the machine (golf). The
# exit code is that of `sky launch` (100 where the job failed), or 1 where the results could not be fetched.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

LAUNCH=${LAUNCH:-first-hour}
CLUSTER=${CLUSTER:-golf}
TARGET=${TARGET:-results/$LAUNCH-$(date +%Y%m%d-%H%M%S)}

code=0
sky launch --yes --cluster "$CLUSTER" --env LAUNCH="$LAUNCH" "$@" launch/skypilot.yaml || code=$?
mkdir -p "$TARGET"
# SkyPilot writes the machine's name into the configuration of ssh.
if rsync -az "$CLUSTER:sky_workdir/results/$LAUNCH/" "$TARGET/"; then
    echo "results: $TARGET"
    sky down --yes "$CLUSTER" || code=${code/#0/1}
else
    echo "error: no results came from $CLUSTER; it ends itself when it was idle for an hour (sky status)" >&2
    code=${code/#0/1}
fi
exit "$code"

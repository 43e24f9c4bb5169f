"""One rank of a run: train_gpt.py whose ranks notice faults sooner, and of which one has a fault when a stage begins.

The argument is JSON: rank, stage, fault (see `strike`) and limits, by the names of RankLimits.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]
import train_gpt as tg  # noqa: E402


def strike(fault):
    """This process has a fault, at a time that is left in a file."""
    Path("struck").write_text(str(time.time()))
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "hang":
        time.sleep(3600)
    elif fault == "refuse":
        raise tg.ConfigError("file.bin", "", "cannot be read (of this rank)")
    elif fault == "cut":
        os.truncate("shard.bin", 3000)
    elif fault == "raise":
        raise LookupError("a bug of this rank")


def main(plan):
    """Runs the script; the exit code."""
    tg.Watchdog.LIMITS = tg.RankLimits(**plan.get("limits", {}))
    enter = tg.Stage.__enter__

    def begin(stage):
        enter(stage)
        if stage.name == plan["stage"] and stage.run.rank == plan["rank"]:
            strike(plan["fault"])

    tg.Stage.__enter__ = begin
    return tg.main([], dict(os.environ))


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))

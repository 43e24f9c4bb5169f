"""All kinds of trials."""

from __future__ import annotations

from faults import kills
from faults.trials import Kind

KINDS = {
    kind.name: kind
    for kind in (
        Kind("kill", kills.kill, 4, meaning="SIGKILL at random moments and events, then the same command again"),
        Kind("kill-modes", kills.kill_two_modes, 1.5, meaning="the same with MODE=train, then MODE=eval"),
        Kind("kill-ranks", kills.kill_ranks, 2, meaning="the same on 2 ranks, and with another number of ranks after it"),
        Kind("resume-path", kills.resume_path, 1, meaning="RESUME=PATH from a run that was killed, killed again"),
        Kind("clock", kills.clock, 0.7, meaning="kills of a training with a time limit: all seconds count"),
    )
}

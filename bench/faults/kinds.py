"""All kinds of trials."""

from __future__ import annotations

from faults import damage, disks, explosions, kills, steadiness, stops, strange_folders, strange_texts
from faults.trials import Kind

KINDS = {
    kind.name: kind
    for kind in (
        Kind("kill", kills.kill, 4, meaning="SIGKILL at random moments and events, then the same command again"),
        Kind("kill-modes", kills.kill_two_modes, 1.5, meaning="the same with MODE=train, then MODE=eval"),
        Kind("kill-ranks", kills.kill_ranks, 2, meaning="the same on 2 ranks, or on another number after it"),
        Kind("resume-path", kills.resume_path, 1, meaning="RESUME=PATH from a run that was killed, killed again"),
        Kind("clock", kills.clock, 0.7, meaning="kills of a training with a time limit: all seconds count"),
        Kind("damage-checkpoint", damage.checkpoint_damage, 3, meaning="files of a run that was cut off are damaged"),
        Kind("damage-resume", damage.resume_damage, 1, meaning="a damaged checkpoint that RESUME=PATH names"),
        Kind("damage-artifact", damage.artifact_damage, 2, meaning="a damaged artifact or configuration, scored again"),
        Kind("damage-data", damage.data_damage, 2, meaning="damaged shards, manifest, tokenizer; before or in a run"),
        Kind("disk-calls", disks.calls_fail, 3, meaning="calls of the system fail: ENOSPC, EIO, EROFS, EDQUOT, others"),
        Kind(
            "disk-limit",
            disks.file_limit,
            1,
            meaning="a limit of a file's size (RLIMIT_FSIZE), perhaps lifted later",
        ),
        Kind("disk-small", disks.small_disk, 1, meaning="a small disk of its own, filled at a random moment"),
        Kind("disk-folder", disks.folder_vanishes, 1, meaning="the folder is removed, moved, or replaced in the run"),
        Kind("streams", disks.streams, 1, meaning="standard output closed, full, without a reader, or ASCII"),
        Kind("together", disks.together, 1, meaning="runs that begin in one folder at once"),
        Kind("signals", stops.signals, 2, meaning="SIGTERM, SIGINT, SIGHUP, SIGQUIT; then the same command again"),
        Kind("pauses", stops.pauses, 0.5, meaning="SIGSTOP and SIGCONT"),
        Kind("ranks", stops.lost_rank, 2, meaning="a rank killed, stopped, stuck or in error, in any stage"),
        Kind("torchrun", stops.launcher, 0.4, 300.0, "torchrun killed, ended or interrupted; a rank of it killed"),
        Kind("explosions", explosions.explosions, 2, meaning="absurd rates; numbers that are not finite"),
        Kind(
            "folders", strange_folders.folders, 3, meaning="damaged submissions, for check_submission.py and report.py"
        ),
        Kind("claims", strange_folders.claims, 0.5, meaning="a better figure in a submission: it must be found"),
        Kind("scripts", strange_folders.scripts, 0.7, meaning="hostile scripts, with check_submission.py --run"),
        Kind("texts", strange_texts.texts, 2, meaning="hostile texts for data/prepare.py"),
        Kind("prepare-kill", strange_texts.killed, 1, meaning="preparations that are killed; then the same command"),
        Kind("steady", steadiness.steady, 0.5, 660.0, "30 runs in one process: memory, threads, open files", 3),
    )
}

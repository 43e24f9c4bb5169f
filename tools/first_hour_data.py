"""A folder of shards with all training shards of another one (as links) and the first of its validation documents.

    python tools/first_hour_data.py data/sp8192 out/data --documents 6250
    python tools/first_hour_data.py data/sp8192     # only prints what it holds

One GPU takes eight times as long as eight for an evaluation of the challenge's documents: a short run scores fewer.
There is no manifest, so no leak audit is taken over.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() takes it: Ctrl-C while modules load is no traceback

import argparse
import sys
from pathlib import Path

import numpy as np

from runs import ROOT, Parser, UserError, command_line, number_type

sys.path.insert(0, str(ROOT))
import train_gpt as t  # noqa: E402


def describe(source: Path) -> None:
    """Prints what a folder holds. Errors: UserError where it lacks a split."""
    for split in ("train", "val"):
        paths = shards(source, split)
        print(f"{split}: {len(paths)} shards, {sum(len(t.open_shard(path)) for path in paths)} tokens")


def shards(source: Path, split: str) -> list[Path]:
    """The shards of a split, in order. Errors: UserError where there are none."""
    paths = sorted(source.glob(f"fineweb_{split}_[0-9]*.bin"))
    if not paths:
        raise UserError(f"{source}: holds no fineweb_{split}_*.bin")
    return paths


def write_first(source: Path, target: Path, tokens: int) -> None:
    """Copies a shard's header and first tokens."""
    header = np.fromfile(source, "<i4", t.SHARD_HEADER_BYTES // 4)
    header[2] = tokens
    target.write_bytes(header.tobytes() + np.asarray(t.open_shard(source)[:tokens], "<u2").tobytes())


def subset(source: Path, out: Path, documents: int) -> None:
    """Writes the folder. Errors: UserError for a folder without shards."""
    training, validation = shards(source, "train"), shards(source, "val")
    out.mkdir(parents=True)
    for path in (*training, *source.glob("tokenizer.*")):
        (out / path.name).symlink_to(path.resolve())
    left = documents  # of which the last one may go on in the next shard
    for path in validation:
        tokens = t.open_shard(path)
        starts = np.flatnonzero(tokens == t.BOS_ID)
        end = len(tokens) if len(starts) <= left else int(starts[left])
        for source_file in (path, t.sidecar_path(path)):
            if end and source_file.is_file():
                write_first(source_file, out / source_file.name, end)
        if len(starts) > left:
            left = 0
            break
        left -= len(starts)
    print(f"{out}: {len(training)} training shards, {documents - left} validation documents")


def main(arguments: list[str]) -> int:
    parser: argparse.ArgumentParser = Parser(prog="first_hour_data.py", description=__doc__)
    parser.add_argument("source", type=Path, metavar="DIR")
    parser.add_argument("out", type=Path, nargs="?", metavar="OUT", help="default: only prints what DIR holds")
    parser.add_argument("--documents", type=number_type(int, 1), default=6250, metavar="N", help="(default: 6250)")
    options = parser.parse_args(arguments)
    if options.out:
        subset(options.source, options.out, options.documents)
    else:
        describe(options.source)
    return 0


if __name__ == "__main__":
    sys.exit(command_line(main))

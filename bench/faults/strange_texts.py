"""Texts of strangers for data/prepare.py: bounded, refused in a line, or counted; and preparations that are killed."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zstandard

from faults.children import Child, Ended, as_script
from faults.damage import DAMAGES, sparse
from faults.inputs import ROOT, prose
from faults.trials import LOST, MISREPORTED, Trial

OPTIONS = ("--vocab-size", 300, "--val-fraction", 0.2, "--shard-tokens", 4000, "--workers", 1, "--quiet")
MEMORY = 2 << 30  # bytes


def documents(draw: random.Random, count: int = 40) -> list[str]:
    """Short texts."""
    return [prose(draw, draw.randint(5, 80)) for _ in range(count)]


def jsonl(texts: list[str]) -> bytes:
    """A line of JSON for each text."""
    return "".join(json.dumps(dict(text=text)) + "\n" for text in texts).encode()


def bomb(path: Path, draw: random.Random) -> None:
    """A small file that holds a gigabyte."""
    part = draw.choice((b"x", b"\0", b" ", b'{"text": "', b"[")) * (1 << 20)
    with gzip.open(path, "wb") if path.suffix == ".gz" else zstandard.open(path, "wb") as file:
        for _ in range(1024):
            file.write(part)


def odd_text(path: Path, draw: random.Random) -> None:
    """Bytes that are no text, or text of another encoding."""
    text = "\n".join(documents(draw, 5))
    path.write_bytes(
        draw.choice(
            (
                text.encode("utf-16"),
                b"\xef\xbb\xbf" + text.encode(),
                text.encode("latin-1", "replace"),
                text.encode() + b"\xff\xfe",
                text.replace(" ", "\0").encode(),
                b"",
                b"\n" * 10_000,
                b"\xf0\x9f\x98",
                text.encode("utf-8").replace(b"\n", b"\r\n"),
            )
        )
    )


def odd_lines(path: Path, draw: random.Random) -> None:
    """Lines that are not what a .jsonl file should hold, among good ones."""
    bad = (
        '{"text": 1}',
        "[]",
        "nothing",
        '{"other": "x"}',
        '{"text": "half a pair \\ud800"}',
        '{"text": ""}',
        "[" * 100_000,
        '{"text": NaN}',
        '{"text": ' + "9" * 5000 + "}",
        '{"text": "a", "text": "b"}',
        '{"text": "\\u0000\\u0001"}',
        " ",
    )
    lines = jsonl(documents(draw)).decode().splitlines()
    for _ in range(draw.choice((1, 3))):
        lines.insert(draw.randrange(len(lines)), draw.choice(bad))
    path.write_text("\n".join(lines) + "\n")


def make_source(trial: Trial, folder: Path) -> Path:
    """A source of a random form with something wrong in it. Returns what is given to prepare.py."""
    draw = trial.draw
    folder.mkdir()
    name = draw.choice(("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt"))
    path, texts = folder / name, documents(draw)
    packers: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".zst": zstandard.compress}
    plain = "\n\n".join(texts).encode() if name.endswith(".txt") else jsonl(texts)
    path.write_bytes(packers.get(path.suffix, bytes)(plain))
    way = draw.choice(("damage", "damage", "damage", "bomb", "text", "lines", "folder"))
    if way == "damage":
        damage = draw.choice(DAMAGES)
        trial.note(f"{damage.__name__} {name}")
        if damage is sparse:
            os.truncate(path, 1 << 28)  # what is there is read to its end
        else:
            damage(path, draw)
    elif way == "bomb" and path.suffix in packers:
        trial.note(f"a bomb {name}")
        bomb(path, draw)
    elif way == "text":
        trial.note("odd text")
        odd_text(folder / "b.txt", draw)
        return draw.choice((folder / "b.txt", folder))
    elif way == "lines":
        trial.note("odd lines")
        path = folder / "b.jsonl"
        odd_lines(path, draw)
    else:
        trial.note("a folder of odd things")
        os.mkfifo(folder / "fifo.jsonl")
        (folder / "loop").symlink_to(".")
        (folder / ".hidden").mkdir()
        (folder / ".hidden" / "b.txt").write_text("hidden text")
        (folder / "c.csv").write_text("a,b\n")
        (folder / "d.txt").symlink_to("/dev/zero")
        return folder
    return draw.choice((path, path, folder))


def start(trial: Trial, source: Path, out: Path, *more: object) -> Child:
    """Starts data/prepare.py."""
    body = as_script(ROOT / "data" / "prepare.py", (source, "--out", out, *OPTIONS, *more))
    return Child(body, trial.inputs.environment(), trial.folder / f"prepare-{time.monotonic_ns()}")


def contents(folder: Path) -> dict[str, str]:
    """Digests of what a preparation made."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*")) if p.is_file()}


def texts(trial: Trial) -> None:
    """A hostile source: refused in one line, or prepared into files that agree with their manifest."""
    source, out = make_source(trial, trial.folder / "source"), trial.folder / "out"
    ended = start(trial, source, out).wait(90)
    if trial.judge_end(ended, (0, 2), lines=2, what="prepare.py") and ended.code == 0:
        judge_data(trial, out)
    trial.expect(ended.peak < MEMORY, LOST, f"prepare.py took {ended.peak >> 20} MiB of memory")
    if ended.code == 2:
        left = [p.name for p in out.glob("*")] if out.is_dir() else []
        kept = "what is finished is kept" in ended.err
        trial.expect(kept or not left, MISREPORTED, f"refused, and {left} are left")


def judge_data(trial: Trial, out: Path) -> None:
    """Shards and manifest agree."""
    manifest = json.loads((out / "manifest.json").read_text())
    for split in ("train", "val"):
        rows = manifest["splits"][split]["shards"]
        total = 0
        for row in rows:
            data = (out / row["file"]).read_bytes()
            tokens = np.frombuffer(data, "<u2", offset=1024)
            total += len(tokens)
            right = len(tokens) == row["tokens"] and hashlib.sha256(data).hexdigest() == row["sha256"]
            trial.expect(right, MISREPORTED, f"{row['file']} is not what the manifest says")
        expected = manifest["splits"][split]["tokens"]
        trial.expect(total == expected, MISREPORTED, f"{split}: {total} tokens, and the manifest says {expected}")


def killed(trial: Trial) -> None:
    """A preparation killed or interrupted at random moments: the same command ends with the same bytes."""

    def build(folder: Path) -> None:
        (folder / "a.jsonl").write_bytes(jsonl(documents(random.Random(2), 150)))
        begin = time.monotonic()
        ended = start(trial, folder / "a.jsonl", folder / "out").wait(120)
        if ended.code:
            raise RuntimeError(f"an undisturbed preparation failed: {ended.describe()}")
        (folder / "seconds").write_text(str(time.monotonic() - begin))

    made = trial.inputs.once("prepared", build)
    out, seconds = trial.folder / "out", float((made / "seconds").read_text())
    for _ in range(trial.draw.randint(1, 4)):
        child = start(trial, made / "a.jsonl", out)
        moment = trial.draw.uniform(0.05, 1.0) * seconds
        child.wait_for(lambda: False, moment)
        number = trial.draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        trial.note(f"{signal.Signals(number).name} after {moment:.2f} s")
        child.send(number)
        judge_killed(trial, child.wait(), number)
    ended = start(trial, made / "a.jsonl", out).wait(120)
    if trial.judge_end(ended, (0,), what="the same command"):
        same = contents(out) == contents(made / "out")
        trial.expect(same, MISREPORTED, "not the same bytes as of an undisturbed preparation")


def judge_killed(trial: Trial, ended: Ended, number: int) -> None:
    """Ended by the signal, by its code, or before it came."""
    trial.judge_end(ended, (0, -number, 128 + number), lines=2, what="prepare.py")

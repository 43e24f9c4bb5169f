"""Files of data that change, end or cannot be read while a run uses them: one line that names the file."""

import errno
import gc
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import audit
import errors
import train_gpt as tg
from helpers import TINY, config, fork, write_shard
from test_ranks import WORKER, error_lines

TOKENS = 1000  # of each shard here


def write_stream(folder, shards=3):
    """A training stream that counts: token n of it is n."""
    for number in range(shards):
        write_shard(folder / f"fineweb_train_{number:06d}.bin", number * TOKENS + np.arange(TOKENS))
    return tg.TokenStream(config(DATA_PATH=folder), "train")


def descriptors(folder):
    """Open files of this process below a folder."""
    links = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(link))
        except OSError:  # that of the listing itself
            continue
    return [name for name in links if name.startswith(str(folder))]


def refusal(function, *arguments):
    with pytest.raises(tg.ConfigError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_shard_that_is_cut_off_while_it_is_read(tmp_path):
    stream = write_stream(tmp_path)
    os.truncate(stream.paths[1], 1024 + 2 * 600)
    assert stream.read(1500, 1600).tolist() == list(range(1500, 1600))
    assert refusal(stream.read, 1590, 1601) == (
        f"{stream.paths[1]}: has 2224 bytes, and 2226 are needed: it was cut off"
    )
    assert refusal(tg.scan_shard, stream, 1, True).startswith(f"{stream.paths[1]}: has 2224 bytes")
    assert stream.read(2000, 2010).tolist() == list(range(2000, 2010))


def test_the_audit_names_a_shard_that_is_cut_off_too(tmp_path):
    write_stream(tmp_path)
    paths = sorted(tmp_path.glob("*.bin"))
    stream = audit.ShardStream(paths)
    places = np.random.default_rng(0).integers(0, len(stream), (40, 8))
    assert np.array_equal(stream.take(places), places) and stream.take(places).dtype == np.uint16
    os.truncate(paths[1], 1024 + 2 * 600)
    assert stream.read(0, 1600).tolist() == list(range(1600))
    for ask in (lambda: stream.read(0, 1601), lambda: stream.take(np.array([1990]))):
        with pytest.raises(errors.PrepareError, match=r"fineweb_train_000001\.bin: was cut off: token"):
            ask()


@pytest.mark.parametrize("call", ["preadv", "open"])
def test_blocks_that_cannot_be_read(call, tmp_path, monkeypatch):
    monkeypatch.setattr(tg, "OPEN_SHARDS", 1)  # so that the first one is opened again
    stream = write_stream(tmp_path)

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, call, broken)
    assert refusal(stream.read, 0, 10) == f"{stream.paths[0]}: cannot be read (Input/output error)"


def test_reads_that_come_in_pieces_are_put_together(tmp_path, monkeypatch):
    stream, whole = write_stream(tmp_path), os.preadv
    monkeypatch.setattr(os, "preadv", lambda handle, buffers, at: whole(handle, [buffers[0][:7]], at))
    assert stream.read(990, 2020).tolist() == list(range(990, 2020))


def test_a_shard_that_takes_the_place_of_one_in_use_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tg, "OPEN_SHARDS", 1)
    stream = write_stream(tmp_path)
    assert stream.read(0, 2).tolist() == [0, 1]
    write_shard(tmp_path / "other", np.zeros(TOKENS))
    os.replace(tmp_path / "other", stream.paths[0])
    assert stream.read(5, 7).tolist() == [5, 6]  # the file that was opened
    stream.read(1000, 1001)  # another one is opened for it
    assert "was rewritten during the run" in refusal(stream.read, 5, 7)
    stream.paths[2].unlink()
    assert f"{stream.paths[2]}: cannot be read (No such file or directory)" == refusal(stream.read, 2000, 2001)


@pytest.mark.parametrize("kind", ["pipe", "folder", "unreadable", "short"])
def test_what_is_no_shard_is_refused_at_once(kind, tmp_path):
    path = tmp_path / "fineweb_train_000000.bin"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "unreadable":
        path.symlink_to(path)
    else:
        path.write_bytes(b"x" * 100)
    words = {
        "pipe": "is not a regular file",
        "folder": "is not a regular file",
        "unreadable": "cannot be read (Too many levels of symbolic links)",
        "short": "is not a token shard",
    }
    message = refusal(tg.TokenStream, config(DATA_PATH=tmp_path), "train")
    assert message.startswith(f"{path}: {words[kind]}")


def test_any_number_of_shards_keeps_few_files_open_and_maps_none(tmp_path):
    stream = write_stream(tmp_path, tg.OPEN_SHARDS + 40)
    for start in range(0, len(stream), TOKENS):
        stream.read(start, start + 1)
    assert len(descriptors(tmp_path)) == tg.OPEN_SHARDS
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    del stream
    gc.collect()
    assert descriptors(tmp_path) == []


def test_threads_read_what_one_reads(tmp_path, monkeypatch):
    """Few files may be open here, so that most reads open one that another thread's read has just dropped."""
    monkeypatch.setattr(tg, "OPEN_SHARDS", 2)
    stream = write_stream(tmp_path, 12)

    def check(seed):
        starts = np.random.default_rng(seed).integers(0, len(stream) - 50, 200).tolist()
        return all(stream.read(s, s + 50).tolist() == list(range(s, s + 50)) for s in starts)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(check, range(8)))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_whose_shard_is_cut_off_says_so_in_one_line(ranks, data, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in data.iterdir():
        if path.suffix in (".bin", ".model"):
            (folder / path.name).write_bytes(path.read_bytes())
    (tmp_path / "shard.bin").symlink_to(folder / "fineweb_train_000001.bin")
    plan = json.dumps(dict(rank=0, stage="train", fault="cut", limits={}))
    values = dict(TINY, DATA_PATH=folder, RUN_ID="run", ITERATIONS=60, TRAIN_LOG_EVERY=0)
    done = fork(WORKER, values, plan, ranks=ranks, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert error_lines(line) and "fineweb_train_000001.bin: has 3000 bytes" in line

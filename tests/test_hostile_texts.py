"""Files of strangers as sources: bombs, special files, wrong encodings, damage. Memory stays bounded, nothing hangs,
and what is not read is refused in one line or counted."""

import errno
import gzip
import io
import json
import lzma
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

import audit
import hub
import prepare
import published
import readers
import sources
from errors import PrepareError
from helpers import ROOT, examples
from test_prepare import options, refused, story, write_jsonl

MIB = 1 << 20


def read(path, limit=32 << 10, field="text"):
    """(documents, what was passed over)."""
    passed_over = Counter()
    texts = list(readers.read_texts(Path(path), limit, field, passed_over))
    return texts, {kind: count for kind, count in passed_over.items() if count}


# ------------------------------------------------------------------------------------------------------------ bombs

READER = """
import json, re, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import readers
from errors import PrepareError
for name, value in json.loads(sys.argv[3]).items():
    setattr(readers, name, value)
documents, error = 0, ""
try:
    for text in readers.read_texts(Path(sys.argv[2]), 32 << 10, "text"):
        documents += 1
except PrepareError as caught:
    error = str(caught)
# The largest memory of this process alone; getrusage would count that of its parent, too.
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10
print(json.dumps({"documents": documents, "error": error, "peak": peak}))
"""


def read_apart(path, **limits):
    """Read a file in a process of its own: documents, error, and its peak memory in MiB."""
    command = [sys.executable, "-c", READER, str(ROOT / "data"), str(path), json.dumps(limits)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def zstd_file(path, chunks, **parameters):
    made = zstandard.ZstdCompressionParameters.from_level(1, **parameters)
    with open(path, "wb") as file, zstandard.ZstdCompressor(compression_params=made).stream_writer(file) as packed:
        for chunk in chunks:
            packed.write(chunk)


def gzip_file(path, chunks):
    with gzip.open(path, "wb", 9) as file:
        for chunk in chunks:
            file.write(chunk)


def skippable(path):
    """Frames that hold no text: zstd passes over them."""
    frame = b"\x50\x2a\x4d\x18" + (1 << 20).to_bytes(4, "little") + bytes(1 << 20)
    path.write_bytes(frame * 3 + zstandard.compress(b'{"text": "a"}\n') + frame)


def empty_frames(path):
    path.write_bytes(zstandard.compress(b"") * 100_000)


def dictionary_bomb(path):
    """One text of a megabyte, and 100,000 references to it."""
    array = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100_000, pyarrow.int32()), ["x" * MIB])
    pyarrow.parquet.write_table(pyarrow.table({"text": array}), path, compression="zstd", store_schema=False)


def page_bomb(path):
    """One page of 300 MiB."""
    table = pyarrow.table({"text": ["x" * (100 * MIB)] * 3})
    settings = {"use_dictionary": False, "data_page_size": 1 << 31, "write_statistics": False}
    pyarrow.parquet.write_table(table, path, compression="zstd", **settings)


def prefix_bomb(path):
    """Each text is the one before it and a letter, which DELTA_BYTE_ARRAY writes as one letter."""
    texts = ["x" * MIB + "y" * number for number in range(100)]
    pyarrow.parquet.write_table(
        pyarrow.table({"text": texts}),
        path,
        use_dictionary=False,
        column_encoding={"text": "DELTA_BYTE_ARRAY"},
        compression="zstd",
    )


def nulls_bomb(path):
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.nulls(5_000_000, pyarrow.string())}), path)


def text_of(*parts):
    return [b'{"text": "', *parts, b'"}\n']


LINE = "a line of more than 134,217,728 bytes"
BOMB = "a decompression bomb"
RARE = [b"x" * MIB] * 120
BOMBS = {
    "zeros.jsonl.zst": (lambda path: zstd_file(path, [bytes(MIB)] * 2200), LINE),
    "one line.jsonl.zst": (lambda path: zstd_file(path, text_of(*[b"x" * MIB] * 300)), LINE),
    "one line.jsonl.gz": (lambda path: gzip_file(path, text_of(*[b"x" * MIB] * 300)), LINE),
    "newlines.jsonl.zst": (lambda path: zstd_file(path, [b"\n" * MIB] * 1000), BOMB),
    "newlines.jsonl.gz": (lambda path: gzip_file(path, [b"\n" * MIB] * 10), BOMB),
    "documents.jsonl.zst": (lambda path: zstd_file(path, [b'{"text": "%b"}\n' % (b"x" * MIB)] * 60), BOMB),
    "frames.jsonl.zst": (
        lambda path: path.write_bytes(zstandard.compress(b'{"text": "%b"}\n' % (b"x" * MIB)) * 60),
        BOMB,
    ),
    "window.jsonl.zst": (lambda path: zstd_file(path, text_of(*[b"x" * MIB] * 100), window_log=31), "a window of more"),
    "lists.jsonl.zst": (
        lambda path: zstd_file(path, [b'{"text": "a", "b": [', *[b"[]," * MIB] * 40, b"0]}"]),
        "outside of its strings",
    ),
    "keys.jsonl.zst": (
        lambda path: zstd_file(path, (b'{"text": "a"', *(b', "%d": {}' % n for n in range(4_000_000)), b"}")),
        "outside of its strings",
    ),
    "rare.jsonl.zst": (lambda path: zstd_file(path, text_of(*RARE, "😀".encode())), "as one of them is rare"),
    "escaped.jsonl.zst": (lambda path: zstd_file(path, text_of(*RARE, rb"\ud83d\ude00")), "as one of them is rare"),
    "dictionary.parquet": (dictionary_bomb, BOMB),
    "prefixes.parquet": (prefix_bomb, BOMB),
    "page.parquet": (page_bomb, "needs more than 209,715,200 bytes of memory"),
    "nulls.parquet": (nulls_bomb, BOMB),
    "skippable.jsonl.zst": (skippable, ""),
    "empty frames.jsonl.zst": (empty_frames, ""),
}


# Smaller limits where it takes long to write, or to read, so much that the program's own are met.
LIMITS = {
    "page.parquet": {"PARQUET_MEMORY": 200 * MIB},
    **{
        name: {"EXPANSION_FLOOR": 32 * MIB}
        for name in (
            "prefixes.parquet",
            "nulls.parquet",
            "documents.jsonl.zst",
            "frames.jsonl.zst",
            "newlines.jsonl.gz",
        )
    },
}


def sparse(path, head, skip=b""):
    """A file of 64 GiB that takes a few KiB of disk, perhaps with a header that skips 4 GiB again and again."""
    with open(path, "wb") as file:
        file.write(head)
        for _ in range(15 if skip else 0):
            file.write(skip)
            file.seek(2**32 - 1, os.SEEK_CUR)
        file.truncate(2**36)


@pytest.mark.parametrize(
    "name, head, skip",
    [
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0), b""),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "a"}\n'), b"\x50\x2a\x4d\x18\xff\xff\xff\xff"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", b""),  # a frame, then empty blocks
    ],
)
def test_a_sparse_file_is_refused_before_its_end(tmp_path, name, head, skip):
    sparse(tmp_path / name, head, skip)
    with pytest.raises(PrepareError, match=r"a\.jsonl\.\w+: damaged \w+ file: more than [\d,]+ bytes without text"):
        read(tmp_path / name)


def test_zeros_behind_the_text_are_padding(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n') + bytes(300_000))
    assert read(tmp_path / "a.jsonl.gz") == (["a"], {})


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_never_takes_much_memory(tmp_path, name):
    write, message = BOMBS[name]
    write(tmp_path / name)
    found = read_apart(tmp_path / name, **LIMITS.get(name, {}))
    assert found["peak"] < 640, found
    assert message in found["error"] and bool(message) == bool(found["error"])
    assert not message or found["error"].startswith(str(tmp_path / name))


def test_a_file_that_people_would_write_is_no_bomb(tmp_path):
    texts = [story(number, 400) for number in range(400)] * 3
    data = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(data, 22))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data, mtime=0))
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    for ending in ("jsonl", "jsonl.zst", "jsonl.gz", "parquet"):
        assert read(tmp_path / f"a.{ending}") == (texts, {})


def test_an_archive_may_unpack_to_many_times_its_size_while_that_is_little(tmp_path, monkeypatch):
    texts = ["x" * 1000] * 1000
    data = write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstandard.compress(data))
    assert path.stat().st_size * readers.EXPANSION < len(data) and read(path)[0] == texts
    monkeypatch.setattr(readers, "EXPANSION_FLOOR", len(data) + 16 * len(texts))
    assert read(path)[0] == texts
    monkeypatch.setattr(readers, "EXPANSION_FLOOR", len(data) + 16 * len(texts) - 1)
    with pytest.raises(PrepareError, match=BOMB):
        read(path)


@pytest.mark.parametrize("text", ["", "a"])
def test_few_documents_wait_for_their_tokens(tmp_path, monkeypatch, text):
    """Neither empty documents nor tiny ones gather in memory until there are half a million characters."""
    source = write_jsonl(tmp_path / "a.jsonl", [*([text] * 20_000), *(story(seed) for seed in range(30))])
    made, sizes = options(source, out=tmp_path / "out"), []
    prepare.prepare(made)
    found, _ = prepare.survey(sources.Sources(made), made)
    model = prepare.Model(str(tmp_path / "out" / "tokenizer.model"), "", False)
    output = prepare.Shards(tmp_path, 1000, False)
    tokenize = prepare.tokenize
    monkeypatch.setattr(prepare, "tokenize", lambda *each: sizes.append(len(each[1])) or tokenize(*each))
    prepare.write_shards(sources.Sources(made), found, model, output, made, lambda count: None)
    output.close()
    assert max(sizes) <= 2100 and sum(sizes) == 20_030 and output.documents == 20_030


def test_a_batch_is_small_however_short_its_segments_are():
    batches = list(prepare.in_batches([("a", "")] * 10_000))
    assert sum(map(len, batches)) == 10_000 and max(map(len, batches)) <= 2100


def test_validation_that_does_not_fit_into_memory_is_refused(tmp_path, source, command, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_VALIDATION_BYTES", 4000)
    out = tmp_path / "out"
    for option, value in (("--val-fraction", 0.5), ("--val-documents", 20)):
        assert refused(command(source, "--out", out, option, value), f"{option} {value}", "divide it by")
    monkeypatch.undo()
    monkeypatch.setattr(prepare, "MAX_VALIDATION_DOCUMENTS", 10)
    assert refused(command(source, "--out", out, "--val-fraction", 0.5), "at most", "10 documents")
    assert command(source, "--out", out, "--val-fraction", 0.1, "--vocab-size", 320)[0] == 0


@pytest.fixture
def source(tmp_path):
    """A .jsonl file of 60 stories."""
    return write_jsonl(tmp_path / "stories.jsonl", [story(seed) for seed in range(60)])


def test_keys_of_documents_do_not_depend_on_blocks(monkeypatch):
    tokens = np.random.default_rng(0).integers(2, 50, 3000).astype(np.uint16)
    tokens[::7] = 1

    class Stream:
        @staticmethod
        def take(positions):
            return tokens[positions]

    offsets = np.append(np.flatnonzero(tokens == 1), len(tokens))
    whole = audit.document_keys(Stream, offsets)
    monkeypatch.setattr(audit, "BLOCK", 10)
    assert (audit.document_keys(Stream, offsets) == whole).all() and len(whole) == len(offsets) - 1 > 400


# ---------------------------------------------------------------------------------------------------- special files


@pytest.fixture
def folder(tmp_path):
    """A folder with two texts and everything that may lie beside them."""
    made = tmp_path / "texts"
    (made / "inner.txt" / "deep").mkdir(parents=True)  # a folder with the name of a file
    write_jsonl(made / "inner.txt" / "deep" / "a.jsonl", [story(seed) for seed in range(40)])
    (made / "book.txt").write_text(story(41))
    os.mkfifo(made / "fifo.txt")
    with socket.socket(socket.AF_UNIX) as listening:
        here = os.getcwd()
        os.chdir(made)  # A socket's path may have 107 characters.
        try:
            listening.bind("socket.txt")
        finally:
            os.chdir(here)
    (made / "nowhere.txt").symlink_to("missing.txt")
    (made / "outside.txt").symlink_to("/etc/hostname")
    (made / "zero.txt").symlink_to("/dev/zero")
    (made / "loop").symlink_to(".")
    (made / "self.txt").symlink_to("self.txt")
    (made / ".git").mkdir()
    (made / ".git" / "a.txt").write_text("hidden text")
    (made / ".notes.txt").write_text("hidden too")
    for name in ("README.md", "a.md", "b.csv", "TEXT.TXT", "no_ending", "x.\x1b[0m", "y." + "z" * 40):
        (made / name).write_text("not read")
    (made / "empty.txt").write_bytes(b"")
    return made


LEFT_OUT = {
    "FIFOs, sockets and devices": 2,
    "files ending in .csv": 1,
    "files of other endings": 3,
    "files without text": 1,
    "hidden files": 1,
    "hidden folders": 1,
    "symbolic links": 5,
}


def test_what_a_folder_holds_besides_texts_is_counted(tmp_path, folder, command):
    out = tmp_path / "out"
    code, printed, err = command(folder, "--out", out, "--vocab-size", 320, "--quiet")
    assert code == 0 and err == ""
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["left_out"] == LEFT_OUT
    assert "left out: " + "; ".join(f"{reason}: {count}" for reason, count in LEFT_OUT.items()) in printed
    assert sum(split["documents"] for split in manifest["splits"].values()) == 44
    assert {name: row["files"] for name, row in manifest["taken"].items()} == {".jsonl": 1, ".md": 2, ".txt": 3}
    assert "taken: .jsonl: 1 file, " in printed and "; .md: 2 files, 16 bytes; " in printed
    again = command(folder, "--out", out, "--vocab-size", 320, "--quiet")
    assert again[0] == 0 and again[1] == "already prepared\n" + printed


def test_the_output_inside_of_a_source_is_no_source(tmp_path, command):
    texts = tmp_path / "texts"
    texts.mkdir()
    write_jsonl(texts / "a.jsonl", [story(seed) for seed in range(40)])
    out = texts / "out"
    (out / "downloads").mkdir(parents=True)
    (out / "downloads" / "b.txt").write_text("text that an earlier run has downloaded")
    assert command(texts, "--out", out, "--vocab-size", 320)[0] == 0
    first = json.loads((out / "manifest.json").read_text())
    assert first["left_out"] == {"output folders": 1} and len(first["source"]) == 1
    assert command(texts, "--out", out, "--vocab-size", 320)[1].startswith("already prepared")


def test_a_folder_without_texts_says_what_it_holds(tmp_path, command):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.csv").write_text("not read")
    os.mkfifo(texts / "a.txt")
    message = "FIFOs, sockets and devices: 1; files ending in .csv: 1"
    assert refused(command(texts, "--out", tmp_path / "out"), "the folder holds no file of .txt, .md", message)


def test_special_files_that_are_named_are_refused(tmp_path, folder, command):
    for name, reason in (
        ("fifo.txt", "not a regular file"),
        ("socket.txt", "not a regular file"),
        ("zero.txt", "not a regular file"),
        ("nowhere.txt", "a link that leads nowhere"),
        ("self.txt", "a link that leads nowhere"),
        ("b.csv", "unknown kind of file"),
        ("missing.txt", "no such file"),
    ):
        assert refused(command(folder / name, "--out", tmp_path / "out"), folder / name, reason), name
    assert not (tmp_path / "out").exists()


def test_a_named_link_and_a_linked_folder_are_read(tmp_path, source, command):
    (tmp_path / "link.jsonl").symlink_to(source)
    (tmp_path / "real").mkdir()
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "real" / "a.txt").write_text(story(100))
    listed = sources.list_files([str(tmp_path / "link.jsonl"), str(tmp_path / "folder")])
    assert [path for _, path in listed] == [tmp_path / "link.jsonl", tmp_path / "folder" / "a.txt"]


def test_special_files_in_other_places_do_not_hang(tmp_path, source, command):
    os.mkfifo(tmp_path / "fifo.model")
    result = command(source, "--out", tmp_path / "out", "--tokenizer", tmp_path / "fifo.model")
    assert refused(result, f"--tokenizer {tmp_path / 'fifo.model'}: not a regular file")
    result = command(source, "--out", tmp_path / "out", "--tokenizer", "/dev/zero")
    assert refused(result, "--tokenizer /dev/zero: not a regular file")
    with open(tmp_path / "large.model", "wb") as file:
        file.truncate(1 << 36)
    result = command(source, "--out", tmp_path / "out", "--tokenizer", tmp_path / "large.model")
    assert refused(result, "large.model: more than 67,108,864 bytes")
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "manifest.json")
    assert refused(command(source, "--out", tmp_path / "out"), "manifest.json: not a regular file")


@pytest.mark.parametrize("change", ["gone", "a FIFO", "a folder"])
def test_a_source_that_becomes_something_else(tmp_path, source, command, monkeypatch, change):
    trained = prepare.train_tokenizer

    def meddling(*arguments):
        source.unlink()
        if change != "gone":
            (os.mkfifo if change == "a FIFO" else os.mkdir)(source)
        return trained(*arguments)

    monkeypatch.setattr(prepare, "train_tokenizer", meddling)
    result = command(source, "--out", tmp_path / "out", "--vocab-size", 320)
    assert refused(result, source, "No such file" if change == "gone" else "not a regular file")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_disk_error_names_the_source(tmp_path, source, command, monkeypatch):
    class Broken(io.BytesIO):
        def read(self, size=-1):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def fileno(self):
            return full.fileno()

    full = source.open()
    monkeypatch.setattr(readers, "open_regular", lambda path: Broken())
    for name in ("stories.jsonl", "a.txt", "a.jsonl.zst", "a.jsonl.gz"):
        with pytest.raises(PrepareError, match=re.escape(f"{tmp_path / name}: Input/output error")):
            list(readers.read_texts(tmp_path / name, 100, "text"))
    full.close()


def test_what_may_not_be_read_is_counted_in_a_folder(tmp_path, monkeypatch):
    texts = tmp_path / "texts"
    for name in ("closed", "open"):
        (texts / name).mkdir(parents=True)
        (texts / name / "a.txt").write_text(name)
    (texts / "secret.txt").write_text("secret")
    scandir, access = os.scandir, os.access

    def guarded(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    monkeypatch.setattr(os, "access", lambda path, mode: "secret" not in str(path) and access(path, mode))
    left_out = Counter()
    assert sources.list_files([str(texts)], left_out) == [(str(texts / "open" / "a.txt"), texts / "open" / "a.txt")]
    assert left_out == {"unreadable folders": 1, "unreadable files": 1}
    with pytest.raises(PermissionError):
        sources.list_files([str(texts / "closed")])


def test_names_of_any_bytes(tmp_path, command):
    texts = tmp_path / "texts"
    texts.mkdir()
    names = [b"new\nline.txt", b"\xff\xfe.txt", b"\x1b[31mred.txt", " ünï.txt".encode(), b"-.txt"]
    for number, name in enumerate(names):
        Path(os.fsdecode(os.path.join(os.fsencode(texts), name))).write_text(story(number))
    out = tmp_path / os.fsdecode(b"out \xff")
    code, printed, err = command(texts, "--out", out, "--vocab-size", 320)
    assert code == 0 and printed.replace("\n", "").isprintable() and err.replace("\n", "").isprintable()
    manifest = json.loads((out / "manifest.json").read_bytes())
    assert sorted(Path(row["path"]).name for row in manifest["source"]) == sorted(map(os.fsdecode, names))
    bad = Path(os.fsdecode(os.path.join(os.fsencode(texts), b"\x1b[31m\nred.txt")))
    bad.write_bytes(b"\xff")
    code, printed, err = command(bad, "--out", tmp_path / "other")
    assert code == 2 and printed == "" and err.count("\n") == 2 and err.replace("\n", "").isprintable()


def test_a_folder_of_too_many_files_is_refused(tmp_path, monkeypatch):
    for number in range(30):
        (tmp_path / f"a.e{number}").touch()
    left_out = Counter()
    assert sources.files_inside(tmp_path, left_out) == [] and sum(left_out.values()) == 30
    assert len(left_out) == 21 and left_out["files of other endings"] == 10
    monkeypatch.setattr(sources, "MAX_ENTRIES", 29)
    with pytest.raises(PrepareError, match="more than 29 files and folders"):
        sources.files_inside(tmp_path, left_out)


@pytest.mark.parametrize(
    "path, size",
    [("/etc/a.jsonl", 1), ("../a.jsonl", 1), ("a/../../b.jsonl", 1), ("", 1), ("a\nb.jsonl", 1), (None, 1)]
    + [("a.jsonl", -1), ("a.jsonl", None), ("a.jsonl", 1e9)],
)
def test_a_hub_that_lists_files_outside_of_the_downloads(path, size):
    with pytest.raises(PrepareError, match="the hub lists a file"):
        hub._check_listed("some/texts", path, size)
    hub._check_listed("some/texts", "data/a..b/train.jsonl", 0)


def test_a_description_of_gigabytes_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "docs_selected.jsonl", ["text"])
    with open(tmp_path / "docs_selected.source_manifest.json", "wb") as file:
        file.truncate(1 << 36)
    with pytest.raises(PrepareError, match="more than 67,108,864 bytes"):
        published.check_documents(path)


# --------------------------------------------------------------------------------------------- encodings and damage


def test_a_byte_order_mark_is_no_text(tmp_path):
    text = "für 字\n" * 9
    (tmp_path / "a.txt").write_text(text, encoding="utf-8-sig")
    assert read(tmp_path / "a.txt") == ([text], {"byte-order marks": 1})
    pieces, passed_over = read(tmp_path / "a.txt", 64)
    assert "".join(pieces) == text and passed_over == {"byte-order marks": 1}
    assert max(len(piece.encode()) for piece in pieces) <= 64
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf")
    assert read(tmp_path / "a.txt") == ([], {"byte-order marks": 1, "files without text": 1})
    (tmp_path / "a.txt").write_text("\ufeff\ufeffa", encoding="utf-8")  # Only the first one is a mark.
    assert read(tmp_path / "a.txt")[0] == ["\ufeffa"]
    (tmp_path / "a.jsonl").write_text('\ufeff\n{"text": "a"}\n \n')
    assert read(tmp_path / "a.jsonl") == (["a"], {"byte-order marks": 1, "blank lines": 2})


@pytest.mark.parametrize("ending", [".md", ".jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-32", "utf-32-be", "latin-1", "utf-7"])
def test_other_encodings_are_refused(tmp_path, command, encoding, ending):
    path = tmp_path / f"a{ending}"
    mark = "\ufeff" if encoding.endswith("be") else ""
    path.write_bytes(
        (mark + '{"text": "für 字"}'.replace("字", "" if encoding == "latin-1" else "字")).encode(encoding)
    )
    expected = encoding[:6].upper() if "16" in encoding or "32" in encoding else "not UTF-8"
    if encoding == "utf-7":  # Which is ASCII; no reader can tell.
        assert read(path)[0]
    else:
        assert refused(command(path, "--out", tmp_path / "out"), path, expected)


def test_a_file_with_a_nul_is_not_text(tmp_path, command):
    path = tmp_path / "a.txt"
    path.write_bytes("no mark".encode("utf-16-le"))
    assert refused(command(path, "--out", tmp_path / "out"), path, "not text: a NUL at byte offset 1")
    with open(path, "wb") as file:  # A file with holes, which takes no room on the disk.
        file.write(b"some text\n" * 10)
        file.truncate(1 << 40)
    assert refused(command(path, "--out", tmp_path / "out"), path, "not text: a NUL at byte offset 100")


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.jsonl.gz", b"", "damaged gzip file: it has no bytes"),
        ("a.jsonl.zst", b"", "damaged zstd file: it has no bytes"),
        ("a.parquet", b"", "damaged parquet file"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "a"}')[:-3], "damaged zstd file: it ends too early"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "a"}') + b"rubbish", "damaged zstd file"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "a"}') + b"\x28\xb5", "damaged zstd file: it ends too early"),
        ("a.jsonl.zst", gzip.compress(b'{"text": "a"}', mtime=0), "damaged zstd file"),
        ("a.jsonl.gz", zstandard.compress(b'{"text": "a"}'), "damaged gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:9], "damaged gzip file"),
        ("a.parquet", b"PAR1" + b"\xff\xff\xff\x7f" + b"PAR1", "damaged parquet file"),
        ("a.txt.xz", b"", "damaged xz file: it has no bytes"),
        ("a.txt.xz", lzma.compress(b"some text")[:-3], "damaged xz file: it ends too early"),
        ("a.txt.xz", lzma.compress(b"some text") + b"rubbish", "damaged xz file"),
        ("a.txt.xz", zstandard.compress(b"some text"), "damaged xz file"),
        ("a.txt.xz", lzma.compress(b"\0"), "not text: a NUL at byte offset 0"),
        ("a.md.gz", gzip.compress(b"some \xff text", mtime=0), "not UTF-8 at byte offset 5"),
        ("a.txt", b"", "there is no text in it"),
        ("a.jsonl", b"", "there is no text in it"),
        ("a.jsonl", b"\n \n\r\n", "there is no text in it"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "there is no text in it"),
        ("a.jsonl.zst", zstandard.compress(b""), "there is no text in it"),
    ],
)
def test_archives_of_nothing_or_damage(tmp_path, command, name, data, message):
    (tmp_path / name).write_bytes(data)
    assert refused(command(tmp_path / name, "--out", tmp_path / "out"), tmp_path / name, message)
    assert not (tmp_path / "out").exists()


HOSTILE_LINES = {
    "nested lists": (b"[" * 200_000, "nested too deeply"),
    "nested objects": (b'{"a":' * 200_000, "nested too deeply"),
    "nested beside": (b'{"text": "a", "b": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
    "twice": (b'{"text": "a", "text": "b"}', 'the field "text" stands there twice'),
    "number": (b'{"text": 5}', 'no text in field "text"'),
    "large number": (b'{"text": ' + b"9" * 10_000 + b"}", 'no text in field "text"'),
    "null": (b'{"text": null}', 'no text in field "text"'),
    "list": (b'["text"]', 'no text in field "text"'),
    "other field": (b'{"Text": "a"}', 'no text in field "text"'),
    "cut": (b'{"text": "a', "not JSON"),
    "control": (b'{"text": "a\0b"}', "not JSON"),
    "two": (b'{"text": "a"} {"text": "b"}', "not JSON"),
    "not UTF-8": (b'{"text": "\xff"}', "not UTF-8 at byte offset 24"),
    "surrogate in UTF-8": (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
}


@pytest.mark.parametrize("line, message", HOSTILE_LINES.values(), ids=HOSTILE_LINES)
def test_hostile_lines_are_named(tmp_path, command, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b"\n")
    assert refused(command(path, "--out", tmp_path / "out"), f"{path}:2: ", message)


def test_numbers_and_pairs_beside_the_text_do_not_matter(tmp_path):
    line = b'{"id": 1%b, "x": -1e999, "y": NaN, "a": 1, "a": 2, "text": "half \\ud800", "z": [%b]}' % (
        b"0" * 100_000,
        b"0.5," * 400_000 + b"1",
    )
    (tmp_path / "a.jsonl").write_bytes(line)
    assert len(line) > readers.LARGE_LINE and read(tmp_path / "a.jsonl") == (
        ["half \ud800"],
        {"duplicate JSON keys": 1},
    )


def test_empty_documents_are_counted(tmp_path, command):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": story(seed)}) for seed in range(40)]
    path.write_text("\n\n".join([*lines, '{"text": ""}', '{"text": ""}', ""]))
    code, printed, _ = command(path, "--out", tmp_path / "out", "--vocab-size", 320)
    assert code == 0 and "empty: 2 documents without text" in printed and "left out: blank lines: 42" in printed


# ------------------------------------------------------------------------------------------------ folders of texts

PACKERS = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".zst": zstandard.compress,
    ".xz": lambda data: lzma.compress(data[:50]) + bytes(8) + lzma.compress(data[50:]),
}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("ending", [".txt", ".md", ".RST", ".py"])
def test_plain_text_of_any_ending_packed_or_not(tmp_path, ending, packed):
    text = "für 字\n\n" * 60
    path = tmp_path / f"a{ending}{packed.upper() if ending == '.RST' else packed}"
    path.write_bytes(PACKERS[packed](b"\xef\xbb\xbf" + text.encode()))
    pieces, passed_over = read(path, 100)
    assert "".join(pieces) == text and passed_over == {"byte-order marks": 1}
    assert max(len(piece.encode()) for piece in pieces) <= 100


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("a.txt", ".txt"),
        ("A.TXT.XZ", ".txt.xz"),
        ("a.jsonl.Gz", ".jsonl.gz"),
        ("a.py", ".py"),
        ("a.d.ts.zst", ".d.ts.zst"),
        ("a.parquet", ".parquet"),
        ("a.parquet.gz", ""),
        ("a.gz", ""),
        ("txt", ""),
        (".txt", ""),
        ("a.txt.bz2", ""),
        ("a.rs", ""),
    ],
)
def test_the_ending_by_which_a_file_is_read(name, ending):
    assert readers.ending_of(name, (".py", ".ts", ".d.ts")) == ending


def test_a_folder_is_taken_with_all_its_text(tmp_path, command):
    texts = tmp_path / "my texts"
    for folder in (".hidden", "venv", "conda/conda-meta", "node_modules/x", "src/__pycache__"):
        (texts / folder).mkdir(parents=True)
        (texts / folder / "no.py").write_text("not read")
    (texts / "venv" / "pyvenv.cfg").write_text("home = /usr/bin")
    for number, name in enumerate(("a.TXT", "b.md", "src/c.py", "src/d.Py.gz", "e.rst.xz", "f.md.zst")):
        packed = os.path.splitext(name)[1].lower()
        (texts / name).write_bytes(PACKERS.get(packed, bytes)(story(number, 400).encode()))
    (texts / "latin.txt").write_bytes(("x" * 2**21 + "für").encode("latin-1"))
    (texts / "program.py").write_bytes(b"\x7fELF\0\0")
    code, printed, err = command(texts, "--out", tmp_path / "out", "--suffix", "py", "--max-document-bytes", 500)
    assert code == 0, err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert {name: row["files"] for name, row in manifest["taken"].items()} == {
        ".md": 1,
        ".md.zst": 1,
        ".py": 1,
        ".py.gz": 1,
        ".rst.xz": 1,
        ".txt": 1,
    }
    assert manifest["left_out"] == {
        "binary files": 1,
        "files that are not UTF-8": 1,
        "folders __pycache__": 1,
        "folders node_modules": 1,
        "hidden folders": 1,
        "virtual environments": 2,
    }
    assert sum(split["bytes"] for split in manifest["splits"].values()) == sum(
        len(story(number, 400).encode()) for number in range(6)
    )
    assert f"left out: {texts}/latin.txt: not UTF-8 at byte offset {2**21 + 1}" in err
    assert f"left out: {texts}/program.py: not text: a NUL at byte offset 4" in err


def test_a_named_file_that_is_no_text_is_refused(tmp_path, command):
    (tmp_path / "a.py").write_bytes(b"a\0b")
    assert refused(command(tmp_path / "a.py", "--out", tmp_path / "out"), "a.py: unknown kind of file")
    assert refused(command(tmp_path / "a.py", "--out", tmp_path / "out", "--suffix", ".py"), "not text: a NUL")
    assert refused(
        command(tmp_path, "--out", tmp_path / "out", "--suffix", ".py"), "there is no text", "binary files: 1"
    )
    assert refused(command(tmp_path / "a.py", "--out", tmp_path / "out", "--suffix", ".gz"), "--suffix", ".gz")
    assert refused(command(tmp_path / "a.py", "--out", tmp_path / "out", "--suffix", "a b"), "--suffix", "a b")


def test_an_xz_archive_takes_little_memory_and_endless_padding_ends(tmp_path, monkeypatch):
    path = tmp_path / "a.txt.xz"
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}]
    path.write_bytes(lzma.compress(b"some text", filters=filters))
    with pytest.raises(PrepareError, match="it needs more than 167,772,160 bytes of memory"):
        read(path)
    monkeypatch.setattr(readers, "MAX_PADDING", 1 << 20)
    path.write_bytes(lzma.compress(b"some text") + bytes(3 << 20))
    with pytest.raises(PrepareError, match="more than 1,048,576 bytes without text"):
        read(path)
    monkeypatch.setattr(readers, "EXPANSION_FLOOR", 16 << 20)
    path.write_bytes(lzma.compress(b"a" * (readers.EXPANSION_FLOOR + 1)))
    with pytest.raises(PrepareError, match="a decompression bomb"):
        read(path)


# ------------------------------------------------------------------------------------------------------------- fuzz


def seeds():
    """A good file of each kind."""
    lines = "".join(json.dumps({"text": story(number, 9), "id": number}) + "\n" for number in range(4)).encode()
    table = pyarrow.table({"text": [story(number, 9) for number in range(4)], "id": [1, 2, 3, 4]})
    packed = io.BytesIO()
    pyarrow.parquet.write_table(table, packed, row_group_size=2)
    made = {".parquet": packed.getvalue()}
    for ending, data in ((".txt", story(1, 20).encode()), (".jsonl", lines)):
        made[ending] = data
        made[f"{ending}.zst"] = zstandard.compress(data[:99]) + zstandard.compress(data[99:])
        made[f"{ending}.gz"] = gzip.compress(data, mtime=0)
        made[f"{ending}.xz"] = lzma.compress(data[:99]) + bytes(4) + lzma.compress(data[99:])
    return made


SEEDS = seeds()


@st.composite
def hostile_files(draw):
    """(ending, bytes): anything, or a good file with some bytes changed, cut, moved or repeated."""
    ending = draw(st.sampled_from(sorted(SEEDS)))
    if draw(st.integers(0, 4)) == 0:
        return ending, draw(st.binary(max_size=200))
    data = bytearray(SEEDS[ending])
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["set", "cut", "insert", "repeat", "drop"]))
        if kind == "set":
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=4))
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=8))
        elif kind == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 60))]
        else:
            end = len(data) if kind == "cut" else at + draw(st.integers(1, 60))
            del data[at:end]
    return ending, bytes(data)


@examples(max_examples=2000)
@given(hostile_files())
def test_any_bytes_are_documents_or_refused(tmp_path_factory, file):
    ending, data = file
    path = tmp_path_factory.getbasetemp() / f"fuzz-{os.getpid()}{ending}"
    path.write_bytes(data)
    try:
        for limit in (64, 1 << 20):
            assert all(isinstance(text, str) for text in read(path, limit)[0])
    except PrepareError as error:
        assert str(error).startswith(str(path))


# ------------------------------------------------------------------------------------------------------------ output


def prepared(source, out, stdout, **environment):
    """The command in a process of its own, writing its report to a file: (exit code, stderr)."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "data" / "prepare.py"), str(source), "--out", str(out), "--quiet"]
        + ["--vocab-size", "320"],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    return done.returncode, done.stderr


def test_a_report_that_can_not_be_written(tmp_path, source):
    with open("/dev/full", "w") as full:
        code, err = prepared(source, tmp_path / "out", full)
    assert code == 2 and err.count("\n") == 1
    assert "standard output: No space left on device; the files in" in err and (tmp_path / "out/manifest.json").exists()
    with open(tmp_path / "report", "w+") as report:
        assert prepared(source, tmp_path / "ünï", report, PYTHONIOENCODING="ascii") == (0, "")
        report.seek(0)
        assert r"written: " in report.read()

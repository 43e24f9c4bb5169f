"""Reads the documents of one file of text, in memory that is bounded whatever the file holds.

Everything raises PrepareError in one line that names the file, and the line or row where there is one. What is passed
over without an error is counted.

A small file may unpack to gigabytes (a decompression bomb). Archives are unpacked a piece at a time. One that
unpacks to more than EXPANSION_FLOOR bytes, and to more than EXPANSION times its size, is refused.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import lzma
import os
import re
import resource
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import zstandard

from errors import PrepareError, library
from text import cut

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

PLAIN = (".txt", ".md", ".rst")  # text as it is; --suffix adds others
PACKED = (".gz", ".zst", ".xz")
SUFFIXES = tuple(ending + packed for ending in (*PLAIN, ".jsonl") for packed in ("", *PACKED)) + (".parquet",)
ALLOWED = f"{', '.join(PLAIN)}, .jsonl (each also {', '.join(PACKED)}), .parquet, and what --suffix names"
CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 128 << 20  # of a .jsonl file: a line and its document are in memory, in several forms
MAX_STRUCTURE_BYTES = 2 << 20  # of a line, outside of its strings: each becomes up to 60 bytes of Python objects
LARGE_LINE = 1 << 20  # shorter lines take little memory whatever they hold
BATCH_BYTES = 8 << 20  # text of a .parquet file that is in memory at a time, about
BATCH_ROWS = 128  # at most: a file may hold a long text once, and a million references to it
PARQUET_MEMORY = 1 << 30  # that reading a batch may take: a page is unpacked in one piece
EXPANSION = 250  # text that people wrote is packed to a twentieth at best, what programs wrote to a hundredth
EXPANSION_FLOOR = 256 << 20
DOCUMENT_COST = 16  # that a document counts besides its bytes, so that a billion empty ones end too
PACKED_BYTES = 512  # unpacked at a time: a zstd block takes 4 bytes or more and holds at most 128 KiB
MAX_PADDING = 16 << 20  # bytes of an archive, one after another, that unpack to nothing: a sparse file has terabytes
MAX_WINDOW = 1 << 27  # of zstd, allocated before the first byte comes; the zstd command has the same limit
XZ_MEMORY = 160 << 20  # bytes that unpacking .xz may take; `xz -9` needs 65 MiB

STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)  # in JSON
SURROGATE = re.compile(rb"\\u[dD][89abAB]")
CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that begin no character
NOT_UTF8 = "files that are not UTF-8"
MARKS = {  # UTF-32 first: its little-endian mark begins with that of UTF-16
    b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
UTF8_MARK = b"\xef\xbb\xbf"


class NotText(PrepareError):
    """A file that holds no text, or text that is not UTF-8; `kind` names such files, in the plural."""

    def __init__(self, message: str, kind: str):
        super().__init__(message)
        self.kind = kind


def ending_of(name: str, suffixes: tuple[str, ...] = ()) -> str:
    """The ending by which a file is read, in small letters, such as `.md.gz`; empty if it is none.

    suffixes: further endings of plain text.
    """
    name = name.lower()
    packed = next((ending for ending in PACKED if name.endswith(ending)), "")
    stem = name.removesuffix(packed)
    known = max((e for e in (*PLAIN, ".jsonl", *suffixes) if stem.endswith(e)), key=len, default="")
    if known and stem != known:  # `.md` alone is a hidden file without an ending
        return known + packed
    return ".parquet" if name.endswith(".parquet") else ""


def read_texts(
    path: Path, max_document_bytes: int, text_field: str, passed_over: Counter[str] | None = None
) -> Iterator[str]:
    """The documents of one file, in its order. What it holds besides them is counted in `passed_over`, by kind.

    A file that is neither .jsonl nor .parquet is plain text.
    """
    passed_over = Counter() if passed_over is None else passed_over
    empty = True
    try:
        with open_regular(path) as file:
            ending = ending_of(path.name)
            if ending == ".parquet":
                texts = _parquet_file(path, file, text_field)
            elif ending.startswith(".jsonl"):
                texts = _jsonl_file(path, file, text_field, passed_over)
            else:
                texts = _text_file(path, file, max_document_bytes, passed_over)
            for text in texts:
                empty = False
                yield text
                del text  # No part of a large document may stay in memory while the next one is read.
    except OSError as error:
        if error.filename is not None:
            raise
        raise PrepareError(f"{path}: {error.strerror or error}") from None
    except MemoryError:
        raise PrepareError(f"{path}: not enough memory to read it") from None
    passed_over["files without text"] += empty


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Raises PrepareError for a FIFO, a socket, a device or a folder, and never waits."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # A FIFO without a writer would wait.
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise PrepareError(f"{path}: not a regular file")
    return open(descriptor, "rb")


def read_small(path: Path, most: int) -> bytes:
    """All bytes of a file that can't be large. Raises PrepareError where it is, or is no regular file."""
    with open_regular(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise PrepareError(f"{path}: more than {most:,} bytes; is it the right file?")
    return data


class Unpacking:
    """Counts what a file unpacks to, and refuses a decompression bomb."""

    def __init__(self, path: Path, size: int):
        self.path, self.size = path, size
        self.most = max(EXPANSION_FLOOR, EXPANSION * size)
        self.left = self.most

    def count(self, size: int) -> None:
        """Count bytes. Raises PrepareError when they are too many."""
        self.left -= size
        if self.left < 0:
            raise PrepareError(
                f"{self.path}: a decompression bomb: {self.size:,} bytes that unpack to more than {self.most:,}"
            )


# ------------------------------------------------------------------------------------------------------- plain text


def check_plain(path: Path) -> None:
    """Read a file of plain text whole. Raises NotText if it is none, or not in UTF-8; PrepareError if it is damaged."""
    for _ in read_texts(path, CHUNK_BYTES, ""):
        pass


class _Unpacked(io.RawIOBase):
    """The chunks of an archive as a file."""

    def __init__(self, chunks: Iterator[bytes]):
        self.chunks, self.held = chunks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.held:
            chunk = next(self.chunks, None)
            if chunk is None:
                return 0
            self.held = memoryview(chunk)
        count = min(len(buffer), len(self.held))
        buffer[:count] = self.held[:count]
        self.held = self.held[count:]
        return count


def _text_file(path: Path, packed: BinaryIO, limit: int, passed_over: Counter[str]) -> Iterator[str]:
    file = packed
    if path.name.lower().endswith(PACKED):
        file = io.BufferedReader(_Unpacked(_chunks(path, packed)), CHUNK_BYTES)
    buffer, start = file.read(limit + 1), 0
    if buffer.startswith(UTF8_MARK):
        passed_over["byte-order marks"] += 1
        start = len(UTF8_MARK)
        buffer = buffer[start:] + file.read(start)
    while buffer:
        end = len(buffer) if len(buffer) <= limit else cut(buffer, limit)
        piece = buffer[:end]
        text = decode(piece, str(path), start)
        if b"\0" in piece:
            raise NotText(f"{path}: not text: a NUL at byte offset {start + piece.index(0)}", "binary files")
        yield text
        del text
        start += end
        buffer = buffer[end:] + file.read(limit + 1 - (len(buffer) - end))


def decode(data: bytes, name: str, start: int) -> str:
    """Bytes at an offset of a file as text. Raises PrepareError, naming the file, for what is not UTF-8."""
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), "") if not start else ""
    if encoding:
        advice = f"iconv -f {encoding} -t UTF-8 helps"
        raise NotText(f"{name}: {encoding} by its byte-order mark, not UTF-8; {advice}", NOT_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        kind = "binary files" if b"\0" in data else NOT_UTF8
        raise NotText(f"{name}: not UTF-8 at byte offset {start + error.start}", kind) from None


# ----------------------------------------------------------------------------------------------------------- .jsonl


def _jsonl_file(path: Path, file: BinaryIO, field: str, passed_over: Counter[str]) -> Iterator[str]:
    decoder = _decoder(field, passed_over)
    number, start = 0, 0
    for line in _lines(path, file):
        number += 1
        if not line or line.isspace():
            passed_over["blank lines"] += 1
            start += len(line) + 1
            continue
        where = f"{path}:{number}"
        _check_line(line, where)
        text = decode(line, where, start)
        start += len(line) + 1
        del line  # Of a line of 100 MB nothing may stay that is not needed any more.
        if number == 1 and text.startswith("\ufeff"):
            passed_over["byte-order marks"] += 1
            text = text[1:]
            if not text or text.isspace():
                passed_over["blank lines"] += 1
                continue
        try:
            record = decoder.decode(text)
        except RecursionError:
            raise PrepareError(f"{where}: not JSON that can be read: nested too deeply") from None
        except ValueError as error:
            raise PrepareError(f"{where}: not JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise PrepareError(f'{where}: no text in field "{field}" (--text-field names the field)')
        del text
        yield record.pop(field)


def _decoder(field: str, passed_over: Counter[str]) -> json.JSONDecoder:
    """A parser of records. Numbers are not wanted, and some have more digits than Python converts: all are True.

    Of a key that an object holds several times, as parsers do, the last value counts; for the text that is refused.
    """

    def record(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            if [name for name, _ in pairs].count(field) > 1:
                raise ValueError(f'the field "{field}" stands there twice')
            passed_over["duplicate JSON keys"] += len(pairs) - len(found)
        return found

    return json.JSONDecoder(object_pairs_hook=record, parse_int=bool, parse_float=bool)


def _check_line(line: bytes, where: str) -> None:
    """Refuse a long line that would take a multiple of its length in memory. Raises PrepareError."""
    if len(line) <= LARGE_LINE:
        return
    end = outside = 0
    for string in itertools.chain(STRING.finditer(line), [None]):  # One after the other: there may be millions.
        outside += 1 + (string.start() if string else len(line)) - end
        end = string.end() if string else end
        if outside > MAX_STRUCTURE_BYTES:
            raise PrepareError(f"{where}: more than {MAX_STRUCTURE_BYTES:,} bytes of JSON outside of its strings")
    _check_width(line, where)


def _check_width(line: bytes, where: str) -> None:
    """Refuse a text that is several times as long in memory, as its rarest character decides. Raises PrepareError."""
    characters = len(line.translate(None, CONTINUATION))
    if _character_bytes(line) * characters > 2 * MAX_LINE_BYTES:
        raise PrepareError(
            f"{where}: {characters:,} characters that take more than {2 * MAX_LINE_BYTES:,} bytes of memory, as one "
            "of them is rare; cut the document"
        )


def _character_bytes(line: bytes) -> int:
    """Bytes that Python takes for each character of this JSON, or more: the rarest one of a text decides."""
    if SURROGATE.search(line) or line.translate(None, bytes(range(0xF0))):
        return 4
    return 2 if b"\\u" in line or line.translate(None, bytes(range(0xC4))) else 1


def _chunks(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """The bytes of a file, unpacked if it is packed; a cut-off or damaged one is an error, not a short text."""
    size = os.fstat(file.fileno()).st_size
    kind = {".zst": "zstd", ".gz": "gzip", ".xz": "xz"}.get(path.suffix.lower(), "")
    if not kind:
        yield from iter(lambda: file.read(CHUNK_BYTES), b"")
        return
    if not size:
        raise PrepareError(f"{path}: damaged {kind} file: it has no bytes at all")
    unpacking = Unpacking(path, size)
    unpack = {"zstd": _zstd_chunks, "gzip": _gzip_chunks, "xz": _xz_chunks}[kind]
    for chunk in unpack(path, file):
        unpacking.count(len(chunk) + DOCUMENT_COST * chunk.count(b"\n"))
        yield chunk


class _Unpadded:
    """A file of gzip. The standard library reads the zeros behind the text one by one, however many there are."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.single = 0  # reads of one byte, one after another

    def read(self, size: int) -> bytes:
        self.single = self.single + 1 if size == 1 else 0
        if self.single > MAX_PADDING // 16:
            raise PrepareError(f"{self.path}: damaged gzip file: more than {self.single - 1:,} bytes without text")
        return self.file.read(size)


def _gzip_chunks(path: Path, file: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=cast(BinaryIO, _Unpadded(path, file)), mode="rb") as unpacked:
        try:
            yield from iter(lambda: unpacked.read(CHUNK_BYTES), b"")
        except EOFError:
            raise PrepareError(f"{path}: damaged gzip file: it ends too early") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise PrepareError(f"{path}: damaged gzip file: {error}") from None


def _xz_chunks(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """All streams of a file, a piece at a time."""
    unpacker, fruitless = None, 0
    for packed in iter(lambda: file.read(CHUNK_BYTES), b""):
        fruitless += len(packed)
        while packed or (unpacker and not unpacker.needs_input):
            if unpacker is None:
                packed = packed.lstrip(b"\0")  # zeros between two streams are padding
                if not packed:
                    break
                unpacker = lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY)
            try:
                chunk = unpacker.decompress(packed, CHUNK_BYTES)
            except lzma.LZMAError as error:
                raise PrepareError(f"{path}: damaged xz file: {_xz_reason(error)}") from None
            packed, unpacker = (unpacker.unused_data, None) if unpacker.eof else (b"", unpacker)
            if chunk:
                fruitless = 0
                yield chunk
        if fruitless > MAX_PADDING:
            raise PrepareError(f"{path}: damaged xz file: more than {MAX_PADDING:,} bytes without text")
    if unpacker is not None:
        raise PrepareError(f"{path}: damaged xz file: it ends too early")


def _xz_reason(error: lzma.LZMAError) -> str:
    if "emory" in str(error):
        return f"it needs more than {XZ_MEMORY:,} bytes of memory; unpack it with xz -d"
    return str(error)


def _zstd_chunks(path: Path, file: BinaryIO) -> Iterator[bytes]:
    """All frames of a file. A decompressor returns all that its input unpacks to, so it gets little at a time."""
    unpacker, context = None, zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    unpacked, fruitless = io.BytesIO(), 0
    for packed in iter(lambda: file.read(PACKED_BYTES), b""):
        fruitless, before = fruitless + len(packed), unpacked.tell()
        while packed:
            unpacker = unpacker or context.decompressobj()
            try:
                unpacked.write(unpacker.decompress(packed))
            except zstandard.ZstdError as error:
                raise PrepareError(f"{path}: damaged zstd file: {_zstd_reason(error)}") from None
            packed, unpacker = (unpacker.unused_data, None) if unpacker.eof else (b"", unpacker)
            if unpacked.tell() >= CHUNK_BYTES:
                yield unpacked.getvalue()
                unpacked, before = io.BytesIO(), -1
        fruitless = fruitless if unpacked.tell() == before else 0
        if fruitless > MAX_PADDING:
            raise PrepareError(f"{path}: damaged zstd file: more than {MAX_PADDING:,} bytes without text")
    if unpacker is not None:
        raise PrepareError(f"{path}: damaged zstd file: it ends too early")
    yield unpacked.getvalue()


def _zstd_reason(error: zstandard.ZstdError) -> str:
    if "memory" in str(error):
        return f"it needs a window of more than {MAX_WINDOW:,} bytes; zstd --long=31 unpacks it"
    return str(error)


def _lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    parts = []
    held, number = 0, 1
    for chunk in _chunks(path, file):
        *whole, rest = chunk.split(b"\n")
        for line in whole:
            parts.append(line)
            yield _joined(parts)
            held, number = 0, number + 1
        parts.append(rest)
        held += len(rest)
        if held > MAX_LINE_BYTES:
            raise PrepareError(
                f"{path}:{number}: a line of more than {MAX_LINE_BYTES:,} bytes, which is the most that "
                "memory is kept for; cut the document"
            )
    if last := _joined(parts):
        yield last


def _joined(parts: list[bytes]) -> bytes:
    """The parts in one; the list is empty then."""
    data = b"".join(parts)
    parts.clear()
    return data


# --------------------------------------------------------------------------------------------------------- .parquet


def _parquet_file(path: Path, file: BinaryIO, field: str) -> Iterator[str]:
    """The column's texts, in row groups that are read a piece at a time; a null is an empty text."""
    arrow, parquet = library("pyarrow"), library("pyarrow.parquet")
    arrow.allocate_buffer(1)  # From Arrow's own pool, which reserves a gigabyte of addresses the first time.
    arrow.set_memory_pool(arrow.system_memory_pool())  # What is taken from this one counts in `_memory_limit`.
    unpacking, rows = Unpacking(path, os.fstat(file.fileno()).st_size), 0
    try:
        with _memory_limit():
            # Without these two it would read a row group's bytes at once.
            reader = parquet.ParquetFile(file, pre_buffer=False, buffer_size=CHUNK_BYTES)
        _check_column(path, reader.schema_arrow, field)
        for number in range(reader.num_row_groups):
            for column in _batches(reader, number, field):
                yield from _column_texts(column, path, rows, unpacking)
                rows += len(column)
    except MemoryError:
        raise PrepareError(f"{path}: a part of it needs more than {PARQUET_MEMORY:,} bytes of memory") from None
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # The disk's, not the file's.
        raise PrepareError(f"{path}: damaged parquet file: {error}") from None


def _batches(reader: pyarrow.parquet.ParquetFile, number: int, field: str) -> Iterator[pyarrow.Array]:
    """The column in a row group, a few rows at a time."""
    group = reader.metadata.row_group(number)
    rows = min(BATCH_ROWS, max(1, BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)))
    batches = reader.iter_batches(rows, row_groups=[number], columns=[field], use_threads=False)
    while True:
        with _memory_limit():
            batch = next(batches, None)
        if batch is None:
            return
        yield batch.column(0)


def _column_texts(column: pyarrow.Array, path: Path, row: int, unpacking: Unpacking) -> Iterator[str]:
    """The texts of a few rows of which `row` stand before: at once where they are short, else one by one."""
    lengths = library("pyarrow.compute").binary_length
    if hasattr(column, "dictionary"):
        sizes = lengths(column.dictionary).take(column.indices).to_pylist()
    else:
        sizes = lengths(column).to_pylist()
    total = sum(size or 0 for size in sizes)
    unpacking.count(total + DOCUMENT_COST * len(sizes))
    if total <= BATCH_BYTES:
        yield from (text or "" for text in column.to_pylist())
        return
    for number, size in enumerate(sizes):
        where = f"{path}: row {row + number + 1}"
        if (size or 0) > MAX_LINE_BYTES:
            raise PrepareError(f"{where}: a text of more than {MAX_LINE_BYTES:,} bytes; cut the document")
        scalar = column[number]
        value = scalar.value if hasattr(column, "dictionary") else scalar
        if (size or 0) > LARGE_LINE:
            _check_width(value.as_buffer().to_pybytes(), where)
        yield value.as_py() or ""


@contextlib.contextmanager
def _memory_limit() -> Iterator[None]:
    """On Linux, let this process take PARQUET_MEMORY more than it has; what needs more gets a MemoryError."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[5])
    except OSError:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = pages * resource.getpagesize() + PARQUET_MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (limit if soft == resource.RLIM_INFINITY else min(soft, limit), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _check_column(path: Path, schema: pyarrow.Schema, field: str) -> None:
    """Raise PrepareError unless the file has one column of this name, which holds text."""
    types = library("pyarrow").types
    found = [item.type for item in schema if item.name == field]
    if len(found) != 1:
        raise PrepareError(f'{path}: no column "{field}" (--text-field names it); there are {", ".join(schema.names)}')
    kind = found[0].value_type if types.is_dictionary(found[0]) else found[0]
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise PrepareError(f'{path}: column "{field}" holds {found[0]}, not text (--text-field names another)')

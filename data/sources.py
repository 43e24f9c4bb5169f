"""Where the text of data/prepare.py comes from: files, folders and the built-in corpus; and which of it validates."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import corpus
import zstandard

if TYPE_CHECKING:
    from prepare import Options

SUFFIXES = (".txt", ".jsonl", ".jsonl.zst")
CHUNK_BYTES = 1 << 20


class PrepareError(Exception):
    """Something that the user can mend; the message is one line that names the option or the file."""


# ---------------------------------------------------------------------------------------------------------- sources


def list_files(sources: Iterable[str]) -> list[tuple[str, Path | None]]:
    """The sources with folders replaced by the files in them, sorted; the path is None for `builtin`."""
    listed = []
    for source in sources:
        path = Path(source)
        if builtin_packages(source):
            if any(path is None for _, path in listed):
                raise PrepareError(f"{source}: builtin can be given once; builtin:numpy,torch names several packages")
            listed.append((source, None))
        elif path.is_dir():
            inside = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
            inside = sorted((item for item in inside if item.name.endswith(SUFFIXES)), key=lambda item: item.parts)
            if not inside:
                raise PrepareError(f"{source}: the folder holds no {', '.join(SUFFIXES)} file")
            listed += [(str(item), item) for item in inside]
        elif not path.exists():
            raise PrepareError(f"{source}: no such file or folder (nor is it `builtin`)")
        elif not path.name.endswith(SUFFIXES):
            raise PrepareError(f"{source}: unknown kind of file; allowed are {', '.join(SUFFIXES)}")
        else:
            listed.append((source, path))
    return listed


def builtin_packages(source: str) -> tuple[str, ...]:
    """The packages that `builtin` or `builtin:numpy,torch` stands for; empty for any other source."""
    if source == "builtin":
        return corpus.PACKAGES
    if not source.startswith("builtin:"):
        return ()
    names = tuple(sorted(set(source.removeprefix("builtin:").split(","))))
    if not set(names) <= set(corpus.PACKAGES):
        raise PrepareError(f"{source}: allowed packages are {', '.join(corpus.PACKAGES)}")
    return names


def read_texts(path: Path, max_document_bytes: int, text_field: str) -> Iterator[str]:
    """The documents of one file, in its order."""
    if path.name.endswith(".txt"):
        with open(path, "rb") as file:
            yield from _text_file(str(path), file, max_document_bytes)
    else:
        yield from _jsonl_file(path, text_field)


def _text_file(name: str, file: io.BufferedIOBase, limit: int) -> Iterator[str]:
    buffer, start = file.read(limit + 1), 0
    while buffer:
        end = len(buffer) if len(buffer) <= limit else cut(buffer, limit)
        yield _decode(buffer[:end], name, start)
        start += end
        buffer = buffer[end:] + file.read(limit + 1 - (len(buffer) - end))


def cut(data: bytes, limit: int) -> int:
    """Where to end a piece of at most `limit` bytes of a longer UTF-8 text: after a blank line, a line, or a space.

    Only the second half is searched, so that pieces are not tiny; without any of the three, between two characters.
    """
    for mark in (b"\n\n", b"\n", b" "):
        found = data.rfind(mark, limit // 2, limit)
        if found >= 0:
            return found + len(mark)
    end = limit
    while end > max(1, limit - 3) and data[end] & 0xC0 == 0x80:
        end -= 1
    return end


def _decode(data: bytes, name: str, start: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PrepareError(f"{name}: not UTF-8 at byte offset {start + error.start}") from None


def _jsonl_file(path: Path, field: str) -> Iterator[str]:
    number, start = 0, 0
    for line in _lines(_chunks(path)):
        number += 1
        where = f"{path}:{number}"
        text = _decode(line, where, start)
        start += len(line) + 1
        text = text.removeprefix("\ufeff") if number == 1 else text
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PrepareError(f"{where}: not JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise PrepareError(f'{where}: no text in field "{field}" (--text-field names the field)')
        yield record[field]


def _chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, unpacked if it is .zst; a cut-off or damaged .zst file is an error, not a short text."""
    with open(path, "rb") as file:
        if not path.name.endswith(".zst"):
            yield from iter(lambda: file.read(CHUNK_BYTES), b"")
            return
        unpacker = None
        for packed in iter(lambda: file.read(CHUNK_BYTES // 8), b""):
            while packed:
                unpacker = unpacker or zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
                try:
                    yield unpacker.decompress(packed)
                except zstandard.ZstdError as error:
                    raise PrepareError(f"{path}: damaged zstd file: {error}") from None
                packed, unpacker = (unpacker.unused_data, None) if unpacker.eof else (b"", unpacker)
        if unpacker is not None:
            raise PrepareError(f"{path}: damaged zstd file: it ends too early")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    parts = []
    for chunk in chunks:
        *whole, rest = chunk.split(b"\n")
        for line in whole:
            yield b"".join(parts) + line
            parts = []
        parts.append(rest)
    if last := b"".join(parts):
        yield last


# ------------------------------------------------------------------------------------------------------------ split


def text_hash(data: bytes, seed: int) -> int:
    """A number below 2**64 that decides a document's side; equal texts have equal ones."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little")


def validation_groups(documents: Iterable[corpus.Document], fraction: float, seed: int) -> set[str]:
    """Groups that together hold `fraction` of the bytes, or a little less; never all groups, and at least one.

    Groups come in an order given by their hashes, and one that would exceed the share is passed over, so that a
    large group of look-alikes can't become half of the validation text.
    """
    sizes = Counter()
    for document in documents:
        sizes[document.group] += len(document.text.encode())
    order = sorted(sizes, key=lambda group: text_hash(group.encode(), seed))
    wanted, taken, chosen = fraction * sum(sizes.values()), 0, set()
    for group in order[:-1]:
        if taken + sizes[group] <= wanted:
            taken += sizes[group]
            chosen.add(group)
    return chosen or set(sorted(order, key=lambda group: sizes[group])[: min(1, len(order) - 1)])


@dataclasses.dataclass(frozen=True)
class Splitter:
    """Validation is what hashes below the threshold, but for documents whose side is already known by hash."""

    threshold: int
    known: dict[int, str]

    def side(self, number: int) -> str:
        """`train` or `val` for the document with this hash."""
        return self.known.get(number) or ("val" if number < self.threshold else "train")


class Sources:
    """All documents of all sources, as often as asked for, always in the same order."""

    def __init__(self, options: Options):
        self.options = options
        self.listed = list_files(options.sources)
        self.builtin: dict[str, tuple[corpus.Document, ...]] = {}
        self.known: dict[int, str] = {}
        self.described: list[dict] = []
        for name, path in self.listed:
            if path is None:
                self._gather(name)
            else:
                self.described.append({"path": name, "bytes": path.stat().st_size})

    def _gather(self, name: str) -> None:
        packages = builtin_packages(name)
        try:
            gathered = corpus.gather(packages, self.options.workers)
        except ModuleNotFoundError as error:
            raise PrepareError(f"{name}: {error}") from None
        documents = list(gathered.documents)
        groups = validation_groups(documents, self.options.val_fraction, self.options.seed)
        for document in documents:
            side = "val" if document.group in groups else "train"
            self.known[text_hash(document.text.encode(), self.options.seed)] = side
        # The files' order is package by package; training must not meet one package at the end only.
        random.Random(self.options.seed).shuffle(documents)
        self.builtin[name] = tuple(documents)
        self.described.append({
            "builtin": package_versions(packages), "documents": len(documents), "files": gathered.files,
            "files_not_parsed": list(gathered.unparsed), "groups": len({d.group for d in documents}),
        })

    def __iter__(self) -> Iterator[str]:
        for name, path in self.listed:
            if path is None:
                yield from (document.text for document in self.builtin[name])
            else:
                yield from read_texts(path, self.options.max_document_bytes, self.options.text_field)


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed versions of packages; `python` is the interpreter."""
    return {
        name: platform.python_version() if name == "python" else importlib.metadata.version(name) for name in packages
    }

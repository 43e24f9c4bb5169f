"""Reads the text of data/prepare.py from files, folders, the hub and the built-in corpus, and splits off validation."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.metadata
import io
import json
import os
import platform
import random
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import zstandard

import corpus
import hub
import published
from errors import PrepareError, library
from options import Options
from progress import Report, bar_of
from text import cut, text_hash

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".txt", ".jsonl", ".jsonl.zst", ".jsonl.gz", ".parquet")
CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 128 << 20  # of a .jsonl file: a line and its document are in memory, in several forms
BATCH_BYTES = 8 << 20  # text of a .parquet file that is in memory at a time, about


# ---------------------------------------------------------------------------------------------------------- sources


def list_files(sources: Iterable[str]) -> list[tuple[str, Path | None]]:
    """The sources with folders replaced by the files in them, sorted; the path is None for builtin and the hub's."""
    listed = []
    for source in sources:
        path = Path(source)
        if is_remote(source):
            listed.append((source, None))
        elif builtin_packages(source):
            if any(builtin_packages(name) for name, _ in listed):
                raise PrepareError(f"{source}: builtin can be given once; builtin:numpy,torch names several packages")
            listed.append((source, None))
        elif path.is_dir():
            inside = [Path(folder, name) for folder, _, names in os.walk(path) for name in names]
            inside = sorted((item for item in inside if item.name.endswith(SUFFIXES)), key=lambda item: item.parts)
            if not inside:
                raise PrepareError(f"{source}: the folder holds no {', '.join(SUFFIXES)} file")
            listed += [(str(item), item) for item in inside]
        elif not path.exists():
            raise PrepareError(
                f"{source}: no such file or folder (nor is it builtin, hf:OWNER/NAME, "
                f"{published.DOCUMENTS}, {', '.join(published.VARIANTS)})"
            )
        elif not path.name.endswith(SUFFIXES):
            raise PrepareError(f"{source}: unknown kind of file; allowed are {', '.join(SUFFIXES)}")
        else:
            listed.append((source, path))
    return listed


def is_remote(source: str) -> bool:
    """Whether the source lies on the hub: a dataset, the challenge's documents or one of its ready-made exports."""
    return source.startswith("hf:") or source == published.DOCUMENTS or source in published.VARIANTS


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
    elif path.name.endswith(".parquet"):
        yield from _parquet_file(path, text_field)
    else:
        yield from _jsonl_file(path, text_field)


def _text_file(name: str, file: io.BufferedIOBase, limit: int) -> Iterator[str]:
    buffer, start = file.read(limit + 1), 0
    while buffer:
        end = len(buffer) if len(buffer) <= limit else cut(buffer, limit)
        yield _decode(buffer[:end], name, start)
        start += end
        buffer = buffer[end:] + file.read(limit + 1 - (len(buffer) - end))


def _decode(data: bytes, name: str, start: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PrepareError(f"{name}: not UTF-8 at byte offset {start + error.start}") from None


def _jsonl_file(path: Path, field: str) -> Iterator[str]:
    number, start = 0, 0
    for line in _lines(_chunks(path), path):
        number += 1
        where = f"{path}:{number}"
        text = _decode(line, where, start)
        start += len(line) + 1
        del line  # Of a line of 100 MB nothing may stay that is not needed any more.
        text = text.removeprefix("\ufeff") if number == 1 else text
        if not text or text.isspace():
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise PrepareError(f"{where}: not JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise PrepareError(f'{where}: no text in field "{field}" (--text-field names the field)')
        del text
        yield record.pop(field)


def _chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, unpacked if it is .zst or .gz; a cut-off or damaged one is an error, not a short text."""
    if path.name.endswith(".zst"):
        yield from _zstd_chunks(path)
        return
    with gzip.open(path, "rb") if path.name.endswith(".gz") else open(path, "rb") as file:
        try:
            yield from iter(lambda: file.read(CHUNK_BYTES), b"")
        except EOFError:
            raise PrepareError(f"{path}: damaged gzip file: it ends too early") from None
        except (gzip.BadGzipFile, zlib.error) as error:
            raise PrepareError(f"{path}: damaged gzip file: {error}") from None


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
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


def _parquet_file(path: Path, field: str) -> Iterator[str]:
    """The column's texts, in row groups that are read a piece at a time; a null is an empty text."""
    arrow, parquet = library("pyarrow"), library("pyarrow.parquet")
    try:
        # Without these two it would read a row group's bytes at once.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=CHUNK_BYTES) as file:
            _check_column(path, file.schema_arrow, field)
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                rows = max(1, BATCH_BYTES * group.num_rows // max(1, group.total_byte_size))
                for batch in file.iter_batches(rows, row_groups=[number], columns=[field], use_threads=False):
                    yield from (text or "" for text in batch.column(0).to_pylist())
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # The disk's, not the file's.
        raise PrepareError(f"{path}: damaged parquet file: {error}") from None


def _check_column(path: Path, schema: pyarrow.Schema, field: str) -> None:
    """Raise PrepareError unless the file has one column of this name, which holds text."""
    types = library("pyarrow").types
    found = [item.type for item in schema if item.name == field]
    if len(found) != 1:
        raise PrepareError(f'{path}: no column "{field}" (--text-field names it); there are {", ".join(schema.names)}')
    kind = found[0].value_type if types.is_dictionary(found[0]) else found[0]
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise PrepareError(f'{path}: column "{field}" holds {found[0]}, not text (--text-field names another)')


def _lines(chunks: Iterable[bytes], path: Path) -> Iterator[bytes]:
    parts = []
    held, number = 0, 1
    for chunk in chunks:
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


# ------------------------------------------------------------------------------------------------------------ split


def validation_groups(documents: Iterable[corpus.Document], fraction: float, seed: int) -> set[str]:
    """Groups that together hold `fraction` of the bytes, or a little less; never all groups, and at least one.

    Groups come in an order given by their hashes, and one that would exceed the share is passed over, so that a
    large group of look-alikes can't become half of the validation text.
    """
    sizes = Counter()
    for document in documents:
        sizes[document.group] += len(document.text.encode())
    order = sorted(sizes, key=lambda group: text_hash(group.encode(), seed))
    wanted = fraction * sum(sizes.values())
    taken, chosen = 0, set()
    for group in order[:-1]:
        if taken + sizes[group] <= wanted:
            taken += sizes[group]
            chosen.add(group)
    return chosen or set(sorted(order, key=lambda group: sizes[group])[: min(1, len(order) - 1)])


@dataclasses.dataclass(frozen=True)
class Splitter:
    """Decides by hash: below the threshold is validation, except for documents whose side is already known."""

    threshold: int
    known: dict[int, str]

    def side(self, number: int) -> str:
        """`train` or `val` for the document with this hash."""
        return self.known.get(number) or ("val" if number < self.threshold else "train")


class Sources:
    """All documents of all sources, as often as asked for, always in the same order.

    described: what the manifest says of each source. known: the side of documents that have one, by `text_hash`.
    With --val-documents, or docs_selected.jsonl, the first documents are for validation and all others for training.
    A later document that equals one of the first is left out and counted in `duplicates`.
    """

    def __init__(self, options: Options, report: Report | None = None):
        self.options, self.report = options, report
        self.first = validation_documents(options)
        self.val_fraction = 0.0 if self.first else options.val_fraction
        self.files: list[tuple[str, Path | None]] = []
        self.builtin: dict[str, tuple[corpus.Document, ...]] = {}
        self.known: dict[int, str] = {}
        self.described: list[dict] = []
        self.duplicates = 0
        for name, path in list_files(options.sources):
            if is_remote(name):
                self._download(name)
            elif path is None:
                self.files.append((name, None))
                self._gather(name)
            else:
                self.files.append((name, path))
                self.described.append({"path": name, "bytes": path.stat().st_size})
                if path.name.startswith(f"{published.DOCUMENTS}.jsonl"):
                    published.check_documents(path)

    def _download(self, name: str) -> None:
        """Fetch a source's files from the hub, unless they are there, and take them as if given by their paths."""
        options = self.options
        if name == published.DOCUMENTS:
            repository, remote = published.documents(options)
        else:
            repository, remote = hub.text_files(name, options.revision)
        folder = options.downloads_folder / repository.repo.replace("/", "--") / repository.commit[:12]
        folder.mkdir(parents=True, exist_ok=True)
        wanted = {folder / file.path: file for file in remote}
        hub.check_room("--downloads", folder, wanted)
        with bar_of(self.report)(f"downloading {len(wanted)} files", sum(f.size for f in remote) or 1) as progress:
            repository.fetch(wanted, progress)
        paths = [path for path in wanted if path.name.endswith(SUFFIXES)]
        self.files += [(str(path), path) for path in paths]
        self.described.append(
            {
                "source": name,
                "repo": repository.repo,
                "commit": repository.commit,
                "files": [{"path": file.path, "bytes": file.size, "hash": file.digest} for file in remote],
            }
        )
        if name == published.DOCUMENTS:
            published.check_documents(paths[0])

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
        self.described.append(
            {
                "builtin": package_versions(packages),
                "documents": len(documents),
                "files": gathered.files,
                "files_not_parsed": list(gathered.unparsed),
                "groups": len({d.group for d in documents}),
            }
        )

    def __iter__(self) -> Iterator[str]:
        return self._split_by_place() if self.first else self._texts()

    def _texts(self) -> Iterator[str]:
        for name, path in self.files:
            if path is None:
                yield from (document.text for document in self.builtin[name])
            else:
                yield from read_texts(path, self.options.max_document_bytes, self.options.text_field)

    def _split_by_place(self) -> Iterator[str]:
        number, self.duplicates = -1, 0
        for number, text in enumerate(self._texts()):
            mark = text_hash(text.encode("utf-8", "surrogatepass"), self.options.seed)
            if number < self.first:
                self.known[mark] = "val"
            elif text and mark in self.known:
                self.duplicates += 1
                continue
            yield text
        if number < self.first:
            raise PrepareError(
                f"--val-documents {self.first}: {' '.join(self.options.sources)}: there are only "
                f"{number + 1} documents, and training needs some too"
            )


def validation_documents(options: Options) -> int | None:
    """How many of the first documents validate, or None where a hash decides. Raises PrepareError."""
    names = [path.name if path else name for name, path in list_files(options.sources)]
    listed = [name == published.DOCUMENTS or name.startswith(f"{published.DOCUMENTS}.jsonl") for name in names]
    if any(listed[1:]):
        raise PrepareError(
            f"{' '.join(options.sources)}: {published.DOCUMENTS} must come first, as its first "
            f"{published.VALIDATION_DOCUMENTS:,} documents validate"
        )
    first = options.val_documents or (published.VALIDATION_DOCUMENTS if any(listed) else None)
    if first and any(builtin_packages(source) for source in options.sources):
        raise PrepareError(
            f"{' '.join(options.sources)}: builtin has a split of its own and can't stand beside "
            f"{'--val-documents' if options.val_documents else published.DOCUMENTS}"
        )
    return first


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed versions of packages; `python` is the interpreter."""
    return {
        name: platform.python_version() if name == "python" else importlib.metadata.version(name) for name in packages
    }

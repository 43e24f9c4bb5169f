"""Shard files in the challenge's format, written so that a killed preparation continues after its last full shard."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from text import from_json, to_json

SHARD_MAGIC = 20240520
SHARD_VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
NOTHING = bytes(32)  # What a chain of hashes begins with.


def link(chain: bytes, item: bytes) -> bytes:
    """SHA-256 of a chain so far and its next item. Unlike a hash of all items, a chain can be saved and continued."""
    return hashlib.sha256(chain + item).digest()


def write_file(path: Path, data: bytes) -> None:
    """Write a file under another name and rename it, so that it exists complete or not at all, even after a crash."""
    aside = path.with_name(path.name + ".part")
    with open(aside, "wb") as file:
        file.write(data)
        _sync(file)
    os.replace(aside, path)
    sync_folder(path.parent)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Shard:
    """The tokens of a shard, read when a slice of them is asked for.

    A memory map would end the process without a word where the file is cut off meanwhile, or cannot be read.
    name: what errors call the file. Raises ValueError if it has another header or another length than its header says,
    or has become shorter.
    """

    def __init__(self, path: Path, name: str = ""):
        self.path = path
        self.name = name or str(path)
        size = path.stat().st_size
        header = np.fromfile(path, "<i4", 3).tolist() if size >= HEADER_BYTES else [0, 0, 0]
        right_kind = header[:2] == [SHARD_MAGIC, SHARD_VERSION]
        right_length = size == HEADER_BYTES + 2 * header[2]
        if not (right_kind and right_length):
            raise ValueError(f"{self.name}: not a shard: {size} bytes whose header begins with {header}")
        self.tokens = header[2]

    def __len__(self) -> int:
        return self.tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        """[n] uint16."""
        start, stop, _ = part.indices(self.tokens)
        tokens = np.fromfile(self.path, "<u2", max(0, stop - start), offset=HEADER_BYTES + 2 * start)
        if len(tokens) < stop - start:
            raise ValueError(f"{self.name}: was cut off: token {start + len(tokens)} is missing")
        return tokens


def read_shard(path: Path, name: str = "") -> np.ndarray:
    """All tokens of a shard, [n] uint16; name and errors are those of Shard."""
    return Shard(path, name)[:]


@dataclasses.dataclass(frozen=True)
class Document:
    """What is kept of a document while its tokens are made."""

    number: int  # text.text_hash
    side: str
    size: int  # UTF-8 bytes
    sha256: bytes
    data: bytes | None  # its UTF-8, of validation documents only


class ShardWriter:
    """Writes one side's documents, each whole, into files of at most `shard_tokens` tokens.

    A file is longer only if it holds a single document with more tokens. A writer of sidecars gets each token's byte
    count in place of the token, so it starts new files exactly where the writer of tokens does.
    """

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder, self.split = folder, split
        self.shard_tokens = shard_tokens
        self.shards: list[dict] = []
        self.chain = NOTHING
        self.file = None

    def is_full(self, tokens: int) -> bool:
        """Whether a document of so many tokens begins another file."""
        return self.file is not None and self.shards[-1]["tokens"] + tokens > self.shard_tokens

    def add(self, tokens: bytes, document: Document) -> None:
        """Append a document's tokens (uint16) to the open file; where there is none, begin one."""
        if not self.file:
            name = f"fineweb_{self.split}_{len(self.shards):06d}.bin"
            self.shards.append({"file": name, "tokens": 0, "documents": 0, "bytes": 0})
            self.file = open(self.folder / name, "w+b")  # noqa: SIM115 (open until `close`)
            self.file.write(bytes(HEADER_BYTES))
        self.file.write(tokens)
        self.chain = link(self.chain, document.sha256)
        shard = self.shards[-1]
        shard["tokens"] += len(tokens) // 2
        shard["documents"] += 1
        shard["bytes"] += document.size

    def close(self) -> None:
        """Finish the open file: its header, its checksum, and its bytes on the disk."""
        if not self.file:
            return
        file, self.file = self.file, None
        with file:
            header = np.zeros(HEADER_INTS, "<i4")
            header[:3] = SHARD_MAGIC, SHARD_VERSION, self.shards[-1]["tokens"]
            file.seek(0)
            file.write(header.tobytes())
            file.seek(0)
            self.shards[-1]["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
            _sync(file)

    def state(self) -> dict:
        """What `restore` needs; what the open file holds so far is on the disk then."""
        if self.file:
            _sync(self.file)
        return {"chain": self.chain.hex(), "shards": self.shards}

    def restore(self, state: dict) -> None:
        """Go back to a state. Raises OSError or ValueError if the files do not hold what it says."""
        self.chain, self.shards = bytes.fromhex(state["chain"]), state["shards"]
        for shard in self.shards:
            path, size = self.folder / shard["file"], HEADER_BYTES + 2 * shard["tokens"]
            if path.stat().st_size < size:
                raise ValueError(f"{path}: cut off")
            if "sha256" not in shard:  # The file that was open may hold more than the state.
                self.file = open(path, "r+b")  # noqa: SIM115 (open until `close`)
                self.file.truncate(size)
                self.file.seek(size)

    def summary(self) -> dict:
        """This side's entry in the manifest; `documents_sha256` is the chain of its documents' SHA-256."""
        totals = {key: sum(shard[key] for shard in self.shards) for key in ("documents", "tokens", "bytes")}
        return {**totals, "documents_sha256": self.chain.hex(), "shards": self.shards}


class Shards:
    """All that the second pass writes into a folder, with its progress, so that a killed run can continue.

    Whenever a shard is finished, `state.json` records how many documents have been handled and what the files hold. A
    run that continues cuts off what was written later, and handles the later documents again.
    """

    def __init__(self, folder: Path, shard_tokens: int, with_sidecars: bool):
        """Go on from the folder's state if it has one that its files agree with, else begin."""
        self.folder, self.shard_tokens = folder, shard_tokens
        self.sides = {"train": ("train",), "val": ("val", "val_bytes") if with_sidecars else ("val",)}
        try:
            state = from_json((folder / "state.json").read_bytes())
            self._begin(state["documents"], state["dropped"], bytes.fromhex(state["digest"]))
            self._restore(state)
        except (OSError, ValueError, LookupError, TypeError):  # No state, or the disk lost files.
            self._begin(0, 0, NOTHING)
            self.validation = open(folder / "validation", "wb")  # noqa: SIM115 (open until `close`)

    def _begin(self, documents: int, dropped: int, digest: bytes) -> None:
        self.documents, self.dropped = documents, dropped
        self.digest = digest  # Chain of the handled documents' numbers: shows a change of the sources.
        self.writers = {
            side: [ShardWriter(self.folder, name, self.shard_tokens) for name in names]
            for side, names in self.sides.items()
        }
        self.validation: BinaryIO | None = None  # That side's text; open once `__init__` is done.

    def _restore(self, state: dict) -> None:
        for side, writers in self.writers.items():
            for writer, saved in zip(writers, state["writers"][side], strict=True):
                writer.restore(saved)
        path, size = self.folder / "validation", state["validation"]
        if path.stat().st_size < size:
            raise ValueError(f"{path}: cut off")
        self.validation = open(path, "r+b")  # noqa: SIM115 (open until `close`)
        self.validation.truncate(size)
        self.validation.seek(size)

    def add(self, document: Document, contents: list[bytes]) -> None:
        """Append a document's tokens to its side's files, and its tokens' bytes where it has sidecars."""
        writers = self.writers[document.side]
        if writers[0].is_full(len(contents[0]) // 2):
            for writer in writers:
                writer.close()
            self.save()
        for writer, content in zip(writers, contents, strict=True):
            writer.add(content, document)
        if document.data is not None:
            assert self.validation is not None
            self.validation.write(document.data)

    def handled(self, document: Document, dropped: bool = False) -> None:
        """Count a document that has been added, dropped, or is empty."""
        self.documents += 1
        self.dropped += dropped
        self.digest = link(self.digest, document.number.to_bytes(8, "little"))

    def save(self) -> None:
        """Record how far the pass has come."""
        assert self.validation is not None
        _sync(self.validation)
        state = {
            "documents": self.documents,
            "dropped": self.dropped,
            "digest": self.digest.hex(),
            "validation": self.validation.tell(),
            "writers": {side: [writer.state() for writer in writers] for side, writers in self.writers.items()},
        }
        write_file(self.folder / "state.json", to_json(state).encode())

    def finish(self) -> dict[str, dict]:
        """Close all files. Returns the manifest's `splits`."""
        for writers in self.writers.values():
            for writer in writers:
                writer.close()
        self.save()
        splits = {side: writers[0].summary() for side, writers in self.writers.items()}
        for sidecars in self.writers["val"][1:]:
            splits["val"]["sidecars"] = sidecars.shards
        return splits

    def close(self) -> None:
        """Close the files as they are, finished or not."""
        for file in (self.validation, *(writer.file for writers in self.writers.values() for writer in writers)):
            if file:
                with contextlib.suppress(OSError):  # A full disk: the first write has reported it.
                    file.close()

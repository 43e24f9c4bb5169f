"""Looks for validation text in the training shards: copies of whole documents, and windows of 50 tokens in both.

data/prepare.py audits every folder that it writes or downloads, and tools/audit_data.py audits any other. What was
found goes into manifest.json, with the SHA-256 of each file that was read:

    "audit": {
     "shared_documents": 0,             validation documents that are in the training shards too
     "shared_copies": 0,                training documents that are such a copy
     "windows": {
      "length": 50,                     tokens of a window
      "of": 242615,                     windows of that length inside validation documents
      "shared": 1373,                   those that also stand inside a training document
      "documents": 62                   validation documents that hold a shared window
     },
     "sha256": {"fineweb_train_000000.bin": "...", ...}    every training and validation shard and byte sidecar
    }

An audit holds for precisely the bytes with these digests. train_gpt.py refuses to train on other shards, or where more
is shared than ALLOW_SHARED_DOCUMENTS and ALLOW_SHARED_WINDOWS allow.

Documents are compared by their tokens: with one tokenizer, equal tokens are equal text. A validation document is held
in memory with about 6 bytes a token; training shards are memory-mapped and read once, in blocks, by several threads.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from errors import PrepareError
from shards import HEADER_BYTES, Shard
from tokenizer import BOS

WINDOW = 50  # tokens of a shared window
ANCHOR = 25  # tokens of the blocks by which shared windows are found: half a window, or less
BLOCK = 1 << 16  # tokens that are looked at together: they stay in a core's cache
HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, of random bits: 2^64 over the golden ratio


# ------------------------------------------------------------------------------------------------------------- shards


class ShardStream:
    """Shards as one sequence of tokens. Raises PrepareError for a file that is no shard."""

    def __init__(self, paths: Iterable[Path]):
        self.paths = list(paths)
        try:
            self.shards = [Shard(path) for path in self.paths]
        except ValueError as error:
            raise PrepareError(str(error)) from None
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1, [n] uint16."""
        parts = [np.empty(0, np.uint16)]
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            offset = start - int(self.starts[shard])
            parts.append(self.slice(shard, offset, offset + stop - start))
            start += len(parts[-1])
            shard += 1
        return np.concatenate(parts)

    def slice(self, number: int, start: int, stop: int) -> np.ndarray:
        """Tokens of one shard, [n] uint16; at its end they may be fewer. Raises PrepareError."""
        try:
            return self.shards[number][start:stop]
        except (ValueError, OSError) as error:
            raise PrepareError(str(error)) from None

    def take(self, positions: np.ndarray) -> np.ndarray:
        """Tokens at positions of the stream, uint16 of their shape. They are read in whole blocks, in order."""
        flat = positions.ravel()
        order = np.argsort(flat, kind="stable")
        ordered, tokens = flat[order], np.empty(flat.shape, np.uint16)
        done = 0
        while done < len(ordered):
            start = int(ordered[done])
            block = self.read(start, min(start + BLOCK, len(self)))
            end = int(np.searchsorted(ordered, start + len(block)))
            tokens[order[done:end]] = block[ordered[done:end] - start]
            done = end
        return tokens.reshape(positions.shape)

    def next_document(self, position: int) -> int:
        """Where the first document at or after a position begins, or the stream's length if there is none."""
        while position < len(self):
            block = self.read(position, min(position + BLOCK, len(self)))
            begins = np.flatnonzero(block == BOS)
            if len(begins):
                return position + int(begins[0])
            position += len(block)
        return position


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------------------------------------- documents


def document_keys(stream: ShardStream, offsets: np.ndarray) -> np.ndarray:
    """Offsets [n + 1] of documents -> [n] uint64 keys from the length and eight tokens: equal for equal documents."""
    keys = np.diff(offsets).astype(np.uint64)
    for start in range(0, len(keys), BLOCK):  # A shard may hold a document every other token.
        block = offsets[start : start + BLOCK + 1]
        lengths = np.diff(block)
        places = block[:-1, None] + (lengths[:, None] - 1) * np.arange(1, 9) // 8  # spread out: web pages begin alike
        for tokens in stream.take(places).T:
            keys[start : start + BLOCK] = keys[start : start + BLOCK] * HASH_FACTOR + tokens
    return keys


class DocumentIndex:
    """The documents of the validation stream, to find their copies among training documents.

    Keys single out the few candidates; the SHA-256 of all tokens decides.
    """

    def __init__(self, stream: ShardStream):
        begins = np.flatnonzero(stream.read(0, len(stream)) == BOS)
        self.offsets = np.append(begins, len(stream))
        self.numbers: dict[bytes, list[int]] = {}  # document numbers by the hash of their tokens
        with_text = np.flatnonzero(np.diff(self.offsets) > 1)  # a document without text shares nothing
        for number in with_text.tolist():
            self.numbers.setdefault(self.digest(stream, self.offsets, number), []).append(number)
        self.keys = np.unique(document_keys(stream, self.offsets)[with_text])

    @staticmethod
    def digest(stream: ShardStream, offsets: np.ndarray, number: int) -> bytes:
        """SHA-256 of the tokens of a document."""
        return hashlib.sha256(stream.read(int(offsets[number]), int(offsets[number + 1])).data).digest()

    def copies(self, stream: ShardStream, offsets: np.ndarray) -> list[list[int]]:
        """For each training document between offsets [n + 1] that is a copy: the validation documents it equals."""
        if not len(self.keys) or len(offsets) < 2:
            return []
        keys = document_keys(stream, offsets)
        nearest = self.keys[np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)]
        candidates = np.flatnonzero(nearest == keys).tolist()
        equal = (self.numbers.get(self.digest(stream, offsets, number)) for number in candidates)
        return [numbers for numbers in equal if numbers]


# ------------------------------------------------------------------------------------------------------------ windows


def ranges(begins: np.ndarray, counts: np.ndarray, step: int = 1) -> np.ndarray:
    """begins[0], begins[0] + step, ... (counts[0] values), then the same from begins[1] and so on, in one array."""
    places = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.repeat(begins, counts) + step * places


class WindowIndex:
    """All windows of WINDOW tokens inside validation documents, each marked once training is seen to hold it too.

    Each document is cut into blocks of ANCHOR tokens, its anchors. Every window contains a whole anchor, so only
    anchors are indexed and looked up: by rolling hashes, and first in a table of bits that rules out almost all
    places. Where an anchor occurs in training, the windows around it are compared token by token.
    """

    def __init__(self, stream: ShardStream):
        edge = np.full(WINDOW, BOS, np.uint16)  # so that no window reaches over the stream's ends
        self.tokens = np.concatenate((edge, stream.read(0, len(stream)), edge))
        self.factors = np.random.default_rng(0).integers(0, 2**64, 1 << 16, dtype=np.uint64)  # one for each token id
        self.begins = np.flatnonzero(self.tokens == BOS)
        lengths = np.diff(self.begins) - 1
        self.windows = int(np.maximum(lengths - WINDOW + 1, 0).sum())
        self.index_anchors(ranges(self.begins[:-1] + 1, lengths // ANCHOR, ANCHOR))
        self.shared = np.zeros(len(self.tokens), bool)  # windows that training holds, by their first token

    def index_anchors(self, places: np.ndarray) -> None:
        """Sorts the anchors at these places by their hashes, and makes the table of bits."""
        hashes = [np.empty(0, np.uint64)]
        for start in range(0, len(self.tokens) - ANCHOR, BLOCK):
            first, last = np.searchsorted(places, (start, start + BLOCK))
            block = self.hashes(self.tokens[start : start + BLOCK + ANCHOR - 1], ANCHOR)
            hashes.append(block[places[first:last] - start])
        anchors = np.concatenate(hashes)
        order = np.argsort(anchors, kind="stable")
        self.anchors = anchors[order]
        self.places = places[order]
        bits = max(10, (128 * len(anchors)).bit_length())
        self.shift = np.uint64(64 - bits)
        self.table = np.zeros(1 << bits - 3, np.uint8)
        index = self.anchors >> self.shift
        np.bitwise_or.at(self.table, index >> np.uint64(3), np.uint8(1) << (index & np.uint64(7)).astype(np.uint8))

    def hashes(self, tokens: np.ndarray, length: int) -> np.ndarray:
        """[n] tokens -> [n - length + 1] uint64: polynomial hashes, modulo 2^64, of all runs of `length` tokens."""
        if length == 1:
            return self.factors[tokens]
        half = self.hashes(tokens, length // 2)
        both = half[: -(length // 2)] * HASH_FACTOR ** np.uint64(length // 2)
        both += half[length // 2 :]
        return both if length % 2 == 0 else both[:-1] * HASH_FACTOR + self.factors[tokens[length - 1 :]]

    def search(self, stream: ShardStream, begin: int, end: int) -> None:
        """Marks the windows with an anchor that occurs at one of the places begin..end-1 of a training stream."""
        first, last = begin - ANCHOR, end + WINDOW
        block = np.pad(
            stream.read(max(first, 0), min(last, len(stream))),
            (max(-first, 0), max(last - len(stream), 0)),
            constant_values=BOS,
        )
        hashes = self.hashes(block[ANCHOR:], ANCHOR)[: end - begin]
        index = hashes >> self.shift
        bits = self.table[index >> np.uint64(3)] >> (index & np.uint64(7)).astype(np.uint8) & 1
        candidates = np.flatnonzero(bits)
        self.compare(block, candidates + ANCHOR, hashes[candidates])

    def compare(self, block: np.ndarray, places: np.ndarray, hashes: np.ndarray) -> None:
        """Marks the windows that equal one of the block's around these places, whose anchors have these hashes."""
        left, right = (np.searchsorted(self.anchors, hashes, side) for side in ("left", "right"))
        hit = left < right
        if not hit.any():
            return
        back = np.arange(WINDOW - ANCHOR + 1)
        theirs = np.unique(places[hit, None] - back)
        values, first = np.unique(self.hashes(block, WINDOW)[theirs], return_index=True)
        theirs = theirs[first]
        groups, which = np.unique(left[hit], return_index=True)
        anchors = self.places[ranges(groups, (right - left)[hit][which])]
        powers = HASH_FACTOR ** np.arange(WINDOW - 1, -1, -1, dtype=np.uint64)
        width = np.arange(WINDOW)
        for some in np.array_split(anchors, -(-len(anchors) // 1024)):  # bounds the memory
            ours = np.unique(some[:, None] - back)
            ours = ours[~self.shared[ours]]
            text = self.tokens[ours[:, None] + width]  # [n, WINDOW]
            value = (self.factors[text] * powers).sum(1)
            match = theirs[np.minimum(np.searchsorted(values, value), len(values) - 1)]
            same = (block[match[:, None] + width] == text).all(1) & (text != BOS).all(1)
            self.shared[ours[same]] = True

    def row(self) -> dict[str, int]:
        """The audit's `windows`, from what has been marked so far."""
        shared = np.flatnonzero(self.shared)
        documents = np.unique(np.searchsorted(self.begins, shared))
        return {"length": WINDOW, "of": self.windows, "shared": len(shared), "documents": len(documents)}


# ---------------------------------------------------------------------------------------------------------- the audit


@dataclasses.dataclass(frozen=True)
class Search:
    """One training shard's part of an audit."""

    sha256: str
    copies: list[list[int]]  # for each training document that is a copy: the validation documents it equals


def search_shard(
    stream: ShardStream, number: int, documents: DocumentIndex, windows: WindowIndex, stop: threading.Event
) -> Search:
    """Reads a training shard once, until `stop` is set. A document belongs to the shard in which it begins."""
    shard, start = stream.shards[number], int(stream.starts[number])
    begins = []
    with open(stream.paths[number], "rb") as file:
        digest = hashlib.sha256(file.read(HEADER_BYTES))
    for offset in range(0, len(shard), BLOCK):
        if stop.is_set():
            break
        block = stream.slice(number, offset, offset + BLOCK)
        digest.update(block.data)
        begins.append(start + offset + np.flatnonzero(block == BOS))
        windows.search(stream, start + offset, start + offset + len(block))
    offsets = np.concatenate((*begins, [stream.next_document(start + len(shard))])).astype(np.int64)
    return Search(digest.hexdigest(), documents.copies(stream, offsets))


def audit_shards(
    training: Sequence[Path],
    validation: Sequence[Path],
    sidecars: Sequence[Path] = (),
    threads: int = 1,
    progress: Callable[[int], None] = lambda count: None,
) -> dict:
    """The audit of these shards, as manifest.json holds it. sidecars: byte counts of the validation shards.

    progress: called with bytes of training shards that are done. Raises PrepareError for a file that is no shard.
    """
    held_out, trained = ShardStream(validation), ShardStream(training)
    documents, windows = DocumentIndex(held_out), WindowIndex(held_out)
    stop = threading.Event()  # ends the threads within a block, not at the end of a shard, after a Ctrl-C
    searches = []
    with ThreadPoolExecutor(threads) as pool:
        jobs = [
            pool.submit(search_shard, trained, number, documents, windows, stop) for number in range(len(trained.paths))
        ]
        try:
            for job, shard in zip(jobs, trained.shards, strict=True):
                searches.append(job.result())
                progress(2 * len(shard))
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
        read_whole = [*validation, *sidecars]
        digests = dict(zip([path.name for path in read_whole], pool.map(sha256_of, read_whole), strict=True))
    copies = [numbers for search in searches for numbers in search.copies]
    shared = {numbers[0]: len(numbers) for numbers in copies}  # A validation document is in one list, or in none.
    for path, search in zip(training, searches, strict=True):
        digests[path.name] = search.sha256
    return {
        "shared_documents": sum(shared.values()),
        "shared_copies": len(copies),
        "windows": windows.row(),
        "sha256": dict(sorted(digests.items())),
    }


def audit_splits(
    splits: dict[str, dict],
    place: Callable[[str], Path],
    threads: int = 1,
    progress: Callable[[int], None] = lambda count: None,
) -> dict:
    """The audit of the files that a manifest's `splits` list. place: where the file of a name lies.

    Raises PrepareError for a file whose SHA-256 is not the listed one.
    """
    training, validation = splits["train"]["shards"], splits["val"]["shards"]
    sidecars = splits["val"].get("sidecars", [])
    paths = [[place(row["file"]) for row in rows] for rows in (training, validation, sidecars)]
    found = audit_shards(paths[0], paths[1], paths[2], threads, progress)
    for row in (*training, *validation, *sidecars):
        if found["sha256"][row["file"]] != row["sha256"]:
            raise PrepareError(f"{place(row['file'])}: was changed after its SHA-256 was taken")
    return found


def overlap_lines(found: dict) -> list[str]:
    """What an audit found, for people."""
    windows = found["windows"]
    share = windows["shared"] / windows["of"] if windows["of"] else 0.0
    return [
        f"validation documents that are in training too: {found['shared_documents']:,}",
        f"validation windows of {windows['length']} tokens that are in training too: {windows['shared']:,} of "
        f"{windows['of']:,} ({share:.2%}), in {windows['documents']:,} documents",
    ]

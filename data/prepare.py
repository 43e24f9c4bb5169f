"""Turn text into the files that `train_gpt.py` reads: a tokenizer, training and validation shards, and a manifest.

    python data/prepare.py builtin --out data/builtin
    python data/prepare.py books/ more.txt web.jsonl.zst --out data/mine --vocab-size 8192
    python data/prepare.py builtin --out data/builtin_caseops --caseops
    python data/prepare.py docs_selected --out data/fineweb --vocab-size 8192 --caseops
    python data/prepare.py sp8192 --train-shards 10 --out data/sp8192

Two passes over the sources, in memory that does not grow with them. The first checks every byte, counts, and keeps a
sample to train the tokenizer on; the second tokenizes, over all cores, and writes. Everything is written in a
temporary folder inside --out and renamed at the very end, the manifest last, so that a file under its final name is
always whole. The output depends on the texts and the options alone, not on the number of workers.

What the score rests on is proved here for every document before it is written: decoding its tokens gives the text
back, and its tokens' bytes add up to the text's UTF-8 length. A document that fails is left out and counted.

The last command downloads shards that the challenge publishes, and only checks and counts them (published.py). Other
text from the Hugging Face hub (hub.py) is downloaded first and then read like files (sources.py).

With --caseops, tokens stand for the text as caseops.py encodes it, and a sidecar of each validation shard holds every
token's bytes of the original text. All else is about the original: the split, bytes, hashes, reference compressors.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import heapq
import io
import json
import lzma
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import sentencepiece
import zstandard
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Also when this file is imported from elsewhere.
import caseops  # noqa: E402
import corpus  # noqa: E402
import published  # noqa: E402
from errors import PrepareError  # noqa: E402
from sources import CHUNK_BYTES, Sources, Splitter, builtin_packages, cut, is_remote, list_files  # noqa: E402
from sources import package_versions, text_hash  # noqa: E402

FORMAT = 1
SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
PAD, BOS, EOS, UNK = 0, 1, 2, 3
FIXED_PIECES = 4 + 256  # pad, bos, eos, unk, and a piece for each byte
MIN_VOCAB, MAX_VOCAB = 300, 65535
SPACE = "\u2581"  # SentencePiece writes a space as this character
OWN_FILE = re.compile(r"tokenizer\.model|fineweb_(train|val|val_bytes)_\d{6}\.bin")
TEMPORARY = ".prepare-"
DOWNLOADING = ".download"  # in --out: files of an export, kept when a download is broken off
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

SAMPLE_BYTES = 32 << 20  # text that the tokenizer is trained on, at most
TRAINING_LINE_BYTES = 4000  # SentencePiece aborts on words of more than 65,535 characters, so feed it short lines
CHARACTER_COVERAGE = 0.9995  # of the sample; other characters are written as bytes
BATCH_BYTES = 512 << 10  # text that one worker tokenizes at a time
REFERENCE_BYTES = 128 << 20  # xz -9 and zstd -22 run at about 1 MB/s: more text would tell nothing new


class Terminated(BaseException):
    """SIGTERM or Ctrl-C arrived; the argument is the signal's number."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to prepare and how; the fields are the options of the command line."""

    sources: tuple[str, ...]
    out: Path
    vocab_size: int | None = None  # None: 1024, or that of the given tokenizer
    val_fraction: float = 0.05
    shard_tokens: int = 100_000_000
    workers: int = 1
    tokenizer: Path | None = None
    seed: int = 0
    max_document_bytes: int = 32 << 10
    text_field: str = "text"
    caseops: bool = False
    val_documents: int | None = None  # None: the split that the source has, or one by hash
    train_shards: int | None = None  # of a published export; None: all
    repo: str | None = None  # None: the challenge's own
    revision: str | None = None  # None: the main branch
    repo_root: str = published.ROOT
    downloads: Path | None = None  # None: a folder in `out`
    force: bool = False
    quiet: bool = False

    @property
    def downloads_folder(self) -> Path:
        """Where downloaded text is kept."""
        return self.downloads or self.out / "downloads"


# ------------------------------------------------------------------------------------------------------- first pass


@dataclasses.dataclass(frozen=True)
class Survey:
    """What the first pass learns: how much there is, on which side each document goes, and a training sample."""

    documents: int
    bytes: int
    empty: int
    digest: str
    splitter: Splitter
    sample: tuple[str, ...]


def survey(sources: Sources, options: Options) -> Survey:
    """Read everything once. The sample is of the training side only: the documents with the largest hashes."""
    count = size = empty = held = 0
    low, high = 1 << 64, -1
    digest = hashlib.sha256()
    sample: list[tuple[int, str]] = []
    sampled = set()
    for text in sources:
        data = text.encode("utf-8", "surrogatepass")
        number = text_hash(data, options.seed)
        digest.update(number.to_bytes(8, "little"))
        empty += not data
        count += bool(data)
        size += len(data)
        if data and number not in sources.known:
            low, high = min(low, number), max(high, number)
        if options.tokenizer or not data or sources.known.get(number) == "val" or number in sampled:
            continue
        heapq.heappush(sample, (number, text))
        sampled.add(number)
        held += len(data)
        while held > SAMPLE_BYTES and len(sample) > 1:
            number, text = heapq.heappop(sample)
            sampled.discard(number)
            held -= len(text.encode("utf-8", "surrogatepass"))
    if not count:
        raise PrepareError(f"{' '.join(options.sources)}: there is no text in it")
    threshold = _threshold(sources.val_fraction, low, high, set(sources.known.values()))
    splitter = Splitter(threshold, sources.known)
    sample = sorted(item for item in sample if splitter.side(item[0]) == "train")
    return Survey(count, size, empty, digest.hexdigest(), splitter, tuple(text for _, text in sample))


def _threshold(fraction: float, low: int, high: int, known_sides: set[str]) -> int:
    """The hash below which a document validates, moved where needed so that neither side is empty."""
    threshold = math.floor(fraction * 2**64)
    if "val" not in known_sides:
        threshold = max(threshold, low + 1)
    if "train" not in known_sides:
        threshold = min(threshold, high)
    if not ("val" in known_sides or low < threshold) or not ("train" in known_sides or high >= threshold):
        raise PrepareError("there is only one distinct document, or one group of look-alikes; training and validation "
                           "need one each (a smaller --max-document-bytes cuts a .txt file into more)")
    return threshold


# -------------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(sample: Iterable[str], vocab_size: int, with_caseops: bool = False) -> tuple[bytes, dict]:
    """Train SentencePiece BPE on texts. Returns the model file's bytes and the options that made it."""
    symbols = list(caseops.OPERATORS.values()) if with_caseops else []
    lines = []
    for text in sample:
        data = (caseops.encode(text) if with_caseops else text).encode("utf-8", "ignore")
        while data:
            end = len(data) if len(data) <= TRAINING_LINE_BYTES else cut(data, TRAINING_LINE_BYTES)
            lines.append(data[:end].decode("utf-8"))
            data = data[end:]
    rare = _rare_characters(lines, (vocab_size - FIXED_PIECES - len(symbols)) * 3 // 4, symbols)
    lines = [line for line in (line.translate(rare) for line in lines) if line.strip("\r\n")]
    if not lines:
        raise PrepareError("the training text holds no words to train a tokenizer on; give more text")
    options = {
        "model_type": "bpe", "vocab_size": vocab_size, "pad_id": PAD, "bos_id": BOS, "eos_id": EOS, "unk_id": UNK,
        "byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False, "add_dummy_prefix": True, "character_coverage": 1.0,
        "max_sentence_length": 2 * TRAINING_LINE_BYTES, "num_threads": 4,
    } | ({"user_defined_symbols": symbols} if symbols else {})
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, minloglevel=3, **options
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from None
    sample_bytes = sum(len(text.encode("utf-8", "ignore")) for text in sample)
    sizes = {"sample_documents": len(sample), "sample_bytes": sample_bytes}
    return model.getvalue(), {**options, **sizes, "removed_characters": len(rare)}


def _rare_characters(lines: list[str], most: int, symbols: Iterable[str]) -> dict[int, None]:
    """A table for `str.translate` that removes the characters which get no piece; `symbols` have theirs anyway.

    SentencePiece's own way (`character_coverage`) goes down to 0.98 only, where a text with thousands of characters
    does not fit a small vocabulary. It also skips every line that holds one of three characters that it uses itself.
    """
    counts = Counter()
    for line in lines:
        counts.update(line)
    for symbol in symbols:
        counts.pop(symbol, None)
    reserved = {"\0", SPACE, "\u2585"}
    wanted, covered, kept = CHARACTER_COVERAGE * sum(counts.values()), 0, {" "}
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= wanted or len(kept) >= most:
            break
        covered += count
        if character not in reserved:
            kept.add(character)
    return {ord(character): None for character in counts if character not in kept}


def _training_error(message: str, vocab_size: int) -> PrepareError:
    largest = re.search(r"value <= (\d+)", message)
    if largest:
        return PrepareError(f"--vocab-size {vocab_size}: the training text supports at most {largest[1]}")
    return PrepareError(f"--vocab-size {vocab_size}: SentencePiece refused: {' '.join(message.split())}")


class Codec:
    """A tokenizer with what the score's arithmetic needs: exact encoding, and the bytes of every token."""

    def __init__(self, model: bytes, name: str = "tokenizer", with_caseops: bool = False):
        """Check the model's ids and pieces. Raises PrepareError, naming `name`, if the score would not be exact."""
        try:
            self.processor = sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError, ValueError):
            raise PrepareError(f"{name}: not a SentencePiece model") from None
        self.vocab_size = sp.vocab_size()
        if self.vocab_size > MAX_VOCAB:
            raise PrepareError(f"{name}: {self.vocab_size} pieces; at most {MAX_VOCAB} fit the shards' format")
        ids = (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id())
        if ids != (PAD, BOS, EOS, UNK):
            raise PrepareError(f"{name}: pad, bos, eos, unk have the ids {ids}; they must have {(PAD, BOS, EOS, UNK)}")
        pieces = [sp.id_to_piece(number) for number in range(self.vocab_size)]
        self.byte_ids = [sp.piece_to_id(f"<0x{value:02X}>") for value in range(256)]
        if not all(sp.is_byte(number) for number in self.byte_ids):
            raise PrepareError(f"{name}: it lacks byte pieces (byte_fallback)")
        # Byte pieces stand for 1 byte, control, unknown and unused pieces for 0, others for their text. The space in
        # front counts apart: it is a byte unless a piece of 0 bytes stands before it (SentencePiece puts a space
        # before each text). A space anywhere else would be counted as the three bytes of U+2581.
        self.silent = np.array([
            sp.is_control(n) or sp.is_unknown(n) or sp.is_unused(n) for n in range(self.vocab_size)
        ])
        is_byte = np.array([sp.is_byte(n) for n in range(self.vocab_size)])
        spaced = np.array([piece.startswith(SPACE) for piece in pieces])
        lengths = np.array([len(piece.removeprefix(SPACE).encode()) for piece in pieces])
        self.base_bytes = np.where(self.silent, 0, np.where(is_byte, 1, lengths))
        self.leading_space = spaced & ~self.silent & ~is_byte
        for piece, plain in zip(pieces, ~self.silent & ~is_byte, strict=True):
            if plain and SPACE in piece[1:]:
                raise PrepareError(f"{name}: piece {piece!r} has a space that is not in front; bytes can't be counted")
        self.alphabet = frozenset("".join(pieces))
        self.operators = self._operators(pieces, name) if with_caseops else None

    def _operators(self, pieces: list[str], name: str) -> dict[str, int]:
        """The ids of CaseOps' operators. No other piece may hold one: then each is always a token of its own."""
        ids = {}
        for operator, symbol in caseops.OPERATORS.items():
            ids[operator] = self.processor.piece_to_id(symbol)
            if [piece for piece in pieces if symbol in piece] != [symbol] or self.silent[ids[operator]]:
                raise PrepareError(f"{name}: --caseops needs the user-defined symbol U+{ord(symbol):04X} ({operator}), "
                                   "in no other piece")
        return ids

    def token_bytes(self, ids: np.ndarray) -> np.ndarray:
        """[n] UTF-8 bytes of the text that each token stands for; the first id has nothing before it."""
        after_silent = np.concatenate([[True], self.silent[ids[:-1]]])
        widths = self.base_bytes[ids] + (self.leading_space[ids] & ~after_silent)
        return caseops.original_bytes(ids, widths, self.operators) if self.operators else widths

    def encode(self, document: str) -> np.ndarray | None:
        """BOS and the tokens of a document as uint16, or None if they don't stand for exactly this text."""
        try:
            size = len(document.encode())
        except UnicodeEncodeError:  # An unpaired surrogate, which JSON can spell and UTF-8 can't.
            return None
        text = caseops.encode(document) if self.operators else document
        stand_in = self._absent_character(text) if SPACE in text else ""
        if stand_in is None:
            return None
        tokens = self.processor.encode(text.replace(SPACE, stand_in) if stand_in else text)
        ids = np.array([BOS, *tokens], np.uint16)
        if stand_in:
            # Text's own U+2581 looks like a space to SentencePiece. Write it as its three bytes instead: encode a
            # character that only bytes can express, and put those of U+2581 in the place of its bytes.
            old, new = ([self.byte_ids[byte] for byte in c.encode()] for c in (stand_in, SPACE))
            at = np.flatnonzero((ids[:-2] == old[0]) & (ids[1:-1] == old[1]) & (ids[2:] == old[2]))
            for offset, number in enumerate(new):
                ids[at + offset] = number
        exact = self.processor.decode(ids[1:].tolist()) == text and self.token_bytes(ids).sum() == size
        if self.operators:
            exact = exact and caseops.decode(text) == document
        return ids if exact else None

    def _absent_character(self, text: str) -> str | None:
        """A character of three bytes that neither the text nor any piece holds; private use first."""
        present = self.alphabet.union(text)
        for number in (*range(0xE000, 0x10000), *range(0x0800, 0xD800)):
            if chr(number) not in present:
                return chr(number)
        return None


@functools.lru_cache(maxsize=2)
def _codec(path: str, sha256: str, with_caseops: bool) -> Codec:
    return Codec(Path(path).read_bytes(), path, with_caseops)


def tokenize(path: str, sha256: str, with_caseops: bool, texts: list[str]) -> list[np.ndarray | None]:
    """`Codec.encode` of each text, in a worker process that loads the model once. None for a document to drop."""
    codec = _codec(path, sha256, with_caseops)
    return [codec.encode(text) for text in texts]


# ----------------------------------------------------------------------------------------------------------- shards


class ShardWriter:
    """Writes one side's documents, each whole, into files of at most `shard_tokens` tokens.

    Only a document that alone has more makes a longer file. A writer of sidecars gets each token's bytes in the
    place of the token, and so parts its files where the tokens' are parted.
    """

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.shards: list[dict] = []
        self.text = hashlib.sha256()
        self.file = None

    def add(self, ids: np.ndarray, data: bytes) -> None:
        """Append a document's tokens; `data` is its text."""
        if self.file and self.shards[-1]["tokens"] + len(ids) > self.shard_tokens:
            self.close()
        if not self.file:
            name = f"fineweb_{self.split}_{len(self.shards):06d}.bin"
            self.shards.append({"file": name, "tokens": 0, "documents": 0, "bytes": 0})
            self.file = open(self.folder / name, "w+b")
            self.file.write(bytes(4 * HEADER_INTS))
        self.file.write(ids.astype("<u2").tobytes())
        self.text.update(data)
        shard = self.shards[-1]
        shard["tokens"] += len(ids)
        shard["documents"] += 1
        shard["bytes"] += len(data)

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
            os.fsync(file.fileno())

    def summary(self) -> dict:
        """This side's entry in the manifest."""
        totals = {key: sum(shard[key] for shard in self.shards) for key in ("documents", "tokens", "bytes")}
        return {**totals, "text_sha256": self.text.hexdigest(), "shards": self.shards}


def write_shards(
    sources: Sources, found: Survey, model: Path, folder: Path, options: Options, progress: Callable[[int], None]
) -> tuple[dict[str, dict], int]:
    """The second pass. Returns the manifest's `splits` and the number of dropped documents."""
    names = ("train", "val", "val_bytes") if options.caseops else ("train", "val")
    writers = {name: ShardWriter(folder, name, options.shard_tokens) for name in names}
    sent: deque[list[str]] = deque()
    digest, dropped = hashlib.sha256(), 0

    def batches() -> Iterator[list[str]]:
        for batch in in_batches(sources):
            sent.append(batch)
            yield [text for text in batch if text]

    codec_key = str(model), hashlib.sha256(model.read_bytes()).hexdigest(), options.caseops
    job = functools.partial(tokenize, *codec_key)
    workers = min(options.workers, -(-found.bytes // BATCH_BYTES))
    with contextlib.ExitStack() as stack:
        for writer in writers.values():
            stack.callback(writer.close)
        validation = stack.enter_context(open(folder / "validation", "wb"))
        for results in corpus.map_in_order(job, batches(), workers):
            remaining = iter(results)
            for text in sent.popleft():
                data = text.encode("utf-8", "surrogatepass")
                number = text_hash(data, options.seed)
                digest.update(number.to_bytes(8, "little"))
                ids = next(remaining) if data else None
                if ids is None:
                    dropped += bool(data)
                    continue
                side = found.splitter.side(number)
                writers[side].add(ids, data)
                if side == "val":
                    validation.write(data)
                    if options.caseops:
                        writers["val_bytes"].add(_codec(*codec_key).token_bytes(ids), data)
                progress(len(data))
    if digest.hexdigest() != found.digest:
        raise PrepareError(f"{' '.join(options.sources)}: the text changed while it was being read")
    splits = {name: writer.summary() for name, writer in writers.items()}
    if options.caseops:
        splits["val"]["sidecars"] = splits.pop("val_bytes")["shards"]
    return splits, dropped


def in_batches(texts: Iterable[str], size: int = BATCH_BYTES) -> Iterator[list[str]]:
    """Texts in lists of about `size` characters, so that a worker's job outweighs its hand-over."""
    batch, held = [], 0
    for text in texts:
        batch.append(text)
        held += len(text)
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def read_shard(path: Path) -> np.ndarray:
    """The uint16 tokens of a shard; ValueError if its header and its size disagree."""
    data = path.read_bytes()
    header = np.frombuffer(data[: 4 * HEADER_INTS], "<i4")
    if len(header) < HEADER_INTS or tuple(header[:2]) != (SHARD_MAGIC, SHARD_VERSION):
        raise ValueError(f"{path}: not a shard")
    tokens = np.frombuffer(data[4 * HEADER_INTS :], "<u2")
    if len(tokens) != header[2]:
        raise ValueError(f"{path}: {len(tokens)} tokens, {header[2]} in its header")
    return tokens


def reference_compressors(path: Path) -> dict[str, float]:
    """Bits per byte of general compressors on the file's first 128 MiB: what any language model should beat."""
    size = min(path.stat().st_size, REFERENCE_BYTES)
    stop = threading.Event()  # Lets a Ctrl-C end the threads within a chunk, not at the end of the text.
    compressors = {
        "xz -9": lzma.LZMACompressor(preset=9),
        "zstd -22": zstandard.ZstdCompressor(level=22).compressobj(size=size),
    }

    def bits_per_byte(compressor) -> float:
        packed, left = 0, size
        with open(path, "rb") as file:
            while left and not stop.is_set():
                chunk = file.read(min(left, CHUNK_BYTES))
                left -= len(chunk)
                packed += len(compressor.compress(chunk))
        return round(8 * (packed + (0 if stop.is_set() else len(compressor.flush()))) / size, 4)

    with ThreadPoolExecutor(len(compressors)) as pool:
        try:
            return dict(zip(compressors, pool.map(bits_per_byte, compressors.values()), strict=True))
        except BaseException:
            stop.set()
            raise


# ------------------------------------------------------------------------------------------- manifest and final names


def fingerprint(options: Options, listed: list[tuple[str, Path | None]]) -> str:
    """Equal for two runs that would write the same: options, and for each source what tells that it changed."""
    parts = [FORMAT, recorded_options(options)]
    modules = (__file__, caseops.__file__, corpus.__file__, sys.modules[Sources.__module__].__file__)
    for name, path in listed:
        if is_remote(name):
            parts.append([name])  # With its repository and revision in the options; the hub is not asked again.
        elif path is None:
            code = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in modules]
            parts.append([name, package_versions(builtin_packages(name)), code])
        else:
            status = path.stat()
            parts.append([os.path.abspath(path), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def recorded_options(options: Options) -> dict:
    """The options that change the output, as the manifest holds them."""
    tokenizer = hashlib.sha256(options.tokenizer.read_bytes()).hexdigest() if options.tokenizer else None
    return {
        "vocab_size": options.vocab_size, "val_fraction": options.val_fraction, "shard_tokens": options.shard_tokens,
        "tokenizer_sha256": tokenizer, "seed": options.seed, "max_document_bytes": options.max_document_bytes,
        "text_field": options.text_field, "caseops": options.caseops, "val_documents": options.val_documents,
        "train_shards": options.train_shards, "repo": options.repo, "revision": options.revision,
        "repo_root": options.repo_root,
    }


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a folder, or None if it has none. Raises PrepareError if it is not one of ours."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes())
        if manifest["format"] != FORMAT or not {"options", "fingerprint"} <= set(manifest):
            raise ValueError("another format")
        manifest_files(manifest)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PrepareError(f"{path}: not a manifest of this program; choose another --out") from None
    return manifest


def manifest_files(manifest: dict) -> dict[str, int]:
    """The files that a manifest lists, with their sizes in bytes."""
    files = {manifest["tokenizer"]["file"]: manifest["tokenizer"]["bytes"]}
    for split in manifest["splits"].values():
        for shard in (*split["shards"], *split.get("sidecars", ())):
            files[shard["file"]] = 4 * HEADER_INTS + 2 * shard["tokens"]
    if not all(OWN_FILE.fullmatch(name) for name in files):
        raise ValueError("a file that is not ours")
    return files


def check_folder(options: Options, mark: str) -> dict | None:
    """The manifest if --out already holds this very preparation, None if it may be (over)written; else an error."""
    out = options.out
    manifest = read_manifest(out)
    own = manifest_files(manifest) if manifest else {}
    for path in sorted(out.iterdir()):
        if OWN_FILE.fullmatch(path.name) and path.name not in own:
            raise PrepareError(f"{path}: in the way, and no manifest says that this program made it; "
                               "move it or choose another --out")
    if manifest is None:
        return None
    if manifest["fingerprint"] == mark:
        present = all((out / name).is_file() and (out / name).stat().st_size == size for name, size in own.items())
        return None if options.force or not present else manifest
    if not options.force and not (published.variant_of(options.sources) and published.grows(manifest, options)):
        recorded = recorded_options(options)
        other = [f"{key} {manifest['options'].get(key)} there, {value} asked"
                 for key, value in recorded.items() if manifest["options"].get(key) != value]
        raise PrepareError(f"--out {out}: holds other data ({'; '.join(other) or 'other or changed sources'}); "
                           "choose another folder, or --force replaces it")
    return None


def commit(temporary: Path, out: Path) -> None:
    """Give the finished files their names, the manifest last.

    It can be repeated from any point: a run that was killed while renaming is completed by the next one, as the
    temporary folder with its manifest stays until the end.
    """
    manifest = read_manifest(temporary)
    if (out / "manifest.json").exists():
        os.replace(out / "manifest.json", temporary / "previous.json")
    if (temporary / "previous.json").exists():
        previous = json.loads((temporary / "previous.json").read_bytes())
        for name in set(manifest_files(previous)) - set(manifest_files(manifest)):
            (out / name).unlink(missing_ok=True)
    for name in (*manifest_files(manifest), "manifest.json"):
        if (temporary / name).exists():
            os.replace(temporary / name, out / name)
    shutil.rmtree(temporary)


@contextlib.contextmanager
def output_folder(out: Path) -> Iterator[None]:
    """Make --out and hold it for this process alone; after a failure nothing of ours is left, not even the folder."""
    made = [path for path in (out, *out.parents) if not path.exists()]
    descriptor = None
    try:
        if out.exists() and not out.is_dir():
            raise PrepareError(f"--out {out}: a file, not a folder")
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrepareError(f"--out {out}: another run of this program is writing there") from None
        for stale in sorted(out.glob(TEMPORARY + "*")):  # Left by a run that was killed, as we hold the lock.
            if (stale / "manifest.json").exists():
                commit(stale, out)
            else:
                shutil.rmtree(stale)
        yield
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()  # Succeeds for empty folders only.
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def no_interruption() -> Iterator[None]:
    """Be deaf to Ctrl-C and SIGTERM for the moment that it takes to rename the files: then all is done anyway."""
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS} if main else {}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------ all together


def prepare(options: Options) -> tuple[dict, bool]:
    """Prepare the sources as the options say. Returns the manifest, and whether it was there already.

    Raises PrepareError for what a user can mend and OSError where the disk refuses; then nothing is left behind.
    """
    options, given = _complete(options)
    listed = list_files(options.sources)
    mark = fingerprint(options, listed)
    with output_folder(options.out):
        manifest = check_folder(options, mark)
        if manifest:
            return manifest, True
        if published.variant_of(options.sources):
            return _download(options, mark), False
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=options.out))
        try:
            manifest = _fill(temporary, options, given, mark)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        with no_interruption():
            commit(temporary, options.out)
    return manifest, False


def _complete(options: Options) -> tuple[Options, bytes | None]:
    """Check the options that need checking together; read a given tokenizer."""
    if name := published.variant_of(options.sources):
        published.check_options(options)
        variant = published.VARIANTS[name]
        return dataclasses.replace(options, vocab_size=variant.vocab_size, caseops=variant.caseops), None
    if options.train_shards:
        raise PrepareError(f"--train-shards {options.train_shards}: is for {', '.join(published.VARIANTS)}")
    if not options.tokenizer:
        return dataclasses.replace(options, vocab_size=options.vocab_size or 1024), None
    try:
        model = options.tokenizer.read_bytes()
    except OSError as error:
        raise PrepareError(f"--tokenizer {options.tokenizer}: {error.strerror}") from None
    size = Codec(model, f"--tokenizer {options.tokenizer}", options.caseops).vocab_size
    if options.vocab_size not in (None, size):
        raise PrepareError(f"--vocab-size {options.vocab_size}: --tokenizer {options.tokenizer} has {size} pieces")
    return dataclasses.replace(options, vocab_size=size), model


def _download(options: Options, mark: str) -> dict:
    """Fetch a published export into --out, with a manifest like that of a preparation; returns it."""
    report, folder = Report(options.quiet), options.out / DOWNLOADING
    before, folder_is_ready = read_manifest(options.out), options.out / f"{TEMPORARY}download"
    folder.mkdir(exist_ok=True)
    extends = before and not options.force and published.grows(before, options)
    pinned = before["source"][0]["commit"] if extends else None  # What is added must fit what is there.
    fetched = published.download(options, folder, pinned, report.bar)
    model = fetched.paths[published.TOKENIZER].read_bytes()
    codec = Codec(model, fetched.export.tokenizer.path, options.caseops)
    if codec.vocab_size != options.vocab_size:
        raise PrepareError(f"{fetched.export.tokenizer.path}: {codec.vocab_size} pieces, not {options.vocab_size}")
    splits = published.measure(fetched, codec, report.bar)
    manifest = _manifest(options, mark, [fetched.described], model, {"given": True}, splits)
    _write(folder / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    with no_interruption():
        os.replace(folder, folder_is_ready)  # From here on the next run completes it, should this one be killed.
        commit(folder_is_ready, options.out)
    return manifest


def _manifest(options: Options, mark: str, source: list[dict], model: bytes, training: dict, splits: dict) -> dict:
    """What every manifest holds. training: the options that made the tokenizer `model`."""
    return {
        "format": FORMAT,
        "source": source,
        "created_with": {"prepare": FORMAT, **package_versions(["python", "sentencepiece", "numpy", "zstandard"])},
        "options": recorded_options(options),
        "tokenizer": {
            "file": published.TOKENIZER, "bytes": len(model), "sha256": hashlib.sha256(model).hexdigest(),
            "vocab_size": options.vocab_size, "options": training,
        },
        "splits": splits,
        "fingerprint": mark,
    }


def _fill(temporary: Path, options: Options, model: bytes | None, mark: str) -> dict:
    """Write all files of a preparation into a folder; the manifest last."""
    report = Report(options.quiet)
    report.say("reading " + " ".join(options.sources))
    sources = Sources(options, report)
    found = survey(sources, options)
    training: dict = {"given": True}
    if model is None:
        report.say(f"training a tokenizer of {options.vocab_size} pieces on {len(found.sample)} documents")
        model, training = train_tokenizer(found.sample, options.vocab_size, options.caseops)
        Codec(model, "the trained tokenizer", options.caseops)
    path = temporary / published.TOKENIZER
    _write(path, model)
    with report.bar("tokenizing", found.bytes) as progress:
        splits, dropped = write_shards(sources, found, path, temporary, options, progress)
    for split, summary in splits.items():
        if not summary["documents"]:
            raise PrepareError(f"no {split} document is left ({dropped} of {found.documents} documents dropped because "
                               "decoding does not give them back); give more text or another --tokenizer")
    report.say("compressing the validation text with xz -9 and zstd -22")
    reference = reference_compressors(temporary / "validation")
    (temporary / "validation").unlink()
    manifest = {
        **_manifest(options, mark, sources.described, model, training, splits),
        "dropped_documents": dropped,
        "empty_documents": found.empty,
        "duplicates_of_validation": sources.duplicates,
        "reference_compressors": reference,
        "reference_bytes": min(splits["val"]["bytes"], REFERENCE_BYTES),
    }
    _write(temporary / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    return manifest


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


class Report:
    """What a user sees on stderr: a bar on a terminal, a line now and then elsewhere, nothing when quiet."""

    def __init__(self, quiet: bool):
        self.quiet = quiet

    def say(self, text: str) -> None:
        """One line about what begins now."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def bar(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """A function to call with each number of bytes done."""
        if sys.stderr.isatty() and not self.quiet:
            with tqdm(total=total, desc=label, unit="B", unit_scale=True, file=sys.stderr) as bar:
                yield bar.update
            return
        done, said = 0, time.monotonic()

        def update(count: int) -> None:
            nonlocal done, said
            done += count
            if time.monotonic() - said > 10:
                said = time.monotonic()
                self.say(f"{label}: {100 * done / total:.0f}% of {total / 1e6:.1f} MB")

        self.say(f"{label} {total / 1e6:.1f} MB")
        yield update


# ----------------------------------------------------------------------------------------------------- command line


EPILOG = """\
A .txt file is one document, or is cut at blank lines if it is longer than --max-document-bytes; a line of a .jsonl,
.jsonl.zst or .jsonl.gz file is one, and so is a row of a .parquet file. `builtin` is the documentation inside Python,
torch, numpy, sympy and networkx, about 16 MB; `builtin:networkx,numpy` takes some of them. Folders are searched with
all that is in them, in sorted order.
hf:OWNER/NAME[:CONFIG][@SPLIT] is a dataset of the Hugging Face hub, docs_selected the challenge's list of documents.
sp1024, sp8192 and sp8192-caseops are the challenge's own shards with their tokenizer: no text is read, and the options
for text don't apply. HF_ENDPOINT and HF_TOKEN work as ever; what is downloaded stays, and a broken download goes on.
A document validates by a hash of its text, so equal documents are on one side. Files keep their order; builtin is
shuffled. Of docs_selected.jsonl the first 50,000 documents validate, and no copy of them trains.

exit codes: 0 done, or done before with the same options; 2 something to mend, said in one line on stderr;
130 or 143 interrupted. After 2, 130 and 143 nothing is left in --out but downloads."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line instead of argparse's usage and line."""
        raise PrepareError(message)


def _number(kind: type, low: float, high: float, text: str, open_: bool = False):
    """An argparse type: a number from `low` to `high`, without the ends if `open_`."""
    wanted = f"{'between' if open_ else 'from'} {low:,} {'and' if open_ else 'to'} {high:,}"
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not (low < value < high if open_ else low <= value <= high):
        raise argparse.ArgumentTypeError(f"{text}: allowed is {'a whole' if kind is int else 'a'} number {wanted}")
    return value


def parse_arguments(arguments: list[str]) -> Options:
    """Options from the command line. Raises PrepareError."""

    def whole(low: int, high: int) -> Callable:
        return functools.partial(_number, int, low, high)

    parser = _Parser(
        prog="prepare.py", description=__doc__.split("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
        epilog=EPILOG,
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE",
        help="`builtin`, a .txt, .jsonl, .jsonl.zst, .jsonl.gz or .parquet file, a folder, hf:OWNER/NAME, "
             "docs_selected, or sp1024, sp8192, sp8192-caseops")
    add("--out", required=True, type=Path, metavar="DIR", help="folder to write tokenizer, shards and manifest.json in")
    add("--vocab-size", type=whole(MIN_VOCAB, MAX_VOCAB), metavar="N", help="pieces of the tokenizer (default: 1024)")
    add("--val-fraction", type=lambda text: _number(float, 0, 1, text, True), default=0.05, metavar="F",
        help="share of the documents that validates (default: %(default)s)")
    add("--val-documents", type=whole(1, 2**62), metavar="N",
        help="the first N documents validate, and no others (default: 50000 of docs_selected.jsonl, else by hash)")
    add("--shard-tokens", type=whole(1, 1_000_000_000), default=100_000_000, metavar="N",
        help="most tokens in a shard, unless one document has more (default: %(default)s)")
    add("--workers", type=whole(1, 1024), default=cores, metavar="N",
        help="processes (default: one per core, %(default)s)")
    add("--tokenizer", type=Path, metavar="FILE", help="a SentencePiece model to use instead of training one")
    add("--seed", type=whole(0, 2**63 - 1), default=0, metavar="N", help="of the split and shuffle (default: 0)")
    add("--max-document-bytes", type=whole(64, 1 << 30), default=32 << 10, metavar="N",
        help="cut .txt files that are longer (default: %(default)s)")
    add("--text-field", default="text", metavar="NAME",
        help="the field or column that holds the text of .jsonl and .parquet (default: %(default)s)")
    add("--caseops", action="store_true",
        help="write capitals as operators before small letters (caseops.py), and each validation token's original "
             "bytes as fineweb_val_bytes_*.bin")
    add("--train-shards", type=whole(1, 10**6), metavar="N",
        help="of sp1024, sp8192, sp8192-caseops: the first N training shards (default: all); more can be added later")
    add("--repo", metavar="OWNER/NAME", help="dataset repository of docs_selected, sp1024, sp8192 or sp8192-caseops")
    add("--revision", metavar="REV", help="branch, tag or commit on the hub (default: main)")
    add("--repo-root", default=published.ROOT, metavar="PATH",
        help="folder in that repository that holds manifest.json (default: %(default)s)")
    add("--downloads", type=Path, metavar="DIR",
        help="folder for text from the hub, which stays there (default: downloads in --out)")
    add("--force", action="store_true", help="replace what this program made in DIR with other options")
    add("--quiet", action="store_true", help="no progress on stderr")
    values = vars(parser.parse_intermixed_args(arguments))
    return Options(**{**values, "sources": tuple(values["sources"])})


def summary_lines(manifest: dict, out: Path) -> Iterator[str]:
    """What a run prints on stdout."""
    for split, entry in manifest["splits"].items():
        yield (f"{split}: {entry['documents']:,} documents, {entry['tokens']:,} tokens, {entry['bytes']:,} bytes, "
               f"{len(entry['shards'])} shard(s)")
    if manifest.get("duplicates_of_validation"):
        yield f"left out of training: {manifest['duplicates_of_validation']:,} documents that validate"
    if manifest.get("dropped_documents"):
        yield f"dropped: {manifest['dropped_documents']:,} documents that decoding does not give back"
    if "reference_compressors" in manifest:
        reference = ", ".join(f"{name} {value:.3f}" for name, value in manifest["reference_compressors"].items())
        yield f"bits per byte of the validation text: {reference}"
    yield f"written: {out / 'manifest.json'}"
    knobs = f"DATA_PATH={out} VOCAB_SIZE={manifest['tokenizer']['vocab_size']}"
    knobs += " CASEOPS_ENABLED=1" if manifest["options"]["caseops"] else ""
    yield f"train on it: {knobs} python train_gpt.py"


def _on_signal(number: int, frame: object) -> None:
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # The clean-up is short; let a second Ctrl-C not break it.
    raise Terminated(number)


def _disk_error(error: OSError, out: Path) -> str:
    """One line for what the disk refused: a file to read, or (also where the error names none) --out."""
    path = Path(os.path.abspath(error.filename or out))
    folder = Path(os.path.abspath(out))
    if path.is_relative_to(folder) or folder.is_relative_to(path):
        return f"--out {out}: {error.strerror}; it must be a folder that may be written to, with room"
    return f"{error.filename}: {error.strerror}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    kept = "nothing was written"
    try:
        for number in SIGNALS:
            signal.signal(number, _on_signal)
        options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        if any(map(is_remote, options.sources)):
            kept = "what was downloaded is kept, the same command goes on"
        manifest, before = prepare(options)
    except PrepareError as error:
        message, code = str(error), 2
    except OSError as error:
        message, code = _disk_error(error, options.out), 2
    except BrokenProcessPool:
        message, code = "a worker process was killed, perhaps for want of memory; try fewer --workers", 2
    except Terminated as error:
        message, code = f"interrupted; {kept}", 128 + error.args[0]
    else:
        if before:
            print("already prepared")
        print("\n".join(summary_lines(manifest, options.out)))
        return 0
    print("prepare.py: error: " + " ".join(message.split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

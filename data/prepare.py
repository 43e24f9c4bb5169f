"""Turn text into the files that `train_gpt.py` reads: a tokenizer, training and validation shards, and a manifest.

    python data/prepare.py builtin --out data/builtin
    python data/prepare.py books/ more.txt web.jsonl.zst --out data/mine --vocab-size 8192
    python data/prepare.py builtin --out data/builtin_caseops --caseops
    python data/prepare.py docs_selected --out data/fineweb --vocab-size 8192 --caseops
    python data/prepare.py sp8192 --train-shards 10 --out data/sp8192

The sources are read twice, in memory that does not grow with them. The first pass checks every byte, counts, and keeps
a sample to train the tokenizer on (tokenizer.py). The second tokenizes on all cores and writes shards (shards.py). Then
the shards are audited: audit.py looks for validation text in training, and the manifest holds what it found. The audit
keeps the validation tokens in memory.

All files are written in a folder inside --out and renamed at the very end, the manifest last. So a file under its final
name is always complete. When a run is killed, that folder keeps what is finished: the sample, the tokenizer, and all
shards but the last. The same command continues from there. The output depends on the texts and the options alone. It
does not depend on the number of workers, or on how often a run was killed.

Before a document is written, it must pass two checks that the score relies on: decoding its tokens gives the text back,
and its tokens' bytes add up to the text's UTF-8 length. A document that fails is left out and counted.

The last command downloads shards that the challenge publishes, then checks, counts and audits them (published.py).
Other text from the Hugging Face hub (hub.py) is downloaded first and then read like files (sources.py).

With --caseops, tokens encode the text as caseops.py writes it, and a sidecar of each validation shard holds the bytes
of original text that each token stands for. Everything else refers to the original text: the split, bytes, hashes and
reference compressors.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() takes it: Ctrl-C while modules load is no traceback

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import heapq
import io
import itertools
import lzma
import math
import os
import re
import shutil
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import cast

try:
    import fcntl
except ModuleNotFoundError as error:  # Windows has no such module
    print(f"error: {error.name}: is missing; this program needs Linux or macOS, and on Windows WSL", file=sys.stderr)
    sys.exit(2)

import numpy as np
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Also when this file is imported from elsewhere.
import audit  # noqa: E402
import caseops  # noqa: E402
import corpus  # noqa: E402
import published  # noqa: E402
import shards  # noqa: E402
from errors import PrepareError  # noqa: E402
from options import AUTO_VOCAB, ROOT, Options  # noqa: E402
from progress import Report  # noqa: E402
from readers import CHUNK_BYTES, PACKED, open_regular, read_small, read_texts  # noqa: E402
from shards import HEADER_BYTES, Document, Shards, write_file  # noqa: E402
from sources import (  # noqa: E402
    Sources,
    Splitter,
    builtin_packages,
    counted,
    is_remote,
    list_files,
    package_versions,
)
from text import cut, from_json, printable, python_command, shell_quoted, text_hash, to_json  # noqa: E402
from tokenizer import (  # noqa: E402
    BOS_TOKEN,
    MAX_VOCAB,
    MIN_VOCAB,
    Codec,
    train_largest,
    train_tokenizer,
)

FORMAT = 1
DEFAULT_VOCAB = 1024
VOCAB_OF_BYTES = ((100_000, 512), (1_000_000, 1024), (4_000_000, 2048))  # below so many bytes of text; 4096 from there
OWN_FILE = re.compile(r"tokenizer\.model|fineweb_(train|val|val_bytes)_\d{6}\.bin")
UNFINISHED = ".prepare-unfinished"  # the folder in --out with what a killed run has finished
DOWNLOADING = ".download"  # the one with files of an export, kept when a download is broken off
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

SAMPLE_DOCUMENT_BYTES = 1 << 20  # of one document, that the tokenizer is trained on, at most
SAMPLE_OVERHEAD = 256  # bytes of memory that a sampled document takes besides its text
BATCH_CHARACTERS = 512 << 10  # of text that one worker tokenizes at a time
SEGMENT_COST = 256  # characters that a segment counts besides its own: a million short ones take memory too
MAX_TOKENIZER_BYTES = 64 << 20
MAX_VALIDATION_BYTES = 1 << 30  # of text: the audit holds the validation tokens in memory, about 2 bytes for each
MAX_VALIDATION_DOCUMENTS = 2_000_000  # and for each document 400 bytes
REFERENCE_BYTES = 16 << 20  # more would take minutes at 3 MB/s, and hundreds of MB of memory


class Worthless(PrepareError):
    """An error that makes what is finished useless too: the same command would fail again."""


class Terminated(BaseException):
    """SIGTERM or Ctrl-C arrived; the argument is the signal's number."""


# ------------------------------------------------------------------------------------------------------- first pass


@dataclasses.dataclass(frozen=True)
class Survey:
    """What the first pass learns: how much there is, and below which hash a document validates."""

    documents: int
    bytes: int
    empty: int
    digest: str  # The chain of the documents' hashes.
    threshold: int


def survey(sources: Sources, options: Options) -> tuple[Survey, list[str]]:
    """Read everything once. Returns what there is, and a sample of the training side to train a tokenizer on."""
    count = size = empty = held_out = 0
    low, high = 1 << 64, -1
    digest = shards.NOTHING
    sample = Sample(0 if options.tokenizer else options.sample_bytes)
    for text in sources:
        data = text.encode("utf-8", "surrogatepass")
        del text  # No part of a large document may stay in memory while the next one is read.
        number = text_hash(data, options.seed)
        digest = shards.link(digest, number.to_bytes(8, "little"))
        empty += not data
        count += bool(data)
        size += len(data)
        held_out += len(data) if sources.known.get(number) == "val" else 0
        if data and number not in sources.known:
            low, high = min(low, number), max(high, number)
        if data and sources.known.get(number) != "val":
            sample.add(number, data)
        del data
    if not count:
        raise PrepareError(f"{' '.join(options.sources)}: there is no text in it")
    _check_validation(options, sources.val_fraction * count, max(held_out, sources.val_fraction * size))
    threshold = _threshold(sources.val_fraction, low, high, set(sources.known.values()))
    splitter = Splitter(threshold, sources.known)
    return Survey(count, size, empty, digest.hex(), threshold), sample.texts(splitter)


def _check_validation(options: Options, documents: float, size: float) -> None:
    """Refuse a validation side that does not fit into memory. Raises PrepareError."""
    over = max(documents / MAX_VALIDATION_DOCUMENTS, size / MAX_VALIDATION_BYTES)
    if over <= 1:
        return
    if options.val_documents:
        option = f"--val-documents {options.val_documents}"
    else:
        option = f"--val-fraction {options.val_fraction}"
    raise PrepareError(
        f"{option}: about {size / 1e9:.1f} GB of text for validation, which the audit holds in memory; at most "
        f"{MAX_VALIDATION_BYTES / 1e9:.1f} GB and {MAX_VALIDATION_DOCUMENTS:,} documents; divide it by {over:.1f}"
    )


class Sample:
    """The documents with the largest hashes that fit into a number of bytes, whatever order they come in.

    Of a long document only the first part is taken, and each document counts with the memory that it takes. So neither
    one text of 100 MB nor millions of short ones fill the sample.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.held, self.floor = 0, -1
        self.heap: list[tuple[int, bytes]] = []
        self.numbers: set[int] = set()

    def add(self, number: int, data: bytes) -> None:
        """Take a document, by its hash, if it belongs to the sample."""
        if number <= self.floor or number in self.numbers or not self.limit:
            return
        limit = min(SAMPLE_DOCUMENT_BYTES, self.limit - SAMPLE_OVERHEAD)
        data = data if len(data) <= limit else data[: cut(data, limit)]
        heapq.heappush(self.heap, (number, data))
        self.numbers.add(number)
        self.held += len(data) + SAMPLE_OVERHEAD
        while self.held > self.limit:
            # What was pushed out sets the floor for what may enter: the order of the documents must not matter.
            self.floor, data = heapq.heappop(self.heap)
            self.numbers.discard(self.floor)
            self.held -= len(data) + SAMPLE_OVERHEAD

    def texts(self, splitter: Splitter) -> list[str]:
        """The sampled texts that train, in the order of their hashes."""
        return [
            data.decode("utf-8", "surrogatepass")
            for number, data in sorted(self.heap)
            if splitter.side(number) == "train"
        ]


def _threshold(fraction: float, low: int, high: int, known_sides: set[str]) -> int:
    """The hash below which a document validates, moved where needed so that neither side is empty."""
    threshold = math.floor(fraction * 2**64)
    if "val" not in known_sides:
        threshold = max(threshold, low + 1)
    if "train" not in known_sides:
        threshold = min(threshold, high)
    if not ("val" in known_sides or low < threshold) or not ("train" in known_sides or high >= threshold):
        raise PrepareError(
            "there is only one distinct document, or one group of look-alikes; training and validation "
            "need one each (a smaller --max-document-bytes cuts a .txt file into more)"
        )
    return threshold


# ------------------------------------------------------------------------------------------------------ second pass


@dataclasses.dataclass(frozen=True)
class Model:
    """A tokenizer's file, by which the worker processes load it."""

    path: str
    sha256: str
    with_caseops: bool


@functools.lru_cache(maxsize=2)
def load_codec(model: Model) -> Codec:
    """The Codec of a model, made once in a process."""
    return Codec(Path(model.path).read_bytes(), model.path, model.with_caseops)


def tokenize(model: Model, segments: list[tuple[str, str]]) -> list[bytes | None]:
    """`Codec.encode_segment` of each segment. None where a document is to be dropped."""
    codec = load_codec(model)
    return [codec.encode_segment(text, before) if text else b"" for text, before in segments]


def write_shards(
    sources: Sources, found: Survey, model: Model, output: Shards, options: Options, progress: Callable[[int], None]
) -> dict[str, dict]:
    """The second pass, or what is left of it. Returns the manifest's `splits`."""
    codec, splitter = load_codec(model), Splitter(found.threshold, sources.known)
    changed = Worthless(f"{' '.join(options.sources)}: the text changed while it was being read")
    waiting: deque[tuple[Document, int]] = deque()
    ready: deque[bytes | None] = deque()

    def segments() -> Iterator[tuple[str, str]]:
        texts, digest = iter(sources), shards.NOTHING
        for text in itertools.islice(texts, output.documents):
            data = text.encode("utf-8", "surrogatepass")
            digest = shards.link(digest, text_hash(data, options.seed).to_bytes(8, "little"))
            progress(len(data))
        if digest != output.digest:
            raise changed
        for text in texts:
            document, count = describe(text, splitter, options.seed), 0
            for segment in codec.segments(text):  # One of an empty text too, or a billion of them would wait here.
                count += 1
                yield segment
            del text  # No part of a large document may stay in memory while the next one is read.
            waiting.append((document, count))

    workers = min(options.workers, -(-found.bytes // BATCH_CHARACTERS))
    job = functools.partial(tokenize, model)
    for results in itertools.chain(corpus.map_in_order(job, in_batches(segments()), workers), [[]]):
        ready.extend(results)
        while waiting and len(ready) >= waiting[0][1]:
            document, count = waiting.popleft()
            segments_tokens = [ready.popleft() for _ in range(count)]
            tokens = [part for part in segments_tokens if part is not None]
            written = contents(codec, document, tokens) if len(tokens) == count else None
            if document.size and written:
                output.add(document, written)
            output.handled(document, dropped=not written)
            progress(document.size)
    if output.digest.hex() != found.digest:
        raise changed
    return output.finish()


def describe(text: str, splitter: Splitter, seed: int) -> Document:
    """What to keep of a document: its hashes, its side, and its text if that side is validation."""
    data = text.encode("utf-8", "surrogatepass")
    number = text_hash(data, seed)
    side = splitter.side(number)
    return Document(number, side, len(data), hashlib.sha256(data).digest(), data if side == "val" else None)


def contents(codec: Codec, document: Document, tokens: list[bytes]) -> list[bytes] | None:
    """What each of its side's files gets of a document: its tokens, and their bytes where there are sidecars.

    None where the bytes that the score will count for a validation document are not those of its text.
    """
    whole = b"".join([BOS_TOKEN, *tokens])
    if document.side == "train":
        return [whole]
    widths = codec.token_bytes(np.frombuffer(whole, "<u2"))
    sidecar = [widths.astype("<u2").tobytes()] if codec.operators else []
    return [whole, *sidecar] if widths.sum() == document.size else None


def in_batches(segments: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Segments in lists of about BATCH_CHARACTERS, so that a worker's job outweighs its hand-over."""
    batch, held = [], 0
    for segment in segments:
        batch.append(segment)
        held += len(segment[0]) + SEGMENT_COST
        if held >= BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def reference_compressors(path: Path) -> dict[str, float]:
    """Bits per byte of general compressors on the file's first 16 MiB: what any language model should beat."""
    size = min(path.stat().st_size, REFERENCE_BYTES)
    stop = threading.Event()  # Lets a Ctrl-C end the threads within a chunk, not at the end of the text.
    dictionary = {"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": max(4096, size)}  # Its own 64 MiB need 674 MB.
    compressors = {
        "xz -9": lzma.LZMACompressor(filters=[dictionary]),
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
    for name, path in listed:
        if is_remote(name):
            parts.append([name])  # With its repository and revision in the options; the hub is not asked again.
        elif path is None:
            parts.append([name, package_versions(builtin_packages(name)), program()["code"]])
        else:
            status = path.stat()
            parts.append([os.path.abspath(path), status.st_size, status.st_mtime_ns])
    return hashlib.sha256(to_json(parts).encode()).hexdigest()


def program() -> dict:
    """What made the output besides the options and the texts."""
    made_by = (prepare, Sources, read_texts, Codec, Shards, text_hash, audit.audit_splits)
    modules = [sys.modules[item.__module__] for item in made_by] + [caseops, corpus]
    files = [Path(module.__file__ or "") for module in modules]
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return {"code": code, **package_versions(["python", "sentencepiece", "numpy", "zstandard"])}


def recorded_options(options: Options) -> dict:
    """The options that change the output, as the manifest holds them."""
    tokenizer = hashlib.sha256(options.tokenizer.read_bytes()).hexdigest() if options.tokenizer else None
    newer = {"vocab_fallback": options.vocab_fallback, "suffixes": list(options.suffixes)}
    return {
        "vocab_size": options.vocab_size,
        "val_fraction": options.val_fraction,
        "shard_tokens": options.shard_tokens,
        "tokenizer_sha256": tokenizer,
        "seed": options.seed,
        "max_document_bytes": options.max_document_bytes,
        "sample_bytes": options.sample_bytes,
        "text_field": options.text_field,
        "caseops": options.caseops,
        "val_documents": options.val_documents,
        "train_shards": options.train_shards,
        "repo": options.repo,
        "revision": options.revision,
        "repo_root": options.repo_root,
        **{name: value for name, value in newer.items() if value},  # folders from before there were these stay valid
    }


def read_manifest(folder: Path, name: str = "manifest.json") -> dict | None:
    """The manifest of a folder, or None if it has none. Raises PrepareError if it is not one of ours."""
    path = folder / name
    try:
        with open_regular(path) as file:
            manifest = from_json(file.read())
        check_manifest(manifest)
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
        raise PrepareError(f"{path}: not a manifest of this program; choose another --out") from None
    return manifest


def check_manifest(manifest: dict) -> None:
    """Use all of a manifest that a run uses, so that a value of a wrong type raises an error here and not later."""
    if (
        manifest["format"] != FORMAT
        or type(manifest["fingerprint"]) is not str
        or type(manifest["options"]) is not dict
    ):
        raise ValueError("another format")
    manifest_files(manifest)
    for source in manifest.get("source") or ():
        if type(source) is not dict or ("export" in source and type(source.get("commit")) is not str):
            raise ValueError("another kind of source")
        if type(source.get("train_shards", 0)) is not int:
            raise ValueError("another kind of count")
    nothing = {"shared_documents": 0, "windows": {"length": 0, "of": 0, "shared": 0, "documents": 0}}
    if "audit" not in manifest:  # it will be audited
        splits = manifest["splits"]
        manifest = {**manifest, "audit": nothing}
        if not all(type(row["sha256"]) is str for split in ("train", "val") for row in splits[split]["shards"]):
            raise ValueError("another kind of hash")
    if not all(line.isprintable() for line in summary_lines(manifest, Path())):
        raise ValueError("a name of several lines")


def manifest_files(manifest: dict) -> dict[str, int]:
    """The files that a manifest lists, with their sizes in bytes."""
    if not manifest:
        return {}
    files = {manifest["tokenizer"]["file"]: manifest["tokenizer"]["bytes"]}
    for split in manifest["splits"].values():
        for shard in (*split["shards"], *split.get("sidecars", ())):
            files[shard["file"]] = HEADER_BYTES + 2 * shard["tokens"]
    if not all(OWN_FILE.fullmatch(name) for name in files):
        raise ValueError("a file that is not ours")
    return files


def check_folder(options: Options, mark: str) -> dict | None:
    """The manifest if --out already holds this preparation, or None if --out may be written. Raises PrepareError."""
    out = options.out
    manifest, unfinished = read_manifest(out), read_unfinished(out)
    own = manifest_files(manifest or {})
    for path in sorted(out.iterdir()):
        if OWN_FILE.fullmatch(path.name) and path.name not in own:
            raise PrepareError(
                f"{path}: in the way, and no manifest says that this program made it; move it or choose another --out"
            )
    if options.force:
        return None
    if manifest and manifest["fingerprint"] == mark:
        present = all((out / name).is_file() and (out / name).stat().st_size == size for name, size in own.items())
        if present:
            return manifest
    elif unfinished and unfinished["fingerprint"] == mark:
        return None  # Whether it may replace what is there was decided when it began.
    extended = manifest and published.variant_of(options.sources) and published.grows(manifest, options)
    for there, words in (
        (None if extended else manifest, "other data"),
        (unfinished, "an unfinished preparation of other data"),
    ):
        if there and there["fingerprint"] != mark:
            raise PrepareError(
                f"--out {out}: holds {words} ({_differences(there['options'], options)}); "
                "choose another folder, or --force replaces it"
            )
    return None


def _differences(recorded: dict, options: Options) -> str:
    asked = recorded_options(options)
    other = [
        f"{key} {recorded.get(key)} there, {value} asked" for key, value in asked.items() if recorded.get(key) != value
    ]
    return "; ".join(other) or "other or changed sources"


def read_unfinished(out: Path) -> dict | None:
    """What the first pass of a run that was killed has left: its options, its fingerprint and its survey."""
    try:
        left = from_json((out / UNFINISHED / "survey.json").read_bytes())
        Survey(**left["survey"])
        whole = type(left["options"]) is dict and type(left["fingerprint"]) is str
    except (FileNotFoundError, NotADirectoryError, ValueError, LookupError, TypeError):
        return None
    return left if whole else None


def discard(folder: Path) -> None:
    """Remove an unfinished preparation. If this is killed halfway, the rest is ignored."""
    (folder / "survey.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def commit(temporary: Path, out: Path) -> None:
    """Give the finished files their names, the manifest last.

    It can be repeated from any point: a run that was killed while renaming is completed by the next one, as the
    temporary folder with its manifest stays until the end.
    """
    manifest = read_manifest(temporary)
    assert manifest is not None  # It is what makes a temporary folder ready.
    (temporary / "survey.json").unlink(missing_ok=True)  # Nothing is left to go on with.
    if (out / "manifest.json").exists():
        os.replace(out / "manifest.json", temporary / "previous.json")
    if (temporary / "previous.json").exists():
        previous = read_manifest(temporary, "previous.json") or {}
        for name in set(manifest_files(previous)) - set(manifest_files(manifest)):
            (out / name).unlink(missing_ok=True)
    for names in (manifest_files(manifest), ["manifest.json"]):
        for name in names:
            if (temporary / name).exists():
                os.replace(temporary / name, out / name)
        shards.sync_folder(out)
    shutil.rmtree(temporary)


@contextlib.contextmanager
def output_folder(out: Path) -> Iterator[None]:
    """Make --out and lock it for this process; after a failure, remove it again if it was made here and is empty."""
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
        left = out / UNFINISHED  # By a run that was killed, as we hold the lock.
        if (left / "manifest.json").exists():
            commit(left, out)
        elif left.exists() and not read_unfinished(out):
            discard(left)
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
    """Ignore Ctrl-C and SIGTERM for the moment that renaming the files takes, after which all is done anyway."""
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

    Raises PrepareError for what a user can correct, and OSError for what the disk refuses. After a disk error, a signal
    or a kill, what is finished is kept, and the next call with the same options continues from there.
    """
    options, given = _complete(options)
    listed = list_files(options.sources, None, options.out, options.suffixes)
    mark = fingerprint(options, listed)
    with output_folder(options.out):
        manifest = check_folder(options, mark)
        if manifest:
            return _with_audit(options, manifest), True
        if published.variant_of(options.sources):
            return _download(options, mark), False
        folder = options.out / UNFINISHED
        unfinished = read_unfinished(options.out)
        if options.force or not unfinished or unfinished.get("program") != program():
            discard(folder)
            folder.mkdir()
        try:
            manifest = _fill(folder, options, given, mark)
        except BaseException as error:
            if isinstance(error, Worthless) or not read_unfinished(options.out):
                discard(folder)
            else:
                error.add_note(f"; what is finished is kept in {folder}, and the same command goes on from there")
            raise
        with no_interruption():
            commit(folder, options.out)
    return manifest, False


def holds_other_data(options: Options) -> bool:
    """Whether --out holds a preparation, whole or not, that these options would not continue. Raises PrepareError."""
    manifest, unfinished = read_manifest(options.out), read_unfinished(options.out)
    complete, _ = _complete(options)
    mark = fingerprint(complete, list_files(options.sources, None, options.out, options.suffixes))
    return any(there and there["fingerprint"] != mark for there in (manifest, unfinished))


def _complete(options: Options) -> tuple[Options, bytes | None]:
    """Check the options that need checking together; read a given tokenizer."""
    if name := published.variant_of(options.sources):
        published.check_options(options)
        variant = published.VARIANTS[name]
        return dataclasses.replace(options, vocab_size=variant.vocab_size, caseops=variant.caseops), None
    if options.train_shards:
        raise PrepareError(f"--train-shards {options.train_shards}: is for {', '.join(published.VARIANTS)}")
    if not options.tokenizer:
        fallback = not options.vocab_size
        size = DEFAULT_VOCAB if options.vocab_size is None else options.vocab_size
        return dataclasses.replace(options, vocab_size=size, vocab_fallback=fallback), None
    try:
        model = read_small(options.tokenizer, MAX_TOKENIZER_BYTES)
    except PrepareError as error:
        raise PrepareError(f"--tokenizer {error}") from None
    except OSError as error:
        raise PrepareError(f"--tokenizer {options.tokenizer}: {error.strerror}") from None
    size = Codec(model, f"--tokenizer {options.tokenizer}", options.caseops).vocab_size
    if options.vocab_size not in (None, AUTO_VOCAB, size):
        raise PrepareError(f"--vocab-size {options.vocab_size}: --tokenizer {options.tokenizer} has {size} pieces")
    return dataclasses.replace(options, vocab_size=size), model


def _download(options: Options, mark: str) -> dict:
    """Fetch a published export into --out, with a manifest like that of a preparation; returns it."""
    report, folder = Report(options.quiet), options.out / DOWNLOADING
    before, ready = read_manifest(options.out), options.out / UNFINISHED
    folder.mkdir(exist_ok=True)
    pinned = None
    if before and not options.force and published.grows(before, options):
        pinned = before["source"][0]["commit"]  # What is added must fit what is there.
    fetched = published.download(options, folder, pinned, report.bar)
    model = fetched.paths[published.TOKENIZER].read_bytes()
    codec = Codec(model, fetched.export.tokenizer.path, options.caseops)
    if codec.vocab_size != options.vocab_size:
        raise PrepareError(f"{fetched.export.tokenizer.path}: {codec.vocab_size} pieces, not {options.vocab_size}")
    splits = published.measure(fetched, codec, report.bar)
    manifest = {
        **_manifest(options, mark, [fetched.described], model, {"given": True}, splits),
        "audit": audited(splits, fetched.paths.__getitem__, options, report),
    }
    write_manifest(folder, manifest)
    with no_interruption():
        discard(ready)
        os.replace(folder, ready)  # From here on the next run completes it, should this one be killed.
        commit(ready, options.out)
    return manifest


def audited(splits: dict[str, dict], place: Callable[[str], Path], options: Options, report: Report) -> dict:
    """The audit of the files that `splits` lists. place: where the file of a name lies. Raises PrepareError."""
    size = sum(2 * shard["tokens"] for shard in splits["train"]["shards"])
    with report.bar("auditing", size) as progress:
        return audit.audit_splits(splits, place, options.workers, progress)


def _with_audit(options: Options, manifest: dict) -> dict:
    """The manifest in --out. One from before there were audits gets its own now."""
    if "audit" not in manifest:
        found = audited(manifest["splits"], options.out.joinpath, options, Report(options.quiet))
        manifest = {**manifest, "audit": found}
        write_manifest(options.out, manifest)
    return manifest


def write_manifest(folder: Path, manifest: dict) -> None:
    """Put manifest.json into a folder, whole or not at all."""
    write_file(folder / "manifest.json", (to_json(manifest, indent=1) + "\n").encode())


def _manifest(options: Options, mark: str, source: list[dict], model: bytes, training: dict, splits: dict) -> dict:
    """What every manifest holds. training: the options that made the tokenizer `model`."""
    vocab_size = training.get("vocab_size") or options.vocab_size
    return {
        "format": FORMAT,
        "source": source,
        "created_with": {"prepare": FORMAT, **program()},
        "options": recorded_options(options),
        "tokenizer": {
            "file": published.TOKENIZER,
            "bytes": len(model),
            "sha256": hashlib.sha256(model).hexdigest(),
            "vocab_size": vocab_size,
            "options": training,
        },
        "splits": splits,
        "fingerprint": mark,
    }


def _fill(folder: Path, options: Options, model: bytes | None, mark: str) -> dict:
    """Write all files of a preparation into a folder, or those that it lacks; the manifest last."""
    report = Report(options.quiet)
    report.say(printable("reading " + " ".join(options.sources)))
    sources = Sources(options, report)
    found = _surveyed(folder, sources, options, mark)
    training = _tokenizer(folder, options, found, model, report)
    path = folder / published.TOKENIZER
    model = path.read_bytes()
    with contextlib.closing(Shards(folder, options.shard_tokens, options.caseops)) as output:
        if output.documents:
            report.say(f"going on after {output.documents} of {found.documents + found.empty} documents")
        with report.bar("tokenizing", found.bytes) as progress:
            loaded = Model(str(path), hashlib.sha256(model).hexdigest(), options.caseops)
            splits = write_shards(sources, found, loaded, output, options, progress)
    for split, summary in splits.items():
        if not summary["documents"]:
            raise Worthless(
                f"no {split} document is left ({output.dropped} of {found.documents} documents dropped "
                "because decoding does not give them back); give more text or another --tokenizer"
            )
    try:
        found_shared = audited(splits, folder.joinpath, options, report)
    except PrepareError as error:  # The disk has lost what was written; going on would end here again.
        raise Worthless(str(error)) from None
    report.say("compressing the validation text with xz -9 and zstd -22")
    manifest = {
        **_manifest(options, mark, sources.described, model, training, splits),
        "dropped_documents": output.dropped,
        "empty_documents": found.empty,
        "duplicates_of_validation": sources.duplicates,
        "taken": dict(sorted(sources.taken.items())),
        "left_out": dict(sorted((sources.left_out + sources.passed_over).items())),
        "reference_compressors": reference_compressors(folder / "validation"),
        "reference_bytes": min(splits["val"]["bytes"], REFERENCE_BYTES),
        "audit": found_shared,
    }
    write_manifest(folder, manifest)
    return manifest


def _surveyed(folder: Path, sources: Sources, options: Options, mark: str) -> Survey:
    """The first pass, or what is left of an earlier one."""
    unfinished = read_unfinished(options.out)
    if unfinished:
        return Survey(**unfinished["survey"])
    found, sample = survey(sources, options)
    write_file(folder / "sample.jsonl", "".join(to_json(text) + "\n" for text in sample).encode())
    kept = {
        "fingerprint": mark,
        "program": program(),
        "options": recorded_options(options),
        "survey": dataclasses.asdict(found),
    }
    write_file(folder / "survey.json", to_json(kept).encode())
    return found


def vocab_size_of(size: int) -> int:
    """The pieces of a tokenizer for so many bytes of text, where `--vocab-size auto` leaves it to the program."""
    return next((pieces for limit, pieces in VOCAB_OF_BYTES if size < limit), 4096)


def _tokenizer(folder: Path, options: Options, found: Survey, model: bytes | None, report: Report) -> dict:
    """Put a tokenizer into the folder if none is there. Returns the options that made it."""
    made = folder / "tokenizer.json"
    if made.exists():
        return from_json(made.read_bytes())
    training: dict = {"given": True}
    if model is None:
        assert options.vocab_size is not None  # `_complete` has filled it in.
        with open(folder / "sample.jsonl", "rb") as file:
            sample = [from_json(line) for line in file]
        size = options.vocab_size or vocab_size_of(found.bytes)
        report.say(f"training a tokenizer of {size} pieces on {len(sample)} documents")
        train = train_largest if options.vocab_fallback else train_tokenizer
        try:
            model, training = train(sample, size, options.caseops)
        except PrepareError as error:
            raise Worthless(str(error)) from None
        if training["vocab_size"] < size:
            report.say(f"the text supports {training['vocab_size']} pieces, so the tokenizer has as many")
        Codec(model, "the trained tokenizer", options.caseops)
    write_file(folder / published.TOKENIZER, model)
    write_file(made, to_json(training).encode())
    return training


# ----------------------------------------------------------------------------------------------------- command line


EPILOG = """\
A file of plain text (.txt, .md, .rst, and endings named by --suffix) is one document, or is cut at blank lines if it
is longer than --max-document-bytes; a line of a .jsonl file is one, and so is a row of a .parquet file. All but
.parquet may be packed: .gz, .zst or .xz. `builtin` is the documentation inside Python, torch, numpy, sympy and
networkx, about 16 MB; `builtin:networkx,numpy` takes some of them. Folders are searched with all that is in them, in
sorted order. Hidden names, virtual environments, links, other endings, binary and special files in them are left out
and counted. Text must be UTF-8. An archive that unpacks to 256 MiB and 250 times its size is refused.
hf:OWNER/NAME[:CONFIG][@SPLIT] is a dataset of the Hugging Face hub, docs_selected the challenge's list of documents.
sp1024, sp8192 and sp8192-caseops are the challenge's own shards with their tokenizer: no text is read, and the options
for text don't apply. HF_ENDPOINT and HF_TOKEN work as ever; what is downloaded stays, and a broken download goes on.
A hash of its text decides whether a document is for validation, so equal documents are on one side. Files keep their
order; builtin is shuffled. Of docs_selected.jsonl the first 50,000 documents are for validation, and no copy of them is
for training. An audit counts what training shares with validation; the manifest holds it, and train_gpt.py checks it.

A run that is interrupted, killed, or out of disk space keeps its finished shards in --out/.prepare-unfinished. The
same command continues from there and writes the same bytes as an undisturbed run; --force starts again.

exit codes: 0 done, or done before with the same options; 2 something to mend, said in one line on stderr;
130 or 143 interrupted."""


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


def _whole(low: int, high: int) -> Callable[[str], float]:
    """An argparse type: a whole number from `low` to `high`."""
    return functools.partial(_number, int, low, high)


def suffix_of(text: str) -> str:
    """An argparse type: the ending of a name, with its dot and in small letters; `py` and `*.py` mean `.py`."""
    ending = "." + text.removeprefix("*").removeprefix(".").lower()
    if not re.fullmatch(r"(\.[\w+#-]+)+", ending) or ending.endswith((*PACKED, ".parquet")):
        raise argparse.ArgumentTypeError(f"{text}: must be the ending of a name, such as .py; packed files follow it")
    return ending


def parse_arguments(arguments: list[str]) -> Options:
    """Options from the command line. Raises PrepareError."""
    parser = _Parser(
        prog="prepare.py",
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog=EPILOG,
    )
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="`builtin`, a .txt, .md, .rst, .jsonl (also packed as .gz, .zst or .xz) or .parquet file, a folder, "
        "hf:OWNER/NAME, docs_selected, or sp1024, sp8192, sp8192-caseops",
    )
    add("--out", required=True, type=Path, metavar="DIR", help="folder to write tokenizer, shards and manifest.json in")
    _add_text_options(add)
    _add_hub_options(add)
    add("--force", action="store_true", help="replace what this program made in DIR with other options")
    add("--quiet", action="store_true", help="no progress on stderr")
    values = vars(parser.parse_intermixed_args(arguments))
    suffixes = tuple(sorted(set(values["suffixes"])))
    return Options(**{**values, "sources": tuple(values["sources"]), "suffixes": suffixes})


def _add_text_options(add: Callable) -> None:
    """Options of how text becomes shards."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    add(
        "--vocab-size",
        type=lambda text: AUTO_VOCAB if text == "auto" else _number(int, MIN_VOCAB, MAX_VOCAB, text),
        metavar="N",
        help="pieces of the tokenizer; auto: by the amount of text (default: 1024, or what the text supports)",
    )
    add(
        "--suffix",
        dest="suffixes",
        action="append",
        default=[],
        type=suffix_of,
        metavar="ENDING",
        help="a further ending of plain text, such as .py; can be given several times",
    )
    add(
        "--val-fraction",
        type=lambda text: _number(float, 0, 1, text, True),
        default=0.05,
        metavar="F",
        help="share of the documents for validation (default: %(default)s)",
    )
    add(
        "--val-documents",
        type=_whole(1, MAX_VALIDATION_DOCUMENTS),
        metavar="N",
        help="the first N documents are for validation (default: 50000 of docs_selected.jsonl, else by hash)",
    )
    add(
        "--shard-tokens",
        type=_whole(1, 1_000_000_000),
        default=100_000_000,
        metavar="N",
        help="most tokens in a shard, unless one document has more (default: %(default)s)",
    )
    add(
        "--workers",
        type=_whole(1, 1024),
        default=cores,
        metavar="N",
        help="processes (default: one per core, %(default)s)",
    )
    add("--tokenizer", type=Path, metavar="FILE", help="a SentencePiece model to use instead of training one")
    add("--seed", type=_whole(0, 2**63 - 1), default=0, metavar="N", help="of the split and shuffle (default: 0)")
    add(
        "--max-document-bytes",
        type=_whole(64, 1 << 30),
        default=32 << 10,
        metavar="N",
        help="cut .txt files that are longer (default: %(default)s)",
    )
    add(
        "--sample-bytes",
        type=_whole(1 << 16, 1 << 30),
        default=32 << 20,
        metavar="N",
        help="most text to train the tokenizer on; training takes about 10 times as much memory (default: %(default)s)",
    )
    add(
        "--text-field",
        default="text",
        metavar="NAME",
        help="the field or column that holds the text of .jsonl and .parquet (default: %(default)s)",
    )
    add(
        "--caseops",
        action="store_true",
        help="write capitals as operators before small letters (caseops.py), and each validation token's original "
        "bytes as fineweb_val_bytes_*.bin",
    )


def _add_hub_options(add: Callable) -> None:
    """Options of what is downloaded, and from where."""
    add(
        "--train-shards",
        type=_whole(1, 10**6),
        metavar="N",
        help="of sp1024, sp8192, sp8192-caseops: the first N training shards (default: all); more can be added later",
    )
    add("--repo", metavar="OWNER/NAME", help="dataset repository of docs_selected, sp1024, sp8192 or sp8192-caseops")
    add("--revision", metavar="REV", help="branch, tag or commit on the hub (default: main)")
    add(
        "--repo-root",
        default=ROOT,
        metavar="PATH",
        help="folder in that repository that holds manifest.json (default: %(default)s)",
    )
    add(
        "--downloads",
        type=Path,
        metavar="DIR",
        help="folder for text from the hub, which stays there (default: downloads in --out)",
    )


def summary_lines(manifest: dict, out: Path) -> Iterator[str]:
    """What a run prints on stdout."""
    for split, entry in manifest["splits"].items():
        yield (
            f"{split}: {entry['documents']:,} documents, {entry['tokens']:,} tokens, {entry['bytes']:,} bytes, "
            f"{len(entry['shards'])} shard(s)"
        )
    if manifest.get("duplicates_of_validation"):
        yield f"left out of training: {manifest['duplicates_of_validation']:,} documents that validate"
    if manifest.get("dropped_documents"):
        yield f"dropped: {manifest['dropped_documents']:,} documents that decoding does not give back"
    if manifest.get("empty_documents"):
        yield f"empty: {manifest['empty_documents']:,} documents without text"
    if manifest.get("taken"):
        rows = [
            f"{name}: {row['files']:,} {'file' if row['files'] == 1 else 'files'}, {row['bytes']:,} bytes"
            for name, row in manifest["taken"].items()
        ]
        yield f"taken: {'; '.join(rows)}"
    if manifest.get("left_out"):
        yield f"left out: {counted(manifest['left_out'])}"
    if "reference_compressors" in manifest:
        reference = ", ".join(f"{name} {value:.3f}" for name, value in manifest["reference_compressors"].items())
        yield f"bits per byte of the validation text: {reference}"
    yield from audit.overlap_lines(manifest["audit"])
    yield f"written: {shell_quoted(str(out / 'manifest.json'))}"
    knobs = f"DATA_PATH={shell_quoted(str(out))} VOCAB_SIZE={manifest['tokenizer']['vocab_size']}"
    knobs += " CASEOPS_ENABLED=1" if manifest["options"]["caseops"] else ""
    script = os.path.relpath(Path(__file__).resolve().parent.parent / "train_gpt.py")
    yield f"train on it: {knobs} {python_command()} {shell_quoted(script)}"


def _on_signal(number: int, frame: object) -> None:
    for other in SIGNALS:
        signal.signal(other, signal.SIG_IGN)  # The clean-up is short; let a second Ctrl-C not break it.
    raise Terminated(number)


def _notes(error: BaseException, otherwise: str = "") -> str:
    """What was noted about an error while it passed."""
    return "".join(getattr(error, "__notes__", [otherwise]))


def _disk_error(error: OSError, out: Path) -> str:
    """One line for what the disk refused: a file to read, or (also where the error names none) --out."""
    path = Path(os.path.abspath(error.filename or out))
    folder = Path(os.path.abspath(out))
    if path.is_relative_to(folder) or folder.is_relative_to(path):
        return f"--out {out}: {error.strerror}; it must be a folder that may be written to, with room"
    return f"{error.filename}: {error.strerror}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    kept = "; nothing is left of it"
    try:
        for number in SIGNALS:
            signal.signal(number, _on_signal)
        options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        if any(map(is_remote, options.sources)):
            kept = "; what was downloaded is kept, and the same command goes on"
        manifest, before = prepare(options)
    except PrepareError as error:
        message, code = str(error) + _notes(error), 2
    except OSError as error:
        message, code = _disk_error(error, options.out) + _notes(error), 2
    except MemoryError as error:
        message, code = "not enough memory; try fewer --workers, or a smaller --sample-bytes" + _notes(error), 2
    except BrokenProcessPool as error:
        message, code = "a worker process was killed, perhaps for want of memory; try fewer --workers", 2
        message += _notes(error)
    except Terminated as error:
        message, code = "interrupted" + _notes(error, kept), 128 + error.args[0]
    else:
        try:
            with contextlib.suppress(AttributeError, io.UnsupportedOperation):  # Another object in its place.
                cast(io.TextIOWrapper, sys.stdout).reconfigure(
                    errors="backslashreplace"
                )  # --out may have letters that a terminal lacks.
            print(
                "\n".join((["already prepared"] if before else []) + [*summary_lines(manifest, options.out)]),
                flush=True,
            )
            return 0
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest when it ends.
            message, code = f"standard output: {error.strerror}; the files in {options.out} are complete", 2
    print("prepare.py: error: " + printable(" ".join(message.split())), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

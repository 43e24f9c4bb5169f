"""The challenge's published data: shards and a tokenizer that are ready to train on, and the documents behind them.

The repositories have one layout, below a root folder (--repo-root):

    manifest.json                                        lists datasets and tokenizers, with counts
    datasets/fineweb10B_sp1024/fineweb_train_000000.bin  shards; fineweb_val_000000.bin ...
                               fineweb_val_bytes_*.bin   bytes per validation token, where CaseOps wrote the text
    tokenizers/fineweb_1024_bpe.model
    docs_selected.jsonl                                  the text that all of it was made from

That manifest says which names, shards and counts there are. Files are checked against the hashes that the hub
publishes, and against the manifest's where it has any. Bytes and documents are counted here, from the tokens.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from errors import PrepareError
from hub import RemoteFile, Repository, check_room
from options import Options
from progress import Bar
from readers import read_small
from shards import read_shard
from text import from_json
from tokenizer import Codec

DOCUMENTS = "docs_selected"  # the name of the source; the file is docs_selected.jsonl
VALIDATION_DOCUMENTS = 50_000  # the first so many of docs_selected.jsonl validate, always
TEXT_OPTIONS = (
    "vocab_size",
    "val_fraction",
    "val_documents",
    "shard_tokens",
    "tokenizer",
    "seed",
    "max_document_bytes",
    "text_field",
    "caseops",
    "downloads",
)
TOKENIZER = "tokenizer.model"  # its name in --out
CHUNK_TOKENS = 4 << 20
DESCRIPTION_BYTES = 64 << 20  # of a JSON file or a tokenizer in a repository, at most


@dataclasses.dataclass(frozen=True)
class Variant:
    """One export: its repository, and what tells its entry in the manifest from the others."""

    repo: str
    vocab_size: int
    caseops: bool = False


VARIANTS = {
    "sp1024": Variant("willdepueoai/parameter-golf", 1024),
    "sp8192": Variant("kevclark/parameter-golf", 8192),
    "sp8192-caseops": Variant("romeerp/parameter-golf-caseops-v1", 8192, True),
}


def variant_of(sources: Iterable[str]) -> str | None:
    """The export that the sources name, or None. Raises PrepareError where other sources stand beside it."""
    sources = list(sources)
    named = [source for source in sources if source in VARIANTS]
    if named and len(sources) > 1:
        raise PrepareError(f"{' '.join(sources)}: {named[0]} has its own shards and tokenizer, and stands alone")
    return named[0] if named else None


def check_options(options: Options) -> None:
    """Refuse options for text, because an export's text and tokens are given. Raises PrepareError."""
    for field in dataclasses.fields(options):
        if field.name in TEXT_OPTIONS and getattr(options, field.name) != field.default:
            raise PrepareError(
                f"--{field.name.replace('_', '-')} {getattr(options, field.name)}: does not apply to "
                f"{options.sources[0]}, whose text and tokenizer are given"
            )


def grows(manifest: dict, options: Options) -> bool:
    """Whether --out holds the same export with at most as many training shards: then only the others are fetched."""
    recorded = manifest["source"][0] if manifest.get("source") else {}
    wanted = (options.sources[0], options.repo or VARIANTS[options.sources[0]].repo, options.repo_root)
    there = tuple(recorded.get(key) for key in ("export", "repo", "root"))
    same_commit = options.revision in (None, recorded.get("revision"), recorded.get("commit"))
    more = options.train_shards is None or recorded.get("train_shards", 0) <= options.train_shards
    return wanted == there and same_commit and more


# -------------------------------------------------------------------------------------------- the published manifest


@dataclasses.dataclass(frozen=True)
class Export:
    """What the published manifest says of one variant: counts, and the files by the names that they get in --out."""

    name: str
    stats: dict
    train: dict[str, RemoteFile]
    val: dict[str, RemoteFile]
    sidecars: dict[str, RemoteFile]
    tokenizer: RemoteFile

    @property
    def files(self) -> dict[str, RemoteFile]:
        """All of them."""
        return {TOKENIZER: self.tokenizer, **self.val, **self.sidecars, **self.train}


def find_export(
    listed: Mapping[str, RemoteFile], manifest: object, variant: str, root: str, shards: int | None, repo: str
) -> Export:
    """The variant's entry of the manifest with its first `shards` training shards (None: all).

    listed: the repository's files, by path. Raises PrepareError that says what the manifest has if nothing fits.
    """
    where = f"{repo}: {root}/manifest.json"
    if not isinstance(manifest, dict):
        raise PrepareError(f"{where}: not a JSON object")
    entry = _entry(manifest, variant, where)
    if not isinstance(entry.get("stats") or {}, dict):
        raise PrepareError(f"{where}: the stats of {entry['name']}: not a JSON object")
    layout = _Layout(listed, root, where, entry)
    count = layout.count("train")
    if shards is not None and shards > count:
        raise PrepareError(f"--train-shards {shards}: {entry['name']} has {count}")
    caseops = VARIANTS[variant].caseops
    val_count = layout.count("val")
    tokenizer = _tokenizer(manifest, entry, where)
    export = Export(
        entry["name"],
        dict(entry.get("stats") or {}),
        layout.shards("train", count if shards is None else shards),
        layout.shards("val", val_count),
        layout.shards("val_bytes", val_count) if caseops else {},
        layout.file(tokenizer["model_path"]),
    )
    _check_hashes(export, [entry, tokenizer], where)
    return export


def _entry(manifest: dict, variant: str, where: str) -> dict:
    """The dataset's entry: of the variant's vocabulary, and with CaseOps in its name or not."""
    entries = [item for item in _dictionaries(manifest.get("datasets")) if isinstance(item.get("name"), str)]
    wanted = VARIANTS[variant]
    fitting = [
        item
        for item in entries
        if item.get("vocab_size") == wanted.vocab_size and ("caseops" in item["name"].lower()) == wanted.caseops
    ]
    if len(fitting) != 1:
        there = ", ".join(f"{item['name']} ({item.get('vocab_size')} tokens)" for item in fitting or entries) or "none"
        raise PrepareError(
            f"{where}: {'several datasets fit' if fitting else 'no dataset for'} {variant}; it lists {there}"
        )
    return fitting[0]


def _tokenizer(manifest: dict, entry: dict, where: str) -> dict:
    entries = [item for item in _dictionaries(manifest.get("tokenizers")) if isinstance(item.get("model_path"), str)]
    for item in entries:
        if item.get("name") == entry.get("tokenizer_name"):
            return item
    there = ", ".join(str(item.get("name")) for item in entries) or "none"
    raise PrepareError(
        f"{where}: no SentencePiece tokenizer {entry.get('tokenizer_name')} for {entry['name']}; it lists {there}"
    )


def _dictionaries(value: object) -> list[dict]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where an entry's files lie in the repository."""

    listed: Mapping[str, RemoteFile]
    root: str
    where: str
    entry: dict

    def file(self, path: str) -> RemoteFile:
        """A path as the manifest writes it: from the root folder, or else from the repository's top."""
        for candidate in (f"{self.root}/{path}", path):
            if candidate in self.listed:
                return self.listed[candidate]
        raise PrepareError(f"{self.where} names {path}, which the repository lacks")

    def pattern(self, split: str) -> str:
        """The paths of a split's shards, with * for the number. Sidecars lie beside the validation shards."""
        glob = self.entry.get(f"{split.removesuffix('_bytes')}_glob")
        name = glob.rpartition("/")[2] if isinstance(glob, str) else ""
        name = name if name.count("*") == 1 else f"fineweb_{split}_*.bin"
        name = "fineweb_val_bytes_*.bin" if split == "val_bytes" else name
        return f"{str(self.entry.get('path') or 'datasets/' + self.entry['name']).strip('/')}/{name}"

    def count(self, split: str) -> int:
        """How many shards the manifest counts; without a count, how many there are."""
        count = (self.entry.get("stats") or {}).get(f"files_{split}")
        if count is None:
            pattern = self.pattern(split).replace("*", "[0-9]" * 6)
            count = sum(
                fnmatch.fnmatchcase(path, pattern) or fnmatch.fnmatchcase(path, f"{self.root}/{pattern}")
                for path in self.listed
            )
        if type(count) is not int or count < 1:
            raise PrepareError(f"{self.where}: {self.entry['name']} has {count} {split} shards")
        return count

    def shards(self, split: str, count: int) -> dict[str, RemoteFile]:
        """The first shards of a split, by their names in --out."""
        pattern = self.pattern(split)
        numbers = [f"{number:06d}" for number in range(count)]
        return {f"fineweb_{split}_{number}.bin": self.file(pattern.replace("*", number)) for number in numbers}


def _check_hashes(export: Export, entries: Iterable[dict], where: str) -> None:
    """Compare hashes that the manifest has beside a file's path or name with those that the hub publishes."""
    published = {file.path.rpartition("/")[2]: file for file in export.files.values() if file.sha256}
    for item in _all_dictionaries(list(entries)):
        names = {str(value).rpartition("/")[2] for value in item.values()}
        for name in names & set(published):
            if item.get("sha256") not in (None, published[name].sha256):
                raise PrepareError(
                    f"{where}: {name} has the hash {item['sha256']}, and the hub publishes {published[name].sha256}"
                )


def _all_dictionaries(value: object) -> Iterator[dict]:
    """Every dictionary in a JSON value."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _all_dictionaries(item)


# ------------------------------------------------------------------------------------------------------ the download


@dataclasses.dataclass(frozen=True)
class Download:
    """A complete export on the disk: where each of its files lies, by name in --out, and where it is from."""

    export: Export
    paths: dict[str, Path]
    described: dict


def download(options: Options, folder: Path, pinned: str | None, bar: Bar) -> Download:
    """Fetch an export's files into a folder, but for those that --out already has.

    pinned: the commit of a download that is being extended. bar: a label and a total in bytes to a context with the
    function to call with bytes done. Every file has the hub's hash when this returns, and every shard its length.
    """
    name, root = options.sources[0], options.repo_root
    repository = Repository(options.repo or VARIANTS[name].repo, pinned or options.revision)
    listed = repository.files(root)
    path = f"{root}/manifest.json"
    if path not in listed:
        raise PrepareError(f"{repository.repo}: there is no {path} (404)")
    repository.fetch({folder / "published.json": listed[path]}, lambda count: None)
    try:
        manifest = from_json(read_small(folder / "published.json", DESCRIPTION_BYTES))
    except ValueError as error:
        raise PrepareError(f"{repository.repo}: {path}: not JSON: {error}") from None
    export = find_export(listed, manifest, name, root, options.train_shards, repository.repo)
    paths = {
        file: options.out / file if remote.intact(options.out / file) else folder / file
        for file, remote in export.files.items()
    }
    wanted = {place: export.files[file] for file, place in paths.items() if place.parent == folder}
    check_room("--out", options.out, wanted)
    with bar(f"downloading {len(wanted)} files", sum(file.size for file in wanted.values()) or 1) as progress:
        repository.fetch(wanted, progress)
    described = {
        "export": name,
        "repo": repository.repo,
        "revision": options.revision,
        "commit": repository.commit,
        "root": root,
        "dataset": export.name,
        "train_shards": len(export.train),
        "stats": export.stats,
    }
    return Download(export, paths, described)


# --------------------------------------------------------------------------------------------------- what is in it


def measure(download: Download, codec: Codec, bar: Bar) -> dict[str, dict]:
    """The `splits` of our manifest, counted from the tokens. Raises PrepareError where files or figures disagree."""
    export, splits = download.export, {}
    total = sum(file.size for split in (export.train, export.val) for file in split.values())
    with bar("counting", total) as progress:
        for split, files in (("train", export.train), ("val", export.val)):
            context, shards = np.empty(0, np.uint16), []
            for name, remote in files.items():
                tokens = open_shard(download.paths[name], remote)
                counts, context = _count(tokens, codec, context, remote, progress)
                shards.append({"file": name, **counts, "sha256": _sha256(remote, download.paths[name])})
            totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens", "bytes")}
            splits[split] = {**totals, "shards": shards}
    if export.sidecars:
        _measure_sidecars(download, splits["val"], codec)
    check_figures(export, splits)
    return splits


def open_shard(path: Path, remote: RemoteFile) -> np.ndarray:
    """[n] uint16. Raises PrepareError if it is no whole shard."""
    try:
        return read_shard(path, remote.path)
    except ValueError as error:
        raise PrepareError(str(error)) from None


def _count(
    tokens: np.ndarray, codec: Codec, context: np.ndarray, remote: RemoteFile, progress: Callable[[int], None]
) -> tuple[dict, np.ndarray]:
    """Tokens, documents (BOS) and text bytes of a shard, which may begin inside a document.

    context: the tokens before it that decide on the bytes of its first one; the same for the next shard is returned.
    """
    documents = size = 0
    for start in range(0, len(tokens), CHUNK_TOKENS):
        ids = np.asarray(tokens[start : start + CHUNK_TOKENS])
        if int(ids.max()) >= codec.vocab_size:
            raise PrepareError(f"{remote.path}: token id {ids.max()}; the tokenizer has {codec.vocab_size} pieces")
        documents += int((ids == codec.processor.bos_id()).sum())
        joined = np.concatenate([context, ids])
        size += int(codec.token_bytes(joined)[len(context) :].sum())
        # A token's bytes depend on the one before it and, with CaseOps, on the row of ESC tokens that ends there.
        keep = 1
        escape = codec.operators["ESC"] if codec.operators else -1
        while keep < len(joined) and joined[-keep] == escape:
            keep += 1
        context = joined[-keep:].copy()
        progress(2 * len(ids))
    return {"tokens": len(tokens), "documents": documents, "bytes": size}, context


def _sha256(remote: RemoteFile, path: Path) -> str:
    """The hash of a file that was fetched, so that it is known where the hub publishes it."""
    if remote.sha256:
        return remote.sha256
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _measure_sidecars(download: Download, split: dict, codec: Codec) -> None:
    """Put the sidecars into the validation split, whose bytes are theirs: they are what a score divides by.

    Raises PrepareError where they don't fit the tokens, or count other bytes than the tokens' own text has.
    """
    sidecars = []
    for shard, (name, remote) in zip(split["shards"], download.export.sidecars.items(), strict=True):
        tokens = open_shard(download.paths[shard["file"]], remote)
        widths = open_shard(download.paths[name], remote)
        if len(widths) != len(tokens) or widths[tokens == codec.processor.bos_id()].any():
            raise PrepareError(
                f"{remote.path}: {len(widths)} byte counts for {len(tokens)} tokens, or bytes for a document's start"
            )
        size = int(widths.sum(dtype=np.int64))
        if size != shard["bytes"]:
            raise PrepareError(
                f"{remote.path}: its counts add up to {size} bytes, and the tokens stand for "
                f"{shard['bytes']} bytes of text"
            )
        sidecars.append(
            {
                "file": name,
                "tokens": len(widths),
                "documents": shard["documents"],
                "bytes": size,
                "sha256": _sha256(remote, download.paths[name]),
            }
        )
    split["sidecars"] = sidecars


def check_figures(export: Export, splits: Mapping[str, dict]) -> None:
    """Compare the counts with the published manifest's, for splits with all their shards. Raises PrepareError."""
    complete = ["val"]
    if len(export.train) == export.stats.get("files_train", len(export.train)):
        complete.append("train")
    found = {
        f"{ours}_{split}": splits[split][key]
        for split in complete
        for ours, key in (("tokens", "tokens"), ("docs", "documents"))
    }
    if len(complete) == 2:
        found |= {f"{key}_total": found[f"{key}_val"] + found[f"{key}_train"] for key in ("tokens", "docs")}
    other = [
        f"{key} {export.stats[key]} there, {value} counted"
        for key, value in found.items()
        if export.stats.get(key) not in (None, value)
    ]
    if other:
        raise PrepareError(f"{export.name}: the published manifest and the shards disagree: {'; '.join(other)}")


# ------------------------------------------------------------------------------------------------- the document list


def documents(options: Options) -> tuple[Repository, list[RemoteFile]]:
    """docs_selected.jsonl of a repository, and what describes it if there is something. Raises PrepareError."""
    repository = Repository(options.repo or VARIANTS["sp1024"].repo, options.revision)
    listed, path = repository.files(options.repo_root), f"{options.repo_root}/{DOCUMENTS}.jsonl"
    if path not in listed:
        raise PrepareError(f"{repository.repo}: there is no {path} (404)")
    return repository, [listed[name] for name in (path, describing(path)) if name in listed]


def describing(path: str) -> str:
    """The name of the file that tells the count and the hash of a list of documents."""
    return path[: path.rindex(DOCUMENTS)] + f"{DOCUMENTS}.source_manifest.json"


def check_documents(path: Path) -> None:
    """Compare docs_selected.jsonl with the file that describes it, if there is one. Raises PrepareError."""
    beside = Path(describing(str(path)))
    if path.name != f"{DOCUMENTS}.jsonl" or not beside.is_file():
        return
    try:
        described = from_json(read_small(beside, DESCRIPTION_BYTES))
        count, digest = described.get("num_docs"), described.get("docs_sha256")
    except (ValueError, AttributeError):
        raise PrepareError(f"{beside}: not a JSON object") from None
    lines, last = 0, b""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        for chunk in iter(lambda: file.read(1 << 20), b""):
            lines, last = lines + chunk.count(b"\n"), chunk
            found.update(chunk)
    lines += bool(last) and not last.endswith(b"\n")
    if count not in (None, lines):
        raise PrepareError(f"{path}: {lines} documents; {beside.name} says {count}")
    if digest not in (None, found.hexdigest()):
        raise PrepareError(f"{path}: its hash is {found.hexdigest()}; {beside.name} says {digest}")

"""Reads the text of data/prepare.py from files, folders, the hub and the built-in corpus, and splits off validation."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import corpus
import hub
import published
from errors import PrepareError
from options import Options
from progress import Report, bar_of
from readers import ALLOWED, NOT_UTF8, SUFFIXES, NotText, check_plain, ending_of, read_texts
from text import printable, text_hash

MAX_ENTRIES = 1_000_000  # files and folders in a source: their names are in memory
MAX_ENDINGS = 20  # that are counted each; the other files are counted together
MAX_NAMED = 5  # files that are no text and are named while they are left out
ENVIRONMENT_FILES = ("pyvenv.cfg", "conda-meta")  # one of them makes a folder a virtual environment
PACKAGE_FOLDERS = ("node_modules", "site-packages", "__pycache__")


# ---------------------------------------------------------------------------------------------------------- sources


def list_files(
    sources: Iterable[str],
    left_out: Counter[str] | None = None,
    out: Path | None = None,
    suffixes: tuple[str, ...] = (),
) -> list[tuple[str, Path | None]]:
    """The sources with folders replaced by the files in them, sorted; the path is None for builtin and the hub's.

    left_out: counts what is left out of folders, by the reason. out: the folder of the output, which is no source.
    suffixes: further endings of plain text. What a file holds is not looked at here.
    """
    left_out = Counter() if left_out is None else left_out
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
            reasons = Counter()
            inside = sorted(files_inside(path, reasons, out, suffixes), key=lambda item: item.parts)
            if not inside:
                there = f" (left out: {counted(reasons)})" if reasons else ""
                raise PrepareError(f"{source}: the folder holds no file of {ALLOWED}{there}")
            listed += [(str(item), item) for item in inside]
            left_out.update(reasons)
        elif not os.path.lexists(path):
            raise PrepareError(
                f"{source}: no such file or folder (nor is it builtin, hf:OWNER/NAME, "
                f"{published.DOCUMENTS}, {', '.join(published.VARIANTS)})"
            )
        elif not ending_of(path.name, suffixes):
            raise PrepareError(f"{source}: unknown kind of file; allowed are {ALLOWED}")
        elif not path.exists():
            raise PrepareError(f"{source}: a link that leads nowhere")
        elif not path.is_file():
            raise PrepareError(f"{source}: not a regular file")
        else:
            listed.append((source, path))
    return listed


def files_inside(
    folder: Path, left_out: Counter[str], out: Path | None = None, suffixes: tuple[str, ...] = ()
) -> list[Path]:
    """The files of text in a folder and in all folders in it. What is left out is counted by the reason.

    Links are not followed: they may lead out of the folder, into a loop, or to a file that is read anyway.
    """
    found, waiting = [], [str(folder)]
    entries = 0
    reasons: Counter[str] = Counter()
    output = os.path.realpath(out) if out else None
    while waiting:
        inside = waiting.pop()
        try:
            with os.scandir(inside) as items:
                for item in items:
                    entries += 1
                    if entries > MAX_ENTRIES:
                        raise PrepareError(
                            f"{folder}: more than {MAX_ENTRIES:,} files and folders; put texts together in .jsonl files"
                        )
                    reason = _reason_against(item, output, suffixes)
                    if reason:
                        reasons[reason] += 1
                    elif item.is_dir(follow_symlinks=False):
                        waiting.append(item.path)
                    else:
                        found.append(Path(item.path))
        except OSError:
            if inside == str(folder):
                raise
            reasons["unreadable folders"] += 1
    left_out.update(_few_endings(reasons))
    return found


def _reason_against(item: os.DirEntry[str], output: str | None, suffixes: tuple[str, ...]) -> str:
    """Why an entry of a folder is no source, in the plural; empty if it is one, or a folder to look into."""
    if item.is_symlink():
        return "symbolic links"
    is_folder = item.is_dir(follow_symlinks=False)
    if is_folder and output and os.path.realpath(item.path) == output:
        return "output folders"
    if item.name.startswith("."):
        return "hidden folders" if is_folder else "hidden files"
    if is_folder:
        if any(os.path.lexists(os.path.join(item.path, name)) for name in ENVIRONMENT_FILES):
            return "virtual environments"
        return f"folders {item.name}" if item.name in PACKAGE_FOLDERS else ""
    if not item.is_file(follow_symlinks=False):
        return "FIFOs, sockets and devices"
    if not ending_of(item.name, suffixes):
        ending = os.path.splitext(item.name)[1]
        plain = ending.isascii() and ending[1:].isalnum() and len(ending) <= 12
        return f"files ending in {ending}" if plain else "files of other endings"
    return "" if os.access(item.path, os.R_OK) else "unreadable files"


def _few_endings(reasons: Counter[str]) -> Counter[str]:
    """The same with the rarest endings counted together, so that no folder fills the report."""
    few = Counter()
    endings = 0
    for reason, count in sorted(reasons.items(), key=lambda item: (-item[1], item[0])):
        if reason.startswith("files ending in "):
            endings += 1
            reason = reason if endings <= MAX_ENDINGS else "files of other endings"
        few[reason] += count
    return few


def counted(left_out: dict[str, int]) -> str:
    """Reasons with their counts, for people."""
    return "; ".join(f"{reason}: {count:,}" for reason, count in left_out.items())


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
    left_out: what is left out of folders. passed_over: what the files of the last pass hold besides documents.
    taken: files and their bytes on the disk, by ending.
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
        self.left_out: Counter[str] = Counter()
        self.passed_over: Counter[str] = Counter()
        self.taken: dict[str, dict[str, int]] = {}
        named = set(options.sources)
        for name, path in list_files(options.sources, self.left_out, options.out, options.suffixes):
            if is_remote(name):
                self._download(name)
            elif path is None:
                self.files.append((name, None))
                self._gather(name)
            elif name in named or self._is_text(path):
                self.files.append((name, path))
                self._count(path)
                self.described.append({"path": name, "bytes": path.stat().st_size})
                if path.name.startswith(f"{published.DOCUMENTS}.jsonl"):
                    published.check_documents(path)
        if not self.files:
            raise PrepareError(
                f"{' '.join(options.sources)}: there is no text in it (left out: {counted(self.left_out)})"
            )

    def _is_text(self, path: Path) -> bool:
        """Whether a file of a folder is text, as its ending says. If not, it is counted and the first few are named."""
        ending = ending_of(path.name, self.options.suffixes)
        if ending == ".parquet" or ending.startswith(".jsonl"):
            return True
        try:
            check_plain(path)
        except NotText as error:
            self.left_out[error.kind] += 1
            number = self.left_out["binary files"] + self.left_out[NOT_UTF8]
            if self.report and number <= MAX_NAMED:
                self.report.say(printable(f"left out: {error}"))
            return False
        return True

    def _count(self, path: Path) -> None:
        row = self.taken.setdefault(ending_of(path.name, self.options.suffixes), {"files": 0, "bytes": 0})
        row["files"] += 1
        row["bytes"] += path.stat().st_size

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
        self.passed_over.clear()
        for name, path in self.files:
            if path is None:
                yield from (document.text for document in self.builtin[name])
            else:
                yield from read_texts(path, self.options.max_document_bytes, self.options.text_field, self.passed_over)

    def _split_by_place(self) -> Iterator[str]:
        number, self.duplicates = -1, 0
        first = self.first or 0
        for number, text in enumerate(self._texts()):
            mark = text_hash(text.encode("utf-8", "surrogatepass"), self.options.seed)
            if number < first:
                self.known[mark] = "val"
            elif text and mark in self.known:
                self.duplicates += 1
                continue
            yield text
        if number < first:
            raise PrepareError(
                f"--val-documents {first}: {' '.join(self.options.sources)}: there are only "
                f"{number + 1} documents, and training needs some too"
            )


def validation_documents(options: Options) -> int | None:
    """How many of the first documents validate, or None where a hash decides. Raises PrepareError."""
    listed_files = list_files(options.sources, None, options.out, options.suffixes)
    names = [path.name if path else name for name, path in listed_files]
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

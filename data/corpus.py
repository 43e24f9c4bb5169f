"""English prose that every machine has once the requirements are installed: the source called `builtin`.

It consists of the documentation inside Python's standard library, torch, numpy, sympy and networkx: docstrings, the
texts of `pydoc_data.topics`, and the strings given to calls such as `add_docstr`. Files are parsed with `ast` and never
imported or run, so reading torch costs what reading text costs, and has no side effects.

A document is a top-level object with everything inside it: a module's docstring, a function, a class with its methods,
one `add_docstr` call, or one topic. Documents that share a passage are in one group, and a split by groups keeps such
passages out of the other side.

    python data/corpus.py            # prints how much there is, by package
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import gc
import hashlib
import importlib.util
import inspect
import multiprocessing
import os
import re
import signal
import sys
import sysconfig
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

PACKAGES = ("networkx", "numpy", "python", "sympy", "torch")

# Folders that hold tests, other people's packages, or nothing to read; then the parts of a package that some
# distributions leave out: without them the corpus depends on versions alone, not on who packaged Python.
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "testing", "idle_test", "_vendor", "__pycache__", "site-packages", "dist-packages", "lib-dynload"}
)
SKIPPED_AT_ROOT = {
    "python": frozenset({"idlelib", "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip"}),
    "numpy": frozenset({"distutils", "f2py"}),
}
SKIPPED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize")

# Functions that attach documentation to an object written in C, where no docstring can stand.
DOC_CALLS = frozenset(
    {
        "add_docstr",
        "_add_docstr",
        "add_docstr_all",
        "add_docstring",
        "add_newdoc",
        "_array_method_doc",
        "add_newdoc_for_scalar_type",
    }
)

MIN_DOCUMENT_BYTES = 400
SHARED_WORDS = 30  # Two documents with this many words in a row in common belong to one group.
MAX_HEADER = 100


@dataclasses.dataclass(frozen=True)
class Document:
    """One text: `name` says where it comes from, `group` is equal for documents that share a passage."""

    name: str
    text: str
    group: str


@dataclasses.dataclass(frozen=True)
class Gathered:
    """What `gather` found: the documents in a stable order, the number of files read, and those not parsed."""

    documents: tuple[Document, ...]
    files: int
    unparsed: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Section:
    """One piece of documentation inside a document, with the line that names what it documents."""

    header: str
    body: str


# ---------------------------------------------------------------------------------------------------- where it is


def package_root(package: str) -> Path:
    """The folder of an installed top-level package, found without importing it; `python` is the standard library."""
    if package == "python":
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"package {package} is not installed: pip install -r requirements.txt", name=package)
    return Path(spec.origin).parent


def source_files(package: str) -> list[Path]:
    """The Python files of a package that may hold documentation for readers, sorted by their path inside it."""
    root = package_root(package)
    found = []
    for folder, folders, names in os.walk(root):
        skipped = SKIPPED_FOLDERS | (SKIPPED_AT_ROOT.get(package, frozenset()) if Path(folder) == root else frozenset())
        folders[:] = [name for name in folders if name not in skipped]
        found += [Path(folder, name) for name in names if name.endswith(".py") and not name.startswith(SKIPPED_FILES)]
    return sorted(found, key=lambda path: path.relative_to(root).parts)


# ------------------------------------------------------------------------------------------------ one file's texts


def clean(text: str) -> str:
    """Documentation without the indentation of the code around it, and without blanks at the ends of lines."""
    lines = [line.rstrip() for line in inspect.cleandoc(text).split("\n")]
    return "\n".join(lines).strip("\n").encode("utf-8", "replace").decode("utf-8")


def signature(name: str, node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """`name(a, b=1, *rest)`: no annotations, no self, long defaults as `...`, so that it stays one short line."""
    parameters = node.args
    positional = [*parameters.posonlyargs, *parameters.args]
    defaults = [None] * (len(positional) - len(parameters.defaults)) + list(parameters.defaults)
    words = [_parameter(argument, default) for argument, default in zip(positional, defaults, strict=True)]
    if words and positional[0].arg in ("self", "cls"):
        words = words[1:]
    if parameters.vararg:
        words.append("*" + parameters.vararg.arg)
    elif parameters.kwonlyargs:
        words.append("*")
    words += [_parameter(a, d) for a, d in zip(parameters.kwonlyargs, parameters.kw_defaults, strict=True)]
    if parameters.kwarg:
        words.append("**" + parameters.kwarg.arg)
    while words and len(name) + len(", ".join(words)) > MAX_HEADER:
        words = words[: -2 if words[-1] == "..." else -1] + ["..."]
        if len(words) == 1:
            break
    return f"{name}({', '.join(words)})"


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    if default is None:
        return argument.arg
    value = ast.unparse(default)
    return f"{argument.arg}={value if len(value) <= 20 else '...'}"


def object_sections(node: ast.AST, prefix: str = "") -> Iterator[Section]:
    """The docstrings of a class or function and of all that is defined inside it, in source order."""
    name = prefix + node.name
    is_class = isinstance(node, ast.ClassDef)
    body = ast.get_docstring(node, clean=False)
    if body and body.strip():
        yield Section(_header(node, name), clean(body))
    for inner in _definitions(node.body):
        # A function's local functions are named alone, as they are in its text; a method after its class.
        yield from object_sections(inner, name + "." if is_class else "")


def _header(node: ast.AST, name: str) -> str:
    if isinstance(node, ast.ClassDef):
        makers = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
        return signature(name, makers[0]) if makers else name
    attribute = any(
        getattr(decorator, "id", getattr(decorator, "attr", "")).endswith(("property", "setter"))
        for decorator in node.decorator_list
    )
    return name if attribute else signature(name, node)


def _definitions(body: Iterable[ast.stmt]) -> Iterator[ast.AST]:
    """Classes and functions among statements, also where `if`, `try`, `with` or a loop stands around them."""
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        else:
            yield from _definitions(_inner_statements(node))


def _inner_statements(node: ast.stmt) -> Iterator[ast.stmt]:
    for field in ("body", "handlers", "orelse", "finalbody"):  # The order in which they stand in the source.
        for inner in getattr(node, field, ()):
            yield from inner.body if isinstance(inner, ast.ExceptHandler) else [inner]


def _call_sections(node: ast.stmt) -> Iterator[Section]:
    """The documentation in a statement such as `add_docstr(torch.abs, "...")` or `abs = _add_docstr(..., "...")`."""
    call = node.value if isinstance(node, (ast.Expr, ast.Assign, ast.AnnAssign)) else None
    if not isinstance(call, ast.Call):
        return
    function = getattr(call.func, "id", getattr(call.func, "attr", ""))
    if function not in DOC_CALLS or not call.args:
        return
    texts = [text for argument in call.args[1:] for text in _argument_texts(argument)]
    if texts:
        name = call.args[0]
        names = [name.value if isinstance(name, ast.Constant) else ast.unparse(name)]
        if function == "add_newdoc":  # add_newdoc(module, object, doc), or (attribute, doc) in the place of doc.
            inner = call.args[2].elts if isinstance(call.args[-1], ast.Tuple) else []
            names += [item.value for item in [call.args[1], *inner[:1]] if isinstance(item, ast.Constant)]
        yield Section(".".join(map(str, names)), "\n\n".join(texts))


def _argument_texts(argument: ast.expr) -> Iterator[str]:
    """The strings in one argument that are sentences rather than names."""
    items = argument.elts if isinstance(argument, (ast.Tuple, ast.List)) else [argument]
    for item in items:
        text = clean(_constant_text(item))
        if len(text) > 40 and " " in text:
            yield text


def _constant_text(node: ast.expr) -> str:
    """A string written as a constant, a concatenation, or a template whose fields then stand for themselves."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.BinOp):
        return _constant_text(node.left) + (_constant_text(node.right) if isinstance(node.op, ast.Add) else "")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        text = _constant_text(node.func.value)
        if node.func.attr == "format":
            text = re.sub(r"(?<!\{)\{(\w+)\}(?!\})", r"\1", text).replace("{{", "{").replace("}}", "}")
        return text
    return ""


def _topic_texts(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield str(key.value), value.value


def read_documents(source: bytes, module: str) -> list[tuple[str, list[Section]]]:
    """The documents of one file as (name, sections), in source order.

    Raises SyntaxError or ValueError if the file is not Python.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Invalid escapes in other people's strings are not ours to report.
        tree = ast.parse(source)
    if module.endswith("pydoc_data.topics"):
        return [(f"{module}:{key}", [Section("", clean(text))]) for key, text in _topic_texts(tree)]
    documents = []
    body = ast.get_docstring(tree, clean=False)
    if body and body.strip():
        documents.append((module, [Section(module, clean(body))]))
    documents += [(f"{module}:{name}", sections) for name, sections in _top_level(tree.body)]
    return documents


def _top_level(body: Iterable[ast.stmt]) -> Iterator[tuple[str, list[Section]]]:
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, list(object_sections(node))
            continue
        for section in _call_sections(node):
            yield section.header, [section]
        yield from _top_level(_inner_statements(node))


def _read_files(package: str, root: str, paths: list[str]) -> list[tuple[str, list | None]]:
    """For each file its name and documents, or None if it can't be parsed. Runs in worker processes."""
    results = []
    enabled = gc.isenabled()
    gc.disable()  # A syntax tree is a million small objects without cycles; scanning them costs a third of the time.
    try:
        for path in paths:
            relative = Path(path).relative_to(root)
            parts = relative.with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            module = ".".join(parts if package == "python" else (package, *parts))
            try:
                documents = read_documents(Path(path).read_bytes(), module)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                documents = None
            results.append((f"{package}/{relative.as_posix()}", documents))
    finally:
        if enabled:
            gc.enable()
    return results


# ------------------------------------------------------------------------------------------------- all files' texts


def gather(packages: Iterable[str] = PACKAGES, workers: int = 1, min_bytes: int = MIN_DOCUMENT_BYTES) -> Gathered:
    """Read every document of the packages, in an order that depends on nothing but their files.

    Documents of fewer than `min_bytes` UTF-8 bytes, and passages that an earlier document holds word for word, are
    left out. Raises ModuleNotFoundError if a package is not installed.
    """
    jobs = []
    for package in sorted(set(packages)):
        root, files = str(package_root(package)), [str(path) for path in source_files(package)]
        jobs += [(package, root, files[start : start + 64]) for start in range(0, len(files), 64)]
    named, unparsed = [], []
    count = 0
    for results in map_in_order(_read_job, jobs, workers):
        for name, documents in results:
            count += 1
            named += documents or []
            if documents is None:
                unparsed.append(name)
    texts = list(_without_repeats(named, min_bytes))
    groups = group_by_passages([text for _, text in texts])
    documents = tuple(Document(name, text, group) for (name, text), group in zip(texts, groups, strict=True))
    return Gathered(documents, count, tuple(unparsed))


def _read_job(job: tuple[str, str, list[str]]) -> list[tuple[str, list | None]]:
    return _read_files(*job)


def _without_repeats(named: Iterable[tuple[str, list[Section]]], min_bytes: int) -> Iterator[tuple[str, str]]:
    """Documents as text. Copied docstrings are common (aliases, overloads, subclasses): the first one stays."""
    seen = set()
    for name, sections in named:
        parts = []
        for section in sections:
            if section.body in seen:
                continue
            seen.add(section.body)
            # Documentation of compiled functions opens with their signature, which makes a header of ours redundant.
            last = section.header.split("(")[0].split(".")[-1]
            named_already = not section.header or section.body.startswith(last + "(")
            parts.append(section.body if named_already else f"{section.header}\n\n{section.body}")
        text = "\n\n\n".join(parts)
        if len(text.encode()) >= min_bytes:
            yield name, text + "\n"


# ---------------------------------------------------------------------------------------------------------- groups


def group_by_passages(texts: list[str], words: int = SHARED_WORDS) -> list[str]:
    """A group label for each text: two texts with `words` words in a row in common are in one group, transitively.

    Words are runs of letters, digits and underscores, compared without case. Every window is looked at, none is
    sampled; windows are compared by 64-bit hashes, so that an accident could only merge two groups, never part one.
    Equal texts share a group whatever their length. A label is the smallest hash of a text in the group.
    """
    digests = [hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest() for text in texts]
    parents = list(range(len(texts)))
    first = {}
    for index, digest in enumerate(digests):
        _join(parents, index, first.setdefault(digest, index))
    hashes, owners = _windows(texts, words)
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    # Neighbours with equal hashes link their texts; the same pair many times over is one link.
    same = (hashes[1:] == hashes[:-1]) & (owners[1:] != owners[:-1])
    for left, right in np.unique(np.stack([owners[:-1][same], owners[1:][same]]), axis=1).T.tolist():
        _join(parents, left, right)
    labels = {}
    for index, digest in enumerate(digests):
        root = _root(parents, index)
        labels[root] = min(labels.get(root, digest), digest)
    return [labels[_root(parents, index)] for index in range(len(texts))]


def _windows(texts: list[str], words: int) -> tuple[np.ndarray, np.ndarray]:
    """uint64 hashes of all windows of all texts, and for each the index of its text."""
    word_hash = functools.lru_cache(maxsize=1 << 20)(_word_hash)
    hashes, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for index, text in enumerate(texts):
        values = np.array([word_hash(word) for word in re.findall(r"\w+", text.lower())], np.uint64)
        count = len(values) - words + 1
        if count < 1:
            continue
        total = np.zeros(count, np.uint64)
        for offset in range(words):  # A polynomial in an odd base, modulo 2**64: the order of the words matters.
            total = total * np.uint64(0x9E3779B97F4A7C15) + values[offset : offset + count]
        hashes.append(total)
        owners.append(np.full(count, index))
    return np.concatenate(hashes), np.concatenate(owners)


def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _root(parents: list[int], index: int) -> int:
    while parents[index] != index:
        parents[index] = parents[parents[index]]
        index = parents[index]
    return index


def _join(parents: list[int], left: int, right: int) -> None:
    left, right = _root(parents, left), _root(parents, right)
    parents[max(left, right)] = min(left, right)


# ------------------------------------------------------------------------------------------------------- processes


def map_in_order(function: Callable, items: Iterable, workers: int) -> Iterator:
    """`map` over processes: results in the order of the items, and no more than a few items per worker in memory.

    With one worker all runs in this process. Processes are spawned, which is safe whatever threads this one has;
    they ignore Ctrl-C (the parent ends them) and end themselves when the parent is gone.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_worker)
    pending = deque()
    try:
        for item in items:
            # A process started here inherits the mask, and so does not even in its first moments die of Ctrl-C.
            held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                pending.append(pool.submit(function, item))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, held)
            if len(pending) > 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def main() -> int:
    """Print how many documents and bytes each package holds, and how many groups there are."""
    gathered = gather(workers=os.cpu_count() or 1)
    for package in PACKAGES:
        texts = [d.text for d in gathered.documents if _package_of(d) == package]
        print(f"{package}: {len(texts):,} documents, {sum(len(text.encode()) for text in texts):,} bytes")
    groups = len({document.group for document in gathered.documents})
    print(f"{gathered.files:,} files read, {len(gathered.unparsed)} not parsed, {groups:,} groups")
    return 0


def _package_of(document: Document) -> str:
    name = re.split(r"[.:]", document.name)[0]
    return name if name in PACKAGES else "python"


if __name__ == "__main__":
    sys.exit(main())

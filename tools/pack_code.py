"""Makes the script that ships: minified and compressed, in one file that unpacks itself when it is run or imported.

    python tools/pack_code.py [train_gpt.py] [--out packed/train_gpt.py]

The packed script runs like the readable one, with python or torchrun; only --help does not say what knobs mean, which
docs/knobs.md does. It unpacks with the standard library alone.
Functions keep their names, and the source of every line stays available, for tracebacks and for Triton, which compiles
the source text of a kernel. The same script always gives the same bytes, which are kept in the user's cache folder. A
packed script is returned unchanged. Pack with the oldest Python that must run it: newer versions write f-strings that
3.11 cannot read.
"""

from __future__ import annotations

import argparse
import ast
import bz2
import contextlib
import hashlib
import lzma
import os
import re
import sys
import tempfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT, WORTH = 16, 1 << 16  # packed scripts in the cache; bytes of a source from which on it takes seconds to pack
HEADER = b"#coding:l1 packed by tools/pack_code.py\n"
# The data are raw bytes, and the source's encoding, Latin-1, maps each byte to a character. Base 85 would add 25%.
# The unpacked lines are registered in linecache under a name of their own, where Triton's `inspect`, torch.compile and
# tracebacks find them. Before Python 3.13 the interpreter prints source lines of an uncaught error from files only, so
# the hook uses `traceback`. The `exec` follows the data on a line of its own, so that a traceback can show it.
READER = """import linecache,sys,traceback,%s as _
_=_.decompress('''%s'''.encode('l1')).decode()
linecache.cache['<'+__file__+'>']=len(_),None,[x+'\\n'for x in _.split('\\n')],''
if __name__=='__main__':sys.excepthook=traceback.print_exception
exec(compile(_,'<'+__file__+'>','exec'))
"""


class Unannotated(ast.NodeTransformer):
    """Removes annotations from functions without decorators. A decorator may read them, as Triton's does."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        a = node.args
        if not node.decorator_list:
            node.returns = None
            for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))):
                argument.annotation = None
        self.generic_visit(node)
        return node


class Unexplained(ast.NodeTransformer):
    """Removes what a knob means, the second argument of `knob`: like a docstring, it is for the readable script."""

    def visit_Call(self, node: ast.Call) -> ast.Call:
        if isinstance(node.func, ast.Name) and node.func.id == "knob" and len(node.args) > 1:
            node.args[1] = ast.Constant("")
        self.generic_visit(node)
        return node


def kept_names(tree: ast.AST) -> list[str]:
    """Local names that must not be shortened: functions and classes, for tracebacks, and all names in Triton kernels.

    A kernel's constants are passed by name. If one were renamed, it would become a variable.
    """
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            if any(ast.unparse(decorator).split("(")[0].endswith("jit") for decorator in node.decorator_list):
                names |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                names |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
    return sorted(names)


def minify(source: str) -> str:
    """The program with short local names, without comments, docstrings, meanings of knobs and spaces.

    Errors: SyntaxError, ImportError.
    """
    import python_minifier

    tree = Unexplained().visit(Unannotated().visit(ast.parse(source)))
    # Strings and arithmetic stay in place, because in a kernel they are constants. A dataclass needs its annotations.
    return python_minifier.minify(
        ast.unparse(tree),
        remove_literal_statements=True,
        remove_annotations=False,
        hoist_literals=False,
        constant_folding=False,
        rename_globals=False,
        rename_locals=True,
        preserve_locals=kept_names(tree),
    )


def compressions(data: bytes) -> dict[str, bytes]:
    """The data compressed by each module of the standard library, by the module's name."""
    filters = [dict(id=lzma.FILTER_LZMA1, preset=9 | lzma.PRESET_EXTREME, pb=0)]  # pb=0: text has no aligned words
    return dict(
        lzma=lzma.compress(data, format=lzma.FORMAT_ALONE, filters=filters),
        bz2=bz2.compress(data),
        zlib=zlib.compress(data, 9),
    )


def literal(data: bytes) -> bytes:
    """Bytes as the content of a '''-quoted string in a Latin-1 source, with escapes where Python needs them."""
    for byte, escape in (
        (rb"\\", rb"\\\\"),
        (rb"\0(?=[0-7])", rb"\\000"),
        (rb"\0", rb"\\0"),
        (rb"\r", rb"\\r"),
        (rb"'(?='|\Z)", rb"\\'"),
    ):
        data = re.sub(byte, escape, data)
    return data


def cache_file(source: bytes) -> Path | None:
    """Where the packed form of a source is kept, so that each run of a sweep does not pack it again."""
    import python_minifier

    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pack_code"
        versions = f"{sys.version} {getattr(python_minifier, '__version__', '')}".encode()
        mark = hashlib.sha256(b"\0".join([versions, Path(__file__).read_bytes(), source])).hexdigest()
    except (OSError, RuntimeError):  # no home
        return None
    return folder / f"{mark}.py"


def kept(file: Path) -> bytes | None:
    """The content of a file of the cache, if it is whole: its first line is the SHA-256 of the rest."""
    try:
        mark, _, content = file.read_bytes().partition(b"\n")
    except OSError:
        return None
    return content if mark == hashlib.sha256(content).hexdigest().encode() else None


def keep(file: Path, content: bytes) -> None:
    """Adds a file to the cache, and removes the oldest of more than KEPT. Without a place for it, nothing is kept."""
    with contextlib.suppress(OSError):
        write_atomic(file, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
        files = sorted(file.parent.glob("*.py"), key=lambda path: path.stat().st_mtime)
        for old in files[:-KEPT]:
            old.unlink()


def pack(source: bytes) -> bytes:
    """The script that ships. Errors: SyntaxError or ValueError if the source is not Python; ImportError."""
    if source.startswith(HEADER):
        return source
    file = cache_file(source) if len(source) >= WORTH else None
    packed = kept(file) if file else None
    if packed is None:
        packed = packed_anew(source)
        if file:
            keep(file, packed)
    return packed


def packed_anew(source: bytes) -> bytes:
    """The script that ships, from its source. Errors: as those of `pack`."""
    text = minify(source.decode())
    before, between, after = READER.encode().split(b"%s")
    return min(
        (
            HEADER + before + codec.encode() + between + literal(data) + after
            for codec, data in compressions(text.encode()).items()
        ),
        key=len,
    )


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a temporary file beside the target and renames it, so that no reader sees a partial file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def main(arguments: list[str]) -> int:
    """Packs a script. Returns the exit code: 2 for a user's error, after one line that explains it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("script", nargs="?", type=Path, default=ROOT / "train_gpt.py")
    parser.add_argument(
        "--out", type=Path, help="packed script (default: packed/ plus the script's name, in the current folder)"
    )
    options = parser.parse_args(arguments)
    out = options.out or Path("packed", options.script.name)
    try:
        source = options.script.read_bytes()
        if out.exists() and out.samefile(options.script):
            raise OSError(0, "would be written over: it is the script itself", str(out))
        packed = pack(source)
        write_atomic(out, packed)
    except OSError as error:
        print(f"error: {error.filename2 or error.filename or out}: {error.strerror}", file=sys.stderr)
    except (SyntaxError, ValueError) as error:
        print(f"error: {options.script}: is not a Python script ({str(error).splitlines()[0]})", file=sys.stderr)
    except ImportError as error:
        print(f"error: {error}: run `pip install -r requirements.txt`", file=sys.stderr)
    else:
        print(f"{out}: {len(packed)} bytes, from {len(source)} of {options.script}")
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

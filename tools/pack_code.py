"""Make the script that ships: minified, compressed, in one file that unpacks itself when it is run or imported.

    python tools/pack_code.py [train_gpt.py] [--out packed/train_gpt.py]

The packed script is run as the readable one is, by python or torchrun, and needs the standard library alone to unpack.
Functions keep their names, and each of its lines can be shown: in a traceback, and to Triton, which compiles a
kernel's source text. The same script gives the same bytes; a packed script is already packed, and is given back.
Pack with the oldest Python that is to run it: newer ones write f-strings that 3.11 cannot read.
"""

from __future__ import annotations

import argparse
import ast
import bz2
import lzma
import os
import re
import sys
import tempfile
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADER = b"#coding:l1 packed by tools/pack_code.py\n"
# The data are raw bytes, which the source's encoding, Latin-1, reads as characters: base 85 would add a quarter. The
# unpacked lines are registered under a name of their own: Triton's `inspect`, torch.compile and tracebacks find them
# there. An interpreter before 3.13 prints an uncaught error's lines from files alone, `traceback` prints these too.
# What is run stands behind the data on a line of its own, which a traceback can show.
READER = """import linecache,sys,traceback,%s as _
_=_.decompress('''%s'''.encode('l1')).decode()
linecache.cache['<'+__file__+'>']=len(_),None,[x+'\\n'for x in _.split('\\n')],''
if __name__=='__main__':sys.excepthook=traceback.print_exception
exec(compile(_,'<'+__file__+'>','exec'))
"""


class Unannotated(ast.NodeTransformer):
    """Takes the annotations off functions without decorators: a decorator may read them, as Triton's does."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        a = node.args
        if not node.decorator_list:
            node.returns = None
            for argument in (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))):
                argument.annotation = None
        self.generic_visit(node)
        return node


def kept_names(tree: ast.AST) -> list[str]:
    """Local names that stay: of functions and classes, for tracebacks, and all those in Triton's kernels.

    A kernel's constants are given by name, and a shorter name for one would be a variable, no constant.
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
    """The program without comments, docstrings and spaces, its local names short. Errors: SyntaxError, ImportError."""
    import python_minifier

    tree = Unannotated().visit(ast.parse(source))
    # Strings and arithmetic stay where they are: in a kernel they are constants. A dataclass reads its annotations.
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
    """The data as each of the standard library's compressors leaves them, by the module that reads them."""
    filters = [dict(id=lzma.FILTER_LZMA1, preset=9 | lzma.PRESET_EXTREME, pb=0)]  # pb=0: text, no aligned words
    return dict(
        lzma=lzma.compress(data, format=lzma.FORMAT_ALONE, filters=filters),
        bz2=bz2.compress(data),
        zlib=zlib.compress(data, 9),
    )


def literal(data: bytes) -> bytes:
    """Bytes as the inside of a string between ''' in a Latin-1 source: what Python would not read as it is, escaped."""
    for byte, escape in (
        (rb"\\", rb"\\\\"),
        (rb"\0(?=[0-7])", rb"\\000"),
        (rb"\0", rb"\\0"),
        (rb"\r", rb"\\r"),
        (rb"'(?='|\Z)", rb"\\'"),
    ):
        data = re.sub(byte, escape, data)
    return data


def pack(source: bytes) -> bytes:
    """The script that ships. Errors: SyntaxError or ValueError where the source is not Python; ImportError."""
    if source.startswith(HEADER):
        return source
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
    """Writes a file under a temporary name beside it and renames it: a reader never sees half of it."""
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
    """Packs a script. Returns the exit code: 2 for what a user can mend, with one line that says how."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("script", nargs="?", type=Path, default=ROOT / "train_gpt.py")
    parser.add_argument("--out", type=Path, help="default: packed/ and the script's name, in the current folder")
    options = parser.parse_args(arguments)
    out = options.out or Path("packed", options.script.name)
    try:
        source = options.script.read_bytes()
        if out.exists() and out.samefile(options.script):
            raise OSError(0, "would be written over: it is the script", str(out))
        packed = pack(source)
        write_atomic(out, packed)
    except OSError as error:
        print(f"error: {error.filename2 or error.filename or out}: {error.strerror}", file=sys.stderr)
    except (SyntaxError, ValueError) as error:
        print(f"error: {options.script}: is not a Python script ({str(error).splitlines()[0]})", file=sys.stderr)
    except ImportError as error:
        print(f"error: {error}: `pip install -r requirements.txt` installs what this needs", file=sys.stderr)
    else:
        print(f"{out}: {len(packed)} bytes, from {len(source)} of {options.script}")
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

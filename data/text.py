"""Where to cut a text, and its hash; JSON that any parser takes; lines for the terminal."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn


def cut(data: bytes, limit: int) -> int:
    """Where to end a piece of at most `limit` bytes of a longer UTF-8 text: after a blank line, a line, or a space.

    Only the second half is searched, so that pieces are not tiny; without any of the three, between two characters.
    """
    for mark in (b"\n\n", b"\n", b" "):
        found = data.rfind(mark, limit // 2, limit)
        if found >= 0:
            return found + len(mark)
    end = limit
    while end > max(1, limit - 3) and data[end] & 0xC0 == 0x80:
        end -= 1
    return end


def printable(text: str) -> str:
    """A line for the terminal: what is no printable character of it, as a name of a file may hold, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shell_quoted(text: str) -> str:
    """A word of a command for the terminal, which a shell reads as `text` whatever it holds."""
    if all(map(_can_be_shown, text)):
        return shlex.quote(text)
    escapes = "".join(c if _can_be_shown(c) and c not in "\\'" else _escape(c) for c in text)
    return f"$'{escapes}'"


def _can_be_shown(character: str) -> bool:
    """Whether the terminal shows a character as itself."""
    try:
        character.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return character.isprintable()


def python_command() -> str:
    """This Python as it can be called from the current folder: `.venv/bin/python` rather than a long path."""
    path = Path(sys.executable)
    folder = Path.cwd()
    if path.is_relative_to(folder):
        return shell_quoted(str(path.relative_to(folder)))
    return shell_quoted(str(path)) if path.name else "python"


def _escape(character: str) -> str:
    return "".join(f"\\x{value:02x}" for value in os.fsencode(character))


def to_json(value: Any, **options: Any) -> str:
    """A value as JSON. Raises ValueError for a number that JSON does not have: NaN or an infinity."""
    return json.dumps(value, allow_nan=False, **options)


def from_json(data: bytes | str) -> Any:
    """What a JSON text says. Raises ValueError for what is no JSON (NaN is none), or is nested too deeply."""
    try:
        return json.loads(data, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number of JSON")


def text_hash(data: bytes, seed: int) -> int:
    """A number below 2**64 that decides a document's side; equal texts have equal ones."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little")

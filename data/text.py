"""Where to cut a text, and its hash; JSON that any parser takes; lines for the terminal."""

from __future__ import annotations

import hashlib
import json
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

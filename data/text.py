"""Where to cut a text, and its hash."""

from __future__ import annotations

import hashlib


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


def text_hash(data: bytes, seed: int) -> int:
    """A number below 2**64 that decides a document's side; equal texts have equal ones."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=seed.to_bytes(8, "little")).digest(), "little")

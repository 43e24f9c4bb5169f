"""Reading files that a stranger wrote, and showing what they say: nothing hangs, memory is bounded, text stays text.

All tools read through here. A file is read only if it is a plain file, not a FIFO, a device or a socket; if it is not
over the limit of its kind; and if no link leads from it out of the folder that it belongs to. JSON is read with limits
on depth and digits, and a schema keeps of it what has the right type. What is not read or kept is named in one line.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 1 << 20
# Bytes that are read of a file of each kind: some ten times the largest that a run or a submission writes.
LIMITS = {
    "page": MIB,  # README.md, a template
    "script": 4 * MIB,
    "json": 4 * MIB,
    "study": 16 * MIB,
    "log": 64 * MIB,
    "metrics": 32 * MIB,
    "artifact": 256 * MIB,
}
LINE = 8192  # bytes that are read of a line of a log
DEPTH, VALUES = 32, 500_000  # of a JSON text: nested arrays and objects, values in all
ENTRIES = 2000  # of a folder that are looked at
DIGITS = 18  # of a whole number: it fits into 64 bits
LARGEST = 10.0**DIGITS  # of any figure, so that sums, squares and products of figures are finite
SHOWN = 300  # characters of a stranger's text in a message


class UserError(Exception):
    """A user's error: one line that names the argument or file, its value, and what is allowed. Exit code 2."""


class Unreadable(UserError):
    """A file that is passed over. `reason` says why, without its name."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason

    def name_in(self, folder: Path) -> str:
        """The file's name within a folder."""
        return str(self.path.relative_to(folder) if self.path.is_relative_to(folder) else self.path)


# ---------------------------------------------------------------------------------------------------------- plain files


def kind_of(mode: int) -> str:
    """What a file is, in words; empty for a plain one."""
    for test, words in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a FIFO"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if test(mode):
            return words
    return "" if stat.S_ISREG(mode) else "no plain file"


def real_path(path: Path, inside: Path | None) -> str:
    """The path without links. Errors: Unreadable for loops, for nothing there, and for a way out of `inside`."""
    try:
        real = os.path.realpath(path, strict=True)
        home = os.path.realpath(path.parent if inside is None else inside, strict=True)
    except (OSError, ValueError) as error:
        raise Unreadable(path, reason_of(error)) from None
    if inside is not None and os.path.commonpath([real, home]) != home:
        raise Unreadable(path, "is a link that leads out of its folder")
    return real


def reason_of(error: Exception) -> str:
    """Why the system did not open a file."""
    return f"cannot be read ({getattr(error, 'strerror', None) or error})"


def open_plain(path: Path, inside: Path | None = None) -> int:
    """A descriptor of a plain file. It never waits: not for a FIFO's writer, not for a device. Errors: Unreadable."""
    real = real_path(path, inside)
    try:
        if words := kind_of(os.stat(real).st_mode):  # some devices act when they are opened
            raise Unreadable(path, f"is {words}")
        handle = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        raise Unreadable(path, reason_of(error)) from None
    if words := kind_of(os.fstat(handle).st_mode):  # it was replaced in between
        os.close(handle)
        raise Unreadable(path, f"is {words}")
    return handle


def wrong_kind(path: Path, inside: Path) -> str:
    """What is wrong with a folder's entry as a file to read, in words; empty: nothing. Errors: Unreadable."""
    words = kind_of(os.stat(real_path(path, inside)).st_mode)
    if not words:
        os.close(open_plain(path, inside))
    return f"is {words}" if words else ""


def chunks(path: Path, kind: str, inside: Path | None) -> Iterator[bytes]:
    """The bytes of a plain file. Errors: Unreadable, also for more bytes than files of this kind may have."""
    handle, total = open_plain(path, inside), 0
    limit = LIMITS[kind]
    try:
        if os.fstat(handle).st_size > limit:
            raise Unreadable(path, f"has {os.fstat(handle).st_size} bytes, more than the {limit} that are read")
        while part := os.read(handle, MIB):
            total += len(part)
            if total > limit:  # it grows, or does not say its size
                raise Unreadable(path, f"has more than the {limit} bytes that are read")
            yield part
    except OSError as error:
        raise Unreadable(path, reason_of(error)) from None
    finally:
        os.close(handle)


def read_bytes(path: Path, kind: str = "json", inside: Path | None = None) -> bytes:
    """The bytes of a plain file, within the limit of its kind. Errors: Unreadable."""
    return b"".join(chunks(path, kind, inside))


def read_text(path: Path, kind: str = "page", inside: Path | None = None) -> str:
    """The text of a plain file; bytes that are not UTF-8 become U+FFFD. Errors: Unreadable."""
    return read_bytes(path, kind, inside).decode("utf-8", "replace")


def read_lines(path: Path, kind: str = "log", inside: Path | None = None, most: int = LINE) -> Iterator[str]:
    """The lines of a plain file without their ends; of a longer line, the first `most` bytes. Errors: Unreadable."""
    held = b""
    for part in chunks(path, kind, inside):
        *whole, rest = part.split(b"\n")
        if whole:
            whole[0] = held + whole[0]
            held = b""
        yield from (line[:most].decode("utf-8", "replace") for line in whole)
        held = (held + rest)[:most]
    if held:
        yield held.decode("utf-8", "replace")


def read_ends(path: Path, most: int = 4 * MIB) -> str:
    """The text of a plain file, without the middle of a very long one. Errors: Unreadable."""
    handle = open_plain(path)
    try:
        size = os.fstat(handle).st_size
        parts = [os.pread(handle, most, 0), os.pread(handle, most, max(most, size - most))]
    except OSError as error:
        raise Unreadable(path, reason_of(error)) from None
    finally:
        os.close(handle)
    return b"".join(parts).decode("utf-8", "replace")


def file_sha256(path: Path, inside: Path | None = None) -> str:
    """The SHA-256 of a plain file, in hex. Errors: Unreadable."""
    digest = hashlib.sha256()
    for part in chunks(path, "artifact", inside):
        digest.update(part)
    return digest.hexdigest()


def file_size(path: Path, inside: Path | None = None) -> int:
    """Bytes of a plain file, however many. Errors: Unreadable."""
    handle = open_plain(path, inside)
    try:
        return os.fstat(handle).st_size
    finally:
        os.close(handle)


def read_head(path: Path, count: int) -> bytes:
    """The first bytes of a plain file of any size. Errors: Unreadable."""
    handle = open_plain(path)
    try:
        return os.read(handle, count)
    except OSError as error:
        raise Unreadable(path, reason_of(error)) from None
    finally:
        os.close(handle)


def is_plain(path: Path, inside: Path | None = None) -> bool:
    """Whether a plain file is there that may be opened."""
    try:
        os.close(open_plain(path, inside))
    except Unreadable:
        return False
    return True


def new_lines(path: Path, kind: str, begin: int) -> tuple[list[bytes], int]:
    """The whole lines of a growing file from a place on, and the place behind them; none where it is no plain file."""
    if not is_plain(path):
        return [], begin
    with open(path, "rb") as content:
        content.seek(begin)
        data = content.read(LIMITS[kind])
    whole = data[: data.rfind(b"\n") + 1]  # the last line may be incomplete
    return whole.splitlines(), begin + len(whole)


def is_there(path: Path) -> bool:
    """Whether the folder has an entry of this name, of whatever kind."""
    return os.path.lexists(path)


def entries(folder: Path, problems: list[str] | None = None) -> list[Path]:
    """The entries of a folder, sorted by name. Of very many, the first that the system names, and a problem."""
    try:
        with os.scandir(folder) as found:
            names = [entry.name for entry in itertools.islice(found, ENTRIES + 1)]
    except (OSError, ValueError) as error:
        raise Unreadable(folder, reason_of(error)) from None
    if len(names) > ENTRIES:
        names.pop()
        if problems is not None:
            problems.append(f"{folder.name}: has more than {ENTRIES} entries; the rest is passed over")
    return sorted(folder / name for name in names)


def recorded_path(value: object, folder: Path) -> Path:
    """A path of a config.json, which is absolute or relative to its folder.

    In those of older runs it is relative to where the run was started: it is taken as it is where that exists.
    """
    named = Path(str(value))
    return folder / named if (folder / named).exists() else named


# ----------------------------------------------------------------------------------------------------------------- JSON


def whole_number(text: str) -> int | None:
    """A whole number of ASCII digits; None for one with more digits than any figure has, or for other text."""
    return int(text) if re.fullmatch(r"[-+]?[0-9]+", text) and len(text) <= DIGITS else None


def parse_json(text: str | bytes, problems: list[str] | None = None, decimal: Callable[[str], float] = float) -> Any:
    """The value of a JSON text. A key that is given twice is a problem, or an error without a list of problems.

    Numbers of very many digits become floats, and infinite where they overflow. Errors: ValueError.
    """
    repeated: dict[str, None] = {}

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(items)
        if len(content) != len(items):
            seen: set[str] = set()
            repeated.update((key, None) for key, _ in items if key in seen or seen.add(key))
        return content

    try:
        value = json.loads(
            text,
            object_pairs_hook=pairs,
            parse_float=decimal,
            parse_int=lambda digits: int(digits) if len(digits) <= 2 * DIGITS else float(digits),
        )
    except RecursionError:
        raise ValueError(f"more than {DEPTH} nested values") from None
    check_size(value)
    for key in itertools.islice(repeated, 20):
        if problems is None:
            raise ValueError(f"it has the key {visible(key, 40)!r} twice")
        problems.append(f"has the key {visible(key, 40)!r} twice")
    return value


def check_size(value: Any) -> None:
    """Errors: ValueError for a value that nests too deeply, or holds too many values."""
    level, total = [value], 0
    for _ in range(DEPTH):
        total += len(level)
        if total > VALUES:
            raise ValueError(f"more than {VALUES} values")
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise ValueError(f"more than {DEPTH} nested values")


def read_json(
    path: Path,
    inside: Path | None = None,
    problems: list[str] | None = None,
    kind: str = "json",
    decimal: Callable[[str], float] = float,
) -> Any:
    """A JSON file, with its decimal numbers as `decimal` makes them. Errors: Unreadable naming it."""
    content = read_bytes(path, kind, inside)
    try:
        return parse_json(content.decode("utf-8"), problems, decimal)
    except ValueError as error:
        raise Unreadable(path, f"is not JSON ({visible(str(error), 100)})") from None


def read_object(
    path: Path,
    inside: Path | None = None,
    problems: list[str] | None = None,
    decimal: Callable[[str], float] = float,
) -> dict[str, Any]:
    """A JSON file that holds an object. Errors: Unreadable."""
    content = read_json(path, inside, problems, decimal=decimal)
    if not isinstance(content, dict):
        raise Unreadable(path, "must hold a JSON object")
    return content


# -------------------------------------------------------------------------------------------------------------- schemas


@dataclass(frozen=True)
class Kind:
    """The values that a field may have: in words, and as a function to the value to keep, or to None for a wrong one.

    `null`: whether the field may be null, or absent.
    """

    words: str
    keep: Callable[[Any], Any]
    null: bool = True


def is_number(value: Any) -> bool:
    """Whether a value is a finite figure, small enough to compute with. A bool is none."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and (isinstance(value, int) or math.isfinite(value))
        and abs(value) <= LARGEST
    )


def number_from(low: float, words: str, whole: bool = False) -> Kind:
    """A kind of figures from `low` on."""

    def keep(value: Any) -> Any:
        return value if is_number(value) and value >= low and (isinstance(value, int) or not whole) else None

    return Kind(words, keep)


NUMBER = number_from(-LARGEST, "a finite number")
AMOUNT = number_from(0, "a number of at least 0")
COUNT = number_from(0, "a whole number of at least 0", True)
POSITIVE = number_from(1, "a whole number of at least 1", True)
INTEGER = number_from(-LARGEST, "a whole number", True)
FLAG = Kind("true or false", lambda value: value if isinstance(value, bool) else None)
TEXT = Kind("text", lambda value: value if isinstance(value, str) else None)
OBJECT = Kind("an object", lambda value: value if isinstance(value, dict) else None)


def list_of(kind: Kind, most: int = 10_000) -> Kind:
    """A list of values of a kind."""

    def keep(value: Any) -> Any:
        if not isinstance(value, list) or len(value) > most:
            return None
        kept = [kind.keep(item) for item in value]
        return None if any(item is None for item in kept) else kept

    return Kind(f"a list, each {kind.words}", keep)


def map_of(kind: Kind, most: int = 10_000) -> Kind:
    """An object of any keys with values of a kind."""

    def keep(value: Any) -> Any:
        if not isinstance(value, dict) or len(value) > most:
            return None
        kept = {name: kind.keep(item) for name, item in value.items()}
        return None if any(item is None for item in kept.values()) else kept

    return Kind(f"an object, each {kind.words}", keep)


def record(fields: dict[str, Kind], needed: tuple[str, ...] = ()) -> Kind:
    """An object with these fields, of which some are needed; null ones and other fields are dropped."""

    def keep(value: Any) -> Any:
        if not isinstance(value, dict) or any(value.get(name) is None for name in needed):
            return None
        kept = {
            name: None if value[name] is None else k.keep(value[name]) for name, k in fields.items() if name in value
        }
        return None if any(kept[name] is None and value[name] is not None for name in kept) else kept

    return Kind(f"an object with {', '.join(fields)}", keep)


def either(one: Kind, other: Kind) -> Kind:
    """Values of one kind or of another."""

    def keep(value: Any) -> Any:
        kept = one.keep(value)
        return other.keep(value) if kept is None else kept

    return Kind(f"{one.words} or {other.words}", keep)


def checked(content: Any, schema: dict[str, Kind], where: str, problems: list[str]) -> dict[str, Any]:
    """The fields of an object that are in the schema and of their kind. The others are problems, named by `where`."""
    if not isinstance(content, dict):
        problems.append(f"{where}: must be an object")
        return {}
    kept = {}
    for name, kind in schema.items():
        value = content.get(name)
        if value is None:
            if name in content and not kind.null:
                problems.append(f"{where}: {name} must be {kind.words}, and is null")
            continue
        good = kind.keep(value)
        if good is None:
            problems.append(f"{where}: {name} must be {kind.words}, and is {brief(value)}")
        else:
            kept[name] = good
    return kept


def brief(value: Any) -> str:
    """A wrong value for a message."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    return visible(repr(value) if isinstance(value, str) else str(value), 60)


# ----------------------------------------------------------------------------------------------------------------- text


def visible(text: Any, most: int = SHOWN) -> str:
    """Text for a terminal: control codes, bidirectional overrides and line breaks as escapes; a long text cut."""
    text = str(text)
    cut = f"... ({len(text)} characters)" if len(text) > most else ""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most]) + cut


# What begins markup anywhere in a line; an underscore within a word does not.
MARKDOWN = re.compile(r"[\\`*<>\[\]|~&$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.I)


def markdown(text: Any, most: int = SHOWN) -> str:
    """Text for a page of Markdown that shows as it is: no table cell, link, picture, HTML or code begins in it."""
    return MARKDOWN.sub(lambda match: "\\" + match[0], visible(text, most))


# What moves the cursor, hides text or turns its direction around; most invisible letters belong to some script.
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def without_controls(text: str) -> str:
    """Text of any script for a terminal, with its line breaks, but control codes as escapes."""
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), text)

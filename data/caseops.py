"""CaseOps: text whose ASCII capitals are written as operators and small letters, so that `The` and `the` share a piece.

    The HTTP server of McDonald's   ->   <TITLE>the <ALLCAPS>http server of <TITLE>mc<CAPNEXT>donald's

Four private-use characters are the operators. They act on maximal runs of ASCII letters; nothing else ever changes:

- a run of small letters stays as it is;
- two or more letters, all capitals: ALLCAPS, and the run in small letters;
- else TITLE if the first letter is a capital, and the run in small letters with CAPNEXT before each later capital;
- an operator that the text itself holds: ESC, and that operator.

This is the transform of the challenge's public CaseOps data (openai/parameter-golf). It is one to one: `decode`
inverts `encode` on every string, and refuses every string that `encode` does not write.
"""

from __future__ import annotations

import re

import numpy as np

TITLE = "\ue001"
ALLCAPS = "\ue002"
CAPNEXT = "\ue003"
ESC = "\ue004"
OPERATORS = {"TITLE": TITLE, "ALLCAPS": ALLCAPS, "CAPNEXT": CAPNEXT, "ESC": ESC}
OPERATOR = f"[{''.join(OPERATORS.values())}]"

# Both patterns first take one character of a fixed set and only then look around it: so the regex engine skips all
# other text fast. In the first, the name of the group that is reached says which operator to write.
CAPITALS = re.compile(
    rf"""
    (?: [A-Z] | {OPERATOR} )
    (?: (?<=[A-Za-z][A-Z]) (?P<CAPNEXT>)
    |   (?<=[A-Z]) [A-Z]++ (?![a-z]) (?P<ALLCAPS>)
    |   (?<=[A-Z]) (?P<TITLE>)
    |   (?P<ESC>) )""",
    re.VERBOSE,
)
# What `encode` writes for them, with all that it depends on; a match of one character is something else.
OPERATIONS = re.compile(
    rf"""
    (?: [A-Z] | {OPERATOR} )
    (?: (?<={CAPNEXT}) (?<=[a-z].) [a-z]
    |   (?<={ALLCAPS}) (?<![a-z].) [a-z]{{2,}}+ (?!{CAPNEXT})
    |   (?<={TITLE}) (?<![a-z].) [a-z] (?! (?:{CAPNEXT}[a-z])++ (?![a-z]) )  # A run of capitals alone has ALLCAPS.
    |   (?<={ESC}) {OPERATOR}
    |   )""",
    re.VERBOSE,
)


class CaseOpsError(ValueError):
    """A text that `encode` does not write; the message says where (index in characters) and why."""


def encode(text: str) -> str:
    """Any string with its ASCII capitals as operators and small letters."""
    return CAPITALS.sub(lambda match: OPERATORS[match.lastgroup] + match[0].lower(), text)


def decode(text: str) -> str:
    """The one string whose `encode` is this text. Raises CaseOpsError if there is none."""
    return OPERATIONS.sub(_original, text)


def _original(match: re.Match) -> str:
    """What an operator and its letters stand for; an escaped operator has no upper case of its own."""
    if len(match[0]) == 1:
        raise CaseOpsError(f"position {match.start()}: {_fault(match.string, match.start())}")
    return match[0][1:].upper()


def _fault(text: str, at: int) -> str:
    """Why the capital or operator at this index can't stand there."""
    name = {operator: name for name, operator in OPERATORS.items()}.get(text[at])
    after_letter = bool(re.match("[a-z]", text[at - 1])) if at else False
    if name is None:
        return f"the capital {text[at]} in encoded text"
    if name == "ESC":
        return "ESC without an operator after it"
    if after_letter != (name == "CAPNEXT"):
        return f"{name} {'inside' if after_letter else 'outside'} a word"
    if not re.match("[a-z]", text[at + 1 :]):
        return f"{name} without a small letter after it"
    if name == "TITLE":
        return "TITLE and CAPNEXT in a word of capitals, which has ALLCAPS"
    return "ALLCAPS before a single letter" if not re.match("[a-z]{2}", text[at + 1 :]) else "CAPNEXT after ALLCAPS"


def original_bytes(ids: np.ndarray, widths: np.ndarray, operators: dict[str, int]) -> np.ndarray:
    """UTF-8 bytes of the original text that each token of its encoded form stands for.

    ids: [n] tokens of whole documents, in which each operator is a token of its own.
    widths: [n] UTF-8 bytes of the tokens themselves: the case of a letter does not change its bytes.
    operators: the token of each name in OPERATORS.
    Returns [n] of widths' type: 0 for an operator, unless ESC makes it a part of the text.
    """
    at, is_escape = np.arange(len(ids)), ids == operators["ESC"]
    # In a row of ESC tokens every second one, from the first on, escapes its successor.
    row_start = np.maximum.accumulate(np.where(is_escape, 0, at + 1))
    escapes = is_escape & ((at - row_start) % 2 == 0)
    literal = np.concatenate([[False], escapes[:-1]])
    return np.where(np.isin(ids, list(operators.values())) & ~literal, 0, widths)

"""CaseOps: an exact inverse on all strings and no others, and the original bytes of every token."""

import itertools
import random
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import examples

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
import caseops  # noqa: E402
import prepare  # noqa: E402

T, A, C, E = "\ue001", "\ue002", "\ue003", "\ue004"

# Letters of both cases, all operators, and what looks like a letter or a boundary to one notion of text or another.
NASTY = st.text(st.sampled_from(["a", "b", "A", "B", T, A, C, E, " ", "'", "é", "\n"]), max_size=16)
WORDS = st.lists(
    st.sampled_from(
        [
            "the",
            "The",
            "THE",
            "tHe",
            "I",
            "McDonald",
            "iPhone",
            "ABc",
            " ",
            " ",
            ", ",
            "_",
            "1",
            T,
            A,
            C,
            E,
            "É",
            "ß",
            "ﬁ",
            "e\u0301",
            "日本",
            "🙂",
            "▁",
            "\n\n",
        ]
    ),
    max_size=12,
).map("".join)
ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=24)  # Lone surrogates are among these characters.


def by_definition(text):
    """The transform as it is defined, one run of letters at a time."""

    def operated(match):
        run = match[0]
        if run in caseops.OPERATORS.values():
            return E + run
        if len(run) >= 2 and all("A" <= letter <= "Z" for letter in run):
            return A + run.lower()
        marks = "".join(C + letter.lower() if letter < "a" else letter for letter in run[1:])
        return (T + run[0].lower() if run[0] < "a" else run[0]) + marks

    return re.sub(r"[A-Za-z]+|[\ue001-\ue004]", operated, text)


# -------------------------------------------------------------------------------------------------------- the bijection


@pytest.mark.parametrize(
    ("text", "encoded"),
    [
        ("", ""),
        ("all small, 123.", "all small, 123."),
        ("The end", f"{T}the end"),
        ("I am", f"{T}i am"),
        ("a HTTP server", f"a {A}http server"),
        ("OK", f"{A}ok"),
        ("McDonald's", f"{T}mc{C}donald's"),
        ("iPhone", f"i{C}phone"),
        ("ABc", f"{T}a{C}bc"),
        ("aB", f"a{C}b"),
        ("aBC", f"a{C}b{C}c"),
        ("A1B", f"{T}a1{T}b"),
        ("snake_Case", f"snake_{T}case"),
        ("X\u0301AB", f"{T}x\u0301{A}ab"),  # A combining mark ends a run.
        ("ÉCOLE École", f"É{A}cole École"),
        ("Iİıi ßẞ ǅ ﬁ \u212a", f"{T}iİıi ßẞ ǅ ﬁ \u212a"),  # The last one is the Kelvin sign, no ASCII letter.
        (f"{T}", f"{E}{T}"),
        (f"{E}{E}A", f"{E}{E}{E}{E}{T}a"),
        (f"a{C}B", f"a{E}{C}{T}b"),
        ("\ue000\ue005\uf8ff", "\ue000\ue005\uf8ff"),
        ("\ud800A\udfff", f"\ud800{T}a\udfff"),
    ],
)
def test_worked_examples(text, encoded):
    assert caseops.encode(text) == encoded == by_definition(text)
    assert caseops.decode(encoded) == text


@examples(max_examples=1_000)  # beside every short string, below
@given(st.one_of(NASTY, WORDS, ANY_TEXT))
def test_decode_inverts_encode(text):
    encoded = caseops.encode(text)
    assert caseops.decode(encoded) == text
    assert encoded == by_definition(text) and not re.search("[A-Z]", encoded)


def is_decoded(text):
    """Whether `decode` takes the text; then it must be what `encode` makes of the result."""
    try:
        decoded = caseops.decode(text)
    except caseops.CaseOpsError as error:
        at = int(re.match(r"position (\d+): .", str(error))[1])
        assert re.match(rf"[A-Z{T}{A}{C}{E}]", text[at])
        return False
    assert caseops.encode(decoded) == text
    return True


@examples(max_examples=1_000)
@given(NASTY)
def test_decode_takes_only_what_encode_makes(text):
    is_decoded(text)


def test_every_short_string():
    """Whatever `decode` accepts is an encoding, whatever is an encoding is accepted, and none is met twice."""
    every = ["".join(letters) for n in range(6) for letters in itertools.product("aX " + T + A + C + E, repeat=n)]
    encodings = [caseops.encode(text) for text in every]
    assert len(set(encodings)) == len(every) and all(map(is_decoded, encodings))
    accepted = {text for text in every if is_decoded(text)}
    assert accepted == set(every) & {caseops.encode(caseops.decode(text)) for text in accepted}
    assert accepted >= set(every) & set(encodings)


def test_every_character():
    text = "".join(map(chr, range(0x110000)))
    assert caseops.decode(caseops.encode(text)) == text
    changed = [number for number in range(0x110000) if caseops.encode(chr(number)) != chr(number)]
    assert changed == [*range(ord("A"), ord("Z") + 1), *map(ord, caseops.OPERATORS.values())]


@pytest.mark.parametrize(
    ("text", "position", "reason"),
    [
        ("a B", 2, "the capital B in encoded text"),
        (f"x{E}", 1, "ESC without an operator after it"),
        (f"{E}a", 0, "ESC without an operator after it"),
        (f"{E}{E}{E}", 2, "ESC without an operator after it"),
        (f"{T}", 0, "TITLE without a small letter after it"),
        (f"é {T}é", 2, "TITLE without a small letter after it"),
        (f"{T}{T}a", 0, "TITLE without a small letter after it"),
        (f"a{T}b", 1, "TITLE inside a word"),
        (f"{T}a{T}b", 2, "TITLE inside a word"),
        (f"{T}a{C}b", 0, "TITLE and CAPNEXT in a word of capitals, which has ALLCAPS"),
        (f" {T}a{C}b{C}c d", 1, "TITLE and CAPNEXT in a word of capitals, which has ALLCAPS"),
        (f"{A} ab", 0, "ALLCAPS without a small letter after it"),
        (f"{A}a", 0, "ALLCAPS before a single letter"),
        (f"{A}a1b", 0, "ALLCAPS before a single letter"),
        (f"{A}a{C}b", 0, "ALLCAPS before a single letter"),
        (f"a{A}bc", 1, "ALLCAPS inside a word"),
        (f"{A}ab{A}cd", 3, "ALLCAPS inside a word"),
        (f"{A}ab{T}c", 3, "TITLE inside a word"),
        (f"{A}ab{C}c", 0, "CAPNEXT after ALLCAPS"),
        (f"{C}a", 0, "CAPNEXT outside a word"),
        (f"é{C}a", 1, "CAPNEXT outside a word"),
        (f"{E}{T}{C}a", 2, "CAPNEXT outside a word"),
        (f"a{C}", 1, "CAPNEXT without a small letter after it"),
        (f"a{C}{C}b", 1, "CAPNEXT without a small letter after it"),
    ],
)
def test_what_encode_does_not_write_is_refused(text, position, reason):
    with pytest.raises(caseops.CaseOpsError) as refused:
        caseops.decode(text)
    assert str(refused.value) == f"position {position}: {reason}" and isinstance(refused.value, ValueError)


# ------------------------------------------------------------------------------------------------------ original bytes


@pytest.fixture(scope="module")
def codec():
    """A tokenizer of 340 pieces, trained on encoded prose."""
    words = [
        "the",
        "The",
        "THE",
        "of",
        "and",
        "And",
        "river",
        "River",
        "stone",
        "iPhone",
        "McDonald",
        "HTTP",
        "I",
        "words",
        "Words,",
        "end.\n",
        "is",
        "Is",
    ]
    generator = random.Random(0)
    sample = [" ".join(generator.choices(words, k=60)) for _ in range(50)]
    return prepare.Codec(prepare.train_tokenizer(sample, 340, with_caseops=True)[0], with_caseops=True)


def bytes_by_walking(processor, text, ids):
    """Original bytes of each token, by going through the encoded text's bytes and the tokens side by side."""
    encoded, weights, escaped = caseops.encode(text), [], False
    for character in encoded:
        operates = character in caseops.OPERATORS.values() and not escaped
        escaped = character == E and operates
        weights += [0 if operates else 1] * len(character.encode())
    counts, at = [0], 0
    for place, number in enumerate(ids[1:]):
        piece = "x" if processor.is_byte(number) else processor.id_to_piece(number).replace("▁", " ")
        size = len(piece.encode()) - (place == 0 and piece[0] == " ")  # SentencePiece's own space before a text.
        counts.append(sum(weights[at : at + size]))
        at += size
    assert at == len(weights) == len(encoded.encode())
    return counts


@examples(max_examples=500)
@given(text=st.one_of(st.text(max_size=24), WORDS, NASTY, st.text(alphabet=f"{E}{T}aA ", max_size=24)))
def test_bytes_of_every_token(codec, text):
    ids = codec.encode(text)
    counts = codec.token_bytes(ids)
    assert counts.tolist() == bytes_by_walking(codec.processor, text, ids.tolist())
    assert counts.sum() == len(text.encode()) and counts[0] == 0
    assert caseops.decode(codec.processor.decode(ids[1:].tolist())) == text


def test_operators_are_tokens_of_their_own(codec):
    names = {number: name for name, number in codec.operators.items()}

    def spelled(text):
        ids = codec.encode(text)[1:].tolist()
        return [names.get(number, codec.processor.id_to_piece(number)) for number in ids]

    assert spelled("The river") == ["▁", "TITLE", "the", "▁river"]
    assert spelled("the  River") == ["▁the", "▁", "▁", "TITLE", "river"]
    assert spelled(f"{T} the{E}{E}The") == ["▁", "ESC", "TITLE", "▁the", "ESC", "ESC", "ESC", "ESC", "TITLE", "the"]
    assert codec.token_bytes(codec.encode("the  River")).tolist() == [0, 3, 1, 1, 0, 5]
    assert codec.token_bytes(codec.encode(f"{T} the{E}{E}The")).tolist() == [0, 0, 0, 3, 4, 0, 3, 0, 3, 0, 3]
    assert not any(set(codec.processor.id_to_piece(n)) & set(names.values()) for n in range(340) if n not in names)


def test_bytes_of_documents_in_a_row(codec):
    texts = ["The THE", f"{E}", f"{E}{E}{T}A", "", "iPhone 日本 ▁"]
    parts = [codec.encode(text) for text in texts]
    counts = codec.token_bytes(np.concatenate(parts))
    ends = np.cumsum([len(part) for part in parts])
    assert [part.sum() for part in np.split(counts, ends[:-1])] == [len(text.encode()) for text in texts]
    assert len(codec.token_bytes(np.zeros(0, np.uint16))) == 0

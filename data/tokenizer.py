"""Trains a SentencePiece tokenizer, and encodes text of any length with it, exactly and in constant memory.

`Codec` accepts only tokenizers whose pieces have a space nowhere but in front. So the tokens of a text are those of its
words, each with the space before it, and a word has the same tokens wherever it stands. Most words of a text have
occurred before: looking up their tokens is several times as fast as encoding them again.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import sentencepiece

import caseops
from errors import PrepareError
from text import cut

PAD = 0
BOS = 1
EOS = 2
UNK = 3
FIXED_PIECES = 4 + 256  # pad, bos, eos, unk, and a piece for each byte
MAX_VOCAB = 65535
SPACE = "\u2581"  # SentencePiece writes a space as this character

TRAINING_LINE_BYTES = 4000  # SentencePiece aborts on words of more than 65,535 characters, so feed it short lines
CHARACTER_COVERAGE = 0.9995  # of the sample; other characters are written as bytes

SEGMENT_CHARACTERS = 256 << 10  # of a document that are encoded at a time: SentencePiece takes 50 bytes for each
SEARCHED_CHARACTERS = 4 << 10  # in front of a segment's end, for a place between words or pieces to end it at
CACHED_WORD_CHARACTERS = 64
CACHED_WORDS = 1 << 18  # about 60 MB; then every second one is forgotten, and learned again where it is frequent
BOS_TOKEN = np.array(BOS, "<u2").tobytes()
NO_TOKENS = np.empty(0, np.int32)
# Where the two parts of a word, each written by CaseOps, are not what it writes for the word.
INSIDE_CAPITALS = re.compile("[A-Z][A-Za-z]|[a-z][A-Z]")
MIN_VOCAB = 300
NOT_TEXT = b"\xff"  # The bytes of a token that stands for no text: no UTF-8 holds this one.


def train_tokenizer(sample: Iterable[str], vocab_size: int, with_caseops: bool = False) -> tuple[bytes, dict]:
    """Train SentencePiece BPE on texts. Returns the model file's bytes and the options that made it."""
    symbols = list(caseops.OPERATORS.values()) if with_caseops else []
    lines = []
    documents = size = 0
    for text in sample:
        documents, size = documents + 1, size + len(text.encode("utf-8", "ignore"))
        lines += _training_lines(caseops.encode(text) if with_caseops else text)
    rare = _rare_characters(lines, (vocab_size - FIXED_PIECES - len(symbols)) * 3 // 4, symbols)
    translated = (line.decode().translate(rare) for line in lines)
    if not any(line.strip("\r\n") for line in translated):
        raise PrepareError("the training text holds no words to train a tokenizer on; give more text")
    # As many threads on any machine: the pieces do not depend on the number, but the model file holds it.
    options: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": vocab_size,
        "pad_id": PAD,
        "bos_id": BOS,
        "eos_id": EOS,
        "unk_id": UNK,
        "byte_fallback": True,
        "split_digits": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": True,
        "character_coverage": 1.0,
        "max_sentence_length": 2 * TRAINING_LINE_BYTES,
        "num_threads": 4,
    } | ({"user_defined_symbols": symbols} if symbols else {})
    model = io.BytesIO()
    raised: list[BaseException] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(lines, rare, raised),
            model_writer=model,
            minloglevel=3,
            **options,
        )
    except RuntimeError as error:
        raise raised[0] if raised else _training_error(str(error), vocab_size) from None
    sizes = {"sample_documents": documents, "sample_bytes": size}
    return model.getvalue(), {**options, **sizes, "removed_characters": len(rare)}


def _sentences(lines: Iterable[bytes], rare: dict[int, None], raised: list[BaseException]) -> Iterator[str]:
    """The lines of text without rare characters.

    SentencePiece makes a RuntimeError of its own of what is raised here, as by a signal: `raised` keeps the first.
    """
    try:
        for line in lines:
            sentence = line.decode().translate(rare)
            if sentence.strip("\r\n"):
                yield sentence
    except GeneratorExit:
        raise
    except BaseException as error:
        raised.append(error)
        raise


def _training_lines(text: str) -> Iterator[bytes]:
    """A text in pieces of UTF-8 that the trainer takes."""
    data = text.encode("utf-8", "ignore")
    start = 0
    while start < len(data):
        piece = data[start : start + TRAINING_LINE_BYTES + 1]
        end = len(piece) if len(piece) <= TRAINING_LINE_BYTES else cut(piece, TRAINING_LINE_BYTES)
        yield piece[:end]
        start += end


def _rare_characters(lines: Iterable[bytes], most: int, symbols: Iterable[str]) -> dict[int, None]:
    """A table for `str.translate` that removes the characters which get no piece; `symbols` have theirs anyway.

    SentencePiece's own way (`character_coverage`) goes down to 0.98 only, where a text with thousands of characters
    does not fit a small vocabulary. It also skips every line that holds one of three characters that it uses itself.
    """
    counts = Counter()
    for line in lines:
        counts.update(line.decode())
    for symbol in symbols:
        counts.pop(symbol, None)
    reserved = {"\0", SPACE, "\u2585"}
    wanted = CHARACTER_COVERAGE * sum(counts.values())
    covered, kept = 0, {" "}
    for character, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= wanted or len(kept) >= most:
            break
        covered += count
        if character not in reserved:
            kept.add(character)
    return {ord(character): None for character in counts if character not in kept}


class TooLarge(PrepareError):
    """A vocabulary that the text does not support; `largest` is the size that SentencePiece names."""

    def __init__(self, vocab_size: int, largest: int):
        super().__init__(f"--vocab-size {vocab_size}: the training text supports at most {largest}")
        self.largest = largest


def train_largest(sample: list[str], vocab_size: int, with_caseops: bool = False) -> tuple[bytes, dict]:
    """`train_tokenizer` with at most `vocab_size` pieces: as many as the text supports. Raises PrepareError."""
    while True:
        try:
            return train_tokenizer(sample, vocab_size, with_caseops)
        except TooLarge as error:
            # With fewer pieces, fewer characters have one of their own, which may lower the limit again.
            vocab_size = min(error.largest, vocab_size - 1)
            if vocab_size < MIN_VOCAB:
                raise PrepareError(
                    f"the training text supports a tokenizer of {vocab_size} pieces, and {MIN_VOCAB} are needed; "
                    "give more text"
                ) from None


def _training_error(message: str, vocab_size: int) -> PrepareError:
    largest = re.search(r"value <= (\d+)", message)
    if largest:
        return TooLarge(vocab_size, int(largest[1]))
    return PrepareError(f"--vocab-size {vocab_size}: SentencePiece refused: {' '.join(message.split())}")


class Codec:
    """A tokenizer with what the score's arithmetic needs: exact encoding, and the bytes of every token."""

    def __init__(self, model: bytes, name: str = "tokenizer", with_caseops: bool = False):
        """Check the model's ids and pieces. Raises PrepareError, naming `name`, if the score would not be exact."""
        try:
            self.processor = sp = sentencepiece.SentencePieceProcessor()
            sp.load_from_serialized_proto(model)
            pieces = [sp.id_to_piece(number) for number in range(sp.vocab_size())]
        except (RuntimeError, TypeError, ValueError):
            raise PrepareError(f"{name}: not a SentencePiece model") from None
        self.vocab_size = sp.vocab_size()
        if self.vocab_size > MAX_VOCAB:
            raise PrepareError(f"{name}: {self.vocab_size} pieces; at most {MAX_VOCAB} fit the shards' format")
        ids = (sp.pad_id(), sp.bos_id(), sp.eos_id(), sp.unk_id())
        if ids != (PAD, BOS, EOS, UNK):
            raise PrepareError(f"{name}: pad, bos, eos, unk have the ids {ids}; they must have {(PAD, BOS, EOS, UNK)}")
        byte_ids = [sp.piece_to_id(f"<0x{value:02X}>") for value in range(256)]
        if not all(sp.is_byte(number) for number in byte_ids):
            raise PrepareError(f"{name}: it lacks byte pieces (byte_fallback)")
        self._measure(pieces, byte_ids, name)
        self._prepare_encoding(pieces, byte_ids, name)
        self.operators = self._operators(pieces, name) if with_caseops else None

    def _measure(self, pieces: list[str], byte_ids: list[int], name: str) -> None:
        """Tables of the tokens' texts and of their bytes in the score.

        Byte pieces stand for 1 byte, control, unknown and unused pieces for 0, others for their text. The space in
        front counts apart: it is a byte unless a piece of 0 bytes stands before it (SentencePiece puts a space
        before each text). `encode` needs every other piece to have no space but in front.
        """
        sp, numbers = self.processor, range(self.vocab_size)
        self.silent = np.array([sp.is_control(n) or sp.is_unknown(n) or sp.is_unused(n) for n in numbers])
        is_byte = np.array([sp.is_byte(n) for n in numbers])
        for piece, plain in zip(pieces, ~self.silent & ~is_byte, strict=True):
            if plain and SPACE in piece[1:]:
                raise PrepareError(
                    f"{name}: piece {piece!r} has a space that is not in front; words can't be told apart"
                )
        texts = [piece.replace(SPACE, " ").encode() for piece in pieces]
        for value, number in enumerate(byte_ids):
            texts[number] = bytes([value])
        for number in np.flatnonzero(self.silent):
            texts[number] = NOT_TEXT
        spaced = np.array([piece.startswith(SPACE) for piece in pieces])
        self.leading_space = spaced & ~self.silent & ~is_byte
        self.texts = np.array(texts, object)
        lengths = np.array([len(text) for text in texts])
        self.base_bytes = np.where(self.silent, 0, lengths - self.leading_space)

    def _prepare_encoding(self, pieces: list[str], byte_ids: list[int], name: str) -> None:
        """What `encode` needs besides the model: words met before, and a guard to encode parts of texts with.

        A model puts a space before each text, or trims it. What stands after a character that no piece holds is
        encoded as it is: of such a guard's tokens its bytes are the last.
        """
        alphabet = set("".join(pieces))
        self.guard = next(chr(n) for n in (*range(0xF8FF, 0xE004, -1), *range(0x800, 0xD800)) if chr(n) not in alphabet)
        written = self.processor.normalize("a")
        if written.endswith(SPACE) or " " in written:
            raise PrepareError(f"{name}: writes 'a' as {written!a}; the space that it adds must be U+2581, in front")
        tokens = self.processor.encode(self.guard)
        if tokens[-3:] != [byte_ids[value] for value in self.guard.encode()]:
            raise PrepareError(f"{name}: it does not write U+{ord(self.guard):04X}, which no piece holds, as its bytes")
        self.guard_tokens = len(tokens)
        self.prefix = " " if written.startswith(SPACE) else ""
        self.mark = np.array([byte_ids[value] for value in SPACE.encode()], "<u2").tobytes()
        # BPE's scores are ranks. A unigram model's are logarithms, whose rounded sums depend on what else is encoded.
        self.ranked = all(self.processor.get_score(number).is_integer() for number in range(self.vocab_size))
        self.pairs = {piece[at : at + 2] for piece in pieces for at in range(len(piece) - 1)}
        self.cache: dict[str, bytes] = {}

    def _operators(self, pieces: list[str], name: str) -> dict[str, int]:
        """The ids of CaseOps' operators. No other piece may hold one: then each is always a token of its own."""
        ids = {}
        for name_, symbol in caseops.OPERATORS.items():
            ids[name_] = self.processor.piece_to_id(symbol)
            if [piece for piece in pieces if symbol in piece] != [symbol] or self.silent[ids[name_]]:
                raise PrepareError(
                    f"{name}: --caseops needs the user-defined symbol U+{ord(symbol):04X} ({name_}), in no other piece"
                )
        return ids

    def token_bytes(self, ids: np.ndarray) -> np.ndarray:
        """[n] UTF-8 bytes of the text that each token stands for; the first id has nothing before it."""
        after_silent = np.concatenate([[True], self.silent[ids[:-1]]])
        widths = self.base_bytes[ids] + (self.leading_space[ids] & ~after_silent)
        return caseops.original_bytes(ids, widths, self.operators) if self.operators else widths

    def encode(self, document: str) -> np.ndarray | None:
        """BOS and the tokens of a document as uint16, or None if they don't stand for exactly this text."""
        parts = [self.encode_segment(*segment) for segment in self.segments(document)]
        exact = [part for part in parts if part is not None]
        return np.frombuffer(b"".join([BOS_TOKEN, *exact]), "<u2") if len(exact) == len(parts) else None

    def segments(self, document: str) -> Iterator[tuple[str, str]]:
        """The document in parts of at most SEGMENT_CHARACTERS, each with the character before it, if there is one.

        A part ends before a space, or else between two characters that follow each other in no piece: there the whole
        document's tokens are parted too. Where a text has neither for SEARCHED_CHARACTERS, its tokens at the cut may
        not be SentencePiece's own, but they decode to the same text.
        """
        start = 0
        while len(document) - start > SEGMENT_CHARACTERS:
            end = self._cut(document, start + SEGMENT_CHARACTERS)
            yield document[start:end], document[start - 1 : start] if start else ""
            start = end
        yield document[start:], document[start - 1 : start] if start else ""

    def _cut(self, document: str, end: int) -> int:
        """Where to end a segment, at `end` or before it."""
        first = end - SEARCHED_CHARACTERS
        space = document.rfind(" ", first, end)
        if space >= 0:
            return space
        places = [
            at for at in range(end, first, -1) if not (self.operators and INSIDE_CAPITALS.match(document, at - 1))
        ]
        return next((at for at in places if self._parted(*document[at - 1 : at + 1])), places[0] if places else end)

    def _parted(self, left: str, right: str) -> bool:
        """Whether no piece holds these two characters side by side."""
        if self.operators:
            left, right = caseops.encode(left)[-1], caseops.encode(right)[0]
        return left + right not in self.pairs

    def encode_segment(self, text: str, before: str = "") -> bytes | None:
        """A segment's tokens as uint16, or None if they don't stand for exactly this text after the character `before`.

        The tokens' texts put together are what SentencePiece decodes them to (but for the space that it drops in front
        of the first): a piece is its own text, a row of byte pieces its bytes as UTF-8. As no piece holds a part of a
        character, each row is whole characters if all together are. So the tokens' bytes add up to the text's, too.
        """
        if self.operators and INSIDE_CAPITALS.match(before + text[:1]):
            return None
        spaced = text if before or not text else self.prefix + text
        try:
            data = spaced.encode()
        except UnicodeEncodeError:  # An unpaired surrogate, which JSON can spell and UTF-8 can't.
            return None
        tokens = self._tokens(spaced)
        ids = np.frombuffer(tokens, "<u2")
        decoded = b"".join(self.texts[ids])
        try:
            exact = (caseops.decode(decoded.decode()) == spaced) if self.operators else decoded == data
        except ValueError:  # Not UTF-8, or not what CaseOps writes.
            exact = False
        if text and not before:  # The score counts no space in front of a document: one must be there, of the model's.
            exact = exact and self.leading_space[ids[0]] == bool(self.prefix)
        return tokens if exact else None

    def _tokens(self, text: str) -> bytes:
        """Tokens of a text that is encoded as it stands; of exactly this text if the model can write it.

        CaseOps writes what is between two spaces without looking beyond them, and so is remembered with the word.
        """
        head, *words = text.split(" ")
        missing = set(words).difference(self.cache)
        if missing:
            self._learn(missing)
        tokens = b"".join([self._spell(head), *map(self.cache.__getitem__, words)])
        for word in missing:
            if len(word) > CACHED_WORD_CHARACTERS:
                del self.cache[word]
        while len(self.cache) > CACHED_WORDS:
            for word in list(self.cache)[::2]:
                del self.cache[word]
        return tokens

    def _learn(self, words: set[str]) -> None:
        """Put the tokens of words, each with a space before it, into the cache: by one call where that is exact."""
        together = [word for word in words if SPACE not in word] if self.ranked else []
        text = self._written("".join(f" {word}" for word in together))
        ids = self._guarded(text)
        starts = (2 * np.flatnonzero(self.leading_space[ids])).tolist()
        if len(starts) == len(together) and b"".join(self.texts[ids]) == text.encode():
            tokens = ids.astype("<u2").tobytes()
            parts = map(tokens.__getitem__, map(slice, starts, [*starts[1:], len(tokens)]))
            self.cache.update(zip(together, parts, strict=True))
        for word in words.difference(self.cache):
            self.cache[word] = self._spell(f" {word}")

    def _spell(self, text: str) -> bytes:
        """Tokens of a text; its own U+2581, which SentencePiece takes for a space, as its three bytes."""
        parts = self._written(text).split(SPACE)
        return self.mark.join(self._guarded(part).astype("<u2").tobytes() for part in parts)

    def _written(self, text: str) -> str:
        return caseops.encode(text) if self.operators else text

    def _guarded(self, text: str) -> np.ndarray:
        """[n] int32 tokens of a text, without the space that a model puts before it."""
        return self.processor.encode(self.guard + text, return_type="numpy")[self.guard_tokens :] if text else NO_TOKENS

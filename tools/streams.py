"""Validation streams made for a proof: real documents put together, and changes that leave a stream's start alone.

A stream is a row of documents, each BOS and its text; one token more ends it, so that every token but the first is a
target. `tools/prove.py` gives pairs of them to a script that scores.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runs import UserError, shard_tokens, validation_shards, write_atomic

BOS, MAGIC = 1, 20240520
TEXT_LIMIT = 2_000_000  # tokens of a validation set that are read


@dataclass(frozen=True)
class Stream:
    """Tokens [n], and where a sidecar goes with them the bytes that each stands for [n]."""

    tokens: np.ndarray
    counts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, places: slice) -> Stream:
        return Stream(self.tokens[places], None if self.counts is None else self.counts[places])

    def __add__(self, other: Stream) -> Stream:
        return joined([self, other])

    @property
    def borders(self) -> np.ndarray:
        """Places of BOS [documents]."""
        return np.flatnonzero(self.tokens == BOS)

    def agreement(self, other: Stream) -> int:
        """Number of targets from the start in which both streams agree."""
        shorter = min(len(self), len(other))
        different = np.flatnonzero(self.tokens[:shorter] != other.tokens[:shorter])
        return int(different[0] if len(different) else shorter) - 1

    def write(self, folder: Path, tokenizer: Path) -> Path:
        """A data folder: the shard, its sidecar and the tokenizer."""
        write_shard(folder / "fineweb_val_000000.bin", self.tokens)
        if self.counts is not None:
            write_shard(folder / "fineweb_val_bytes_000000.bin", self.counts)
        shutil.copyfile(tokenizer, folder / "tokenizer.model")
        return folder


def joined(parts: list[Stream]) -> Stream:
    """Streams one after the other; with counts where all of them have counts."""
    counts = [part.counts for part in parts if part.counts is not None]
    tokens = np.concatenate([part.tokens for part in parts])
    return Stream(tokens, np.concatenate(counts) if len(counts) == len(parts) else None)


def write_shard(path: Path, values: np.ndarray) -> None:
    """A file in the challenge's format: 256 int32 of header, then the values as uint16."""
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, 1, len(values)
    write_atomic(path, header.tobytes() + values.astype("<u2").tobytes())


def read_stream(data: Path) -> Stream:
    """The first TEXT_LIMIT tokens of a folder's validation shards. Errors: UserError."""
    shards = validation_shards(data)
    if not shards or not shard_tokens(shards):
        raise UserError(f"--data {data}: holds no fineweb_val_*.bin to take documents from")
    sidecars = [path.with_name(path.name.replace("_val_", "_val_bytes_")) for path in shards]
    with_counts = all(path.is_file() for path in sidecars)
    if with_counts and shard_tokens(sidecars) != shard_tokens(shards):
        raise UserError(f"--data {data}: its fineweb_val_bytes_*.bin are not as long as its shards")

    def values(paths: list[Path]) -> np.ndarray:
        return np.concatenate([np.fromfile(p, "<u2", TEXT_LIMIT, offset=1024) for p in paths])[:TEXT_LIMIT]

    return Stream(values(shards), values(sidecars) if with_counts else None)


class Maker:
    """Makes streams from the documents of a text, and changes them. The same seed makes the same ones."""

    def __init__(self, text: Stream, widths: np.ndarray, ordinary: np.ndarray, seed: int):
        """widths [V]: bytes of each token's piece. ordinary [n]: the tokens that text may hold."""
        self.text, self.widths = text, widths
        self.ordinary, self.random = ordinary, np.random.default_rng(seed)
        self.place = self.rests = 0
        self.easy = ordinary[-1:]  # text that the model predicts well, once somebody knows it

    def of(self, tokens: np.ndarray) -> Stream:
        """A stream of these tokens, which count as many bytes as their pieces have."""
        counts = None if self.text.counts is None else np.where(tokens == BOS, 0, self.widths[tokens])
        return Stream(np.asarray(tokens, np.int64), counts)

    def real(self, targets: int) -> Stream:
        """The next so many tokens of the text; it begins anew at its end."""
        parts, missing = [], targets
        while missing > 0:
            part = self.text[self.place : self.place + missing]
            self.place = (self.place + len(part)) % len(self.text)
            parts.append(part)
            missing -= len(part)
        return joined(parts)

    def noise(self, targets: int) -> Stream:
        """Tokens drawn evenly from the vocabulary."""
        return self.of(self.random.choice(self.ordinary, targets))

    def document(self, targets: int) -> Stream:
        """One document of so many targets, of real text without its borders."""
        parts, missing = [self.of(np.array([BOS]))], targets - 1
        while missing > 0:
            part = self.real(missing)
            keep = part.tokens != BOS
            parts.append(Stream(part.tokens[keep], None if part.counts is None else part.counts[keep]))
            missing -= int(keep.sum())
        return joined(parts)

    def documents(self, lengths: list[int]) -> Stream:
        """Documents of these numbers of targets. The last one's end is not there yet."""
        return joined([self.document(length) for length in lengths])

    def lengths(self, targets: int, documents: int, longest: int) -> list[int]:
        """Numbers of targets: at least so many documents, one of the longest, many of one and two, in a mixed order."""
        typical = max(2, (targets - longest) // max(documents, 1))
        rest, lengths = targets - longest, []
        while rest > 0 or len(lengths) < documents:
            length = int(min(self.random.lognormal(np.log(typical), 1.2) + 1, max(rest, 2), longest))
            length = 1 if self.random.random() < 0.1 else length
            lengths.append(length)
            rest -= length
        middle = len(lengths) // 2
        return [*lengths[:middle], longest, *lengths[middle:]]

    def base(self, targets: int, documents: int, longest: int) -> Stream:
        """A stream of about so many targets."""
        return self.documents(self.lengths(targets, documents, longest)) + self.document(2)[1:]

    def echoes(self, stream: Stream) -> Stream:
        """The stream, where every other stretch of 24 tokens inside a document repeats an earlier one."""
        tokens, counts = stream.tokens.copy(), None if stream.counts is None else stream.counts.copy()
        for begin in range(48, len(tokens) - 24, 48):
            source = int(self.random.integers(0, begin - 24))
            if BOS not in tokens[begin : begin + 24] and BOS not in tokens[source : source + 24]:
                tokens[begin : begin + 24] = tokens[source : source + 24]
                if counts is not None:
                    counts[begin : begin + 24] = counts[source : source + 24]
        return Stream(tokens, counts)

    # ------------------------------------------------------------------------------------------------- the changes

    def inside(self, stream: Stream, low: float, high: float, least: int = 2) -> int:
        """A random place in a part of the stream, inside a document and not its first `least` places."""
        borders = stream.borders
        for _ in range(1000):
            place = int(self.random.integers(int(low * len(stream)), int(high * len(stream))))
            begin = borders[np.searchsorted(borders, place, side="right") - 1]
            if place - begin >= least and place + 2 < len(stream):
                return place
        raise UserError(
            f"--data: no document has {least} targets in this part of a stream; its documents are too short"
        )

    def changes(self, stream: Stream) -> Iterator[tuple[str, Stream]]:
        """What changes, and the changed stream; without end, each kind at ever new places."""
        kinds = (
            self.another_rest,
            self.another_rest_early,
            self.longer,
            self.earlier_border,
            self.other_text,
            self.appended,
            self.later_border,
            self.removed,
        )
        while True:
            for kind in kinds:
                yield kind.__name__.replace("_", " "), kind(stream)

    def another_rest(self, stream: Stream, early: bool = False) -> Stream:
        """From a place in any document on, short or long, all is another: text, borders, lengths, the stream's end.

        The rest is noise, what the model found easy, or real text: one of them moves any statistic of the rest.
        """
        borders = np.append(stream.borders, len(stream) - 1)
        begins, third = borders[:-1], 0.3 * len(stream)
        able = np.flatnonzero((np.diff(borders) >= 3) & ((begins < third) if early else (begins > third)))
        document = int(self.random.choice(able if len(able) else np.argmax(np.diff(borders))))
        place = int(self.random.integers(borders[document] + 2, borders[document + 1]))
        longest = int(np.diff(borders).max())
        lengths = [int(self.random.integers(1, longest)), *self.random.integers(1, 1 + longest // 2, 8).tolist()]
        rest = self.documents(lengths)[1:] + self.document(2)[1:]
        self.rests = (self.rests + 1) % 3
        if self.rests:
            noise, easy = self.random.choice(self.ordinary, len(rest)), np.resize(self.easy, len(rest))
            rest = self.of(np.where(rest.tokens == BOS, BOS, noise if self.rests == 1 else easy))
        return stream[:place] + rest

    def another_rest_early(self, stream: Stream) -> Stream:
        """The same from a place near the start: what learns from a stream's start must differ."""
        return self.another_rest(stream, early=True)

    def other_text(self, stream: Stream) -> Stream:
        """Noise from an early place on, within the same borders, so that most of the text is another."""
        place = self.inside(stream, 0.15, 0.5)
        noise = self.noise(len(stream) - place)
        borders = stream.tokens[place:] == BOS
        noise.tokens[borders] = BOS
        if noise.counts is not None:
            noise.counts[borders] = 0
        return stream[:place] + noise

    def earlier_border(self, stream: Stream) -> Stream:
        """A document ends at a place where it went on; its rest is a document of its own."""
        place = self.inside(stream, 0.3, 0.95, 40)
        return stream[:place] + self.of(np.array([BOS])) + stream[place:]

    def later_border(self, stream: Stream) -> Stream:
        """A document goes on where it ended: the next one's BOS is gone."""
        borders = stream.borders[1:]
        inner = borders[(borders > 0.3 * len(stream)) & (borders < 0.95 * len(stream))]
        place = int(self.random.choice(inner if len(inner) else borders))
        return stream[:place] + stream[place + 1 :]

    def longer(self, stream: Stream) -> Stream:
        """A long document in the middle goes on where it ended, as long as itself: all its scores must stay."""
        borders = np.append(stream.borders, len(stream))
        inner = np.flatnonzero(borders[1:] > 0.4 * len(stream))
        widest = inner[np.argsort(-np.diff(borders)[inner])[: max(1, len(inner) // 8)]]
        document = int(self.random.choice(widest))
        begin, end = borders[document : document + 2]
        return stream[:end] + self.noise(max(300, int(end - begin))) + stream[end:]

    def appended(self, stream: Stream) -> Stream:
        """More documents follow: the longest of all, and short ones."""
        longest = int(np.diff(np.append(stream.borders, len(stream))).max())
        lengths = [1, 3, 2 * longest, *self.random.integers(1, 60, 40).tolist()]
        return stream + self.documents(lengths) + self.document(2)[1:]

    def removed(self, stream: Stream) -> Stream:
        """The stream ends inside a document."""
        return stream[: self.inside(stream, 0.5, 0.9)]

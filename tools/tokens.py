"""A run's tokenizer: text to tokens, tokens to text piece by piece, and the bytes of text that each token stands for.
Also how a next token is sampled, and the settings with which a run's artifact is read.

data/prepare.py may have written case as operators (data/caseops.py). Then the tokenizer has a token for each of them,
and texts are transformed before they are encoded and after they are decoded.
"""

from __future__ import annotations

import codecs
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import caseops  # noqa: E402
import strangers  # noqa: E402
import train_gpt as tg  # noqa: E402
from strangers import UserError  # noqa: E402

LETTERS = re.compile(f"[A-Za-z{''.join(caseops.OPERATORS.values())}]*$")


class Tokenizer:
    """A run's SentencePiece model, and the text of each of its tokens. Errors: tg.ConfigError for another one."""

    def __init__(self, c: tg.Config):
        self.vocabulary = tg.Vocabulary(c)
        self.model, self.content = self.vocabulary.model, self.vocabulary.content
        m, ids = self.model, range(c.vocab_size)
        self.operators = {name: m.PieceToId(operator) for name, operator in caseops.OPERATORS.items()}
        self.caseops = m.unk_id() not in self.operators.values()
        silent = [i for i in ids if i != tg.BOS_ID and (m.IsControl(i) or m.IsUnknown(i) or m.IsUnused(i))]
        self.silent = torch.tensor(silent, dtype=torch.int64)  # never in training data, and not text
        self.bytes = {i for i in ids if m.IsByte(i)}
        self.unfit_after: dict[bytes, torch.Tensor] = {}
        self.pieces = [
            bytes([int(m.IdToPiece(i)[3:5], 16)]) if m.IsByte(i) else m.IdToPiece(i).replace("\u2581", " ").encode()
            for i in ids
        ]

    def encode(self, text: str) -> list[int]:
        """BOS and the text's tokens. Errors: UserError for a text with half a surrogate pair, which has no bytes."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not Unicode: its character {error.start + 1} has no bytes in UTF-8") from None
        return [tg.BOS_ID, *self.model.EncodeAsIds(caseops.encode(text) if self.caseops else text)]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of a document's tokens; BOS in front may be there or not."""
        tokens = list(ids)
        return "".join(self.stream(iter(tokens[1:] if tokens[:1] == [tg.BOS_ID] else tokens), whole=True))

    def stream(self, tokens: Iterator[int], whole: bool = False) -> Iterator[str]:
        """The text of a document's tokens after BOS, in pieces. Each piece is final when it is yielded.

        `whole`: no token is missing at the end. Otherwise a character whose last bytes are missing is left out.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        first, held = True, ""
        for token in tokens:
            piece = self.pieces[token]
            held += decoder.decode(piece.removeprefix(b" ") if first else piece)  # the first mark is not a space
            first = False
            if not self.caseops:
                yield held
                held = ""
            elif (match := LETTERS.search(held)) and (stop := match.start()):  # an operator acts on its whole word
                yield original(held[:stop])
                held = held[stop:]
        if whole:
            held += decoder.decode(b"", True)
        yield original(held) if self.caseops else held

    def unfinished(self, held: bytes, token: int) -> bytes:
        """The bytes of a character that has more of them, after such bytes and a token."""
        return begin_of_character(held + self.pieces[token]) or b"" if token in self.bytes else b""

    def unfit(self, held: bytes) -> torch.Tensor:
        """Tokens that no text has after these bytes of an unfinished character: others would break it."""
        if held not in self.unfit_after:
            ids = range(len(self.pieces)) if len(self.bytes) == 256 else ()
            bad = [i for i in ids if (begin_of_character(held + self.pieces[i]) is None if i in self.bytes else held)]
            self.unfit_after[held] = torch.tensor(sorted({*self.silent.tolist(), *bad}), dtype=torch.int64)
        return self.unfit_after[held]

    def target_bytes(self, ids: np.ndarray) -> np.ndarray:
        """Bytes of text that each token after the first stands for: [n - 1], as a score counts them."""
        counts = self.vocabulary.target_bytes(ids[:-1], ids[1:])
        return caseops.original_bytes(ids[1:], counts, self.operators) if self.caseops else counts


def begin_of_character(data: bytes) -> bytes | None:
    """What bytes of UTF-8 hold after whole characters: the beginning of one, or nothing. None: no text has them."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        decoder.decode(data)
    except UnicodeDecodeError:
        return None
    held = decoder.getstate()[0]
    # The first two bytes of a surrogate, which Python refuses with the third.
    return None if held[:1] == b"\xed" and held[1:] >= b"\xa0" else held


def original(text: str) -> str:
    """`caseops.decode`, but without operators in places where no encoder puts them; a model may generate such."""
    try:
        return caseops.decode(text)
    except caseops.CaseOpsError:
        return caseops.OPERATIONS.sub(
            lambda m: m[0][1:].upper() if len(m[0]) > 1 else re.sub(caseops.OPERATOR, "", m[0]), text
        )


def sample(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Samples a token: the most likely one at temperature 0, otherwise one of the top_k most likely (0: of all)."""
    if temperature == 0:
        return int(logits.argmax())
    values, ids = logits.topk(min(top_k or len(logits), len(logits)))
    scaled = (values - values[0]).double() / temperature  # of at most 0: no temperature makes it overflow to nan
    return int(ids[torch.multinomial(torch.softmax(scaled, 0).float(), 1, generator=generator)])


def recorded(folder: Path) -> dict[str, object]:
    """What a run's config.json says of its input and its evaluation; empty where there is none. Errors: UserError."""
    kinds = dict(tokenizer_path=strangers.TEXT, data_path=strangers.TEXT)
    kinds |= dict(eval_seq_len=strangers.COUNT, eval_stride=strangers.COUNT, temperature=strangers.AMOUNT)
    for name in ("config.json", "eval_config.json"):
        if strangers.is_there(file := folder / name):
            problems: list[str] = []
            found = strangers.checked(strangers.read_object(file), kinds, str(file), problems)
            if problems:
                raise UserError(problems[0])
            return found
    return {}


def tokenizer_of(artifact: Path) -> Path:
    """The tokenizer of an artifact: beside it, or the one that the config.json beside it names. Errors: UserError.

    Paths in config.json are relative to its folder. Those of older runs are relative to where the run was started.
    """
    folder = artifact.parent
    if (beside := folder / tg.TOKENIZER_FILE).exists():
        return beside
    settings = recorded(folder)
    named = str(settings.get("tokenizer_path") or "")
    if not named and settings.get("data_path"):
        named = str(Path(str(settings["data_path"]), tg.TOKENIZER_FILE))
    if not named:
        raise UserError(
            f"--tokenizer: is needed, or DATA_PATH, because no config.json beside {artifact} names a tokenizer"
        )
    place = strangers.recorded_path(named, folder)
    return place if place.exists() or not (ROOT / named).exists() else ROOT / named


def settings_of(artifact: Path, tokenizer: Path, knobs: Mapping[str, object]) -> dict[str, str]:
    """The environment in which a run's artifact is evaluated: as its config.json says, but for these knobs.

    Errors: UserError.
    """
    if tokenizer.exists() and not strangers.is_plain(tokenizer):
        raise UserError(f"--tokenizer {tokenizer}: is no plain file")
    found: dict[str, object] = {n: v for n, v in recorded(artifact.parent).items() if not n.endswith("_path")}
    found |= dict(preset="baseline", mode="eval", tokenizer_path=tokenizer)
    # float32 by torch's own kernels: nearly the same numbers on every machine.
    found |= dict(compute_dtype="float32", compile="0", triton_kernels="0", ttt_cuda_graphs="0", attention="sdpa")
    found |= {name.lower(): value for name, value in knobs.items()}
    return {name.upper(): str(value) for name, value in found.items()}

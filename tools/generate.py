"""Generates text with the model of a packed artifact, and prints each token as it is sampled.

    python tools/generate.py logs/RUN "The function returns"
    python tools/generate.py model.pgolf "Once" --tokenizer data/mine/tokenizer.model --tokens 200 --temperature 0.7

The logits are those that a score is computed from: the model's trunk and head. The same seed gives the same text on the
same device. The text ends where the model begins a new document.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() takes it: Ctrl-C while modules load is no traceback

import codecs
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded; see train_gpt.py
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import caseops  # noqa: E402
import strangers  # noqa: E402
import train_gpt as tg  # noqa: E402
from runs import Parser, UserError, command_line, number_type  # noqa: E402

LETTERS = re.compile(f"[A-Za-z{''.join(caseops.OPERATORS.values())}]*$")


class Text:
    """A tokenizer, and the text of each of its tokens."""

    def __init__(self, c: tg.Config):
        self.model = tg.Vocabulary(c).model
        m, ids = self.model, range(c.vocab_size)
        self.caseops = all(m.PieceToId(operator) != m.unk_id() for operator in caseops.OPERATORS.values())
        silent = [i for i in ids if i != tg.BOS_ID and (m.IsControl(i) or m.IsUnknown(i) or m.IsUnused(i))]
        self.silent = torch.tensor(silent, dtype=torch.int64)  # never in training data, and not text
        self.pieces = [
            bytes([int(m.IdToPiece(i)[3:5], 16)]) if m.IsByte(i) else m.IdToPiece(i).replace("\u2581", " ").encode()
            for i in ids
        ]

    def encode(self, prompt: str) -> list[int]:
        """BOS and the prompt's tokens."""
        return [tg.BOS_ID, *self.model.EncodeAsIds(caseops.encode(prompt) if self.caseops else prompt)]

    def stream(self, tokens: Iterator[int]) -> Iterator[str]:
        """The text of a document's tokens after BOS, in pieces. Each piece is final when it is yielded."""
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
        held += decoder.decode(b"", True)
        yield original(held) if self.caseops else held


def original(text: str) -> str:
    """`caseops.decode`, but without operators in places where no encoder puts them; a model may generate such."""
    try:
        return caseops.decode(text)
    except caseops.CaseOpsError:
        return caseops.OPERATIONS.sub(
            lambda m: m[0][1:].upper() if len(m[0]) > 1 else re.sub(caseops.OPERATOR, "", m[0]), text
        )


class Logits:
    """The model as a function from a document's tokens to the next token's logits."""

    def __init__(self, model: tg.GPT, config: tg.Config, device: torch.device):
        self.model, self.config = model.eval(), config
        self.device = device

    @torch.no_grad()
    def __call__(self, tokens: list[int]) -> torch.Tensor:
        """Softcapped logits [V], float32, on the CPU, given the last tokens that the context holds."""
        model, config = self.model, self.model.config
        ids = np.array([tokens[-self.config.eval_context :]])
        batch = tg.to_device(ids, ids, tg.document_starts(ids), self.device)
        hidden = model.trunk(batch.ids, batch.documents, looped=config.loops, last_tokens=1)
        logits = model.head_logits(hidden)[0, -1]
        return tg.softcap_plain(logits, config.logit_softcap, config.softcap_type).float().cpu()


def sample(logits: torch.Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """Samples a token: the most likely one at temperature 0, otherwise one of the top_k most likely (0: of all)."""
    if temperature == 0:
        return int(logits.argmax())
    values, ids = logits.topk(min(top_k or len(logits), len(logits)))
    return int(ids[torch.multinomial(torch.softmax(values / temperature, 0), 1, generator=generator)])


def written(logits: Callable, prompt: list[int], text: Text, options) -> Iterator[int]:
    """The prompt's tokens, then sampled tokens, up to the end of the document or the maximum number."""
    tokens, generator = list(prompt), torch.Generator().manual_seed(options.seed)
    yield from tokens[1:]
    for _ in range(options.tokens):
        row = logits(tokens)
        row[text.silent] = -torch.inf
        token = sample(row, options.temperature, options.top_k, generator)
        if token == tg.BOS_ID:
            return
        tokens.append(token)
        yield token


def lines_of(pieces: Iterator[str], lines: int) -> Iterator[str]:
    """The pieces up to the end of this number of non-blank lines; 0: all."""
    filled, blank = 0, True
    for piece in pieces:
        for place, character in enumerate(piece):
            blank &= character.isspace()
            if character == "\n" and not blank:
                filled, blank = filled + 1, True
                if filled == lines:
                    yield piece[:place]
                    return
        yield piece


def tokenizer_file(options, artifact: Path) -> Path:
    """The tokenizer: of --tokenizer, TOKENIZER_PATH or DATA_PATH, or of the config.json beside the artifact."""
    c: dict[str, str] = {}
    for name in ("config.json", "eval_config.json"):
        if strangers.is_there(file := artifact.parent / name):
            problems: list[str] = []
            fields = dict(tokenizer_path=strangers.TEXT, data_path=strangers.TEXT)
            c = strangers.checked(strangers.read_object(file), fields, str(file), problems)
            if problems:
                raise UserError(problems[0])
            break
    path = options.tokenizer or os.environ.get("TOKENIZER_PATH")
    if not path and os.environ.get("DATA_PATH"):
        path = Path(os.environ["DATA_PATH"], "tokenizer.model")
    path = path or c.get("tokenizer_path")
    if not path and "data_path" in c:
        path = Path(c["data_path"], "tokenizer.model")
    if not path:
        raise UserError(
            f"--tokenizer: is needed, or DATA_PATH, because no config.json beside {artifact} names a tokenizer"
        )
    return Path(path)


def load(options) -> tuple[Logits, Text]:
    """The model and its tokenizer. Errors: UserError, tg.ConfigError."""
    path = options.artifact / tg.CONTAINER_FILE if options.artifact.is_dir() else options.artifact
    if not strangers.is_there(path):
        raise UserError(f"{path}: there is no such artifact; a run writes {tg.CONTAINER_FILE} to its folder")
    artifact, tokenizer = strangers.read_bytes(path, "artifact"), tokenizer_file(options, path)
    if tokenizer.exists() and not strangers.is_plain(tokenizer):
        raise UserError(f"--tokenizer {tokenizer}: is no plain file")
    kept = ("COMPUTE_DTYPE", "ATTENTION", "TRITON_KERNELS", "CPU_THREADS", "EVAL_SEQ_LEN")
    values = {name: os.environ[name] for name in kept if name in os.environ}
    values |= dict(
        PRESET="baseline",
        MODE="eval",
        DEVICE=options.device,
        COMPILE="0",
        TOKENIZER_PATH=str(tokenizer),
    )
    c, explicit, _ = tg.config_from_env(values, torch.cuda.is_available())
    device = torch.device(c.device)
    if c.device == "cpu":
        torch.set_num_threads(c.cpu_threads or tg.available_cores())
    model, c = tg.load_artifact(artifact, c, explicit, device)
    return Logits(model, c, device), Text(c)


def main(arguments: list[str]) -> int:
    """Prints generated text. Returns the exit code."""
    parser = Parser(prog="generate.py", description=__doc__)
    add = parser.add_argument
    add("artifact", type=Path, metavar="ARTIFACT", help=f"a run's folder, or its {tg.CONTAINER_FILE}")
    add("prompt", nargs="?", default="", help="beginning of the text (default: empty)")
    add(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="SentencePiece model (default: TOKENIZER_PATH, "
        "DATA_PATH/tokenizer.model, or that of the config.json beside the artifact)",
    )
    add(
        "--tokens",
        type=number_type(int, 1),
        default=100,
        metavar="N",
        help="maximum number of tokens (default: %(default)s)",
    )
    add(
        "--lines",
        type=number_type(int, 0),
        default=0,
        metavar="N",
        help="maximum number of lines; 0: no limit (default)",
    )
    add(
        "--temperature",
        type=number_type(float, 0),
        default=0.8,
        metavar="T",
        help="of sampling; 0: always the most likely token (default: %(default)s)",
    )
    add(
        "--top-k",
        type=number_type(int, 0),
        default=40,
        metavar="K",
        help="sample from the K most likely tokens; 0: from all (default: %(default)s)",
    )
    add("--seed", type=number_type(int, 0, 2**63 - 1), default=0, metavar="S", help="of sampling (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the model runs (default: auto)")
    options = parser.parse_args(arguments)
    try:
        logits, text = load(options)
    except tg.ConfigError as error:
        raise UserError(str(error)) from None
    prompt = text.encode(options.prompt)
    for piece in lines_of(text.stream(written(logits, prompt, text, options)), options.lines):
        print(strangers.without_controls(piece), end="", flush=True)  # the tokenizer may be a stranger's
    print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(command_line(main))

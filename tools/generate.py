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

import os
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from openmp import wait_briefly  # noqa: E402

wait_briefly()
import torch  # noqa: E402

import strangers  # noqa: E402
import train_gpt as tg  # noqa: E402
from golf import Model, load_model  # noqa: E402
from runs import Parser, UserError, command_line, number_type  # noqa: E402


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


def load(options) -> Model:
    """The model with its tokenizer, by the options and the environment. Errors: UserError."""
    kept = ("COMPUTE_DTYPE", "ATTENTION", "TRITON_KERNELS", "CPU_THREADS", "EVAL_SEQ_LEN")
    knobs = {name: os.environ[name] for name in kept if os.environ.get(name)}
    named = options.tokenizer or os.environ.get("TOKENIZER_PATH") or ""
    if not named and os.environ.get("DATA_PATH"):
        named = Path(os.environ["DATA_PATH"], tg.TOKENIZER_FILE)
    try:
        model, _ = load_model(options.artifact, named, DEVICE=options.device, **knobs)
    except tg.ConfigError as error:
        raise UserError(str(error)) from None
    if model.config.device == "cpu" and not model.config.cpu_threads:
        torch.set_num_threads(tg.available_cores())
    return model


def prompt_of(argument: str) -> str:
    """The prompt of the command line, which is UTF-8 whatever the terminal's encoding. Errors: UserError."""
    try:
        argument.encode()
        return argument
    except UnicodeEncodeError:  # Python keeps bytes that it could not decode as halves of surrogate pairs
        try:
            return os.fsencode(argument).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"PROMPT: must be UTF-8 ({error.reason} at byte {error.start})") from None


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
        help="SentencePiece model (default: TOKENIZER_PATH, DATA_PATH/tokenizer.model, or that of the run's folder)",
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
    prompt, model = prompt_of(options.prompt), load(options)
    sampling = dict(temperature=options.temperature, top_k=options.top_k, seed=options.seed)
    for piece in lines_of(model.stream(prompt, tokens=options.tokens, **sampling), options.lines):
        print(strangers.without_controls(piece), end="", flush=True)  # the tokenizer may be a stranger's
    print(flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(command_line(main))

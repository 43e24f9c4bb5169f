"""Trains a model on texts of your own: prepares them, trains for some minutes, and lets the model write a sample.

    python tools/mine.py "my texts" --name german --minutes 10
    make mine TEXTS="my texts" NAME=german MINUTES=10

The texts become data/mine/NAME. The run is a folder in logs/. Each command is printed before it runs, and can be
pasted. Settings of training are environment variables, as for train_gpt.py (docs/knobs.md). Texts that have changed
since the last time are prepared again.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() takes it: Ctrl-C while modules load is no traceback

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import numpy as np  # noqa: E402
import sentencepiece  # noqa: E402

import prepare  # noqa: E402
import readers  # noqa: E402
import shards  # noqa: E402
import sources  # noqa: E402
from errors import PrepareError  # noqa: E402
from runs import Parser, UserError, command_line, number_type  # noqa: E402
from text import python_command, shell_quoted  # noqa: E402

LEAST_BYTES = 20_000  # of text: with less there is nothing to learn from, and hardly a token to validate on
VALIDATION_BYTES = 400_000  # of text for validation, about: scoring it takes a minute on two cores
DOCUMENTS = 200  # that a small text is cut into, at least, so that some of them validate
SMALL_BYTES = 1_000_000  # less text than this gives a larger share of it to validation
SHARED_SHARE = 0.05  # of validation's windows in training: the default of ALLOW_SHARED_WINDOWS
PACKED = 3  # times its size that an archive of text unpacks to, about
MINUTES = 5
PROMPT_WORDS = 4
SAMPLE_TOKENS = 150


def check_name(text: str) -> str:
    """An argparse type: a name that serves as the name of a folder."""
    if not re.fullmatch(r"\w[\w.-]{0,63}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are letters, digits, `_`, `-` and `.`, at most 64 in all")
    return text


def name_of(texts: str) -> str:
    """A name for the data of a folder or file of texts."""
    return re.sub(r"[^\w.-]+", "-", Path(os.path.abspath(texts)).name.split(".")[0]).strip("-.")[:64] or "texts"


def text_bytes(texts: str, suffixes: tuple[str, ...]) -> int:
    """The bytes of text in a folder or file, about: archives are not unpacked. Errors: PrepareError."""
    total = 0
    for _, path in sources.list_files([texts], suffixes=suffixes):
        if path is not None:
            packed = path.suffix.lower() in (*readers.PACKED, ".parquet")
            total += path.stat().st_size * (PACKED if packed else 1)
    return total


def prepare_arguments(options: argparse.Namespace, out: Path) -> list[str]:
    """The arguments of data/prepare.py for a folder of texts. Errors: UserError, PrepareError."""
    size = text_bytes(options.texts, tuple(options.suffix))
    if size < LEAST_BYTES:
        raise UserError(
            f"TEXTS={options.texts}: about {size:,} bytes of text, and a model needs {LEAST_BYTES:,} or more"
        )
    arguments = [options.texts, "--out", str(out), "--vocab-size", "auto"]
    share = 0.1 if size < SMALL_BYTES else 0.05
    arguments += ["--val-fraction", f"{min(share, VALIDATION_BYTES / size):.2g}"]
    if size // DOCUMENTS < prepare.Options.max_document_bytes:
        arguments += ["--max-document-bytes", str(max(64, size // DOCUMENTS))]
    for suffix in options.suffix:
        arguments += ["--suffix", suffix]
    return arguments


def run(command: list[str], settings: dict[str, str]) -> None:
    """Prints a command as it can be pasted, and runs it. Exits with its exit code if that is not 0."""
    shown = [f"{name}={shell_quoted(value)}" for name, value in settings.items()]
    shown += [python_command(), *(shell_quoted(word) for word in command[1:])]
    print("$ " + " ".join(shown), flush=True)
    code = subprocess.run(command, env={**os.environ, **settings}, cwd=ROOT).returncode
    if code:
        sys.exit(code if code > 0 else 128 - code)


def first_words(data: Path, manifest: dict) -> str:
    """The first words of the first validation document: a beginning for the sample."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(data / manifest["tokenizer"]["file"]))
    with open(data / manifest["splits"]["val"]["shards"][0]["file"], "rb") as file:
        file.seek(shards.HEADER_BYTES)
        ids = np.frombuffer(file.read(400), "<u2").tolist()
    end = ids.index(model.bos_id(), 1) if model.bos_id() in ids[1:] else len(ids)
    words = model.decode(ids[1:end]).replace("\ufffd", "").split()
    return " ".join(words[:PROMPT_WORDS])[:60]


def shared_share(manifest: dict) -> float:
    """The share of validation's windows of tokens that training has too, as licences and headers of files do."""
    windows = manifest["audit"]["windows"]
    return windows["shared"] / max(1, windows["of"])


def training_settings(options: argparse.Namespace, name: str, out: Path, manifest: dict) -> dict[str, str]:
    """The settings of the training run. Those of the environment stay, unless the command line says otherwise."""
    chosen = {
        "PRESET": "demo",
        "MAX_WALLCLOCK_SECONDS": f"{60 * (options.minutes or MINUTES):g}",
        "RUN_ID": f"{time.strftime('%Y%m%d-%H%M%S')}-{name}",
    }
    if shared_share(manifest) > SHARED_SHARE:
        chosen["ALLOW_SHARED_WINDOWS"] = "1"
    kept = {key: os.environ[key] for key in (*chosen, "ARTIFACT_DIR") if key in os.environ}
    if options.minutes:
        kept.pop("MAX_WALLCLOCK_SECONDS", None)
    vocab_size = str(manifest["tokenizer"]["vocab_size"])
    return {**chosen, **kept, "DATA_PATH": str(out), "VOCAB_SIZE": vocab_size}


def main(arguments: list[str]) -> int:
    """Runs the three commands. Returns the exit code."""
    parser = Parser(prog="mine.py", description=__doc__)
    add = parser.add_argument
    add("texts", metavar="TEXTS", help="a folder or file of texts (data/prepare.py --help says which)")
    add("--name", type=check_name, metavar="NAME", help="of the data and the run (default: the folder's)")
    add("--minutes", type=number_type(float, 0.1, 1e5), metavar="M", help=f"of training (default: {MINUTES})")
    add("--out", type=Path, metavar="DIR", help="folder of the prepared data (default: data/mine/NAME)")
    add(
        "--suffix",
        action="append",
        default=[],
        type=prepare.suffix_of,
        metavar="ENDING",
        help="a further ending of text, such as .py",
    )
    add("--prompt", metavar="TEXT", help="beginning of the sample (default: the first words of a validation text)")
    options = parser.parse_args(arguments)
    if not options.texts:
        raise UserError('TEXTS: is needed, such as: make mine TEXTS="my texts" NAME=german')
    options.texts = os.path.abspath(options.texts)
    name = options.name or name_of(options.texts)
    out = Path(os.path.abspath(options.out)) if options.out else Path("data", "mine", name)
    os.chdir(ROOT)
    try:
        words = prepare_arguments(options, out)
        if prepare.holds_other_data(prepare.parse_arguments(words)):
            print(f"the texts or the options have changed: {out} is prepared again", flush=True)
            words.append("--force")
        run([sys.executable, "data/prepare.py", *words], {})
        manifest = prepare.read_manifest(out) or {}
    except PrepareError as error:
        raise UserError(str(error)) from None
    settings = training_settings(options, name, out, manifest)
    if "ALLOW_SHARED_WINDOWS" in settings:
        share = f"{shared_share(manifest):.0%} of the validation text's passages are in the training text too"
        print(f"{share}: on new text, the model will score worse than its val_bpb", flush=True)
    run([sys.executable, "train_gpt.py"], settings)
    folder = settings.get("ARTIFACT_DIR") or f"logs/{settings['RUN_ID']}"
    prompt = options.prompt if options.prompt is not None else first_words(out, manifest)
    print(f"\na sample, after {prompt!r}:" if prompt else "\na sample:")
    run([sys.executable, "tools/generate.py", folder, prompt, "--tokens", str(SAMPLE_TOKENS)], {})
    return 0


if __name__ == "__main__":
    sys.exit(command_line(main))

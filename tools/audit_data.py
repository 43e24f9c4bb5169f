"""What a run checks of its data before it trains, as a table with every finding; reads only.

    make audit-data DATA=data/fineweb_sp8192 [AUDIT=windows]
    python tools/audit_data.py data/fineweb_sp8192

Headers, lengths, token ids, BOS, byte sidecars, all that manifest.json promises (SHA-256 of each file, tokens,
documents and bytes), and validation documents that are in the training shards too. AUDIT=windows also counts runs of
50 tokens that both hold; they are no finding, since boilerplate repeats. VOCAB_SIZE, TOKENIZER_PATH and
ALLOW_SHARED_DOCUMENTS act as in train_gpt.py; without VOCAB_SIZE, the tokenizer's is taken. Exit code 0, or 2 and a
line for each finding.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as t  # noqa: E402

COLUMNS = ("shards", "hashed", "documents", "tokens", "bytes")


def configuration(folder: str, environment: dict[str, str]) -> t.Config:
    """The knobs, of which only those of the data matter. Errors: ConfigError."""
    if not Path(folder).is_dir():
        raise t.ConfigError("DATA", folder, "must be a folder of shards")
    knobs = {**environment, "PRESET": "baseline", "DATA_PATH": folder, "DEVICE": "cpu"}
    if not knobs.get("VOCAB_SIZE"):
        import sentencepiece

        file = Path(knobs.get("TOKENIZER_PATH") or Path(folder, "tokenizer.model"))
        try:
            knobs["VOCAB_SIZE"] = str(sentencepiece.SentencePieceProcessor(model_file=str(file)).vocab_size())
        except (RuntimeError, OSError):
            raise t.ConfigError(
                "TOKENIZER_PATH",
                str(file),
                "is no SentencePiece model that can be read; without one, VOCAB_SIZE must be set",
            ) from None
    return t.config_from_env(knobs, False)[0]


def damaged_shards(c: t.Config) -> list[str]:
    """A line for each split without shards, and for each shard whose header or length is wrong."""
    problems = []
    for split in ("val", "train"):
        try:
            paths = t.shard_paths(c, split)
        except t.ConfigError as error:
            problems.append(str(error))
            continue
        for path in paths:
            try:
                t.open_shard(path)
            except t.ConfigError as error:
                problems.append(str(error))
    return problems


def count_bytes(c: t.Config, audit: t.Audit, validation: t.TokenStream, training: t.TokenStream) -> None:
    """Counts the bytes of the text as a score does. Errors: ConfigError for the tokenizer or a sidecar.

    Training shards have no sidecars: where validation's text was transformed, training's bytes cannot be counted.
    """
    vocabulary, sidecar = t.Vocabulary(c), t.read_sidecar(c, validation)
    audit.count_bytes("val", t.count_bytes(validation.read(0, len(validation)), sidecar, vocabulary))
    if sidecar is None:
        blocks = (
            training.read(start, min(start + t.AUDIT_BLOCK + 1, len(training)))  # one token before the targets
            for start in range(0, len(training) - 1, t.AUDIT_BLOCK)
        )
        audit.count_bytes("train", sum(t.count_bytes(block, None, vocabulary) for block in blocks))


def audited(c: t.Config) -> tuple[t.Audit, list[str]]:
    """The audit, and its findings, one line each. Errors: ConfigError for a manifest that cannot be read."""
    audit = t.Audit(c, t.Run(0, 1, 1, torch.device("cpu")))
    problems = damaged_shards(c)
    if problems:
        return audit, problems
    validation, training = (t.TokenStream(c, split) for split in ("val", "train"))
    audit.validation(validation)
    audit.training(training, validation)
    try:
        if not audit.findings:  # ids beyond the vocabulary have no bytes
            count_bytes(c, audit, validation, training)
    except t.ConfigError as error:
        problems.append(str(error))
    return audit, [str(t.ConfigError(*finding)) for finding in audit.findings] + problems


def table(rows: dict[str, Any]) -> list[str]:
    """What each split holds."""
    lines = ["split " + "".join(f"{name:>16s}" for name in COLUMNS)]
    for split in ("train", "val"):
        cells = (f"{rows[split][name]:,}" if name in rows[split] else "-" for name in COLUMNS)
        lines.append(f"{split:6s}" + "".join(f"{cell:>16s}" for cell in cells))
    return lines


def main(arguments: list[str], environment: dict[str, str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print((__doc__ or "").strip(), file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    begin = time.perf_counter()
    try:
        audit, findings = audited(configuration(arguments[0], environment))
    except (t.ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if "train" in audit.rows:
        print("\n".join([*table(audit.rows), *audit.overlap_lines()]))
    if not audit.rows["manifest"]:
        print(f"{audit.manifest.path} is not there: nothing says what the shards should hold")
    for finding in findings:
        print(f"finding: {finding}")
    print(f"{len(findings)} findings in {time.perf_counter() - begin:.1f} s")
    return 2 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], dict(os.environ)))

"""Checks a folder of shards as a run does, looks for validation text in its training shards, and records the result.

    make audit-data DATA=data/fineweb_sp8192
    python tools/audit_data.py data/fineweb_sp8192

Checked are headers, lengths, token ids, BOS, byte sidecars, and all that manifest.json says: the SHA-256, tokens,
documents and bytes of each file. If that holds, data/audit.py looks for copies of validation documents and for shared
windows of 50 tokens, and its result is put into manifest.json, in place of an earlier one. A folder without that file,
such as one of the challenge's published shards, gets one with its counts, the SHA-256 of each file, and the audit.

VOCAB_SIZE, TOKENIZER_PATH, CPU_THREADS, ALLOW_SHARED_DOCUMENTS and ALLOW_SHARED_WINDOWS act as in train_gpt.py;
without VOCAB_SIZE, the tokenizer's is taken. Exit code 0, or 2 and a line for each finding.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() takes it: Ctrl-C while modules load is no traceback

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import audit  # noqa: E402
import train_gpt as t  # noqa: E402
from errors import PrepareError  # noqa: E402
from runs import command_line  # noqa: E402
from shards import write_file  # noqa: E402

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
                "TOKENIZER_PATH", str(file), "must be the SentencePiece model that made the shards' tokens"
            ) from None
    return t.config_from_env(knobs, False)[0]


def read_content(folder: Path) -> dict[str, Any]:
    """manifest.json without its audit, which is to be replaced; empty where there is none. Errors: ConfigError."""
    path = folder / "manifest.json"
    content = t.Manifest.content(path) if path.is_file() else {}
    if isinstance(content, dict):
        content.pop("audit", None)
    if path.is_file():
        t.Manifest.parse(path, content)
    return content


def damaged_shards(config: t.Config) -> list[str]:
    """A line for each split without shards, and for each shard whose header or length is wrong."""
    problems = []
    for split in ("val", "train"):
        try:
            paths = t.shard_paths(config, split)
        except t.ConfigError as error:
            problems.append(str(error))
            continue
        for path in paths:
            try:
                t.open_shard(path)
            except t.ConfigError as error:
                problems.append(str(error))
    return problems


def count_bytes(config: t.Config, check: t.DataCheck, validation: t.TokenStream, training: t.TokenStream) -> None:
    """Counts the bytes of the text as a score does. Errors: ConfigError for the tokenizer or a sidecar.

    Training shards have no sidecars: where validation's text was transformed, training's bytes cannot be counted.
    """
    vocabulary, sidecar = t.Vocabulary(config), t.read_sidecar(config, validation)
    if sidecar is not None:
        t.check_sidecar(validation, sidecar, vocabulary)
    check.count_bytes("val", t.count_bytes(validation.read(0, len(validation)), sidecar, vocabulary))
    if sidecar is None:
        blocks = (
            training.read(start, min(start + t.SCAN_BLOCK + 1, len(training)))  # one token before the targets
            for start in range(0, len(training) - 1, t.SCAN_BLOCK)
        )
        check.count_bytes("train", sum(t.count_bytes(block, None, vocabulary) for block in blocks))


def checked(config: t.Config, manifest: t.Manifest) -> tuple[t.DataCheck, list[str]]:
    """What a run checks but for the audit: the check, and a line for each finding."""
    check = t.DataCheck(config, t.Run(0, 1, 1, torch.device("cpu")), manifest)
    problems = damaged_shards(config)
    if problems:
        return check, problems
    validation, training = (t.TokenStream(config, split) for split in ("val", "train"))
    check.validation(validation)
    check.training(training)
    try:
        if not check.findings:  # ids beyond the vocabulary have no bytes
            count_bytes(config, check, validation, training)
    except t.ConfigError as error:
        problems.append(str(error))
    return check, [str(t.ConfigError(*finding)) for finding in check.findings] + problems


def new_manifest(config: t.Config, check: t.DataCheck, digests: dict[str, str]) -> dict[str, Any]:
    """What is known of a folder without a manifest."""
    splits = {}
    for split in ("train", "val"):
        row = check.rows[split]
        splits[split] = {key: row[key] for key in ("documents", "tokens", "bytes") if key in row}
        splits[split]["shards"] = [
            {"file": path.name, "tokens": t.ShardHeader.read(path).tokens, "sha256": digests[path.name]}
            for path in t.shard_paths(config, split)
        ]
    sidecars = [path for path in map(t.sidecar_path, t.shard_paths(config, "val")) if path.is_file()]
    if sidecars:
        splits["val"]["sidecars"] = [{"file": path.name, "sha256": digests[path.name]} for path in sidecars]
    model = config.tokenizer_file
    tokenizer = {"file": model.name, "sha256": t.sha256_of(model), "vocab_size": config.vocab_size}
    return {"created_with": "tools/audit_data.py", "tokenizer": tokenizer, "splits": splits}


def record_audit(config: t.Config, check: t.DataCheck, content: dict[str, Any]) -> None:
    """Audits shards that were checked, puts the result into manifest.json, and holds it against what is allowed.

    Errors: PrepareError, OSError; ConfigError for a file that changed meanwhile. Then nothing is written.
    """
    training, validation = (t.shard_paths(config, split) for split in ("train", "val"))
    sidecars = [path for path in map(t.sidecar_path, validation) if path.is_file()]
    threads = config.cpu_threads or t.available_cores()
    found = audit.audit_shards(training, validation, sidecars, threads)
    check.refuse_rewritten("the audit")
    content = {**(content or new_manifest(config, check, found["sha256"])), "audit": found}
    write_file(check.manifest.path, (json.dumps(content, indent=1) + "\n").encode())
    check.manifest = t.Manifest.read(Path(config.data_path))
    check.digests = found["sha256"]
    check.leaks()


def table(rows: dict[str, Any]) -> list[str]:
    """What each split holds."""
    lines = ["split " + "".join(f"{name:>16s}" for name in COLUMNS)]
    for split in ("train", "val"):
        cells = (f"{rows[split][name]:,}" if name in rows[split] else "-" for name in COLUMNS)
        lines.append(f"{split:6s}" + "".join(f"{cell:>16s}" for cell in cells))
    return lines


def audited(config: t.Config) -> tuple[t.DataCheck, list[str]]:
    """Checks the folder, and audits it if all is well. Returns the check, and a line for each finding.

    Errors: ConfigError for a manifest that cannot be read; those of `record_audit`.
    """
    folder = Path(config.data_path)
    content = read_content(folder)
    path = folder / "manifest.json"
    check, findings = checked(config, t.Manifest.parse(path, content) if content else t.Manifest(path))
    if not findings:
        record_audit(config, check, content)
        findings = [str(t.ConfigError(*finding)) for finding in check.findings]
    return check, findings


def main(arguments: list[str], environment: dict[str, str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print((__doc__ or "").strip(), file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    begin = time.perf_counter()
    try:
        check, findings = audited(configuration(arguments[0], environment))
    except (t.ConfigError, PrepareError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if "train" in check.rows:
        print("\n".join([*table(check.rows), *check.leak_lines()]))
    if "leak_audit" in check.rows:
        print(f"written: {check.manifest.path}")
    for finding in findings:
        print(f"finding: {finding}")
    print(f"{len(findings)} findings in {time.perf_counter() - begin:.1f} s")
    return 2 if findings else 0


if __name__ == "__main__":
    sys.exit(command_line(lambda arguments: main(arguments, dict(os.environ))))

"""What data/prepare.py is asked to do. Its modules share this one, and none of them imports prepare.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path

AUTO_VOCAB = 0
ROOT = "datasets"  # the folder in a published repository that holds its manifest.json


@dataclasses.dataclass(frozen=True)
class Options:
    """What to prepare and how; the fields are the options of the command line."""

    sources: tuple[str, ...]
    out: Path
    vocab_size: int | None = None  # AUTO_VOCAB: by the amount of text. None: 1024, or that of the given tokenizer
    vocab_fallback: bool = False  # whether a text that does not support the size gets the largest one that it does
    val_fraction: float = 0.05
    shard_tokens: int = 100_000_000
    workers: int = 1
    tokenizer: Path | None = None
    seed: int = 0
    max_document_bytes: int = 32 << 10
    sample_bytes: int = 32 << 20
    text_field: str = "text"
    suffixes: tuple[str, ...] = ()  # further endings of plain text, in small letters, with their dot
    caseops: bool = False
    val_documents: int | None = None  # None: the split that the source has, or one by hash
    train_shards: int | None = None  # of a published export; None: all
    repo: str | None = None  # None: the challenge's own
    revision: str | None = None  # None: the main branch
    repo_root: str = ROOT
    downloads: Path | None = None  # None: a folder in `out`
    force: bool = False
    quiet: bool = False

    @property
    def downloads_folder(self) -> Path:
        """Where downloaded text is kept."""
        return self.downloads or self.out / "downloads"

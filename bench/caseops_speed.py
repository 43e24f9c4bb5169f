"""Speed of CaseOps compared with SentencePiece: MB/s of one core, in one process.

    python bench/caseops_speed.py [--package python] [--repeats 5]

The text is the documentation in a package (data/corpus.py), as in prepare_speed.py. Figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "data"))
import caseops  # noqa: E402
import corpus  # noqa: E402
import prepare  # noqa: E402


def megabytes_per_second(function: Callable, inputs: list, size: int, repeats: int) -> float:
    """MB/s of calls of the function on all inputs, which hold `size` bytes of text."""
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        for item in inputs:
            function(item)
        rates.append(size / 1e6 / (time.perf_counter() - start))
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--package", choices=corpus.PACKAGES, default="python")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    texts = [document.text for document in corpus.gather([options.package]).documents]
    size = sum(len(text.encode()) for text in texts)
    encoded = [caseops.encode(text) for text in texts]
    plain = prepare.Codec(prepare.train_tokenizer(texts, 1024)[0])
    codec = prepare.Codec(prepare.train_tokenizer(texts, 1024, with_caseops=True)[0], with_caseops=True)
    ids = [codec.encode(text) for text in texts]
    stages: dict[str, tuple[Callable, list]] = {
        "sentencepiece": (plain.processor.encode, texts),
        "caseops.encode": (caseops.encode, texts),
        "caseops.decode": (caseops.decode, encoded),
        "token_bytes": (codec.token_bytes, ids),
        "prepare, plain": (plain.encode, texts),
        "prepare, --caseops": (codec.encode, texts),
    }
    rates = {name: megabytes_per_second(*stage, size=size, repeats=options.repeats) for name, stage in stages.items()}
    print(f"{len(texts)} documents, {size} bytes")
    for name, rate in rates.items():
        print(f"{name:20s} {rate:7.1f} MB/s   {rate / rates['sentencepiece']:6.1f} times SentencePiece's encoding")


if __name__ == "__main__":
    main()

"""tools/prove.py: the script that ships keeps its rules, planted cheats break them, and what a proof cannot see.

Every cheat of tests/cheats.py is an edit of train_gpt.py. Its evaluations run as a proof's do, except that their
processes are forked from one that has imported torch (tests/fork_server.py).
"""

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

import processes
import prove
from helpers import ROOT, SCRIPT, TINY, built_once, clean_environment, encode, run_command, strings, train_tokenizer, write_shard
from streams import Maker, read_stream

VOCABULARY = 1024
SETTINGS = dict(
    TINY,
    VOCAB_SIZE=VOCABULARY,
    TRAIN_SEQ_LEN=64,
    TRAIN_BATCH_TOKENS=1024,
    MICRO_BATCH_TOKENS=1024,
    ITERATIONS=60,
    WARMDOWN_FRAC=0.5,
    VAL_BATCH_SIZE=2048,
    AUDIT="none",
    EVAL_STRIDE=32,
    TTT_BASELINE=1,
    TTT_BATCH_SIZE=16,
    TTT_CHUNK_SIZE=16,
    TTT_LORA_RANK=4,
    TTT_LORA_ALPHA=8,
    TTT_LORA_LR=0.01,
    PHASED_TTT_PREFIX_DOCS=12,
    PHASED_TTT_NUM_PHASES=2,
    GLOBAL_TTT_CHUNK_TOKENS=256,
    GLOBAL_TTT_LR=0.05,
    TTT_CHUNK_TOKENS=512,
    TTT_EPOCHS=1,
    TTT_LR=0.05,
)
SIZE = prove.Size(3000, 1300, 2, 8, False, False)


# ------------------------------------------------------------------------------------------------------ what is proven


def write_corpus(folder):
    """A tokenizer of 1,024 pieces and shards: the script's own source, each part between blank lines a document."""
    parts = [part for part in SCRIPT.read_text().split("\n\n\n") if part]
    (folder / "tokenizer.model").write_bytes(train_tokenizer([p for part in parts for p in part.split("\n")], VOCABULARY))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    splits = dict(train=[p for i, p in enumerate(parts) if i % 6], val=parts[::6])
    for split, texts in splits.items():
        write_shard(folder / f"fineweb_{split}_000000.bin", encode(processor, texts))


class Server:
    """The process that forks scripts, and the scripts that were written for it."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.process = processes.start(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, script, environment, ranks, out):
        """Exit code and standard error of a script."""
        for name in ("stdout", "stderr"):
            (out / name).write_text("")
        job = dict(script=str(script), environment=environment, ranks=ranks, out=str(out))
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        return code, (out / "stderr").read_text()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """A Server that ends with the tests."""
    made = Server(tmp_path_factory.mktemp("server"))
    yield made
    made.process.stdin.close()
    made.process.wait()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    return built_once(tmp_path_factory, "corpus", write_corpus)


def test_it(server, corpus, tmp_path):
    import time
    for k in range(2):
        t = time.time()
        code, err = server.run(SCRIPT, clean_environment(dict(SETTINGS, MODE="all", TTT_MODE="phased", DATA_PATH=corpus, ARTIFACT_DIR=tmp_path / f"run{k}")), 1, tmp_path)
        print(time.time() - t)
        assert code == 0, err
        print((tmp_path / "stdout").read_text()[-3500:])

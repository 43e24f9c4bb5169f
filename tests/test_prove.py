"""tools/prove.py: the script that ships keeps its rules, planted cheats break them, and what a proof cannot see.

Every cheat of tests/cheats.py is an edit of train_gpt.py. Its evaluations run as a proof's do, except that their
processes are forked from one that has imported torch (tests/fork_server.py).
"""

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import sentencepiece

import processes
import prove
from cheats import CAUSALITY, CHEATS, NORMALIZATION
from helpers import (
    SCRIPT,
    TINY,
    built_once,
    clean_environment,
    encode,
    train_tokenizer,
    write_shard,
)
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
    COMPUTE_DTYPE="float32",
    EVAL_STRIDE=32,
    TTT_BASELINE=1,
    TTT_BATCH_SIZE=64,
    TTT_CHUNK_SIZE=48,
    TTT_LORA_RANK=4,
    TTT_LORA_ALPHA=8,
    TTT_LORA_LR=0.01,
    PHASED_TTT_PREFIX_DOCS=12,
    PHASED_TTT_NUM_PHASES=2,
    GLOBAL_TTT_CHUNK_TOKENS=256,
    GLOBAL_TTT_LR=0.05,
    TTT_CHUNK_TOKENS=1200,
    TTT_EPOCHS=1,
    TTT_LR=0.05,
)
SIZE = prove.Size(2600, 1300, 2, 2, 4, False, False)
HONEST = prove.Size(2600, 1300, 7, 7, 4, True, True)
prove_claim = "the claimed score"


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
def run(tmp_path_factory, server):
    """A folder with a run: its data (`corpus`), its script and its artifact."""

    def build(folder):
        (folder / "corpus").mkdir()
        write_corpus(folder / "corpus")
        script = folder / "train_gpt.py"
        script.write_bytes(SCRIPT.read_bytes())
        values = dict(SETTINGS, MODE="train", DATA_PATH=folder / "corpus", ARTIFACT_DIR=folder / "run")
        code, errors = server.run(script, clean_environment(values), 1, folder)
        assert code == 0, errors

    return built_once(tmp_path_factory, "proven", build)


class Forked(prove.Subject):
    """A Subject whose script runs in the server's forked processes."""

    server: Server

    def run(self, **values):
        code, errors = self.server.run(self.script, self.environment(**values), self.ranks, self.work)
        self.check(code, errors)


def subject_of(server, run, work, mode, edits=(), ranks=1, **settings):
    """A script with some edits, and the run's artifact."""
    source = SCRIPT.read_text()
    for old, new in edits:
        assert source.count(old) == 1, f"the cheat is stale: {source.count(old)} times {old!r}"
        source = source.replace(old, new)
    work.mkdir()
    script = work / "train_gpt.py"
    script.write_text(source)
    values = json.loads((run / "run" / "config.json").read_text())
    values |= {name.lower(): value for name, value in (SETTINGS | settings).items()} | dict(ttt_mode=mode)
    tokenizer = run / "corpus" / "tokenizer.model"
    subject = Forked(
        script, run / "run" / prove.ARTIFACT, values, {}, ranks, tokenizer, prove.Tokens(tokenizer), work
    )
    subject.server = server
    return subject


def proof_of(subject, run, size=SIZE):
    """A proof of it, on the same streams for each script."""
    tokens = subject.tokens
    return prove.Proof(subject, Maker(read_stream(run / "corpus"), tokens.widths, tokens.ordinary, 1), size, print)


@functools.cache
def honest_scores(server, run, mode, settings):
    """The scores of the first stream by the honest script."""
    with tempfile.TemporaryDirectory() as work:
        return proof_of(subject_of(server, run, Path(work, "w"), mode, **dict(settings)), run).base()


# ----------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("mode", ["none", "phased", "chunk"])
def test_the_honest_script_passes_every_rule(server, run, tmp_path, mode):
    proof = proof_of(subject_of(server, run, tmp_path / "work", mode), run, HONEST)
    for verdict in prove.prove(proof, run / "corpus"):
        print(verdict)
        assert verdict.holds or verdict.rule == prove_claim, verdict


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.name)
def test_a_cheat_is_noticed(server, run, tmp_path, cheat):
    subject = subject_of(server, run, tmp_path / "work", cheat.mode, cheat.edits, cheat.ranks, **cheat.settings)
    proof = proof_of(subject, run)
    rules = {CAUSALITY: proof.causality, NORMALIZATION: proof.normalization}
    base = proof.base()
    honest = honest_scores(server, run, cheat.mode, tuple(cheat.settings.items()))
    print({s: (v.sum() / 3000, honest.scores[s].sum() / 3000) for s, v in base.scores.items()})
    verdict = rules[cheat.rule]()
    print(verdict, subject.count)
    assert verdict.holds is False

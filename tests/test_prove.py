"""tools/prove.py: the script that ships keeps its rules, planted cheats break them, and what a proof cannot see.

Every cheat of tests/cheats.py is an edit of train_gpt.py. Its evaluations run as a proof's do, except that their
processes are forked from one that has imported torch (tests/fork_server.py).
"""

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece

import prove
from cheats import (
    CAUSALITY,
    CHEATS,
    CLAIM,
    COUNTS,
    HINTED,
    MEMORY,
    MIXED,
    NORMALIZATION,
    OFFICIAL,
    RUN,
    TRAINING,
    UNNOTICED,
)
from helpers import (
    ROOT,
    SCRIPT,
    TINY,
    built_once,
    clean_environment,
    encode,
    environment,
    fork_server,
    forking,
    run_command,
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
    COMPUTE_DTYPE="float32",
    EVAL_STRIDE=32,
    TTT_BASELINE=0,
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
SIZE = prove.Size(2600, 1300, 3, 3, 4, False, False)
HONEST = dict(
    none=prove.Size(2600, 1300, 7, 7, 4, False, True),
    phased=prove.Size(2600, 1300, 3, 3, 4, True, False),
    chunk=prove.Size(2600, 1300, 3, 3, 4, False, False),
)


# ------------------------------------------------------------------------------------------------------ what is proven


# Of the pinned NumPy: another text gives another model, and whether a cheat shows depends on the model a little.
CORPUS = ("_core/fromnumeric.py", "_core/numeric.py", "lib/_function_base_impl.py", "linalg/_linalg.py")


def write_corpus(folder):
    """A tokenizer of 1,024 pieces and shards: source of NumPy, each part between blank lines a document."""
    texts = [(Path(np.__file__).parent / name).read_text() for name in CORPUS]
    parts = [part for text in texts for part in text.split("\n\n\n") if part]
    (folder / "tokenizer.model").write_bytes(
        train_tokenizer([p for part in parts for p in part.split("\n")], VOCABULARY)
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    splits = dict(train=[p for i, p in enumerate(parts) if i % 6], val=parts[::6])
    for split, texts in splits.items():
        write_shard(folder / f"fineweb_{split}_000000.bin", encode(processor, texts))


class Server:
    """The process that forks scripts, and the scripts that were written for it."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def run(self, script, environment, ranks, out):
        """Exit code and standard error of a script, which are left in a folder with its output."""
        done = fork_server().run(script, environment, ranks=ranks, out=out)
        return done.returncode, done.stderr


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    return Server(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="session")
def run(tmp_path_factory, server):
    """A folder with a run: its data (`corpus`), its script and its artifact."""

    def build(folder):
        (folder / "corpus").mkdir()
        write_corpus(folder / "corpus")
        script = folder / "train_gpt.py"
        script.write_bytes(SCRIPT.read_bytes())
        values = dict(SETTINGS, MODE="all", DATA_PATH=folder / "corpus", ARTIFACT_DIR=folder / "run")
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
    subject = Forked(script, run / "run" / prove.ARTIFACT, values, {}, ranks, tokenizer, prove.Tokens(tokenizer), work)
    subject.server = server
    return subject


def proof_of(subject, run, size=SIZE):
    """A proof of it, on the same streams for each script."""
    tokens = subject.tokens
    return prove.Proof(subject, Maker(read_stream(run / "corpus"), tokens.widths, tokens.ordinary, 1), size, print)


HONEST_BASES = {}


def honest_base(server, run, mode, ranks=1, **settings):
    """The first stream by the honest script, evaluated once."""
    key = (mode, ranks, *settings.items())
    if key not in HONEST_BASES:
        with tempfile.TemporaryDirectory() as work:
            subject = subject_of(server, run, Path(work, "work"), mode, (), ranks, **settings)
            HONEST_BASES[key] = proof_of(subject, run).base()
    return HONEST_BASES[key]


# ----------------------------------------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("mode", ["none", "phased", "chunk"])
def test_the_honest_script_passes_every_rule(server, run, tmp_path, mode):
    subject = subject_of(server, run, tmp_path / "work", mode, TTT_BASELINE=1)
    if mode == "none":
        subject.summary = json.loads((run / "run" / "summary.json").read_text())
    proof = proof_of(subject, run, HONEST[mode])
    verdicts = {verdict.rule: verdict for verdict in prove.prove(proof, run / "corpus")}
    assert [v for v in verdicts.values() if not v.holds] == []
    assert ("BOS, a token of" in verdicts[NORMALIZATION].tried) and ("another rest" in verdicts[CAUSALITY].tried)
    assert set(verdicts) >= {"size", COUNTS, CAUSALITY, NORMALIZATION, MEMORY}
    assert {CLAIM: mode == "none", TRAINING: mode == "phased"} == {r: r in verdicts for r in (CLAIM, TRAINING)}


@pytest.mark.parametrize("mode", ["none", "phased"])
def test_hints_pass_every_rule(server, run, tmp_path, mode, monkeypatch):
    """... and the sums over the vocabulary are of places whose hint moves them."""
    sums, moved, evaluate = [], [], Forked.evaluate

    def watched(subject, stream, scores=True, **values):
        found = evaluate(subject, stream, scores, **values)
        if values.get("HINT_CHUNK_TOKENS") and scores:
            last = "quantized" if mode == "none" else "ttt"
            moved.append(np.abs(found.scores["hint"] - found.scores[last])[2 * values["HINT_CHUNK_TOKENS"] :])
            sums.append(stream)
        return found

    monkeypatch.setattr(Forked, "evaluate", watched)
    subject = subject_of(server, run, tmp_path / "work", mode, **HINTED)
    proof = proof_of(subject, run)
    assert "hint" in proof.base().scores
    for verdict in (proof.causality(), proof.normalization(), proof.memory(), proof.once_each()):
        assert verdict.holds, verdict
        assert verdict.rule != NORMALIZATION or "hint 1.0000" in verdict.tried
    assert max(np.concatenate(moved)) > 0.1 and sums
    assert (proof.base().scores["hint"] != proof.base().scores["quantized"]).mean() > 0.1


@pytest.mark.parametrize("settings", [MIXED, {**MIXED, **HINTED}], ids=["alone", "with hints"])
def test_a_mixture_passes_every_rule(server, run, tmp_path, settings):
    proof = proof_of(subject_of(server, run, tmp_path / "work", "phased", **settings), run)
    for verdict in (proof.causality(), proof.normalization(), proof.memory(), proof.once_each()):
        assert verdict.holds, verdict
    base = proof.base().scores
    assert (base["ttt"] != honest_base(server, run, "phased").scores["ttt"]).mean() > 0.5


def test_the_honest_script_on_two_ranks_scores_as_on_one(server, run, tmp_path):
    proof = proof_of(subject_of(server, run, tmp_path / "work", "phased", ranks=2), run)
    verdict = proof.causality()
    assert verdict.holds, verdict
    honest = honest_base(server, run, "phased")
    for stage, scores in proof.base().scores.items():
        assert np.allclose(scores, honest.scores[stage], atol=0.02), stage


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.name)
def test_a_cheat_is_noticed(server, run, tmp_path, monkeypatch, cheat):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # COMPILE=1 is then a word, and costs nothing
    subject = subject_of(server, run, tmp_path / "work", cheat.mode, cheat.edits, cheat.ranks, **cheat.settings)
    subject.exact = "COMPILE" not in cheat.settings
    proof = proof_of(subject, run)
    if cheat.rule == RUN:
        with pytest.raises(prove.Refused, match="IllegalScore: "):
            proof.base()
        return
    if cheat.active and cheat.rule != TRAINING:
        honest = honest_base(server, run, cheat.mode, cheat.ranks, **cheat.settings)
        stated = [evaluation.summary["val_bpb"] for evaluation in (proof.base(), honest)]
        assert abs(stated[0] - stated[1]) > 1e-6, "the cheat is not active"
    verdict = verdict_of(proof, cheat.rule, run)
    assert verdict.holds is False and verdict.found, verdict
    assert "it ended" not in verdict.found


def verdict_of(proof, rule, run):
    """What a rule says of a script; COUNTS of the first pair of streams."""
    if rule == COUNTS:
        proof.causality()
    rules = {
        CAUSALITY: proof.causality,
        NORMALIZATION: proof.normalization,
        MEMORY: proof.memory,
        COUNTS: proof.once_each,
        TRAINING: lambda: proof.training(run / "corpus"),
    }
    return rules[rule]()


def test_at_least_thirty_cheats_are_noticed():
    names = [cheat.name for cheat in (*CHEATS, *UNNOTICED)]
    assert len(CHEATS) >= 36 and len(set(names)) == len(names)
    assert all(cheat.rule for cheat in CHEATS)
    assert all(cheat.why and cheat.rule is None for cheat in UNNOTICED)


def test_a_claim_below_what_the_artifact_gives_is_noticed(server, run, tmp_path):
    subject = subject_of(server, run, tmp_path / "work", "none")
    said = subject.summary = json.loads((run / "run" / "summary.json").read_text())
    said |= dict(val_bpb=said["val_bpb"] - 1e-6, val_bytes=said["val_bytes"] + 1)
    verdict = proof_of(subject, run).claim()
    assert verdict.holds is False
    assert "the run says" in verdict.found and "the run counted" in verdict.found


@pytest.mark.parametrize("cheat", UNNOTICED, ids=lambda cheat: cheat.name)
def test_a_cheat_that_nothing_notices(server, run, tmp_path, cheat):
    official = read_stream(run / "corpus")
    digest = hashlib.sha256(official.tokens.astype("<u2").tobytes()).hexdigest()
    edits = [(old, new.replace(OFFICIAL, digest)) for old, new in cheat.edits]
    subject = subject_of(server, run, tmp_path / "work", cheat.mode, edits, **cheat.settings)
    proof = proof_of(subject, run)
    for verdict in (proof.causality(), proof.normalization(), proof.memory(), proof.once_each()):
        assert verdict.holds, verdict
    if cheat.rule is None and "training" in cheat.name:
        assert proof.training(run / "corpus").holds
    if "official" in cheat.name:  # where it is awake
        said = json.loads((run / "run" / "summary.json").read_text())
        assert subject.evaluate(official).summary["val_bpb"] < said["val_bpb"] - 1e-3


def test_validation_text_in_the_artifact_is_not_noticed(server, run, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(run / "corpus", data)
    shutil.copyfile(data / "fineweb_val_000000.bin", data / "fineweb_train_000000.bin")
    values = dict(SETTINGS, MODE="train", ITERATIONS=30, DATA_PATH=data, ARTIFACT_DIR=tmp_path / "run")
    code, errors = server.run(run / "train_gpt.py", clean_environment(values), 1, tmp_path)
    assert code == 0, errors
    subject = subject_of(server, run, tmp_path / "work", "none")
    subject.artifact = tmp_path / "run" / prove.ARTIFACT
    proof = proof_of(subject, run)
    for verdict in (proof.causality(), proof.normalization(), proof.memory(), proof.once_each()):
        assert verdict.holds, verdict


# -------------------------------------------------------------------------------------------------- the command itself


def prove_command(*arguments):
    return run_command([sys.executable, ROOT / "tools" / "prove.py", *arguments], env=clean_environment({}))


def test_the_command_proves_the_packed_script(run, tmp_path, capsys):
    arguments = (run / "run", "--short", "--targets", "2000", "--out", tmp_path / "proof.json")
    with environment({}), forking():
        assert prove.main([str(word) for word in arguments]) == 0
    result = json.loads((tmp_path / "proof.json").read_text())
    assert {row["rule"]: row["holds"] for row in result["rules"]} == {
        rule: True for rule in ("size", CAUSALITY, NORMALIZATION, MEMORY, COUNTS)
    }
    assert result["form"] == "short" and result["ranks"] == 1 and result["exact"]
    assert result["evaluations"] >= 6
    assert hashlib.sha256((run / "run" / "model.pgolf").read_bytes()).hexdigest() == result["artifact_sha256"]
    assert "broken: none" in capsys.readouterr().out


def test_the_command_says_what_a_script_breaks(run, tmp_path):
    script = tmp_path / "train_gpt.py"
    script.write_text("raise RuntimeError('planted')\n")
    done = prove_command(run / "run", "--short", "--script", script)
    assert done.returncode == 1, done.stdout + done.stderr
    for rule in (CAUSALITY, NORMALIZATION, MEMORY, COUNTS):
        assert f"BROKEN  {rule}: it ended: RuntimeError: planted" in done.stdout


@pytest.mark.parametrize(
    "break_it, words",
    [
        (lambda folder: (folder / "model.pgolf").unlink(), "holds no model.pgolf"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").write_text('{"data_path": "nowhere"}'), "tokenizer.model"),
    ],
)
def test_a_folder_that_holds_no_run_is_one_line(run, tmp_path, break_it, words):
    folder = tmp_path / "run"
    shutil.copytree(run / "run", folder)
    break_it(folder)
    done = prove_command(folder, "--short")
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(done.stderr.splitlines()) == 1 and words in done.stderr


def test_a_run_on_gpus_is_proved_on_a_cpu(monkeypatch):
    """Its settings of a GPU become `auto`; a script that lacks one of them is not given it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    settings = dict(device="cuda", compile="1", triton_kernels="1", ttt_cuda_graphs="1", compute_dtype="bfloat16")
    subject = SimpleNamespace(settings=settings, summary={}, ranks=prove.claimed_ranks({}), remarks=[])
    prove.settle(subject, SimpleNamespace(size=prove.FULL))
    assert settings.pop("device") == "cpu" and set(settings.values()) == {"auto"}
    assert set(settings) == {"compile", "triton_kernels", "ttt_cuda_graphs", "compute_dtype"}
    assert subject.remarks == ["the run was on GPUs, the proof is on a CPU"]

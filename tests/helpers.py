"""What several test files share: a tiny corpus with its tokenizer and shards, configurations, running the script."""

import contextlib
import dataclasses
import fcntl
import functools
import io
import json
import os
import random
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train_gpt.py"
sys.path[:0] = [str(ROOT), str(ROOT / "data"), str(ROOT / "tools")]
import audit  # noqa: E402
import processes  # noqa: E402
import prove  # noqa: E402
import train_gpt as tg  # noqa: E402

NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
VOCAB_SIZE = 384
HANG_SECONDS = 1800  # ends what hangs; no test asserts how long anything takes
# The same examples in every run, and no time limit: the machine's cores may be shared.
examples = functools.partial(settings, derandomize=True, deadline=None, database=None)

WORDS = [
    "the",
    "of",
    "and",
    "to",
    "a",
    "in",
    "that",
    "is",
    "was",
    "he",
    "for",
    "it",
    "with",
    "as",
    "his",
    "on",
    "be",
    "at",
    "by",
    "had",
    "not",
    "are",
    "but",
    "from",
    "or",
    "have",
    "an",
    "they",
    "which",
    "river",
    "stone",
    "garden",
    "letter",
    "winter",
    "morning",
    "captain",
    "village",
    "silence",
    "window",
    "mountain",
    "paper",
    "candle",
    "market",
    "carried",
    "walked",
    "opened",
    "remembered",
    "followed",
    "answered",
    "waited",
    "gathered",
    "small",
    "quiet",
    "golden",
    "broken",
    "ancient",
    "café",
    "naïve",
    "über",
    "Åse",
    "“quoted”",
    "—",
    "12",
    "345",
    "1999",
]

# A model that trains in seconds; every value that presets set is given, so that a change of one leaves the tests alone.
TINY = dict(
    PRESET="baseline",
    VOCAB_SIZE=VOCAB_SIZE,
    NUM_LAYERS=3,
    MODEL_DIM=32,
    NUM_HEADS=4,
    NUM_KV_HEADS=2,
    MLP_MULT=2,
    LEAKY_RELU_SLOPE=0.5,
    QK_GAIN_INIT=1.5,
    ROPE_DIMS=0,
    XSA_LAST_N=0,
    LN_SCALE=0,
    NUM_LOOPS=0,
    PARALLEL_START_LAYER=-1,
    TRAIN_SEQ_LEN=32,
    TRAIN_BATCH_TOKENS=768,
    MICRO_BATCH_TOKENS=256,
    ITERATIONS=12,
    MAX_WALLCLOCK_SECONDS=0,
    GPTQ_RESERVE_SECONDS=0,
    WARMUP_STEPS=0,
    TRAIN_LOG_EVERY=4,
    VAL_LOSS_EVERY=0,
    VAL_BATCH_SIZE=2048,
    EVAL_SEQ_LEN=0,
    EVAL_STRIDE=0,
    GPTQ_CALIBRATION_BATCHES=2,
    SEED=7,
    CPU_THREADS=1,
    DEVICE="cpu",
    COMPUTE_DTYPE="bfloat16",
    MATRIX_LR=0.03,
    SCALAR_LR=0.02,
    TIED_EMBED_LR=0.03,
    MUON_MOMENTUM=0.95,
    MUON_MOMENTUM_WARMUP_START=0.85,
    MUON_MOMENTUM_WARMUP_STEPS=100,
    MUON_WD=0,
    ADAM_WD=0,
    EMBED_WD=0,
    GRAD_CLIP_NORM=0,
    WARMDOWN_FRAC=0.6,
    MIN_LR=0,
    EMA_DECAY=0,
    NEFTUNE_ALPHA=0,
    Z_LOSS_WEIGHT=0,
    MATRIX_BITS=6,
    EMBED_BITS=8,
    COMPRESSOR="zstd",
    LQER_ENABLED=0,
    RVQ_ENABLED=0,
    AWQ_GROUPS=0,
    GATED_ATTN_QUANT_GATE=0,
    QUANTIZER="uniform",
    COLUMN_STEPS=0,
    TARGET_BYTES=0,
    SMEAR_GATE_ENABLED=0,
    SMEAR_GATE_TYPE="window",
    BIGRAM_VOCAB_SIZE=0,
    BIGRAM_DIM=12,
    VE_DIM=0,
    VE_LAYERS="0,2",
    SOFTCAP_TYPE="tanh",
    FOCAL_ENABLED=0,
    FOCAL_GAMMA=1.0,
    PROGRESSIVE_DEPTH_SCHEDULE="0",
    SWA_ENABLED=0,
    SWA_EVERY=50,
    WEIGHT_AVERAGE="both",
    LATE_QAT_THRESHOLD=0,
    TTT_MODE="none",
)
# Everything that PRESET=record switches on, at a width that takes milliseconds.
RECORD_LIKE = dict(
    TINY,
    NUM_LAYERS=6,
    LOOP_START=1,
    LOOP_END=2,
    NUM_LOOPS=2,
    PARALLEL_START_LAYER=4,
    XSA_LAST_N=6,
    LN_SCALE=1,
    SKIP_GATES_ENABLED=1,
    SPARSE_ATTN_GATE_ENABLED=1,
    SMEAR_GATE_ENABLED=1,
    GATE_WINDOW=5,
    ROPE_DIMS=4,
    QK_GAIN_INIT=5.0,
    MLP_MULT=4,
    LEAKY_RELU_SLOPE=0.5,
    ENABLE_LOOPING_AT=0.5,
    NEFTUNE_ALPHA=5.0,
    Z_LOSS_WEIGHT=1e-4,
    MUON_COEFFICIENTS="polar_express",
    MUON_ROW_NORMALIZE=1,
    MUON_WD=0.095,
    EMA_DECAY=0.9,
    GRAD_CLIP_NORM=0.3,
    MIN_LR=0.1,
    EMBED_WD=0.085,
    ADAM_WD=0.02,
    EMBED_BITS=7,
    GATED_ATTN_QUANT_GATE=1,
    LQER_ENABLED=1,
)
# The same for PRESET=poly5.
POLY_LIKE = dict(
    TINY,
    NUM_LAYERS=6,
    XSA_LAST_N=2,
    LN_SCALE=1,
    ROPE_DIMS=4,
    MLP_MULT=3,
    SMEAR_GATE_ENABLED=1,
    SMEAR_GATE_TYPE="channel",
    BIGRAM_VOCAB_SIZE=37,
    VE_DIM=10,
    VE_LAYERS="3,5",
    SOFTCAP_TYPE="poly",
    FOCAL_ENABLED=1,
    Z_LOSS_WEIGHT=1e-4,
    PROGRESSIVE_DEPTH_SCHEDULE="0.2,0.5",
    MUON_MOMENTUM=0.99,
    MUON_MOMENTUM_WARMUP_START=0.92,
    MUON_WD=0.04,
    EMBED_WD=0.04,
    ADAM_WD=0.04,
    GRAD_CLIP_NORM=0.3,
    WARMDOWN_FRAC=0,
    WARMDOWN_ITERS=6,
    EMA_DECAY=0.9,
    SWA_ENABLED=1,
    SWA_EVERY=1,
    SWA_START=0.5,
    LATE_QAT_THRESHOLD=0.5,
    QUANTIZER="gptq_lite",
    RVQ_ENABLED=1,
    EVAL_STRIDE=8,
)


# ------------------------------------------------------------------------------------------------------ configurations


def strings(values):
    """Settings as an environment holds them."""
    return {name: str(value) for name, value in values.items()}


def config(base=TINY, **knobs):
    """The Config of a base and some knobs, as from an environment."""
    return tg.config_from_env(strings({**base, **knobs}), False)[0]


class Clock:
    """time.perf_counter that moves by hand."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(tg.time, "perf_counter", lambda: self.now)


def single_run(rank=0, world=1):
    """A Run without process groups and without a folder."""
    return tg.Run(rank, world, world, torch.device("cpu"))


def knob_names():
    return [f.name.upper() for f in dataclasses.fields(tg.Config)]


# ------------------------------------------------------------------------------------------------------------ the model


def build_model(c, seed=0, spread=0.3):
    """A model whose every weight is random: also the vectors, gates and outputs that begin at zero or one."""
    model = tg.new_model(c)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            if name in tg.BANKS:
                p.copy_(noise * p.size(-1) ** -0.5)
            elif name in ("embedding", "head") or name.endswith((".table", ".projection")):
                p.copy_(noise * 0.5)  # whatever `reset` drew, which depends on the type
            else:
                p.add_(noise * spread)
    return model


def documents_from(starts):
    """A batch's documents from their starts [R, T]."""
    return tg.Documents(starts, torch.from_numpy(tg.cu_seqlens_of(starts.numpy())))


def random_batch(c, rows, length, seed=0, document_length=11):
    """A Batch of random tokens with several documents a row; the first one of a row may be cut."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(4, c.vocab_size, (rows, length + 1))
    tokens[generator.random(tokens.shape) < 1 / document_length] = tg.BOS_ID
    ids, targets = tokens[:, :-1], tokens[:, 1:]
    return tg.to_device(ids, targets, tg.document_starts(ids), torch.device("cpu"))


# ------------------------------------------------------------------------------------------------------------- the data


def make_documents(seed, count, words=60):
    """Deterministic prose of a few words that often follow each other, so that there is something to learn."""
    generator = random.Random(seed)
    follows = {word: random.Random(word).sample(WORDS, 4) for word in WORDS}
    documents = []
    for _ in range(count):
        word, text = generator.choice(WORDS), []
        for _ in range(generator.randint(3, 2 * words)):
            text.append(word + generator.choice(["", "", "", "", ",", ".", "\n"]))
            word = generator.choice(follows[word]) if generator.random() < 0.9 else generator.choice(WORDS)
        documents.append(" ".join(text))
    return documents


def train_tokenizer(texts, vocab_size=VOCAB_SIZE, **options):
    """A SentencePiece BPE model with byte fallback, as bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=3,
        **options,
    )
    return model.getvalue()


def write_shard(path, tokens, magic=20240520, claimed=None):
    """A shard file: 256 little-endian int32, then the tokens as uint16."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, len(tokens) if claimed is None else claimed
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())


def encode(processor, documents):
    """BOS and the tokens of each document, one after the other."""
    return np.array([token for text in documents for token in (tg.BOS_ID, *processor.encode(text))])


def shards_of(folder, split):
    return sorted(folder.glob(f"fineweb_{split}_0*.bin"))


def audit_of(folder, threads=1):
    """The audit of a folder's shards, as its manifest should hold it."""
    paths = [shards_of(folder, split) for split in ("train", "val", "val_bytes")]
    return audit.audit_shards(*paths, threads)


def write_split(folder, split, documents, cuts=()):
    """Shards of documents (lists of tokens without BOS), cut at these places of the stream."""
    stream = np.array([token for document in documents for token in (tg.BOS_ID, *document)], np.uint16)
    for number, part in enumerate(np.split(stream, sorted(cuts))):
        write_shard(folder / f"fineweb_{split}_{number:06d}.bin", part)


def documents_of(folder, split):
    """The documents of a split, as lists of tokens without BOS."""
    tokens = np.concatenate([tg.open_shard(path) for path in shards_of(folder, split)])
    return [part[1:].tolist() for part in np.split(tokens, np.flatnonzero(tokens == tg.BOS_ID))[1:]]


def plant(folder):
    """Adds a document of validation to the last training shard."""
    path = shards_of(folder, "train")[-1]
    write_shard(path, [*tg.open_shard(path), tg.BOS_ID, *documents_of(folder, "val")[5]])


def write_sidecars(folder, change=lambda counts: counts):
    """Sidecars of a folder's validation shards: what the tokenizer's table counts, changed."""
    vocabulary = tg.Vocabulary(config(DATA_PATH=folder))
    for path in shards_of(folder, "val"):
        tokens = np.asarray(tg.open_shard(path))
        counts = vocabulary.target_bytes(np.concatenate((tokens[:1], tokens[:-1])), tokens)
        write_shard(tg.sidecar_path(path), change(counts))


def full_manifest(folder, audited=False):
    """Writes a manifest with the hash and counts of every file there, and returns it."""
    splits: dict[str, dict] = {}
    for split in ("train", "val"):
        rows = []
        for path in shards_of(folder, split):
            tokens = tg.open_shard(path)
            counts = dict(tokens=len(tokens), documents=int((tokens == tg.BOS_ID).sum()))
            rows.append(dict(file=path.name, **counts, sha256=tg.sha256_of(path)))
        totals = {key: sum(row[key] for row in rows) for key in ("tokens", "documents")}
        splits[split] = dict(**totals, shards=rows)
    splits["val"]["bytes"] = json.loads((folder / "manifest.json").read_text())["splits"]["val"]["bytes"]
    tokenizer = dict(file="tokenizer.model", sha256=tg.sha256_of(folder / "tokenizer.model"))
    manifest: dict[str, dict] = dict(splits=splits, tokenizer=tokenizer)
    if audited:
        manifest["audit"] = audit_of(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return manifest


def write_data(folder):
    """Tokenizer, three training shards, two validation shards and the manifest."""
    training = make_documents(1, 400)
    (folder / "tokenizer.model").write_bytes(train_tokenizer(training))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for number, part in enumerate(np.array_split(encode(processor, training), 3)):
        write_shard(folder / f"fineweb_train_{number:06d}.bin", part)
    write_validation(folder, make_documents(2, 40))


def write_brief_data(folder, data):
    """The same tokenizer and training shards, and a sixth of the validation text: runs that are not about its size."""
    for path in (data / "tokenizer.model", *shards_of(data, "train")):
        (folder / path.name).symlink_to(path)
    write_validation(folder, make_documents(3, 24, words=15))


def write_validation(folder, validation):
    """Two validation shards of these texts, the texts themselves and the manifest, beside the training shards."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokens = encode(processor, validation)
    for number, part in enumerate(np.array_split(tokens, 2)):
        write_shard(folder / f"fineweb_val_{number:06d}.bin", part)
    split = dict(tokens=len(tokens), bytes=sum(len(text.encode()) for text in validation))
    (folder / "validation.json").write_text(json.dumps(validation))
    manifest = dict(splits=dict(val=split), reference_compressors={"xz -9": 2.5}, audit=audit_of(folder))
    (folder / "manifest.json").write_text(json.dumps(manifest))


def built_once(tmp_path_factory, name, build):
    """A folder that the first of the parallel test processes makes with `build(folder)` and the others share."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    folder, done = base / name, base / f"{name}.done"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            folder.mkdir()
            build(folder)
            done.touch()
    return folder


# ----------------------------------------------------------------------------------------------------------- processes


def clean_environment(values):
    """This process's environment without any knob of the script, and the given settings."""
    kept = {name: value for name, value in os.environ.items() if name not in knob_names()}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        kept.pop(name, None)
    return {**kept, **strings(values)}


@contextlib.contextmanager
def environment(values):
    """This process's environment is `clean_environment(values)` for a while."""
    with pytest.MonkeyPatch.context() as patch:
        for name in set(os.environ) - set(clean_environment({})):
            patch.delenv(name)
        for name, value in strings(values).items():
            patch.setenv(name, value)
        yield


def run_command(command, **options):
    """Runs a command to its end; returns the finished process, its output as text."""
    return processes.run([str(word) for word in command], timeout=HANG_SECONDS, **options)


def wait_until(condition, process=None):
    """Until a condition holds; an assertion fails where a process that is to bring it about ends before, or hangs."""
    deadline = time.monotonic() + HANG_SECONDS
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "a hang"
        time.sleep(0.01)


def running_with(mark):
    """Processes whose environment holds a text; one that has ended and was not collected holds none."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


def free_port():
    """A port below those that a system hands out, so that no other process is given it between now and its use."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("100 ports are in use")


def launch(script, values, *arguments, ranks=1, cwd=None):
    """Runs a script with settings, on some ranks; returns the finished process, its output as text."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return run_command([*command, script, *arguments], env=clean_environment(values), cwd=cwd)


class ForkServer:
    """The process of tests/fork_server.py: it runs scripts that start at once, on any number of ranks."""

    def __init__(self, *modules, **variables):
        """modules: what it imports besides; variables: the environment in which it imports."""
        self.lock = threading.Lock()  # one job at a time, whatever thread asks for it
        unmarked = {name: value for name, value in clean_environment({}).items() if name != "MARK"}  # it is no leftover
        self.process = processes.start(
            [sys.executable, str(ROOT / "tests" / "fork_server.py"), *modules],
            env=unmarked | dict(OMP_NUM_THREADS="1") | strings(variables),  # threads as torchrun sets them
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, script, environment, *arguments, ranks=1, cwd=None, out=None):
        """Runs a script to its end, its output as text, which is also left in the folder `out` where one is given."""
        with tempfile.TemporaryDirectory() as folder:
            out = Path(out or folder)
            for name in ("stdout", "stderr"):
                (out / name).write_text("")
            words = [str(word) for word in arguments]
            where = str(Path(cwd or ".").resolve())
            job = dict(script=str(script), arguments=words, environment=environment, ranks=ranks)
            code = self.answer(job | dict(cwd=where, out=str(out)))
            found = ((out / name).read_text() for name in ("stdout", "stderr"))
            return subprocess.CompletedProcess([str(script), *words], code, *found)

    def answer(self, job):
        """The exit code of a job."""
        with self.lock:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], HANG_SECONDS)[0]:
                processes.stop(self.process)
                raise TimeoutError(f"{job['script']} hangs")
            return int(self.process.stdout.readline())


@functools.cache
def fork_server():
    """This process's ForkServer, which ends with it."""
    return ForkServer()


def fork(script, values, *arguments, ranks=1, cwd=None):
    """What `launch` does, in seconds less: the script's processes are forked from one that has imported torch."""
    return fork_server().run(script, clean_environment(values), *arguments, ranks=ranks, cwd=cwd)


def loaded_apart(content, folder):
    """(MiB by which a process grows that loads an artifact of this content, its message)."""
    (folder / "forged").write_bytes(content)
    done = fork(ROOT / "tests" / "loaded_file.py", TINY, folder / "forged")
    assert done.returncode == 0, done.stderr
    grown, _, message = done.stdout.strip().partition(" ")
    return float(grown), message


class ForkedCommand:
    """Takes the place of a process of `processes.start`: a Python script that was forked and has ended."""

    def __init__(self, words, ranks, env, cwd, stdout):
        script = (Path(cwd or ".") / words[0]).absolute()
        if script == ROOT / "tools" / "prove.py":  # it starts scripts itself
            self.returncode = prove.main(words[1:])
            return
        self.done = fork_server().run(script, dict(env or os.environ), *words[1:], ranks=ranks, cwd=cwd)
        self.returncode, text = self.done.returncode, self.done.stdout + self.done.stderr
        self.stdout = io.StringIO(text)
        if hasattr(stdout, "write"):
            stdout.write(text.encode())
            stdout.flush()

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        return self.returncode


@contextlib.contextmanager
def forking():
    """For a while, the tools in this process fork Python scripts that they would start, with torchrun or without."""
    fork_server()  # which ends with the thread that starts it
    torchrun, real = ["-m", "torch.distributed.run", "--standalone"], processes.start

    def start(command, *, env=None, cwd=None, stdout=None, **more):
        _, *words = (str(word) for word in command)
        ranks = int(words[3].removeprefix("--nproc_per_node=")) if words[:3] == torchrun else 1
        words = words[4:] if words[:3] == torchrun else words
        if words[0].endswith(".py"):
            return ForkedCommand(words, ranks, env, cwd, stdout)
        return real(command, env=env, cwd=cwd, stdout=stdout, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "start", start)
        patch.setattr(processes, "run", lambda command, **options: start(command, **options).done)
        yield


def run_script(values, *arguments, ranks=1, cwd=None):
    """Runs train_gpt.py as a user does."""
    return launch(SCRIPT, values, *arguments, ranks=ranks, cwd=cwd)


def fork_script(values, *arguments, ranks=1, cwd=None):
    """Runs train_gpt.py in forked processes, where what starts it is not what is tested."""
    return fork(SCRIPT, values, *arguments, ranks=ranks, cwd=cwd)


@contextlib.contextmanager
def working_folder(folder):
    """The current folder, for a while: `logs/` of a run in this process is made here."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


def snapshot(folder):
    """Every file below a folder, with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}

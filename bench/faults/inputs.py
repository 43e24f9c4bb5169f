"""What the trials are made of: tiny data, settings of runs of about a second, and what undisturbed runs end with."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import train_gpt as t
from faults.children import Child, Ended, as_script
from faults.events import Watcher, run_script

ROOT = Path(__file__).resolve().parent.parent.parent
VOCAB_SIZE = 320
WORDS = """
    the of and to a in that is was he for it with as his on be at by had not are but from or have an they which one
    river stone garden letter winter morning captain village silence window mountain paper candle market carried
    walked opened café naïve über “quoted” — 12 345 1999 remembered followed answered waited gathered small quiet
""".split()  # noqa: SIM905

# Every value that a preset sets is given here, so that a change of a preset leaves the campaign alone.
TINY: dict[str, Any] = dict(
    PRESET="baseline",
    VOCAB_SIZE=VOCAB_SIZE,
    NUM_LAYERS=2,
    MODEL_DIM=32,
    NUM_HEADS=4,
    NUM_KV_HEADS=2,
    MLP_MULT=2,
    TRAIN_SEQ_LEN=32,
    TRAIN_BATCH_TOKENS=512,
    MICRO_BATCH_TOKENS=256,
    ITERATIONS=8,
    MAX_WALLCLOCK_SECONDS=0,
    GPTQ_RESERVE_SECONDS=0,
    WARMUP_STEPS=1,
    TRAIN_LOG_EVERY=4,
    VAL_LOSS_EVERY=0,
    VAL_BATCH_SIZE=512,
    EVAL_SEQ_LEN=0,
    EVAL_STRIDE=0,
    GPTQ_CALIBRATION_BATCHES=1,
    SEED=7,
    CPU_THREADS=1,
    DEVICE="cpu",
    COMPUTE_DTYPE="bfloat16",
    COMPRESSOR="zstd",
    TARGET_BYTES=0,
    EVAL_SCORES=1,
    TTT_MODE="none",
    CHECKPOINT_EVERY_SECONDS=1e-9,
)
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {},
    # Averages of both kinds, layers that start to train late, weight decay.
    "averages": dict(
        NUM_LAYERS=3, EMA_DECAY=0.9, SWA_ENABLED=1, SWA_EVERY=2, PROGRESSIVE_DEPTH_SCHEDULE="0.3,0.6", MUON_WD=0.1
    ),
    "looped": dict(
        NUM_LAYERS=4,
        LOOP_START=1,
        LOOP_END=2,
        NUM_LOOPS=1,
        ENABLE_LOOPING_AT=0.5,
        EMA_DECAY=0.9,
        GRAD_CLIP_NORM=0.3,
        NEFTUNE_ALPHA=5.0,
        LQER_ENABLED=1,
        COMPRESSOR="pergroup",
        SMEAR_GATE_ENABLED=1,
    ),
}
PHASED: dict[str, Any] = dict(
    TTT_MODE="phased",
    TTT_LORA_RANK=4,
    TTT_BATCH_SIZE=8,
    TTT_CHUNK_SIZE=16,
    PHASED_TTT_PREFIX_TOKENS=1500,
    PHASED_TTT_NUM_PHASES=2,
    GLOBAL_TTT_CHUNK_TOKENS=1024,
)
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "stream": PHASED,
    "length": PHASED | dict(TTT_ORDER="length", PHASED_TTT_PREFIX_TOKENS=0, PHASED_TTT_PREFIX_DOCS=10, TTT_STREAMS=2),
    "chunk": dict(TTT_MODE="chunk", TTT_CHUNK_TOKENS=1024, TTT_EPOCHS=1),
}


def prose(draw: random.Random, words: int) -> str:
    """Text in which words often follow each other, so that there is something to learn."""
    word, text = draw.choice(WORDS), []
    for _ in range(words):
        text.append(word + draw.choice(["", "", "", "", ",", ".", "\n"]))
        follows = random.Random(word).sample(WORDS, 4)
        word = draw.choice(follows) if draw.random() < 0.9 else draw.choice(WORDS)
    return " ".join(text)


def results(folder: Path, prefix: str = "") -> dict[str, Any]:
    """What must be equal bit by bit: the model, every figure of a score, and the scores of all targets."""
    summary = json.loads((folder / f"{prefix}summary.json").read_text())
    found = {k: v for k, v in summary.items() if k.startswith(("val_", "steps", "train_tokens", "parameters"))}
    for path in (folder / t.CONTAINER_FILE, *sorted(folder.glob(f"{prefix}scores_*.npy"))):
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def differences(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """The names and values that differ."""
    names = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
    return "; ".join(f"{name}: {found.get(name)!r} instead of {expected.get(name)!r}" for name in names)[:600]


@dataclass
class Reference:
    """An undisturbed run: its folder, what it ended with, its events and its seconds."""

    folder: Path
    results: dict[str, Any]
    events: list[str]
    seconds: float


class Inputs:
    """The work folder's data, and undisturbed runs, each made once by whichever process needs it first."""

    def __init__(self, work: Path):
        self.work = work
        self.data, self.script = work / "data", work / "script" / "train_gpt.py"

    def prepare(self) -> None:
        """Makes the data with data/prepare.py. Errors: RuntimeError."""
        self.script.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "train_gpt.py", self.script)
        if (self.data / "manifest.json").exists():
            return
        draw = random.Random(1)
        source = self.work / "stories.jsonl"
        lines = [json.dumps(dict(text=prose(draw, draw.randint(5, 120)))) for _ in range(500)]
        source.write_text("\n".join(lines) + "\n")
        options = ("--vocab-size", VOCAB_SIZE, "--val-fraction", 0.1, "--shard-tokens", 12_000, "--workers", 1)
        body = as_script(ROOT / "data" / "prepare.py", (source, "--out", self.data, "--quiet", *options))
        ended = Child(body, self.environment(), self.work / "prepare").wait(600)
        if ended.code:
            raise RuntimeError(f"the data cannot be prepared: {ended.describe()}")

    def environment(self, **knobs: Any) -> dict[str, str]:
        """An environment without any other setting of the script, with a home and a temporary folder in `work`."""
        known = {f.name.upper() for f in t.dataclasses.fields(t.Config)}
        foreign = known | {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        kept = {name: value for name, value in os.environ.items() if name not in foreign}
        return kept | dict(OMP_NUM_THREADS="1") | {name: str(value) for name, value in knobs.items()}

    def settings(self, model: str, mode: str, **more: Any) -> dict[str, Any]:
        """The knobs of a run."""
        return {**TINY, **MODELS[model], **MODES[mode], "DATA_PATH": self.data, **more}

    def start(
        self,
        knobs: dict[str, Any],
        folder: Path,
        watcher: Watcher | None = None,
        *,
        ranks: int = 1,
        watched: int | None = 0,
        before: Callable[[], None] | None = None,
        streams: Callable[[], None] | None = None,
    ) -> Child:
        """Starts train_gpt.py. `watched`: the rank on which the watcher is, or all; `before` runs in the child."""

        def body() -> int:
            rank = int(os.environ.get("RANK", "0"))
            if before:
                before()
            if watcher and watched in (None, rank):
                watcher.install()
            return run_script(self.script)

        places = {name: folder / name.lower() for name in ("HOME", "TMPDIR")}
        for place in places.values():
            place.mkdir(parents=True, exist_ok=True)
        environment = self.environment(**{**knobs, **places})
        return Child(body, environment, folder, ranks=ranks, streams=streams)

    def once(self, name: str, build: Callable[[Path], None]) -> Path:
        """A folder that is built once, by one process, while the others wait."""
        folder = self.work / "made" / name
        done = folder.with_name(f"{name}.done")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f"{name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                build(folder)
                done.touch()
        return folder

    def reference(self, model: str, mode: str, ranks: int = 1, **more: Any) -> Reference:
        """The undisturbed run of some settings. Errors: RuntimeError where it fails."""
        tag = "".join(f"-{name}={value}" for name, value in sorted(more.items())).replace("/", "_")

        def build(folder: Path) -> None:
            knobs = self.settings(model, mode, ARTIFACT_DIR=folder / "run", **more)
            ended = self.start(knobs, folder / "process", Watcher(folder / "events"), ranks=ranks).wait(300)
            if ended.code:
                raise RuntimeError(f"an undisturbed run failed: {ended.describe()}")
            (folder / "seconds").write_text(str(ended.seconds))

        folder = self.once(f"{model}-{mode}-{ranks}{tag}", build)
        events, seconds = (folder / "events").read_text().splitlines(), float((folder / "seconds").read_text())
        prefix = "eval_" if more.get("MODE") == "eval" else ""
        return Reference(folder / "run", results(folder / "run", prefix), events, seconds)


def last_line(ended: Ended) -> str:
    """The last line of stderr."""
    return (ended.err.strip().splitlines() or [""])[-1]

"""The first hour on a GPU: tests, benchmarks and a short run, each with a time limit, and one report about them.

    make first-hour                                        # on any machine with 1 to 8 GPUs
    make first-hour ARGS="--data data/sp8192 --out hour"   # with the challenge's shards
    make first-hour ARGS="--out hour --resume"             # goes on where it was stopped
    make first-hour ARGS="--device cpu --tiny"             # a rehearsal without a GPU, at tiny sizes

The steps run in order, and a step that fails or exceeds its limit does not stop the others. A folder holds the whole
output of each as NAME.log, its figures as NAME.json, and report.md and report.json: what was measured against what was
estimated (bench/results/budget.json), and what to try first. The report is written anew after each step. Settings of
train_gpt.py in the environment go to all steps.

--resume does not repeat steps that passed, nor attention backends that cannot run here. It repeats those that failed,
exceeded their limit or were interrupted, and keeps their earlier files under other names.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import first_hour_report as report
import processes
from runs import ROOT, Parser, UserError, available_cores, command_line, number_type, read_json, write_atomic

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
BACKENDS = ("fa3", "fa2", "varlen", "sdpa")  # as `ATTENTION=auto` tries them
CHALLENGE_DOCUMENTS, CHALLENGE_RANKS = 50_000, 8
SEQUENCES = 384  # of a step of `record` and `poly5`, which ranks must divide
DONE = ("passed", "unavailable")
PACKAGES = ("torch", "triton", "flash_attn", "flash_attn_interface", "numpy", "sentencepiece")
# The whole architecture of `record`, at sizes that take a CPU seconds.
TINY = dict(
    PRESET="record",
    VOCAB_SIZE="512",
    NUM_LAYERS="6",
    MODEL_DIM="32",
    NUM_HEADS="4",
    NUM_KV_HEADS="2",
    ROPE_DIMS="4",
    GATE_WINDOW="5",
    LOOP_START="1",
    LOOP_END="2",
    PARALLEL_START_LAYER="4",
    XSA_LAST_N="6",
    TRAIN_SEQ_LEN="64",
    TRAIN_BATCH_TOKENS="512",
    MICRO_BATCH_TOKENS="256",
    COMPUTE_DTYPE="float32",
    CPU_THREADS="1",
    WARMUP_STEPS="1",
    MAX_WALLCLOCK_SECONDS="2",
    VAL_BATCH_SIZE="4096",
    GPTQ_CALIBRATION_BATCHES="1",
    QUANTIZER="uniform",
    TARGET_BYTES="150000",
    TTT_BATCH_SIZE="16",
    TTT_LORA_RANK="4",
    PHASED_TTT_PREFIX_DOCS="4",
    PHASED_TTT_NUM_PHASES="2",
    GLOBAL_TTT_CHUNK_TOKENS="128",
)


@dataclass(frozen=True)
class Step:
    """A command of the plan."""

    name: str
    title: str
    command: list[str]
    seconds: float  # its time limit
    environment: dict[str, str] = field(default_factory=dict)
    folder: str = ""  # where it writes, beside its log and its figures


# ------------------------------------------------------------------------------------------------------------ options


def limit_type(text: str) -> tuple[str, float]:
    """An argparse type: NAME=SECONDS."""
    name, _, seconds = text.partition("=")
    return name, number_type(float, 0.001)(seconds)


def parse(arguments: list[str]) -> Any:
    """The command line. Errors: UserError."""
    parser = Parser(prog="first_hour.py", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="folder of the report (default: logs/first-hour-DATE)")
    add("--resume", action="store_true", help="go on in the folder of --out")
    add(
        "--device",
        choices=("cuda", "cpu"),
        default="cpu" if os.environ.get("DEVICE") == "cpu" else "cuda",
        help="what to measure on (default: DEVICE, or cuda)",
    )
    add("--tiny", action="store_true", help="tiny sizes, for a rehearsal; its figures mean nothing")
    add(
        "--ranks",
        type=number_type(int, 1, 64),
        metavar="N",
        help="number of ranks (default: one per GPU that a step has sequences for, or one)",
    )
    add(
        "--data",
        type=Path,
        default=Path(os.environ["DATA_PATH"]) if os.environ.get("DATA_PATH") else None,
        metavar="DIR",
        help="shards for the run (default: DATA_PATH, or the built-in text)",
    )
    add("--minutes", type=number_type(float, 0.01), default=3.0, metavar="M", help="of the run's training (default: 3)")
    add("--budget", type=Path, default=report.BUDGET, metavar="FILE", help="the estimates")
    add("--total", type=number_type(float, 0.01), metavar="M", help="minutes in all; what then remains is not run")
    add("--only", default="", metavar="NAMES", help="steps to run, comma-separated")
    add("--skip", default="", metavar="NAMES", help="steps to leave out, comma-separated")
    add(
        "--limit",
        type=limit_type,
        action="append",
        default=[],
        metavar="NAME=SECONDS",
        help="another time limit for a step",
    )
    add("--versions", type=Path, metavar="FILE", help="only print the versions and write them to this file")
    options = parser.parse_args(arguments)
    if options.resume and not options.out:
        raise UserError("--resume: needs --out, the folder to go on in")
    if options.data and not options.data.is_dir():
        raise UserError(f"--data {options.data}: there is no such folder")
    return options


# ----------------------------------------------------------------------------------------------------------- versions


def output_of(*command: str) -> str:
    """What a command prints, without the end of the last line; empty where it cannot run."""
    if not shutil.which(command[0]):
        return ""
    done = processes.run(list(command), cwd=ROOT, timeout=60)
    return done.stdout.rstrip() if done.returncode == 0 else ""


def package_version(name: str) -> str:
    """The version of a package that can be imported, or why it cannot be."""
    try:
        module = __import__(name)
    except Exception as error:  # whatever a broken extension raises
        return f"not usable: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    known = importlib.metadata.packages_distributions().get(name, [name])
    try:
        return importlib.metadata.version(known[0])
    except importlib.metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "unknown"))


def versions() -> dict[str, Any]:
    """This machine: packages, driver, GPUs, and the commit."""
    import torch

    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return dict(
        python=platform.python_version(),
        **{name: package_version(name) for name in PACKAGES},
        cuda=torch.version.cuda or "none",
        driver=driver[0] if driver else "none",
        gpus=[f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {gpu.major}.{gpu.minor}" for gpu in gpus],
        cores=available_cores(),
        system=platform.platform(),
        commit=output_of("git", "describe", "--always", "--dirty", "--abbrev=12") or "unknown",
    )


def print_versions(path: Path) -> int:
    """Prints the versions and all that nvidia-smi says."""
    found = versions()
    for name, value in found.items():
        print(f"{name:22} {value}")
    for command in (("nvidia-smi",), ("nvidia-smi", "topo", "-m"), ("nvidia-smi", "-q", "-d", "CLOCK,POWER")):
        text = output_of(*command)
        print(f"\n$ {shlex.join(command)}\n{text or 'cannot run here'}")
    write_atomic(path, json.dumps(found, indent=1) + "\n")
    return 0


# ------------------------------------------------------------------------------------------------------------ the plan


def count_ranks(options: Any) -> int:
    """Ranks to use. Errors: UserError where GPUs are wanted and none, or too few, are visible."""
    if options.device == "cpu":
        return options.ranks or 1
    import torch

    visible = torch.cuda.device_count()
    if not visible:
        smi = output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader") or "shows no GPU"
        raise UserError(
            f"--device cuda: torch {torch.__version__} (CUDA {torch.version.cuda}) sees no GPU; nvidia-smi: {smi}; "
            "`--device cpu --tiny` rehearses without one"
        )
    if options.ranks and options.ranks > visible:
        raise UserError(f"--ranks {options.ranks}: {visible} GPUs are visible")
    return options.ranks or next(n for n in range(visible, 0, -1) if SEQUENCES % n == 0)


def python(*words: Any) -> list[str]:
    """A command of this Python."""
    return [sys.executable, *map(str, words)]


def torchrun(ranks: int, *words: Any) -> list[str]:
    """A command on all ranks of this machine."""
    return python("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *words)


def bench_steps(options: Any, ranks: int) -> Iterator[Step]:
    """The benchmarks. Each writes its figures to a file of its own."""
    tiny, out = options.tiny, options.out.resolve()
    repeats = ("--repeats", 1, "--warmup", 1) if tiny else ("--repeats", 20, "--warmup", 5)
    for name in BACKENDS:
        yield Step(
            f"step-{name}",
            f"a training step on one device, ATTENTION={name}",
            python("bench/train.py", *repeats, "--json", out / f"step-{name}.json"),
            420,
            dict(ATTENTION=name),
        )
    if ranks > 1:
        command = torchrun(ranks, "bench/train.py", *repeats, "--json", out / "step-ranks.json")
        yield Step("step-ranks", f"a training step on {ranks} ranks", command, 600)
    command = python("bench/quantize.py", "--untrained", "--json", out / "quantize.json")
    yield Step("quantize", "quantization at the preset's sizes, random weights", command, 900)
    shape = (2, 32, 512) if tiny else (11, 512, 8192)
    sizes = [word for pair in zip(("--layers", "--width", "--vocabulary"), shape, strict=True) for word in pair]
    only = ("--only", "pergroup") if tiny else ()
    command = python("bench/pack.py", *sizes, *only, "--json", out / "pack.json")
    yield Step("pack", "packing of integers", command, 600)
    stream = ("--documents", 12, "--mean-length", 50) if tiny else ()
    command = python("bench/ttt.py", "--only", "no overlap,phased", *stream, "--json", out / "ttt.json")
    yield Step("ttt", "evaluation and test-time training on one device", command, 1500)


def data_step(options: Any, ranks: int) -> tuple[Step, Path]:
    """What makes the run's data, and their folder. Fewer than 8 ranks get fewer validation documents."""
    if options.data and (options.tiny or ranks >= CHALLENGE_RANKS):
        command = python("tools/first_hour_data.py", options.data.resolve())
        return Step("data", "the given data", command, 120), options.data.resolve()
    if options.data:
        folder, documents = options.out.resolve() / "data", CHALLENGE_DOCUMENTS * ranks // CHALLENGE_RANKS
        command = python("tools/first_hour_data.py", options.data.resolve(), folder, "--documents", documents)
        title = f"the given data with {documents} validation documents, {ranks}/{CHALLENGE_RANKS} of the challenge's"
        return Step("data", title, command, 300, folder=str(folder)), folder
    if options.tiny:
        folder = options.out.resolve() / "data"
        sizes = ("builtin:networkx", "--vocab-size", 512, "--val-fraction", 0.004, "--workers", 1)
    else:
        folder, sizes = ROOT / "data" / "builtin_sp8192", ("builtin", "--vocab-size", 8192)
    command = python("data/prepare.py", *sizes, "--quiet", "--out", folder)
    return Step("data", "preparing the built-in text", command, 900), folder


def plan(options: Any, ranks: int) -> list[Step]:
    """All steps, in order."""
    out = options.out.resolve()
    settings = dict(DEVICE=options.device, **(TINY if options.tiny else {}))
    if options.device == "cuda":
        workers = max(1, min(4, available_cores() // 4))  # most of the time is compiling, on the CPU
        tests = python("-m", "pytest", "-q", "-rs", "-n", workers, "--dist", "worksteal", "-m", "gpu", "tests")
    else:
        tests = python("-m", "pytest", "-q", "-rs", "-m", "not gpu and not slow", "tests/test_gpu.py")
    data, folder = data_step(options, ranks)
    # Published shards share a few documents with their validation text; here only times count.
    run = dict(
        PRESET=settings.get("PRESET") or os.environ.get("PRESET") or "record",
        DATA_PATH=str(folder),
        ARTIFACT_DIR=str(out / "record"),
        ALLOW_SHARED_DOCUMENTS="1000",
        ALLOW_SHARED_WINDOWS="1",
        MAX_WALLCLOCK_SECONDS=TINY["MAX_WALLCLOCK_SECONDS"] if options.tiny else f"{60 * options.minutes:g}",
    )
    limit = 60 * options.minutes + 2400  # warmup, quantization, and an evaluation as large as the challenge's
    versions = python("tools/first_hour.py", "--versions", out / "versions.json")
    steps = [
        Step("versions", "versions and driver", versions, 180),
        Step(
            "tests", "make test-gpu" if options.device == "cuda" else "the bodies of make test-gpu on CPUs", tests, 1500
        ),
        *bench_steps(options, ranks),
        data,
        Step(
            "record",
            f"a run of {run['PRESET']} from data to score on {ranks} rank{'s' if ranks > 1 else ''}",
            torchrun(ranks, "train_gpt.py"),
            limit,
            run,
            str(out / "record"),
        ),
    ]
    return chosen(options, [with_settings(step, settings) for step in steps])


def with_settings(step: Step, settings: dict[str, str]) -> Step:
    """A step with the plan's settings below its own. Tests choose their own settings."""
    if step.name in ("versions", "tests", "data"):
        return step
    return Step(**{**vars(step), "environment": {**settings, **step.environment}})


def chosen(options: Any, steps: list[Step]) -> list[Step]:
    """The steps of --only and --skip, with the limits of --limit. Errors: UserError for a name that no step has."""
    limits = dict(options.limit)
    only, skipped = (set(filter(None, text.split(","))) for text in (options.only, options.skip))
    known = [step.name for step in steps]
    unknown = (only | skipped | limits.keys()) - set(known)
    if unknown:
        raise UserError(f"{', '.join(sorted(unknown))}: is no step; the steps are {', '.join(known)}")
    kept = [step for step in steps if step.name not in skipped and (not only or step.name in only)]
    return [Step(**{**vars(step), "seconds": limits.get(step.name, step.seconds)}) for step in kept]


# ------------------------------------------------------------------------------------------------------------ running


def keep_earlier(path: Path) -> None:
    """Renames what an earlier attempt wrote."""
    if path.exists():
        number = next(n for n in range(1, 1000) if not path.with_name(f"{path.name}.earlier{n}").exists())
        path.rename(path.with_name(f"{path.name}.earlier{number}"))


def step_environment(step: Step) -> dict[str, str]:
    """The environment of this process without torchrun's variables, with the step's own ones."""
    kept = {name: value for name, value in os.environ.items() if name not in RANKS}
    return {**kept, "PYTHONUNBUFFERED": "1", **step.environment}  # a killed step's last words are in its log


def outcome(code: int, text: str) -> str:
    """A step's status by its exit code and output."""
    if code == 0:
        return "passed"
    return "unavailable" if code == 2 and re.search(r"^error: ATTENTION=.* cannot run here", text, re.M) else "failed"


def run_step(step: Step, folder: Path) -> dict[str, Any]:
    """Runs a step to its end or its limit; nothing of it lives on. Returns its row of the report."""
    log = folder / f"{step.name}.log"
    for path in (log, folder / f"{step.name}.json", *([Path(step.folder)] if step.folder else [])):
        keep_earlier(path)
    added = [f"{name}={value}" for name, value in step.environment.items()]
    start, status = time.monotonic(), ""
    code = None
    with open(log, "wb") as out:
        out.write(f"$ {shlex.join([*added, *step.command])}\n".encode())
        out.flush()
        options: dict[str, Any] = dict(cwd=ROOT, env=step_environment(step), stdin=subprocess.DEVNULL)
        process = processes.start(step.command, stdout=out, stderr=subprocess.STDOUT, **options)
        try:
            code = process.wait(step.seconds)
        except subprocess.TimeoutExpired:
            status = "timed out"
        finally:
            if process.poll() is None:
                processes.stop(process)
    lines = log.read_text(errors="replace").splitlines()
    return dict(
        status=status or outcome(code or 0, "\n".join(lines)),
        exit_code=code,
        seconds=time.monotonic() - start,
        detail=report.last_words(lines[1:]),
    )


def open_folder(options: Any, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Makes the folder, or reads the rows of the steps done in it. Errors: UserError."""
    if not options.resume:
        try:
            options.out.mkdir(parents=True)
        except FileExistsError:
            raise UserError(f"--out {options.out}: exists already; choose another, or go on with --resume") from None
        return {}
    if not (options.out / "report.json").is_file():
        raise UserError(f"--out {options.out}: holds no report.json to go on from")
    before = read_json(options.out / "report.json")
    for name in ("device", "tiny", "ranks"):
        if before[name] != about[name]:
            raise UserError(f"--{name}: the folder of --resume was begun with {before[name]}, not {about[name]}")
    return {row["name"]: row for row in before["steps"]}


def run_all(options: Any, steps: list[Step], about: dict[str, Any]) -> int:
    """Runs what is not done, writing the report after each step. Returns 1 where a step has not passed."""
    before = open_folder(options, about)
    rows: list[dict[str, Any]] = [
        dict(name=step.name, title=step.title, limit=step.seconds, status="not run")
        | {key: value for key, value in before.get(step.name, {}).items() if key not in ("title", "limit")}
        for step in steps
    ]
    report.write(options.out, about, rows, options.budget)
    end = time.monotonic() + 60 * (options.total or math.inf)
    for step, row in zip(steps, rows, strict=True):
        if row["status"] in DONE:
            print(f"{step.name:14} {row['status']} before")
            continue
        left = end - time.monotonic()
        if left < 1:
            print(f"{step.name:14} not run: --total {options.total:g} minutes are over")
            continue
        step = dataclasses.replace(step, seconds=min(step.seconds, left))
        print(f"{step.name:14} {step.title}, at most {step.seconds:.0f} s", flush=True)
        row |= dict(limit=step.seconds, status="interrupted")
        report.write(options.out, about, rows, options.budget)  # in case the machine is lost
        try:
            row |= run_step(step, options.out)
        finally:
            report.write(options.out, about, rows, options.budget)
        print(f"{'':14} {row['status']} after {row['seconds']:.0f} s: {row['detail']}", flush=True)
    print(f"\n{options.out / 'report.md'}")
    working = [row for row in rows if row["status"] == "passed" and row["name"].startswith("step-")]
    tried = any(row["name"].startswith("step-") for row in rows)
    return int(any(row["status"] not in DONE for row in rows) or (tried and not working))


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.versions:
        return print_versions(options.versions)
    options.out = options.out or ROOT / "logs" / time.strftime("first-hour-%Y%m%d-%H%M%S")
    ranks = count_ranks(options)
    about = dict(
        device=options.device,
        tiny=options.tiny,
        ranks=ranks,
        begun=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        arguments=arguments,
    )
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the step and leaves a report
    try:
        return run_all(options, plan(options, ranks), about)
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(command_line(main))

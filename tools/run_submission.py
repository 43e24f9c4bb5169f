"""The part of tools/check_submission.py that has to do with the folder's script: compiling, loading, training again.

Compiling runs nothing of the script. What does run it is asked for with --run, and goes through tools/confined.py.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import confined
import runs
import shipped
import strangers
import submission
from confined import Limits, Outcome
from runs import UserError
from strangers import MIB, Unreadable

if TYPE_CHECKING:
    from check_submission import Findings, Folder, Seed

COMPILER = """
import sys
try:
    compile(open("script.py", "rb").read(), "train_gpt.py", "exec", dont_inherit=True)
except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""
# Reads the artifacts with the script and prints an answer for each: a line of the mark and a JSON object.
LOADER = """
import importlib.util, json, os, sys
mark, script, paths = sys.argv[1], sys.argv[2], sys.argv[3:]
sys.argv[1:] = []

def answer(**content):
    line = chr(10) + mark + " " + json.dumps(content) + chr(10)
    os.write(1, line.encode())

spec = importlib.util.spec_from_file_location("train_gpt", script)
sys.modules["train_gpt"] = t = importlib.util.module_from_spec(spec)
spec.loader.exec_module(t)
if not hasattr(t, "load_artifact"):
    answer(artifact="", parameters=None, error="no load_artifact")
    sys.exit(0)
import torch
for path in paths:
    try:
        c, explicit, _ = t.config_from_env(dict(PRESET="baseline", MODE="eval", DEVICE="cpu"), False)
        with open(path, "rb") as file:
            model, _ = t.load_artifact(file.read(), c, explicit, torch.device("cpu"))
        if not all(torch.isfinite(p).all() for p in model.parameters()):
            raise ValueError("weights are not finite")
        answer(artifact=path, parameters=sum(p.numel() for p in model.parameters()), error=None)
    except Exception as error:
        answer(artifact=path, parameters=None, error=str(error)[:300])
"""
ANSWER = ("artifact", "parameters", "error")
# Variables of the caller that a script which trains again gets: of the machine, and where it runs.
PASSED = re.compile(r"(CUDA|NCCL|NVIDIA|GLOO|OMP)_[A-Z_]+|LD_LIBRARY_PATH|CPU_THREADS|DEVICE|DATA_PATH|TOKENIZER_PATH")


# -------------------------------------------------------------------------------------------------------------- compile


@functools.lru_cache(8)
def compile_error(source: bytes) -> str:
    """Why a script does not compile; empty if it does. In a process of its own: some sources crash the compiler."""
    with confined.scratch() as place:
        (place / "work").mkdir()
        (place / "work" / "script.py").write_bytes(source)
        done = confined.run([sys.executable, "-I", "-S", "-c", COMPILER], place, Limits(60, 2048 * MIB))
    if done.ended:
        return done.ended
    return done.last_line if done.code else ""


def check_script(folder: Folder, findings: Findings) -> None:
    """Checks that the script compiles, is the one that ran, and that the artifacts have the sizes in the logs."""
    script = folder.path / "train_gpt.py"
    try:
        source = strangers.read_bytes(script, "script", folder.path)
    except Unreadable as error:
        if strangers.is_there(script):
            findings.error(f"train_gpt.py: {error.reason}")
        return
    wrong = compile_error(source)
    findings.require(not wrong, f"train_gpt.py: does not compile: {wrong}")
    if not folder.exact:
        shipped.check_shipped(folder, findings, source)
    counted = {x for s in folder.seeds.values() for x in (s.row.get("code_bytes"), s.log and s.log.code_bytes) if x}
    for value in sorted(counted) if folder.exact else ():
        claim(folder, findings, len(source) == value, f"has {len(source)} bytes, and the runs counted {value}")
    stated = folder.content.get("script_sha256")
    if stated is not None:
        claim(folder, findings, stated == hashlib.sha256(source).hexdigest(), "is not the script that ran")
    for seed, path in artifacts(folder).items():
        try:
            size = strangers.file_size(path, folder.path)
        except Unreadable as error:
            findings.error(f"{path.name}: {error.reason}")
            continue
        for where, run in folder.seeds[seed].sources:
            findings.same(f"{path.name}: its bytes and model_bytes in the {where}", size, run.model_bytes)


def claim(folder: Folder, findings: Findings, holds: bool, text: str) -> None:
    """A claim about the script: other people's folders may hold it in another form than it ran in."""
    if folder.ours:
        findings.require(holds, f"train_gpt.py: {text}")
    elif not holds:
        findings.note(f"train_gpt.py: {text}")


def artifacts(folder: Folder) -> dict[int, Path]:
    """Each seed's artifact, where the folder has one."""
    found = {}
    for path in strangers.entries(folder.path):
        match = re.fullmatch(r".*seed([0-9]{1,18})\.pgolf", path.name, re.S)
        if match and int(match[1]) in folder.seeds:
            found.setdefault(int(match[1]), path)
    return found


# ----------------------------------------------------------------------------------------------------------------- load


def load_artifacts(folder: Folder, findings: Findings, limits: Limits) -> None:
    """Has the folder's own script read its artifacts, on copies in a scratch folder."""
    found = artifacts(folder)
    if not found:
        findings.note("artifacts: none is in the folder, so none was loaded")
        return
    mark = secrets.token_hex(16)
    with confined.scratch() as place:
        work = place / "work"
        work.mkdir()
        names = {}
        try:
            (work / "train_gpt.py").write_bytes(
                strangers.read_bytes(folder.path / "train_gpt.py", "script", folder.path)
            )
            for seed, path in found.items():
                names[f"model_seed{seed}.pgolf"] = (seed, path)
                (work / f"model_seed{seed}.pgolf").write_bytes(strangers.read_bytes(path, "artifact", folder.path))
        except Unreadable as error:
            findings.error(f"{error.name_in(folder.path)}: {error.reason}; no artifact was loaded")
            return
        command = [sys.executable, "-I", "-c", LOADER, mark, "train_gpt.py", *names]
        done = confined.run(command, place, limits)
    judge_answers(folder, findings, done, mark, names)


def answers(out: bytes, mark: str) -> list[dict[str, Any]]:
    """What our loader printed: the lines of its mark with an object of exactly its keys, each of its type."""
    found = []
    for line in out.decode("utf-8", "replace").split("\n"):
        if not line.startswith(mark + " "):
            continue
        try:
            content = strangers.parse_json(line[len(mark) + 1 :])
        except ValueError:
            continue
        if not isinstance(content, dict) or tuple(content) != ANSWER or not isinstance(content["artifact"], str):
            continue
        loaded = strangers.POSITIVE.keep(content["parameters"]) is not None and content["error"] is None
        failed = content["parameters"] is None and isinstance(content["error"], str)
        if loaded or failed:
            found.append(content)
    return found


def judge_answers(
    folder: Folder, findings: Findings, done: Outcome, mark: str, names: dict[str, tuple[int, Path]]
) -> None:
    """The findings of a loader's run: exactly one answer is wanted for each artifact."""
    if done.ended:
        findings.error(f"train_gpt.py: was ended while it loaded artifacts: {done.ended}")
        return
    found = answers(done.out, mark)
    if [answer["error"] for answer in found] == ["no load_artifact"]:
        findings.note("artifacts: the script has no load_artifact, so none was loaded")
        return
    if done.code:
        findings.error(f"train_gpt.py: cannot be imported to load artifacts: {done.last_line} (exit code {done.code})")
        return
    if [answer["artifact"] for answer in found] != list(names):
        findings.error(f"train_gpt.py: {len(found)} answers came for {len(names)} artifacts, so none counts as loaded")
        return
    loaded = []
    for answer in found:
        seed, path = names[answer["artifact"]]
        log = folder.seeds[seed].log
        error = answer["error"]
        findings.require(error is None, f"{path.name}: the script does not load it: {error}")
        if error is None:
            loaded.append(f"{path.name} {answer['parameters']}")
            if log:
                findings.same(
                    f"{path.name}: its parameters, and those of the log", answer["parameters"], log.parameters
                )
    if loaded:
        findings.note(f"artifacts: loaded, as the script says, with parameters: {', '.join(loaded)}")


# -------------------------------------------------------------------------------------------------------------- rerun


def rerun_environment(seed: Seed, options, place: Path) -> dict[str, str]:
    """The variables of a rerun: the seed's settings, and those of the caller that PASSED or --env name."""
    kept = {n: v for n, v in (seed.config or {}).items() if n not in submission.PRIVATE and v != ""}
    settings = submission.as_environment(kept)
    given = {n: v for n, v in os.environ.items() if PASSED.fullmatch(n) or n in options.env}
    missing = [name for name in options.env if name not in os.environ]
    if missing:
        raise UserError(f"--env {missing[0]}: this variable is not set")
    data = options.data or settings.get("DATA_PATH") or os.environ.get("DATA_PATH")
    for name in ("DATA_PATH", "TOKENIZER_PATH"):
        if name in settings:
            settings[name] = str(Path(settings[name]).resolve())
    if data:
        settings["DATA_PATH"] = str(Path(data).resolve())
        if options.data:
            settings.pop("TOKENIZER_PATH", None)
            given.pop("TOKENIZER_PATH", None)
    return {**given, **settings, "SEED": str(seed.seed), "ARTIFACT_DIR": str(place / "run")}


def rerun(folder: Folder, findings: Findings, options) -> None:
    """Trains a seed again with the folder's script and settings, and compares the score."""
    number = options.rerun
    if number not in folder.seeds:
        raise UserError(f"--rerun {number}: must be one of the folder's seeds: {', '.join(map(str, folder.seeds))}")
    seed = folder.seeds[number]
    memory = int(0.75 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    command = [sys.executable, "-I", "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={options.nproc}", "train_gpt.py"]
    with confined.scratch() as place:
        (place / "work").mkdir()
        try:
            source = strangers.read_bytes(folder.path / "train_gpt.py", "script", folder.path)
        except Unreadable as error:
            findings.error(f"rerun: train_gpt.py: {error.reason}")
            return
        (place / "work" / "train_gpt.py").write_bytes(source)
        values = rerun_environment(seed, options, place)
        limits = Limits(options.rerun_seconds, memory, address=False, output=64 * MIB, processes=4096)
        done = confined.run(command, place, limits, values)
        again, why = rerun_result(place, done)
    if again is None or again.final is None:
        findings.error(f"rerun: seed {number} fails: {why}")
        return
    compare_rerun(seed, again, findings, options.tolerance)


def rerun_result(place: Path, done: Outcome) -> tuple[runs.Run | None, str]:
    """The run that a rerun wrote or printed, or None and why there is none."""
    if done.ended:
        return None, done.ended
    text = (done.out + b"\n" + done.errors).decode("utf-8", "replace")
    if done.code:
        lines = [line for line in text.splitlines() if line.startswith("error: ")] or [done.last_line]
        return None, " ".join(lines)[-300:]
    log = place / "printed.txt"
    log.write_bytes(done.out)
    written = place / "run" if strangers.is_there(place / "run" / "summary.json") else log
    try:
        return runs.read_runs(written)[0], "no score"
    except UserError as error:
        return None, str(error)


def compare_rerun(seed: Seed, again: runs.Run, findings: Findings, tolerance: float) -> None:
    """Score, tokens and bytes of a rerun against what the folder says."""
    number = seed.seed
    before = seed.row or (runs.figures(seed.log) if seed.log else {})
    was, now = before.get("val_bpb"), runs.figures(again)["val_bpb"]
    if was is None or now is None:
        findings.error(f"rerun: seed {number} has no val_bpb {'in the folder' if was is None else 'now'}")
        return
    findings.note(
        f"rerun: seed {number} val_bpb {now:.6f}, and {was:.6f} in the folder (difference {now - was:+.6f}); "
        f"{again.steps} steps, and {before.get('steps')}; artifact {again.artifact_bytes} bytes, and "
        f"{before.get('artifact_bytes')}"
    )
    findings.require(
        abs(now - was) <= tolerance,
        f"rerun: seed {number} gives val_bpb {now:.6f}, and the folder says "
        f"{was:.6f}; they are more than --tolerance {tolerance:g} apart",
    )
    for key in ("target_tokens", "val_bytes"):
        findings.same(f"rerun: seed {number} {key}, now and in the folder", runs.figures(again)[key], before.get(key))

"""Runs a preset with several seeds, one after another, and writes the submission's folder with all its figures.

    PRESET=record DATA_PATH=data/fineweb10B_sp8192 python tools/reproduce.py --nproc 8 --baseline pr2163/submission.json
    python tools/reproduce.py --preset demo --seeds 42,0,314 MATRIX_LR=0.03

It packs the script and runs the packed one with torchrun. Each seed has a folder with its log below --work. If it is
stopped, the same command goes on with the seed that ran and then with those that are left. Settings are environment
variables, or arguments NAME=value. At the end tools/prove.py tries the rules on the first seed's artifact, in its short
form. Then it prints mean, sample deviation and Welch's test against a baseline's seeds, and names seeds that were
resumed. It also writes a folder with README.md, submission.json, the packed script, requirements.txt and the logs.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main() takes it: Ctrl-C while modules load is no traceback

import argparse
import dataclasses
import hashlib
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import configuration
import pack_code
import processes
import strangers
import submission
import trackers
from runs import ROOT, SEEDS, Parser, UserError, command_line, number_type, write_atomic

FIXED = {"SEED": "--seeds", "RUN_ID": "--work", "ARTIFACT_DIR": "--work", "MODE": "", "PRESET": "--preset"}
PROOFS = ("short", "full", "none")
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def seeds_type(text: str) -> list[int]:
    """An argparse type: different whole numbers, separated by commas."""
    if not re.fullmatch(r"\d+(,\d+)*", text) or len(set(text.split(","))) != text.count(",") + 1:
        raise argparse.ArgumentTypeError(f"{text}: must be different whole numbers, as in 42,0,314")
    return [int(word) for word in text.split(",")]


def parse(arguments: list[str]):
    """The command line. Errors: UserError."""
    parser = Parser(prog="reproduce.py", description=__doc__)
    add = parser.add_argument
    add("settings", nargs="*", metavar="NAME=value", help="settings of the script; they override the environment")
    add("--preset", default=os.environ.get("PRESET", ""), help="name of the preset (default: PRESET)")
    add("--seeds", type=seeds_type, default=list(SEEDS), metavar="A,B,C", help="seeds to run (default: 42,0,314)")
    add("--nproc", type=number_type(int, 1), metavar="N", help="number of ranks (default: one per GPU, or one)")
    add(
        "--script",
        type=Path,
        default=ROOT / "train_gpt.py",
        metavar="FILE",
        help="script to run (default: train_gpt.py)",
    )
    add(
        "--work",
        type=Path,
        metavar="DIR",
        help="folder for the runs (default: logs/reproduce-PRESET-CODE, where CODE is a hash of script and settings)",
    )
    add("--out", type=Path, metavar="DIR", help="folder for the submission (default: submissions/PRESET-CODE)")
    add("--baseline", type=Path, metavar="PATH", help="submission.json, submission folder or runs to compare with")
    add("--template", type=Path, default=submission.TEMPLATE, metavar="FILE", help="template of README.md")
    add("--proof", choices=PROOFS, default="short", help="form of the proof of the rules (default: short)")
    add("--with-artifacts", action="store_true", help="also copy the artifacts to the submission's folder")
    add("--tracker", choices=tuple(trackers.PACKAGES), help="send the curves to this tracker too")
    for name in ("author", "github-id", "name", "blurb"):
        add(f"--{name}", default="", metavar="TEXT", help="a field of submission.json")
    options = parser.parse_intermixed_args(arguments)
    pairs = [word.partition("=") for word in options.settings]
    for name, sign, value in pairs:
        if not sign or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise UserError(f"{name}: must be a setting as NAME=value")
        if name in FIXED:
            raise UserError(f"{name}={value}: {FIXED[name] or 'a reproduction runs all stages'} sets this")
    options.settings = {name: value for name, _, value in pairs}
    options.file = preset_of_file(options)
    options.preset = options.preset or options.file.pop("PRESET", "")
    for path, name in (
        (options.baseline, "--baseline"),
        (options.script, "--script"),
        (options.template, "--template"),
    ):
        if path and not path.exists():
            raise UserError(f"{name} {path}: there is no such file")
    return options


def preset_of_file(options) -> dict[str, str]:
    """The knobs of PRESET_FILE, from the settings or the environment. Errors: UserError."""
    name = configuration.PRESET_FILE
    path = options.settings.pop(name, os.environ.get(name, ""))
    values = configuration.read_preset_file(Path(path)) if path else {}
    for fixed in FIXED:
        if fixed in values and fixed != "PRESET":
            raise UserError(f"{name}={path}: {fixed}: {FIXED[fixed] or 'a reproduction runs all stages'} sets this")
    return values


# ------------------------------------------------------------------------------------------------------------ the plan


def ranks_here() -> int:
    """Number of ranks: one per visible GPU, or one."""
    import torch

    return max(1, torch.cuda.device_count())


def environment(options, **more: Any) -> dict[str, str]:
    """Environment of a run: the preset's file, this process's, the settings, and variables that this tool sets."""
    dropped = (*FIXED, *RANKS, configuration.PRESET_FILE)
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    preset = {"PRESET": options.preset} if options.preset else {}
    file = {name: value for name, value in options.file.items() if not kept.get(name)}  # an empty value sets nothing
    values = {"STRICT": "1", **kept, **file, **preset, **options.settings}
    return values | {name: str(value) for name, value in more.items()}


def dry_run(script: Path, values: dict[str, str]) -> dict[str, Any]:
    """What the script would do with these settings. Errors: UserError with the script's own line."""
    done = processes.run([sys.executable, str(script), "--dry-run"], env=values)
    for line in done.stderr.splitlines():
        if line.startswith("warning: "):
            print(line, file=sys.stderr)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(lines[-1].removeprefix("error: "))
    return json.loads(done.stdout)


def check_settings(options) -> None:
    """Refuses names that the script does not know, and what it would refuse for a seed. Errors: UserError."""
    checker = configuration.Checker(options.script, options.nproc)
    names = list(dict.fromkeys([*options.settings, *options.file]))
    checker.check_names(names, environment(options, SEED=options.seeds[0]))
    for seed in options.seeds:
        checker.check(environment(options, SEED=seed))


def make_plan(options) -> tuple[dict[str, Any], bytes]:
    """What all seeds share (the script's hash, ranks, settings), and the packed script. Errors: UserError."""
    try:
        compile(source := options.script.read_bytes(), str(options.script), "exec")
    except (SyntaxError, ValueError) as error:
        raise UserError(f"--script {options.script}: is not a Python script ({error})") from None
    check_settings(options)
    config = dry_run(options.script, environment(options, SEED=options.seeds[0], WORLD_SIZE=options.nproc))["config"]
    if limit := config.get("val_token_limit"):
        raise UserError(f"VAL_TOKEN_LIMIT={limit}: a score of some targets alone is none that can be submitted")
    packed = pack_code.pack(source)
    return dict(
        script_sha256=hashlib.sha256(packed).hexdigest(),
        ranks=options.nproc,
        config={name: value for name, value in config.items() if name not in submission.PRIVATE},
    ), packed


def prepare_work(work: Path, plan: dict[str, Any], packed: bytes) -> Path:
    """Writes the plan and the packed script to the folder of the runs. Errors: UserError if it holds another plan."""
    file = work / "plan.json"
    if file.is_file():
        before = strangers.read_object(file)
        changed = [name for name in plan if before.get(name) != plan[name]]
        if "config" in changed:
            other = before.get("config")
            other = other if isinstance(other, dict) else {}
            changed = [name.upper() for name, value in plan["config"].items() if other.get(name) != value]
        if changed:
            raise UserError(f"--work {work}: holds runs with other {', '.join(changed)}; choose another folder")
    elif work.exists() and any(work.iterdir()):
        raise UserError(f"--work {work}: is not empty and holds no plan.json of this tool; choose another folder")
    write_atomic(work / "train_gpt.py", packed)
    write_atomic(file, json.dumps(plan, indent=1) + "\n")
    return work / "train_gpt.py"


# ------------------------------------------------------------------------------------------------------------ the runs


def goes_on(folder: Path) -> bool:
    """Whether a run that was stopped left in its folder what the script goes on from."""
    return strangers.is_there(folder / "checkpoint" / "run.json")


def complete(folder: Path, seed: int) -> bool:
    """Whether a seed's run is complete. Errors: UserError if it is of another seed or its artifact is too large."""
    file = folder / "summary.json"
    if not strangers.is_there(file) or goes_on(folder):  # the checkpoints go last
        return False
    fields = dict.fromkeys(("artifact_bytes", "artifact_limit_bytes"), strangers.COUNT)
    fields |= dict(seed=strangers.INTEGER, val_bpb=strangers.NUMBER)
    s = strangers.checked(strangers.read_object(file), fields, str(file), problems := [])
    if problems:
        raise UserError(problems[0])
    if s.get("seed") != seed or set(s) != set(fields):
        raise UserError(f"{folder}: does not hold a complete run of seed {seed}")
    if s["artifact_bytes"] > s["artifact_limit_bytes"]:
        raise UserError(
            f"{folder}: its artifact of {s['artifact_bytes']} bytes is over "
            f"ARTIFACT_LIMIT_BYTES={s['artifact_limit_bytes']}"
        )
    return True


def set_aside(folder: Path) -> None:
    """Renames the folder of a stopped run, from which nothing can go on."""
    if folder.exists():
        number = 1
        while (aside := folder.with_name(f"{folder.name}.stopped{number}")).exists():
            number += 1
        folder.rename(aside)


def run_seed(script: Path, options, seed: int, folder: Path) -> None:
    """Runs one seed with torchrun, and prints and saves its output. Errors: UserError with its last error line.

    A run that was stopped goes on from its checkpoints.
    """
    resumes = goes_on(folder)
    if not resumes:
        set_aside(folder)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={options.nproc}",
        str(script),
    ]
    values = environment(options, SEED=seed, ARTIFACT_DIR=folder)
    tracked = options.tracking.start(folder.name, options.settings | {"SEED": seed}, folder)
    error = ""
    with open(folder.with_name(folder.name + ".out"), "a" if resumes else "w", encoding="utf-8") as log:
        child = processes.start(
            command, env=values, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        try:
            for line in child.stdout or ():
                print(line, end="", flush=True)
                log.write(line)
                tracked.follow()
                error = line.strip().removeprefix("error: ") if line.startswith("error: ") else error
            code = child.wait()
        except BaseException:
            processes.stop(child)
            raise
        finally:
            tracked.finish(summary_of(folder))
    if code:
        raise UserError(f"seed {seed} failed: {error or f'exit code {code}'}; its output is in {log.name}")


def summary_of(folder: Path) -> dict[str, Any]:
    """A run's summary for a tracker; empty where there is none."""
    file = folder / "summary.json"
    return strangers.read_object(file) if strangers.is_plain(file) else {}


def prove(script: Path, options, folder: Path) -> dict[str, Any] | None:
    """Tries the rules on a seed's artifact, unless that was done before. Returns the proof, None with --proof none.

    Errors: UserError where the proof could not be made; a rule that is broken is no error.
    """
    if options.proof == "none":
        return None
    file = folder.with_name(f"{folder.name}.proof.json")
    if not file.is_file() or strangers.read_object(file).get("form") != options.proof:
        print(f"proof: {folder}", flush=True)
        tool = [sys.executable, str(ROOT / "tools" / "prove.py"), str(folder), "--script", str(script)]
        form = ["--short"] if options.proof == "short" else []
        child = processes.start([*tool, *form, "--nproc", str(options.nproc), "--out", str(file)])
        try:
            code = child.wait()
        except BaseException:
            processes.stop(child)
            raise
        if code not in (0, 1):
            raise UserError(f"--proof {options.proof}: tools/prove.py {folder} ended with exit code {code}")
    return read_proof(file)


def read_proof(file: Path) -> dict[str, Any]:
    """The result that tools/prove.py wrote. Errors: UserError."""
    problems: list[str] = []
    content = strangers.read_object(file)
    proof = strangers.checked(content, submission.PROOF, str(file), problems)
    if problems or set(proof) != set(submission.PROOF):
        raise UserError(problems[0] if problems else f"{file}: is not a proof of tools/prove.py")
    return content


# -------------------------------------------------------------------------------------------------------- the results


def identity(options, config: dict[str, Any]) -> dict[str, str]:
    """Author, name and blurb for submission.json, from the options or from git's settings."""

    def git(name: str) -> str:
        try:
            return subprocess.run(["git", "config", name], capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    preset = config["preset"]
    changes = " ".join(f"{name}={value}" for name, value in options.settings.items())
    return dict(
        author=options.author or git("user.name"),
        github_id=options.github_id or git("github.user"),
        name=options.name or f"{preset}{' with ' + changes if changes else ''}",
        blurb=options.blurb or submission.techniques(config),
    )


def defaults_of(script: Path) -> dict[str, Any]:
    """The script's defaults without a preset, to show which settings differ."""
    return {f.name: f.default for f in dataclasses.fields(runpy.run_path(str(script), run_name="settings")["Config"])}


def write(options, script: Path, work: Path, out: Path, results: list[submission.Finished]) -> dict[str, Any]:
    """Writes the submission's folder from the seeds' runs."""
    baseline = (str(options.baseline), submission.baseline_figures(options.baseline)) if options.baseline else None
    config = results[0].config
    data = submission.dataset(Path(config["data_path"]))
    s = submission.submission(results, identity(options, config), data, baseline)
    s["script_sha256"] = hashlib.sha256(script.read_bytes()).hexdigest()
    s["proof"] = prove(script, options, work / f"seed{options.seeds[0]}")
    names = {name.upper() for name in config}
    given = {n: v for n, v in sorted(environment(options).items()) if n in names and n not in ("PRESET", "STRICT")}
    command = submission.shell_command({"PRESET": config["preset"], **given}, options.nproc, options.seeds)
    text = submission.readme(s, config, defaults_of(script), command, options.template)
    new = submission.write_folder(out, script, results, s, text, options.with_artifacts)
    print("-" * 72)
    print(submission.seed_table(s))
    print(submission.comparison(s))
    print(f"{'written' if new else 'unchanged'}: {out}")
    return s


def main(arguments: list[str]) -> int:
    """Runs the seeds that are left, then writes the submission. Returns the exit code."""
    options = parse(arguments)
    options.nproc = options.nproc or ranks_here()
    if options.baseline:
        submission.baseline_figures(options.baseline)  # report an error before hours of training
    plan, packed = make_plan(options)
    code = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:8]
    work = options.work or Path("logs", f"reproduce-{plan['config']['preset']}-{code}")
    out = options.out or Path("submissions", f"{plan['config']['preset']}-{code}")
    script = prepare_work(work, plan, packed)
    options.tracking = trackers.Tracker(options.tracker, out.name, work) if options.tracker else trackers.NO_TRACKER
    results = []
    for seed in options.seeds:
        folder = work / f"seed{seed}"
        if complete(folder, seed):
            print(f"seed {seed}: done before, in {folder}")
        else:
            print(f"seed {seed}: {folder}{', goes on where it was stopped' if goes_on(folder) else ''}", flush=True)
            run_seed(script, options, seed, folder)
            if not complete(folder, seed):
                raise UserError(f"{folder}: the run ended without a summary.json")
        results.append(submission.finished(seed, folder))
        for problem in submission.over_limits(results[-1]):
            print(f"warning: seed {seed}: {problem}: no submission to the challenge", flush=True)
    write(options, script, work, out, results)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(command_line(main))

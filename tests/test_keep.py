"""What a run made outlives full disks, closed streams and removed folders; one run at a time writes to a folder."""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

import processes
import train_gpt as tg
from helpers import (
    HANG_SECONDS,
    ROOT,
    SCRIPT,
    TINY,
    built_once,
    clean_environment,
    config,
    fork,
    run_command,
    single_run,
    snapshot,
    strings,
    wait_until,
    working_folder,
)

RUN = dict(TINY, ITERATIONS=1, GPTQ_CALIBRATION_BATCHES=1, NUM_LAYERS=2, RUN_ID="run", EVAL_SCORES=1)
SCORES = {"scores_pre_quant.npy", "scores_quantized.npy"}
FILES = {"config.json", "log.txt", "metrics.jsonl", "model.pgolf", "summary.json", "tokenizer.model"} | SCORES
LINES = ("log.txt", "metrics.jsonl")


class Faults:
    """Makes the system fail at one of its calls for some files, below some folder, while it is switched on."""

    def __init__(self, patch, code, call, names, below):
        self.code, self.call, self.names, self.below = code, call, names, Path(below).resolve()
        self.on = True
        self.failed = 0
        for name in ("open", "write", "fsync", "replace", "mkdir", "stat"):
            patch.setattr(os, name, self.wrap(name, getattr(os, name)))

    def wrap(self, name, real):
        def call(*arguments, **options):
            if self.on and name == self.call and self.hit(arguments[1 if name == "replace" else 0]):
                self.failed += 1
                raise OSError(self.code, os.strerror(self.code))
            return real(*arguments, **options)

        return call

    def hit(self, target):
        path = Path(os.path.realpath(f"/proc/self/fd/{target}" if isinstance(target, int) else target))
        inside = self.below in path.parents
        return inside and path.name.startswith(self.names)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, the home and the temporary one, each an empty folder of its own. Yields the current one."""
    for name in ("here", "home", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tg.tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def run(data, folder, capfd):
    """Runs main() in the folder: (exit code, stdout, stderr)."""

    def call(**knobs):
        capfd.readouterr()
        code = tg.main([], strings(dict(RUN, DATA_PATH=data) | knobs))
        return code, *capfd.readouterr()

    return call


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    """The folder of the same run without a fault."""

    def build(folder):
        with working_folder(folder):
            assert tg.main([], strings(dict(RUN, DATA_PATH=data))) == 0

    return built_once(tmp_path_factory, "undisturbed", build) / "logs" / "run"


def rescued(place):
    """The only folder of rescued files in a place."""
    (found,) = place.glob("run-rescued-*")
    return found


def test_a_run_leaves_its_files_and_no_lock(undisturbed):
    assert {p.name for p in undisturbed.iterdir()} == FILES


# ------------------------------------------------------------------------------------------------- one file of a run


@pytest.mark.parametrize(
    "name, call, code",
    [
        ("model.pgolf", "open", errno.ENOSPC),
        ("model.pgolf", "fsync", errno.EDQUOT),
        ("model.pgolf", "replace", errno.EIO),
        ("summary.json", "open", errno.EROFS),
        ("summary.json", "fsync", errno.ENOSPC),
        ("scores_quantized.npy", "fsync", errno.ENOSPC),
        ("scores_pre_quant.npy", "replace", errno.EACCES),
    ],
)
def test_what_cannot_be_in_the_folder_is_in_another_one(run, folder, undisturbed, monkeypatch, name, call, code):
    faults = Faults(monkeypatch, code, call, name, folder / "logs")
    exit_code, out, errors = run()
    assert exit_code == tg.EXIT_ELSEWHERE and faults.failed == 1
    path = rescued(folder) / name
    reason = os.strerror(code)
    assert errors == f"warning: logs/run/{name} cannot be written ({reason}): written to {path} instead\n"
    assert {p.name for p in path.parent.iterdir()} == {name}
    assert {p.name for p in (folder / "logs" / "run").iterdir()} == FILES - {name}
    if name != "summary.json":
        assert path.read_bytes() == (undisturbed / name).read_bytes()
    summary = folder / "logs" / "run" / "summary.json" if name != "summary.json" else path
    expected = json.loads((undisturbed / "summary.json").read_text())
    assert json.loads(summary.read_text())["val_bpb"] == expected["val_bpb"] and "val_bpb" in out
    if name == "model.pgolf":  # the folder is one of a run: its model can be scored there
        code, out, errors = run(MODE="eval", ARTIFACT_DIR=path.parent)
        assert (code, errors) == (0, "") and f"{expected['val_bpb']:.4f} quantized" in out


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("call, code", [("open", errno.EIO), ("write", errno.ENOSPC)])
def test_lines_that_cannot_be_written_end_nothing(run, folder, undisturbed, monkeypatch, name, call, code):
    """At the end they are in another folder."""
    faults = Faults(monkeypatch, code, call, name, folder / "logs")
    exit_code, out, errors = run()
    assert exit_code == tg.EXIT_ELSEWHERE and faults.failed > 1
    first, second = errors.splitlines()
    assert (
        first
        == f"warning: logs/run/{name} cannot be written ({os.strerror(code)}); the run goes on and tries again later"
    )
    assert second.endswith(f" written to {rescued(folder) / name} instead")
    lines = (rescued(folder) / name).read_text()
    assert lines == out if name == "log.txt" else len(lines.splitlines()) == len(metrics(undisturbed))
    assert FILES - {name} <= {p.name for p in (folder / "logs" / "run").iterdir()}


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_disk_that_is_full_for_a_while_costs_no_line(run, folder, undisturbed, monkeypatch):
    faults = Faults(monkeypatch, errno.ENOSPC, "write", LINES, folder / "logs")
    step = tg.Trainer.step

    def free_again(*arguments):
        faults.on = False
        return step(*arguments)

    monkeypatch.setattr(tg.Trainer, "step", free_again)
    code, out, errors = run()
    assert code == 0 and faults.failed > 2 and len(errors.splitlines()) == 1
    assert (folder / "logs" / "run" / "log.txt").read_text() == out
    assert len(metrics(folder / "logs" / "run")) == len(metrics(undisturbed))
    assert [p.name for p in folder.iterdir()] == ["logs"]


def test_the_rest_of_a_line_follows_its_beginning(tmp_path):
    """A real limit, in the middle of a line."""
    run = single_run()
    run.folder = tmp_path
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for number in range(40):
            resource.setrlimit(resource.RLIMIT_FSIZE, (55 if 3 < number < 30 else limits[0], limits[1]))
            run.log(f"line {number:03}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "log.txt").read_text() == "".join(f"line {number:03}\n" for number in range(40))
    assert run.finish() and not run.lines["log.txt"].waiting


@pytest.mark.parametrize("arrives", [0, 7, None])
def test_lines_that_closing_does_not_confirm_are_written_once(tmp_path, monkeypatch, arrives):
    """A disk may report only on closing that it is full; then all lines may be there, or some bytes, or none."""
    real, on = os.close, [True]

    def close(handle):
        path = Path(os.path.realpath(f"/proc/self/fd/{handle}"))
        real(handle)
        if on[0] and path.name == "log.txt":
            if arrives is not None:
                os.truncate(path, before + arrives)
            raise OSError(errno.EIO, "Input/output error")

    file = tg.LineFile(tmp_path / "log.txt")
    file.add("the first line")
    file.flush()
    before = (tmp_path / "log.txt").stat().st_size
    monkeypatch.setattr(os, "close", close)
    for number in range(3):
        file.add(f"line {number}")
        if number < 2:
            with pytest.raises(OSError, match="Input/output"):
                file.flush()
        on[0] = number < 1
    file.flush()
    assert (tmp_path / "log.txt").read_text() == "the first line\nline 0\nline 1\nline 2\n"


def test_lines_beyond_the_bound_are_counted(tmp_path, monkeypatch, capfd):
    faults = Faults(monkeypatch, errno.ENOSPC, "write", "log.txt", tmp_path)
    monkeypatch.setattr(tg, "LINES_LIMIT", 95)
    run = single_run()
    run.folder = tmp_path
    for number in range(15):
        run.log(f"line {number:03}")  # 9 bytes each
    faults.on = False
    run.log("last")
    assert not run.finish()
    assert (tmp_path / "log.txt").read_text() == "".join(f"line {number:03}\n" for number in range(10)) + "last\n"
    assert capfd.readouterr().err.splitlines()[1:] == [f"warning: 5 lines of {tmp_path}/log.txt are missing"]


def test_a_compile_cache_that_cannot_be_written_is_left_out(tmp_path, monkeypatch, capfd):
    Faults(monkeypatch, errno.ENOSPC, "fsync", tg.COMPILE_CACHE_FILE, tmp_path)
    saved = b"cache", SimpleNamespace(artifacts={})
    monkeypatch.setattr(tg.torch.compiler, "save_cache_artifacts", lambda: saved)
    run = single_run()
    run.folder = tmp_path
    tg.save_compile_cache(tg.dataclasses.replace(config(RUN), compile_cache=True), run)
    assert "the compile cache was not written: No space left" in (tmp_path / "log.txt").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["log.txt"] and run.finish()


def test_a_compile_cache_that_cannot_be_read_is_not_needed(tmp_path, capfd):
    (tmp_path / tg.COMPILE_CACHE_FILE).mkdir()
    run = single_run()
    run.folder = tmp_path
    tg.load_compile_cache(tg.dataclasses.replace(config(RUN), compile_cache=True), run)
    assert "compile_cache.bin cannot be read (Is a directory)" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["summary.json", "model.pgolf", "log.txt"])
def test_files_that_cannot_be_looked_at_in_the_end_cost_nothing(run, folder, monkeypatch, name):
    faults = Faults(monkeypatch, errno.EIO, "stat", name, folder)
    faults.on = False
    saved = tg.summary_lines
    monkeypatch.setattr(tg, "summary_lines", lambda summary: (setattr(faults, "on", True), *saved(summary))[1:])
    code, _, _ = run()
    assert code == (tg.EXIT_ELSEWHERE if name == "model.pgolf" else 0) and faults.failed


def test_an_input_that_cannot_be_looked_at_is_named(tmp_path, monkeypatch):
    assert not tg.is_input(tmp_path / "none")
    Faults(monkeypatch, errno.EIO, "stat", "sidecar.bin", tmp_path)
    with pytest.raises(tg.ConfigError, match=r"sidecar.bin: cannot be read \(Input/output error\)"):
        tg.is_input(tmp_path / "sidecar.bin")


NO_MEMORY = [
    (tg.torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "train", "MICRO_BATCH_TOKENS=128"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), "ttt", "TTT_BATCH_SIZE=4"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "evaluate", "VAL_BATCH_SIZE=256"),
    (MemoryError(), "quantize", "memory"),
]


@pytest.mark.parametrize("error, stage, name", NO_MEMORY)
def test_missing_memory_names_what_to_lower(error, stage, name):
    run = single_run()
    run.stage = stage
    knobs = config(dict(RUN, MICRO_BATCH_TOKENS=128, TTT_BATCH_SIZE=4, VAL_BATCH_SIZE=256))
    said = f"^{name}: there was no more memory in stage {stage}"
    with pytest.raises(tg.ConfigError, match=said), tg.naming_memory(knobs, run):
        raise error
    with pytest.raises(RuntimeError, match="another"), tg.naming_memory(knobs, run):
        raise RuntimeError("another")


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_what_was_made_before_the_memory_ran_out_is_named(run, folder, monkeypatch, stage):
    owner, name, after = (tg.Trainer, "step", 2) if stage == "train" else (tg.Evaluator, "compute", 1)
    real, calls = getattr(owner, name), []

    def short(self, *arguments, **options):
        calls.append(self.run.stage)
        if calls.count(stage) > after:
            raise tg.torch.OutOfMemoryError("CUDA out of memory")
        return real(self, *arguments, **options)

    monkeypatch.setattr(owner, name, short)
    code, _, errors = run(ITERATIONS=4, CHECKPOINT_EVERY_SECONDS=1e-9, VAL_BATCH_SIZE=256, ARTIFACT_DIR="run")
    (line,) = errors.splitlines()
    assert code == 2 and f"in stage {stage}; a lower value needs less; " in line
    if stage == "train":
        assert line.startswith("error: MICRO_BATCH_TOKENS=")
        newest = max(Path("run/checkpoint").glob("step-*"))  # of step 2, or of step 1 where that was still written
        assert f"RESUME={newest} and another RUN_ID go on from the last checkpoint" in line
    else:
        assert line.startswith("error: VAL_BATCH_SIZE=256: ") and line.endswith(
            "model.pgolf is kept, and MODE=eval scores it"
        )
        assert (folder / "run" / "model.pgolf").exists()


def test_a_second_interrupt_shows_no_traceback():
    """It may come while main() deals with the first one: here, in the expression that calls main()."""
    program = f"""
import runpy, sys

class Arguments(list):
    def __getitem__(self, index):
        if isinstance(index, slice):
            raise KeyboardInterrupt
        return super().__getitem__(index)

sys.argv = Arguments(sys.argv)
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""
    done = run_command([sys.executable, "-c", program])
    assert (done.returncode, done.stderr) == (130, "")


def test_the_script_may_be_gone_when_the_model_is_packed(data, tmp_path):
    """As where another branch is checked out meanwhile. The bytes that count are those of what runs."""
    script = tmp_path / "train_gpt.py"
    shutil.copy(SCRIPT, script)
    knobs = dict(RUN, DATA_PATH=data, ARTIFACT_DIR=tmp_path / "run", ITERATIONS=40)
    command = [sys.executable, str(script)]
    process = processes.start(command, env=clean_environment(knobs), cwd=tmp_path)
    log = tmp_path / "run" / "log.txt"
    wait_until(lambda: log.exists() and "\nstep:1/" in log.read_text(), process)
    script.unlink()
    out, errors = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 0, errors
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["code_bytes"] == SCRIPT.stat().st_size and summary["code_form"] == "as it runs"


# ------------------------------------------------------------------------------------------------- everything at once


@pytest.mark.parametrize("place", ["tmp", "home"])
def test_the_first_disk_with_room_takes_the_model(run, folder, undisturbed, monkeypatch, place):
    """Everything before it is full, but for making folders. What was made in vain is removed."""
    full = folder.parent if place == "home" else folder
    Faults(monkeypatch, errno.ENOSPC, "fsync", ("model.pgolf", "summary.json"), full)
    if place == "home":
        monkeypatch.setattr(tg.Path, "home", lambda: Path("/dev/shm"))
    code, out, errors = run()
    there = Path("/dev/shm") if place == "home" else folder.parent / "tmp"
    first, last = errors.splitlines()
    found = Path(first.split(" written to ")[1].removesuffix(" instead")).parent
    try:
        assert code == tg.EXIT_ELSEWHERE and found.parent == there
        assert (
            last
            == f"warning: logs/run is not complete; elsewhere are {found / 'model.pgolf'}, {found / 'summary.json'}"
        )
        assert (found / "model.pgolf").read_bytes() == (undisturbed / "model.pgolf").read_bytes()
        assert {p.name for p in found.iterdir()} == {"model.pgolf", "summary.json"}
        assert not list(folder.parent.glob("*/run-rescued-*/*")) or place == "tmp"
    finally:
        shutil.rmtree(found)
    assert not list(folder.parent.glob("*/run-rescued-*"))


def nowhere(patch):
    """No folder can be made for what is rescued."""
    patch.setattr(tg, "rescue_folders", lambda run: iter(()))


def test_a_model_that_no_disk_takes_is_tried_again(run, folder, undisturbed, monkeypatch):
    faults = Faults(monkeypatch, errno.ENOSPC, "fsync", "model.pgolf", folder)
    nowhere(monkeypatch)
    waits = []

    def wait(seconds):
        waits.append(seconds)
        faults.on = len(waits) < 3

    monkeypatch.setattr(tg.time, "sleep", wait)
    code, out, errors = run()
    assert code == 0 and waits == [5.0] * 3 and faults.failed == 3
    assert errors == "warning: logs/run/model.pgolf cannot be written (No space left on device), nor anywhere else\n"
    assert (folder / "logs" / "run" / "model.pgolf").read_bytes() == (undisturbed / "model.pgolf").read_bytes()


def test_a_model_that_no_disk_ever_takes_is_said_to_be_lost(run, folder, monkeypatch):
    Faults(monkeypatch, errno.ENOSPC, "fsync", "model.pgolf", folder)
    nowhere(monkeypatch)
    monkeypatch.setattr(tg, "RESCUE_SECONDS", 0.1)
    code, out, errors = run()
    assert code == 2 and errors.endswith("error: model.pgolf: could not be written anywhere, and is lost\n")
    assert len(errors.splitlines()) == 2 and not (folder / "logs" / "run" / "summary.json").exists()


def test_other_files_that_no_disk_takes_end_nothing(run, folder, monkeypatch):
    Faults(monkeypatch, errno.ENOSPC, "fsync", ("summary.json", "scores"), folder)
    nowhere(monkeypatch)
    code, out, errors = run()
    assert code == tg.EXIT_ELSEWHERE and "val_bpb" in out
    assert sum(line.endswith("nor anywhere else") for line in errors.splitlines()) == 3 == len(errors.splitlines())


def test_a_full_disk_at_the_start_is_refused(run, folder, monkeypatch):
    """Before anything is computed; the folder may be used later."""
    faults = Faults(monkeypatch, errno.ENOSPC, "fsync", "config.json", folder)
    code, out, errors = run()
    assert code == 2
    assert errors == "error: RUN_ID=logs/run: must be a folder that can be written to (No space left on device)\n"
    assert list((folder / "logs" / "run").iterdir()) == []
    faults.on = False
    assert run()[0] == 0


def test_an_artifact_over_the_limit_and_elsewhere(run, folder, monkeypatch):
    Faults(monkeypatch, errno.ENOSPC, "fsync", "model.pgolf", folder / "logs")
    monkeypatch.setattr(tg, "shipped_code", lambda: (15_990_000, "counted by this test"))
    code, out, errors = run(ARTIFACT_LIMIT_BYTES=16_000_000, TARGET_BYTES=17_000_000)
    assert code == tg.EXIT_ELSEWHERE
    assert "error: the artifact is " in out and str(rescued(folder) / "model.pgolf") in errors


# A training whose disk has no room left from its first step on: argv[1] is where it is mounted.
FULL = """
import contextlib, os, sys
sys.path.insert(0, sys.argv[2])
import train_gpt as tg
step = tg.Trainer.step

def step_and_fill(trainer, *arguments):
    if trainer.run.is_main:
        with open(sys.argv[1] + "/rest", "wb", buffering=0) as rest, contextlib.suppress(OSError):
            while rest.write(bytes(4096)):
                pass
    return step(trainer, *arguments)

tg.Trainer.step = step_and_fill
sys.exit(tg.main([], dict(os.environ)))
"""


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 96 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=96k", "none", place]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user cannot mount a file system; the faults above take its place")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_is_really_full(data, tmp_path, undisturbed, small_disk, ranks):
    (tmp_path / "full.py").write_text(FULL)
    values = dict(RUN, DATA_PATH=data, ARTIFACT_DIR=small_disk / "run")
    done = fork(tmp_path / "full.py", values, small_disk, ROOT, ranks=ranks, cwd=tmp_path)
    assert done.returncode == tg.EXIT_ELSEWHERE and "Traceback" not in done.stderr, done.stderr
    place = rescued(tmp_path)
    assert f"written to {place / 'model.pgolf'} instead" in done.stderr
    assert ranks > 1 or (place / "model.pgolf").read_bytes() == (undisturbed / "model.pgolf").read_bytes()
    assert json.loads((place / "summary.json").read_text())["val_bpb"] > 0
    logs = [folder / "log.txt" for folder in (small_disk / "run", place)]  # the first may have had room for all
    assert "".join(log.read_text() for log in logs if log.exists()) == done.stdout


# ------------------------------------------------------------------------------------------------ folders that vanish


def removed(folder):
    shutil.rmtree(folder)


def replaced_by_a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("mine")


def replaced_by_another_run(folder):
    folder.rename(folder.with_name("moved"))
    shutil.copytree(folder.with_name("moved"), folder)
    (folder / "model.pgolf").write_text("another run's")


@pytest.mark.parametrize("change", [removed, replaced_by_a_file, replaced_by_another_run])
@pytest.mark.parametrize(
    "owner, moment", [(tg.Trainer, "step"), (tg, "read_back"), (tg, "require_finite"), (tg, "summary_lines")]
)
def test_a_folder_that_vanishes_takes_nothing_with_it(run, folder, undisturbed, monkeypatch, change, owner, moment):
    """In training, before the artifact is read back, after it was, and after the summary was written."""
    real, done = getattr(owner, moment), []
    place = folder / "logs" / "run"

    def at_the_moment(*arguments, **options):
        if not done and (moment == "step" or (place / "model.pgolf").exists()):
            change(place)
            done.append(snapshot(folder / "logs"))
        return real(*arguments, **options)

    monkeypatch.setattr(owner, moment, at_the_moment)
    code, out, errors = run()
    assert done and code == tg.EXIT_ELSEWHERE, errors
    assert snapshot(folder / "logs") == done[0]  # what is there now is someone else's, or nothing
    model = rescued(folder) / "model.pgolf"
    assert f"written to {model} instead" in errors and len(errors.splitlines()) <= 5, errors
    assert errors.splitlines()[-1].startswith("warning: logs/run is not complete; elsewhere are ")
    assert all(str(path) in errors.splitlines()[-1] for path in model.parent.iterdir())
    assert model.read_bytes() == (undisturbed / "model.pgolf").read_bytes()
    assert (model.parent / "log.txt").read_text().splitlines()[-1] == out.splitlines()[-1]
    expected = json.loads((undisturbed / "summary.json").read_text())["val_bpb"]
    assert f"{expected:.4f} quantized, packed, read back" in out


def test_an_artifact_that_cannot_be_read_back_is_written_elsewhere(run, folder, undisturbed, monkeypatch):
    real = tg.Path.read_bytes

    def read_bytes(path):
        if path == Path("logs/run/model.pgolf"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(tg.Path, "read_bytes", read_bytes)
    code, out, errors = run()
    assert code == tg.EXIT_ELSEWHERE and "cannot be read: Input/output error" in errors
    assert (rescued(folder) / "model.pgolf").read_bytes() == (undisturbed / "model.pgolf").read_bytes()


# ------------------------------------------------------------------------------------------------------- one at a time

RACE = """
import os, sys
sys.path.insert(0, sys.argv[1])
import train_gpt as tg
begin, go = os.pipe()
children = []
for _ in range(4):
    child = os.fork()
    if not child:
        os.close(go)
        os.read(begin, 1)  # until the parent has closed its end, for all alike
        os._exit(tg.main([], dict(os.environ)))
    children.append(child)
os.close(go)
print("codes", *sorted(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_of_runs_begun_at_once_one_goes_on(data, tmp_path):
    (tmp_path / "race.py").write_text(RACE)
    done = fork(tmp_path / "race.py", dict(RUN, DATA_PATH=data, ITERATIONS=20), ROOT, cwd=tmp_path)
    assert "codes 0 2 2 2" in done.stdout, done.stderr
    errors = done.stderr.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: RUN_ID=logs/run: ") for line in errors)
    assert {p.name for p in (tmp_path / "logs" / "run").iterdir()} == FILES
    log = (tmp_path / "logs" / "run" / "log.txt").read_text()
    assert log.count("step:20/20") == 1 == log.count("peak memory")


@pytest.mark.parametrize("mode, name", [("all", "run.lock"), ("eval", "eval_run.lock")])
def test_a_folder_in_use_is_refused(run, folder, undisturbed, mode, name):
    shutil.copytree(undisturbed, folder / "logs" / "run")
    before = snapshot(folder)
    lock = tg.FolderLock(folder / "logs" / "run" / name)
    code, out, errors = run(MODE=mode)
    assert code == 2 and out == ""
    assert errors == f"error: RUN_ID=logs/run: another run writes there now, process {os.getpid()}\n"
    lock.release()
    assert snapshot(folder) == before
    if mode == "eval":
        assert run(MODE=mode)[0] == 0


def test_a_killed_run_leaves_no_lock(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        lock = tg.FolderLock(tmp_path / "run.lock")
        os.write(writer, b"%d" % lock.file.fileno())
        signal.pause()
    assert os.read(reader, 1)
    with pytest.raises(BlockingIOError) as refused:
        tg.FolderLock(tmp_path / "run.lock")
    assert refused.value.strerror == str(child)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert (tmp_path / "run.lock").exists()
    tg.FolderLock(tmp_path / "run.lock").release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_has_one_holder_while_others_end(tmp_path):
    """Processes that take the lock and give it back all the time: never two inside at once."""
    children = []
    for _ in range(4):
        child = os.fork()
        if not child:
            os._exit(compete(tmp_path))
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * 4


def compete(folder):
    """Takes the lock 200 times. Returns 1 where another process had it too."""
    taken = 0
    while taken < 200:
        try:
            lock = tg.FolderLock(folder / "run.lock")
        except BlockingIOError:
            continue
        try:
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return 1
        os.unlink(folder / "inside")
        lock.release()
        taken += 1
    return 0


def test_a_lock_is_not_inherited(tmp_path):
    lock = tg.FolderLock(tmp_path / "run.lock")
    child = subprocess.Popen(["sleep", "1800"], close_fds=False)
    lock.file.close()
    try:
        again = tg.FolderLock(tmp_path / "run.lock")
        assert again.holds()
        again.release()
    finally:
        child.kill()
        child.wait()


def test_a_file_system_without_locks_is_used_with_a_warning(run, folder, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    code, out, errors = run()
    assert code == 0 and {p.name for p in (folder / "logs" / "run").iterdir()} == FILES
    (line,) = errors.splitlines()
    assert line.startswith("warning: logs/run is on a file system without locks")


def test_a_strangers_folder_cannot_have_other_files_written(run, folder, undisturbed):
    place, mine = folder / "logs" / "run", folder / "mine"
    shutil.copytree(undisturbed, place)
    mine.write_text("mine")
    (place / "eval_run.lock").symlink_to(mine)
    code, out, errors = run(MODE="eval")
    assert code == 2 and "must be a folder that can be written to" in errors
    (place / "eval_run.lock").unlink()
    (place / "eval_log.txt").symlink_to(mine)
    os.mkfifo(place / "eval_metrics.jsonl")
    code, out, errors = run(MODE="eval")
    assert code == tg.EXIT_ELSEWHERE and (rescued(folder) / "eval_log.txt").read_text() == out
    assert mine.read_text() == "mine"


# ------------------------------------------------------------------------------------------------------------ streams

# Runs a script as Python does, in a process that was forked: argv[1] is done first.
PREPARED = """
import runpy, sys
prepare, script = sys.argv[1:3]
sys.argv = sys.argv[2:]
exec(prepare)
runpy.run_path(script, run_name="__main__")
"""
CLOSED_PIPE = "import os; ends = os.pipe(); os.dup2(ends[1], {0}); os.close(ends[0])"
STREAMS = {
    "a closed pipe": CLOSED_PIPE.format(1),
    "two closed pipes": CLOSED_PIPE.format(1) + "; " + CLOSED_PIPE.format(2),
    "a full disk": "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 1)",
    "not for writing": "import os; os.dup2(os.open('/dev/null', os.O_RDONLY), 1)",
    "closed": "import os; os.close(1); sys.stdout = None",
    "all closed": "import os; [os.close(number) for number in range(3)]; sys.stdout = sys.stderr = None",
    "closed by Python": "sys.stdout.close()",
}


@pytest.mark.parametrize("kind", STREAMS)
def test_a_run_needs_no_standard_output(data, tmp_path, undisturbed, kind):
    (tmp_path / "prepared.py").write_text(PREPARED)
    values = dict(RUN, DATA_PATH=data)
    done = fork(tmp_path / "prepared.py", values, STREAMS[kind], SCRIPT, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    silent = kind in ("closed", "all closed", "two closed pipes")
    assert done.stderr == "" if silent else done.stderr.count("\n") == 1 and "log.txt has every line" in done.stderr
    folder = tmp_path / "logs" / "run"
    assert {p.name for p in folder.iterdir()} == FILES
    for name in ("model.pgolf", *SCORES):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()
    logs = [(place / "log.txt").read_text().splitlines() for place in (folder, undisturbed)]
    assert len(logs[0]) == len(logs[1]) and logs[0][-4].startswith("peak memory")


def test_letters_that_standard_output_lacks_are_escaped(data, tmp_path):
    name = "läufer \udcff"  # the second one is what Python makes of a byte that is not UTF-8
    (tmp_path / "prepared.py").write_text(PREPARED)
    prepare = "import os; os.environ['RUN_ID'] = 'läufer \\udcff'; sys.stdout.reconfigure(encoding='ascii')"
    done = fork(tmp_path / "prepared.py", dict(RUN, DATA_PATH=data), prepare, SCRIPT, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\nlogs/l\\xe4ufer \\udcff  " in done.stdout
    log = (tmp_path / "logs" / name / "log.txt").read_text()
    assert "\nlogs/läufer \\udcff  " in log and len(log.splitlines()) == len(done.stdout.splitlines())


BUFFERED = dict(PYTHONUNBUFFERED="")  # else nothing is left for the last flush


@pytest.mark.parametrize(
    "shell, code, out, errors",
    [
        ("--help | head -n 1", 0, 1, 0),
        ("--no-such-option 2>&- | true", 2, 0, 0),
        ("--no-such-option 2>&- > /dev/full", 2, 0, 0),
    ],
)
def test_what_python_says_as_it_ends(shell, code, out, errors, tmp_path):
    """A process of its own, with the interpreter's last flush: no complaint, and no exit code 120."""
    command = f"{sys.executable} {SCRIPT} {shell.partition(' | ')[0]}"
    if "|" in shell:
        command = f"({command}; echo $? > code) | {shell.partition(' | ')[2]}; exit $(cat code)"
    done = run_command(["bash", "-c", command], env=clean_environment(BUFFERED), cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert (len(done.stdout.splitlines()), len(done.stderr.splitlines())) == (out, errors), done.stderr


@pytest.mark.parametrize("script, code", [("train_gpt.py", 130), ("tools/generate.py", -signal.SIGINT)])
def test_an_interrupt_while_modules_are_loaded_is_no_traceback(script, code, tmp_path):
    command = [sys.executable, str(ROOT / script), "--help"]
    process = processes.start(
        command,
        supervised=False,
        env=clean_environment({}),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: "libtorch_cpu" in Path(f"/proc/{process.pid}/maps").read_text(), process)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=HANG_SECONDS)
    if process.returncode != 0:  # not so late that it had done all
        assert (process.returncode, errors) == (code, "interrupted\n" if code == 130 else "")


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    """What is opened next would be given it, and what a library prints would end up there."""
    look = "; streams = [os.readlink(f'/proc/self/fd/{number}') for number in range(3)]"
    (tmp_path / "prepared.py").write_text(
        PREPARED.replace("runpy.run", "try:\n    runpy.run")
        + f"finally:\n    import os{look}\n    open('streams', 'w').write(' '.join(streams))\n"
    )
    done = fork(tmp_path / "prepared.py", RUN, STREAMS["all closed"], SCRIPT, "--help", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "streams").read_text() == " ".join(["/dev/null"] * 3)


def test_what_others_have_printed_is_no_fault_of_the_run(tmp_path):
    """A library's line that is still in the buffer as the interpreter ends."""
    code = (
        "import runpy, sys; print('a line'); sys.argv[1:] = ['--no']; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = f'{sys.executable} -c "import sys; sys.argv[0] = {str(SCRIPT)!r}; {code}" > /dev/full'
    done = run_command(["bash", "-c", command], env=clean_environment(BUFFERED), cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("kind, code", [("a closed pipe", 0), ("closed", 0), ("all closed", 0), ("a full disk", 3)])
def test_a_plan_needs_no_standard_output(tmp_path, kind, code):
    (tmp_path / "prepared.py").write_text(PREPARED)
    done = fork(tmp_path / "prepared.py", RUN, STREAMS[kind], SCRIPT, "--dry-run", cwd=tmp_path)
    errors = "error: standard output cannot be written ([Errno 28] No space left on device)\n" if code else ""
    said = [line for line in done.stderr.splitlines(keepends=True) if " has no effect with " not in line]  # remarks
    assert (done.returncode, done.stdout, "".join(said)) == (code, "", errors)


def test_the_exit_codes_are_documented(capfd):
    assert tg.main(["--help"], {}) == 0
    text = capfd.readouterr().out
    page = (ROOT / "docs" / "getting-started.md").read_text()
    for code, meaning in tg.EXIT_CODES.items():
        assert f"{code:3}  {meaning}\n" in text and f"| {code} | {meaning} |" in page


TOO_LONG = "x" * 300


@pytest.mark.parametrize(
    "knobs, words",
    [
        (dict(TOKENIZER_PATH=TOO_LONG), f"TOKENIZER_PATH={TOO_LONG}: cannot be read (File name too long)"),
        (dict(TOKENIZER_PATH="."), "TOKENIZER_PATH=.: is not a SentencePiece model"),
        (dict(TOKENIZER_PATH="none"), "TOKENIZER_PATH=none: there is no such file"),
        (dict(DATA_PATH=TOO_LONG), f"DATA_PATH={TOO_LONG}: cannot be read (File name too long)"),
        (dict(RESUME=TOO_LONG), f"RESUME={TOO_LONG}: holds no checkpoint"),
        (dict(RUN_ID=TOO_LONG), "must be a folder that can be written to (File name too long)"),
        (dict(RUN_ID=TOO_LONG, MODE="eval"), "MODE=eval needs model.pgolf there"),
        (dict(ARTIFACT_DIR=TOO_LONG), "must be a folder that can be written to (File name too long)"),
    ],
)
def test_a_name_that_no_file_can_have_is_refused_in_one_line(run, folder, knobs, words):
    code, _, errors = run(**knobs)
    assert code == 2 and words in errors and errors.startswith("error: ") and errors.count("\n") == 1


def as_nobody(job):
    """What a function prints on standard error, in a process without root's rights."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 2)
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        try:
            job()
        except tg.ConfigError as error:
            os.write(2, f"error: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read) as text:
        said = text.read()
    os.waitpid(child, 0)
    return said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can take another user's rights")
@pytest.mark.parametrize("name", ["tokenizer.model", "manifest.json", "model.pgolf", ""])
def test_what_may_not_be_read_is_said_to_be_so(name):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:  # which anybody may enter
        os.chmod(place, 0o755)
        path = Path(place) / "data" / name
        path.parent.mkdir(exist_ok=True)
        path.mkdir(exist_ok=True) if not name else path.write_bytes(b"x")
        path.chmod(0)
        job = {
            "tokenizer.model": lambda: tg.Vocabulary.read(path),
            "manifest.json": lambda: tg.Manifest.read(path.parent),
            "model.pgolf": lambda: tg.read_artifact(path),
            "": lambda: tg.shard_paths(config(TINY, DATA_PATH=path), "train"),
        }[name]
        said = as_nobody(job)
        assert str(path).rstrip("/") in said and "cannot be read" in said and "Permission denied" in said

"""What a run has made outlives full disks, closed streams and removed folders, and one run at a time writes a folder."""

import contextlib
import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import train_gpt as tg
from helpers import (
    ROOT,
    SCRIPT,
    TINY,
    built_once,
    clean_environment,
    environment,
    fork,
    run_command,
    single_run,
    strings,
    wait_until,
    working_folder,
)

RUN = dict(TINY, ITERATIONS=1, GPTQ_CALIBRATION_BATCHES=1, NUM_LAYERS=2, RUN_ID="run", EVAL_SCORES=1)
SCORES = {"scores_pre_quant.npy", "scores_quantized.npy"}
FILES = {"config.json", "log.txt", "metrics.jsonl", "model.pgolf", "summary.json"} | SCORES
LINES = ("log.txt", "metrics.jsonl")


class Faults:
    """Makes the system fail at one of its calls for some files, below some folder, while it is switched on."""

    def __init__(self, patch, code, call, names, below):
        self.code, self.call, self.names, self.below = code, call, names, Path(below).resolve()
        self.on = True
        self.failed = 0
        for name in ("open", "write", "fsync", "replace", "mkdir"):
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


def warnings_of(errors):
    return [line for line in errors.splitlines() if line.startswith("warning: ")]


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
    assert tg.main([], strings(dict(RUN, MODE="eval", ARTIFACT_DIR=path.parent))) == (2 if name != "model.pgolf" else 0)


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("call, code", [("open", errno.EIO), ("write", errno.ENOSPC)])
def test_lines_that_cannot_be_written_end_nothing(run, folder, undisturbed, monkeypatch, name, call, code):
    """At the end they are in another folder."""
    faults = Faults(monkeypatch, code, call, name, folder / "logs")
    exit_code, out, errors = run()
    assert exit_code == tg.EXIT_ELSEWHERE and faults.failed > 1
    first, second = errors.splitlines()
    assert first == f"warning: logs/run/{name} cannot be written ({os.strerror(code)}); the run goes on and tries again later"
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
    saved = b"cache", tg.torch.compiler.CacheInfo()
    monkeypatch.setattr(tg.torch.compiler, "save_cache_artifacts", lambda: saved)
    run = single_run()
    run.folder = tmp_path
    knobs = strings(dict(RUN, COMPILE=1, COMPILE_CACHE=1))
    config = tg.dataclasses.replace(tg.config_from_env(strings(RUN), False)[0], compile_cache=True)
    assert knobs and tg.save_compile_cache(config, run) is None
    assert "the compile cache was not written: No space left" in (tmp_path / "log.txt").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["log.txt"] and run.finish()


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
    (found,) = {Path(line.split(" written to ")[1].removesuffix(" instead")).parent for line in errors.splitlines()}
    try:
        assert code == tg.EXIT_ELSEWHERE and found.parent == there and len(errors.splitlines()) == 2
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
    code, out, errors = run(ARTIFACT_LIMIT_BYTES=90_000, TARGET_BYTES=100_000, EMBED_BITS=16)
    assert code in (1, tg.EXIT_ELSEWHERE)
    assert "error: the artifact is " in out and str(rescued(folder)) in errors and code == tg.EXIT_ELSEWHERE


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_is_really_full(data, tmp_path, undisturbed, ranks):
    """A file system of 96 KiB where this process may mount one; else a limit on the size of files, in the same place."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "none", small]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    before = f"(__import__('pathlib').Path({str(small)!r}) / 'run' / 'log.txt')"
    filler = tmp_path / "fill.py"
    filler.write_text(
        f"import runpy, sys, torch\nsys.path.insert(0, {str(ROOT)!r})\nimport train_gpt as tg\n"
        "step = tg.Trainer.step\n"
        "def full(trainer, *arguments):\n"
        "    if trainer.run.is_main:\n"
        f"        {'fill()' if mounted else 'limit()'}\n"
        "    return step(trainer, *arguments)\n"
        "def limit():\n"
        "    import resource\n"
        f"    resource.setrlimit(resource.RLIMIT_FSIZE, ({before}.stat().st_size, resource.RLIM_INFINITY))\n"
        "    real = tg.rescue_folders\n"
        "    def free(run):\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "        yield from real(run)\n"
        "    tg.rescue_folders = free\n"
        "def fill():\n"
        f"    with open({str(small / 'rest')!r}, 'wb', buffering=0) as file:\n"
        "        try:\n"
        "            while True:\n"
        "                file.write(bytes(4096))\n"
        "        except OSError:\n"
        "            pass\n"
        "tg.Trainer.step = full\n"
        "sys.exit(tg.main(sys.argv[1:], dict(tg.os.environ)))\n"
    )
    try:
        done = fork(filler, dict(RUN, DATA_PATH=data, ARTIFACT_DIR=small / "run"), ranks=ranks, cwd=tmp_path)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", small], check=True)
    found = rescued(tmp_path)
    assert done.returncode == tg.EXIT_ELSEWHERE and len(warnings_of(done.stderr)) <= 6, done.stderr
    assert "Traceback" not in done.stderr
    if ranks == 1:
        assert (found / "model.pgolf").read_bytes() == (undisturbed / "model.pgolf").read_bytes()
    assert str(found / "model.pgolf") in done.stderr and "val_bpb" in done.stdout
    if mounted:
        assert json.loads((found / "summary.json").read_text())["val_bpb"] > 0

"""A rank that is killed, stopped, stuck or in error ends all ranks, with one line that names it."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import processes
import train_gpt as tg
from helpers import TINY, clean_environment, fork, free_port, running_with, single_run, wait_until

WORKER = Path(__file__).with_name("faulty_rank.py")
SOON = dict(stopped=1.5, idle=3, silent=6, arrival=10, tick=0.25)
LIMITS = tg.RankLimits()
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux shows the state of a process")


def plan(rank=1, stage="train", fault="none", **limits):
    return json.dumps(dict(rank=rank, stage=stage, fault=fault, limits=SOON | limits))


def settings(data, folder, **knobs):
    """Settings of a run, with a mark by which its processes are found."""
    return dict(TINY, DATA_PATH=data, RUN_ID="run", MARK=folder, **knobs)


def error_lines(text):
    """What the ranks themselves wrote on standard error."""
    return [line for line in text.splitlines() if line.startswith(("error:", "interrupted"))]


# -------------------------------------------------------------------------------------------------------------- judging


def test_ranks_that_work_or_wait_are_left_alone():
    sights = [tg.Sight(0, "quantize", "here", False, 19.9, 39.9, 44.9), tg.Sight(1, "quantize"), tg.Sight(2, "pack")]
    assert tg.judge(sights, LIMITS) is None and tg.judge([], LIMITS) is None


@pytest.mark.parametrize(
    "sight, words",
    [
        (tg.Sight(3, "train", "x.py:1, f", dead=True), "rank 3 died in stage train"),
        (tg.Sight(3, "pack", stopped=20.4), "rank 3 has been stopped for 20 s in stage pack"),
        (tg.Sight(3, "ttt", "x.py:1, f", idle=41), "rank 3 has done nothing for 41 s in stage ttt (at x.py:1, f)"),
        (tg.Sight(3, "data", silent=45), "rank 3 has been silent for 45 s in stage data"),
    ],
)
def test_a_lost_rank_is_named_with_its_stage(sight, words):
    assert tg.judge([tg.Sight(0, "train"), sight], LIMITS) == (tg.RANK_LOST, f"error: {words}", (3,))


def test_several_lost_ranks_share_the_line():
    verdict = tg.judge([tg.Sight(0, "train", dead=True), tg.Sight(2, "train", stopped=30)], LIMITS)
    assert verdict.lost == (0, 2) and verdict.line.count("rank ") == 2 and "\n" not in verdict.line


def test_all_limits_leave_room_below_a_minute():
    assert max(LIMITS.stopped, LIMITS.idle, LIMITS.silent, LIMITS.arrival) + tg.Watchdog.LINGER < 60


# --------------------------------------------------------------------------------------------------------------- effort


def idle_after(work, seconds=0.5):
    """What Effort finds after a thread, which takes the main thread's place, has worked for a while."""
    stop, effort = threading.Event(), tg.Effort()
    thread = threading.Thread(target=work, args=(stop,))
    thread.start()
    effort.main = thread.ident
    try:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            effort.idle(time.monotonic())
            time.sleep(0.02)
        return effort.idle(time.monotonic())
    finally:
        stop.set()
        thread.join()


def spin(stop):
    while not stop.is_set():
        sum(range(1000))


def test_a_thread_that_computes_is_not_idle_and_one_that_sleeps_is():
    assert idle_after(spin)[0] < 0.4
    seconds, place = idle_after(lambda stop: stop.wait())
    assert seconds > 0.4 and place.startswith("threading.py:")


def test_a_thread_that_waits_for_other_ranks_is_not_idle():
    class Handle:
        def __init__(self, stop):
            self.wait = stop.wait

    run = single_run()
    assert idle_after(lambda stop: run.wait(Handle(stop)))[0] < 0.1


@linux
def test_a_compiler_works_for_the_thread_that_waits_for_it():
    def compile_something(stop):
        with subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) as child:
            stop.wait()
            child.kill()

    effort = tg.Effort()
    before = effort.other_work()[0]
    thread_stop = threading.Event()
    thread = threading.Thread(target=compile_something, args=(thread_stop,))
    thread.start()
    wait_until(lambda: effort.other_work()[0] > before + 0.1)
    thread_stop.set()
    thread.join()


# ------------------------------------------------------------------------------------------------------------ real runs


@linux
@pytest.mark.parametrize(
    "fault, stage, rank, words",
    [
        ("kill", "train", 1, "rank 1 died in stage train"),
        ("stop", "validate", 0, "rank 0 has been stopped for 2 s in stage validate"),
        ("hang", "quantize", 0, "rank 0 has done nothing for 3 s in stage quantize (at faulty_rank.py:"),
        ("raise", "setup", 1, "rank 1 failed in stage setup: LookupError: a bug of this rank"),
        ("refuse", "train", 1, "file.bin: cannot be read (of this rank)"),
    ],
)
def test_a_fault_of_one_rank_ends_all_with_one_line(fault, stage, rank, words, data, tmp_path):
    values = settings(data, tmp_path, ITERATIONS=2, GPTQ_CALIBRATION_BATCHES=1)
    done = fork(WORKER, values, plan(rank, stage, fault), ranks=2, cwd=tmp_path)
    lines = error_lines(done.stderr)
    assert len(lines) == 1 and lines[0].startswith(f"error: {words}"), done.stderr
    assert ("Traceback" in done.stderr) is (fault == "raise") and "gloo" not in done.stderr
    assert (
        done.returncode in {"kill": (-9, 4), "stop": (-9, 4), "hang": (-9, 4), "raise": (1, 4), "refuse": (2,)}[fault]
    )
    assert not running_with(f"MARK={tmp_path}")
    log = tmp_path / "logs" / "run" / "log.txt"
    if fault not in ("raise", "refuse"):
        assert log.read_text().splitlines()[-1] == lines[0]


def start_torchrun(values, folder, ranks=2, script=WORKER, arguments=()):
    """torchrun itself, which a test can kill; what it and its ranks write on standard error is left in a file."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", script]
    with open(folder / "stderr", "w") as errors:
        return processes.start(
            [*command, *arguments],
            supervised=False,
            env=clean_environment(values),
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )


@linux
@pytest.mark.parametrize(
    "number, ranks", [(signal.SIGKILL, 2), (signal.SIGKILL, 1), (signal.SIGINT, 2), (signal.SIGTERM, 2)]
)
def test_nothing_outlives_torchrun(number, ranks, data, tmp_path):
    values, mark = settings(data, tmp_path, ITERATIONS=100000), f"MARK={tmp_path}"
    process = start_torchrun(values, tmp_path, ranks, arguments=[plan(rank=9)])
    log = tmp_path / "logs" / "run" / "log.txt"
    wait_until(lambda: log.exists() and "step:1/" in log.read_text(), process)
    process.send_signal(number)
    process.wait(30)
    wait_until(lambda: not running_with(mark))
    lines = error_lines((tmp_path / "stderr").read_text())
    assert len(lines) == 1, lines
    if number == signal.SIGKILL:
        assert lines[0] == "error: torchrun has ended, in stage train"
        return
    said = "interrupted" if number == signal.SIGINT else "error: ended by SIGTERM"
    assert lines[0].startswith(f"{said} after step ") and lines[0].endswith("; the same command goes on")
    step = int(lines[0].split()[-6].strip(";"))
    assert (log.parent / "checkpoint" / tg.checkpoint_name(step)).is_file()


def test_a_rank_that_never_comes_is_named(data, tmp_path):
    """Two of three ranks start, without torchrun, which would not let that happen."""
    values = dict(settings(data, tmp_path), WORLD_SIZE=3, LOCAL_WORLD_SIZE=3, MASTER_ADDR="127.0.0.1")
    limits = json.dumps(dict(rank=9, stage="", fault="none", limits=SOON | dict(arrival=4)))
    values["MASTER_PORT"] = free_port()
    ranks = [
        processes.start(
            [sys.executable, str(WORKER), limits],
            env=clean_environment({}) | {k: str(v) for k, v in dict(values, RANK=rank, LOCAL_RANK=rank).items()},
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 2)
    ]
    errors = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [4, 4], errors
    (line,) = filter(None, errors)  # of whichever came first
    assert line.startswith("error: rank 1 did not start within 4 s"), errors


def test_a_single_rank_starts_no_thread(monkeypatch):
    started, handler = threading.active_count(), signal.getsignal(signal.SIGTERM)
    run = tg.start_run(tg.config_from_env(dict(DEVICE="cpu"), False)[0], {})
    assert run.watchdog is None and threading.active_count() == started
    with run.guard(), tg.Stage(run, "train"):
        pass
    run.leave()
    assert run.stage == "train" and signal.getsignal(signal.SIGTERM) == handler

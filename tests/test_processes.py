"""tools/processes.py: what is started ends with the process that started it, however that one ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import processes
from helpers import HANG_SECONDS, ROOT, clean_environment, run_command, running_with, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
# A child in a session of its own, as torchrun's ranks are, which ignores SIGTERM; the command itself waits for it.
STUBBORN = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = "import time; print('ready', flush=True); time.sleep(1800)"
subprocess.run([sys.executable, "-c", child], start_new_session=True)
"""
LAUNCHER = """
import sys
sys.path.insert(0, sys.argv[1])
import processes
torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
processes.run([*torchrun, *sys.argv[2:]])
"""
# It notices nothing: what ends it is processes.py. How the real script's ranks end by themselves is test_ranks.py's.
RANK = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1], os.environ["RANK"]).touch()
time.sleep(1800)
"""


@pytest.fixture
def marked(tmp_path):
    """An environment that marks a process and all that descend from it, and the mark."""
    return clean_environment(dict(MARK=tmp_path)), f"MARK={tmp_path}"


def started(command, environment, **options):
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) | options
    return processes.start(command, env=environment, **options)


def ranks_of(mark):
    """The processes of a run that torchrun has given a rank."""
    ranks = set(running_with("LOCAL_RANK="))
    return [process for process in running_with(mark) if process in ranks]


@pytest.fixture
def launched(marked, tmp_path):
    """A process that waits for two ranks of torchrun, which are there; torchrun's process; the mark of all."""
    environment, mark = marked
    script, begun = tmp_path / "rank.py", tmp_path / "begun"
    script.write_text(RANK)
    begun.mkdir()
    command = [sys.executable, "-c", LAUNCHER, str(ROOT / "tools"), str(script), str(begun)]
    launcher = started(command, environment, supervised=False)
    wait_until(lambda: len([*begun.iterdir()]) == 2, launcher)
    ranks = ranks_of(mark)
    assert len(ranks) == 2
    (torchrun,) = {int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1]) for rank in ranks}
    yield launcher, torchrun, mark
    launcher.kill()
    launcher.communicate()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_rank_outlives_a_killed_test_process(launched, number):
    launcher, torchrun, mark = launched
    assert len(running_with(mark)) >= 4  # the launcher, torchrun and two ranks
    launcher.send_signal(number)
    assert launcher.wait(HANG_SECONDS) == -number
    wait_until(lambda: not running_with(mark))


def test_no_rank_outlives_a_killed_torchrun(launched):
    launcher, torchrun, mark = launched
    os.kill(torchrun, signal.SIGKILL)
    assert launcher.wait(HANG_SECONDS) == 0  # the launcher was told, and ended as it likes
    wait_until(lambda: not running_with(mark))


def test_a_time_out_ends_everything(marked, monkeypatch):
    environment, mark = marked
    monkeypatch.setattr(processes, "PATIENCE", 1)
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run([sys.executable, "-c", STUBBORN], env=environment, timeout=1)
    assert not running_with(mark)


def test_stop_ends_a_command_that_ignores_it(marked, monkeypatch):
    environment, mark = marked
    monkeypatch.setattr(processes, "PATIENCE", 1)
    process = started([sys.executable, "-c", STUBBORN], environment)
    assert process.stdout.readline() == "ready\n" and len(running_with(mark)) == 3
    processes.stop(process)
    assert process.returncode == -signal.SIGKILL and not running_with(mark)
    process.communicate()


def test_what_a_command_leaves_is_ended_with_it(marked):
    environment, mark = marked
    code = "import subprocess; subprocess.Popen(['sleep', '1800'], start_new_session=True); print('started')"
    done = run_command([sys.executable, "-c", code], env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "started\n", "") and not running_with(mark)


def test_a_killed_supervisor_ends_its_command(marked):
    environment, mark = marked
    process = started([sys.executable, "-c", "print('ready', flush=True); import time; time.sleep(1800)"], environment)
    assert process.stdout.readline() == "ready\n"
    process.kill()
    wait_until(lambda: not running_with(mark))
    process.communicate()


def test_a_command_ends_as_if_it_had_no_supervisor(tmp_path):
    assert run_command(["sh", "-c", "exit 7"]).returncode == 7
    assert run_command(["sh", "-c", "kill -USR1 $$"]).returncode == -signal.SIGUSR1
    done = run_command(
        ["sh", "-c", "cat; pwd; echo $WORD; echo error >&2"], cwd=tmp_path, env={**os.environ, "WORD": "x"}
    )
    assert (done.stdout, done.stderr) == (f"{tmp_path}\nx\n", "error\n")
    with pytest.raises(FileNotFoundError, match="no-such-command"):
        run_command(["no-such-command"])


FAMILY = """
import os, signal, subprocess, sys
number, code = int(sys.argv[1]), sys.argv[2]
def told(*_):
    os.write(1, b"command\\n" if code else b"child\\n")  # in one piece: both write to one pipe
    if code:
        child.wait() if number == signal.SIGINT else child.kill()
    os._exit(3)
signal.signal(number, told)
child = subprocess.Popen([sys.executable, "-c", code, str(number), ""]) if code else print("ready", flush=True)
while True:
    signal.pause()
"""


@pytest.mark.parametrize("number, heard", [(signal.SIGTERM, ["command"]), (signal.SIGINT, ["child", "command"])])
def test_signals_are_passed_on(number, heard):
    """SIGTERM to the command alone; SIGINT to its children too, as by Ctrl-C."""
    process = started([sys.executable, "-c", FAMILY, str(int(number)), FAMILY], None)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 3 and sorted(out.split()) == heard

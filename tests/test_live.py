"""A run that is watched: the live line of a terminal, the files that the last lines name, and `make watch`."""

import io
import math
import os
import pty
import re
import subprocess
import sys

import pytest

import train_gpt as tg
from helpers import ROOT, SCRIPT, TINY, clean_environment, fork_script, launch

sys.path.insert(0, str(ROOT / "tools"))
import watch  # noqa: E402


class Terminal(io.StringIO):
    def isatty(self):
        return True


def read_all(handle):
    """What a terminal shows until the process at its other end closes it."""
    parts = []
    while True:
        try:
            part = os.read(handle, 1 << 16)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts).decode()


@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
def test_a_terminal_gets_a_live_line_and_files_get_plain_ones(terminal, data, tmp_path):
    values = dict(TINY, DATA_PATH=data, RUN_ID="live", TERM=terminal)
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT)], stdout=slave, stderr=slave, env=clean_environment(values), cwd=tmp_path
    )
    os.close(slave)
    shown = read_all(master)
    os.close(master)
    assert process.wait() == 0, shown
    if terminal == "dumb":
        assert "step:1/" in shown and "\x1b" not in shown
        return
    live = re.findall(r"\r(step \d+  loss [^\r\n]*)\x1b\[K", shown)
    assert re.fullmatch(
        r"step \d+  loss \d\.\d{4}  bpb ~\d\.\d{3}  [\d,]+ tokens/s  \d+%  ETA (\d+:)?\d+:\d\d", live[0]
    ), live
    screen = re.sub(r"[^\n]*\r\x1b\[K", "", shown.replace("\r\n", "\n"))
    log = (tmp_path / "logs" / "live" / "log.txt").read_text()
    assert "\x1b" not in log and "\r" not in log
    assert screen.endswith(log)


def test_without_a_terminal_nothing_is_added(data, tmp_path):
    done = fork_script(dict(TINY, DATA_PATH=data, RUN_ID="plain"), cwd=tmp_path)
    assert done.returncode == 0 and "\r" not in done.stdout and "\x1b" not in done.stdout
    folder = tmp_path / "logs" / "plain"
    assert done.stdout.endswith((folder / "log.txt").read_text())
    named = [line.removeprefix("next").split()[0] for line in done.stdout.splitlines()[-3:]]
    assert done.stdout.splitlines()[-3].startswith("next ")
    assert named == [f"logs/plain/{name}" for name in ("model.pgolf", "summary.json", "log.txt")]
    assert all((tmp_path / name).is_file() for name in named)
    done = fork_script(dict(TINY, DATA_PATH=data, RUN_ID="plain", MODE="eval"), cwd=tmp_path)
    assert [line.split()[-7:][0] for line in done.stdout.splitlines()[-1:]] and done.returncode == 0
    assert "logs/plain/eval_summary.json" in done.stdout and "logs/plain/eval_log.txt" in done.stdout


def test_the_live_line_is_written_over_cut_and_removed(monkeypatch):
    monkeypatch.setattr(tg.shutil, "get_terminal_size", lambda *_, **_more: os.terminal_size((10, 24)))
    stream = Terminal()
    line = tg.LiveLine(stream)
    line.clear()
    assert stream.getvalue() == ""
    line.show("a line of many letters")
    line.show("at once")
    line.clear()
    line.clear()
    assert stream.getvalue() == "\ra line of\x1b[K\r\x1b[K"
    line.SECONDS = 0
    line.show("b")
    assert stream.getvalue().endswith("\rb\x1b[K")


@pytest.mark.parametrize("kind", ["file", "none", "closed", "broken", "dumb"])
def test_other_streams_get_no_live_line(kind):
    class Broken(Terminal):
        def write(self, text):
            raise BrokenPipeError

    dumb = Terminal()
    stream = {"file": io.StringIO(), "none": None, "closed": Terminal(), "broken": Broken(), "dumb": dumb}[kind]
    if kind == "closed":
        stream.close()
    line = tg.LiveLine(stream, kind == "dumb")
    line.show("text")
    line.clear()
    assert not line.terminal and (kind not in ("file", "dumb") or stream.getvalue() == "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (9.4, "0:09"), (754, "12:34"), (3723, "1:02:03"), (-1, "0:00"), (59.7, "1:00")]
)
def test_seconds_as_people_read_them(seconds, text):
    assert tg.clock(seconds) == text


def test_the_line_of_a_step_says_what_is_known():
    config = tg.config_from_env({"PRESET": "baseline", "ITERATIONS": "200", "MAX_WALLCLOCK_SECONDS": "0"}, False)[0]
    progress = tg.Progress(50, 10.0)
    rate = f"{50 * config.train_batch_tokens / 10:,.0f}"
    loss = 2 * math.log(2)
    expected = f"step 50  loss {loss:.4f}  bpb ~0.500  {rate} tokens/s  25%  ETA 0:30"
    assert tg.live_step(progress, config, loss, 4.0) == expected
    assert tg.live_step(progress, config, loss, 0.0) == expected.replace("  bpb ~0.500", "")


# --------------------------------------------------------------------------------------------------------- make watch


@pytest.fixture
def a_run(tmp_path):
    """A folder that a run writes to."""
    folder = tmp_path / "logs" / "run"
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("step:1/9 train_loss:6.9370 train_time:42ms step_avg:41.60ms\n")
    return folder


def test_watch_draws_again_when_a_file_has_changed(a_run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    pages, out = [], tmp_path / "report"
    lines = ["step:2/9 train_loss:5.9370 train_time:82ms step_avg:41.00ms\n"]

    def sleep(seconds):
        pages.append((out / "report.html").read_text())
        assert seconds == 0.5
        if lines:
            with open(a_run / "log.txt", "a") as file:
                file.write(lines.pop())

    monkeypatch.setattr(watch.time, "sleep", sleep)
    clock = iter(range(100))
    monkeypatch.setattr(watch.time, "monotonic", lambda: next(clock))
    assert watch.main([str(a_run.parent), "--out", str(out), "--every", "0.5", "--patience", "3"]) == 0
    assert capsys.readouterr().out.count("drawn: ") == 2 and pages[0] != pages[1]
    assert '<meta http-equiv=refresh content="0.5">' in pages[0] and pages[0].count("http-equiv") == 1
    assert "data:image/png;base64," in pages[1]


def test_watch_names_what_is_missing(tmp_path):
    done = launch(ROOT / "tools" / "watch.py", {}, tmp_path / "nowhere", "--once")
    assert done.returncode == 2 and done.stderr == f"error: {tmp_path / 'nowhere'}: no such file or folder\n"

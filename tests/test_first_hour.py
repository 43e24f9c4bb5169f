"""tools/first_hour.py: a whole rehearsal with a failing and a hanging step, kills, the report, the plan for GPUs."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import first_hour
import first_hour_data
import first_hour_report as report
import processes
from helpers import ROOT, clean_environment, documents_of, forking, run_command, running_with, shards_of, tg, wait_until
from runs import UserError

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
# A child in a session of its own, as torchrun's ranks are, which ignores SIGTERM; the command itself waits for it.
STUBBORN = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = "import time; print('still here', flush=True); time.sleep(1800)"
subprocess.run([sys.executable, "-c", child], start_new_session=True)
"""


def step(name, code, seconds=60.0):
    """A step that runs a Python program."""
    return first_hour.Step(name, f"planted: {name}", [sys.executable, "-c", code], seconds)


def statuses(folder):
    return {row["name"]: row["status"] for row in json.loads((folder / "report.json").read_text())["steps"]}


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """An environment without knobs and without what pytest's workers set, marked; and the mark."""
    for name in set(os.environ) - set(clean_environment({})):
        monkeypatch.delenv(name)
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT", "PYTEST_XDIST_TESTRUNUID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MARK", str(tmp_path))
    monkeypatch.setattr(processes, "PATIENCE", 1)
    return f"MARK={tmp_path}"


# ------------------------------------------------------------------------------------------------------- a rehearsal


@linux
def test_a_rehearsal_runs_every_step_and_goes_on_after_failures(bare, tmp_path, monkeypatch, capsys):
    """Every step for real, at tiny sizes on a CPU, and two planted ones: one that fails, one that never ends."""
    out, budget, plan = tmp_path / "hour", tmp_path / "budget.json", first_hour.plan
    budget.write_text(json.dumps(dict(step=dict(sdpa=dict(plain=0.5)), quantize=1e6)))
    wrong = [step("wrong", "print('a planted mistake'); raise SystemExit(3)"), step("hangs", STUBBORN, 3)]
    monkeypatch.setattr(first_hour, "plan", lambda *given: [*wrong, *plan(*given)])
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k quantization")  # one quick test in the step of tests
    arguments = ["--device", "cpu", "--tiny", "--out", str(out), "--budget", str(budget)]
    arguments += ["--skip", "step-fa2,step-varlen"]  # as step-fa3
    with forking():
        assert first_hour.main(arguments) == 1
    # On the children of this test: what the mark finds besides this process would be left over.
    assert set(running_with(bare)) <= {os.getpid()}

    backends = {"step-fa3": "unavailable"}
    names = ("versions", "tests", "step-sdpa", "quantize", "pack", "ttt", "data", "record")
    logs = {name: (out / f"{name}.log").read_text() for name in statuses(out)}
    expected = dict(wrong="failed", hangs="timed out", **backends, **dict.fromkeys(names, "passed"))
    assert statuses(out) == expected, logs
    assert all(text.startswith("$ ") and len(text.splitlines()) > 1 for text in logs.values())
    assert "still here" in logs["hangs"] and " passed" in logs["tests"] and "after test-time training" in logs["record"]

    found = json.loads((out / "report.json").read_text())
    lines = {line["key"]: line for line in found["lines"]}
    expected = {"step/sdpa/plain", "step/sdpa/looped", "quantize", "packing", "unpack", "evaluate", "ttt", "run/ttt"}
    assert expected | {"run/warmup", "run/calibrate", "run/quantize", "run/evaluate"} <= lines.keys()
    assert all(line["measured"] > 0 for line in found["lines"])
    slow, quick = lines["step/sdpa/plain"], lines["quantize"]
    assert (
        slow["estimated"] == [0.5] * 3 and slow["ratio"] == pytest.approx(slow["measured"] / 0.5) and slow["ratio"] > 1
    )
    assert quick["estimated"] == [1e6] * 3 and quick["seconds_lost"] < 0 and lines["evaluate"]["estimated"] is None
    first = found["try_first"]
    assert "**wrong** failed with exit code 3: a planted mistake" in first[0] and "limit of 3 s" in first[1]
    assert first[2].startswith("The largest gap: **a step before the loops, sdpa**")
    assert first[-1].startswith("ATTENTION=fa3:")
    text = (out / "report.md").read_text()
    assert "A rehearsal" in text and "| no estimate |" in text and "takes bfloat16 on CUDA only" in text
    assert torch.__version__ in text and not list(out.glob("*.tmp"))

    # Going on repeats the two alone; they are mended.
    before = {name: (out / f"{name}.log").stat().st_mtime_ns for name in names}
    mended = [step("wrong", "print('mended')"), step("hangs", "print('ends')")]
    monkeypatch.setattr(first_hour, "plan", lambda *given: [*mended, *plan(*given)])
    assert first_hour.main([*arguments, "--resume"]) == 0
    assert before == {name: (out / f"{name}.log").stat().st_mtime_ns for name in names}
    assert set(statuses(out).values()) == {"passed", "unavailable"}
    assert "record         passed before" in capsys.readouterr().out
    assert "a planted mistake" in (out / "wrong.log.earlier1").read_text()
    assert "mended" in (out / "wrong.log").read_text()


LAUNCHER = """
import json, sys
sys.path[:0] = [sys.argv[1] + "/tools", sys.argv[1] + "/tests"]
import first_hour, processes, test_first_hour as planted
processes.PATIENCE = 1
steps = [planted.step("first", "print('one')"), planted.step("second", planted.STUBBORN)]
first_hour.plan = lambda *_: steps
sys.exit(first_hour.command_line(lambda _: first_hour.main(["--device", "cpu", "--out", sys.argv[2]])))
"""


@linux
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_hour_leaves_a_report_and_no_process(number, bare, tmp_path):
    out = tmp_path / "hour"
    command = [sys.executable, "-c", LAUNCHER, str(ROOT), str(out)]
    process = processes.start(command, supervised=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: (out / "second.log").is_file() and "still here" in (out / "second.log").read_text(), process)
    process.send_signal(number)
    process.communicate()
    assert process.returncode == (130 if number == signal.SIGTERM else -number)
    wait_until(lambda: set(running_with(bare)) <= {os.getpid()})
    assert statuses(out) == dict(first="passed", second="interrupted")
    assert "**second** was interrupted" in (out / "report.md").read_text()


# ------------------------------------------------------------------------------------------------------- the options


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--out", "{here}"], "exists already"),
        (["--resume"], "--out"),
        (["--resume", "--out", "{here}"], "report.json"),
        (["--only", "step-fa4"], "step-fa4"),
        (["--limit", "tests=0"], "tests=0|0: must be"),
        (["--data", "{here}/none"], "no such folder"),
        (["--device", "cuda"], "sees no GPU"),
    ],
)
def test_what_a_user_can_mend(arguments, words, bare, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    given = [word.replace("{here}", str(tmp_path)) for word in arguments]
    if "--out" not in given:
        given += [] if "--resume" in given else ["--out", str(tmp_path / "new")]
    if "--device" not in given:
        given += ["--device", "cpu"]
    with pytest.raises(UserError, match=words):
        first_hour.main(given)
    assert not list(tmp_path.iterdir())


def test_an_hour_goes_on_as_it_was_begun(bare, tmp_path, monkeypatch):
    monkeypatch.setattr(first_hour, "plan", lambda *_: [step("first", "print('one')")])
    out = ["--device", "cpu", "--out", str(tmp_path / "hour")]
    assert first_hour.main(out) == 0
    with pytest.raises(UserError, match="--tiny: the folder of --resume was begun with False"):
        first_hour.main([*out, "--resume", "--tiny"])


@pytest.mark.parametrize("gpus, ranks", [(1, 1), (4, 4), (5, 4), (7, 6), (8, 8)])
def test_ranks_divide_the_batch(gpus, ranks, bare, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert first_hour.count_ranks(first_hour.parse([])) == ranks
    tg.batch_layout(tg.config_from_env(dict(PRESET="record", DEVICE="cpu"), False)[0], ranks)
    with pytest.raises(UserError, match="are visible"):
        first_hour.count_ranks(first_hour.parse(["--ranks", str(gpus + 1)]))


@pytest.mark.parametrize("gpus, given", [(8, True), (1, True), (2, False)])
def test_the_plan_on_gpus(gpus, given, bare, tmp_path, data, monkeypatch):
    """All GPUs for the run, the record's sizes, real tests, and a share of the documents on fewer than 8 GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    options = first_hour.parse(["--out", str(tmp_path / "hour"), *(["--data", str(data)] if given else [])])
    assert options.device == "cuda" and first_hour.count_ranks(options) == gpus
    steps = {s.name: s for s in first_hour.plan(options, gpus)}
    expected = ["versions", "tests", *(f"step-{name}" for name in ("fa3", "fa2", "varlen", "sdpa"))]
    expected += ["step-ranks"] * (gpus > 1) + ["quantize", "pack", "ttt", "data", "record"]
    assert list(steps) == expected and sum(s.seconds for s in steps.values()) < 3.5 * 3600
    assert steps["tests"].command[-3:] == ["-m", "gpu", "tests"] and "-n" in steps["tests"].command
    assert f"--nproc_per_node={gpus}" in steps["record"].command
    run = steps["record"].environment
    assert run["PRESET"] == "record" and run["DEVICE"] == "cuda" and run["MAX_WALLCLOCK_SECONDS"] == "180"
    assert all(s.environment["DEVICE"] == "cuda" for s in steps.values() if s.name.startswith("step-"))
    assert steps["step-fa2"].environment["ATTENTION"] == "fa2"
    documents = steps["data"].command[-1] if "--documents" in steps["data"].command else None
    assert documents == ("6250" if given and gpus == 1 else None)
    place = {8: data.resolve(), 1: tmp_path / "hour" / "data", 2: ROOT / "data" / "builtin_sp8192"}[gpus]
    assert run["DATA_PATH"] == str(place)
    for s in steps.values():
        scripts = [word for word in s.command if word.endswith(".py")]
        assert all((ROOT / script).is_file() for script in scripts)


def test_steps_can_be_chosen_and_limited(bare, tmp_path):
    common = ["--device", "cpu", "--tiny", "--out", str(tmp_path / "hour")]
    options = first_hour.parse([*common, "--only", "pack,ttt,data", "--skip", "data", "--limit", "ttt=7"])
    assert [(s.name, s.seconds) for s in first_hour.plan(options, 1)] == [("pack", 600), ("ttt", 7)]


def test_a_rented_quarter_of_an_hour_ends_in_time(bare, tmp_path, monkeypatch, capsys):
    """What runs at the end of --total is stopped, what comes after it is not begun, and --resume goes on with both."""
    steps = [step("first", "print('one')"), step("second", STUBBORN), step("third", "print('three')")]
    monkeypatch.setattr(first_hour, "plan", lambda *_: steps)
    arguments = ["--device", "cpu", "--out", str(tmp_path / "hour")]
    assert first_hour.main([*arguments, "--total", "0.1"]) == 1
    assert statuses(tmp_path / "hour") == dict(first="passed", second="timed out", third="not run")
    (said,) = json.loads((tmp_path / "hour" / "report.json").read_text())["try_first"]
    assert float(re.search(r"its limit of ([\d.]+) s", said)[1]) <= 6  # not the step's own, which was not reached
    assert "third          not run: --total 0.1 minutes are over" in capsys.readouterr().out
    steps[1] = step("second", "print('two')")
    assert first_hour.main([*arguments, "--resume"]) == 0
    assert set(statuses(tmp_path / "hour").values()) == {"passed"}


# -------------------------------------------------------------------------------------------------------- the report


def figures(folder, **contents):
    """Writes what steps would have written."""
    for name, content in contents.items():
        path = folder / f"{name.replace('_', '-')}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def bench_rows(attention, plain, looped, ranks=1):
    row = dict(part="whole step", tokens_per_second=1.0, mfu=0.4, peak_memory_bytes=2**31, ms_lowest=1, ms_highest=2)
    rows = [dict(row, order=order, ms_per_step=ms) for order, ms in (("plain", plain), ("looped", looped))]
    return dict(backend=dict(attention=attention), ranks=ranks, tokens_per_step=98304 * ranks, rows=rows)


def test_the_largest_gap_is_that_of_a_whole_run(tmp_path):
    """A step counts as often as it occurs, with the first backend that works alone; all ranks go before one."""
    figures(tmp_path, step_fa3=bench_rows("fa3", 70, 100), step_varlen=bench_rows("varlen", 700, 1000))
    figures(tmp_path, quantize=dict(rows=[dict(name="the whole stage", seconds=100.0)]))
    budget = {"step/fa3/plain": 64.0, "step/fa3/looped": 95.0, "step/varlen/plain": 70.0, "quantize": 60.0}
    lines = report.lines_of(tmp_path, budget)
    lost = {line.key: line.seconds_lost for line in lines if line.times}
    assert lost == {
        "step/fa3/plain": pytest.approx(2193 * 0.006),
        "step/fa3/looped": pytest.approx(2783 * 0.005),
        "quantize": pytest.approx(40),
    }
    first = report.advice([], lines)
    assert "quantization, all attempts" in first[0] and "1.67 times as long, 40.0 s" in first[0]
    assert first[1].startswith("Then: **a step after the loops, fa3**") and "a step before the loops" in first[2]
    figures(tmp_path, step_ranks=bench_rows("fa3", 80, 90, ranks=8))
    times = [(line.measured, line.times) for line in report.lines_of(tmp_path, budget) if line.times]
    assert times == [(80, 2193), (90, 2783), (100, 1)]


def test_the_run_counts_as_if_on_eight_ranks(tmp_path):
    (tmp_path / "record").mkdir()
    seconds = dict(train=180.0, calibrate=8.0, quantize=50.0, ttt=100.0, evaluate=2.0)
    summary = dict(ranks=2, steps=450, train_seconds=180.0, val_tokens=47_851_520 // 4, seconds=seconds)
    (tmp_path / "record" / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "record" / "config.json").write_text(json.dumps(dict(enable_looping_at=0.5)))
    lines = {line.key: line for line in report.lines_of(tmp_path, {"step/fa3/plain": 50.0, "step/fa3/looped": 100.0})}
    assert lines["run/step/0.5"].measured == pytest.approx(400 / 4)
    assert lines["run/step/0.5"].middle == pytest.approx(1 / (0.5 / 50 + 0.5 / 100))
    measured = {key: lines[f"run/{key}"].measured for key in ("calibrate", "quantize", "ttt", "evaluate")}
    assert measured == pytest.approx(dict(calibrate=2.0, quantize=50.0, ttt=100.0, evaluate=2.0))


def test_a_report_is_written_from_whatever_is_there(tmp_path):
    """Missing and broken files, no budget, a bar in a message."""
    figures(tmp_path, step_fa3='{"rows": [', ttt="[]", versions=dict(torch="2.13.0"))
    rows = [dict(name="tests", title="tests", limit=5, status="failed", exit_code=1, seconds=2.0, detail="a | b")]
    about = dict(begun="today", ranks=1, tiny=False, device="cuda")
    report.write(tmp_path, about, rows, tmp_path / "none.json")
    text = (tmp_path / "report.md").read_text()
    assert "0 figures" in text and "a \\| b" in text and "rehearsal" not in text and "| torch | 2.13.0 |" in text
    assert json.loads((tmp_path / "report.json").read_text())["lines"] == []


def test_last_words_name_the_error():
    assert report.last_words(["start", "ValueError: no", '{"a": 1}', "", "bye"]) == "ValueError: no"
    assert report.last_words(["start", "end "]) == "end" and report.last_words([]) == ""


def test_the_budget_of_this_project_is_understood():
    """Where bench/budget.py has written its estimates, the ones that decide are found in them."""
    if not report.BUDGET.is_file():
        pytest.skip("bench/results/budget.json is not there")
    budget = report.read_budget(report.BUDGET)
    for key in ("step/fa3/plain", "step/fa3/looped", "ttt", "evaluate", "quantize"):
        low, middle, high = report.estimate(budget, key, "s") or (0, 0, 0)
        assert 0 < low <= middle <= high, key


def test_the_estimates_are_those_of_the_budgets_stages(tmp_path):
    """In its own form: seconds, each with a range, a stage in several parts."""

    def row(low, mid, high):
        return dict(estimated=dict(low=low, mid=mid, high=high), peer_measured=1.0)

    stages = {"warmup, compiling": row(100, 150, 300), "warmup, steps": row(2, 3, 4), "evaluate": row(2, 3, 5)}
    peer = {"step before the loops": row(0.06, 0.064, 0.07), "ttt": row(200, 250, 300)}
    content = dict(stages=[dict(stage=name, **values) for name, values in stages.items()], peer=peer)
    (tmp_path / "budget.json").write_text(json.dumps(content))
    budget = report.read_budget(tmp_path / "budget.json")
    assert report.estimate(budget, "warmup", "s") == (102, 153, 304)
    assert report.estimate(budget, "step/fa3/plain", "ms") == pytest.approx((60, 64, 70))
    assert report.estimate(budget, "ttt", "s") == (200, 250, 300)
    assert report.estimate(budget, "step/fa3/looped", "ms") is None and report.estimate(budget, "pack", "s") is None
    figures(tmp_path, step_sdpa=bench_rows("sdpa", 128, 200))
    plain, looped = report.lines_of(tmp_path, budget)
    assert plain.ratio == pytest.approx(2) and "estimated with fa3" in plain.note and looped.estimated is None
    (tmp_path / "record").mkdir()
    report.write(tmp_path, dict(begun="", ranks=1, tiny=False, device="cuda"), [], tmp_path / "budget.json")
    assert "| 64 (60 to 70) ms | 2.00 | +140.4 |" in (tmp_path / "report.md").read_text()


# ----------------------------------------------------------------------------------------------- data and environment


def test_a_subset_holds_the_first_documents(data, tmp_path, capsys):
    out = tmp_path / "some"
    everything = documents_of(data, "val")
    first = len(documents_of_shard(shards_of(data, "val")[0]))
    for count in (5, first, first + 2, 10_000):
        shutil.rmtree(out, ignore_errors=True)
        assert first_hour_data.main([str(data), str(out), "--documents", str(count)]) == 0
        assert documents_of(out, "val") == everything[:count]
        assert documents_of(out, "train") == documents_of(data, "train") and (out / "tokenizer.model").is_file()
        assert tg.open_shard(shards_of(out, "val")[0])[0] == tg.BOS_ID and not (out / "manifest.json").exists()
    assert f"{len(everything)} validation documents" in capsys.readouterr().out
    with pytest.raises(UserError, match="fineweb_train"):
        first_hour_data.main([str(tmp_path)])


def documents_of_shard(path):
    """The documents that begin in a shard."""
    return np.flatnonzero(tg.open_shard(path) == tg.BOS_ID)


STAND_IN = """#!/bin/sh
case "$*" in
*torch.version.cuda*) [ "$BUILD" = cuda ] && echo /elsewhere/site-packages || exit 1 ;;
*purelib*) echo "$PLACE" ;;
"-m pip"*) for last; do :; done; cp "$last" "$PLACE/asked-for" ;;
"-m venv"*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
esac
"""


@pytest.mark.parametrize("torch_build, kept", [("cuda", True), ("cpu", False)])
def test_a_cuda_torch_is_not_installed_again(torch_build, kept, tmp_path):
    python, place = tmp_path / "python", tmp_path / "packages"
    place.mkdir()
    python.write_text(STAND_IN)
    python.chmod(0o755)
    environment = dict(os.environ, BUILD=torch_build, PLACE=str(place))
    done = run_command(["make", "venv", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}"], cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    asked, everything = (place / "asked-for").read_text(), (ROOT / "requirements.txt").read_text()
    assert ("torch==" in asked) is not kept and "numpy==" in asked
    assert asked == "".join(row for row in everything.splitlines(True) if not (kept and row.startswith("torch==")))


def test_make_passes_its_arguments_on():
    done = run_command(
        ["make", "-n", "--no-print-directory", "first-hour", "ARGS=--device cpu --tiny", "VENV=elsewhere"], cwd=ROOT
    )
    assert done.stdout.splitlines()[-1] == "elsewhere/bin/python tools/first_hour.py --device cpu --tiny"
    assert Path(ROOT, "docs", "first-hour.md").is_file()

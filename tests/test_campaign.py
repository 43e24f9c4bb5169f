"""The campaign: its judges find what is planted, its trials repeat, and its table adds up."""

import contextlib
import json
import os
import re
import signal
import sys
import time

import pytest

from helpers import ROOT, run_command

sys.path.insert(0, str(ROOT / "bench"))
import campaign  # noqa: E402
import train_gpt as tg  # noqa: E402
from faults import damage, disks, kills, kinds, steadiness, strange_folders, tally, trials  # noqa: E402
from faults.children import Child, Ended  # noqa: E402
from faults.inputs import Inputs, Reference  # noqa: E402
from faults.trials import HUNG, LOST, MISREPORTED, SURVIVED, Kind, Trial  # noqa: E402

SCORES = dict(val_bpb=1.5, val_loss=1.0, val_tokens=10, val_bytes=20, steps=8)


@pytest.fixture
def trial(tmp_path):
    return Trial("kill", 0, 1, tmp_path / "trial", Inputs(tmp_path))


def finished(folder, **changes):
    """A folder as a run leaves it, with these changes of its summary."""
    folder.mkdir(exist_ok=True)
    summary = dict(SCORES, resumed=1, idle_seconds=0.5, resumed_from="") | changes
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "model.pgolf").write_bytes(b"model")
    (folder / "log.txt").write_text("resumed    once\npeak memory 1\n")
    return folder


def seen(code=0, err="", made=2, shown=2, **more):
    return kills.Attempts(shown=shown, made=made, kills=1, last=Ended([code], "", err, 1.0, **more))


def judged(trial, folder, attempts):
    expected = dict(SCORES, **{"model.pgolf": kills.results(folder)["model.pgolf"]})
    with contextlib.suppress(trials.Stop):
        kills.judge(trial, folder, attempts, expected, True)
    return trial.verdict


def test_what_is_right_survives(trial, tmp_path):
    assert judged(trial, finished(tmp_path / "run"), seen()) == SURVIVED


@pytest.mark.parametrize(
    "changes, attempts, verdict, words",
    [
        (dict(val_bpb=1.4999999999999), {}, MISREPORTED, "val_bpb: 1.4999999999999 instead of 1.5"),
        (dict(resumed=3), {}, MISREPORTED, "resumed 3 times"),
        (dict(resumed=0), {}, MISREPORTED, "resumed 0 times"),
        (dict(idle_seconds=-1.0), {}, MISREPORTED, "idle_seconds"),
        ({}, dict(code=1), LOST, "did not end well"),
        ({}, dict(code=1, err="Traceback (most recent call last):\nValueError: x\n"), LOST, "ValueError: x"),
        ({}, dict(hung=True, code=-9), HUNG, "did not end within"),
        ({}, dict(orphans=["sleep 99"]), HUNG, "left processes: sleep 99"),
    ],
)
def test_a_planted_failure_of_a_killed_run_counts(trial, tmp_path, changes, attempts, verdict, words):
    assert judged(trial, finished(tmp_path / "run", **changes), seen(**attempts)) == verdict
    assert words in str(trial.findings)


def test_files_that_are_left_and_broken_lines_count(trial, tmp_path):
    folder = finished(tmp_path / "run")
    (folder / "model.pgolf.abcd1234").write_text("half")
    (folder / "metrics.jsonl").write_text('{"a": 1}\n{"b": \n')
    kills.judge_files(trial, folder)
    assert [verdict for verdict, _ in trial.findings] == [MISREPORTED] * 2
    assert "model.pgolf.abcd1234" in str(trial.findings) and "metrics.jsonl:2" in str(trial.findings)


def test_repeated_work_is_lost(trial):
    attempts = kills.Attempts(events=[["step train"] * 3])
    kills.check_next(trial, (8, True), None, Ended([0], "resumed from x: step 5, 1.0 s", "", 1.0), attempts)
    assert [verdict for verdict, _ in trial.findings] == [LOST, LOST]


@pytest.mark.parametrize(
    "code, err, verdict",
    [
        (2, "error: DATA_PATH=x: is damaged\n", SURVIVED),
        (2, "error: one\nerror: two\n", MISREPORTED),
        (2, "", MISREPORTED),
        (1, "error: x\n", MISREPORTED),
        (-11, "", MISREPORTED),
        (2, "Traceback (most recent call last):\n  File x\nOSError: y\n", MISREPORTED),
    ],
)
def test_only_one_line_and_the_right_code_survive(trial, tmp_path, code, err, verdict):
    damage.judge(trial, Ended([code], "", err, 1.0), tmp_path, {})
    assert trial.verdict == verdict


def test_another_score_after_damage_counts(trial, tmp_path):
    folder = finished(tmp_path / "run")
    damage.judge(trial, Ended([0], "", "", 1.0), folder, kills.results(folder))
    assert trial.verdict == SURVIVED
    damage.judge(trial, Ended([0], "", "", 1.0), finished(folder, val_loss=2.0), dict(SCORES))
    assert trial.verdict == MISREPORTED


def test_a_model_that_is_nowhere_is_lost(trial, tmp_path):
    digests = {"model.pgolf": tg.sha256_of(finished(tmp_path / "run") / "model.pgolf"), "val_bpb": 1.5}
    reference = Reference(tmp_path / "run", digests, [], 1.0)
    ended = Ended([3], "", f"warning: x: written to {tmp_path}/run/model.pgolf instead\n", 1.0)
    disks.judge(trial, ended, tmp_path / "none", reference)
    assert trial.verdict == SURVIVED
    (tmp_path / "run" / "model.pgolf").write_bytes(b"other")
    disks.judge(trial, ended, tmp_path / "none", reference)
    assert trial.verdict == MISREPORTED
    disks.judge(trial, Ended([3], "", "warning: all is well\n", 1.0), tmp_path / "none", reference)
    assert trial.verdict == LOST


def test_growth_and_control_codes_count(trial):
    steady = [[0, 100 << 20, 3, 1, 9]] * steadiness.RUNS
    steadiness.judge(trial, "stream", steady)
    assert trial.verdict == SURVIVED
    steadiness.judge(trial, "stream", [[0, (100 + i) << 20, 3 + i, 1, 9 + i] for i in range(steadiness.RUNS)])
    assert [text.split(":")[0] for _, text in trial.findings] == ["memory grows", "threads grow", "open files grow"]
    strange_folders.judge(trial, Ended([0], "\x1b[31m", "", 1.0, peak=1 << 40), "report.py")
    assert "control codes" in str(trial.findings) and "MiB of memory" in str(trial.findings)


# -------------------------------------------------------------------------------------------------------- processes


@pytest.fixture
def collecting():
    """This process gets orphans, as a worker of the campaign does."""
    import processes

    processes.prctl(processes.PR_SET_CHILD_SUBREAPER, 1)
    yield
    processes.prctl(processes.PR_SET_CHILD_SUBREAPER, 0)


def test_a_child_that_hangs_is_ended_and_what_it_leaves_is_named(tmp_path, collecting, monkeypatch):
    monkeypatch.setattr("faults.children.GRACE", 0.1)

    def leaves():
        if not os.fork():
            os.setsid()
            time.sleep(600)
        print("said")
        return 5

    ended = Child(leaves, dict(os.environ), tmp_path / "a").wait()
    assert ended.codes == [5] and ended.out == "said\n" and len(ended.orphans) == 1 and not ended.hung
    ended = Child(lambda: time.sleep(600) or 0, dict(os.environ), tmp_path / "b").wait(0.2)
    assert ended.hung and ended.codes == [-9] and not ended.orphans


def test_a_trial_that_a_worker_does_not_survive_counts_as_hung(tmp_path, monkeypatch, capsys):
    def die(trial):
        os._exit(1)

    def sleep(trial):
        time.sleep(600)

    def fail(trial):
        raise LookupError("of the judge")

    def skip(trial):
        raise trials.Skipped("not here")

    bodies = dict(good=lambda trial: None, dies=die, sleeps=sleep, fails=fail, skips=skip)
    chosen = {name: Kind(name, body, 1, 1.0, at_most=1) for name, body in bodies.items()}
    options = campaign.parse(["--minutes", "1", "--jobs", "2"])
    rows = campaign.campaign(options, chosen, Inputs(tmp_path), lambda rows: None)
    verdicts = {row["kind"]: row["verdict"] for row in rows}
    assert verdicts == dict(good=SURVIVED, dies=HUNG, sleeps=HUNG, fails=MISREPORTED, skips="skipped")
    text = tally.table(rows, chosen)
    assert "| **all** | **4** | **1** | **0** | **1** | **2** |" in text and "| skips | 0 | 0 | 0 | 0 | 0 |" in text
    page = tally.page(rows, chosen, dict(seed=3, command="x", begun=0.0, seconds=60.0))
    assert "Seed 3, 1.0 minutes" in page and "of the judge" in page and "skips: 1 (not here)" in page
    assert "1970-01-01" in page and f"torch {tg.torch.__version__}" in page


def test_nothing_is_left_of_a_worker_that_died(tmp_path):
    """A worker that is killed cannot end the processes of its trial."""
    program = f"""
import os, pathlib, subprocess, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "bench"), str(ROOT / "tools")]}
import campaign
from faults import kinds

def die(trial):
    left.write_text(str(subprocess.Popen(["sleep", "600"]).pid))
    os._exit(1)

left = pathlib.Path({str(tmp_path / "left")!r})
kinds.KINDS.clear()
kinds.KINDS["dies"] = kinds.Kind("dies", die, 1, 60.0, at_most=1)
campaign.Inputs.prepare = lambda self: None
code = campaign.main(["--kinds", "dies", "--jobs", "1", "--work", {str(tmp_path)!r}])
print(code, os.waitid(os.P_PID, int(left.read_text()), os.WEXITED).si_status)
"""
    done = run_command([sys.executable, "-c", program])
    assert done.stdout.splitlines()[-1:] == [f"1 {signal.SIGKILL:d}"], done.stdout + done.stderr
    assert "the worker of the campaign died" in done.stdout


def test_findings_name_no_folder_of_the_machine(tmp_path):
    def find(trial):
        trial.find(LOST, f"{trial.inputs.work}/trials/run of {ROOT}/train_gpt.py in {sys.prefix}/lib: gone")

    row = campaign.make(Kind("finds", find, 1, 60.0), 0, 1, Inputs(tmp_path))
    assert row["findings"] == [(LOST, "trials/run of train_gpt.py in lib: gone")] and row["verdict"] == LOST


def test_trials_repeat_by_seed_kind_and_number(tmp_path):
    inputs = Inputs(tmp_path)
    draws = [Trial("kill", 2, seed, tmp_path / "t", inputs).draw.random() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    first, second = (campaign.schedule(kinds.KINDS, 4) for _ in range(2))
    order = [next(first) for _ in range(150)]
    assert order == [next(second) for _ in range(150)]
    beginning = order[: campaign.LEAST * len(kinds.KINDS)]
    assert {(kind.name, number) for kind, number in beginning} == {(name, n) for name in kinds.KINDS for n in range(3)}


def test_every_kind_is_explained():
    page = (ROOT / "docs" / "robustness.md").read_text()
    assert set(kinds.KINDS) <= set(re.findall(r"`([a-z-]+)`", page))
    assert all(kind.meaning for kind in kinds.KINDS.values())


def test_a_small_campaign(tmp_path):
    """A process as a user starts it: trials of the cheap kinds, a page, a JSON file."""
    cheap = "damage-checkpoint,damage-resume,explosions,claims,folders,texts"
    command = [sys.executable, ROOT / "bench" / "campaign.py", "--kinds", cheap, "--trials", 6, "--seed", 11]
    command += ["--jobs", 1, "--work", tmp_path / "work", "--report", tmp_path / "page.md", "--json", tmp_path / "rows"]
    done = run_command(command)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "rows").read_text())["rows"]
    assert {row["kind"] for row in rows} == set(cheap.split(",")) and {row["verdict"] for row in rows} == {SURVIVED}
    assert "| **all** | **6** | **6** | **0** | **0** | **0** |" in (tmp_path / "page.md").read_text()
    assert not list((tmp_path / "work" / "trials").iterdir())


def test_an_unknown_kind_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        campaign.parse(["--kinds", "kill,nothing"])
    assert end.value.code == 2 and "unknown kinds: nothing" in capsys.readouterr().err

"""tools/sweep.py: real runs and a script that only pretends; killed, failing, hopeless and shared sweeps."""

import contextlib
import json
import math
import signal
import sqlite3
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import processes
from helpers import (
    HANG_SECONDS,
    ROOT,
    SCRIPT,
    TINY,
    clean_environment,
    launch,
    run_command,
    running_with,
    snapshot,
    wait_until,
)

sys.path.insert(0, str(ROOT / "tools"))
import runs  # noqa: E402
import sweep  # noqa: E402

TOOL = ROOT / "tools" / "sweep.py"
# A command that takes a moment: a curve and a score that LR decides; LR=9 fails.
PRETENDER = (
    f"HANG = {HANG_SECONDS}"
    + """
import json, os, sys, time
lr, folder = float(os.environ["LR"]), os.environ["ARTIFACT_DIR"]
open("starts", "a").write(f"{os.environ['LR']} {os.environ.get('SEED')} {os.environ.get('CUDA_VISIBLE_DEVICES')}\\n")
print("warning: MISSPELT=1 has no effect: no knob")
if lr == 9:
    sys.exit("Traceback\\nValueError: nine")
begin = time.time()
for step in range(1, 5):
    with open(folder + "/metrics.jsonl", "a") as file:
        file.write(json.dumps(dict(step=step, train_loss=5 - step + abs(lr - 3))) + "\\n")
    time.sleep(HANG if lr == 7.5 else 0.01)  # the hopeless one waits to be stopped
while len(open("starts").readlines()) < int(os.environ.get("TOGETHER", 0)) and time.time() < begin + HANG:
    time.sleep(0.01)
together = len(open("starts").readlines())
score = abs(lr - 3) + 0.001 * int(os.environ.get("SEED", 0)) if lr != 8 else float("nan")
json.dump(dict(val_bpb=score, steps=4, together=together), open(folder + "/summary.json", "w"))
"""
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with that command."""
    (tmp_path / "pretend.py").write_text(PRETENDER)
    monkeypatch.chdir(tmp_path)
    for name in ("CUDA_VISIBLE_DEVICES", "SEED"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(*arguments, code=0):
    """A sweep in this process: its study.json."""
    assert sweep.main([*map(str, arguments), "--folder", "s", "--", "python", "pretend.py"]) == code
    return study()


def study(folder="s"):
    return json.loads(Path(folder, "study.json").read_text())


def starts():
    """A line for each time that the command was started."""
    return Path("starts").read_text().splitlines()


def states(content):
    return {tuple(t["values"].values()): t["state"] for t in content["trials"]}


def test_a_real_grid_killed_in_the_middle_goes_on_and_records_failures(data, tmp_path):
    """SIGKILL while the second of four runs trains: the first is not run again, the second is, its process is gone."""
    space = [f"DATA_PATH={data},nowhere", "SEED=1,2"]
    command = [sys.executable, str(TOOL), *space, "--folder", "s", "--", "python", str(SCRIPT)]
    values = clean_environment(dict(TINY, ITERATIONS=8, TRAIN_LOG_EVERY=1))
    marked = dict(values, MARK=str(tmp_path))
    first = processes.start(
        command, supervised=False, env=marked, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    log = tmp_path / "s" / "trial-0001" / "out.txt"
    wait_until(lambda: log.is_file() and "step:1/" in log.read_text(), first)
    first.send_signal(signal.SIGKILL)
    first.wait()
    wait_until(lambda: not running_with(f"MARK={tmp_path}"))
    before, cut = snapshot(tmp_path / "s" / "trial-0000"), snapshot(tmp_path / "s" / "trial-0001")
    assert "summary.json" in before and "summary.json" not in cut
    second = run_command(command, env=values, cwd=tmp_path)
    assert second.returncode == 1 and "trial 1: its sweep was killed; it is run again" in second.stdout, second.stderr
    assert snapshot(tmp_path / "s" / "trial-0000") == before and snapshot(tmp_path / "s" / "trial-0001") == cut
    content = study(tmp_path / "s")
    expected = {(str(data), seed): "complete" for seed in "12"} | {("nowhere", seed): "fail" for seed in "12"}
    assert states(content) == expected
    assert content["objective"] == "val_bpb" and len(content["trials"]) == 4
    for t in content["trials"]:
        if t["state"] == "fail":
            assert t["error"].startswith("exit code 2: error: DATA_PATH=nowhere: holds no")
        else:
            summary = json.loads((tmp_path / t["folder"] / "summary.json").read_text())
            assert t["value"] == summary["val_bpb"] and str(summary["seed"]) == t["values"]["SEED"]
    assert f"best: DATA_PATH={data} python" in second.stdout and "deviation" in second.stdout
    assert "4 of 4, best so far: val_bpb" in second.stdout and "with --retry-failed runs them again" in second.stdout
    unchanged = snapshot(tmp_path / "s")
    third = run_command(command, env=values, cwd=tmp_path)
    assert third.stdout.splitlines()[1:] == second.stdout.splitlines()[-len(third.stdout.splitlines()) + 1 :]
    after = snapshot(tmp_path / "s")
    assert {k: v for k, v in after.items() if "study.db" not in k} == {
        k: v for k, v in unchanged.items() if "study.db" not in k
    }


def test_a_failed_run_is_recorded_and_run_again_only_when_asked(place):
    content = run("LR=9,8,3", code=1)
    assert states(content) == {("3",): "complete", ("9",): "fail", ("8",): "fail"}
    errors = {t["values"]["LR"]: t["error"] for t in content["trials"]}
    assert errors == {
        "3": None,
        "9": "exit code 1: ValueError: nine",
        "8": "no finite val_bpb in summary.json or the output",
    }
    assert len(run("LR=9,8,3", code=1)["trials"]) == 3 and len(starts()) == 3
    run("LR=9,8,3", "--retry-failed", code=1)
    assert sorted(line.split()[0] for line in starts()) == ["3", "8", "8", "9", "9"]


def test_a_variable_that_the_command_ignores_fails(place):
    content = run("LR=3", "MISSPELT=1", code=1)
    assert "MISSPELT=1 has no effect" in content["trials"][0]["error"]


def test_runs_stand_side_by_side_each_on_its_gpu(place, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.setenv("TOGETHER", "4")  # none ends before all four have begun
    content = run("LR=4,5,6,7")
    ends = [json.loads(Path(t["folder"], "summary.json").read_text()) for t in content["trials"]]
    assert [end["together"] for end in ends] == [4] * 4  # no clock: each ended only after it saw all four begin
    assert sorted(line.split()[2] for line in starts()) == ["4", "5", "6", "7"]


def test_places(monkeypatch):
    def of(jobs=None, each=1):
        return sweep.slots(type("Options", (), dict(jobs=jobs, gpus_per_run=each)))

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    assert of(each=2) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    assert [p["CUDA_VISIBLE_DEVICES"] for p in of(jobs=6)] == list("012340")
    with pytest.raises(runs.UserError, match="--gpus-per-run 8: 5 GPUs"):
        of(each=8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert of() == [{}] and [list(p) for p in of(jobs=2)] == [["CPU_THREADS"]] * 2


def test_hopeless_runs_are_stopped_early(place):
    content = run("LR=3,3.1,7.5", "--prune", "train_loss", "--prune-startup", 2)
    assert states(content) == {("3",): "complete", ("3.1",): "complete", ("7.5",): "pruned"}
    stopped = content["trials"][-1]
    assert stopped["steps"] < 4 and stopped["value"] is None
    assert not (place / stopped["folder"] / "summary.json").exists()
    assert content["trials"][0]["values"]["LR"] == "3"


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_random_and_tpe_draw_inside_the_range_and_go_on(sampler, place):
    arguments = ("LR=log:0.5..3.2", "N=2..5", "SEED=7,8", "--sampler", sampler, "--jobs", 3, "--sampler-seed", 1)
    assert len(run(*arguments, "--trials", 5)["trials"]) == 5
    content = run(*arguments, "--trials", 7)
    assert len(content["trials"]) == 7 and len({t["values"]["LR"] for t in content["trials"]}) == 7
    for t in content["trials"]:
        assert 0.5 <= float(t["values"]["LR"]) <= 3.2 and t["values"]["N"] in "2345"
        assert t["values"]["SEED"] == "78"[t["trial"] % 2]  # seeds in turn: no sampler chooses the lucky one
        assert t["value"] == pytest.approx(abs(float(t["values"]["LR"]) - 3) + 0.001 * int(t["values"]["SEED"]))


def test_two_machines_on_one_database_share_a_grid(place):
    command = [
        sys.executable,
        str(TOOL),
        "LR=1,2,3,4,5,6",
        "--storage",
        f"sqlite:///{place}/shared.db",
        "--name",
        "one",
    ]
    both = [
        processes.start(
            [*command, "--folder", name, "--", "python", "pretend.py"],
            cwd=place,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in "ab"
    ]
    assert [p.wait(timeout=HANG_SECONDS) for p in both] == [0, 0], [p.stdout.read() for p in both]
    assert sorted(line.split()[0] for line in starts()) == list("123456")
    content = run("LR=1,2,3,4,5,6", "--storage", f"sqlite:///{place}/shared.db", "--name", "one")
    assert len(content["trials"]) == 6 and {t["state"] for t in content["trials"]} == {"complete"}


def test_a_trial_of_a_machine_that_gives_no_sign_is_run_again(place):
    options = sweep.parse(["LR=1,2", "--folder", "s", "--", "python", "pretend.py"])
    other = sweep.Sweep(options)
    lost, working = other.next_trial(), other.next_trial()
    for trial, seen in ((lost, time.time() - 500), (working, time.time())):
        trial.set_user_attr("owner", ["another machine", 1, "1"])
        trial.set_user_attr("seen", seen)
    assert other.next_trial().params == lost.params
    assert [t.number for t in other.trials("RUNNING")] == [working.number, 2]


def test_values():
    assert sweep.read_values("A", "0.02,0.026").grid() == ("0.02", "0.026")
    assert sweep.read_values("A", "1..5:3").grid() == ("1", "3", "5")
    assert sweep.read_values("A", "log:1..100:3").grid() == ("1", "10", "100")
    assert [float(x) for x in sweep.read_values("A", "log:1e-3..1e-1:3").grid()] == pytest.approx([1e-3, 1e-2, 1e-1])
    assert sweep.read_values("A", "-1.5..1.5:2").grid() == ("-1.5", "1.5")
    d = sweep.read_values("A", "log:0.01..0.05").distribution()
    assert (d.low, d.high, d.log) == (0.01, 0.05, True) and sweep.read_values("A", "4..8").distribution().high == 8
    assert sweep.read_values("DATA_PATH", "data/a,data/b").choices == ("data/a", "data/b")
    assert math.isclose(float(sweep.written(0.1 + 0.2)), 0.3)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "VARIABLE=values"),
        (["LR=1"], "-- COMMAND: is needed"),
        (["LR", "--", "x"], "LR: must be a variable"),
        (["LR=", "--", "x"], "LR=: must be a list"),
        (["LR=1,1", "--", "x"], "LR=1,1"),
        (["LR=2..1", "--", "x"], "go up"),
        (["LR=log:0..1", "--trials", "2", "--", "x"], "from above 0"),
        (["LR=1,2..3", "--", "x"], "LR=1,2..3"),
        (["LR=1..2", "--", "x"], "--trials: is needed"),
        (["LR=1..2", "--sampler", "grid", "--", "x"], "LR needs a list"),
        (["LR=1", "LR=2", "--", "x"], "LR: is given twice"),
        (["RUN_ID=a,b", "--", "x"], "RUN_ID"),
        (["LR=1", "--trials", "0", "--", "x"], "--trials: 0"),
        (["LR=1", "--name", "a/b", "--", "x"], "--name a/b"),
        (["LR=1", "--storage", "nothing://x", "--", "x"], "--storage nothing://x"),
        (["LR=1", "--prune", "speed", "--", "x"], "speed"),
    ],
)
def test_what_a_user_can_mend(arguments, words, place, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["sweep.py", *arguments] if "--" in arguments or "LR=1" in arguments else ["sweep.py", "--", "x"]
    )
    code = runs.command_line(sweep.main)
    out, errors = capsys.readouterr()
    assert code == 2 and not out and errors.startswith("error: ") and len(errors.splitlines()) == 1 and words in errors


def test_another_space_in_the_same_study_is_refused(place):
    run("LR=3")
    with pytest.raises(runs.UserError, match="this study sweeps LR with other values"):
        sweep.Sweep(sweep.parse(["LR=4", "--folder", "s", "--name", study()["name"], "--", "python", "pretend.py"]))


def test_a_command_that_cannot_be_started_is_one_line(place):
    done = launch(TOOL, {}, "LR=1", "--folder", "s", "--", "no-such-command", cwd=place)
    assert done.returncode == 2 and done.stderr == "error: no-such-command: No such file or directory\n"


# --------------------------------------------------------------------------------------------- before the first trial


@pytest.fixture
def ours(tmp_path, monkeypatch):
    """A folder to work in, with the settings of a tiny run of the real script."""
    monkeypatch.chdir(tmp_path)
    for name, value in clean_environment(TINY).items():
        monkeypatch.setenv(name, value)
    return tmp_path


def refusal(*arguments):
    with pytest.raises(runs.UserError) as caught:
        sweep.main([*arguments, "--folder", "s", "--", "python", str(SCRIPT)])
    return str(caught.value)


def test_unknown_names_and_refused_values_end_a_sweep_before_it_starts(ours, monkeypatch):
    monkeypatch.setattr(sweep.processes, "start", lambda *_, **__: pytest.fail("nothing may start"))
    assert "MATRIXLR=0.1: no knob of" in refusal("MATRIXLR=0.1,0.2")
    assert refusal("NUM_HEADS=4,3").startswith(
        "trial NUM_HEADS=3: NUM_HEADS=3: must divide MODEL_DIM=32; --skip-refused"
    )
    assert refusal("NUM_HEADS=3..4", "--trials", "2").startswith("trial NUM_HEADS=3: NUM_HEADS=3: must divide")
    monkeypatch.setenv("TTT_NO_SUCH_THING", "1")
    assert "TTT_NO_SUCH_THING=1" in refusal("SEED=1")
    assert [*ours.iterdir()] == []


def test_combinations_that_are_refused_can_be_left_out(ours, monkeypatch):
    options = sweep.parse(["NUM_HEADS=4,3", "SEED=1,2", "--skip-refused", "--folder", "s", "--", "python", str(SCRIPT)])
    options.refused = sweep.dry_run(options, [{}])
    assert options.refused == [dict(NUM_HEADS="3", SEED="1"), dict(NUM_HEADS="3", SEED="2")]
    one = sweep.Sweep(options)
    assert one.total == 2 and [one.next_trial().params["SEED"] for _ in range(2)] == ["1", "2"]
    assert one.next_trial() is None
    assert refusal("NUM_HEADS=3", "--skip-refused") == "--skip-refused: the script refuses every trial"


def test_a_drawn_configuration_that_is_refused_fails_without_a_run(ours, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "CORNERS", 1)
    monkeypatch.setattr(sweep.processes, "start", lambda *_, **__: pytest.fail("nothing may start"))
    arguments = ["NUM_HEADS=4,3", "--sampler", "random", "--trials", "3", "--sampler-seed", "1", "--folder", "s"]
    options = sweep.parse([*arguments, "--", "python", str(SCRIPT)])
    one = sweep.Sweep(options)
    trial = one.study.ask(fixed_distributions=one.distributions)
    while trial.params["NUM_HEADS"] != "3":
        trial = one.study.ask(fixed_distributions=one.distributions)
    assert sweep.refused(one, trial, {}) and "NUM_HEADS=3: refused: NUM_HEADS=3: must divide" in capsys.readouterr().out
    assert one.study.trials[trial.number].state.name == "FAIL"


def test_another_environment_is_another_sweep_and_it_says_so(place, monkeypatch, capsys):
    def names():
        return sorted(path.name for path in Path("logs/sweeps").iterdir())

    command = ["LR=3", "--", "python", "pretend.py"]
    monkeypatch.setenv("TOGETHER", "1")
    assert sweep.main(command) == 0
    (first,) = names()
    assert study(f"logs/sweeps/{first}")["environment"] == dict(TOGETHER="1")
    capsys.readouterr()
    monkeypatch.setenv("TOGETHER", "0")
    assert sweep.main(command) == 0 and len(names()) == 2 and len(starts()) == 2
    assert f"another sweep than logs/sweeps/{first}: TOGETHER=1 there, 0 here\n" in capsys.readouterr().out
    with pytest.raises(runs.UserError, match="this study has another environment: TOGETHER=1 there, 0 here"):
        sweep.main(["LR=3", "--name", first, *command[1:]])
    with pytest.raises(runs.UserError, match="--folder .*: holds another sweep: TOGETHER=1 there, 0 here"):
        sweep.main(["LR=3", "--folder", f"logs/sweeps/{first}", *command[1:]])
    with pytest.raises(runs.UserError, match="another command"):
        monkeypatch.setenv("TOGETHER", "1")
        sweep.main(["LR=3", "--name", first, "--", "python", "pretend.py", "--more"])
    assert len(starts()) == 2


def test_a_preset_file_reaches_each_trial_and_is_part_of_the_sweep(place, monkeypatch):
    (place / "mine.toml").write_text("lr = 9\nseed = 5\n")
    monkeypatch.setenv("PRESET_FILE", "mine.toml")
    content = run("LR=3,4")  # the swept value overrides the file's
    assert {line.split()[1] for line in starts()} == {"5"} and content["environment"] == dict(SEED="5")
    (place / "mine.toml").write_text("seed = 6\n")
    with pytest.raises(runs.UserError, match="holds another sweep: SEED=5 there, 6 here"):
        run("LR=3,4")


# -------------------------------------------------------------------------------------------------- between and after


def test_it_says_how_far_it_is_and_what_matters(place, capsys):
    content = run("LR=1,2,3,9", "SEED=1,2", code=1)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if " of 8" in line]
    assert [line.split(",")[0] for line in lines] == [f"{n} of 8" for n in range(1, 9)]
    assert "best so far: val_bpb 0.001000 (LR=3 SEED=1)" in lines[-1] and "left" in lines[0] and "left" not in lines[-1]
    assert content["importance_by"] == "main effects" and content["importance"]["LR"] > 0.99
    assert "Importance of each variable for val_bpb, by main effects\n" in out
    assert "Trials of " in out and "Means over seeds, best val_bpb first\n" in out
    assert "2 failed; the same command with --retry-failed runs them again\n" in out
    assert (sweep.duration(40), sweep.duration(720), sweep.duration(12600)) == ("40 s", "12 min", "3.5 h")


def test_a_score_can_be_maximized(place, capsys):
    content = run("LR=1,2,3", "--direction", "maximize")
    assert [t["values"]["LR"] for t in content["trials"]] == ["1", "2", "3"] and content["direction"] == "maximize"
    out = capsys.readouterr().out
    assert "best: LR=1 python pretend.py" in out and "3 of 3, best so far: val_bpb 2.000000 (LR=1)" in out
    with pytest.raises(runs.UserError, match="this study is to maximize"):
        sweep.Sweep(sweep.parse(["LR=1,2,3", "--folder", "s", "--name", content["name"], "--", "python", "pretend.py"]))
    with pytest.raises(runs.UserError, match="--direction maximize: --prune"):
        sweep.parse(["LR=1", "--prune", "val_bpb", "--direction", "maximize", "--", "x"])


def test_importance_of_a_search(place):
    content = run("LR=0.5..4.5", "N=2..5", "--sampler", "random", "--trials", 12, "--sampler-seed", 3)
    assert content["importance_by"] == "PED-ANOVA" and set(content["importance"]) == {"LR", "N"}
    assert content["importance"]["LR"] > content["importance"]["N"]


def test_main_effects():
    rows = [dict(values=dict(A=a, B=b), value=float(a) + 0.0 * float(b)) for a in "12" for b in "345"]
    assert sweep.main_effects(["A", "B"], rows) == pytest.approx(dict(A=1.0, B=0.0))


def test_a_locked_database_is_waited_for(place, monkeypatch, capsys):
    """A viewer holds the file; the sweep goes on when it lets go."""
    run("LR=3")
    monkeypatch.setattr(sweep, "LOCK_SECONDS", 0.05)
    options = sweep.parse(["LR=3,4", "--folder", "s", "--name", "two", "--", "python", "pretend.py"])
    one = sweep.Sweep(options)
    viewer = sqlite3.connect("s/study.db", isolation_level=None)
    waits = []

    def let_go(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            viewer.execute("ROLLBACK")

    viewer.execute("BEGIN EXCLUSIVE")
    with monkeypatch.context() as patched:
        patched.setattr(sweep.time, "sleep", let_go)
        trial = one.next_trial()
    assert trial.params == dict(LR="3") and waits == [sweep.LOCK_WAIT] * 2
    assert capsys.readouterr().err == "sqlite:///s/study.db: is locked by another process; waiting\n"
    assert not sweep.is_locked(ValueError("another"))


def test_a_second_sweep_says_that_others_still_run(place, capsys):
    options = sweep.parse(["LR=3", "--folder", "s", "--", "python", "pretend.py"])
    sweep.Sweep(options).next_trial()
    run("LR=3")
    assert "nothing is left to start here, and 1 still runs in another sweep\n" in capsys.readouterr().out
    assert not Path("starts").exists()


def test_a_sweep_is_tracked(place, monkeypatch):
    rows = []

    class Run:
        def log(self, values, step):
            rows.append((step, values))

        def finish(self):
            rows.append("end")

    module = types.SimpleNamespace(init=lambda **options: rows.append(options) or Run())
    monkeypatch.setitem(sys.modules, "trackio", module)
    content = run("LR=3", "--tracker", "trackio")
    assert rows[0] == dict(project=content["name"], name="trial-0000", config=dict(LR="3"))
    assert rows[1:] == [*((n, dict(train_loss=5.0 - n)) for n in range(1, 5)), (4, {"final/val_bpb": 0.0}), "end"]


def kept_by_tensorboard(folder):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(folder / "s" / "tensorboard" / "trial-0000"))
    found.Reload()
    (settings,) = found.Tensors("settings/text_summary")
    scalars = {name: [(e.step, round(e.value, 6)) for e in found.Scalars(name)] for name in found.Tags()["scalars"]}
    return b"| LR | 3 |" in settings.tensor_proto.string_val[0], scalars


def kept_by_trackio(folder):
    (path,) = (folder / "trackio").glob("*.db")
    with contextlib.closing(sqlite3.connect(path)) as data:
        rows = data.execute("select step, metrics from metrics order by id").fetchall()
        ((config,),) = data.execute("select config from configs").fetchall()
    scalars = {}
    for step, text in rows:
        for name, value in json.loads(text).items():
            scalars.setdefault(name, []).append((step, value))
    return json.loads(config)["LR"] == "3", scalars


def kept_by_wandb(folder):
    """What the file of an offline run holds; its records are bytes of no public form."""
    (path,) = (folder / "s" / "wandb").glob("offline-run-*/*.wandb")
    data = path.read_bytes()
    scalars = {"train_loss": [(n, 5.0 - n) for n in range(1, 5)]} if data.count(b"train_loss") >= 4 else {}
    return b"LR" in data, scalars | ({"final/val_bpb": [(4, 0.0)]} if b"final/val_bpb" in data else {})


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "trackio"])
def test_the_trackers_own_packages_get_settings_curves_and_the_final_score(kind, place):
    """Runs with each package that is installed, without a network."""
    pytest.importorskip(kind)
    offline = dict(WANDB_MODE="offline", WANDB_SILENT="true", HF_HUB_OFFLINE="1")
    environment = clean_environment(dict(offline, TRACKIO_DIR=place / "trackio", HOME=place))
    arguments = ["LR=3", "--tracker", kind, "--folder", "s", "--", sys.executable, "pretend.py"]
    done = run_command([sys.executable, str(TOOL), *arguments], env=environment, cwd=place)
    assert done.returncode == 0 and "goes on without it" not in done.stderr, done.stderr
    settings, scalars = globals()[f"kept_by_{kind}"](place)
    assert settings
    assert scalars == {"train_loss": [(n, 5.0 - n) for n in range(1, 5)], "final/val_bpb": [(4, 0.0)]}

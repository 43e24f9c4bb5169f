"""tools/reproduce.py: real runs of several seeds, resumed where they were stopped, and the folder that they make."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from scipy import stats

import processes
from helpers import (
    ROOT,
    TINY,
    clean_environment,
    environment,
    forking,
    launch,
    running_with,
    snapshot,
    wait_until,
    working_folder,
)

sys.path.insert(0, str(ROOT / "tools"))
import publish  # noqa: E402
import reproduce  # noqa: E402
import runs  # noqa: E402
import submission  # noqa: E402

TOOL, CHECK = (ROOT / "tools" / f"{name}.py" for name in ("reproduce", "check_submission"))
FIELDS = [
    "author",
    "github_id",
    "name",
    "blurb",
    "date",
    "track",
    "val_loss",
    "val_bpb",
    "val_loss_std",
    "val_bpb_std",
    "seeds",
    "seed_results",
    "comparison_baseline_bpb",
    "delta_vs_leaderboard_bpb",
    "delta_vs_leaderboard_nats",
    "artifact_bytes_mean",
    "artifact_bytes_max",
    "bytes_total",
    "hardware",
    "pytorch_version",
    "cuda_version",
    "attention_backend",
    "dataset",
    "technique_summary",
    "compliance",
]
SEED_FIELDS = [
    "val_loss",
    "val_bpb",
    "pre_quant_val_bpb",
    "quantized_val_bpb",
    "artifact_bytes",
    "steps",
    "step_avg_ms",
    "train_wallclock_ms",
    "calibration_time_s",
    "eval_time_s",
    "val_tokens",
    "target_tokens",
]
VALUES = {name: value for name, value in TINY.items() if name != "SEED"} | dict(DATA_PATH="shards", ITERATIONS=8)


def content(reproduced):
    return json.loads((reproduced / "out" / "submission.json").read_text())


def summaries(reproduced):
    return {
        seed: json.loads((reproduced / "work" / f"seed{seed}" / "summary.json").read_text()) for seed in (42, 0, 314)
    }


def test_every_figure_is_the_summaries(reproduced):
    s, found = content(reproduced), summaries(reproduced)
    assert set(FIELDS) <= set(s) and s["seeds"] == [42, 0, 314] and list(s["seed_results"]) == ["42", "0", "314"]
    for seed, summary in found.items():
        row = s["seed_results"][str(seed)]
        assert set(SEED_FIELDS) <= set(row)
        assert (row["val_bpb"], row["val_loss"]) == (summary["val_bpb"], summary["val_loss"])
        assert row["pre_quant_val_bpb"] == summary["val_bpb_pre_quant"]
        assert row["quantized_val_bpb"] == summary["val_bpb_quantized"]
        assert (row["artifact_bytes"], row["steps"]) == (summary["artifact_bytes"], 8)
        assert row["train_wallclock_ms"] == pytest.approx(1000 * summary["train_seconds"], abs=1)
        assert row["step_avg_ms"] == pytest.approx(125 * summary["train_seconds"], abs=0.01)
        assert row["eval_time_s"] == pytest.approx(sum(summary["seconds"][x] for x in ("unpack", "evaluate")), abs=0.01)
        assert row["target_tokens"] == summary["val_tokens"] == row["val_tokens"] - 1
        assert row["code_bytes"] == (reproduced / "out" / "train_gpt.py").stat().st_size
    bpb = [summary["val_bpb"] for summary in found.values()]
    assert s["val_bpb"] == pytest.approx(sum(bpb) / 3) and len(set(bpb)) == 3
    assert s["val_bpb_std"] == pytest.approx(math.sqrt(sum((x - s["val_bpb"]) ** 2 for x in bpb) / 2))
    sizes = [summary["artifact_bytes"] for summary in found.values()]
    assert (s["artifact_bytes_max"], s["bytes_total"]) == (max(sizes), max(sizes))
    assert s["artifact_bytes_mean"] == pytest.approx(sum(sizes) / 3)


def test_it_says_what_it_ran_on(reproduced):
    s = content(reproduced)
    assert "core" in s["hardware"] and s["hardware"] in s["track"] and s["track"].startswith("non-record")
    assert "shards" in s["dataset"] and "40 documents" in s["dataset"] and s["attention_backend"] == "blocked"
    assert s["author"] == "A. Author" and s["cuda_version"] == "none" and s["compliance"]["three_seeds"]
    assert s["compliance"]["no_validation_document_in_training"] is s["compliance"]["strictly_causal"] is True
    assert {row["strictly_causal"] for row in s["seed_results"].values()} == {True}
    assert {row["shared_documents"] for row in s["seed_results"].values()} == {0}


def test_the_comparison_is_scipys(reproduced):
    s = content(reproduced)
    row = next(iter(s["seed_results"].values()))
    nats = math.log(2) * row["val_bytes"] / row["target_tokens"]
    ours, theirs = [
        [x * nats for x in xs] for xs in ([r["val_bpb"] for r in s["seed_results"].values()], [3.3, 3.301, 3.302])
    ]
    assert [r["val_loss"] for r in s["seed_results"].values()] == pytest.approx(ours)  # so nats are nats a token
    assert s["comparison_baseline_bpb"] == pytest.approx(3.301)
    assert s["delta_vs_leaderboard_bpb"] == pytest.approx(s["val_bpb"] - 3.301)
    assert s["delta_vs_leaderboard_nats"] == pytest.approx(sum(ours) / 3 - sum(theirs) / 3)
    t = s["significance"]
    for name, margin in (("p_value", 0), ("p_value_margin", 0.005)):
        expected = stats.ttest_ind(ours, [x - margin for x in theirs], equal_var=False, alternative="less").pvalue
        assert t[name] == pytest.approx(expected)
    assert t["holds"] is s["compliance"]["record_rule"] is bool(t["p_value_margin"] < 0.01 and t["gain_nats"] > 0.005)


def test_the_folder_holds_the_page_the_script_and_the_logs(reproduced):
    out, s = reproduced / "out", content(reproduced)
    kinds = (
        "train_seed{}.log",
        "metrics_seed{}.jsonl",
        "summary_seed{}.json",
        "config_seed{}.json",
        "model_seed{}.pgolf",
    )
    assert {p.name for p in out.iterdir()} == {"README.md", "submission.json", "train_gpt.py", "requirements.txt"} | {
        kind.format(seed) for kind in kinds for seed in (42, 0, 314)
    }
    assert (out / "train_gpt.py").read_bytes().startswith(b"#coding:l1 packed")
    page = (out / "README.md").read_text()
    assert "$" not in page.replace("SEED=$seed", "") and f"{s['val_bpb']:.6f}" in page
    for row in s["seed_results"].values():
        assert f"{row['val_bpb']:.6f}" in page and str(row["artifact_bytes"]) in page
    assert "| `ITERATIONS` " in page and "DATA_PATH=shards" in page and "3.301000" in page
    assert page.count("\n| 42 ") == 1 and s["dataset"] in page and s["track"] in page


def test_the_command_on_the_page_gives_the_same_score(reproduced, tmp_path):
    """Seed 0 of it, in the submission's own folder and with its own script."""
    page = (reproduced / "out" / "README.md").read_text()
    words = re.search(r"^    (.*) SEED=\$seed (torchrun .*)$", page, re.M)
    shutil.copytree(reproduced / "out", tmp_path / "out")
    shutil.copytree(reproduced / "shards", tmp_path / "out" / "shards")
    values = dict(word.split("=", 1) for word in words[1].split())
    done = launch(tmp_path / "out" / "train_gpt.py", dict(values, SEED=0, RUN_ID="again"), cwd=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "out" / "logs" / "again" / "summary.json").read_text())
    assert again["val_bpb"] == content(reproduced)["seed_results"]["0"]["val_bpb"]


def test_killed_in_the_middle_it_goes_on_with_what_is_left(reproduced, tmp_path, capsys):
    """SIGKILL while the second of three seeds trains: its run ends too, and the next command goes on with that seed."""
    for name in ("shards", "work"):
        shutil.copytree(reproduced / name, tmp_path / name)
    for seed in (0, 314):
        shutil.rmtree(tmp_path / "work" / f"seed{seed}")
    shutil.copy(reproduced / "baseline.json", tmp_path)
    command = [
        sys.executable,
        str(TOOL),
        "--work",
        "work",
        "--out",
        "out",
        "--with-artifacts",
        "--author",
        "A. Author",
        "--baseline",
        "baseline.json",
        "--script",
        str(reproduced / "out" / "train_gpt.py"),
    ]
    values = clean_environment(VALUES)
    mark = f"MARK={tmp_path}"
    first = processes.start(
        command, supervised=False, env=dict(values, MARK=str(tmp_path)), cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    lines = []
    for line in first.stdout:
        lines.append(line)
        if line.startswith("step:2/"):
            break
    first.send_signal(signal.SIGKILL)
    first.wait()
    started = [line for line in lines if line.startswith("seed ")]
    assert [line.split(":")[0] for line in started] == ["seed 42", "seed 0"] and "done before" in started[0]
    wait_until(lambda: not running_with(mark))  # its torchrun and its rank do not outlive it
    with environment(VALUES), working_folder(tmp_path), forking():
        assert reproduce.main(command[2:]) == 0
    said = capsys.readouterr().out
    assert "seed 42: done before" in said and "seed 0: work/seed0, goes on where it was stopped\n" in said
    assert not [*(tmp_path / "work").glob("*.stopped*")] and "seed 314: work/seed314\n" in said
    note = "Seed 0 was cut off and resumed."
    assert note in said and (tmp_path / "out" / "README.md").read_text().count(note) == 1
    rows = content(tmp_path)["seed_results"]
    assert [row.get("resumed") for row in rows.values()] == [None, 1, None]
    assert "seed 0: its run was cut off and went on, 1 times" in launch(CHECK, {}, str(tmp_path / "out")).stdout
    ours, theirs = (json.loads((folder / "out" / "submission.json").read_text()) for folder in (tmp_path, reproduced))
    timeless = ("val_loss", "val_bpb", "val_bpb_std", "seeds", "artifact_bytes_mean", "delta_vs_leaderboard_nats")
    assert {name: ours[name] for name in timeless} == {name: theirs[name] for name in timeless}


def test_what_nothing_goes_on_from_is_set_aside(tmp_path):
    """A run that was killed before its journal began; and one that has a summary, but was still writing its log."""
    seed = tmp_path / "seed5"
    (seed / "checkpoint").mkdir(parents=True)
    assert not reproduce.goes_on(seed) and not reproduce.complete(seed, 5)
    (seed / "summary.json").write_text("{}")
    (seed / "checkpoint" / "run.json").write_text("{}")
    assert reproduce.goes_on(seed) and not reproduce.complete(seed, 5)


def test_a_folder_that_is_there_is_not_written_over(reproduced, tmp_path):
    results = [submission.finished(0, reproduced / "work" / "seed0")]
    out, script = tmp_path / "a" / "out", reproduced / "out" / "train_gpt.py"
    assert submission.write_folder(out, script, results, dict(x=1), "page", False)
    before = snapshot(tmp_path)
    assert not submission.write_folder(out, script, results, dict(x=1), "page", False)
    with pytest.raises(runs.UserError, match="already holds something else"):
        submission.write_folder(out, script, results, dict(x=2), "page", False)
    assert snapshot(tmp_path) == before  # and nothing temporary is left


def test_a_run_that_fails_ends_it_with_that_runs_line(reproduced, tmp_path, monkeypatch, capsys):
    arguments = ["--seeds", "5", "--work", "work", "--script", str(reproduced / "out" / "train_gpt.py")]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    with environment(dict(VALUES, DATA_PATH="nowhere")), working_folder(tmp_path), forking():
        assert runs.command_line(reproduce.main) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: seed 5 failed: DATA_PATH=nowhere: holds no")
    assert len(errors.splitlines()) == 1 and not (tmp_path / "submissions").exists()


def test_baselines_of_every_kind(reproduced, tmp_path):
    expected = {seed: row["val_bpb"] for seed, row in content(reproduced)["seed_results"].items()}
    for path in (reproduced / "out", reproduced / "out" / "submission.json", reproduced / "work"):
        assert submission.baseline_figures(path) == expected
    (tmp_path / "plain.json").write_text('{"1": 1.5, "2": 1.25}')
    assert submission.baseline_figures(tmp_path / "plain.json") == {"1": 1.5, "2": 1.25}


def test_statistics_at_their_edges():
    assert runs.mean_and_deviation([1.0]) == (1.0, None) and runs.mean_and_deviation([1, 3]) == (2, math.sqrt(2))
    assert runs.welch([1.0], [2.0, 3.0]) is None
    assert (runs.welch([1.0, 1.0], [2.0, 2.0]), runs.welch([2.0, 2.0], [2.0, 2.0])) == (0.0, 1.0)
    test = submission.significance([1.0, 1.001, 1.002], [1.001, 1.002, 1.003], 1.0)
    assert test["p_value"] < 0.5 < test["p_value_margin"] and test["holds"] is False


def test_the_record_track_is_for_the_challenges_hardware_time_and_text():
    def of(hardware, seconds, documents):
        run = runs.Run("r", "r", hardware=hardware, train_seconds=seconds)
        return submission.track([submission.Finished(1, None, run, {})], dict(documents=documents, text="FineWeb; x"))

    assert of("8 x NVIDIA H100 80GB HBM3", 600.02, 50000) == "10min_16mb"
    for case in (
        ("1 x NVIDIA H100 80GB HBM3", 599, 50000),
        ("8 x NVIDIA H100 80GB HBM3", 1200, 50000),
        ("8 x NVIDIA H100 80GB HBM3", 599, 514),
    ):
        assert of(*case).startswith("non-record: " + case[0])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--seeds", "1,1"], "1,1: must be different"),
        (["--seeds", "a"], "a: must be"),
        (["MATRIX_LR"], "MATRIX_LR: must"),
        (["SEED=3"], "SEED=3: --seeds sets this"),
        (["MODE=eval"], "MODE=eval"),
        (["--nproc", "0"], "--nproc: 0"),
        (["--baseline", "none.json"], "none.json: there is no such"),
        (["--script", "none.py"], "none.py"),
        (["--script", "words.txt"], "words.txt: is not a Python script"),
        (["--baseline", "words.txt"], "words.txt: must"),
        (["MATRIX_LR=big"], "MATRIX_LR=big: must be a finite number"),
        (["VAL_TOKEN_LIMIT=9"], "VAL_TOKEN_LIMIT=9: a score of some targets"),
        (["--preset", "huge"], "PRESET=huge"),
        (["TRAIN_BATCH_TOKENS=96", "--nproc", "2"], "2 ranks do not divide"),
        (["--work", "full"], "full: is not empty"),
        (["--template", "template"], "none of"),
    ],
)
def test_what_a_user_can_mend(arguments, words, tmp_path, monkeypatch, capsys, reproduced):
    monkeypatch.chdir(tmp_path)
    for name, value in clean_environment(VALUES).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "words.txt").write_text("these are words\n")
    (tmp_path / "template").write_text("$nothing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    if "template" in arguments:
        results = [submission.finished(0, reproduced / "work" / "seed0")]
        s = submission.submission(results, {}, submission.dataset(reproduced / "shards"), None)
        with pytest.raises(runs.UserError, match=words):
            submission.readme(s, results[0].config, {}, "", tmp_path / "template")
        return
    before = snapshot(tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    monkeypatch.setattr(reproduce, "ranks_here", lambda: 1)
    if "full" in arguments:
        monkeypatch.setattr(reproduce, "make_plan", lambda options: (dict(config=dict(preset="p")), b""))
    with forking():
        code = runs.command_line(reproduce.main)
    out, errors = capsys.readouterr()
    assert code == 2 and errors.startswith("error: ") and len(errors.splitlines()) == 1 and words in errors, errors
    assert snapshot(tmp_path) == before and os.getcwd() == str(tmp_path)


def test_other_settings_or_another_script_are_not_mixed(tmp_path):
    plan = dict(script_sha256="a", ranks=1, config=dict(matrix_lr=0.1))
    reproduce.prepare_work(tmp_path / "work", plan, b"x")
    reproduce.prepare_work(tmp_path / "work", plan, b"x")
    for other, name in (
        (dict(plan, config=dict(matrix_lr=0.2)), "MATRIX_LR"),
        (dict(plan, ranks=2), "ranks"),
        (dict(plan, script_sha256="b"), "script_sha256"),
    ):
        with pytest.raises(runs.UserError, match=name):
            reproduce.prepare_work(tmp_path / "work", other, b"y")
    assert (tmp_path / "work" / "train_gpt.py").read_bytes() == b"x"


# -------------------------------------------------------------------------------------------------------------- publish


def published(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_submission_is_shown_at_the_root(reproduced, tmp_path):
    """Its JSON and logs are copied, those of the one before go, a user's runs stay; pictures are drawn."""
    (tmp_path / "logs" / "mine").mkdir(parents=True)
    (tmp_path / "logs" / "mine" / "log.txt").write_text("a run")
    (tmp_path / "logs" / "train_seed7.log").write_text("of the submission before")
    arguments = [str(reproduced / "out"), "--root", str(tmp_path)]
    assert publish.main(arguments) == 0
    files, out = published(tmp_path), reproduced / "out"
    logs = {f"logs/{p.name}" for seed in (42, 0, 314) for p in out.glob(f"*_seed{seed}.*") if p.suffix != ".pgolf"}
    assert (
        set(files)
        == logs | {"submission.json", "logs/mine/log.txt", "docs/loss.png", "docs/stages.png", "docs/bytes.png"}
        and len(logs) == 12
    )
    assert all(files[name] == (out / name.removeprefix("logs/")).read_bytes() for name in logs | {"submission.json"})
    assert all(files[f"docs/{name}.png"].startswith(b"\x89PNG") for name in ("loss", "stages", "bytes"))
    assert publish.main(arguments) == 0 and published(tmp_path) == files


def test_a_submission_with_a_disagreement_is_not_shown(reproduced, tmp_path, capsys):
    shutil.copytree(reproduced / "out", tmp_path / "out")
    file = tmp_path / "out" / "submission.json"
    s = json.loads(file.read_text())
    file.write_text(json.dumps(s | {"val_bpb": s["val_bpb"] - 0.01}))
    (tmp_path / "root").mkdir()
    with pytest.raises(runs.UserError, match="has disagreements, and is not published"):
        publish.main([str(tmp_path / "out"), "--root", str(tmp_path / "root")])
    assert "error: submission.json: val_bpb" in capsys.readouterr().out and not published(tmp_path / "root")


def test_another_script_is_noticed(reproduced, tmp_path):
    shutil.copytree(reproduced / "out", tmp_path / "out")
    script = tmp_path / "out" / "train_gpt.py"
    script.write_bytes(script.read_bytes()[:-1] + b" ")
    done = launch(ROOT / "tools" / "check_submission.py", {}, str(tmp_path / "out"))
    assert done.returncode == 1 and "error: train_gpt.py: is not the script that ran" in done.stdout


def over(seconds=600.0, calibrate=0.0, evaluation=600.0, size=16_000_000):
    run = runs.Run("run", "log.txt", train_seconds=seconds, eval_seconds=evaluation, artifact_bytes=size, steps=1000)
    run.seconds = {"train": seconds, "calibrate": calibrate}  # a step takes 0.6 s
    return submission.over_limits(submission.Finished(0, ROOT, run, {}))


def test_a_seed_over_a_limit_is_named_when_it_ends(reproduced):
    assert over() == over(600.5) == over(597.0, 3.1) == []
    assert over(597.2, 5.8) == ["603.0 s of training, calibration and tuning are over 600"]
    assert over(evaluation=601.0) == ["601.0 s of evaluation are over 600"]
    assert over(size=16_000_001) == ["the artifact of 16000001 bytes is over 16000000"]
    row = content(reproduced)["seed_results"]["42"] | dict(train_wallclock_ms=597_200, step_avg_ms=260.0)
    assert row["calibration_time_s"] == pytest.approx(summaries(reproduced)[42]["seconds"]["calibrate"], abs=1e-3)
    for seconds, within in ((3.0, True), (5.8, False), (None, True)):
        found = submission.compliance([row | dict(calibration_time_s=seconds)], None)
        assert found["train_within_600s"] is within


def test_the_score_after_ttt_is_kept_where_hints_follow():
    def stages(*names):
        return runs.Run(
            "run", "log.txt", stages={name: runs.Stage(None, len(names[: i + 1])) for i, name in enumerate(names)}
        )

    assert runs.before_hints(stages("quantized", "ttt")) == {}
    assert runs.before_hints(stages("quantized", "hint")) == {"ttt_val_bpb": None}
    assert runs.before_hints(stages("quantized", "ttt", "hint")) == {"ttt_val_bpb": 2}
    row = dict.fromkeys(SEED_FIELDS, 1)
    for before, columns in ((None, 10), (1.25, 11)):
        content = dict(seed_results={"42": row | dict(ttt_val_bpb=before)}, val_bpb=1.0, val_loss=2.0)
        table = submission.seed_table(content | dict(val_bpb_std=None, val_loss_std=None)).splitlines()
        assert {line.count("|") - 1 for line in table if line} == {columns}
        assert ("1.250000" in table[2]) == bool(before)

"""tools/check_submission.py: our own folder passes, every planted inconsistency is named, others' folders are read."""

import json
import re
import shutil
import sys

import pytest

from helpers import ROOT, launch, snapshot

sys.path.insert(0, str(ROOT / "tools"))
import check_submission  # noqa: E402
import docs  # noqa: E402
import run_submission  # noqa: E402
import runs  # noqa: E402

TOOL = ROOT / "tools" / "check_submission.py"


@pytest.fixture
def folder(reproduced, tmp_path):
    """A copy to spoil."""
    shutil.copytree(reproduced / "out", tmp_path / "out")
    return tmp_path / "out"


def check(folder, capsys, *arguments):
    """(exit code, errors, notes)."""
    code = check_submission.main([str(folder), *map(str, arguments)])
    lines = capsys.readouterr().out.splitlines()
    errors, warnings, notes = ([x for x in lines if x.startswith(f"{s}: ")] for s in check_submission.SEVERITIES)
    assert lines[:-1] == errors + warnings + notes, "one line each, the worst first"
    compared, *counts = map(
        int, re.fullmatch(r"(\d+) comparisons, (\d+) errors, (\d+) warnings, (\d+) notes", lines[-1]).groups()
    )
    assert compared > 0 and all(n >= len(found) for n, found in zip(counts, (errors, warnings, notes), strict=True))
    assert code == (1 if errors else 3 if warnings else 0)
    return code, "\n".join(errors), "\n".join([*warnings, *notes])


def test_our_own_folder_passes_and_nothing_is_left_unchecked(reproduced, capsys):
    before = snapshot(reproduced)
    code, errors, notes = check(
        reproduced / "out", capsys, "--run", "--data", reproduced / "shards", "--baseline", reproduced / "baseline.json"
    )
    assert code == 0, errors
    assert notes.count("note: ") == 2 and "significance: better by" in notes  # the verdict, and what was loaded
    assert notes.count(".pgolf ") == 3 and "artifacts: loaded, as the script says" in notes
    assert snapshot(reproduced) == before


@pytest.mark.parametrize("stage", ["pre_quant_val_bpb", "artifact_bytes"])
def test_a_pages_means_and_deviations_are_recomputed(stage, folder, capsys):
    """The results that tools/docs.py writes into a page pass, and another mean in them is found."""
    content = json.loads((folder / "submission.json").read_text())
    (folder / "README.md").write_text(f"# A project\n\n{docs.BEGIN}\n{docs.results(content)}\n{docs.END}\n")
    code, errors, _ = check(folder, capsys)
    assert code == 0, errors
    column = next(c for c in docs.COLUMNS if c.key == stage)
    mean, _ = runs.mean_and_deviation(row[stage] for row in content["seed_results"].values())
    wrong = format(mean * 1.1, column.form)
    edit(folder / "README.md", f"{format(mean, column.form)} ±", f"{wrong} ±")
    code, errors, _ = check(folder, capsys)
    assert code == 1 and f"README.md: {wrong} is in no other file" in errors


# ---------------------------------------------------------------------------------------------- planted inconsistencies


def edit(path, old, new, count=1):
    text = path.read_text()
    assert old in text, old
    path.write_text(text.replace(old, new, count))


def in_json(change):
    """A plant that changes submission.json."""

    def plant(folder):
        content = json.loads((folder / "submission.json").read_text())
        change(content)
        (folder / "submission.json").write_text(json.dumps(content))

    return plant


def row(key, value):
    """A plant: a figure of seed 0, in submission.json alone."""

    def change(s):
        r = s["seed_results"]["0"]
        r[key] = value(r[key]) if callable(value) else value

    return in_json(change)


def field(key, value):
    def change(s):
        s[key] = value(s[key]) if callable(value) else value

    return in_json(change)


def page_cell(column, delta):
    """A plant: a cell of seed 42's row in README.md."""

    def plant(folder):
        line = re.search(r"^\| 42 .*$", (folder / "README.md").read_text(), re.M)[0]
        cells = line.split("|")
        cells[column] = f" {type(delta)(float(cells[column])) + delta} "
        edit(folder / "README.md", line, "|".join(cells))

    return plant


def swap(one, other):
    def plant(folder):
        a, b = (folder / one).read_bytes(), (folder / other).read_bytes()
        (folder / one).write_bytes(b)
        (folder / other).write_bytes(a)

    return plant


def log_edit(pattern, new):
    def plant(folder):
        path = folder / "train_seed0.log"
        text, count = re.subn(pattern, new, path.read_text(), count=1, flags=re.M)
        assert count
        path.write_text(text)

    return plant


def over_budget(s):
    for r in s["seed_results"].values():
        r["eval_time_s"] = 601.0


def population(s):
    values = [r["val_bpb"] for r in s["seed_results"].values()]
    s["val_bpb_std"] = (sum((x - s["val_bpb"]) ** 2 for x in values) / len(values)) ** 0.5


PLANTS = {
    "no page": (lambda f: (f / "README.md").unlink(), "README.md: is missing"),
    "no script": (lambda f: (f / "train_gpt.py").unlink(), "train_gpt.py: is missing"),
    "no json": (lambda f: (f / "submission.json").unlink(), "submission.json: is missing"),
    "broken json": (lambda f: (f / "submission.json").write_text("{"), "is not JSON"),
    "no requirements": (lambda f: (f / "requirements.txt").unlink(), "requirements.txt: is missing"),
    "a log less": (lambda f: (f / "train_seed314.log").unlink(), "seed 314: submission.json has it, and no log"),
    "no logs": (lambda f: [p.unlink() for p in f.glob("*.log")], "there is no log of a run"),
    "a log more": (
        lambda f: (f / "train_seed9.log").write_text((f / "train_seed0.log").read_text() + "\n"),
        "seed 9: a log has it, and seed_results does not",
    ),
    "one log twice": (lambda f: shutil.copy(f / "train_seed0.log", f / "train_seed42.log"), "are the same file"),
    "swapped logs": (swap("train_seed0.log", "train_seed42.log"), "seed 0: val_bpb in submission.json and log"),
    "swapped summaries": (swap("summary_seed0.json", "summary_seed42.json"), "seed 0: the summary says seed: 42 and 0"),
    "a field less": (in_json(lambda s: s.pop("hardware")), "has no hardware"),
    "seeds not distinct": (field("seeds", [42, 42, 314]), "are not distinct"),
    "other seeds": (field("seeds", [42, 0, 1]), "seeds [42, 0, 1] and seed_results"),
    "the same score twice": (
        in_json(lambda s: s["seed_results"]["0"].update(val_bpb=s["seed_results"]["42"]["val_bpb"])),
        "2 seeds have the same val_bpb",
    ),
    "another setting": (
        lambda f: edit(f / "config_seed0.json", '"matrix_lr": 0.03', '"matrix_lr": 0.04'),
        "MATRIX_LR is 0.03 on seed 42 and 0.04 on 0",
    ),
    "another machine": (lambda f: edit(f / "summary_seed0.json", "core", "kernel"), "hardware differs"),
    "bpb in json": (row("val_bpb", lambda x: x - 0.0002), "seed 0: val_bpb in submission.json and summary"),
    "loss in json": (row("val_loss", lambda x: x - 0.0002), "seed 0: val_loss in submission.json and summary"),
    "pre-quant in json": (row("pre_quant_val_bpb", lambda x: x - 0.001), "seed 0: pre_quant_val_bpb in sub"),
    "quantized in json": (row("quantized_val_bpb", 1.0), "seed 0: quantized_val_bpb in submission.json"),
    "bytes in json": (row("artifact_bytes", lambda x: x - 1), "code_bytes + model_bytes and artifact_bytes"),
    "steps in json": (row("steps", 9), "seed 0: steps in submission.json and log: 9 and 8"),
    "step time": (row("step_avg_ms", lambda x: x * 2), "steps x step_avg_ms and train_wallclock_ms"),
    "train time": (row("train_wallclock_ms", lambda x: x + 5), "train_wallclock_ms in submission.json and log"),
    "calibration time": (row("calibration_time_s", lambda x: x + 2), "calibration_time_s"),
    "eval time": (row("eval_time_s", lambda x: x + 2), "eval_time_s"),
    "val bytes": (row("val_bytes", lambda x: x + 90), "val_bpb, and val_loss in bits per byte"),
    "a token dropped": (row("target_tokens", lambda x: x - 1), "is not one less than val_tokens"),
    "another validation set": (row("val_tokens", lambda x: x - 1), "are not one validation set's"),
    "log's score": (log_edit(r"^quantized val_loss:\d", "quantized val_loss:1"), "val_loss in submission.json and log"),
    "log's curve": (log_edit(r"^step:4/8 train_loss:\d", "step:4/8 train_loss:1"), "step 4 in log and metrics"),
    "log's steps": (log_edit(r"^step:4/8 .*\n", ""), "log and metrics have other steps"),
    "log's bytes": (log_edit(r"^artifact +(?=\d)", "artifact 9"), "artifact_bytes in submission.json and log"),
    "shared documents": (
        log_edit(r"^audit: 0 validation", "warning: audit: 3 validation"),
        "shared_documents in submission.json and log",
    ),
    "strictly causal": (
        log_edit(r"strictly causal: yes", "strictly causal: no"),
        "strictly_causal in submission.json and log",
    ),
    "log's targets": (log_edit(r"back; \d", "back; 9"), "target_tokens in submission.json and log"),
    "metrics": (
        lambda f: edit(
            f / "metrics_seed0.jsonl", '"stage": "quantized", "val_loss": ', '"stage": "quantized", "val_loss": 1'
        ),
        "val_loss in metrics and summary",
    ),
    "mean": (field("val_bpb", lambda x: x + 0.0002), "val_bpb and the seeds' mean"),
    "mean loss": (field("val_loss", lambda x: x + 0.0002), "val_loss and the seeds' mean"),
    "deviation": (field("val_bpb_std", lambda x: x + 0.0002), "val_bpb_std"),
    "the population's deviation": (in_json(population), "(it is the population's)"),
    "largest": (field("artifact_bytes_max", lambda x: x - 1), "artifact_bytes_max and the largest"),
    "mean bytes": (field("artifact_bytes_mean", lambda x: x - 1), "artifact_bytes_mean and the mean"),
    "total": (field("bytes_total", lambda x: x - 1), "bytes_total"),
    "baseline": (field("comparison_baseline_bpb", lambda x: x + 0.001), "comparison_baseline_bpb"),
    "delta": (field("delta_vs_leaderboard_bpb", lambda x: x - 0.001), "delta_vs_leaderboard_bpb"),
    "delta in nats": (field("delta_vs_leaderboard_nats", lambda x: x - 0.001), "delta_vs_leaderboard_nats"),
    "p-value": (in_json(lambda s: s["significance"].update(p_value_margin=0.5)), "significance p_value_margin 0.5"),
    "verdict": (
        in_json(lambda s: s["significance"].update(holds=not s["significance"]["holds"])),
        "significance holds",
    ),
    "compliance": (in_json(lambda s: s["compliance"].update(three_seeds=False)), "compliance three_seeds is False"),
    "hardware": (field("hardware", "8 x NVIDIA H100"), "hardware '8 x NVIDIA H100', and the log of seed 42 says"),
    "track": (field("track", "10min_16mb"), "is for 8 H100s"),
    "versions": (field("pytorch_version", "2.0"), "pytorch_version '2.0'"),
    "attention": (field("attention_backend", "fa3"), "attention_backend 'fa3'"),
    "budget": (in_json(over_budget), "601.0 s of evaluation are over 600"),
    "page's bpb": (page_cell(2, 0.0001), "README.md: seed 42, val_bpb"),
    "page's loss": (page_cell(3, 0.0001), "README.md: seed 42, val_loss"),
    "page's bytes": (page_cell(6, 1), "README.md: seed 42, artifact bytes"),
    "page's steps": (page_cell(7, 100), "README.md: seed 42, steps"),
    "page's seed": (lambda f: edit(f / "README.md", "\n| 42 ", "\n| 43 "), "row of seed 43"),
    "page's mean": (lambda f: edit(f / "README.md", "| **mean** |", "| **mean** | 1.2345 |"), "1.2345 is in no other"),
    "page's baseline": (lambda f: edit(f / "README.md", "mean val_bpb 3.301000", "mean val_bpb 3.401000"), "3.401000"),
    "script": (lambda f: (f / "train_gpt.py").write_text("def :\n"), "does not compile"),
    "script's size": (lambda f: (f / "train_gpt.py").write_text("x = 1\n"), "has 6 bytes, and the runs counted"),
    "artifact's size": (lambda f: (f / "model_seed0.pgolf").write_bytes(b"x"), "model_seed0.pgolf: its bytes"),
}


@pytest.mark.parametrize("name", PLANTS)
def test_what_is_planted_is_found_and_named(name, folder, capsys):
    plant, words = PLANTS[name]
    plant(folder)
    code, errors, _ = check(folder, capsys)
    assert code == 1 and words in errors, errors


def test_limits_data_and_baseline_from_outside(folder, reproduced, capsys, tmp_path):
    _, errors, _ = check(folder, capsys, "--cap", 20000)
    assert re.search(r"seed 42: its artifact of \d+ bytes is over 20000", errors)
    shutil.copytree(reproduced / "shards", tmp_path / "less")
    (tmp_path / "less" / "fineweb_val_000001.bin").unlink()
    _, errors, _ = check(folder, capsys, "--data", tmp_path / "less")
    assert re.search(r"val_tokens: \d+, and the validation set in .*less has \d+", errors)
    (tmp_path / "b.json").write_text('{"1": 3.0, "2": 3.1}')
    _, errors, _ = check(folder, capsys, "--baseline", tmp_path / "b.json")
    assert "baseline's figures are not those of --baseline" in errors and "significance p_value" in errors


def test_training_over_its_time_is_found(folder, capsys):
    """600 s and the step that began before they were over; calibration after it counts too."""
    path = folder / "summary_seed0.json"
    s = json.loads(path.read_text())
    for seconds, calibrate, found in ((600.01, 0, False), (601.5, 0, True), (599, 3, True)):
        path.write_text(
            json.dumps(dict(s, steps=1000, train_seconds=seconds, seconds=dict(s["seconds"], calibrate=calibrate)))
        )
        assert ("of training, calibration and tuning are over 600" in check(folder, capsys)[1]) is found


def test_a_damaged_artifact_does_not_load(folder, capsys):
    path = folder / "model_seed0.pgolf"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(bytes(content))
    assert check(folder, capsys)[0] == 0  # nothing is run, so nothing is seen
    code, errors, _ = check(folder, capsys, "--run")
    assert code == 1 and errors.startswith("error: model_seed0.pgolf: the script does not load it: artifact:")


def test_a_rerun_gives_the_same_score_and_another_score_is_found(folder, reproduced, capsys):
    code, errors, notes = check(
        folder, capsys, "--run", "--rerun", 42, "--data", reproduced / "shards", "--tolerance", 1e-9
    )
    assert code == 0 and "rerun: seed 42 val_bpb" in notes, errors
    again = check_submission.Findings()
    seed = check_submission.read_folder(folder, again).seeds[42]
    other = runs.read_runs(reproduced / "work" / "seed0")[0]
    run_submission.compare_rerun(seed, other, again, 1e-9)
    assert re.search(r"rerun: seed 42 gives val_bpb \S+, and the folder says", again.errors[0])


# ------------------------------------------------------------------------------------------------- other people's runs

LOG = """import torch
print(f"step:{step}/{total} val_loss:{x:.4f}")
====================================================================================================
Hyperparameters:
  matrix_lr: 0.04
  num_layers: 11
  run_id: r{seed}
  seed: {seed}
val_tokens: 47851520
step:1000/20000 train_loss:2.5000 train_time:60000ms step_avg:60.00ms
step:9000/20000 val_loss:2.1000 val_bpb:1.2437 train_time:540000ms step_avg:60.00ms
stopping_early: wallclock_cap train_time:599980ms step:9999/20000
Code size: 47642 bytes
Total submission size: 67272625 bytes
Total submission size int8+zlib: {size} bytes
final_int8_zlib_roundtrip val_loss:{loss:.4f} val_bpb:{bpb:.4f} eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:{loss:.8f} val_bpb:{bpb:.8f}
"""


@pytest.fixture
def peers(tmp_path):
    """A folder as other people make them: other fields, rounded figures, a page by hand."""
    rows, page = {}, "# A record\n\n| Seed | val_bpb | Artifact |\n|--|--|--|\n"
    for seed, bpb in ((42, 1.22760000), (0, 1.22811111), (314, 1.22722222)):
        log = (
            LOG.replace("{seed}", str(seed))
            .replace("{size}", str(15863489 + seed))
            .replace("{loss:.4f}", f"{bpb * 1.69:.4f}")
            .replace("{bpb:.4f}", f"{bpb:.4f}")
            .replace("{loss:.8f}", f"{bpb * 1.69:.8f}")
            .replace("{bpb:.8f}", f"{bpb:.8f}")
        )
        (tmp_path / f"train_seed{seed}.log").write_text(log)
        rows[str(seed)] = dict(val_bpb=round(bpb, 6), artifact_bytes=15863489 + seed)
        page += f"| {seed} | {bpb:.5f} | {15863489 + seed:,} |\n"
    mean = sum(r["val_bpb"] for r in rows.values()) / 3
    s = dict(
        author="x",
        github_id="x",
        name="x",
        blurb="x",
        date="2026-01-01",
        val_loss=mean * 1.69,
        val_bpb=round(mean, 6),
        bytes_total=15863531,
        seeds=[42, 0, 314],
        seed_results=rows,
    )
    (tmp_path / "submission.json").write_text(json.dumps(s))
    (tmp_path / "README.md").write_text(page + f"\nMean {mean:.5f}.\n\nAn ablation gave 1.2300.\n")
    (tmp_path / "train_gpt.py").write_text("x = 1\n".ljust(47642, "#"))  # as the logs count
    return tmp_path


def test_other_peoples_folders_are_read(peers, capsys):
    code, errors, notes = check(peers, capsys)
    assert code == 0, errors
    assert "1.2300" in notes and "--data" in notes


@pytest.mark.parametrize(
    "plant, words",
    [
        (lambda f: edit(f / "README.md", "| 0 | 1.22811", "| 0 | 1.22711"), "README.md: seed 0, val_bpb: 1.22711"),
        (lambda f: edit(f / "README.md", "15,863,531", "15,863,530"), "README.md: seed 42, Artifact: 15,863,530"),
        (lambda f: edit(f / "README.md", "Mean 1.22764", "Mean 1.22664"), "1.22664 is in no other file"),
        (lambda f: edit(f / "train_seed0.log", "matrix_lr: 0.04", "matrix_lr: 0.05"), "MATRIX_LR is 0.04 on seed 42"),
        (
            lambda f: edit(
                f / "train_seed0.log",
                "exact val_loss:2.07550778 val_bpb:1.22811111",
                "exact val_loss:2.07550778 val_bpb:1.22911111",
            ),
            "seed 0: val_bpb in submission.json and log",
        ),
        (lambda f: edit(f / "train_seed0.log", "47851520", "47851519"), "are not one validation set's"),
        (lambda f: edit(f / "train_seed0.log", "599980ms", "610000ms"), "610.0 s of training"),
        (lambda f: edit(f / "train_seed0.log", "15863489 bytes", "16863489 bytes"), "bytes is over 16000000"),
        (lambda f: edit(f / "train_seed0.log", "  seed: 0", "  seed: 1"), "seed in its name and in its text: 0 and 1"),
    ],
)
def test_what_is_planted_in_other_peoples_is_found(plant, words, peers, capsys):
    plant(peers)
    code, errors, _ = check(peers, capsys)
    assert code == 1 and words in errors, errors


def test_what_a_user_can_mend(peers, tmp_path, monkeypatch, capsys):
    for arguments, words in (
        (["none"], "none: must be a submission's folder"),
        ([str(peers), "--run", "--rerun", "7"], "--rerun 7"),
        ([str(peers), "--rerun", "42"], "only with --run"),
        ([str(peers), "--data", str(ROOT / "tests")], "holds no fineweb_val"),
        ([str(peers), "--baseline", "no.json"], "no.json: there is no such"),
        ([], "FOLDER"),
    ):
        monkeypatch.setattr(sys, "argv", ["check_submission.py", *arguments])
        code = runs.command_line(check_submission.main)
        out, errors = capsys.readouterr()
        assert code == 2 and errors.startswith("error: ") and len(errors.splitlines()) == 1 and words in errors


def test_the_command_line_exits_with_what_it_found(peers):
    assert launch(TOOL, {}, peers).returncode == 0
    edit(peers / "README.md", "Mean 1.2", "Mean 1.3")
    done = launch(TOOL, {}, peers)
    assert done.returncode == 1 and "error: README.md" in done.stdout and not done.stderr

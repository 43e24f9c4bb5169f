"""tools/report.py and the reading of runs: our folders, public records' logs, sweeps; tables, pictures, one page."""

import base64
import io
import json
import re
import shutil
import sys

import pytest

from helpers import ROOT, launch, snapshot

sys.path.insert(0, str(ROOT / "tools"))
import report  # noqa: E402
import runs  # noqa: E402

TOOL = ROOT / "tools" / "report.py"
# The lines that matter of three kinds of public logs, as their scripts print them.
BASELINE = """print(f"step:{step}/{args.iterations} val_loss:{val_loss:.4f}")
====================================================================================================
val_loader:shards pattern=./data/fineweb10B_sp1024/fineweb_val_*.bin tokens:62021632
model_params:17059912
seed:1337
warmup_step:1/20
step:1/20000 train_loss:6.9370 train_time:42ms step_avg:41.60ms
step:1000/20000 train_loss:2.5 train_time:60000ms step_avg:60.00ms
step:1000/20000 val_loss:2.2921 val_bpb:1.3575 train_time:60003ms step_avg:60.00ms
stopping_early: wallclock_cap train_time:600038ms step:13780/20000
peak memory allocated: 10184 MiB reserved: 10200 MiB
Serialized model: 67224983 bytes
Code size: 47642 bytes
Total submission size: 67272625 bytes
Serialized model int8+zlib: 15815847 bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)
Total submission size int8+zlib: 15863489 bytes
final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2276 eval_time:1401ms
final_int8_zlib_roundtrip_exact val_loss:2.07269931 val_bpb:1.22760000
"""
PHASED = """Hyperparameters:
  matrix_lr: 0.026
  seed: 42
1000/20000 train_loss: 2.7000 train_time: 1.5m tok/s: 8500000
4000/20000 val_loss: 2.4000 val_bpb: 1.1000
stopping_early: wallclock_cap train_time: 596053ms step: 4917/20000
Code size (uncompressed): 140000 bytes
Code size (compressed): 33000 bytes
Total submission size quantized+pergroup: 15,948,123 bytes
diagnostic pre-quantization post-ema val_loss:2.33500000 val_bpb:1.06700000 eval_time:7040ms
diagnostic quantized val_loss:2.35000000 val_bpb:1.07650000 eval_time:9000ms
quantized_ttt_phased val_loss:2.31900000 val_bpb:1.05980000 eval_time:473000ms
total_eval_time:498.5s
"""
SLIDING = """step:500/9000 train_loss:3.1000 train_time:41000ms step_avg:82.00ms
DIAGNOSTIC post_ema val_loss:1.9300 val_bpb:1.1430 eval_time:2000ms
final_int6_roundtrip val_loss:1.9400 val_bpb:1.1490 eval_time:5000ms
final_int6_sliding_window val_loss:1.9000 val_bpb:1.1250 stride:64 eval_time:75000ms
legal_ttt val_loss:1.8900 val_bpb:1.1194 eval_time:410000ms
Total submission size int6+lzma: 15990006 bytes
"""


def log(folder, name, text):
    (folder / name).write_text(text)
    return runs.read_runs(folder / name)[0]


def bpb(run):
    return {stage: score.bpb for stage, score in run.stages.items()}


def test_the_baselines_log_is_read(tmp_path):
    run = log(tmp_path, "train.log", BASELINE)
    assert run.losses == [(1, 6.937, 0.042), (1000, 2.5, 60.0)] and run.scores == [(1000, 2.2921, 1.3575, 60.003)]
    assert bpb(run) == {"quantized": 1.2276} and run.final.loss == 2.07269931  # the exact line, not the rounded one
    assert (run.seed, run.code_bytes, run.artifact_bytes, run.val_tokens) == (1337, 47642, 15863489, 62021632)
    assert (run.steps, run.train_seconds, run.parameters, run.eval_seconds) == (13780, 600.038, 17059912, 1.401)


def test_logs_with_test_time_training_are_read(tmp_path):
    run = log(tmp_path, "phased.log", PHASED)
    assert bpb(run) == {"pre_quant": 1.067, "quantized": 1.0765, "ttt": 1.0598} and run.final.bpb == 1.0598
    assert run.losses == [(1000, 2.7, 90.0)] and run.scores == [(4000, 2.4, 1.1, None)] and run.seed == 42
    assert (run.code_bytes, run.artifact_bytes, run.eval_seconds) == (33000, 15948123, 498.5)
    assert run.step_avg_ms == pytest.approx(596053 / 4917) and run.settings["matrix_lr"] == "0.026"
    run = log(tmp_path, "train_seed7.log", SLIDING)
    assert bpb(run) == {"pre_quant": 1.143, "quantized": 1.149, "sliding": 1.125, "ttt": 1.1194} and run.seed == 7
    assert run.eval_seconds == 410 and run.artifact_bytes == 15990006


def test_our_log_alone_says_what_the_summary_says(reproduced):
    folder = reproduced / "work" / "seed42"
    from_log, whole = runs.read_log(folder / "log.txt"), runs.read_runs(folder)[0]
    summary = json.loads((folder / "summary.json").read_text())
    assert whole.final.bpb == summary["val_bpb"] and whole.artifact_bytes == summary["artifact_bytes"]
    assert from_log.final.bpb == pytest.approx(whole.final.bpb, abs=6e-5)
    for name in (
        "steps",
        "artifact_bytes",
        "code_bytes",
        "model_bytes",
        "targets",
        "val_bytes",
        "parameters",
        "hardware",
        "attention",
        "strictly_causal",
    ):
        assert getattr(from_log, name) == getattr(whole, name), name
    assert [x[0] for x in from_log.losses] == [x[0] for x in whole.losses] == [1, 2, 3, 4, 8]
    assert from_log.versions["torch"] == whole.versions["torch"] and from_log.eval_seconds == pytest.approx(
        whole.eval_seconds, abs=0.2
    )
    assert [r.seed for r in runs.read_runs(reproduced / "out")] == [0, 314, 42]  # a submission's folder


@pytest.fixture(scope="module")
def sweep_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    trials = [
        dict(
            trial=n,
            state="complete" if n < 4 else "fail",
            value=1.5 - 0.1 * n if n < 4 else None,
            seconds=1.5,
            values=dict(LR=f"0.0{n + 1}", MODE="ab"[n % 2]),
            error=None if n < 4 else "exit code 2: <b>",
        )
        for n in (3, 2, 1, 0, 4)
    ]
    (folder / "study.json").write_text(
        json.dumps(dict(name="lr", objective="val_bpb", variables=["LR", "MODE"], command="x", trials=trials))
    )
    return folder


def test_a_report_of_everything(reproduced, sweep_folder, tmp_path):
    """Tables on the terminal, in Markdown and on the page; every picture is one, and the page needs no other file."""
    from PIL import Image

    log(tmp_path, "peer.log", PHASED)
    done = launch(TOOL, {}, reproduced / "work", "record=peer.log", sweep_folder, "--out", "r", cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr, done.stderr
    page, text = ((tmp_path / "r" / name).read_text() for name in ("report.html", "report.md"))
    pictures = {"loss.png", "stages.png", "bytes.png", "best.png", "sweep.png"}
    assert {p.name for p in (tmp_path / "r").iterdir()} == pictures | {"report.html", "report.md"}
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert {base64.b64decode(x) for x in embedded} == {(tmp_path / "r" / p).read_bytes() for p in pictures}
    for content in map(base64.b64decode, embedded):
        image = Image.open(io.BytesIO(content)).convert("RGB")
        assert min(image.size) > 250 and len(image.getcolors(1 << 24)) > 30
    assert "http" not in page and "src=" not in re.sub(r'src="data:[^"]*"', "", page)
    assert "exit code 2: &lt;b&gt;" in page and "<b>" not in page
    for row in ("record", "1.05980", "1.06700", "15948123", "498.5"):
        assert row in done.stdout and row in text and row in page
    exact = json.loads((reproduced / "work" / "seed0" / "summary.json").read_text())["val_bpb"]
    assert f"{exact:.5f}" in done.stdout and all(f"]({p})" in text for p in pictures)
    again = launch(TOOL, {}, reproduced / "work", "record=peer.log", sweep_folder, "--out", "r", cwd=tmp_path)
    assert again.returncode == 0 and (tmp_path / "r" / "report.html").read_text() == page  # its own it may replace


def test_a_report_says_which_runs_are_strictly_causal(reproduced, tmp_path):
    text = (reproduced / "work" / "seed0" / "log.txt").read_text()
    assert "strictly causal: yes" in text
    found = [
        log(tmp_path, "strict.log", text),
        log(tmp_path, "other.log", text.replace("strictly causal: yes", "strictly causal: no")),
        log(tmp_path, "peer.log", PHASED),  # a log that does not say
    ]
    assert [run.strictly_causal for run in found] == [True, False, None]
    head, *rows = report.rows_of(found)
    assert [row[head.index("strictly causal")] for row in rows] == ["yes", "no", "-"]
    assert "strictly causal" not in report.rows_of(found[2:])[0]


def test_bytes_by_role_add_up(reproduced, tmp_path):
    run = runs.read_runs(reproduced / "work" / "seed0")[0]
    parts = report.bytes_by_role(run)
    assert sum(parts.values()) == run.artifact_bytes and len(parts) > 5 and parts["code"] == run.code_bytes
    assert 0 < parts["header"] < 3000
    assert report.bytes_by_role(log(tmp_path, "a.log", PHASED)) == dict(code=33000, model=15915123)


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "log.txt").write_text(PHASED)
        (tmp_path / folder / "train.log").write_text(PHASED)
    found, _ = report.read([str(tmp_path / "a" / "train.log"), str(tmp_path / "b" / "train.log")])
    assert [run.name for run in found] == ["a/train", "b/train"]
    found, _ = report.read([str(tmp_path / "a" / "train.log")] * 2)
    assert len({run.name for run in found}) == 2
    assert report.read([f"mine={tmp_path / 'a'}"])[0][0].name == "mine"


def test_coordinates():
    place, ticks = report.axis_of("LR", ["0.01", "0.1", "1"])
    assert (place("0.01"), place("0.1"), place("1")) == pytest.approx((0, 0.5, 1))  # decades: a logarithm
    place, ticks = report.axis_of("N", ["1", "2", "3"])
    assert place("2") == 0.5 and [text for _, text in ticks] == ["1", "2", "3"]
    place, _ = report.axis_of("X", ["a", "b"])
    assert (place("a"), place("b")) == (0, 1)
    assert report.axis_of("X", ["5", "5"])[0]("5") == 0.5


def test_a_running_run_can_be_looked_at(reproduced, tmp_path):
    """No summary yet, a metrics line half written."""
    shutil.copytree(reproduced / "work" / "seed0", tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "train_')
    assert report.main([str(tmp_path / "run"), "--out", str(tmp_path / "r")]) == 0
    assert (tmp_path / "r" / "loss.png").is_file()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["none"], "none: there is no such file"),
        (["empty"], "empty: holds no run"),
        (["words.txt"], "words.txt: holds no"),
        (["bad/study.json"], "is not a sweep's"),
        (["peer.log", "--out", "mine"], "--out mine: is a folder with other files"),
        ([], "PATH"),
        (["broken"], "summary.json: is not JSON"),
    ],
)
def test_what_a_user_can_mend(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for folder in ("empty", "bad", "mine", "broken"):
        (tmp_path / folder).mkdir()
    log(tmp_path, "peer.log", PHASED)
    (tmp_path / "words.txt").write_text("words\n")
    (tmp_path / "bad" / "study.json").write_text("{}")
    (tmp_path / "mine" / "report.html").write_text("my own page")
    (tmp_path / "broken" / "summary.json").write_text("{")
    before = snapshot(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    code = runs.command_line(report.main)
    _, errors = capsys.readouterr()
    assert code == 2 and errors.startswith("error: ") and len(errors.splitlines()) == 1 and words in errors, errors
    assert snapshot(tmp_path) == before

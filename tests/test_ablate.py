"""bench/ablate.py: its rows are knobs that presets have, a small table is made, and made runs are not made again."""

import json
import sys

import pytest

from helpers import ROOT, forking, knob_names, launch, strings

sys.path.append(str(ROOT / "bench"))
import ablate  # noqa: E402


@pytest.mark.parametrize("preset", list(ablate.PRESETS))
def test_every_row_changes_the_configuration(preset):
    import train_gpt as tg

    whole = tg.config_from_env(strings({**ablate.SMALL, **ablate.PRESETS[preset], "PRESET": preset}), False)[0]
    for name, changes in {**ablate.ROWS[preset], **ablate.EVALUATIONS}.items():
        assert set(changes) <= set(knob_names())
        changed = tg.config_from_env(
            strings({**ablate.SMALL, **ablate.PRESETS[preset], **changes, "PRESET": preset}), False
        )[0]
        assert changed != whole, name


def test_a_table_is_made_once(brief, tmp_path, monkeypatch, capsys):
    tiny = dict(
        VOCAB_SIZE=384,
        MODEL_DIM=32,
        TRAIN_SEQ_LEN=32,
        TRAIN_BATCH_TOKENS=128,
        EVAL_SEQ_LEN=32,
        ROPE_DIMS=4,
        CPU_THREADS=1,
        GPTQ_CALIBRATION_BATCHES=1,
    )
    monkeypatch.setattr(ablate, "SMALL", {**ablate.SMALL, **tiny})
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "ablate.py",
            "--presets",
            "poly5",
            "--seeds",
            "1",
            "2",
            "--steps",
            "3",
            "--only",
            "XSA off",
            "temperature 0.95",
            "--data",
            str(brief),
            "--folder",
            str(tmp_path / "runs"),
            "--out",
            str(tmp_path / "table.md"),
        ],
    )
    with forking():
        assert ablate.main() == 0
    text = (tmp_path / "table.md").read_text()
    runs = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.rglob("*summary.json")}
    assert set(runs) == {f"{name}-{seed}" for name in ("whole", "xsa-off", "temperature-0-95") for seed in (1, 2)}
    off, whole = ([runs[f"{name}-{s}"]["val_bpb_quantized"] for s in (1, 2)] for name in ("xsa-off", "whole"))
    change = (sum(off) - sum(whole)) / 2
    assert "| XSA off | " in text and f"{change:+.4f} ± " in text
    cooled = [runs[f"temperature-0-95-{s}"]["val_bpb_quantized"] for s in (1, 2)]
    # The same artifact: nothing was trained, so there is no figure before quantization.
    assert f"| temperature 0.95 |  | {(sum(cooled) - sum(whole)) / 2:+.4f} ± " in text
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*summary.json")}
    assert ablate.main() == 0 and (tmp_path / "table.md").read_text() == text
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*summary.json")}


def test_the_verdict_is_by_every_seed():
    def runs(*figures):
        return [dict(val_bpb_quantized=x) for x in figures]

    lines = ablate.verdicts(
        runs(2.0, 2.1),
        {
            "a": runs(1.9, 2.0),
            "b": runs(2.1, 2.2),
            "c": runs(1.9, 2.2),
            "d": runs(2.0, 2.1),
            "e": runs(2.0, 2.2),
            "f": runs(2.2, 2.3),
        },
    )
    assert lines == ["Better with every seed: a.\n", "Worse with every seed: b, f.\n", "Seeds disagree: c, d, e.\n"]


def test_an_unknown_row_is_refused():
    done = launch(ROOT / "bench" / "ablate.py", {}, "--only", "nothing")
    assert done.returncode == 2 and "--only nothing: rows are" in done.stderr and "Traceback" not in done.stderr

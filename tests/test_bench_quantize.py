"""bench/quantize.py: its statistics, its prediction, the peer's bytes, and the whole of it on one tiny model."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch

import train_gpt as tg
from helpers import RECORD_LIKE, ROOT, TINY, build_model, config, strings

sys.path.append(str(ROOT / "bench"))
import quantize as bench  # noqa: E402

SMALL = dict(NUM_LAYERS=2, MODEL_DIM=16, NUM_KV_HEADS=2, ITERATIONS=3, TRAIN_BATCH_TOKENS=128, MICRO_BATCH_TOKENS=128)


def test_an_interval_is_students():
    assert bench.interval([3.0]) == (3.0, math.inf)
    mean, half = bench.interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.303 / math.sqrt(3))
    mean, half = bench.interval([5.0, 7.0])
    assert mean == 6.0 and half == pytest.approx(12.706 * math.sqrt(2) / math.sqrt(2))
    assert bench.interval([4.0] * 30) == (4.0, 0.0)


def test_the_report_has_a_line_for_each_model_and_method():
    rows = [
        dict(model=m, seed=s, method=k, bytes=1000 + s, bpb_lost=x, divergence=x * (s + 1), predicted=x, seconds=1)
        for m in ("a", "b")
        for k, x in (("peer", 0.004), ("ours", 0.001))
        for s in range(3)
    ]
    lines = bench.report(rows).splitlines()
    assert len(lines) == 2 + 4 and all(line.count("|") == lines[0].count("|") for line in lines)
    cells = [cell.strip() for cell in lines[3].strip("|").split("|")]
    assert cells[:3] == ["a", "ours", "1,001"] and cells[3] == "0.00100 ± 0.00000"
    assert cells[5] == "0.250 ± 0.000"  # a ratio to the peer's, seed by seed
    assert lines[2].split("|")[6].strip() == "1.000 ± 0.000" and lines[4].startswith("| b | peer |")


def calibrated():
    c = config(dict(RECORD_LIKE, MODEL_DIM=16, GATE_WINDOW=4, NUM_KV_HEADS=2, LQER_ENABLED=0))
    weights = {name: p.detach() for name, p in build_model(c).named_parameters()}
    return c, weights, bench.random_calibration(weights, torch.Generator().manual_seed(0))


def test_random_calibration_is_of_every_bank():
    _, weights, calibration = calibrated()
    assert set(calibration.hessians) == set(calibration.rows) == {*tg.BANKS, "embedding"}
    for name, hessian in calibration.hessians.items():
        w = tg.as_batch(weights[name])
        assert hessian.shape == (len(w), w.size(-1), w.size(-1))
        assert (torch.linalg.eigvalsh(hessian.double()) > 0).all()
        assert torch.allclose(calibration.rows[name].mean(1), torch.ones(len(w)), atol=1e-5)
        assert (calibration.rows[name] > 0).all() and calibration.rows[name].shape == w.shape[:2]


@pytest.mark.parametrize("correlated", [False, True])
def test_the_prediction_is_half_the_weighted_sum(correlated):
    c, weights, calibration = calibrated()
    outputs = calibration.outputs
    assert set(outputs) == set(tg.BANKS) < set(calibration.hessians)
    if not correlated:
        calibration = calibration._replace(outputs={})
    stored = tg.quantize(weights, calibration, c)
    total = 0.0
    for name, hessians in calibration.hessians.items():
        errors = tg.as_batch(weights[name] - tg.restore(stored[name])).double()
        if correlated and name in outputs:
            for e, h, g in zip(errors, hessians.double(), outputs[name].double(), strict=True):
                total += 0.5 * torch.einsum("rs,sc,cd,rd->", g, e, h, e).item()
            continue
        for error, hessian, rows in zip(errors, hessians.double(), calibration.rows[name].double(), strict=True):
            for e, sensitivity in zip(error, rows, strict=True):
                total += 0.5 * sensitivity.item() * (e @ hessian @ e).item()
    found = bench.predicted(stored, bench.Bench(None, 0, weights, {}), calibration)
    assert found == pytest.approx(total, rel=1e-3) and found > 0


def test_the_peers_bytes_without_lrzip_are_ours(monkeypatch):
    c, weights, calibration = calibrated()
    stored = tg.quantize(weights, calibration, c)
    monkeypatch.setattr(bench.shutil, "which", lambda _: None)
    assert bench.peer_bytes(stored, c) == (len(tg.pack(stored, c)), "pergroup")


def test_the_whole_of_it_on_one_tiny_model(data, tmp_path, monkeypatch, capsys):
    """It trains, keeps the model, measures the peer and the methods, and reports them; the next time it only reads."""
    monkeypatch.setattr(bench, "MODELS", {"tiny": dict(TINY, **SMALL, DATA_PATH=str(data))})
    few = {name: knobs | dict(TUNE_STEPS=2 * bool(knobs["TUNE_STEPS"])) for name, knobs in bench.METHODS.items()}
    names = [next(iter(few)), next(name for name, knobs in few.items() if knobs["TUNE_STEPS"])]
    monkeypatch.setattr(bench, "METHODS", {name: few[name] for name in names})
    found = []
    for seeds in (1, 1):
        out = tmp_path / "rows.json"
        options = [
            "--models",
            "tiny",
            "--folder",
            tmp_path / "models",
            "--seeds",
            seeds,
            "--tokens",
            512,
            "--json",
            out,
        ]
        monkeypatch.setattr(sys, "argv", ["quantize.py", *map(str, options)])
        bench.main()
        found.append((json.loads(out.read_text()), capsys.readouterr().out))
    (first, printed), (second, again) = found
    assert "training tiny: 3 steps" in printed and "training" not in again
    assert [row["method"] for row in first["rows"]] == ["peer", *names]
    peer = first["rows"][0]
    for row, other in zip(first["rows"], second["rows"], strict=True):
        assert row["divergence"] > 0 and row["predicted"] > 0 and math.isfinite(row["bpb_lost"])
        assert row["bytes"] <= peer["bytes"] and (row["model"], row["seed"]) == ("tiny", 0)
        assert {**row, "seconds": 0} == {**other, "seconds": 0}
        assert f"| tiny | {row['method']} |" in printed
    assert (tmp_path / "models" / "tiny.npz").is_file() and first["tokens"] == 512
    done = tmp_path / "models" / "tiny.json"
    quantized = bench.knobs_of(dict(bench.MODELS["tiny"], GPTQ_DAMP=0.5))  # not a setting of the training
    bench.check_kept(done, json.loads(done.read_text()), quantized)
    monkeypatch.setitem(bench.MODELS, "tiny", dict(bench.MODELS["tiny"], MATRIX_LR=0.5))
    with pytest.raises(SystemExit) as refused:
        bench.main()
    found = capsys.readouterr().err
    assert refused.value.code == 2 and found.count("\n") == 1
    assert "tiny.json: trained with MATRIX_LR=" in found and "not 0.5: remove it" in found


def test_an_unknown_model_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["quantize.py", "--models", "huge"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "--models: must be some of" in capsys.readouterr().err


def test_untrained_times_every_part(data, tmp_path, capsys):
    knobs = dict(RECORD_LIKE, NUM_LAYERS=6, MODEL_DIM=16, GATE_WINDOW=4, DATA_PATH=data, ARTIFACT_DIR=tmp_path)
    knobs |= dict(MATRIX_STEPS=0.85, ROW_STEPS=0.75, STD_STEPS=0.5, TARGET_BYTES=300_000, COMPRESSOR="pergroup")
    found = bench.time_untrained(strings(knobs))
    assert [row["name"] for row in found["rows"]] == [
        "factors of Hessians",
        "one attempt",
        "packing",
        "unpacking",
        "dequantization",
        "the whole stage",
    ]
    assert all(row["seconds"] >= 0 for row in found["rows"])
    assert found["limit"] == 300_000 - tg.shipped_code()[0]
    assert found["parameters"] == tg.parameter_count(config(knobs)) and found["bytes"] > 0
    assert f"{found['bytes']} bytes of {found['limit']}" in capsys.readouterr().out

"""bench/fp8.py: a run on tiny data, its results paired by seed, its table."""

import json
import math
import sys

import pytest

from helpers import ROOT, fork

sys.path.append(str(ROOT / "bench"))
import fp8  # noqa: E402

TINY = ("MODEL_DIM=64", "VOCAB_SIZE=384", "TRAIN_SEQ_LEN=32", "TRAIN_BATCH_TOKENS=64", "EVAL_SEQ_LEN=32")


def test_a_run_compares_every_variant_with_bf16_for_each_seed(data, tmp_path):
    settings = (*TINY, "VAL_BATCH_SIZE=8192", "WARMDOWN_FRAC=0.5")
    options = ("--data", data, "--steps", 2, "--seeds", 1, 2, "--out", tmp_path, "--set", *settings)
    done = fork(ROOT / "bench" / "fp8.py", {}, *map(str, options))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "fp8.json").read_text())
    assert list(found["results"]) == ["1", "2"] and found["how"] == "simulated" and found["steps"] == 2
    for of_seed in found["results"].values():
        assert list(of_seed) == list(fp8.VARIANTS)
        losses = [row["loss"] for row in of_seed.values()]
        assert len(set(losses)) == len(losses) and max(losses) - min(losses) < 0.1
    mean, half = found["differences"]["MLP"]["bpb"]
    expected = [r["MLP"]["bpb"] - r["bf16"]["bpb"] for r in found["results"].values()]
    assert mean == pytest.approx(sum(expected) / 2)
    assert half == pytest.approx(12.706 * abs(expected[0] - expected[1]) / 2)
    text = (tmp_path / "fp8.md").read_text()
    assert text.count("\n| ") == 1 + len(fp8.VARIANTS) and f"| {mean:+.4f} ± {half:.4f} |" in text


def test_one_seed_has_no_interval():
    results = {"1": {"bf16": dict(loss=2.0), "head": dict(loss=2.5)}}
    mean, half = fp8.difference(results, "head", "loss")
    assert mean == 0.5 and math.isnan(half)


def test_a_wrong_setting_ends_in_one_line(data, tmp_path):
    done = fork(ROOT / "bench" / "fp8.py", {}, "--data", str(data), "--set", "VOCAB_SIZE=385", "--out", str(tmp_path))
    assert done.returncode == 2 and "VOCAB_SIZE=385" in done.stderr.splitlines()[-1]

"""TTT_PLAIN_WEIGHT: the mixture against a plain loop, as a distribution, and in whole runs."""

import json
import math
import shutil

import numpy as np
import pytest

from helpers import config, tg
from test_checkpoint import MODES, go, summary_of

WHOLE = {**MODES["phased"], "TTT_BASELINE": 0, "EVAL_SCORES": 1, "TTT_LORA_LR": 0.02}
MIXED = {**WHOLE, "TTT_PLAIN_WEIGHT": 0.4, "HINT_CHUNK_TOKENS": 512}
HINTS = dict(HINT_ENABLED=1, HINT_MIN_MATCH=2, HINT_MAX_MATCH=8, HINT_CHUNK_TOKENS=512)


def log_probabilities(count, seed):
    """Of the targets and of their hints, by one model."""
    draw = np.random.default_rng(seed).exponential
    return tuple((-draw(3.0, count)).astype(np.float32) for _ in range(2))


def plain_loop(adapted, plain, plain_weight, targets):
    """One target at a time, with probabilities."""
    logit, curvature, mixed = math.log((1 - plain_weight) / plain_weight), 20.0, []
    for begin in range(0, len(adapted[0]), targets):
        w, gradient, squares = 1 / (1 + math.exp(-logit)), 0.0, 0.0
        for i in range(begin, min(begin + targets, len(adapted[0]))):
            both = [(math.exp(a[i]), math.exp(b[i])) for a, b in zip(adapted, plain, strict=True)]
            mixed.append([math.log(w * a + (1 - w) * b) for a, b in both])
            surplus = w * both[0][0] / math.exp(mixed[-1][0]) - w
            gradient, squares = gradient + surplus, squares + surplus**2
        curvature += squares
        logit += max(-1, min(1, gradient / curvature))
    return np.array(mixed).T, 1 / (1 + math.exp(-logit))


@pytest.mark.parametrize("weight", [0.02, 0.25, 0.9])
def test_a_mixture_is_that_of_a_loop_over_targets(weight):
    adapted, plain = log_probabilities(200, 0), log_probabilities(200, 1)
    mixed, last = tg.mix(adapted, plain, weight, 7)
    expected, expected_last = plain_loop(adapted, plain, weight, 7)
    np.testing.assert_allclose(mixed, expected, rtol=1e-5, atol=1e-6)
    assert last == pytest.approx(expected_last, rel=1e-9) and last != pytest.approx(1 - weight, abs=1e-3)
    assert all(x.dtype == np.float32 for x in mixed)


def test_the_probabilities_of_all_tokens_sum_to_one():
    """Whatever the target is: its own chunk has the share that earlier ones left."""
    draw = np.random.default_rng(0).dirichlet
    p, q = (draw(np.full(9, 0.3), 5000) + 1e-9 for _ in range(2))
    targets = np.random.default_rng(1).integers(0, 9, 5000)
    place, total = 3000, 0.0
    for token in range(9):
        targets[place] = token
        adapted, plain = (np.log(x[np.arange(5000), targets]) for x in (p, q))
        total += math.exp(tg.mix((adapted,), (plain,), 0.3, 500)[0][0][place])
    assert total == pytest.approx(p[place].sum() / 2 + q[place].sum() / 2, rel=1e-6)


def test_no_share_depends_on_what_follows():
    adapted, plain = log_probabilities(9000, 0), log_probabilities(9000, 1)
    before = tg.mix(adapted, plain, 0.25, 1000)[0][0]
    changed = tuple(np.concatenate((x[:5000], x[5000:] * 2)) for x in plain)
    assert np.array_equal(before[:5000], tg.mix(adapted, changed, 0.25, 1000)[0][0][:5000])
    assert not np.array_equal(before[5000:], tg.mix(adapted, changed, 0.25, 1000)[0][0][5000:])


def test_the_better_model_gets_the_larger_share():
    adapted = np.full(40_000, -2.0)
    for difference, low, high in ((1.0, 0.9, 1.0), (-1.0, 0.0, 0.1)):
        assert low < tg.mix((adapted,), (adapted - difference,), 0.5, 1000)[1] < high
    worse = adapted - np.where(np.arange(40_000) % 2, 3.0, -3.0)  # as good on the whole, where the other is not
    mixed, w = tg.mix((adapted,), (worse,), 0.5, 1000)
    assert mixed[0].mean() > adapted.mean() + 0.2 and 0.2 < w < 0.8


def test_impossible_targets_stay_finite():
    mixed, _ = tg.mix((np.array([-2000.0, -1.0]),), (np.array([-1500.0, -3000.0]),), 0.5, 9)
    assert mixed[0] == pytest.approx([-1500 + math.log(0.5), -1 + math.log(0.5)])


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Whole runs of the same seed: test-time training alone, mixed, and mixed with hints."""
    folder = tmp_path_factory.mktemp("runs")
    for name, knobs in (("alone", WHOLE), ("mixed", MIXED), ("hints", {**MIXED, **HINTS})):
        done = go(data, folder / name, **knobs)
        assert done.returncode == 0, done.stderr
    return folder


def scores_of(folder, stage):
    return np.load(folder / f"scores_{stage}.npy")


def test_a_run_scores_by_the_mixture(runs):
    alone, mixed = summary_of(runs / "alone"), summary_of(runs / "mixed")
    adapted, plain = scores_of(runs / "alone", "ttt"), scores_of(runs / "alone", "quantized")
    (expected,), last = tg.mix((-adapted,), (-plain,), 0.4, 512)
    np.testing.assert_allclose(scores_of(runs / "mixed", "ttt"), -expected, atol=1e-5)
    assert np.abs(adapted - plain).max() > 0.05
    assert mixed["val_bpb_adapted"] == pytest.approx(alone["val_bpb_ttt"], abs=1e-6)
    assert mixed["ttt_plain_weight_learned"] == pytest.approx(1 - last, abs=1e-4)
    nats = scores_of(runs / "mixed", "ttt").sum(dtype=np.float64)
    assert mixed["val_bpb"] == mixed["val_bpb_ttt"] == pytest.approx(nats / math.log(2) / mixed["val_bytes"])
    assert f"ttt: val_bpb {mixed['val_bpb_adapted']:.4f} alone; mixed" in (runs / "mixed" / "log.txt").read_text()
    assert "val_bpb_adapted" not in alone


def test_hints_learn_from_the_mixture(runs):
    """A hint's probability is mixed as its target's is, so hits score as if the target itself had been asked for."""
    s, hinted = summary_of(runs / "hints"), scores_of(runs / "hints", "hint")
    np.testing.assert_allclose(scores_of(runs / "hints", "ttt"), scores_of(runs / "mixed", "ttt"), atol=1e-5)
    assert (
        s["val_bpb"]
        == s["val_bpb_hint"]
        == pytest.approx(hinted.sum(dtype=np.float64) / math.log(2) / s["val_bytes"], abs=1e-6)
    )
    assert s["val_bpb_ttt"] == pytest.approx(summary_of(runs / "mixed")["val_bpb_ttt"], abs=1e-6)
    assert np.abs(hinted - scores_of(runs / "hints", "ttt")).max() > 0.01


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_evaluation_alone_scores_the_same_on_any_number_of_ranks(runs, data, tmp_path, ranks):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(runs / "hints" / tg.CONTAINER_FILE, folder)
    done = go(data, folder, ranks=ranks, MODE="eval", **(MIXED | HINTS))
    assert done.returncode == 0, done.stderr
    s = json.loads((folder / "eval_summary.json").read_text())
    expected = summary_of(runs / "hints")["val_bpb_hint"]
    if ranks == 1:
        assert s["val_bpb_hint"] == expected
    else:  # batches of other sizes round otherwise, and at this rate the adapters make more of it
        assert s["val_bpb_hint"] == pytest.approx(expected, abs=2e-3)


def test_a_run_cut_off_before_the_mixture_takes_the_plain_scores_again(runs, data, tmp_path):
    """They were in the memory of the attempt that ended."""
    folder = tmp_path / "run"
    done = go(data, folder, KILL_STAGE="ttt", KILL_EVENT="run_batch", KILL_AT=3, **(MIXED | HINTS))
    assert done.returncode == -9, done.stderr
    done = go(data, folder, **(MIXED | HINTS))
    assert done.returncode == 0, done.stderr
    assert summary_of(folder)["val_bpb_hint"] == summary_of(runs / "hints")["val_bpb_hint"]
    assert np.array_equal(scores_of(folder, "ttt"), scores_of(runs / "hints", "ttt"))


def test_without_test_time_training_it_has_no_effect_and_a_remark_says_so():
    c = tg.config_from_env(dict(PRESET="demo", TTT_MODE="none", TTT_PLAIN_WEIGHT="0.3"), False)
    assert any("TTT_PLAIN_WEIGHT=0.3 has no effect with TTT_MODE=none" in note for note in c[2])
    with pytest.raises(tg.ConfigError, match="TTT_PLAIN_WEIGHT"):
        config(TTT_MODE="phased", TTT_PLAIN_WEIGHT=1)


def test_chunk_ttt_is_mixed_too(runs, data, tmp_path):
    knobs = {**WHOLE, **MODES["chunk"], "TTT_BASELINE": 0, "EVAL_SCORES": 1, "TTT_LR": 0.05, "HINT_CHUNK_TOKENS": 512}
    found = {}
    for weight in (0, 0.4):
        folder = tmp_path / str(weight)
        folder.mkdir()
        shutil.copy(runs / "hints" / tg.CONTAINER_FILE, folder)
        done = go(data, folder, MODE="eval", TTT_PLAIN_WEIGHT=weight, **knobs)
        assert done.returncode == 0, done.stderr
        found[weight] = [np.load(folder / f"eval_scores_{stage}.npy") for stage in ("ttt", "quantized")]
    (adapted, plain), (mixed, again) = found[0], found[0.4]
    assert np.array_equal(plain, again) and np.abs(adapted - plain).max() > 0.01
    np.testing.assert_allclose(mixed, -tg.mix((-adapted,), (-plain,), 0.4, 512)[0][0], atol=1e-5)

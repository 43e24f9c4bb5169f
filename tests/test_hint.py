"""Hints from repetition against their definition, and by the rules: exact, normalized, causal, whatever the ranks."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

import hint_reference as reference
import train_gpt as tg
from helpers import RECORD_LIKE, TINY, build_model, config, documents_from
from test_checkpoint import PHASED as KILLED_PHASED
from test_checkpoint import SMALL, go, summary_of
from test_evaluation import evaluator_of
from test_strict import appended, longer, moved_border, other_text, removed

HINTS = dict(HINT_ENABLED=1, HINT_MIN_MATCH=2, HINT_MAX_MATCH=6, HINT_CHUNK_TOKENS=32)
PHASED = dict(
    TTT_MODE="phased",
    TTT_BATCH_SIZE=3,
    TTT_CHUNK_SIZE=8,
    TTT_EVAL_SEQ_LEN=24,
    TTT_LORA_RANK=4,
    TTT_LORA_LR=0.02,
    PHASED_TTT_PREFIX_DOCS=6,
    PHASED_TTT_PREFIX_TOKENS=0,
    PHASED_TTT_NUM_PHASES=2,
    GLOBAL_TTT_CHUNK_TOKENS=30,
    GLOBAL_TTT_LR=0.05,
)
CHUNK = dict(TTT_MODE="chunk", TTT_CHUNK_TOKENS=60, TTT_EPOCHS=1, TTT_LR=0.05)
SLIDING = dict(EVAL_SEQ_LEN=24, EVAL_STRIDE=6)
EVALUATIONS = {"sliding": SLIDING, "phased": PHASED, "chunk": {**SLIDING, **CHUNK}}
LENGTHS = (30, 7, 90, 1, 12, 45, 8, 1, 24, 16, 60, 20)


def repetitive(seed=0, lengths=LENGTHS, alphabet=6):
    """Documents that share phrases, of few tokens; the last one has no end."""
    draw = np.random.default_rng(seed)
    phrases = [draw.integers(4, 4 + alphabet, draw.integers(3, 12)).tolist() for _ in range(5)]
    tokens = []
    for length in lengths:
        text = []
        while len(text) < length - 1:
            text += phrases[draw.integers(5)] if draw.random() < 0.7 else [int(draw.integers(4, 4 + alphabet))]
        tokens += [tg.BOS_ID, *text[: length - 1]]
    return [*tokens, 9]


STREAM = repetitive()


def hints_of(tokens, **knobs):
    tokens, c = np.array(tokens, np.uint16), config(**{**HINTS, **knobs})
    return tg.find_hints(tokens, tg.document_offsets(tokens), c)


# ----------------------------------------------------------------------------------------------- what the hints are


@pytest.mark.parametrize(
    "low, high, chunk",
    [(2, 6, 32), (1, 1, 7), (1, 5, 1), (3, 12, 50), (4, 7, 10_000), (5, 31, 16)],
)
def test_hints_are_those_of_a_quadratic_search(low, high, chunk):
    knobs = dict(HINT_MIN_MATCH=low, HINT_MAX_MATCH=high, HINT_CHUNK_TOKENS=chunk)
    c = config(**HINTS | knobs)
    assert tg.hint_lengths(c) == reference.lengths(low, high)
    for seed in range(3):
        tokens = repetitive(seed)
        found = hints_of(tokens, **knobs)
        expected = [reference.hint(tokens, place, c) or (0, 0) for place in range(len(tokens) - 1)]
        assert list(zip(found.tokens.tolist(), found.kinds.tolist(), strict=True)) == expected
        assert any(kind for _, kind in expected)


def test_any_number_of_threads_finds_the_same():
    tokens, c = np.array(repetitive(1, (4000, 2500, 700)), np.uint16), config(**HINTS)
    documents = tg.document_offsets(tokens)
    one, many = (tg.find_hints(tokens, documents, c, threads) for threads in (1, 5))
    assert np.array_equal(one.tokens, many.tokens) and np.array_equal(one.kinds, many.kinds) and one.kinds.any()


def test_text_without_repetition_has_no_hints():
    found = hints_of([tg.BOS_ID, *range(4, 300)])
    assert not found.kinds.any() and not found.tokens.any()
    assert not hints_of([tg.BOS_ID, 5]).kinds.any()


def test_equal_hashes_of_other_tokens_are_no_match(monkeypatch):
    """All runs collide: what remains are the matches of the tokens themselves."""
    monkeypatch.setattr(tg.Runs, "hashes", lambda runs, ends, length: np.zeros(len(ends), np.uint64))
    found, tokens = hints_of(STREAM), STREAM
    for place in np.flatnonzero(found.kinds):
        length = reference.lengths(2, 6)[found.kinds[place] - 1]
        run = tokens[place - length + 1 : place + 1]
        starts = [i for i in range(place - length + 1) if tokens[i : i + length] == run]
        assert any(tokens[i + length] == found.tokens[place] for i in [*starts, place - length])
    assert found.kinds.any()


# ------------------------------------------------------------------------------------------- what they do to a score


def random_distributions(count, vocabulary, seed):
    logits = 3 * np.random.default_rng(seed).standard_normal((count, vocabulary))
    p = np.exp(logits)
    return p / p.sum(1, keepdims=True)


def scored(tokens, p, c, found):
    """with_hints on distributions p [targets, V]."""
    tokens, rows = np.array(tokens, np.uint16), np.arange(len(tokens) - 1)
    return tg.with_hints(-np.log(p[rows, tokens[1:]]), np.log(p[rows, found.tokens]), tokens, found, c)


@pytest.mark.parametrize("lr", [1.0, 0.3])
def test_scores_are_those_of_a_loop_over_targets(lr):
    c = config(**HINTS, HINT_LR=lr)
    for seed in range(3):
        tokens = repetitive(seed)
        p = random_distributions(len(tokens) - 1, 12, seed)
        ours = scored(tokens, p, c, hints_of(tokens))
        np.testing.assert_allclose(ours, reference.scores(tokens, p, c), rtol=1e-9, atol=1e-12)
        assert (np.abs(ours + np.log(p[np.arange(len(p)), tokens[1:]])) > 1e-3).mean() > 0.3


def test_the_probabilities_of_all_tokens_sum_to_one():
    """At every place that has a hint: the same text before it, and each token of the vocabulary as the target."""
    vocabulary = 12
    p, c, found = random_distributions(len(STREAM) - 1, vocabulary, 1), config(**HINTS), hints_of(STREAM)
    moved = 0
    for place in np.flatnonzero(found.kinds)[::3]:
        sums, shares = 0.0, []
        for token in range(vocabulary):
            tokens = [*STREAM[: place + 1], token, 9]
            shares.append(math.exp(-scored(tokens, p[: place + 2], c, hints_of(tokens))[place]))
            sums += shares[-1]
        assert sums == pytest.approx(1, abs=1e-12)
        moved += np.abs(np.array(shares) - p[place]).max() > 1e-3
    assert moved > 10


def test_a_weight_finds_the_odds_of_its_hints():
    """Hints that are right half of the time, where the model gives them a hundredth: their probability nears a half."""
    draw, count = np.random.default_rng(0), 40_000
    right = draw.random(count) < 0.5
    tokens = np.where(np.append(False, right), 5, 6).astype(np.uint16)
    found = tg.Hints(np.full(count, 5, np.uint16), np.ones(count, np.uint8))
    nll = np.where(right, -math.log(0.012), -math.log(0.5))
    after = tg.with_hints(
        nll, np.full(count, math.log(0.012)), tokens, found, config(**HINTS | dict(HINT_CHUNK_TOKENS=500))
    )
    late = after[-10_000:][right[-10_000:]]
    np.testing.assert_allclose(np.exp(-late), 0.5, atol=0.02)
    assert after.mean() < nll.mean() and after[:500].tolist() == pytest.approx(nll[:500].tolist())


def test_scores_stay_finite_and_not_negative_at_the_extremes():
    count = 4096
    draw = np.random.default_rng(0)
    right = draw.random(count) < 0.7
    tokens = np.where(np.append(False, right), 5, 6).astype(np.uint16)
    log_q = draw.choice([0.0, -1e-7, -1e-3, -20.0, -80.0], count).astype(np.float32)
    nll = np.where(right, -log_q, np.maximum(-np.log(-np.expm1(log_q) + 1e-30), 0)).astype(np.float32)
    found = tg.Hints(np.full(count, 5, np.uint16), np.ones(count, np.uint8))
    after = tg.with_hints(nll, log_q, tokens, found, config(**HINTS | dict(HINT_CHUNK_TOKENS=64)))
    assert after.dtype == np.float32 and np.isfinite(after).all() and (after >= 0).all()


# --------------------------------------------------------------------------------------- where the model's q comes from


@pytest.mark.parametrize("base", [TINY, RECORD_LIKE, dict(TINY, SOFTCAP_TYPE="poly", FUSED_CE_ENABLED=0)])
@pytest.mark.parametrize("temperature", [1.0, 0.8])
def test_the_forward_gives_the_log_probability_of_a_hint(base, temperature):
    model = build_model(config(base, COMPUTE_DTYPE="float64"), seed=2)
    ids, targets, hints = torch.randint(4, 384, (3, 2, 16), generator=torch.Generator().manual_seed(1))
    documents = documents_from(torch.zeros(2, 16, dtype=torch.int32))
    arguments = dict(looped=model.config.loops, temperature=temperature)
    nll, lse, log_q = model(ids, targets[:, -5:], documents, hints=hints[:, -5:], **arguments)
    assert not log_q.requires_grad and nll.requires_grad
    expected = -model(ids, hints[:, -5:], documents, **arguments)[0]
    torch.testing.assert_close(log_q, expected.detach(), rtol=1e-12, atol=1e-12)
    off = model(ids, targets[:, -5:], documents, **arguments)
    assert len(off) == 2 and torch.equal(off[0], nll) and torch.equal(off[1], lse)


def evaluation(tokens, folder, data, dtype="float64", **knobs):
    """(scores of all stages, the summary's rows) of an evaluation, by the functions of a run."""
    knobs = {"COMPUTE_DTYPE": dtype, "VAL_BATCH_SIZE": 96, "MICRO_BATCH_TOKENS": 64, "QK_GAIN_INIT": 2.0, **knobs}
    evaluator = evaluator_of(folder / "data", data, tokens, **TINY | knobs | dict(EVAL_SCORES=1))
    model, run = build_model(evaluator.config, seed=1, spread=0.2), evaluator.run
    written = {}
    run.save = lambda name, content: written.update({name: content})
    tg.score_artifact(evaluator, model)
    rows = tg.test_time_training(evaluator, model) if evaluator.config.ttt_mode != "none" else {}
    scores = {name[len("scores_") : -len(".npy")]: np.frombuffer(b[128:], "<f4") for name, b in written.items()}
    return scores, rows | run.results.get(run.scored("hint"), {})


@pytest.mark.parametrize("name", EVALUATIONS)
def test_other_stages_score_as_without_hints(name, data, tmp_path):
    with_, rows = evaluation(STREAM, tmp_path, data, "float32", **EVALUATIONS[name], **HINTS)
    without, _ = evaluation(STREAM, tmp_path, data, "float32", **EVALUATIONS[name])
    assert set(with_) - set(without) == {"hint"}
    for stage, scores in without.items():
        assert np.array_equal(scores, with_[stage])
    last = with_["ttt" if "ttt" in with_ else "quantized"]
    assert rows["val_loss_hint"] == pytest.approx(with_["hint"].mean(dtype=np.float64), rel=1e-6)
    assert 0.1 < rows["hint_share"] < 1 and (with_["hint"] != last).mean() > 0.1


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_stage_with_hints_is_the_reference_on_the_models_own_distributions(name, data, tmp_path, monkeypatch):
    """The probabilities are collected where scores are entered: the loss of each token as the target, negated."""
    stream = STREAM[: len(STREAM) // 3]  # the loss of each token of the vocabulary takes long
    distributions, enter = np.zeros((len(stream) - 1, 384)), tg.ScoreLedger.score
    forward, token_losses = tg.GPT.forward, tg.GPT.token_losses

    def watched(model, *batch, **more):
        watched.losses = None
        result = forward(model, *batch, **more)
        if more.get("hints") is not None:  # targets meet the network at its logits, and nowhere before
            logits, targets, *rest = watched.losses  # pyright: ignore[reportGeneralTypeIssues]
            with torch.no_grad():
                every = [token_losses(model, logits, torch.full_like(targets, t), *rest)[0] for t in range(384)]
            watched.last = torch.exp(-torch.stack(every, -1)).numpy()
        return result

    def kept(model, *arguments):
        watched.losses = arguments
        return token_losses(model, *arguments)

    def entered(ledger, positions, nll, log_q=None):
        if log_q is not None:
            distributions[positions[positions >= 0]] = watched.last[positions >= 0]
        enter(ledger, positions, nll, log_q)

    monkeypatch.setattr(tg.GPT, "forward", watched)
    monkeypatch.setattr(tg.GPT, "token_losses", kept)
    monkeypatch.setattr(tg.ScoreLedger, "score", entered)
    scores, _ = evaluation(stream, tmp_path, data, **EVALUATIONS[name], **HINTS)
    expected = reference.scores(stream, distributions, config(**HINTS))
    np.testing.assert_allclose(scores["hint"], expected, rtol=1e-6, atol=1e-6)


# -------------------------------------------------------------------------------------------------- the strict reading


@pytest.mark.parametrize("name", EVALUATIONS)
def test_no_score_depends_on_what_follows(name, data, tmp_path):
    """Bit for bit, as tests/test_strict.py demands it of the other stages."""
    knobs = {**EVALUATIONS[name], **HINTS}
    before = evaluation(STREAM, tmp_path, data, "float32", **knobs)[0]["hint"]
    for change, cut in ((other_text, 150), (moved_border, 190), (appended, 128), (removed, 205), (longer, 100)):
        other = [t if t < 384 else 4 + t % 380 for t in change(STREAM, cut)]
        after = evaluation(other, tmp_path, data, "float32", **knobs)[0]["hint"]
        shorter = min(len(STREAM), len(other))
        different = np.flatnonzero(np.array(STREAM[:shorter]) != np.array(other[:shorter]))
        same = int(different[0] if len(different) else shorter) - 1
        assert same >= cut - 1
        assert np.array_equal(before[:same], after[:same]), change.__name__
        stop = min(len(before), len(after))
        assert stop == same or not np.array_equal(before[same:stop], after[same:stop])


def test_a_long_stream_has_the_same_hints_at_its_start():
    """No hash collides because of what follows."""
    draw = np.random.default_rng(0)
    tokens = np.concatenate([[tg.BOS_ID], draw.integers(4, 40, 300_000)]).astype(np.uint16)
    tokens[draw.integers(1, len(tokens), 2000)] = tg.BOS_ID
    whole = hints_of(tokens, HINT_MIN_MATCH=3, HINT_CHUNK_TOKENS=1000)
    for stop in (5_000, 70_001):
        start = hints_of(tokens[:stop], HINT_MIN_MATCH=3, HINT_CHUNK_TOKENS=1000)
        assert np.array_equal(start.tokens, whole.tokens[: stop - 1])
        assert np.array_equal(start.kinds, whole.kinds[: stop - 1])
    assert whole.kinds.any()


def test_length_order_is_refused():
    with pytest.raises(tg.ConfigError, match="^HINT_ENABLED=1: must be 0 with TTT_ORDER=length"):
        config(HINT_ENABLED=1, TTT_MODE="phased", TTT_ORDER="length")
    with pytest.raises(tg.ConfigError, match="^HINT_MAX_MATCH=4: must be at least HINT_MIN_MATCH=8"):
        config(HINT_MIN_MATCH=8, HINT_MAX_MATCH=4)
    assert config(HINT_ENABLED=1, TTT_MODE="phased").strictly_causal


# --------------------------------------------------------------------------------------------------- ranks and resuming

WHOLE = dict(HINT_ENABLED=1, HINT_MIN_MATCH=2, HINT_MAX_MATCH=8, HINT_CHUNK_TOKENS=512, EVAL_SCORES=1)
NO_BASELINE = {**KILLED_PHASED, "TTT_BASELINE": 0}


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run whose scores of the last stage have hints, in each mode."""
    folder = tmp_path_factory.mktemp("trained")
    for mode, knobs in (("none", {}), ("phased", NO_BASELINE)):
        done = go(data, folder / mode, **knobs, **WHOLE)
        assert done.returncode == 0, done.stderr
    return folder


def test_a_summary_shows_the_gain(trained):
    for mode, stage in (("none", "quantized"), ("phased", "ttt")):
        s = summary_of(trained / mode)
        scores = np.load(trained / mode / "scores_hint.npy").astype(np.float64)
        assert s["val_bpb"] == s["val_bpb_hint"] == pytest.approx(scores.sum() / math.log(2) / s["val_bytes"])
        assert s["val_loss"] == s["val_loss_hint"] and s["val_bpb_hint"] != s[f"val_bpb_{stage}"]
        assert s["strictly_causal"] and s["hint_seconds"] >= 0
        log = (trained / mode / "log.txt").read_text()
        assert f"val_bpb    {s['val_bpb_hint']:.4f} with hints from repetition" in log


def test_two_ranks_score_as_one(trained, data, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(trained / "none" / tg.CONTAINER_FILE, folder)
    found = {}
    for ranks in (1, 2):
        done = go(data, folder, ranks=ranks, MODE="eval", **WHOLE)
        assert done.returncode == 0, done.stderr
        found[ranks] = np.load(folder / "eval_scores_hint.npy"), json.loads((folder / "eval_summary.json").read_text())
    assert np.array_equal(found[1][0], found[2][0])
    assert found[1][1]["val_bpb_hint"] == found[2][1]["val_bpb_hint"] == summary_of(trained / "none")["val_bpb_hint"]


@pytest.mark.parametrize(
    "mode, stage, event, at",
    [("none", "evaluate", "score_sequences", 4), ("phased", "ttt", "run_batch", 3), ("phased", "ttt", "replace", 5)],
)
def test_a_killed_evaluation_ends_as_an_undisturbed_one(mode, stage, event, at, trained, data, tmp_path):
    knobs = NO_BASELINE if mode == "phased" else {}
    folder = tmp_path / "run"
    written = {} if event == "replace" else dict(KILL_WRITTEN=1)
    done = go(data, folder, KILL_STAGE=stage, KILL_EVENT=event, KILL_AT=at, **written, **knobs, **WHOLE)
    assert done.returncode == -9, done.stderr
    done = go(data, folder, **knobs, **WHOLE)
    assert done.returncode == 0 and "resumed in phase" in done.stdout, done.stderr
    ours, theirs = (np.load(where / "scores_hint.npy") for where in (folder, trained / mode))
    assert np.array_equal(ours, theirs)
    assert summary_of(folder)["val_bpb"] == summary_of(trained / mode)["val_bpb"]


def test_a_run_cut_off_after_the_hints_keeps_them(trained, data, tmp_path, monkeypatch):
    """The last stage is kept with its hints, or neither is."""
    assert SMALL["CHECKPOINT_EVERY_SECONDS"] < 1
    folder = tmp_path / "run"
    done = go(data, folder, KILL_STAGE="ttt", **NO_BASELINE, **WHOLE)  # the stage of sliding windows has ended
    assert done.returncode == -9
    done = go(data, folder, **NO_BASELINE, **WHOLE)
    assert done.returncode == 0, done.stderr
    assert summary_of(folder)["val_bpb_hint"] == summary_of(trained / "phased")["val_bpb_hint"]

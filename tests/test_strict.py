"""The strict reading of rule C1: on CPUs no score depends, in any bit, on what the stream holds after its target.

Pairs of validation streams agree up to a place and differ after it: in their text, in where documents end, in how long
they are. Every score before the place must be the same bits.
"""

import numpy as np
import pytest

import train_gpt as tg
from helpers import TINY, config
from test_legality import POLY, RECORD, VOCABULARY, evaluate, evaluator_of

# Targets of each document: of one target, of one chunk, longer than the context, beyond the first chunk sizes.
LENGTHS = (30, 1, 70, 7, 265, 1, 1, 33, 12, 90, 5, 64, 16, 1, 41, 8)
PHASED = dict(
    TTT_MODE="phased",
    TTT_BATCH_SIZE=4,
    TTT_CHUNK_SIZE=16,
    TTT_EVAL_SEQ_LEN=48,
    TTT_LORA_RANK=4,
    TTT_LORA_ALPHA=8,
    TTT_LORA_LR=0.02,
    PHASED_TTT_PREFIX_DOCS=8,
    PHASED_TTT_NUM_PHASES=2,
    GLOBAL_TTT_CHUNK_TOKENS=40,
    GLOBAL_TTT_LR=0.05,
)
CHUNK = dict(TTT_MODE="chunk", TTT_CHUNK_TOKENS=100, TTT_EPOCHS=2, TTT_LR=0.05, EVAL_SEQ_LEN=48, EVAL_STRIDE=12)
EVALUATIONS = {
    "sliding": dict(TTT_MODE="none", EVAL_SEQ_LEN=48, EVAL_STRIDE=5),
    "phased": PHASED,
    "phased, batches of 2": dict(PHASED, TTT_BATCH_SIZE=2, TTT_GRAD_STEPS=2, TTT_WARM_START_A=0),
    "phased, short chunks": dict(PHASED, TTT_SHORT_DOC_CHUNKS=1, TTT_CHUNK_SIZE=32, TTT_BATCH_SIZE=2),
    "phased, short chunks, batches of 4": dict(PHASED, TTT_SHORT_DOC_CHUNKS=1, TTT_CHUNK_SIZE=32),
    "phased by tokens": dict(PHASED, PHASED_TTT_PREFIX_TOKENS=400),
    "phased, cache": dict(PHASED, TTT_RECOMPUTE_TOKENS=5),
    "phased, cache, short chunks": dict(PHASED, TTT_RECOMPUTE_TOKENS=9, TTT_SHORT_DOC_CHUNKS=1, TTT_BATCH_SIZE=2),
    "phased, mixed": dict(PHASED, TTT_PLAIN_WEIGHT=0.4, HINT_CHUNK_TOKENS=16),
    "chunk": CHUNK,
    "chunk, decay": dict(CHUNK, TTT_DECAY_TOKENS=250),
}
NOT_STRICT = {
    "length order": dict(PHASED, TTT_ORDER="length", TTT_STREAMS=2),
    "length order, short chunks": dict(PHASED, TTT_ORDER="length", TTT_SHORT_DOC_CHUNKS=1, TTT_CHUNK_SIZE=32),
    "chunk, decay over the stream": dict(CHUNK, TTT_DECAY_TOKENS=-1),
}


def documents(lengths, seed):
    """Tokens of documents of so many targets, each with its BOS; the last one's end is not there."""
    draw = np.random.default_rng(seed).integers
    return [t for n in lengths for t in (tg.BOS_ID, *draw(4, VOCABULARY, n - 1).tolist())]


STREAM = [*documents(LENGTHS, 1), 9]


def other_text(tokens, cut):
    return tokens[:cut] + [t if t == tg.BOS_ID else 4 + (t + 100) % (VOCABULARY - 4) for t in tokens[cut:]]


def moved_border(tokens, cut):
    """The next document begins 3 tokens later; the text is the same but for that."""
    place = tokens.index(tg.BOS_ID, cut)
    return [*tokens[:place], *tokens[place + 1 : place + 4], tg.BOS_ID, *tokens[place + 4 :]]


def appended(tokens, cut):
    return [*tokens[:cut], *documents((100, 3, 300, 1), cut), *tokens[cut:], *documents((1, 70, 400), 3)]


def removed(tokens, cut):
    return tokens[:cut]


def longer(tokens, cut):
    return tokens[:cut] + np.random.default_rng(cut).integers(4, VOCABULARY, 330).tolist() + tokens[cut:]


CHANGES = {
    "float32": ((other_text, 97), (moved_border, 233), (appended, 418), (removed, 160), (longer, 375)),
    "bfloat16": ((other_text, 420), (moved_border, 500), (appended, 34), (removed, 375), (longer, 110)),
}


def nll_of(tokens, folder, base, knobs):
    """Each target's score, of the evaluation that the settings ask for."""
    evaluator, model = evaluator_of(tokens, folder, base, knobs)
    held, close = [], tg.ScoreLedger.close
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg.ScoreLedger, "close", lambda ledger, *stage: (held.append(ledger), close(ledger, *stage))[1])
        evaluate(evaluator, model)
    return held[-1].nll.copy()


def agreement(first, second):
    """Scores that two streams must share: those of the targets in which they agree from the start."""
    shorter = min(len(first), len(second))
    different = np.flatnonzero(np.array(first[:shorter]) != np.array(second[:shorter]))
    return int(different[0] if len(different) else shorter) - 1


def broken(folder, base, knobs, changes=None):
    """[(change, place, first score before it that differs)], and whether every score after it ever stayed."""
    before, wrong, stayed = nll_of(STREAM, folder, base, knobs), [], []
    for change, cut in changes or CHANGES[knobs["COMPUTE_DTYPE"]]:
        other = change(STREAM, cut)
        after, same = nll_of(other, folder, base, knobs), agreement(STREAM, other)
        assert same >= cut - 1 and np.isfinite(after).all()
        different = np.flatnonzero(before[:same] != after[:same])
        if len(different):
            wrong.append((change.__name__, cut, int(different[0]), float(np.abs(before[:same] - after[:same]).max())))
        stop = min(len(before), len(after))
        stayed.append(stop > same and np.array_equal(before[same:stop], after[same:stop]))
    return wrong, any(stayed)


@pytest.mark.parametrize("base, dtype", [(RECORD, "float32"), (POLY, "bfloat16")], ids=["record", "poly"])
@pytest.mark.parametrize("name", EVALUATIONS)
def test_no_score_depends_on_what_follows(name, base, dtype, tmp_path):
    changes = CHANGES[dtype]
    if base is POLY:  # each evaluation meets every change with the other base: here two of them, in turns
        begin = 2 * list(EVALUATIONS).index(name)
        changes = [changes[i % len(changes)] for i in (begin, begin + 1)]
    wrong, stayed = broken(tmp_path, base, {**EVALUATIONS[name], "COMPUTE_DTYPE": dtype}, changes)
    assert wrong == [] and not stayed


@pytest.mark.parametrize("name", NOT_STRICT)
def test_what_is_not_strictly_causal_is_seen(name, tmp_path):
    """Else the proof above could not fail."""
    wrong, _ = broken(tmp_path, TINY, {**NOT_STRICT[name], "COMPUTE_DTYPE": "float32"})
    assert wrong and max(row[-1] for row in wrong) > 1e-3  # far more than rounding


def test_strictly_causal_follows_from_the_settings():
    for knobs in EVALUATIONS.values():
        assert config(**knobs).strictly_causal
    for knobs in NOT_STRICT.values():
        assert not config(**knobs).strictly_causal
    assert config(TTT_MODE="none", TTT_ORDER="length", TTT_DECAY_TOKENS=-1).strictly_causal  # neither is used
    assert tg.Config().ttt_order == "stream" and tg.Config().strictly_causal


def test_a_phase_starts_from_one_state(tmp_path):
    """The order in which a phase's documents are computed, and in which batches, is none of a score's business."""
    knobs = dict(PHASED, COMPUTE_DTYPE="float32")
    expected = nll_of(STREAM, tmp_path, RECORD, knobs)
    for size in (1, 3, 16):
        np.testing.assert_allclose(nll_of(STREAM, tmp_path, RECORD, dict(knobs, TTT_BATCH_SIZE=size)), expected, 1e-4)


def test_small_chunks_and_small_batches(tmp_path):
    """A window of few rows is padded, but never beyond its adapters."""
    for size, batch in ((1, 2), (2, 2), (3, 1), (2, 3)):
        knobs = dict(PHASED, TTT_CHUNK_SIZE=size, TTT_BATCH_SIZE=batch, COMPUTE_DTYPE="float32")
        first, second = (nll_of(tokens, tmp_path, TINY, knobs) for tokens in (STREAM[:60], STREAM[:45]))
        assert np.array_equal(first[:44], second) and np.isfinite(first).all()


@pytest.mark.parametrize("name", ["sliding", "chunk"])
def test_a_batch_that_is_not_full(name, tmp_path):
    """A short stream has fewer rows in its only batch than a long one in each of its many."""
    knobs = dict(EVALUATIONS[name], EVAL_STRIDE=48, VAL_BATCH_SIZE=48 * 5, COMPUTE_DTYPE="float32")
    rows = [evaluator_of(STREAM[:n], tmp_path, RECORD, knobs)[0].batch_size for n in (31, 97, len(STREAM))]
    assert rows == [1, 2, 5]
    whole = nll_of(STREAM, tmp_path, RECORD, knobs)
    for stop in (31, 97, 230):
        assert np.array_equal(nll_of(STREAM[:stop], tmp_path, RECORD, knobs), whole[: stop - 1])


def test_every_targets_score_is_written(tmp_path):
    """EVAL_SCORES: one float32 for each target, in stream order."""
    evaluator, model = evaluator_of(STREAM[:100], tmp_path, TINY, dict(PHASED, EVAL_SCORES=1, COMPUTE_DTYPE="float32"))
    evaluator.run.folder = tmp_path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg.Run, "path", lambda run, name: tmp_path / name)
        nats = evaluate(evaluator, model)
    found = np.load(tmp_path / "scores_ttt.npy")
    assert found.dtype == np.float32 and found.shape == (99,)
    assert found.sum(dtype=np.float64) == pytest.approx(nats, rel=1e-9)

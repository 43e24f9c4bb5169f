"""TTT_RECOMPUTE_TOKENS: scores against a plain loop over whole documents, and where a cache changes nothing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from helpers import TINY, config, tg
from test_ttt import PHASED, RECORD, scores, stream
from test_ttt import prepared as prepared_in

STREAM = dict(PHASED, TTT_ORDER="stream", TTT_LORA_LR=0.05)
ONE_PHASE = dict(STREAM, PHASED_TTT_PREFIX_DOCS=0, PHASED_TTT_PREFIX_TOKENS=0)
MODELS = {
    "record": RECORD,
    "windows, key offset": dict(RECORD, WINDOW_ATTN_SIZE=4, WINDOW_ATTN_LAYERS="1,2", KEY_OFFSET=1),
    "tiny": TINY,
}


def prepared(folder, *arguments, **knobs):
    """As in test_ttt.py, in a folder that need not be there."""
    folder.mkdir(exist_ok=True)
    return prepared_in(folder, *arguments, **knobs)


def plain_attention(model, documents, stored, fresh, context, seen):
    """Attention over a whole document. Keys and values up to place `fresh` are those of an earlier pass."""
    place = iter(range(1000))
    window = model.config.window_attn_size

    def attend(q, k, v, local=False):
        call, length = next(place), q.size(1)
        if call in stored:
            old = max(0, min(fresh + 1, length))
            k, v = (torch.cat((s[:, :old], x[:, old:]), 1) for s, x in zip(stored[call], (k, v), strict=True))
        seen[call] = k.detach(), v.detach()
        distance = torch.arange(length)[:, None] - torch.arange(length)
        sees = (distance >= 0) & (distance < context)
        sees &= distance <= (window if local and window else length)
        k, v = (x.repeat_interleave(q.size(2) // k.size(2), 2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=sees).transpose(1, 2)

    return attend


def plain_scores(evaluator, model, adapt):
    """Each target's nats: every document alone, each of its chunks with the whole document before it."""
    c, tokens = evaluator.config, evaluator.tokens
    ttt = tg.CachedTTT(evaluator, model, adapt)
    view, nats = ttt.forward, []
    for begin, end in zip(ttt.offsets[:-1], ttt.offsets[1:], strict=True):
        if adapt:
            ttt.adapters.start(ttt.phase_a)
        stored, length = {}, int(end - begin)
        for first in range(0, length, c.ttt_chunk_size):
            last = min(first + c.ttt_chunk_size, length)
            fresh, seen = first - c.ttt_recompute_tokens + c.lead_tokens - 1, {}  # the last place with an old key
            fresh = fresh if first >= c.ttt_recompute_tokens else -1  # the window begins with the document
            view.attention = lambda d, *_, s=stored, f=fresh, n=seen: plain_attention(view, d, s, f, c.ttt_context, n)
            ids, targets = (
                torch.from_numpy(tokens[begin + i : begin + last + i].astype(np.int64))[None] for i in (0, 1)
            )
            documents = tg.Documents(torch.zeros(ids.shape, dtype=torch.int32), torch.tensor([0, last]))
            leaves = ttt.adapters.leaves(1) if adapt else []
            pairs = ttt.adapters.pairs(leaves) if adapt else None
            for _ in range(c.ttt_grad_steps):
                nll = view(ids, targets[:, first:], documents, looped=c.loops, adapters=pairs)[0]
                if not nats or len(nats) < begin + last:
                    nats += nll[0].tolist()
                if adapt and last < length:
                    ttt.adapters.step(1, list(torch.autograd.grad(nll.mean(), leaves)))
            stored.update(seen)
    return np.array(nats)


@pytest.mark.parametrize(
    ("name", "recompute"),
    [("record", 1), ("record", 7), ("windows, key offset", 2), ("windows, key offset", 9), ("tiny", 1), ("tiny", 16)],
)
def test_scores_are_those_of_a_plain_loop_over_whole_documents(tmp_path, data, name, recompute):
    knobs = dict(MODELS[name], **ONE_PHASE, TTT_RECOMPUTE_TOKENS=recompute)
    found = scores(*prepared(tmp_path, data, knobs))
    alone = prepared(tmp_path / "alone", data, knobs, TTT_BATCH_SIZE=1)
    assert found == pytest.approx(plain_scores(*alone, adapt=True), abs=1e-9)
    everything = scores(*prepared(tmp_path / "all", data, knobs, TTT_RECOMPUTE_TOKENS=0))
    assert np.abs(found - everything).max() > 1e-4  # the cache's keys are older


def test_windows_that_are_dropped_leave_nothing_behind(tmp_path, data):
    """Those of a warmup and a projection, which have other numbers of documents."""
    knobs = dict(RECORD, **STREAM, TTT_RECOMPUTE_TOKENS=3)
    expected = scores(*prepared(tmp_path, data, knobs))
    ttt = tg.CachedTTT(*prepared(tmp_path / "warm", data, knobs))
    ttt.warm_up()
    for count in (2, 4):
        documents = np.arange(count)
        ttt.start_batch(ttt.adapters, documents)
        ttt.drop_step(*ttt.window(documents, 0))
    ttt()
    assert ttt.ledger.nll.copy() == pytest.approx(expected, abs=1e-12)


def test_without_learning_too(tmp_path, data):
    knobs = dict(RECORD, **ONE_PHASE, TTT_RECOMPUTE_TOKENS=3)
    found = scores(*prepared(tmp_path, data, knobs), adapt=False)
    assert found == pytest.approx(plain_scores(*prepared(tmp_path / "alone", data, knobs), adapt=False), abs=1e-9)


def test_documents_that_fit_into_the_window_score_as_without_a_cache(tmp_path, data):
    tokens = stream((3, 15, 16, 9, 1, 12, 16, 8, 5, 7))
    knobs = dict(RECORD, **STREAM, TTT_GRAD_STEPS=2)
    pair = [
        scores(*prepared(tmp_path / str(recompute), data, knobs, tokens, TTT_RECOMPUTE_TOKENS=recompute))
        for recompute in (0, 16)
    ]
    assert pair[1] == pytest.approx(pair[0], abs=1e-9)


def test_without_learning_documents_within_the_context_score_as_without_a_cache(tmp_path, data):
    tokens = stream((3, 24, 16, 9, 1, 23))
    pair = [
        scores(
            *prepared(tmp_path / str(recompute), data, RECORD, tokens, **STREAM, TTT_RECOMPUTE_TOKENS=recompute), False
        )
        for recompute in (0, 1)
    ]
    assert pair[1] == pytest.approx(pair[0], abs=1e-9)


def test_a_batch_costs_its_windows_and_not_its_context(tmp_path, data):
    ttt = tg.CachedTTT(*prepared(tmp_path, data, RECORD, **STREAM, TTT_RECOMPUTE_TOKENS=3))
    longest = int(np.argmax(ttt.lengths))
    assert ttt.cost(np.array([longest])).tolist() == [ttt.chunk_counts[longest] * (8 + 3)]
    batch, scored = ttt.window(np.array([longest, 0]), 3)
    assert batch.ids.shape == (2, 11) and scored.shape == (2, 8)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        (dict(TTT_ORDER="length", TTT_RECOMPUTE_TOKENS=4), "must be 0 with TTT_ORDER=length"),
        (
            dict(TTT_RECOMPUTE_TOKENS=17),
            "must be 0, or at least 1 and at most TTT_EVAL_SEQ_LEN less TTT_CHUNK_SIZE, 16",
        ),
        (dict(TTT_RECOMPUTE_TOKENS=1, KEY_OFFSET=1), "at least 2"),
        (dict(TTT_RECOMPUTE_TOKENS=-1), "TTT_RECOMPUTE_TOKENS"),
    ],
)
def test_settings_that_make_no_window_are_refused(knobs, message):
    with pytest.raises(tg.ConfigError, match=message):
        config(RECORD, **(STREAM | knobs))


def test_sizes_of_windows_do_not_tell_how_long_documents_are(tmp_path, data):
    knobs = dict(RECORD, **STREAM) | dict(TTT_SHORT_DOC_CHUNKS=1, TTT_EVAL_SEQ_LEN=64, TTT_CHUNK_SIZE=48)
    shapes = []
    for longest in (20, 300):
        streamed = prepared(tmp_path / str(longest), data, knobs, stream((longest, 9)), TTT_RECOMPUTE_TOKENS=3)
        ttt = tg.CachedTTT(*streamed)
        batch, scored = ttt.window(np.array([0]), 0)
        shapes.append((batch.ids.shape, scored.shape, ttt.context_of(batch)[0].mask.shape))
    assert shapes[0] == shapes[1] == ((2, 51), (2, 48), (51, 64 + 51))

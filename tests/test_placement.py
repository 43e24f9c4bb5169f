"""On CPUs a token's score is bit-identical whatever comes after it and wherever its document lies in the batch."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg
from helpers import POLY_LIKE, RECORD_LIKE, build_model, config, examples

CPU = torch.device("cpu")
LENGTHS = st.one_of(st.integers(1, 20), st.sampled_from([16, 17, 31, 32, 33, 64, 65, 127, 128, 129, 256, 257, 300]))
# Layouts of settings that are hard on the arithmetic: odd widths, one head, gates of all inputs.
EXTRA = {
    "record": (RECORD_LIKE, {}),
    "poly": (POLY_LIKE, {}),
    "dense gate, untied": (
        RECORD_LIKE,
        dict(SPARSE_ATTN_GATE_ENABLED=0, GATED_ATTN_ENABLED=1, TIE_EMBEDDINGS=0, NUM_HEADS=1, NUM_KV_HEADS=1),
    ),
    "odd widths": (
        POLY_LIKE,
        dict(
            VOCAB_SIZE=389, MODEL_DIM=36, NUM_HEADS=2, NUM_KV_HEADS=1, BIGRAM_DIM=7, VE_DIM=5, ATTN_OUT_GATE_ENABLED=1
        ),
    ),
}


def model_of(name, dtype, **more):
    base, knobs = EXTRA[name]
    knobs = dict(TRAIN_SEQ_LEN=1024, TRAIN_BATCH_TOKENS=1024, ATTENTION="blocked", **knobs)
    c = config(base, COMPUTE_DTYPE=dtype, **{**knobs, **more})
    return c, build_model(c)


def document(generator, c, length):
    """A document's inputs and targets [length]."""
    tokens = generator.integers(4, c.vocab_size, length + 1)
    tokens[0] = tg.BOS_ID
    return tokens[:-1], tokens[1:]


def batch_of(rows, width):
    """A Batch of rows of documents (inputs, targets), filled up with a document of padding."""
    shape = (len(rows), width)
    ids, targets, starts = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int32)
    for r, row in enumerate(rows):
        place = 0
        for inputs, wanted in row:
            stop = place + len(inputs)
            ids[r, place:stop], targets[r, place:stop], starts[r, place:stop] = inputs, wanted, place
            place = stop
        starts[r, place:] = place
    return tg.to_device(ids, targets, starts, CPU)


def scores(model, batch, looped=True, **arguments):
    with torch.no_grad():
        return model(*batch, looped=looped, **arguments)[0]


def width_of(rows, more=0):
    return max(sum(len(inputs) for inputs, _ in row) for row in rows) + more


@pytest.mark.parametrize("dtype, threads", [("float32", 2), ("bfloat16", 1)])
@pytest.mark.parametrize("name", EXTRA)
def test_a_documents_scores_do_not_depend_on_its_place(name, dtype, threads):
    """Its row, its offset in the row, its companions, and how many rows and tokens there are."""
    c, model = model_of(name, dtype)
    looped, before = bool(c.loops), torch.get_num_threads()

    @examples(max_examples=12 // threads)  # threads wait for each other where cores are shared
    @given(LENGTHS, st.lists(st.lists(LENGTHS, max_size=3), min_size=1, max_size=4), st.integers(0, 9), st.data())
    def check(length, companions, more, data):
        generator = np.random.default_rng(length)
        own = document(generator, c, length)
        rows = [[document(generator, c, n) for n in row] for row in companions]
        row = data.draw(st.integers(0, len(rows) - 1))
        place = data.draw(st.integers(0, len(rows[row])))
        begin = sum(companions[row][:place])
        rows[row].insert(place, own)
        alone = scores(model, batch_of([[own]], length), looped)[0]
        packed = scores(model, batch_of(rows, width_of(rows, more)), looped)[row, begin : begin + length]
        assert torch.isfinite(alone).all() and torch.equal(packed, alone)

    torch.set_num_threads(threads)
    try:
        check()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EXTRA)
def test_a_score_does_not_depend_on_what_comes_after_it(name, dtype):
    """Other text from a place on, a document that ends there or goes on, and documents after it or none."""
    c, model = model_of(name, dtype)
    looped = bool(c.loops)

    @examples(max_examples=12)
    @given(LENGTHS, st.lists(LENGTHS, max_size=3), st.lists(LENGTHS, max_size=3), LENGTHS, st.data())
    def check(length, earlier, later, new_length, data):
        generator = np.random.default_rng(length)
        before = [document(generator, c, n) for n in earlier]
        inputs, targets = document(generator, c, length)
        place = data.draw(st.integers(1, length))  # inputs up to it stay, and the targets up to it
        other_inputs, other_targets = document(generator, c, place + new_length)
        other_inputs[:place], other_targets[:place] = inputs[:place], targets[:place]
        rows = [[*before, (inputs, targets), *(document(generator, c, n) for n in later)]]
        changed = [[*before, (other_inputs, other_targets)]]
        same = sum(earlier) + place
        first, second = (scores(model, batch_of(r, width_of(r)), looped)[0, :same] for r in (rows, changed))
        assert torch.isfinite(first).all() and torch.equal(first, second)

    check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_last_tokens_and_temperature_keep_the_bits(dtype):
    c, model = model_of("record", dtype)
    own = document(np.random.default_rng(1), c, 150)
    batch = batch_of([[own]], 150)
    for temperature in (1.0, 0.9):
        whole = scores(model, batch, temperature=temperature)
        for last in (2, 3, 7, 48):
            tail = batch._replace(targets=batch.targets[:, -last:])
            assert torch.equal(scores(model, tail, temperature=temperature), whole[:, -last:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_large_vocabulary_and_many_tokens_keep_the_bits(dtype):
    """Losses are computed in blocks of 2^20 logits, whose last one may be a single row."""
    c, model = model_of("record", dtype, VOCAB_SIZE=40_000)
    generator = np.random.default_rng(2)
    own = document(generator, c, 26 * 3 + 1)
    rows = [[document(generator, c, 90), own], [document(generator, c, 300)], [own]]
    alone = scores(model, batch_of([[own]], 79))[0]
    packed = scores(model, batch_of(rows, 300))
    assert torch.equal(packed[0, 90:169], alone) and torch.equal(packed[2, :79], alone)


@pytest.mark.parametrize("name", ["record", "poly"])
def test_positions_begin_with_the_document(name):
    """In exact arithmetic blocks and a mask over whole rows are the same, wherever documents begin."""
    results = []
    for attention in ("sdpa", "blocked"):
        c, model = model_of(name, "float64", ATTENTION=attention)
        generator = np.random.default_rng(3)
        rows = [[document(generator, c, n) for n in row] for row in ((40, 1, 129), (300,), (2, 17, 150))]
        nll, lse = model(*batch_of(rows, 310), looped=bool(c.loops))
        loss = nll.sum() + lse.square().sum()
        leaves = list(model.parameters())
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        results.append([nll, lse, *(g for g in gradients if g is not None)])
    assert len(results[0]) > 20
    for x, y in zip(*results, strict=True):
        assert torch.allclose(x, y, rtol=1e-9, atol=1e-9 * y.abs().max().item())

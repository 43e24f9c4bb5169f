"""Test-time training against a plain loop over documents, and what its knobs, its ledger and its inputs must do.

Run as a script, it is one rank of the test of several ranks.
"""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import (
    RECORD_LIKE,
    ROOT,
    TINY,
    Clock,
    build_model,
    built_once,
    config,
    documents_from,
    examples,
    fork,
    random_batch,
    single_run,
    strings,
    tg,
    train_tokenizer,
)
from test_evaluation import evaluator_of, naive_nats

RECORD = dict(RECORD_LIKE, NUM_LAYERS=4, LOOP_START=1, LOOP_END=1, NUM_LOOPS=1, PARALLEL_START_LAYER=3, XSA_LAST_N=4)
PHASED = dict(
    TTT_MODE="phased",
    TTT_ORDER="length",
    TTT_BATCH_SIZE=4,
    TTT_STREAMS=3,
    TTT_CHUNK_SIZE=8,
    TTT_EVAL_SEQ_LEN=24,
    TTT_LORA_RANK=4,
    TTT_LORA_ALPHA=6,
    TTT_LORA_LR=0.01,
    PHASED_TTT_PREFIX_DOCS=6,
    PHASED_TTT_NUM_PHASES=2,
    GLOBAL_TTT_CHUNK_TOKENS=30,
    GLOBAL_TTT_LR=0.05,
    QK_GAIN_INIT=2,
)
CHUNK = dict(
    TTT_MODE="chunk",
    TTT_CHUNK_TOKENS=50,
    TTT_EPOCHS=2,
    TTT_LR=0.05,
    TTT_DECAY_TOKENS=-1,
    EVAL_SEQ_LEN=24,
    EVAL_STRIDE=6,
)
LENGTHS = (30, 7, 90, 1, 12, 45, 8, 1, 24, 16)


def stream(lengths=LENGTHS, seed=0):
    """Tokens of documents of so many targets; the last one has no end."""
    draw = np.random.default_rng(seed).integers
    return [t for n in lengths for t in (tg.BOS_ID, *draw(4, 384, n - 1).tolist())] + [9]


def prepared(folder, data, base, tokens=None, **knobs):
    """(Evaluator, model with random weights) of settings."""
    knobs = {**base, "COMPUTE_DTYPE": "float64", **knobs}
    evaluator = evaluator_of(folder / "data", data, stream() if tokens is None else tokens, **knobs)
    return evaluator, build_model(evaluator.config, seed=1, spread=0.2)


def method_of(c):
    """The class that does what the settings ask for."""
    phased = tg.PhasedTTT if c.ttt_order == "stream" else tg.LengthOrderTTT
    phased = tg.CachedTTT if c.ttt_recompute_tokens else phased
    return dict(phased=phased, chunk=tg.ChunkTTT)[c.ttt_mode]


def scores(evaluator, model, adapt=True):
    """Each target's nats."""
    ttt = method_of(evaluator.config)(evaluator, model, adapt)
    total = ttt()
    assert total.nats == pytest.approx(ttt.ledger.nll.sum(dtype=np.float64), rel=1e-12)
    assert (total.tokens, total.bytes) == (len(evaluator.tokens) - 1, evaluator.bytes)
    return ttt.ledger.nll.copy()


# --------------------------------------------------------------------------------------------- a plain loop, in float64


class PlainAdapters:
    """Low-rank maps of one document, put into a model by hooks: the model's own adapters stay out of it."""

    def __init__(self, model, a, c):
        self.model, self.scale, self.handles = model, c.ttt_lora_alpha / c.ttt_lora_rank, []
        widths = dict(q=c.model_dim, k=c.kv_dim, v=c.kv_dim, attention=c.model_dim, mlp=c.model_dim, head=c.vocab_size)
        self.a = {key: x.double().clone().requires_grad_() for key, x in a.items()}
        self.b = {
            key: torch.zeros(len(x), widths[key], c.ttt_lora_rank, dtype=torch.float64).requires_grad_()
            for key, x in a.items()
        }
        self.squares, self.steps = [torch.zeros_like(p) for p in self.parameters()], 0
        for block in model.blocks:
            self.hook(block.qkv, lambda n, y, widths=block.widths: self.begin(n) or y + self.input_maps(n, y, widths))
            self.hook(block.out, lambda _, y: y + self.map("attention", self.normed))
            self.hook(block.up, lambda n, y: setattr(self, "mlp_input", n) or y)
            self.hook(block.down, lambda _, y: y + self.map("mlp", self.mlp_input))
        self.hook(model.logits, lambda h, y: self.end() or y + self.map("head", h))

    def hook(self, projection, function):
        self.handles.append(projection.register_forward_hook(lambda _, inputs, output: function(inputs[0], output)))

    def begin(self, normed):
        self.normed, self.call = normed, getattr(self, "call", -1) + 1

    def end(self):
        self.call = -1

    def map(self, key, x):
        if key not in self.a:
            return 0
        call = 0 if key == "head" else self.call
        return self.scale * (x @ self.a[key][call].T) @ self.b[key][call].T

    def input_maps(self, normed, y, widths):
        """What q, k and v get, in the places that they have in their product y, and nothing for the gates."""
        maps = [
            self.map(key, normed) + torch.zeros_like(y[..., :width])
            for key, width in zip("qkv", widths[:3], strict=True)
        ]
        return torch.cat([*maps, torch.zeros_like(y[..., sum(widths[:3]) :])], dim=-1)

    def parameters(self):
        return [*self.a.values(), *self.b.values()]

    @torch.no_grad()
    def step(self, loss, c):
        """AdamW as the specification has it."""
        gradients = torch.autograd.grad(loss, self.parameters(), allow_unused=True, materialize_grads=True)
        self.steps += 1
        rates = [c.ttt_lora_lr] * len(self.a) + [c.ttt_lora_lr * c.ttt_loraplus_lr_ratio] * len(self.b)
        for p, g, s, lr in zip(self.parameters(), gradients, self.squares, rates, strict=True):
            s.copy_(c.ttt_beta2 * s + (1 - c.ttt_beta2) * g**2)
            p *= 1 - lr * c.ttt_weight_decay
            p -= lr * g / ((s / (1 - c.ttt_beta2**self.steps)).sqrt() + 1e-10)

    def remove(self):
        """Takes the hooks away; returns A."""
        for handle in self.handles:
            handle.remove()
        return {key: a.detach() for key, a in self.a.items()}


def plain_nll(model, tokens, looped):
    """NLL of each token but the first, given all before it."""
    ids, targets = torch.tensor([tokens[:-1]]), torch.tensor([tokens[1:]])
    return model(ids, targets, documents_from(torch.zeros(ids.shape, dtype=torch.int32)), looped=looped)[0][0]


def plain_document(model, tokens, a, c):
    """A document by itself: score a chunk, then learn from it. Returns its scores and the A that it leaves."""
    n, first = len(tokens) - 1, 0
    adapters, found = PlainAdapters(model, a, c), []
    while first < n:
        size, decisive = c.ttt_chunk_size, first + 1 if c.ttt_order == "stream" else n
        if c.ttt_short_doc_chunks and decisive <= 2000:
            size = 8 if decisive <= 256 else 24
        left = max(0, first + size - c.ttt_context)
        found.append(plain_nll(model, tokens[left : first + size + 1], c.loops)[first - left :].detach())
        for _ in range(c.ttt_grad_steps if first + size < n else 0):
            loss = plain_nll(model, tokens[left : first + size + 1], c.loops)[first - left :].mean()
            with torch.enable_grad():
                adapters.step(loss, c)
        first += size
    return torch.cat(found).numpy(), adapters.remove()


def plain_step(model, pairs, lr, momentum, velocity, c):
    """SGD with momentum on the mean loss of (input, target) pairs, in rows cut at the train length and at BOS.

    Returns the norm of the gradient before it was clipped.
    """
    pieces = []
    for i, (token, target) in enumerate(pairs):
        if i % c.train_seq_len == 0 or token == tg.BOS_ID:
            pieces.append([token])
        pieces[-1].append(target)
    # A row's positions count from its start, which moves no relative angle: pieces stand alone here.
    loss = sum(plain_nll(model, piece, c.loops).sum() for piece in pieces) / len(pairs)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    shrink = min(1.0, 1.0 / (norm + 1e-6))
    with torch.no_grad():
        for p, g, v in zip(parameters, gradients, velocity, strict=True):
            v.copy_(momentum * v + shrink * g)
            p -= lr * v
    return norm


def plain_phased(evaluator, model, first_a):
    """Phased test-time training with one document to a batch, from the specification."""
    c, tokens = evaluator.config, evaluator.tokens.tolist()
    begins = [i for i, t in enumerate(tokens[:-1]) if t == tg.BOS_ID]
    spans = list(zip(begins, [*begins[1:], len(tokens) - 1], strict=True))
    if c.ttt_order == "stream":
        return plain_strict(tokens, spans, model, first_a[0], c)
    order = sorted(spans, key=lambda s: s[0] - s[1])
    cuts = [c.phased_ttt_prefix_docs * (k + 1) // c.phased_ttt_num_phases for k in range(c.phased_ttt_num_phases)]
    result, kept, number = np.zeros(len(tokens) - 1), {}, 0
    for place, (begin, end) in enumerate(order):
        if place in cuts and place:
            plain_global(model, [(tokens[i], tokens[i + 1]) for s in order[:place] for i in range(*s)], c)
            number = 0
        a = kept.get(number % c.ttt_streams, first_a[number % c.ttt_streams])
        result[begin:end], kept[number % c.ttt_streams] = plain_document(model, tokens[begin : end + 1], a, c)
        number += 1
    return result


def plain_strict(tokens, spans, model, a, c):
    """The strict schedule: a phase's documents start from one A, the next phase's from the mean of what they left."""
    result, left = np.zeros(len(tokens) - 1), []
    cuts = [c.phased_ttt_prefix_docs * 2**k // 3**k for k in range(c.phased_ttt_num_phases)]
    if prefix := c.phased_ttt_prefix_tokens:
        cuts = [sum(begin < prefix * 2**k // 3**k for begin, _ in spans) for k in range(c.phased_ttt_num_phases)]
    for place, (begin, end) in enumerate(spans):
        if place in cuts and place:
            plain_global(model, [(tokens[i], tokens[i + 1]) for s in spans[:place] for i in range(*s)], c)
            if c.ttt_warm_start_a:
                a = {key: torch.stack([x[key] for x in left]).mean(0) for key in a}
            left = []
        result[begin:end], own = plain_document(model, tokens[begin : end + 1], a, c)
        left.append(own)
    return result


def plain_global(model, pairs, c):
    """The steps of all weights between phases."""
    size, velocity = c.global_ttt_chunk_tokens, [torch.zeros_like(p) for p in model.parameters()]
    chunks = [pairs[i : i + size] for i in range(0, len(pairs), size)][:-1]
    total = c.global_ttt_epochs * len(chunks)
    for step in range(total):
        lr = c.global_ttt_lr * 0.5 * (1 + math.cos(math.pi * step / total))
        plain_step(model, chunks[step % len(chunks)], lr, c.global_ttt_momentum, velocity, c)


def first_adapters(patch):
    """Collects the A that the first batches begin with, one for each stream, of their first document."""
    start, found = tg.Adapters.start, {}

    def watched(adapters, a):
        start(adapters, a)
        found.setdefault(len(found), {key: a[0].clone() for key, a in adapters.a.items()})

    patch.setattr(tg.Adapters, "start", watched)
    return found


@pytest.mark.parametrize(
    "base, knobs",
    [
        (TINY, dict()),
        (RECORD, dict(TTT_STREAMS=2, GLOBAL_TTT_EPOCHS=2)),
        (RECORD, dict(TTT_ORDER="stream", TTT_GRAD_STEPS=2, TTT_K_LORA=0, TTT_MLP_LORA=0)),
        (
            TINY,
            dict(
                TTT_SHORT_DOC_CHUNKS=1,
                TTT_CHUNK_SIZE=3,
                TTT_ORDER="stream",
                TTT_Q_LORA=0,
                TTT_V_LORA=0,
                TTT_O_LORA=0,
                TTT_BETA2=0.5,
                TTT_WEIGHT_DECAY=5,
                TTT_LORAPLUS_LR_RATIO=3,
                TIE_EMBEDDINGS=0,
            ),
        ),
    ],
)
def test_one_document_at_a_time_is_the_plain_loop(base, knobs, data, tmp_path, monkeypatch):
    """Scores, adapters, the A that is handed on, phases and the steps of all weights."""
    settings = {**PHASED, "TTT_BATCH_SIZE": 1, "TTT_STREAMS": 1, **knobs}
    evaluator, model = prepared(tmp_path, data, base, **settings)
    first_a = first_adapters(monkeypatch)
    found = scores(evaluator, model)
    plain = build_model(evaluator.config, seed=1, spread=0.2)
    expected = plain_phased(evaluator, plain, first_a)
    np.testing.assert_allclose(found, expected, rtol=2e-5)  # adapters are kept in float32
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-7, atol=1e-9)
    still = scores(evaluator, build_model(evaluator.config, seed=1, spread=0.2), adapt=False)
    assert np.abs(found - still).max() > 0.05  # far more than the tolerance


@pytest.mark.parametrize("order", ["length", "stream"])
def test_a_batch_is_its_documents_alone(order, data, tmp_path, monkeypatch):
    """With A drawn anew for each batch, a document's scores are those of the plain loop from its own A."""
    evaluator, model = prepared(
        tmp_path, data, RECORD, **dict(PHASED, TTT_WARM_START_A=0, PHASED_TTT_PREFIX_DOCS=0, TTT_ORDER=order)
    )
    sent, begun, offsets = tg.PhasedTTT.sent, {}, evaluator.documents

    def watched(ttt, batch, scored, *adapting):
        for b, position in enumerate(scored[scored.max(1) >= 0].max(1)):
            document = int(np.searchsorted(offsets, position, side="right")) - 1
            begun.setdefault(document, {key: a[b].clone() for key, a in ttt.adapters.a.items()})
        return sent(ttt, batch, scored, *adapting)

    monkeypatch.setattr(tg.PhasedTTT, "sent", watched)
    found, tokens = scores(evaluator, model), evaluator.tokens.tolist()
    assert len(begun) == len(LENGTHS)
    for document, (begin, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
        expected, _ = plain_document(model, tokens[begin : end + 1], begun[document], evaluator.config)
        np.testing.assert_allclose(found[begin:end], expected, rtol=2e-5)
    assert torch.equal(begun[0]["head"], begun[1]["head"]) == (order == "stream")  # one A for a whole phase


def test_a_is_handed_on_within_a_stream_alone(data, tmp_path, monkeypatch):
    """Document after document in three streams: each begins with the A that the third before it left, B at zero."""
    evaluator, model = prepared(tmp_path, data, TINY, **dict(PHASED, TTT_BATCH_SIZE=1, PHASED_TTT_PREFIX_DOCS=0))
    start, score_and_adapt, begun, left = tg.Adapters.start, tg.PhasedTTT.score_and_adapt, [], []
    monkeypatch.setattr(
        tg.Adapters,
        "start",
        lambda adapters, *rest: (
            start(adapters, *rest),
            begun.append([a.clone() for a in adapters.a.values()]),
            [None for b in adapters.b.values() if b.any()] == [] or pytest.fail("B is not zero"),
        ),
    )
    monkeypatch.setattr(
        tg.PhasedTTT,
        "score_and_adapt",
        lambda ttt, documents: (
            score_and_adapt(ttt, documents),
            left.append([a.clone() for a in ttt.adapters.a.values()]),
        ),
    )
    scores(evaluator, model)
    assert len(begun) == len(left) == len(LENGTHS)
    for number in range(3, len(LENGTHS)):
        assert all(torch.equal(x, y) for x, y in zip(begun[number], left[number - 3], strict=True))
    assert not torch.equal(begun[0][0], begun[1][0]) and not torch.equal(begun[0][0], left[0][0])


# -------------------------------------------------------------------------------------------------------------- windows


@examples(max_examples=200)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(1, 12), st.integers(0, 20), st.data())
def test_a_window_is_one_chunk_of_each_document_with_its_context(lengths, size, more, data):
    """Every target is scored once over the chunks; its sequence holds its own context alone, and padding is apart."""
    lengths, context = np.array(lengths), size + more
    offsets = np.cumsum([0, *lengths])
    tokens = np.arange(1000, 1001 + offsets[-1], dtype=np.uint16)  # a token says where it stands
    sizes = np.array(data.draw(st.lists(st.integers(1, size), min_size=len(lengths), max_size=len(lengths))))
    ttt = SimpleNamespace(
        offsets=offsets,
        lengths=lengths,
        chunk_bounds=lambda documents, chunk: (chunk * sizes[documents], (chunk + 1) * sizes[documents]),
        tokens=tokens,
        run=single_run(),
        config=SimpleNamespace(ttt_context=context, ttt_batch_size=8),
    )
    counts, seen = -(-lengths // sizes), np.zeros(offsets[-1], int)
    for chunk in range(counts.max()):
        some = np.flatnonzero(counts > chunk)
        (ids, targets, documents), scored = tg.PhasedTTT.window(ttt, some, chunk)
        last = scored.shape[1]
        assert last == max(2, sizes[some].max()) <= ids.shape[1] <= max(context, last)
        assert len(ids) == max(2, len(some)) and torch.equal(targets, ids[:, -last:] + 1)  # no size is ever 1
        assert (scored[len(some) :] == -1).all()  # a row of padding
        for b, document in enumerate(some):
            first = chunk * sizes[document]
            expected = offsets[document] + np.arange(first, min(first + sizes[document], lengths[document]))
            places = np.flatnonzero(scored[b] >= 0)
            assert scored[b, places].tolist() == expected.tolist()
            assert places[0] == last - sizes[document]  # the chunk's full size ends the row, wherever its text ends
            seen[expected] += 1
            stop = ids.shape[1] - last + places[-1] + 1
            begin = documents.starts[b, -1].item()
            inputs = ids[b, begin:stop].numpy() - 1000 - offsets[document]
            left = max(0, first + sizes[document] - context)
            assert inputs.tolist() == list(range(left, expected[-1] - offsets[document] + 1))
            assert (documents.starts[b, begin:] == begin).all() and (documents.starts[b, :begin] == 0).all()
    assert (seen == 1).all()


def test_chunks_by_document_length(data, tmp_path):
    tokens = stream((2, 256, 257, 2000, 2001, 3))
    for short, expected in ((1, [8, 8, 24, 24, 96, 8]), (0, [96] * 6)):
        evaluator, model = prepared(
            tmp_path,
            data,
            TINY,
            tokens,
            **dict(PHASED, TTT_SHORT_DOC_CHUNKS=short, TTT_CHUNK_SIZE=96, TTT_EVAL_SEQ_LEN=128),
        )
        ttt = method_of(evaluator.config)(evaluator, model)
        assert ttt.chunk_sizes.tolist() == expected
        assert ttt.chunk_counts.tolist() == np.ceil(ttt.lengths / expected).tolist()


def test_a_chunk_is_at_most_the_context(data, tmp_path):
    """Else a chunk's first targets would be in no window."""
    evaluator, model = prepared(tmp_path, data, TINY, **dict(PHASED, TTT_CHUNK_SIZE=99, TTT_EVAL_SEQ_LEN=20))
    whole = scores(evaluator, model, adapt=False).sum()
    assert whole == pytest.approx(naive_nats(model, evaluator.tokens.tolist(), 20, 20), rel=1e-10)
    assert np.isfinite(scores(evaluator, model)).all()


@pytest.mark.parametrize(
    "order, cases, documents",
    [
        (
            "length",
            ((6, 2, [3, 6]), (6, 4, [1, 3, 4, 6]), (2, 5, [1, 2]), (0, 3, []), (1, 1, [1]), (99, 0, [2, 5, 7])),
            [2, 5, 0, 8, 9, 4, 6, 1, 3, 7],
        ),
        (
            "stream",
            (
                (6, 2, [4, 6]),
                (6, 4, [1, 2, 4, 6]),
                (9, 0, [1, 2, 4, 6, 9]),
                (0, 3, []),
                (99, 0, [1, 2, 3, 5, 8]),
                (99, 4, []),
            ),
            list(range(10)),
        ),
    ],
)
def test_phases_and_order(order, cases, documents, data, tmp_path):
    """Ends of phases: evenly spread, the longest first; in stream order, 1.5 times as much each. None after the end."""
    for prefix, phases, expected in cases:
        knobs = dict(TTT_ORDER=order, PHASED_TTT_PREFIX_DOCS=prefix, PHASED_TTT_NUM_PHASES=phases)
        evaluator, model = prepared(tmp_path, data, TINY, **dict(PHASED, **knobs))
        ttt = method_of(evaluator.config)(evaluator, model)
        assert ttt.phase_ends == expected and ttt.order.tolist() == documents


@pytest.mark.parametrize("prefix, phases, expected", [(128, 3, [3, 4]), (129, 1, [5]), (10**5, 0, [1, 3, 6])])
def test_phases_by_tokens(prefix, phases, expected, data, tmp_path):
    """A phase holds the documents that begin in its tokens."""
    knobs = dict(TTT_ORDER="stream", PHASED_TTT_PREFIX_TOKENS=prefix, PHASED_TTT_NUM_PHASES=phases)
    evaluator, model = prepared(tmp_path, data, TINY, **dict(PHASED, **knobs))
    assert method_of(evaluator.config)(evaluator, model).phase_ends == expected


# ---------------------------------------------------------------------------------------------------------- no learning


@pytest.mark.parametrize("base", [TINY, RECORD], ids=["tiny", "record"])
@pytest.mark.parametrize(
    "knobs",
    [
        dict(PHASED, TTT_LORA_LR=0, GLOBAL_TTT_LR=0),
        dict(CHUNK, TTT_LR=0),
        dict(PHASED, TTT_LORA_LR=0, GLOBAL_TTT_LR=0, COMPUTE_DTYPE="bfloat16", TTT_ORDER="stream"),
    ],
)
def test_rates_of_zero_are_exactly_the_baseline(base, knobs, data, tmp_path):
    evaluator, model = prepared(tmp_path, data, base, **knobs)
    before = scores(evaluator, model, adapt=False)
    assert np.array_equal(scores(evaluator, model), before)
    kept = build_model(evaluator.config, seed=1, spread=0.2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), kept.parameters(), strict=True))


def test_the_baseline_is_that_of_isolated_windows(data, tmp_path):
    """Without learning, chunks of as many targets as a sliding window's stride see the context that it does."""
    for base in (TINY, RECORD):
        evaluator, model = prepared(tmp_path, data, base, **dict(PHASED, TTT_CHUNK_SIZE=24))
        whole = scores(evaluator, model, adapt=False).sum()
        assert whole == pytest.approx(naive_nats(model, evaluator.tokens.tolist(), 24, 24), rel=1e-10)
        evaluator, model = prepared(tmp_path, data, base, **dict(CHUNK, TTT_CHUNK_TOKENS=10**6))
        whole = scores(evaluator, model, adapt=False).sum()
        assert whole == pytest.approx(naive_nats(model, evaluator.tokens.tolist(), 24, 6), rel=1e-10)


def adapters_of(c, model, documents, seed=0, spread=0.0):
    """Adapters for some documents, and as the model takes them: A drawn, B of this spread."""
    adapters = tg.Adapters(c, len(model.schedules[c.loops]), torch.device("cpu"))
    adapters.start(adapters.draw(c.ttt_batch_size, seed))
    generator = torch.Generator().manual_seed(seed)
    for b in adapters.b.values():
        b.normal_(0, spread, generator=generator) if spread else None
    return adapters, adapters.pairs(adapters.parameters(documents))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("base", [TINY, RECORD], ids=["tiny", "record"])
def test_adapters_of_zero_change_no_bit(base, dtype):
    c = config(base, **dict(PHASED, COMPUTE_DTYPE=dtype, TTT_BATCH_SIZE=3))
    model, batch = build_model(c, seed=1, spread=0.2), random_batch(c, 3, 20)
    with torch.no_grad():
        for tail in (batch, batch._replace(targets=batch.targets[:, -7:])):
            plain = model(*tail, looped=c.loops)
            zero = model(*tail, looped=c.loops, adapters=adapters_of(c, model, 3)[1])
            other = model(*tail, looped=c.loops, adapters=adapters_of(c, model, 3, 0, 0.1)[1])
            assert torch.equal(plain[0], zero[0]) and torch.equal(plain[1], zero[1])
            assert not torch.equal(plain[0], other[0]) and other[0].dtype == plain[0].dtype


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-13), ("float32", 1e-5), ("bfloat16", 0.05)])
def test_the_last_tokens_are_the_tail_of_all(dtype, tolerance):
    """To rounding: the head's matrix product has another shape."""
    for base in (TINY, RECORD):
        c = config(base, COMPUTE_DTYPE=dtype)
        model, batch = build_model(c, seed=1, spread=0.2), random_batch(c, 3, 20)
        with torch.no_grad():
            whole = model(*batch, looped=c.loops)
            for last in (1, 7, 20):
                tail = batch._replace(targets=batch.targets[:, -last:])
                for some, every in zip(model(*tail, looped=c.loops), whole, strict=True):
                    assert some.shape == (3, last)
                    torch.testing.assert_close(some, every[:, -last:], rtol=0, atol=tolerance)


@torch.no_grad()
def test_a_small_contribution_to_the_logits_survives_bfloat16():
    """Logits near 8 are 1/16 apart in bfloat16; the head's adapters move them by a thousandth, and the score too."""
    c = config(**dict(PHASED, TTT_BATCH_SIZE=1, TTT_LORA_ALPHA=4, COMPUTE_DTYPE="bfloat16"))
    model, batch = build_model(c, seed=1, spread=0.2), random_batch(c, 1, 20)
    adapters, pairs = adapters_of(c, model, 1)
    hidden = model.trunk(batch.ids, batch.documents, looped=False, adapters=pairs)

    def head():
        """The head's pair as it is now."""
        return tuple(x[:, 0] for x in adapters.pairs(adapters.parameters(1))["head"])

    before = model.head_logits(hidden, head())
    adapters.b["head"].fill_(1e-3)
    after = model.head_logits(hidden, head())
    assert hidden.dtype == model.head_logits(hidden).dtype == torch.bfloat16
    assert before.dtype == after.dtype == torch.float32
    moved = (after - before).abs()
    assert 1e-4 < moved.median() < 5e-3 and (moved > 0).float().mean() > 0.99
    assert (before.abs() > 4).float().mean() > 0.1  # where bfloat16 would have lost it
    adapters.b["head"][:, :, ::2].zero_()  # else every logit moves alike, and no probability does
    plain, half = (
        model(*batch, looped=False, adapters={**pairs, "head": pair})[0]
        for pair in (tuple(torch.zeros_like(x) for x in pairs["head"]), pairs["head"])
    )
    assert (half != plain).all() and (half - plain).abs().max() < 0.01 and half.dtype == torch.float32


# ------------------------------------------------------------------------------------------------- steps of all weights


@pytest.mark.parametrize("base, cap, clipped", [(TINY, 30.0, True), (RECORD, 0.1, False)], ids=["clipped", "small"])
def test_a_step_of_all_weights_is_sgd_on_the_mean_loss(base, cap, clipped, data, tmp_path):
    """Two steps on targets of several documents; the size of micro-batches does not matter."""
    for micro in (32, 10**6):
        evaluator, model = prepared(tmp_path, data, base, LOGIT_SOFTCAP=cap, MICRO_BATCH_TOKENS=micro, QK_GAIN_INIT=2)
        plain, ledger = build_model(evaluator.config, seed=1, spread=0.2), tg.ScoreLedger(evaluator)
        ledger.own_counts[:] = 1
        sgd = tg.FullModelSGD(evaluator, model, ledger, 0.9)
        velocity, tokens = [torch.zeros_like(p) for p in plain.parameters()], evaluator.tokens.tolist()
        for positions, lr in ((np.r_[0:30, 128:140, 37:77], 0.1), (np.r_[77:127], 0.03)):
            sgd.step(positions, lr)
            norm = plain_step(
                plain, [(tokens[i], tokens[i + 1]) for i in positions], lr, 0.9, velocity, evaluator.config
            )
            assert (norm > 1) == clipped
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-9, atol=1e-11)


def watch_steps(monkeypatch):
    """Collects the positions and rates of the steps of all weights."""
    step, seen = tg.FullModelSGD.step, []
    monkeypatch.setattr(
        tg.FullModelSGD,
        "step",
        lambda sgd, positions, lr: (seen.append((positions.tolist(), lr)), step(sgd, positions, lr)),
    )
    return seen


def test_phases_learn_from_scored_documents_once_without_the_last_chunk(data, tmp_path, monkeypatch, capsys):
    seen = watch_steps(monkeypatch)
    evaluator, model = prepared(
        tmp_path, data, TINY, **dict(PHASED, TTT_ORDER="stream", GLOBAL_TTT_EPOCHS=2, PHASED_TTT_PREFIX_DOCS=4)
    )
    scores(evaluator, model)
    # After two documents 37 targets: one chunk of 30. After four 128: four chunks. Each twice.
    assert [positions for positions, _ in seen] == 2 * [list(range(30))] + 2 * [
        list(range(i, i + 30)) for i in (0, 30, 60, 90)
    ]
    half = [0.5 * (1 + math.cos(math.pi * k / 2)) for k in range(2)]
    eighth = [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert [lr for _, lr in seen] == pytest.approx([0.05 * x for x in half + eighth])
    assert [line for line in capsys.readouterr().out.splitlines() if "full-model" in line] == [
        "ttt: 2 full-model SGD steps on 2 scored documents, 37 tokens",
        "ttt: 8 full-model SGD steps on 4 scored documents, 128 tokens",
    ]


@pytest.mark.parametrize("order", ["length", "stream"])
def test_nothing_learns_after_the_last_document(order, data, tmp_path, monkeypatch):
    """A prefix beyond the stream: in length order it is cut to the stream, in stream order no phase ends in it."""
    seen = watch_steps(monkeypatch)
    evaluator, model = prepared(tmp_path, data, TINY, **dict(PHASED, TTT_ORDER=order, PHASED_TTT_PREFIX_DOCS=3000))
    scores(evaluator, model)
    learned = {p for positions, _ in seen for p in positions}
    # In length order a phase ends after half of the documents. Of its chunks of 30 targets all but the last learn.
    first_phase = sorted(LENGTHS, reverse=True)[: len(LENGTHS) // 2]
    assert len(learned) == (30 * ((sum(first_phase) - 1) // 30) if order == "length" else 0)


@pytest.mark.parametrize("tokens, expected", [(0, 1.0), (200, None), (1000, None)])
def test_the_rate_of_chunks_does_not_know_where_the_stream_ends(tokens, expected, data, tmp_path, monkeypatch):
    """TTT_DECAY_TOKENS: constant, or a cosine over so many tokens that stays at its end."""
    seen = watch_steps(monkeypatch)
    evaluator, model = prepared(tmp_path, data, TINY, **dict(CHUNK, TTT_EPOCHS=1, TTT_DECAY_TOKENS=tokens))
    scores(evaluator, model)
    cosines = [0.5 * (1 + math.cos(math.pi * min(1, 50 * k / max(1, tokens)))) for k in range(4)]
    assert [lr for _, lr in seen] == pytest.approx([0.05 * (expected or x) for x in cosines])


def test_chunks_of_the_stream_learn_but_for_the_last(data, tmp_path, monkeypatch):
    seen = watch_steps(monkeypatch)
    evaluator, model = prepared(tmp_path, data, TINY, **CHUNK)
    found = scores(evaluator, model)
    assert len(found) == 234 and [positions for positions, _ in seen] == [
        list(range(i, i + 50)) for i in (0, 50, 100, 150) for _ in range(2)
    ]
    assert [lr for _, lr in seen] == pytest.approx(
        [0.05 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4) for _ in range(2)]
    )
    before = scores(evaluator, build_model(evaluator.config, seed=1, spread=0.2), adapt=False)
    assert np.array_equal(found[:50], before[:50]) and (found[50:] != before[50:]).mean() > 0.9


def test_chunks_in_batches_of_sequences(data, tmp_path, monkeypatch):
    """TTT_BATCH_SEQS: a step for each so many training sequences of a chunk, in order, each epoch anew."""
    seen = watch_steps(monkeypatch)
    evaluator, model = prepared(tmp_path, data, TINY, **dict(CHUNK, TTT_BATCH_SEQS=1, TRAIN_SEQ_LEN=24))
    assert evaluator.config.train_seq_len == 24
    scores(evaluator, model)
    assert [positions for positions, _ in seen[:6]] == [list(range(i, min(i + 24, 50))) for i in (0, 24, 48)] * 2
    assert len(seen) == 4 * 3 * 2 and len({lr for _, lr in seen[:6]}) == 1


def gradient_of_step(evaluator, positions, clip):
    """The gradient that the optimizer sees in a step of all weights, by name."""
    model, ledger = build_model(evaluator.config, seed=1, spread=0.2), tg.ScoreLedger(evaluator)
    ledger.own_counts[:] = 1
    sgd, found = tg.FullModelSGD(evaluator, model, ledger, 0.0, clip=clip), {}
    sgd.optimizer.step = lambda: found.update({n: p.grad.clone() for n, p in model.named_parameters()})
    sgd.step(positions, 0.1)
    return found


def test_the_norm_of_the_gradient_in_chunks_is_a_knob(data, tmp_path):
    evaluator, _ = prepared(tmp_path, data, TINY, **CHUNK)
    free, clipped = (gradient_of_step(evaluator, np.arange(50), clip) for clip in (0.0, 0.125))
    norm = math.sqrt(sum(g.square().sum().item() for g in free.values()))
    assert norm > 1
    for name, g in free.items():
        torch.testing.assert_close(clipped[name], g * (0.125 / norm), rtol=1e-4, atol=1e-12)


def test_adamw_in_chunks_is_adamw_and_its_state_can_be_kept(data, tmp_path):
    """Two steps against torch's own, and one step after a checkpoint is as without it, bit for bit."""
    evaluator, model = prepared(tmp_path, data, TINY, **CHUNK)
    ledger, positions = tg.ScoreLedger(evaluator), [np.arange(30), np.arange(30, 50), np.arange(50, 90)]
    ledger.own_counts[:] = 1
    sgd = tg.FullModelSGD(evaluator, model, ledger, 0.9, clip=0.0, adamw=True)
    plain = build_model(evaluator.config, seed=1, spread=0.2)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.0)
    tokens = evaluator.tokens.tolist()
    for part in positions[:2]:
        sgd.step(part, 0.01)
        reference.zero_grad()
        piece = tg.to_device(
            *(np.array([[tokens[i + k] for i in part]]) for k in (0, 1)),
            np.zeros((1, len(part)), np.int64),
            torch.device("cpu"),
        )
        starts = tg.document_starts(piece.ids.numpy())
        batch = tg.to_device(piece.ids.numpy(), piece.targets.numpy(), starts, torch.device("cpu"))
        plain(*batch, looped=False)[0].mean().backward()
        reference.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-8)
    kept = {name: tensor.clone() for name, tensor in sgd.state().items()}
    sgd.step(positions[2], 0.01)
    other = build_model(evaluator.config, seed=9)
    again = tg.FullModelSGD(evaluator, other, ledger, 0.9, clip=0.0, adamw=True)
    again.load(kept)
    again.step(positions[2], 0.01)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_frozen_blocks_keep_their_weights(data, tmp_path):
    """Their vectors and their matrices keep every bit, the others move."""
    evaluator, model = prepared(tmp_path, data, RECORD, **dict(CHUNK, TTT_FREEZE_BLOCKS=2))
    kept, layers = {name: p.detach().clone() for name, p in model.named_parameters()}, evaluator.config.num_layers
    scores(evaluator, model)
    for name, p in model.named_parameters():
        if name in tg.BANKS:
            same = (p == kept[name]).flatten(1).all(1).tolist()
            assert same == [i % layers < 2 for i in range(len(p))], name
        elif name.startswith("blocks.") and name != "blocks.2.stream_mix":  # layer 2 has one residual stream
            assert torch.equal(p, kept[name]) == (int(name.split(".")[1]) < 2), name
    assert not torch.equal(model.embedding, kept["embedding"])


# ------------------------------------------------------------------------------------------------------- what it is for


def test_learning_gains_where_documents_repeat_themselves(data, tmp_path):
    generator = np.random.default_rng(4)
    tokens = []
    for _ in range(12):
        tokens += [tg.BOS_ID, *np.tile(generator.integers(4, 384, 5), 12).tolist()]
    for knobs, share in (
        (dict(PHASED, PHASED_TTT_PREFIX_DOCS=0), 0.9),
        (dict(PHASED, TTT_ORDER="stream", PHASED_TTT_PREFIX_DOCS=0), 0.9),
        (CHUNK, 0.97),
    ):
        evaluator, model = prepared(tmp_path, data, TINY, [*tokens, tg.BOS_ID], **knobs)
        before = scores(evaluator, model, adapt=False).sum()
        assert scores(evaluator, model).sum() < share * before


def test_a_context_beyond_the_training_length_with_yarn(data, tmp_path):
    """The windows of 64 are those of a plain loop, and YaRN changes their scores."""
    found = {}
    for yarn in (0, 1):
        knobs = dict(PHASED, ROPE_YARN=yarn, TTT_EVAL_SEQ_LEN=64, TTT_CHUNK_SIZE=64)
        evaluator, model = prepared(tmp_path, data, TINY, stream((200, 64, 30)), **knobs)
        assert evaluator.config.ttt_context == 64 > evaluator.config.train_seq_len == evaluator.config.eval_context
        found[yarn] = scores(evaluator, model, adapt=False)
        assert found[yarn].sum() == pytest.approx(naive_nats(model, evaluator.tokens.tolist(), 64, 64), rel=1e-10)
        assert np.isfinite(scores(evaluator, model)).all()
    assert np.abs(found[0] - found[1]).max() > 1e-3
    assert config(**dict(PHASED, ROPE_YARN=1, TTT_EVAL_SEQ_LEN=64)).yarn_max_len == 64


# ----------------------------------------------------------------------------------------------------------- the ledger


def ledger_of(targets, compute_dtype="float32"):
    evaluator = SimpleNamespace(
        run=single_run(),
        tokens=np.zeros(targets + 1),
        config=SimpleNamespace(compute_dtype=compute_dtype, eval_scores=False),
    )
    return tg.ScoreLedger(evaluator)


def test_the_ledger_takes_each_target_once_and_before_it_is_trained_on():
    ledger = ledger_of(6)
    ledger.score(np.array([[0, 1, -1], [4, -1, -1]]), torch.arange(6.0).view(2, 3))
    ledger.train_on(np.array([0, 1, 4]))
    for positions in ([2], [0, 5], [3]):
        with pytest.raises(tg.IllegalScore, match="would be trained on before it was scored"):
            ledger.train_on(np.array(positions))
    with pytest.raises(tg.IllegalScore, match="a target was scored twice"):
        ledger.score(np.array([3, 4]), torch.zeros(2))
    with pytest.raises(tg.IllegalScore, match="3 targets were not scored exactly once"):
        ledger.close()
    ledger = ledger_of(2)
    ledger.score(np.array([1, 0]), torch.tensor([0.5, 0.25]))
    assert ledger.close() == 0.75 and ledger.nll.tolist() == [0.25, 0.5]


def test_a_refused_score_is_not_kept():
    """The first score of a target stays what it was, whoever catches the exception."""
    ledger = ledger_of(2)
    ledger.score(np.array([0]), torch.tensor([0.5]))
    with pytest.raises(tg.IllegalScore):
        ledger.score(np.array([0]), torch.tensor([0.25]))
    assert ledger.nll[0] == 0.5
    with pytest.raises(tg.IllegalScore, match="not scored exactly once"):
        ledger.close()


def test_a_target_twice_at_once_is_noticed_too():
    """Else the second of two scores of a batch, formed in another context, would silently count."""
    with pytest.raises(tg.IllegalScore, match="a target was scored twice"):
        ledger_of(3).score(np.array([[0, 1], [1, 2]]), torch.zeros(2, 2))


def test_what_other_ranks_scored_may_be_trained_on_once_it_is_shared(monkeypatch):
    """A rank knows its own scores at once, and those of other ranks after `share`."""
    ledger = ledger_of(3)
    ledger.run = single_run(0, 2)
    ledger.score(np.array([0]), torch.zeros(1))
    ledger.train_on(np.array([0]))
    with pytest.raises(tg.IllegalScore, match="trained on before"):
        ledger.train_on(np.array([0, 2]))
    other = torch.tensor([0, 0, 1], dtype=torch.uint8)
    monkeypatch.setattr(tg.dist, "all_reduce", lambda tensor, group=None: tensor.add_(other))
    ledger.share()
    ledger.train_on(np.array([0, 2]))
    with pytest.raises(tg.IllegalScore, match="trained on before"):
        ledger.train_on(np.array([1]))


# --------------------------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize("budget, warned_at", [(600, None), (500, 2), (0, None)])
def test_the_budget_warns_early_and_once(budget, warned_at, monkeypatch, capsys):
    """100 pieces of 5 seconds, and 5 more in the first for compiling, after 35 of unpacking and evaluating: 540 in all.

    No rate is taken from the first piece: with a GPU's minute of compiling it would always warn.
    """
    clock, run = Clock(monkeypatch), single_run()
    run.seconds = dict(train=700.0, unpack=10.0, evaluate=25.0)
    meter = tg.ProgressMeter(run, config(EVAL_BUDGET_SECONDS=budget), "ttt", 100.0)
    lines = []
    for piece in range(100):
        clock.now += 5 if piece else 10
        meter.advance(1.0)
        lines.append(capsys.readouterr().out)
    warnings = [i + 1 for i, text in enumerate(lines) if "warning" in text]
    assert warnings == ([] if warned_at is None else [warned_at])
    if warned_at:
        assert "EVAL_BUDGET_SECONDS=500" in lines[1] and "540 s" in lines[1]
    progress = [text for text in lines if "eta" in text]
    assert 10 <= len(progress) <= 17 and "elapsed:35s eta:470s" in progress[0] and "6.0%" in progress[0]


def test_the_projection_does_not_depend_on_the_ranks(data, tmp_path, monkeypatch, capsys):
    """One of eight ranks computes one batch of eight: its first one is an eighth of the first round, not all of it."""
    evaluator, model = prepared(
        tmp_path,
        data,
        TINY,
        stream([16] * 64),
        **dict(PHASED, TTT_BATCH_SIZE=1, TTT_STREAMS=8, PHASED_TTT_PREFIX_DOCS=0, EVAL_BUDGET_SECONDS=100),
    )
    clock, evaluator.run = Clock(monkeypatch), single_run(0, 8)

    def score_and_adapt(ttt, documents):
        clock.now += 10  # 8 batches for this rank: 80 seconds

    monkeypatch.setattr(tg.PhasedTTT, "score_and_adapt", score_and_adapt)
    monkeypatch.setattr(tg.ScoreLedger, "close", lambda ledger, stage: 0.0)
    method_of(evaluator.config)(evaluator, model)()
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("method, knobs", [("PhasedTTT", PHASED), ("ChunkTTT", CHUNK)])
def test_what_is_computed_for_the_projection_is_dropped(method, knobs, data, tmp_path, monkeypatch, capsys):
    """The line before the start costs two computations, and no score depends on them."""
    method = getattr(tg, method)
    found = scores(*prepared(tmp_path, data, RECORD, **knobs))
    lines = capsys.readouterr().out.splitlines()
    assert "projected to take" in lines[0] and not any("projected to take" in line for line in lines[1:])
    monkeypatch.setattr(method, "project", lambda *_: None)
    assert (scores(*prepared(tmp_path, data, RECORD, **knobs)) == found).all()
    assert "projected" not in capsys.readouterr().out


def test_phased_ttt_is_projected_from_its_tokens(data, tmp_path, monkeypatch, capsys):
    """At a second for each token of a window: all windows' tokens, and those that the full model trains on."""
    evaluator, model = prepared(
        tmp_path,
        data,
        TINY,
        stream([24] * 8),
        **dict(PHASED, TTT_CHUNK_SIZE=8, TTT_EVAL_SEQ_LEN=16, TTT_BATCH_SIZE=2, PHASED_TTT_PREFIX_DOCS=4),
    )
    widths = []

    def time_second_call(run, compute):
        compute()
        widths.append(1)
        return 2 * 16.0  # the window of two documents' second chunks, 16 tokens each

    monkeypatch.setattr(tg.Run, "time_second_call", time_second_call)
    method_of(evaluator.config)(evaluator, model)()
    line = capsys.readouterr().out.splitlines()[0]
    work = 8 * (3 * 16 - 16**2 / (2 * 8)) + (2 + 4) * 24  # 8 documents of three chunks; phases end after 2 and 4
    assert line == f"ttt: 8 documents in 24 chunks, 2 phases, projected to take {work:.1f} s" and widths == [1]


# ---------------------------------------------------------------------------------------------------------------- ranks

RANK_JOBS = {
    "phased float64": (RECORD, PHASED, "float64"),
    "phased float32": (RECORD, PHASED, "float32"),
    "more ranks than streams": (TINY, dict(PHASED, TTT_STREAMS=1), "float64"),
    "strict float64": (RECORD, dict(PHASED, TTT_ORDER="stream"), "float64"),
    "strict float32": (TINY, dict(PHASED, TTT_ORDER="stream", TTT_BATCH_SIZE=2), "float32"),
    "chunk float64": (RECORD, CHUNK, "float64"),
    "chunk float32": (TINY, CHUNK, "float32"),
}


def rank_scores(folder, run):
    """val_bpb of every job, on this rank."""
    found = {}
    for name, (base, knobs, dtype) in RANK_JOBS.items():
        c = config(
            base,
            **{**knobs, "COMPUTE_DTYPE": dtype},
            DATA_PATH=folder,
            CPU_THREADS=1,
            VAL_BATCH_SIZE=96,
            EVAL_BUDGET_SECONDS=0,
        )
        evaluator, model = tg.Evaluator(c, run), build_model(c, seed=1, spread=0.2)
        found[name] = method_of(c)(evaluator, model)().bpb
    return found


@pytest.fixture(scope="session")
def one_rank(data, tmp_path_factory):
    """A folder with a stream, and with every job's score of one rank."""

    def build(folder):
        evaluator_of(folder / "data", data, stream())
        (folder / "scores.json").write_text(json.dumps(rank_scores(folder / "data", single_run())))

    return built_once(tmp_path_factory, "one_rank_ttt", build)


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same_score(ranks, one_rank, tmp_path):
    alone = json.loads((one_rank / "scores.json").read_text())
    done = fork(Path(__file__), {}, one_rank / "data", tmp_path, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    together = [json.loads((tmp_path / f"scores.{rank}.json").read_text()) for rank in range(ranks)]
    assert all(other == together[0] for other in together)
    for name, bpb in alone.items():
        assert together[0][name] == pytest.approx(bpb, abs=1e-9 if "float32" not in name else 1e-6), name
        assert math.isfinite(bpb)


@pytest.mark.parametrize(
    "knobs",
    [
        dict(),
        dict(TTT_SHORT_DOC_CHUNKS=1, TTT_CHUNK_SIZE=10),
        dict(TTT_ORDER="stream"),
        dict(TTT_ORDER="stream", TTT_SHORT_DOC_CHUNKS=1, TTT_CHUNK_SIZE=10),
        dict(TTT_ORDER="stream", TTT_CHUNK_SIZE=2, TTT_BATCH_SIZE=5, PHASED_TTT_PREFIX_DOCS=10),
        dict(TTT_ORDER="stream", TTT_BATCH_SIZE=1),
        dict(TTT_ORDER="stream", TTT_BATCH_SIZE=9, PHASED_TTT_PREFIX_DOCS=18),  # as many rows as columns
        dict(TTT_ORDER="stream", TTT_CHUNK_SIZE=2, TTT_RECOMPUTE_TOKENS=4),
        dict(TTT_ORDER="stream", TTT_SHORT_DOC_CHUNKS=1, TTT_CHUNK_SIZE=16, TTT_RECOMPUTE_TOKENS=4, HINT_ENABLED=1),
    ],
    ids=str,
)
def test_few_graphs_serve_every_shape(knobs, data, tmp_path, monkeypatch):
    """Batches that shrink to one document, chunks and documents of one target: what compiles is one graph for each use.

    Each costs a GPU half a minute or more of its ten, and torch.compile gives up at the eighth.
    """
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **how: compiled(model, backend="eager", **how))
    torch._dynamo.reset()
    tokens = stream((30, 7, 90, 1, 12, 45, 8, 1, 24, 16, 1, 1, 1, 1, 1, 9, 17, 25, 2, 3, 33, 60))
    evaluator, model = prepared(
        tmp_path, data, dict(TINY, NUM_LAYERS=1), tokens, **dict(PHASED, ATTENTION="sdpa", **knobs)
    )
    model.runtime = dataclasses.replace(model.runtime, compile=True)
    before = tg.graphs_compiled()
    found = scores(evaluator, model)
    assert tg.graphs_compiled() - before == 2  # windows, the steps of all weights
    monkeypatch.undo()
    eager = build_model(evaluator.config, seed=1, spread=0.2)
    assert not eager.runtime.compile
    np.testing.assert_allclose(found, scores(evaluator, eager), rtol=1e-6)
    torch._dynamo.reset()


def test_documents_are_dealt_to_the_rank_with_the_least_work():
    assert tg.deal(np.array([9, 5, 4, 3, 1]), 2).tolist() == [0, 1, 1, 0, 1]
    assert tg.deal(np.array([], np.int64), 3).tolist() == []
    costs = -np.sort(-np.random.default_rng(0).lognormal(6, 1, 3000).astype(np.int64))
    for ranks in (1, 3, 8):
        loads = np.bincount(tg.deal(costs, ranks), costs, ranks)
        assert loads.max() - loads.min() <= costs[-1]  # the shortest document: no better is possible by moving one
        assert ranks == 1 or loads.max() < np.bincount(np.arange(3000) % ranks, costs, ranks).max()


# ------------------------------------------------------------------------------------------------------------ bad input


def strange_streams():
    generator = np.random.default_rng(2)
    text = generator.integers(4, 384, 80).tolist()
    return {
        "documents of one token": [1] * 20,
        "ends with a bos": [1, *text[:40], 1],
        "one target": [1, 17],
        "bos alone": [1, 1],
        "ends within a document": [1, *text[:9], 1, *text[9:]],
    }


@pytest.mark.parametrize("name", strange_streams())
def test_strange_streams_get_their_right_score(name, data, tmp_path, monkeypatch):
    """Each document by itself in the plain loop, in phases without steps of all weights, and in chunks."""
    tokens = strange_streams()[name]
    first_a = first_adapters(monkeypatch)
    evaluator, model = prepared(
        tmp_path,
        data,
        TINY,
        tokens,
        **dict(PHASED, TTT_BATCH_SIZE=1, PHASED_TTT_PREFIX_DOCS=0, TTT_ORDER="stream"),
    )
    found = scores(evaluator, model)
    for begin, end in zip(evaluator.documents[:-1], evaluator.documents[1:], strict=True):
        expected, _ = plain_document(model, tokens[begin : end + 1], first_a[0], evaluator.config)
        np.testing.assert_allclose(found[begin:end], expected, rtol=2e-5)
    evaluator, model = prepared(tmp_path, data, RECORD, tokens, **CHUNK)
    assert np.isfinite(scores(evaluator, model)).all()
    evaluator, model = prepared(tmp_path, data, RECORD, tokens, **PHASED)
    assert np.isfinite(scores(evaluator, model)).all()


def test_a_document_of_100_000_tokens(data, tmp_path):
    base = dict(
        TINY,
        NUM_LAYERS=1,
        MODEL_DIM=16,
        NUM_HEADS=2,
        NUM_KV_HEADS=1,
        MLP_MULT=1,
        TRAIN_SEQ_LEN=512,
        TRAIN_BATCH_TOKENS=1024,
    )
    tokens = stream((100_000, 5))
    evaluator, model = prepared(
        tmp_path,
        data,
        base,
        tokens,
        **dict(
            PHASED,
            COMPUTE_DTYPE="float32",
            TTT_CHUNK_SIZE=500,
            TTT_EVAL_SEQ_LEN=512,
            GLOBAL_TTT_CHUNK_TOKENS=40_000,
            PHASED_TTT_PREFIX_DOCS=1,
            PHASED_TTT_NUM_PHASES=1,
        ),
    )
    assert np.isfinite(scores(evaluator, model)).all()
    evaluator, model = prepared(
        tmp_path,
        data,
        base,
        tokens,
        **dict(CHUNK, COMPUTE_DTYPE="float32", TTT_CHUNK_TOKENS=32768, EVAL_SEQ_LEN=512, EVAL_STRIDE=512),
    )
    assert np.isfinite(scores(evaluator, model)).all()


@pytest.mark.parametrize(
    "knobs, name", [(dict(CHUNK, TTT_LR=1e300), "TTT_LR"), (dict(PHASED, GLOBAL_TTT_LR=1e300), "TTT_LORA_LR")]
)
def test_rates_that_run_away_are_named(knobs, name, data, tmp_path):
    evaluator, model = prepared(tmp_path, data, TINY, **knobs)
    with pytest.raises(tg.ConfigError, match=f"^{name}=.*the loss of test-time training is nan"):
        tg.test_time_training(evaluator, model)


def test_a_shard_that_is_cut_off_is_refused(data, tmp_path):
    evaluator_of(tmp_path / "data", data, stream())
    shard = tmp_path / "data" / "fineweb_val_000002.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(tg.ConfigError, match="fineweb_val_000002.bin: is damaged"):
        tg.Evaluator(config(**PHASED, DATA_PATH=tmp_path / "data"), single_run())


def test_another_tokenizer_is_refused_where_there_is_a_manifest(data, tmp_path):
    """One of as many tokens counts other bytes than the manifest says; one of another size needs no manifest."""
    other, small = tmp_path / "other.model", tmp_path / "small.model"
    other.write_bytes(
        train_tokenizer(
            ["altogether different words make unlike pieces"] * 40
            + ["xyz" * 50]
            + [chr(c) * 9 for c in range(0x3B1, 0x3C9)],
            384,
        )
    )
    small.write_bytes(train_tokenizer(["the river and the stone"] * 20, 290))
    with pytest.raises(tg.ConfigError, match=r"manifest.json: says"):
        tg.Evaluator(config(**PHASED, DATA_PATH=data, TOKENIZER_PATH=other), single_run())
    with pytest.raises(tg.ConfigError, match="VOCAB_SIZE=384: .* has 290 tokens"):
        tg.Evaluator(config(**PHASED, DATA_PATH=data, TOKENIZER_PATH=small), single_run())


# ------------------------------------------------------------------------------------------------------ the real script


def test_the_script_reports_the_baseline_and_the_gain(brief, tmp_path, monkeypatch, capfd):
    """MODE=all and MODE=eval of its artifact give the same score; settings of test-time training travel in neither."""
    monkeypatch.chdir(tmp_path)
    values = dict(
        TINY, **dict(PHASED, TTT_BASELINE=1), DATA_PATH=brief, RUN_ID="run", ITERATIONS=3, COMPUTE_DTYPE="float32"
    )
    values.pop("QK_GAIN_INIT")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda n: None)
        assert tg.main([], strings(values)) == 0
        both = json.loads((tmp_path / "logs/run/summary.json").read_text())
        assert tg.main([], strings(dict(values, MODE="eval"))) == 0
        again = json.loads((tmp_path / "logs/run/eval_summary.json").read_text())
        capfd.readouterr()
        assert tg.main([], strings(dict(values, MODE="eval", NUM_LAYERS=5))) == 2
    assert capfd.readouterr().err == "error: NUM_LAYERS=5: the artifact was made with 3\n"
    assert both["val_bpb"] == both["val_bpb_ttt"] == again["val_bpb_ttt"] != both["val_bpb_quantized"]
    assert both["val_bpb_ttt_baseline"] == again["val_bpb_ttt_baseline"] != both["val_bpb_ttt"]
    assert both["ttt_targets_per_second"] > 0 and both["seconds"]["ttt"] > 0
    log = (tmp_path / "logs/run/log.txt").read_text()
    assert f"ttt val_loss:{both['val_loss']:.4f} val_bpb:{both['val_bpb']:.4f}" in log and "ttt_baseline val_" in log
    ttt_knobs = {name: value for name, value in values.items() if "TTT_" in name and name != "TTT_BASELINE"}
    done = fork(
        ROOT / "bench" / "ttt.py",
        dict(ttt_knobs, COMPUTE_DTYPE="float32", CPU_THREADS=1, SEED=7),
        "--artifact",
        "logs/run/model.pgolf",
        "--data",
        brief,
        "--json",
        "bench.json",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    assert rows["sliding, no overlap"]["bpb"] == both["val_bpb_quantized"] and len(rows) == 7
    assert rows["phased, length order"]["bpb"] == both["val_bpb_ttt"] != rows["phased"]["bpb"]
    assert rows["phased"]["targets_per_second"] > 0
    assert rows["phased, learning off"]["bpb"] == both["val_bpb_ttt_baseline"]


def main(folder, out):
    run = tg.start_run(config(CPU_THREADS=1), dict(os.environ))
    with run.guard():
        (out / f"scores.{run.rank}.json").write_text(json.dumps(rank_scores(folder, run)))
        run.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

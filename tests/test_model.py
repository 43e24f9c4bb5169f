"""The model: its forward pass against a plain one, causality, separate documents, normalization, adapters, graphs."""

import numpy as np
import pytest
import torch

import train_gpt as tg
from helpers import POLY_LIKE, RECORD_LIKE, TINY, build_model, config, documents_from, random_batch
from reference import Reference

EXACT = dict(COMPUTE_DTYPE="float64", VOCAB_SIZE=48, MODEL_DIM=32, NUM_HEADS=4, NUM_KV_HEADS=2)
BASELINE = dict(TINY, **EXACT, NUM_LAYERS=3, LEAKY_RELU_SLOPE=0.0)
RECORD = dict(RECORD_LIKE, **EXACT)
POLY = dict(POLY_LIKE, **EXACT)
PAIRS = dict(BIGRAM_VOCAB_SIZE=23, VE_DIM=6, VE_LAYERS="1,4")  # beside loops, parallel streams and gates
ODD = dict(
    TINY,
    **EXACT,
    NUM_LAYERS=4,
    TIE_EMBEDDINGS=0,
    NUM_LOOPS=1,
    LOOP_START=0,
    LOOP_END=1,
    ROPE_BASE=50,
    LOGIT_SOFTCAP=5.0,
    MLP_MULT=1.5,
    XSA_LAST_N=2,
    PARALLEL_START_LAYER=3,
)
CONFIGURATIONS = {
    "baseline": BASELINE,
    "record": RECORD,
    "odd": ODD,
    "all kv heads": dict(BASELINE, NUM_KV_HEADS=4),
    "one kv head": dict(BASELINE, NUM_KV_HEADS=1),
    "gated XSA": dict(RECORD, GATED_XSA=1),
    "value residual": dict(RECORD, **PAIRS, VALUE_RESIDUAL=1),
    "value residual of a looped first layer": dict(ODD, VALUE_RESIDUAL=1),
    "two softcaps": dict(ODD, ASYM_LOGIT_RESCALE=1),
    "two softcaps, poly": dict(POLY, ASYM_LOGIT_RESCALE=1, LOGIT_SOFTCAP=2.0),
    "key offset": dict(RECORD, KEY_OFFSET=1, ROPE_DIMS=2),
    "window": dict(RECORD, WINDOW_ATTN_SIZE=3, WINDOW_ATTN_LAYERS="1,3,4"),
    "window in every second layer": dict(ODD, WINDOW_ATTN_SIZE=5, KEY_OFFSET=1, ROPE_DIMS=4),
    "one layer": dict(BASELINE, NUM_LAYERS=1),
    "a turn cut short": dict(BASELINE, NUM_LAYERS=3, NUM_LOOPS=1, LOOP_START=0, LOOP_END=2, VIRTUAL_DEPTH=5),
    "signed pairs": dict(ODD, BIGRAM_VOCAB_SIZE=5, BIGRAM_DIM=9, BIGRAM_SIGNS=1),
    "dense gate": dict(BASELINE, GATED_ATTN_ENABLED=1, SKIP_GATES_ENABLED=1, LN_SCALE=1),
    "poly": POLY,
    "record with pairs": dict(RECORD, **PAIRS),
    "channel smear": dict(RECORD, SMEAR_GATE_TYPE="channel", SOFTCAP_TYPE="poly", LOGIT_SOFTCAP=2.0),
    "yarn": dict(BASELINE, ROPE_TYPE="yarn", EVAL_SEQ_LEN=128),
    "other yarn": dict(RECORD, ROPE_YARN=1, YARN_MAX_LEN=50),
    "output gate": dict(BASELINE, ATTN_OUT_GATE_ENABLED=1, GATE_WINDOW=7, XSA_LAST_N=1),
}


def gradients(model, nll, lse):
    """Gradients of a loss that uses both outputs, by name."""
    loss = nll.mean() + 0.1 * lse.square().mean()
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), grads, strict=True)
    }


def noise_of_keys(sequences):
    """Noise of a tenth, of some keys."""
    generator = torch.Generator().manual_seed(1)
    return tg.EmbeddingNoise(torch.randint(-(2**31), 2**31, (sequences, 2), generator=generator).int(), 0.1)


@pytest.mark.parametrize("attention", ["blocked", "sdpa"])
@pytest.mark.parametrize(
    "name, looped",
    [
        (name, looped)
        for name, knobs in CONFIGURATIONS.items()
        for looped in sorted({False, bool(knobs.get("NUM_LOOPS"))})
    ],
)
def test_the_forward_pass_is_that_of_the_specification(name, looped, attention):
    c = config(CONFIGURATIONS[name], ATTENTION=attention)
    model, batch = build_model(c, seed=3), random_batch(c, 2, 13, seed=5, document_length=5)
    assert (batch.documents.starts.amax(1) > 0).all()  # several documents in each row
    noise = noise_of_keys(2)
    nll, lse = model(*batch, looped=looped, noise=noise)
    added = (noise.reach * tg.uniform_noise(noise.keys, 13, c.model_dim)).double()
    expected_nll, expected_lse = Reference(model)(batch, looped, added)
    assert torch.allclose(nll, expected_nll, rtol=1e-9, atol=1e-9)
    assert torch.allclose(lse, expected_lse, rtol=1e-9, atol=1e-9)
    found, expected = gradients(model, nll, lse), gradients(model, expected_nll, expected_lse)
    one_stream = {f"blocks.{i}.stream_mix" for i in range(c.num_layers) if i < c.parallel_start_layer}
    unreached = []
    for parameter, gradient in expected.items():
        scale = gradient.abs().sum() / max(1, gradient.numel())
        assert torch.allclose(found[parameter], gradient, rtol=1e-7, atol=1e-8 * scale + 1e-15), parameter
        unreached += [parameter] if not gradient.any() else []
    assert len(set(unreached) - one_stream) <= 3, unreached  # the comparison compares something


def test_the_full_record_order_matches_too():
    """11 layers, layers 3 to 5 three times, parallel streams from 8: the published layout, at a small width."""
    c = config(
        RECORD,
        NUM_LAYERS=11,
        NUM_LOOPS=2,
        LOOP_START=3,
        LOOP_END=5,
        PARALLEL_START_LAYER=8,
        XSA_LAST_N=11,
        MODEL_DIM=16,
        NUM_HEADS=2,
        NUM_KV_HEADS=1,
        MLP_MULT=2,
    )
    model, batch = build_model(c, seed=4), random_batch(c, 1, 7, seed=2, document_length=4)
    for looped in (False, True):
        nll, _ = model(*batch, looped=looped)
        assert torch.allclose(nll, Reference(model)(batch, looped)[0], rtol=1e-9, atol=1e-9)


def test_low_precision_stays_near_the_exact_result():
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 0.15)):
        c = config(RECORD_LIKE, VOCAB_SIZE=48, COMPUTE_DTYPE=dtype)
        model, exact = build_model(c, seed=3), build_model(config(RECORD), seed=3)
        batch = random_batch(c, 4, 32, seed=5)
        for looped in (False, True):
            nll, reference = model(*batch, looped=looped)[0], exact(*batch, looped=looped)[0]
            assert nll.dtype == torch.float32
            assert (nll - reference).abs().mean() < tolerance
            assert (nll - reference).abs().max() > 0


# ------------------------------------------------------------------------------------------ documents and causality

SETTINGS = [
    (base, dtype) for base in (TINY, RECORD_LIKE, dict(POLY_LIKE, VOCAB_SIZE=48)) for dtype in ("bfloat16", "float32")
]
IDS = ["plain bf16", "plain f32", "record bf16", "record f32", "poly bf16", "poly f32"]


def features(base, dtype, **knobs):
    return config(base, COMPUTE_DTYPE=dtype, VOCAB_SIZE=48, TRAIN_SEQ_LEN=160, TRAIN_BATCH_TOKENS=320, **knobs)


@torch.no_grad()
def check_separate_documents(c):
    """Other tokens in one document of a row change no bit in the others."""
    model, generator = build_model(c, seed=6), torch.Generator().manual_seed(0)
    ids = torch.randint(4, 48, (2, 160), generator=generator)
    for place in (0, 37, 38, 120, 140):  # one document has a single token; one crosses the attention's block border
        ids[:, place] = tg.BOS_ID
    documents = documents_from(torch.from_numpy(tg.document_starts(ids.numpy())))
    targets = torch.randint(4, 48, (2, 160), generator=generator)
    for looped in {False, c.loops}:
        before, _ = model(ids, targets, documents, looped=looped)
        changed = ids.clone()
        changed[:, 39:120] = torch.randint(4, 48, (2, 81), generator=generator)
        after, _ = model(changed, targets, documents, looped=looped)
        inside = torch.zeros(160, dtype=torch.bool)
        inside[39:120] = True
        assert torch.equal(before[:, ~inside], after[:, ~inside])
        assert (before[:, inside] != after[:, inside]).float().mean() > 0.9


@torch.no_grad()
def check_causality(c):
    """Another token changes no bit before itself."""
    model, generator = build_model(c, seed=7), torch.Generator().manual_seed(1)
    ids, targets = torch.randint(4, 48, (2, 2, 160), generator=generator)
    ids[:, 0] = tg.BOS_ID
    documents = documents_from(torch.zeros(2, 160, dtype=torch.int32))
    for looped in {False, c.loops}:
        before, _ = model(ids, targets, documents, looped=looped)
        for place in (1, 64, 127, 128, 159):
            changed = ids.clone()
            changed[:, place] = (ids[:, place] - 4 + 7) % 44 + 4
            after, _ = model(changed, targets, documents, looped=looped)
            assert torch.equal(before[:, :place], after[:, :place])
            assert (before[:, place:] != after[:, place:]).float().mean() > 0.9


@pytest.mark.parametrize("attention", ["blocked", "sdpa"])
@pytest.mark.parametrize("base, dtype", SETTINGS, ids=IDS)
def test_documents_in_a_row_never_see_each_other(base, dtype, attention):
    check_separate_documents(features(base, dtype, ATTENTION=attention))


@pytest.mark.parametrize("attention", ["blocked", "sdpa"])
@pytest.mark.parametrize("base, dtype", SETTINGS, ids=IDS)
def test_a_token_changes_nothing_before_itself(base, dtype, attention):
    check_causality(features(base, dtype, ATTENTION=attention))


@torch.no_grad()
def rows_of(batch, chosen):
    """Some rows of a batch."""
    return batch.ids[chosen], batch.targets[chosen], documents_from(batch.documents.starts[chosen])


def test_a_row_does_not_depend_on_the_rows_beside_it():
    c = features(RECORD_LIKE, "float32")
    model, batch = build_model(c, seed=8), random_batch(c, 4, 160, seed=3)
    together, _ = model(*batch, looped=True)
    for r in range(4):
        alone, _ = model(*rows_of(batch, slice(r, r + 1)), looped=True)
        assert torch.allclose(together[r], alone[0], atol=1e-4)
    swapped, _ = model(*rows_of(batch, [3, 2, 1, 0]), looped=True)
    assert torch.allclose(swapped.flip(0), together, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize("base", [TINY, RECORD_LIKE, POLY_LIKE], ids=["plain", "record", "poly"])
@torch.no_grad()
def test_the_probabilities_of_all_tokens_sum_to_one(base, temperature):
    """exp(-NLL) over the vocabulary: of one tensor of logits, which is made without the targets, and of the forward."""
    c = config(base, COMPUTE_DTYPE="float64", VOCAB_SIZE=48)
    model, batch = build_model(c, seed=9), random_batch(c, 2, 20, seed=4)
    for looped in {False, c.loops}:
        logits = model.head_logits(model.trunk(batch.ids, batch.documents, looped=looped))
        total, lse = 0, model.token_losses(logits, batch.targets, temperature)[1]
        for token in range(48):
            targets = torch.full_like(batch.targets, token)
            from_logits = model.token_losses(logits, targets, temperature)
            from_forward = model(batch.ids, targets, batch.documents, looped=looped, temperature=temperature)
            assert all(map(torch.equal, from_logits, from_forward))
            assert torch.equal(from_logits[1], lse)  # fixed before the target is seen
            total = total + torch.exp(-from_logits[0])
        assert torch.allclose(total, torch.ones_like(total), rtol=1e-12)


@pytest.mark.parametrize("base", [ODD, RECORD, POLY], ids=["odd", "record", "poly"])
def test_losses_of_extra_targets_are_those_of_targets(base):
    """... in value and in every gradient; the first two outputs stay as they are, bit by bit."""
    c = config(base)
    model, batch = build_model(c, seed=6), random_batch(c, 2, 15, seed=7)
    extra = torch.randint(48, (2, 15, 3), generator=torch.Generator().manual_seed(1))
    nll, lse, others = model(*batch, looped=c.loops, extra_targets=extra)
    plain = model(*batch, looped=c.loops)
    assert all(map(torch.equal, (nll, lse), plain))
    expected = [model(batch.ids, part, batch.documents, looped=c.loops)[0] for part in extra.unbind(-1)]
    assert torch.allclose(others, torch.stack(expected, -1), rtol=1e-12, atol=1e-12)
    weights = torch.linspace(0.1, 1, others.numel(), dtype=torch.float64).view_as(others)
    found = gradients(model, nll + (others * weights).sum(-1), lse)
    weighted = sum(x * w for x, w in zip(expected, weights.unbind(-1), strict=True))
    expected = gradients(model, plain[0] + weighted, plain[1])
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-9, atol=1e-12 * (1 + gradient.abs().max())), name


def test_softcap_bounds_every_probability():
    """|z| <= C, so no NLL exceeds 2C + log V."""
    c = config(TINY, COMPUTE_DTYPE="float64", VOCAB_SIZE=48, LOGIT_SOFTCAP=2.0)
    model, batch = build_model(c, seed=1), random_batch(c, 2, 20)
    with torch.no_grad():
        model.embedding.mul_(1000)
        nll, lse = model(*batch, looped=False)
    assert nll.max() <= 4 + torch.tensor(48.0).log() and nll.max() > 3
    assert lse.max() <= 2 + torch.tensor(48.0).log()


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-9), ("float32", 1e-4), ("bfloat16", 0.2)])
@pytest.mark.parametrize("softcap", ["tanh", "poly"])
@torch.no_grad()
def test_the_temperature_divides_the_softcapped_logits(softcap, dtype, tolerance):
    """A cap of 2, so that softcap(z) / T and softcap(z / T) are far apart."""
    knobs = dict(SOFTCAP_TYPE=softcap, LOGIT_SOFTCAP=2.0)
    model, exact = (build_model(config(POLY, **{**knobs, "COMPUTE_DTYPE": d})) for d in (dtype, "float64"))
    batch = random_batch(model.config, 2, 11)
    tempered, plain = model(*batch, looped=False, temperature=0.7), model(*batch, looped=False)
    for found, temperature in ((tempered, 0.7), (plain, 1.0)):
        expected = Reference(exact, temperature=temperature)(batch, False)
        assert all((x - y).abs().max() < tolerance for x, y in zip(found, expected, strict=True))
    assert (tempered[1] - plain[1]).abs().min() > 0.05


# -------------------------------------------------------------------------------------------- pairs, values, late QAT


@pytest.mark.parametrize("buckets", [2, 37, 1536])
def test_buckets_are_the_hash_of_the_specification(buckets):
    """In int32, which products of large ids overflow; a document's first token, and a cut row's, have the last one."""
    ids = np.random.default_rng(0).integers(4, 65536, (3, 40))
    ids[0, [5, 6, 30]] = ids[1, 0] = tg.BOS_ID
    starts = tg.document_starts(ids)
    found = tg.bigram_buckets(torch.from_numpy(ids), torch.from_numpy(starts), buckets).numpy()
    with np.errstate(over="ignore"):
        t, before = ids[:, 1:].astype(np.int32), ids[:, :-1].astype(np.int32)
        hashed = ((np.int32(36313) * t) ^ (np.int32(27191) * before)) % np.int32(buckets - 1)
    first = starts == np.arange(40)
    assert first[:, 0].all() and first.sum() == 6
    assert (found[first] == buckets - 1).all() and (found[:, 1:][~first[:, 1:]] == hashed[~first[:, 1:]]).all()
    assert found.min() >= 0 and (hashed < buckets - 1).all()


def test_signs_of_pairs_in_one_bucket_cancel():
    """The vectors of two pairs are the same, or nearly orthogonal; half of the signs are negative, in every channel."""
    ids = torch.from_numpy(np.random.default_rng(0).integers(4, 8192, (4, 500)))
    ids[:, 250] = tg.BOS_ID
    starts = torch.from_numpy(tg.document_starts(ids.numpy()))
    signs = tg.pair_signs(ids, starts, 64, torch.float64)
    assert signs.shape == (4, 500, 64) and (signs.abs() == 1).all()
    assert (signs[:, [0, 250]] == signs[0, 0]).all()  # first tokens of documents
    pairs = signs[tg.continues_document(starts)]
    products = pairs @ pairs.mT / 64
    same = (products == 1).double().mean().item()
    assert 1 / 400 < same < 1 / 160  # 256 vectors
    others = products[products < 1]
    assert others.mean().abs() < 0.01 and others.std() < 0.15 and others.abs().max() < 0.75  # a deviation of 1/8
    assert pairs.mean(0).abs().max() < 0.25 and pairs.mean().abs() < 0.02


def test_signs_do_not_follow_from_buckets():
    """Pairs of one bucket have as many vectors as any pairs; another token before gives another vector."""
    ids = torch.from_numpy(np.random.default_rng(1).integers(4, 8192, (1, 60_000)))
    starts = torch.zeros(1, 60_000, dtype=torch.int32)
    signs = tg.pair_signs(ids, starts, 16, torch.float32)[0, 1:]
    bucket = tg.bigram_buckets(ids, starts, 16)[0, 1:]
    assert all(len(signs[bucket == b].unique(dim=0)) == len(signs.unique(dim=0)) > 250 for b in range(15))


def test_signed_pairs_are_an_option_like_any_other(counted):
    check_option(dict(BIGRAM_VOCAB_SIZE=23, BIGRAM_SIGNS=1), counted)


def test_documents_are_known_by_their_starts_not_by_their_ids():
    """Two windows of a sliding evaluation side by side in a row: the second one begins without BOS."""
    c = config(POLY)
    model, batch = build_model(c), random_batch(c, 1, 20, document_length=10**9)
    assert not (batch.ids == tg.BOS_ID).any()
    starts = torch.tensor([[0] * 9 + [9] * 11], dtype=torch.int32)
    with torch.no_grad():
        before = model(batch.ids, batch.targets, documents_from(starts), looped=False)[0]
        changed = batch.ids.clone()
        changed[0, 8] = (changed[0, 8] + 1 - 4) % 44 + 4
        after = model(changed, batch.targets, documents_from(starts), looped=False)[0]
    assert torch.equal(before[0, 9:], after[0, 9:]) and before[0, 8] != after[0, 8]


def grids_of(c):
    """What late QAT passes to the forward: (bits, clip sigmas) of the attention and of the MLP banks."""
    return c.attn_grid, c.mlp_grid


def test_late_qat_rounds_to_the_grid_and_passes_the_gradient_straight_through():
    for knobs in (dict(), dict(QUANTIZER="uniform", MATRIX_BITS=4, MLP_BITS=3, ATTN_CLIP_SIGMAS=2.5)):
        c = config(POLY, **knobs)
        model, batch = build_model(c, seed=3), random_batch(c, 2, 9)
        nll, _ = model(*batch, looped=False, fake_quant=grids_of(c))
        reference = Reference(model, fake_quant=grids_of(c))
        expected = reference(batch, False)
        assert torch.allclose(nll, expected[0], rtol=1e-9, atol=1e-9)
        assert (nll - model(*batch, looped=False)[0]).abs().max() > 1e-3
        found = torch.autograd.grad(nll.sum(), [getattr(model, name) for name in tg.BANKS])
        wanted = torch.autograd.grad(expected[0].sum(), [reference.p[name] for name in tg.BANKS])
        assert all(torch.allclose(x, y, rtol=1e-7, atol=1e-10) and x.any() for x, y in zip(found, wanted, strict=True))


def check_frozen_layers(c):
    """Layers from the second on are constants in one forward pass, and the other weights get the same gradients."""
    model, batch = build_model(c), random_batch(c, 2, 9)
    whole_losses = model(*batch, looped=c.loops)
    whole = gradients(model, *whole_losses)
    nll, lse = model(*batch, looped=c.loops, trainable_layers=2)
    assert torch.equal(nll, whole_losses[0]) and torch.equal(lse, whole_losses[1])
    (nll.mean() + 0.1 * lse.square().mean()).backward()
    for name, p in model.named_parameters():
        if name in tg.BANKS:
            trains = torch.arange(len(p)) % c.num_layers < 2
            assert torch.equal(p.grad[trains], whole[name][trains]) and p.grad[trains].any()
            assert not p.grad[~trains].any()
        elif name.startswith("blocks.") and int(name.split(".")[1]) >= 2:
            assert p.grad is None, name
        elif p.grad is not None:
            assert torch.equal(p.grad, whole[name]), name
    assert all(p.requires_grad for p in model.parameters())  # a call leaves nothing behind in the model


@pytest.mark.parametrize("base", [POLY, dict(RECORD, **PAIRS)], ids=["poly", "record"])
def test_frozen_layers_get_no_gradient_and_the_others_the_same(base):
    check_frozen_layers(config(base))


# ------------------------------------------------------------------------------- a forward pass is its arguments alone


def calls_of(c):
    """Keyword arguments of forward passes of every kind, for a batch [3, 24] of looped layers where there are any."""
    noise = noise_of_keys(3)
    return {
        "plain": dict(looped=False),
        "looped": dict(looped=c.loops),
        "noise": dict(looped=c.loops, noise=noise),
        "some layers": dict(looped=c.loops, trainable_layers=2),
        "late QAT": dict(looped=c.loops, fake_quant=grids_of(c)),
        "MLP not fused": dict(looped=c.loops, fused_mlp=False),
        "temperature": dict(looped=c.loops, temperature=0.7),
    }


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("base", [TINY, RECORD_LIKE, POLY_LIKE], ids=["plain", "record", "poly"])
@torch.no_grad()
def test_the_forward_is_the_trunk_then_the_head_then_the_loss_bit_for_bit(base, dtype):
    c = config(base, COMPUTE_DTYPE=dtype, VOCAB_SIZE=48)
    model, batch = build_model(c, seed=2), random_batch(c, 3, 24)
    for name, call in calls_of(c).items():
        for adapters in (None, make_adapters(model, 3, call["looped"])):
            trunk_call = {key: value for key, value in call.items() if key != "temperature"}
            pair = tuple(x[:, 0] for x in adapters["head"]) if adapters else None
            for last in (24, 5):
                targets = batch.targets[:, -last:]
                whole = model(batch.ids, targets, batch.documents, adapters=adapters, **call)
                hidden = model.trunk(batch.ids, batch.documents, adapters=adapters, last_tokens=last, **trunk_call)
                logits = model.head_logits(hidden, pair)
                apart = model.token_losses(logits, targets, call.get("temperature", 1.0))
                assert hidden.shape == (*targets.shape, c.model_dim) and logits.shape == (*targets.shape, 48), name
                assert torch.equal(whole[0], apart[0]) and torch.equal(whole[1], apart[1]), name


@pytest.mark.parametrize("base", [RECORD_LIKE, POLY_LIKE], ids=["record", "poly"])
def test_a_forward_does_not_depend_on_requires_grad_nor_on_earlier_calls(base):
    c = config(base, VOCAB_SIZE=48)
    model, batch = build_model(c, seed=2), random_batch(c, 3, 24)
    expected = {name: model(*batch, **call) for name, call in calls_of(c).items()}

    def check():
        for name, call in calls_of(c).items():
            assert all(map(torch.equal, model(*batch, **call), expected[name])), name

    check()  # in another order of calls, since each one came after the others
    model.requires_grad_(False)
    check()
    for number, p in enumerate(model.parameters()):
        p.requires_grad_(number % 2 == 0)
    check()
    with torch.no_grad():
        check()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mlp_is_the_same_fused_or_not_on_a_cpu(dtype):
    c = config(RECORD_LIKE, VOCAB_SIZE=48, COMPUTE_DTYPE=dtype)
    model, batch = build_model(c, seed=2), random_batch(c, 3, 24)
    fused, plain = (model(*batch, looped=True, fused_mlp=switch) for switch in (True, False))
    assert all(map(torch.equal, fused, plain))
    fused, plain = gradients(model, *fused), gradients(model, *plain)
    assert all(torch.equal(fused[name], plain[name]) for name in plain)


def test_a_model_takes_nothing_but_a_model_config():
    """With a Config, a setting that no artifact carries could change what a model computes."""
    c = config(RECORD_LIKE)
    with pytest.raises(TypeError, match="a model takes a ModelConfig, not a Config"):
        tg.GPT(c, tg.runtime_of(c))
    for model in (tg.new_model(c), tg.meta_model(c)):
        assert type(model.config) is tg.ModelConfig and model.config == c.model
        assert all(type(block.config) is tg.ModelConfig for block in model.blocks)


def test_a_constant_view_shares_the_memory_and_gets_no_gradient():
    c = config(RECORD_LIKE, VOCAB_SIZE=48, COMPUTE_DTYPE="float32")
    model, batch = build_model(c, seed=2), random_batch(c, 3, 24)
    view = tg.constant_view(model)
    assert [name for name, _ in view.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert all(p.data_ptr() == q.data_ptr() for p, q in zip(model.parameters(), view.parameters(), strict=True))
    assert not any(p.requires_grad for p in view.parameters()) and all(p.requires_grad for p in model.parameters())
    assert all(map(torch.equal, view(*batch, looped=True), model(*batch, looped=True)))
    with torch.no_grad():
        model.qo_bank.mul_(0.5)
    assert torch.equal(view(*batch, looped=True)[0], model(*batch, looped=True)[0])  # an update shows in the view
    adapters = make_adapters(model, 3, True)
    view(*batch, looped=True, adapters=adapters)[0].sum().backward()
    assert all(b.grad is not None and b.grad.any() for _, b in adapters.values())
    assert all(p.grad is None for m in (model, view) for p in m.parameters())


# ------------------------------------------------------------------------------------------------------------ adapters


def make_adapters(model, sequences, looped, rank=3, zero=False, seed=0):
    """A low-rank pair of each sequence for every projection of every layer call, and one for the head."""
    generator, c, dtype = torch.Generator().manual_seed(seed), model.config, model.runtime.master_dtype
    widths = dict(q=c.model_dim, k=c.kv_dim, v=c.kv_dim, attention=c.model_dim, mlp=c.model_dim)

    def pair(calls, outputs):
        a = torch.randn(sequences, calls, rank, c.model_dim, generator=generator).to(dtype) * 0.1
        b = torch.randn(sequences, calls, outputs, rank, generator=generator).to(dtype) * (0 if zero else 0.1)
        return a.requires_grad_(), b.requires_grad_()

    pairs = {name: pair(len(model.schedules[looped]), n) for name, n in widths.items()}
    return {**pairs, "head": pair(1, c.vocab_size)}


def check_zero_adapters(c, looped):
    """Adapters whose B is zero change no bit, and their B gets a gradient in every layer call."""
    model, batch = build_model(c, seed=2), random_batch(c, 3, 24)
    plain = model(*batch, looped=looped)
    adapters = make_adapters(model, 3, looped, zero=True)
    adapted = model(*batch, looped=looped, adapters=adapters)
    assert all(torch.equal(x, y) for x, y in zip(plain, adapted, strict=True))
    adapted[0].mean().backward()
    for name, (a, b) in adapters.items():
        assert (b.grad.abs().sum((0, 2, 3)) > 0).all(), name  # B learns at once, in every call
        assert a.grad.abs().sum() == 0, name  # A only after B has moved


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("knobs", [{}, dict(PAIRS, SMEAR_GATE_TYPE="channel", SOFTCAP_TYPE="poly")], ids=["", "pairs"])
@pytest.mark.parametrize("looped", [False, True])
def test_zero_adapters_change_no_bit_and_get_gradients(looped, knobs, dtype):
    check_zero_adapters(config(RECORD_LIKE, VOCAB_SIZE=48, COMPUTE_DTYPE=dtype, **knobs), looped)


def test_each_adapter_acts_on_its_own_sequence_and_its_own_layer_call():
    c = config(RECORD_LIKE, VOCAB_SIZE=48, COMPUTE_DTYPE="float64")
    model, batch = build_model(c, seed=2), random_batch(c, 3, 24)
    with torch.no_grad():
        plain, _ = model(*batch, looped=True)
        full = make_adapters(model, 3, True)
        for name, (a, b) in full.items():
            for place in range(a.size(1)):
                only = torch.zeros_like(b)
                only[1, place] = b[1, place]
                nll, _ = model(*batch, looped=True, adapters={name: (a, only)})
                assert torch.equal(nll[[0, 2]], plain[[0, 2]]) and not torch.equal(nll[1], plain[1]), (place, name)


def test_adapters_are_low_rank_additions_to_the_matrices():
    """One adapter on q of a single-layer model equals a changed weight; so does the head's."""
    c = config(TINY, VOCAB_SIZE=48, NUM_LAYERS=1, COMPUTE_DTYPE="float64")
    model, batch = build_model(c, seed=2), random_batch(c, 1, 24)
    pairs = make_adapters(model, 1, False)
    with torch.no_grad():
        both, _ = model(*batch, looped=False, adapters={name: pairs[name] for name in ("q", "v", "head")})
        for bank, row, (a, b) in ((model.qo_bank, 0, pairs["q"]), (model.kv_bank, 1, pairs["v"])):
            bank[row] += b[0, 0] @ a[0, 0]
        a, b = pairs["head"]
        untied = tg.new_model(config(TINY, VOCAB_SIZE=48, NUM_LAYERS=1, COMPUTE_DTYPE="float64", TIE_EMBEDDINGS=0))
        untied.load_state_dict({**model.state_dict(), "head": model.embedding + b[0, 0] @ a[0, 0]})
        assert torch.allclose(untied(*batch, looped=False)[0], both, rtol=1e-10)


# ------------------------------------------------------------------------------------------------ schedule and weights


def schedule(looped, **knobs):
    return tg.layer_schedule(config({"PRESET": "record"}, **knobs).model, looped)


def test_the_schedule_of_the_record_is_the_specifications_example():
    plain, looped = schedule(False), schedule(True)
    assert [call.layer for call in plain] == list(range(11))
    assert [call.save for call in plain] == [True] * 5 + [False] * 6  # 0-4 | 5-10
    assert [call.skip for call in plain] == [None] * 5 + [0, 1, 2, 3, 4] + [None]
    assert [call.layer for call in looped] == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [call.save for call in looped] == [True] * 8 + [False] * 9  # 0,1,2,3,4,5,3,4 | 5,3,...,10
    assert [call.skip for call in looped] == [None] * 8 + list(range(8)) + [None]
    for calls in (plain, looped):
        assert [call.layer for call in calls if call.parallel] == [8, 9, 10]


def test_schedules_take_every_output_that_they_save():
    for layers in range(1, 9):
        for loops in range(3):
            c = config(TINY, NUM_LAYERS=layers, NUM_LOOPS=loops, LOOP_START=layers // 3, LOOP_END=layers // 2)
            for looped, calls in tg.new_model(c).schedules.items():
                depth = 0
                for call in calls:
                    depth -= call.skip is not None
                    assert depth >= 0
                    depth += call.save
                assert depth == 0 and len(calls) == layers + looped * loops * (layers // 2 - layers // 3 + 1)


def test_the_looped_order_is_used_when_asked_for():
    c = config(RECORD_LIKE, VOCAB_SIZE=48, COMPUTE_DTYPE="float32")
    model, batch, called = build_model(c), random_batch(c, 1, 8), []
    for number, block in enumerate(model.blocks):
        block.qkv.register_forward_pre_hook(lambda *_, number=number: called.append(number))
    for looped in (False, True):
        called.clear()
        model(*batch, looped=looped)
        assert called == tg.execution_order(c, looped)


def test_xsa_leaves_nothing_along_the_own_value():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(2, 5, 6, 4, dtype=torch.float64, generator=generator)
    v = torch.randn(2, 5, 3, 4, dtype=torch.float64, generator=generator)
    out, own = tg.subtract_own_value(y, v), v.repeat_interleave(2, dim=2)
    assert out.shape == y.shape
    assert (out * own).sum(-1).abs().max() < 1e-12
    removed = y - out  # parallel to the value, nothing else is taken
    cosine = torch.nn.functional.cosine_similarity(removed, own, dim=-1).abs()
    assert torch.allclose(cosine, torch.ones_like(cosine))


def test_yarn_acts_where_and_only_where_the_evaluated_context_is_longer():
    plain = tg.new_model(config(TINY))
    for knobs, acts in (
        (dict(), False),
        (dict(EVAL_SEQ_LEN=16, EVAL_STRIDE=16), False),
        (dict(EVAL_SEQ_LEN=64), True),
        (dict(YARN_MAX_LEN=40), True),
        (dict(YARN_MAX_LEN=20), False),
    ):
        for switch in (dict(ROPE_YARN=1), dict(ROPE_TYPE="yarn"), dict()):
            model = tg.new_model(config(TINY, **knobs, **switch))
            changed = not torch.equal(model.cos[:32], plain.cos)
            assert changed is (acts and bool(switch)), (knobs, switch)


def test_smear_gate_does_nothing_where_a_document_begins():
    c = config(RECORD_LIKE, COMPUTE_DTYPE="float64")
    gate = tg.SmearGate(c.model).double()
    torch.nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(0))
    torch.nn.init.constant_(gate.scale, 0.7)
    x = torch.randn(1, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = gate(x, documents_from(torch.tensor([[0, 0, 2, 2, 2, 5]])))
    assert torch.equal(y[0, [0, 2, 5]], x[0, [0, 2, 5]])
    for t in (1, 3, 4):
        expected = x[0, t] + 0.7 * torch.sigmoid(gate.weight @ x[0, t, :5]) * x[0, t - 1]
        assert torch.allclose(y[0, t], expected)


def test_initial_weights_are_those_of_the_specification():
    c = config(RECORD_LIKE, VOCAB_SIZE=4000, SEED=3)
    model = tg.new_model(c)
    layers, p = c.num_layers, dict(model.named_parameters())
    for matrix in (*p["qo_bank"][:layers], *p["kv_bank"], *p["up_bank"]):
        small = matrix if matrix.size(0) <= matrix.size(1) else matrix.T
        assert torch.allclose(small @ small.T, torch.eye(small.size(0)), atol=1e-5)
    assert not p["qo_bank"][layers:].any() and not p["down_bank"].any()
    assert abs(p["embedding"].std().item() - 0.005) < 2e-4 and abs(p["embedding"].mean().item()) < 1e-4
    assert (p["skip_weights"] == 1).all() and not p["skip_gates"].any()
    assert not p["smear.weight"].any() and not p["smear.scale"].any()
    for i in range(layers):
        assert torch.equal(p[f"blocks.{i}.stream_mix"], torch.tensor([1.1, 1, 1]).expand(2, 3))
        assert torch.equal(p[f"blocks.{i}.input_mix"], torch.tensor([[1.0], [0.0]]).expand(2, 32))
        assert (p[f"blocks.{i}.attention_scale"] == 1).all() and (p[f"blocks.{i}.mlp_scale"] == 1).all()
        assert (p[f"blocks.{i}.query_gain"] == 5).all() and not p[f"blocks.{i}.head_gate"].any()
    assert all(q.dtype == torch.float32 for q in p.values())


def test_offset_keys_are_those_of_the_token_before_within_the_document():
    starts = torch.tensor([[0, 0, 2, 2, 2, 5]])
    k = torch.randn(1, 6, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = tg.offset_keys(k, 2, tg.continues_document(starts))
    assert torch.equal(found[..., :3], k[..., :3])
    for t, before in enumerate((0, 0, 2, 2, 3, 5)):
        assert torch.equal(found[:, t, :, 3:], k[:, before, :, 3:])
    assert torch.autograd.gradcheck(lambda k: tg.offset_keys(k, 2, tg.continues_document(starts)), (k,))


def test_the_key_offset_is_an_option_like_any_other(counted):
    """Of half of the dimensions without rotary embedding; it adds no parameter."""
    check_option(dict(KEY_OFFSET=1), counted)
    assert config(RECORD_LIKE, KEY_OFFSET=1).offset_dims == 2  # of 8, of which 4 have rotary embedding
    assert tg.parameter_count(config(RECORD_LIKE, KEY_OFFSET=1)) == tg.parameter_count(config(RECORD_LIKE))


def test_a_window_is_an_option_like_any_other(counted):
    """It adds no parameter, and changes nothing in documents that it holds."""
    check_option(dict(WINDOW_ATTN_SIZE=3, WINDOW_ATTN_LAYERS="0,2"), counted)
    assert tg.parameter_count(config(RECORD_LIKE, WINDOW_ATTN_SIZE=3)) == tg.parameter_count(config(RECORD_LIKE))
    with_window, without = (features(RECORD_LIKE, "float32", WINDOW_ATTN_SIZE=size) for size in (3, 0))
    assert with_window.window_layers == (0, 2, 4) and without.window_layers == ()


def test_the_channel_smear_gate_does_nothing_where_a_document_begins():
    gate = tg.SmearGate(config(POLY_LIKE).model).double()
    assert not gate.weight.any() and gate.weight.numel() == 32  # half of each channel's neighbour, at first
    torch.nn.init.normal_(gate.weight, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y, g = gate(x, documents_from(torch.tensor([[0, 0, 2, 2, 2, 5]]))), torch.sigmoid(gate.weight)
    assert torch.equal(y[0, [0, 2, 5]], x[0, [0, 2, 5]])
    for t in (1, 3, 4):
        assert torch.allclose(y[0, t], (1 - g) * x[0, t] + g * x[0, t - 1])


def test_initial_weights_of_pairs_and_values():
    """Nothing is added at first, and both begin to learn at once: a product of two zeros never would."""
    c = config(POLY_LIKE, VOCAB_SIZE=500, COMPUTE_DTYPE="float32")
    model = tg.new_model(c)
    p = dict(model.named_parameters())
    projection = p["bigram.projection"]
    assert not p["bigram.table"].any() and torch.allclose(projection.T @ projection, torch.eye(12), atol=1e-5)
    assert p["bigram.scale"].item() == pytest.approx(0.05) and p["value_embeds.scale"].item() == pytest.approx(0.1)
    assert abs(p["value_embeds.table"].std().item() - 0.01) < 1e-3 and not p["value_embeds.projection"].any()
    assert [p[f"blocks.{i}.value_scale"].item() for i in (3, 5)] == [1, 1] and "blocks.4.value_scale" not in p
    with torch.no_grad():  # outputs begin at zero, and so do the gradients of what feeds them
        p["qo_bank"][6:].normal_(std=0.1)
    model(*random_batch(c, 2, 16), looped=False)[0].sum().backward()
    assert p["bigram.table"].grad.any() and p["value_embeds.projection"].grad.any()


def test_the_projection_of_value_embeddings_begins_orthogonal_where_asked():
    """And nothing else changes: it is drawn last."""
    zero, orthogonal = (
        dict(tg.new_model(config(POLY_LIKE, COMPUTE_DTYPE="float32", VE_INIT=kind)).named_parameters())
        for kind in ("zero", "orthogonal")
    )
    projection = orthogonal["value_embeds.projection"]
    rows, columns = projection.shape
    gram = projection.T @ projection if rows > columns else projection @ projection.T
    assert torch.allclose(gram, torch.eye(min(rows, columns)), atol=1e-5)
    assert {name for name, p in zero.items() if not torch.equal(p, orthogonal[name])} == {"value_embeds.projection"}


def test_poly5_has_the_size_of_a_sum_by_hand():
    """Vocabulary 1024, width 512, 11 layers, 256 values, 1536 hidden, 5 skips."""
    banks = 22 * 512 * 512 + 22 * 256 * 512 + 2 * 11 * 1536 * 512
    vectors = 11 * (2 * 512 + 512 + 512 + 8) + 5 * 512 + 512  # mixes, scales, gains; skips; smear
    pairs, values = 1536 * 128 + 512 * 128 + 1, 1024 * 128 + 256 * 128 + 1 + 2
    expected = 1024 * 512 + banks + vectors + pairs + values
    assert tg.parameter_count(config({"PRESET": "poly5"})) == expected == 26_928_220


def test_initial_weights_depend_on_the_seed_alone():
    def weights(seed):
        torch.manual_seed(torch.randint(10**6, ()).item())  # the global stream must play no part
        model = tg.new_model(config(RECORD_LIKE, SEED=seed))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(3), weights(3)) and not torch.equal(weights(3), weights(4))


def test_parameters_are_counted_without_allocation():
    for base in (TINY, RECORD_LIKE, ODD, POLY_LIKE):
        c = config(base)
        assert tg.parameter_count(c) == sum(p.numel() for p in tg.new_model(c).parameters())


class CountedBackend:
    """A backend of torch.compile that counts the graphs it is given and runs them without a compiler."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)


@pytest.fixture
def counted():
    """A CountedBackend, with no graph of other tests before or after: a function may have only so many."""
    torch._dynamo.reset()
    yield CountedBackend()
    torch._dynamo.reset()


def test_every_training_variant_of_poly5_is_one_graph_with_the_eager_result(counted):
    """Frozen layers and late QAT act in the compiled graph: each has its own, and none is compiled again."""
    c = config(POLY, NUM_LAYERS=3, VE_LAYERS="1,2", ATTENTION="blocked")
    model, batch = build_model(c), random_batch(c, 2, 16)
    compiled = torch.compile(model, backend=counted, dynamic=False, fullgraph=True)
    variants = [(1, None), (2, None), (3, None), (3, grids_of(c))]
    for _ in range(2):
        for layers, grids in variants:
            call = dict(looped=False, trainable_layers=layers, fake_quant=grids)
            found, expected = compiled(*batch, **call), model(*batch, **call)
            assert all(torch.allclose(x, y, rtol=1e-9) for x, y in zip(found, expected, strict=True))
            with torch.no_grad():  # evaluation happens between steps
                compiled(*batch, looped=False, temperature=0.9)
            for outputs in (found, expected):
                model.zero_grad(set_to_none=True)
                outputs[0].sum().backward()
                frozen = {name for name, p in model.named_parameters() if p.grad is None}
                assert frozen == {
                    n for i in range(layers, 3) for n, _ in model.named_parameters() if f"blocks.{i}." in n
                }
                for bank in (model.qo_bank, model.up_bank):
                    assert [g.any().item() for g in bank.grad] == [i % 3 < layers for i in range(len(bank))]
    assert counted.graphs == len(variants) + 1


SHORT = dict(
    RECORD_LIKE,
    VOCAB_SIZE=48,
    COMPUTE_DTYPE="float64",
    NUM_LAYERS=3,
    LOOP_START=1,
    LOOP_END=1,
    NUM_LOOPS=1,
    PARALLEL_START_LAYER=2,
    XSA_LAST_N=3,
)


def check_graphs(c, counted):
    """Traced with fullgraph=True, which refuses a break, and run without a compiler: values and gradients agree."""
    model, batch = build_model(c), random_batch(c, 2, 16)
    compiled = torch.compile(model, backend=counted, dynamic=False, fullgraph=True)
    for looped in (False, True, False, True):
        found, expected = compiled(*batch, looped=looped), model(*batch, looped=looped)
        assert all(torch.allclose(x, y, rtol=1e-9) for x, y in zip(found, expected, strict=True))
        ours, plain = gradients(model, *found), gradients(model, *expected)
        assert all(torch.allclose(ours[name], plain[name], rtol=1e-7, atol=1e-10) for name in plain)
    assert counted.graphs == 2
    with torch.no_grad():
        assert torch.allclose(compiled(*batch, looped=True)[0], expected[0], rtol=1e-9)
    assert counted.graphs == 3  # without gradients


@pytest.mark.parametrize("attention", ["blocked", "sdpa"])
def test_each_layer_order_is_one_graph_with_the_eager_result(attention, counted):
    check_graphs(config(SHORT, ATTENTION=attention), counted)


def test_the_trunk_alone_is_one_graph(counted):
    """What tools/generate.py and the legality proofs read breaks no graph either."""
    c = config(SHORT)
    model, batch = build_model(c), random_batch(c, 2, 16)

    def logits(ids, documents):
        return model.head_logits(model.trunk(ids, documents, looped=True))

    compiled = torch.compile(logits, backend=counted, dynamic=False, fullgraph=True)
    assert torch.allclose(compiled(batch.ids, batch.documents), logits(batch.ids, batch.documents), rtol=1e-9)
    assert counted.graphs == 1


# ------------------------------------------------------------------------------------ what an option of the model keeps


@torch.no_grad()
def check_artifact(c):
    """What an artifact holds is loaded as the same model, bit for bit."""
    stored = tg.quantize({name: p.detach() for name, p in build_model(c).named_parameters()}, tg.Calibration({}), c)
    loaded, found = tg.load_artifact(tg.pack(stored, c), config(TINY), set(), torch.device("cpu"))
    by_hand, batch = tg.new_model(c), random_batch(c, 3, 32)
    by_hand.load_state_dict(tg.dequantize(stored))
    assert found.model == c.model
    for looped in (False, True):
        assert all(map(torch.equal, loaded(*batch, looped=looped), by_hand(*batch, looped=looped)))


def check_option(knobs, counted):
    """An option leaks no token, leaves layers that rest alone, and works with adapters, in artifacts and compiled.

    With looped layers and parallel streams; `test_the_forward_pass_is_that_of_the_specification` checks the values.
    """
    for dtype in ("bfloat16", "float32"):
        for attention in ("blocked", "sdpa"):
            c = features(RECORD_LIKE, dtype, ATTENTION=attention, **knobs)
            check_separate_documents(c)
            check_causality(c)
        for looped in (False, True):
            check_zero_adapters(config(RECORD_LIKE, VOCAB_SIZE=48, COMPUTE_DTYPE=dtype, **knobs), looped)
    check_frozen_layers(config(RECORD, **knobs))
    check_artifact(config(RECORD_LIKE, **knobs))
    check_graphs(config({**SHORT, **knobs}), counted)


def check_neutral_start(switch, others=None):
    """With its initial values an option changes no bit, the other initial weights are the same, and its own train.

    Returns the option's own parameters, by name.
    """
    without, c = (config(RECORD_LIKE, COMPUTE_DTYPE="float32", **(others or {}), **on) for on in ({}, switch))
    plain, fresh, model = tg.new_model(without), tg.new_model(c), tg.new_model(c)
    own = {name: p for name, p in model.named_parameters() if name not in dict(plain.named_parameters())}
    assert own and all(torch.equal(p, dict(fresh.named_parameters())[name]) for name, p in plain.named_parameters())
    weights = build_model(without).state_dict()
    assert set(model.load_state_dict(weights, strict=False).missing_keys) == set(own)
    plain.load_state_dict(weights)
    batch = random_batch(c, 2, 32)
    for looped in (False, True):
        found = model(*batch, looped=looped)
        assert all(map(torch.equal, found, plain(*batch, looped=looped)))
        gradients = torch.autograd.grad(found[0].sum(), list(own.values()), allow_unused=True)
        assert any(g is not None and g.any() for g in gradients)
    return own


def test_options_of_the_field_keep_what_an_option_must(counted):
    check_option(dict(GATED_XSA=1, VALUE_RESIDUAL=1, ASYM_LOGIT_RESCALE=1), counted)


def test_what_options_of_the_field_start_from():
    """XSA without effect, half of the first layer's values, and one bound of the softcap; each can learn."""
    c = config(RECORD_LIKE, COMPUTE_DTYPE="float64", GATED_XSA=1, VALUE_RESIDUAL=1, ASYM_LOGIT_RESCALE=1)
    model = tg.new_model(c)
    assert model.softcaps.tolist() == [c.logit_softcap] * 2
    assert not any(block.xsa_gate.any() for block in model.blocks)
    assert model.blocks[0].value_gate is None and not any(block.value_gate.any() for block in model.blocks[1:])
    weights = {name: p for name, p in model.named_parameters() if name in tg.BANKS}
    for p in weights.values():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    batch = random_batch(c, 2, 32)
    model(*batch, looped=True)[0].sum().backward()
    own = [model.softcaps, *(b.xsa_gate for b in model.blocks), *(b.value_gate for b in model.blocks[1:])]
    assert all(p.grad.all() for p in own)
    off = dict(XSA_LAST_N=0, GATED_XSA=0, ASYM_LOGIT_RESCALE=0)
    plain = tg.new_model(config(RECORD_LIKE, COMPUTE_DTYPE="float64", VALUE_RESIDUAL=1, **off))
    plain.load_state_dict(model.state_dict(), strict=False)
    for found, expected in zip(model(*batch, looped=True), plain(*batch, looped=True), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_options_that_exist_keep_what_an_option_must(counted):
    check_option(dict(PAIRS, VE_LAYERS="1,2"), counted)

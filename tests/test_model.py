"""The forward pass: against a plain one, causality, isolation of documents, normalization, adapters, the plan."""

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
PAIRS = dict(BIGRAM_VOCAB_SIZE=23, VE_DIM=6, VE_LAYERS="1,4")  # with loops, lanes and gates
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
    "one layer": dict(BASELINE, NUM_LAYERS=1),
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


@pytest.mark.parametrize("attention", ["blocked", "sdpa"])
@pytest.mark.parametrize(
    "name, looped",
    [*((name, False) for name in CONFIGURATIONS), ("record", True), ("odd", True), ("record with pairs", True)],
)
def test_the_forward_pass_is_that_of_the_specification(name, looped, attention):
    c = config(CONFIGURATIONS[name], ATTENTION=attention)
    model, batch = build_model(c, seed=3), random_batch(c, 2, 13, seed=5, document_length=5)
    assert (batch.documents.starts.amax(1) > 0).all()  # several documents in each row
    noise = torch.randn(2, 13, c.model_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.1
    nll, lse = model(*batch, looped=looped, noise=noise)
    expected_nll, expected_lse = Reference(model)(batch, looped, noise)
    assert torch.allclose(nll, expected_nll, rtol=1e-9, atol=1e-9)
    assert torch.allclose(lse, expected_lse, rtol=1e-9, atol=1e-9)
    found, expected = gradients(model, nll, lse), gradients(model, expected_nll, expected_lse)
    one_lane = {f"blocks.{i}.stream_mix" for i in range(c.num_layers) if i < c.parallel_start_layer}
    unreached = []
    for parameter, gradient in expected.items():
        scale = gradient.abs().sum() / max(1, gradient.numel())
        assert torch.allclose(found[parameter], gradient, rtol=1e-7, atol=1e-8 * scale + 1e-15), parameter
        unreached += [parameter] if not gradient.any() else []
    assert len(set(unreached) - one_lane) <= 3, unreached  # the comparison compares something


def test_the_full_record_order_matches_too():
    """11 layers, the loop 3..5 three times, lanes from 8: the published layout, at a small width."""
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


@pytest.mark.parametrize("attention", ["blocked", "sdpa"])
@pytest.mark.parametrize("base, dtype", SETTINGS, ids=IDS)
@torch.no_grad()
def test_documents_in_a_row_never_see_each_other(base, dtype, attention):
    c = features(base, dtype, ATTENTION=attention)
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


@pytest.mark.parametrize("attention", ["blocked", "sdpa"])
@pytest.mark.parametrize("base, dtype", SETTINGS, ids=IDS)
@torch.no_grad()
def test_a_token_changes_nothing_before_itself(base, dtype, attention):
    c = features(base, dtype, ATTENTION=attention)
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
def test_probabilities_of_all_tokens_sum_to_one(base, temperature):
    c = config(base, COMPUTE_DTYPE="float64", VOCAB_SIZE=48, TEMPERATURE=temperature)
    model, batch = build_model(c, seed=9), random_batch(c, 2, 20, seed=4)
    for looped in {False, c.loops}:
        total, reference = 0, model(*batch, looped=looped, apply_temperature=True)[1]
        for token in range(48):
            nll, lse = model(
                batch.ids, torch.full_like(batch.targets, token), batch.documents, looped=looped, apply_temperature=True
            )
            assert torch.equal(lse, reference)  # fixed before the target is seen
            total = total + torch.exp(-nll)
        assert torch.allclose(total, torch.ones_like(total), rtol=1e-12)


def test_softcap_bounds_every_probability():
    """|z| <= C, so no NLL exceeds 2C + log V."""
    c = config(TINY, COMPUTE_DTYPE="float64", VOCAB_SIZE=48, LOGIT_SOFTCAP=2.0)
    model, batch = build_model(c, seed=1), random_batch(c, 2, 20)
    with torch.no_grad():
        model.embedding.mul_(1000)
        nll, lse = model(*batch, looped=False)
    assert nll.max() <= 4 + torch.tensor(48.0).log() and nll.max() > 3
    assert lse.max() <= 2 + torch.tensor(48.0).log()


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-9), ("float32", 1e-4), ("bfloat16", 0.15)])
@pytest.mark.parametrize("softcap", ["tanh", "poly"])
@torch.no_grad()
def test_the_temperature_divides_the_softcapped_logits_at_evaluation_alone(softcap, dtype, tolerance):
    """A cap of 2, so that softcap(z) / T and softcap(z / T) are far apart."""
    knobs = dict(SOFTCAP_TYPE=softcap, LOGIT_SOFTCAP=2.0, TEMPERATURE=0.7)
    model, exact = (build_model(config(POLY, **{**knobs, "COMPUTE_DTYPE": d})) for d in (dtype, "float64"))
    batch = random_batch(model.config, 2, 11)
    tempered, plain = model(*batch, looped=False, apply_temperature=True), model(*batch, looped=False)
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


def test_late_rounding_is_that_of_the_grid_and_its_gradient_passes_straight_through():
    for knobs in (dict(), dict(QUANTIZER="uniform", MATRIX_BITS=4, MLP_BITS=3, ATTN_CLIP_SIGMAS=2.5)):
        c = config(POLY, **knobs)
        model, batch = build_model(c, seed=3), random_batch(c, 2, 9)
        nll, lse = model(*batch, looped=False, fake_quant=True)
        reference = Reference(model, fake_quant=True)
        expected = reference(batch, False)
        assert torch.allclose(nll, expected[0], rtol=1e-9, atol=1e-9)
        assert (nll - model(*batch, looped=False)[0]).abs().max() > 1e-3
        found = torch.autograd.grad(nll.sum(), [getattr(model, name) for name in tg.BANKS])
        wanted = torch.autograd.grad(expected[0].sum(), [reference.p[name] for name in tg.BANKS])
        assert all(torch.allclose(x, y, rtol=1e-7, atol=1e-10) and x.any() for x, y in zip(found, wanted, strict=True))


def test_resting_layers_get_no_gradient_and_the_others_the_same():
    for base in (POLY, dict(RECORD, **PAIRS)):
        c = config(base)
        model, batch = build_model(c), random_batch(c, 2, 9)
        whole = gradients(model, *model(*batch, looped=c.loops))
        model.rest(2)
        assert model.learning == 2
        nll, lse = model(*batch, looped=c.loops)
        (nll.mean() + 0.1 * lse.square().mean()).backward()
        for name, p in model.named_parameters():
            if name in tg.BANKS:
                learns = torch.arange(len(p)) % c.num_layers < 2
                assert torch.equal(p.grad[learns], whole[name][learns]) and p.grad[learns].any()
                assert not p.grad[~learns].any()
            elif name.startswith("blocks.") and int(name.split(".")[1]) >= 2:
                assert p.grad is None, name
            elif p.grad is not None:
                assert torch.equal(p.grad, whole[name]), name
        model.rest(c.num_layers)
        assert all(p.requires_grad for p in model.parameters())


# ------------------------------------------------------------------------------------------------------------ adapters


def make_adapters(c, rows, looped, rank=3, zero=False, seed=0):
    """A low-rank pair per row for every seat of every visit, and one for the head."""
    generator = torch.Generator().manual_seed(seed)
    wide = dict(q=c.model_dim, k=c.kv_dim, v=c.kv_dim, attention=c.model_dim, mlp=c.model_dim)

    def pair(outputs):
        a = torch.randn(rows, rank, c.model_dim, generator=generator).to(c.master_dtype) * 0.1
        b = torch.zeros(rows, outputs, rank) if zero else torch.randn(rows, outputs, rank, generator=generator) * 0.1
        return a.requires_grad_(), b.to(c.master_dtype).requires_grad_()

    visits = len(tg.layer_schedule(c, looped))
    return [{name: pair(n) for name, n in wide.items()} for _ in range(visits)] + [{"head": pair(c.vocab_size)}]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("knobs", [{}, dict(PAIRS, SMEAR_GATE_TYPE="channel", SOFTCAP_TYPE="poly")], ids=["", "pairs"])
@pytest.mark.parametrize("looped", [False, True])
def test_zero_adapters_change_no_bit_and_get_gradients(looped, knobs, dtype):
    c = config(RECORD_LIKE, VOCAB_SIZE=48, COMPUTE_DTYPE=dtype, **knobs)
    model, batch = build_model(c, seed=2), random_batch(c, 3, 24)
    plain = model(*batch, looped=looped)
    adapters = make_adapters(c, 3, looped, zero=True)
    adapted = model(*batch, looped=looped, adapters=adapters)
    assert all(torch.equal(x, y) for x, y in zip(plain, adapted, strict=True))
    adapted[0].mean().backward()
    for visit in adapters:
        for name, (a, b) in visit.items():
            assert b.grad.abs().sum() > 0, name  # B learns at once
            assert a.grad.abs().sum() == 0, name  # A only after B has moved


def test_each_adapter_acts_on_its_own_row_and_its_own_visit():
    c = config(RECORD_LIKE, VOCAB_SIZE=48, COMPUTE_DTYPE="float64")
    model, batch = build_model(c, seed=2), random_batch(c, 3, 24)
    with torch.no_grad():
        plain, _ = model(*batch, looped=True)
        full = make_adapters(c, 3, True)
        for place in range(len(full)):
            for name, (a, b) in full[place].items():
                only = [{} for _ in full]
                b = b.clone()
                b[0] = b[2] = 0
                only[place] = {name: (a, b)}
                nll, _ = model(*batch, looped=True, adapters=only)
                assert torch.equal(nll[[0, 2]], plain[[0, 2]]) and not torch.equal(nll[1], plain[1]), (place, name)


def test_adapters_are_low_rank_additions_to_the_matrices():
    """One adapter on q of a single-layer model equals a changed weight; so does the head's."""
    c = config(TINY, VOCAB_SIZE=48, NUM_LAYERS=1, COMPUTE_DTYPE="float64")
    model, batch = build_model(c, seed=2), random_batch(c, 1, 24)
    pairs = make_adapters(c, 1, False)
    with torch.no_grad():
        both, _ = model(*batch, looped=False, adapters=[{"q": pairs[0]["q"], "v": pairs[0]["v"]}, pairs[1]])
        for bank, row, (a, b) in ((model.qo_bank, 0, pairs[0]["q"]), (model.kv_bank, 1, pairs[0]["v"])):
            bank[row] += b[0] @ a[0]
        a, b = pairs[1]["head"]
        untied = tg.new_model(config(TINY, VOCAB_SIZE=48, NUM_LAYERS=1, COMPUTE_DTYPE="float64", TIE_EMBEDDINGS=0))
        untied.load_state_dict({**model.state_dict(), "head": model.embedding + b[0] @ a[0]})
        assert torch.allclose(untied(*batch, looped=False)[0], both, rtol=1e-10)


# ---------------------------------------------------------------------------------------------------- plan and weights


def plan(looped, **knobs):
    return tg.layer_schedule(config({"PRESET": "record"}, **knobs), looped)


def test_the_plan_of_the_record_is_the_specifications_example():
    plain, looped = plan(False), plan(True)
    assert [v.layer for v in plain] == list(range(11))
    assert [v.save for v in plain] == [True] * 5 + [False] * 6  # 0-4 | 5-10
    assert [v.skip for v in plain] == [None] * 5 + [0, 1, 2, 3, 4] + [None]
    assert [v.layer for v in looped] == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [v.save for v in looped] == [True] * 8 + [False] * 9  # 0,1,2,3,4,5,3,4 | 5,3,...,10
    assert [v.skip for v in looped] == [None] * 8 + list(range(8)) + [None]
    for visits in (plain, looped):
        assert [v.layer for v in visits if v.lanes] == [8, 9, 10]


def test_plans_pop_what_they_push():
    for layers in range(1, 9):
        for loops in range(3):
            c = config(TINY, NUM_LAYERS=layers, NUM_LOOPS=loops, LOOP_START=layers // 3, LOOP_END=layers // 2)
            for looped in (False, True):
                visits, depth = tg.layer_schedule(c, looped), 0
                for v in visits:
                    depth -= v.skip is not None
                    assert depth >= 0
                    depth += v.save
                assert depth == 0 and len(visits) == layers + looped * loops * (layers // 2 - layers // 3 + 1)


def test_the_looped_order_is_used_when_asked_for():
    c = config(RECORD_LIKE, VOCAB_SIZE=48, COMPUTE_DTYPE="float32")
    model, batch, visited = build_model(c), random_batch(c, 1, 8), []
    for number, block in enumerate(model.blocks):
        block.q.register_forward_pre_hook(lambda *_, number=number: visited.append(number))
    for looped in (False, True):
        visited.clear()
        model(*batch, looped=looped)
        assert visited == tg.execution_order(c, looped)


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
    gate = tg.SmearGate(c).double()
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


def test_the_channel_smear_gate_does_nothing_where_a_document_begins():
    gate = tg.SmearGate(config(POLY_LIKE)).double()
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
    assert p["bigram.scale"].item() == pytest.approx(0.05) and p["values.scale"].item() == pytest.approx(0.1)
    assert abs(p["values.table"].std().item() - 0.01) < 1e-3 and not p["values.projection"].any()
    assert [p[f"blocks.{i}.value_scale"].item() for i in (3, 5)] == [1, 1] and "blocks.4.value_scale" not in p
    with torch.no_grad():  # outputs begin at zero, and so do the gradients of what feeds them
        p["qo_bank"][6:].normal_(std=0.1)
    model(*random_batch(c, 2, 16), looped=False)[0].sum().backward()
    assert p["bigram.table"].grad.any() and p["values.projection"].grad.any()


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


def test_every_stage_of_poly5_is_one_graph_with_the_eager_result():
    """Resting layers and late rounding act in the compiled graph: each has its own, and none is compiled again."""
    c = config(POLY, NUM_LAYERS=3, VE_LAYERS="1,2", ATTENTION="blocked")
    model, batch = build_model(c), random_batch(c, 2, 16)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
    uses = [(1, False), (2, False), (3, False), (3, True)]
    for _ in range(2):
        for learning, rounded in uses:
            model.rest(learning)
            found, expected = (f(*batch, looped=False, fake_quant=rounded) for f in (compiled, model))
            assert all(torch.allclose(x, y, rtol=1e-9) for x, y in zip(found, expected))
            resting = {name for name, p in model.named_parameters() if not p.requires_grad}
            model.rest(3)  # evaluation happens between steps
            with torch.no_grad():
                compiled(*batch, looped=False, apply_temperature=True)
            for outputs in (found, expected):
                model.zero_grad(set_to_none=True)
                outputs[0].sum().backward()
                assert {name for name, p in model.named_parameters() if p.grad is None} == resting
                assert all(
                    p.grad[i].any() == (i % 3 < learning) for p in (model.qo_bank, model.up_bank) for i in range(len(p))
                )
    torch._dynamo.reset()  # of graphs for one function there may be only so many in a process
    assert len(graphs) == len(uses) + 1


@pytest.mark.parametrize("attention", ["blocked", "sdpa"])
def test_each_use_is_one_graph_with_the_eager_result(attention):
    """Traced with fullgraph=True, which refuses a break, and run without a compiler: values and gradients agree."""
    c = config(
        RECORD_LIKE,
        VOCAB_SIZE=48,
        COMPUTE_DTYPE="float64",
        ATTENTION=attention,
        NUM_LAYERS=3,
        LOOP_START=1,
        LOOP_END=1,
        NUM_LOOPS=1,
        PARALLEL_START_LAYER=2,
        XSA_LAST_N=3,
    )
    model, batch = build_model(c), random_batch(c, 2, 16)
    compiled = torch.compile(model, backend="aot_eager", dynamic=False, fullgraph=True)
    for looped in (False, True):
        found, expected = compiled(*batch, looped=looped), model(*batch, looped=looped)
        assert all(torch.allclose(x, y, rtol=1e-9) for x, y in zip(found, expected, strict=True))
        ours, plain = gradients(model, *found), gradients(model, *expected)
        assert all(torch.allclose(ours[name], plain[name], rtol=1e-7, atol=1e-10) for name in plain)
    with torch.no_grad():
        assert torch.allclose(compiled(*batch, looped=True)[0], expected[0], rtol=1e-9)

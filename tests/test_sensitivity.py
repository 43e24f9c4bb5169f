"""Sensitivities against autograd, what they predict of the loss, and the steps that follow from them."""

import itertools

import pytest
import torch

import train_gpt as tg
from helpers import POLY_LIKE, RECORD_LIKE, TINY, build_model, config, single_run

UNTIED = dict(TINY, TIE_EMBEDDINGS=0)
TABLES = dict(POLY_LIKE, QUANTIZER="uniform", RVQ_ENABLED=0)  # with bigrams and value embeddings
PARTS = {"qo_bank": ("q", "out"), "kv_bank": ("k", "v"), "up_bank": ("up",), "down_bank": ("down",)}


def make_trainer(base, data, **knobs):
    """A trainer of random weights, with sensitivities, that computes in float64."""
    knobs = dict(DATA_PATH=data, COMPUTE_DTYPE="float64", ROW_STEPS=0.5, TRAIN_BATCH_TOKENS=256) | knobs
    c = config(base, **knobs)
    return tg.Trainer(build_model(c, seed=3), tg.TrainLoader(c, single_run()), c, single_run())


# ------------------------------------------------------------------------------------------------ against autograd


def watched(monkeypatch, model):
    """Lists of (module's name, inputs, a zero added to its output) that fill when the model runs."""
    names = {id(module): name for name, module in model.named_modules()}
    calls = []
    for kind in (tg.Projection, tg.Lookup):
        forward = kind.forward

        def watch(self, *inputs, forward=forward):
            y = forward(self, *inputs)
            zero = torch.zeros_like(y, requires_grad=True)
            calls.append((names[id(self)], inputs, zero))
            return y + zero

        monkeypatch.setattr(kind, "forward", watch)
    return calls


def brute_force(trainer, first_step, monkeypatch):
    """Sums by projection and part of g^2 [r], of x x^T mean(g^2) and x x^T [c, c], and of g g^T mean(x^2) [r, r]; by
    table, of g^2 [n] and g g^T.
    """
    model, c = trainer.model, trainer.config
    squares, guided, plain, outputs, lookups = {}, {}, {}, {}, {}
    calls = watched(monkeypatch, model)
    for step in range(first_step, first_step + c.gptq_calibration_batches):
        for micro in range(trainer.layout.micro_steps):
            calls.clear()
            batch = trainer.loader.read((step, micro))
            predicted = model.log_probabilities(batch.ids, batch.documents, looped=c.loops)
            p = predicted.detach().exp()
            keys = trainer.loader.noise_keys(trainer.loader.sequence_numbers(step, micro)[: len(p)])
            z = torch.where(tg.random_bits(keys, *p.shape[1:]) < 0, -1.0, 1.0)
            at_logits = p.sqrt() * z - p * (p.sqrt() * z).sum(-1, keepdim=True)
            gradients = torch.autograd.grad((predicted * at_logits).sum(), [zero for _, _, zero in calls])
            for (name, (x, *_), zero), g in zip(calls, gradients, strict=True):
                assert g.shape == zero.shape
                if name.endswith("lookup"):
                    rows, columns = lookups.setdefault(name, [{}, torch.zeros(g.size(-1), g.size(-1), dtype=g.dtype)])
                    for index, vector in zip(x.flatten().tolist(), g.flatten(0, -2), strict=True):
                        rows[index] = rows.get(index, 0.0) + vector.square().sum().item()
                        columns += torch.outer(vector, vector)
                    continue
                widths = [g.size(-1)]
                place = name.removeprefix("blocks.")
                if name.endswith("qkv"):
                    own = c.model_dim, c.kv_dim, c.kv_dim
                    widths = [*own, g.size(-1) - sum(own)]  # a gate may follow
                for part, own in zip("qkv" if len(widths) > 1 else [""], g.split(widths, -1), strict=False):
                    key = place.replace("qkv", part) if part else place
                    for token, gradient in zip(x.detach().flatten(0, -2), own.flatten(0, -2), strict=True):
                        product = torch.outer(token, token)
                        squares[key] = squares.get(key, 0) + gradient.square()
                        guided[key] = guided.get(key, 0) + gradient.square().mean() * product
                        plain[key] = plain.get(key, 0) + product
                        power = token.square().mean()
                        outputs[key] = outputs.get(key, 0) + power * torch.outer(gradient, gradient)
    return squares, guided, plain, outputs, lookups


def close(found, expected):
    return torch.allclose(found.double(), expected.double(), rtol=2e-4, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("guided", [0, 1])
@pytest.mark.parametrize("base", [RECORD_LIKE, UNTIED, TABLES], ids=["looped", "untied", "tables"])
def test_sensitivities_are_the_squared_gradients_token_by_token(base, guided, data, monkeypatch):
    knobs = dict(GPTQ_ROW_GROUPS=2, GPTQ_CALIBRATION_BATCHES=1, TRAIN_BATCH_TOKENS=128)
    trainer = make_trainer(base, data, GUIDED_HESSIANS=guided, **knobs)
    c, model = trainer.config, trainer.model
    found = tg.calibrate(trainer, 3)
    squares, weighted, plain, outputs, lookups = brute_force(trainer, 3, monkeypatch)
    tokens = c.gptq_calibration_batches * c.train_batch_tokens
    head = "embedding" if model.head is None else "head"
    expected_hessians, expected_rows = {}, {}
    projections = {f"{name}.projection": f"{name}.project" for name in ("bigram", "value_embeds")}
    single = {head: "logits"} | (projections if base is TABLES else {})
    for bank in (*PARTS, *single):
        keys = [f"{i}.{part}" for part in PARTS.get(bank, ()) for i in range(c.num_layers)] or [single[bank]]
        rows = torch.stack([squares[key] for key in keys]) / tokens
        if guided:
            hessian = torch.stack([weighted[key] for key in keys]) / tokens
        else:
            hessian = torch.stack([plain[key] for key in keys]) / tokens * rows.mean(1)[:, None, None]
        expected_hessians[bank], expected_rows[bank] = hessian, rows / rows.mean(1, keepdim=True)
        assert (bank in found.outputs) == (bank != head)
        if bank != head:
            g = torch.stack([outputs[key] for key in keys])
            assert close(found.outputs[bank], g / g.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]), bank
    for name, (by_row, by_column) in lookups.items():
        table = "embedding" if name == "lookup" else name.replace(".lookup", ".table")
        n = len(dict(model.named_parameters())[table])
        total = torch.zeros(n, dtype=torch.float64)
        for index, value in by_row.items():
            total[index] = value / tokens
        credit = tg.UNSEEN_LOOKUPS * total.sum() / tokens  # that of one lookup, for each row
        total = (total + credit) * tokens / (tokens + tg.UNSEEN_LOOKUPS * n)
        own = by_column[None] / tokens / n
        if table in expected_hessians:  # tied: its errors also reach the logits
            total = total + expected_rows[table][0] * expected_hessians[table][0].trace()
            own = own + expected_hessians[table]
        expected_hessians[table], expected_rows[table] = own, (total / total.mean())[None]
    assert set(found.hessians) == set(found.rows) == set(expected_hessians)
    tables = {"bigram.table", "value_embeds.table", *projections} if base is TABLES else set()
    assert set(found.hessians) == {*tg.BANKS, "embedding", head, *tables}
    for name, hessian in expected_hessians.items():
        assert close(found.hessians[name], hessian), name
        assert close(found.rows[name], expected_rows[name]), name
        assert torch.allclose(found.rows[name].mean(1), torch.ones(len(hessian)), atol=1e-4)


def test_the_gradients_at_the_logits_have_the_fisher_information_as_covariance(monkeypatch):
    """Over all patterns of signs at once the mean is exact: 0 and diag(p) - p p^T."""
    width = 6
    signs = torch.tensor(list(itertools.product((5, -7), repeat=width)), dtype=torch.int32)
    monkeypatch.setattr(tg, "random_bits", lambda keys, length, w: signs[None])
    logits = torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leaf = logits.expand(1, len(signs), width).clone().requires_grad_()
    tg.fisher_backward(leaf.log_softmax(-1), torch.zeros(1, 2, dtype=torch.int32))
    p, g = logits.softmax(0), leaf.grad[0]
    assert torch.allclose(g.mean(0), torch.zeros(width, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(g.mT @ g / len(g), torch.diag(p) - torch.outer(p, p), atol=1e-12)


def test_calibration_reads_the_text_but_not_what_follows(data, monkeypatch):
    """It is about the model's own predictions, so the targets do not matter; with another seed, the signs differ."""
    trainer = make_trainer(UNTIED, data)
    found = tg.calibrate(trainer, 3)
    read = trainer.loader.read_sequences
    monkeypatch.setattr(trainer.loader, "read_sequences", lambda p: (b := read(p))._replace(targets=0 * b.targets))
    other = tg.calibrate(trainer, 3)
    assert all(torch.equal(h, other.hessians[name]) for name, h in found.hessians.items())
    reseeded = make_trainer(UNTIED, data, SEED=8)
    reseeded.model.load_state_dict(trainer.model.state_dict())
    assert not torch.equal(found.rows["head"], tg.calibrate(reseeded, 3).rows["head"])


def test_rows_never_seen_are_credited_with_a_lookup(data):
    """An untied embedding's rows of tokens that do not occur in calibration: others will meet them."""
    trainer = make_trainer(UNTIED, data)
    seen = torch.zeros(trainer.config.vocab_size, dtype=torch.bool)
    for step in range(5, 5 + trainer.config.gptq_calibration_batches):
        for micro in range(trainer.layout.micro_steps):
            seen[trainer.loader.read((step, micro)).ids] = True
    rows = tg.calibrate(trainer, 5).rows["embedding"][0]
    unseen = rows[~seen]
    assert len(unseen) and unseen.min() > 0 and torch.equal(unseen, unseen[:1].expand_as(unseen))
    assert (rows[seen] > unseen[0]).all()
    tokens = trainer.config.gptq_calibration_batches * trainer.config.train_batch_tokens
    of_one_lookup = (rows - unseen[0]).sum() / tokens
    assert torch.allclose(unseen[0], tg.UNSEEN_LOOKUPS * of_one_lookup, rtol=1e-4)


# ----------------------------------------------------------------------------------------------- what they predict


@pytest.mark.parametrize("name, matrix, tolerance", [("head", 0, 0.1), ("down_bank", -1, 0.15), ("kv_bank", 0, 0.6)])
def test_the_loss_is_predicted(name, matrix, tolerance, data):
    """Squared gradients are the curvature of the divergence.

    In the head and in the last MLP, a token's outputs move its own prediction alone, and independent errors leave
    nothing but sampling between both sides. Elsewhere what an error does to several tokens adds up or cancels.
    """
    trainer = make_trainer(UNTIED, data, GPTQ_CALIBRATION_BATCHES=6, TRAIN_BATCH_TOKENS=768)
    model, read = trainer.model, trainer.loader.read_sequences
    generator = torch.Generator().manual_seed(0)
    calibration = tg.calibrate(trainer, 0)
    hessian, rows = calibration.hessians[name][matrix].double(), calibration.rows[name][matrix].double()
    batches = [read(range(24 * step, 24 * step + 24)) for step in range(2)]
    weight = tg.as_batch(getattr(model, name).data)[matrix]
    kept, size = weight.clone(), 2e-3 * weight.std()
    predicted = measured = 0.0
    with torch.no_grad():
        before = [model.log_probabilities(b.ids, b.documents, looped=False) for b in batches]
        for _ in range(6):
            error = size * torch.randn(weight.shape, generator=generator)
            predicted += 0.5 * (rows * ((error.double() @ hessian) * error).sum(1)).sum().item()
            weight.copy_(kept + error)
            for b, expected in zip(batches, before, strict=True):
                found = model.log_probabilities(b.ids, b.documents, looped=False)
                measured += (expected.exp() * (expected - found)).sum(-1).mean().item() / len(batches)
            weight.copy_(kept)
    assert measured > 0 and abs(predicted / measured - 1) < tolerance, (predicted / 6, measured / 6)


# ------------------------------------------------------------------------------------------------------- row steps

BANK = ("up_bank", "down_bank")
FREE = dict(TINY, SCALE_GRID=0, MLP_CLIP_SIGMAS=12, ATTN_CLIP_SIGMAS=12)  # scales are exact, and nothing is clipped


def random_case(**knobs):
    """A config, weights of very different rows and matrices, and calibration of the MLP's banks."""
    c = config(FREE, **knobs)
    generator = torch.Generator().manual_seed(1)
    weights, hessians, rows = {}, {}, {}
    for name, shape in zip(BANK, ((3, 64, 32), (3, 32, 64)), strict=True):
        spread = torch.exp2(torch.randn(*shape[:2], 1, generator=generator))
        weights[name] = torch.randn(shape, generator=generator) * spread
        x = torch.randn(shape[0], 200, shape[2], generator=generator) * torch.tensor([0.1, 1.0, 9.0])[:, None, None]
        hessians[name] = x.mT @ x / 200
        sensitivity = torch.exp(torch.randn(shape[:2], generator=generator))
        rows[name] = sensitivity / sensitivity.mean(1, keepdim=True)
    return c, weights, tg.Calibration(hessians, rows, {})


def ridge(c, covariance, strength):
    return strength * covariance.size(-1) / (c.gptq_calibration_batches * c.train_batch_tokens)


@pytest.mark.parametrize("batches", [1, 64])
def test_covariances_of_few_tokens_are_shrunk(batches):
    """H and G, by their width over the number of tokens; without gradients GPTQ is damped as ever."""
    c, weights, calibration = random_case(GPTQ_CALIBRATION_BATCHES=batches)
    outputs = {"up_bank": torch.eye(64).expand(3, 64, 64) + 0.9}
    sensitive = random_case(GPTQ_CALIBRATION_BATCHES=batches, GPTQ_ROW_GROUPS=1)[0]
    plain = tg.plan_quantization(weights, calibration, c)
    shrunk = tg.plan_quantization(weights, calibration._replace(outputs=outputs), sensitive)
    for name, h in calibration.hessians.items():
        for factors, added in ((plain, 0.0), (shrunk, ridge(c, h, tg.INPUT_RIDGE))):
            expected = tg.factor_hessian(h, c.gptq_damp + added)
            assert torch.equal(factors[name].inverse_cholesky, expected.inverse_cholesky)
    g = outputs["up_bank"]
    expected = tg.inverse_cholesky(g, c.gptq_damp + ridge(c, g, tg.OUTPUT_RIDGE))
    assert torch.equal(shrunk["up_bank"].row_cholesky, expected)


def log2_scales(c, weights, calibration):
    return {name: q.scales.double().log2() for name, q in tg.quantize(weights, calibration, c).items()}


@pytest.mark.parametrize("quantizer", ["uniform", "trellis"])
def test_without_exponents_nothing_changes(quantizer):
    plain, weights, calibration = random_case(QUANTIZER=quantizer)
    c = config(FREE, QUANTIZER=quantizer, GUIDED_HESSIANS=1)
    assert c.takes_sensitivities and not plain.takes_sensitivities
    for knobs in (plain, c):
        before = tg.quantize(weights, tg.Calibration(calibration.hessians), knobs)
        after = tg.quantize(weights, calibration, knobs)
        assert all(
            torch.equal(after[n].codes, q.codes) and torch.equal(after[n].scales, q.scales) for n, q in before.items()
        )
    factors = tg.plan_quantization(weights, calibration, c)
    assert all(factor.log2_steps is None for factor in factors.values())


@pytest.mark.parametrize("power", [0.5, 0.0])
def test_std_steps_are_a_power_of_the_rows_deviation(power):
    c, weights, calibration = random_case(STD_STEPS=power)
    for name, scales in log2_scales(c, weights, calibration).items():
        deviation = weights[name].double().std(-1, correction=0).log2()
        deviation -= deviation.mean(1, keepdim=True)
        assert torch.allclose(scales - scales.mean(1, keepdim=True), power * deviation, atol=2e-3)


@pytest.mark.parametrize("power", [0.75, 1.0])
def test_row_steps_are_a_power_of_the_rows_sensitivity(power):
    plain, weights, calibration = random_case()
    c = random_case(ROW_STEPS=power)[0]
    before, after = (log2_scales(x, weights, calibration) for x in (plain, c))
    for name in BANK:
        moved = after[name] - before[name]
        logs = (calibration.rows[name].double() + tg.SENSITIVITY_FLOOR).log2()
        expected = -power / 2 * (logs - logs.mean(1, keepdim=True))
        assert torch.allclose(moved - moved.mean(1, keepdim=True), expected, atol=3e-3)
        assert torch.allclose(moved.mean(1), moved.mean().expand(3), atol=3e-3)  # between matrices nothing changes


def brute_force_left(g, groups, damp):
    """What is left of the diagonal of G [r, r]: of each row, the Schur complement without the rows of later groups."""
    g = g.double() + damp * g.diagonal().mean() * torch.eye(len(g))
    left = torch.empty(len(g), dtype=torch.float64)
    for row in range(len(g)):
        group = row % groups
        later = [n for n in range(len(g)) if n % groups > group]
        explained = g[row, later] @ torch.linalg.solve(g[later][:, later], g[later, row]) if later else 0.0
        left[row] = g[row, row] - explained
    return left


@pytest.mark.parametrize("groups", [0, 1, 4, 64])
@pytest.mark.parametrize("power", [0.85, 1.0])
def test_matrix_steps_are_a_power_of_the_determinants(power, groups):
    """H's, and the geometric mean of what compensation leaves of the rows' sensitivities."""
    c, weights, calibration = random_case(MATRIX_STEPS=power, MLP_BITS=5, GPTQ_ROW_GROUPS=groups)
    generator = torch.Generator().manual_seed(2)
    for name in BANK if groups else ():
        mixed = torch.randn(3, 400, weights[name].size(1), generator=generator)
        mixed = mixed * calibration.rows[name].sqrt()[:, None] + 0.7 * mixed[..., :1]
        g = mixed.mT @ mixed
        calibration.outputs[name] = g / g.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
    plain = log2_scales(config(FREE, MLP_BITS=5), weights, calibration)
    levels = []
    for name, scales in log2_scales(c, weights, calibration).items():
        h = calibration.hessians[name].double()
        damping = (c.gptq_damp + ridge(c, h, tg.INPUT_RIDGE)) * h.diagonal(dim1=-2, dim2=-1).mean(-1)
        log_det = torch.linalg.slogdet(h + damping[:, None, None] * torch.eye(h.size(-1))).logabsdet / h.size(-1)
        left = calibration.rows[name].double() + tg.SENSITIVITY_FLOOR
        if groups:
            outputs = calibration.outputs[name]
            damp = c.gptq_damp + ridge(c, outputs, tg.OUTPUT_RIDGE)
            left = torch.stack([brute_force_left(g, groups, damp) for g in outputs])
        expected = -0.5 * (log_det * tg.LOG2_E + left.log2().mean(1))
        levels.append(scales.mean(1) - power * expected - (1 - power) * plain[name].mean(1))
    levels = torch.cat(levels)
    assert torch.allclose(levels, levels.mean().expand_as(levels), atol=5e-3)


def test_all_steps_keep_their_geometric_mean():
    c, weights, calibration = random_case(MATRIX_STEPS=0.85, ROW_STEPS=0.75, STD_STEPS=0.5)
    weights["up_bank"][1] *= 1e6  # beyond STEP_LIMIT
    factors = tg.plan_quantization(weights, calibration, c)
    total = sum(f.log2_steps.double().sum().item() * weights[n].size(-1) for n, f in factors.items())
    assert abs(total) / sum(w.numel() for w in weights.values()) < 1e-5
    every = torch.cat([f.log2_steps.flatten() for f in factors.values()])
    assert every.std() > 0.5 and every.abs().max() <= 2 * tg.STEP_LIMIT


STEPS = dict(MATRIX_STEPS=1, ROW_STEPS=1, STD_STEPS=0, COLUMN_STEPS=0.75)
DEGENERATE = {
    "a matrix of zeros": lambda weights, calibration: weights["up_bank"][0].zero_(),
    "all matrices of zeros": lambda weights, calibration: [w.zero_() for w in weights.values()],
    "rows of zeros": lambda weights, calibration: weights["up_bank"][:, ::2].zero_(),
    "rows never seen": lambda weights, calibration: calibration.rows["up_bank"][:, 1:].zero_(),
    "a matrix never seen": lambda weights, calibration: calibration.rows["up_bank"][0].zero_(),
    "no gradient": lambda weights, calibration: calibration.hessians["up_bank"][0].zero_(),
    "no gradient at all": lambda weights, calibration: [h.zero_() for h in calibration.hessians.values()],
    "rank one": lambda weights, calibration: calibration.hessians["down_bank"].fill_(1.0),
}


@pytest.mark.parametrize("quantizer", ["uniform", "trellis"])
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_weights_and_hessians_leave_the_other_steps_alone(case, quantizer):
    c, weights, calibration = random_case(**STEPS, QUANTIZER=quantizer)
    before = tg.plan_quantization(weights, calibration, c)
    DEGENERATE[case](weights, calibration)
    factors = tg.plan_quantization(weights, calibration, c)
    stored = tg.quantize(weights, calibration, c)
    for name, q in stored.items():
        tg.check_stored(q)
        steps = factors[name].log2_steps
        assert steps.isfinite().all() and steps.abs().max() <= 2 * tg.STEP_LIMIT + 1e-3
        error = (tg.restore(q) - weights[name]).abs()
        assert error.isfinite().all() and (q.codes.abs().int().max() <= tg.WIDE_LIMIT)
    if "all" not in case:  # one of six matrices: what the others' steps may move is a sixth of the limit
        after, plain = (f["down_bank"].log2_steps for f in (factors, before))
        assert after is not None and plain is not None
        moved = (after - plain).abs()
        assert moved.max() <= tg.STEP_LIMIT / 2 or case == "rank one"


def test_finer_rows_are_not_clipped():
    """A uniform quantizer's bits follow from steps, where there are any."""
    c, weights, calibration = random_case(**STEPS, MLP_BITS=4, MLP_CLIP_SIGMAS=4)
    for name, q in tg.quantize(weights, calibration, c).items():
        assert q.codes.abs().max() > 7
        error = (weights[name] - tg.restore(q)) / q.scales.float()[..., None]
        scale = 1.0 if "columns" not in q.extras else torch.exp2(q.extras["columns"].float() / 2)[:, None]
        assert (error / scale).square().mean().sqrt() < 2  # compensation moves weights by few steps; clipping by many


def test_small_tables_have_hessians_but_no_corrections(data):
    """A table below 65,536 elements stays fp16: no salient columns, residuals or corrections go there."""
    trainer = make_trainer(
        TABLES,
        data,
        GUIDED_HESSIANS=1,
        AWQ_GROUPS=200,
        RVQ_ENABLED=1,
        LQER_ENABLED=1,
        LQER_SELECT="norm",
        LQER_TOP_K=99,
    )
    weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
    calibration = tg.calibrate(trainer, 0)
    assert {"bigram.table", "value_embeds.table"} <= set(calibration.hessians)
    data = tg.make_artifact(weights, calibration, 10**9, trainer.config, lambda line: None)
    for name, q in tg.unpack(data)[1].items():
        tg.check_stored(q)
        assert (q.scales is not None) or not q.extras, name


@pytest.mark.parametrize(
    "knob, value, allowed",
    [
        ("MATRIX_STEPS", 0.5, 0),
        ("ROW_STEPS", 0.5, 0),
        ("STD_STEPS", 0.5, 1),
        ("GUIDED_HESSIANS", 1, 0),
        ("GPTQ_ROW_GROUPS", 2, 0),
    ],
)
def test_a_quantizer_that_chooses_its_own_scales_refuses_steps(knob, value, allowed):
    with pytest.raises(tg.ConfigError, match=f"^{knob}=.*must be {allowed} with QUANTIZER=gptq_lite") as error:
        config(QUANTIZER="gptq_lite", **{knob: value})
    assert "\n" not in str(error.value)
    assert config(QUANTIZER="gptq_lite").quantizer == "gptq_lite"

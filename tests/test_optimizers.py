"""Groups, Muon and AdamW against plain float64 versions, clipping, and the same update on any number of ranks."""

import json
import math

import numpy as np
import pytest
import torch

import train_gpt as tg
from helpers import POLY_LIKE, RECORD_LIKE, ROOT, TINY, build_model, built_once, config, fork, random_batch, single_run
from rank_worker import run_jobs

UNTIED = dict(TINY, TIE_EMBEDDINGS=0)
EXACT = dict(COMPUTE_DTYPE="float64", VOCAB_SIZE=48)


# -------------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize(
    "base",
    [TINY, UNTIED, RECORD_LIKE, POLY_LIKE, dict(POLY_LIKE, TIE_EMBEDDINGS=0)],
    ids=["tiny", "untied", "record", "poly", "untied poly"],
)
def test_every_parameter_is_in_one_group(base):
    c = config(
        base,
        MATRIX_LR=0.1,
        SCALAR_LR=0.2,
        TIED_EMBED_LR=0.3,
        EMBED_LR=0.4,
        HEAD_LR=0.5,
        MUON_WD=0.01,
        ADAM_WD=0.02,
        EMBED_WD=0.03,
    )
    model = tg.new_model(c)
    groups = tg.parameter_groups(model, c)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {g.name: sorted(names[id(p)] for p in g.parameters) for g in groups}
    assert sorted(sum(found.values(), [])) == sorted(names.values())
    assert found["banks"] == ["down_bank", "kv_bank", "qo_bank", "up_bank"] and found["embedding"] == ["embedding"]
    small = ("scale", "mix", "gain", "gate", "skip", "smear", "projection")
    assert all(any(word in name for word in small) for name in found["scalars"])
    rates = {g.name: (g.muon, g.lr, g.weight_decay) for g in groups}
    assert rates["banks"] == (True, 0.1, 0.01) and rates["scalars"] == (False, 0.2, 0.02)
    assert rates["embedding"] == (False, 0.3 if c.tie_embeddings else 0.4, 0.03)
    if c.ve_dim:
        assert found["bigram"] == ["bigram.table"] and found["value_embeds"] == ["value_embeds.table"]
        assert rates["bigram"] == rates["value_embeds"] == rates["embedding"]
    assert rates.get("head") == (None if c.tie_embeddings else (False, 0.5, 0.03))


def test_a_parameter_in_two_groups_is_noticed(monkeypatch):
    c = config()
    monkeypatch.setattr(tg, "BANKS", (*tg.BANKS, "embedding"))
    with pytest.raises(RuntimeError, match="in no optimizer group, or in two"):
        tg.parameter_groups(tg.new_model(c), c)


# ----------------------------------------------------------------------------------------------- plain float64 versions

POLAR = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233002106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]
CLASSIC = [(3.4445, -4.775, 2.0315)] * 5


def newton_schulz(matrix, polynomials):
    """Odd polynomials of a matrix's singular values, by SVD: no iteration of products at all."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s = s / (np.linalg.norm(matrix) + 1e-7)
    for a, b, c in polynomials:
        s = a * s + b * s**3 + c * s**5
    return u @ np.diag(s) @ vt


def muon_reference(weight, gradients, c):
    """The weight after one step for each gradient, with Nesterov momentum."""
    momentum = np.zeros_like(weight)
    tall = weight.shape[0] >= weight.shape[1]  # then a row is a neuron, else a column
    squares = np.zeros(max(weight.shape))
    polynomials = {"classic": CLASSIC, "polar_express": POLAR}[c.muon_coefficients]
    for step, gradient in enumerate(gradients):
        share = min(1, step / c.muon_momentum_warmup_steps) if c.muon_momentum_warmup_steps else 1
        beta = c.muon_momentum_warmup_start + share * (c.muon_momentum - c.muon_momentum_warmup_start)
        momentum = beta * momentum + (1 - beta) * gradient
        update = (1 - beta) * gradient + beta * momentum
        if c.muon_row_normalize:
            update = update / np.linalg.norm(update, axis=1, keepdims=True)
        rows, columns = weight.shape
        update = newton_schulz(update, polynomials) * max(1, rows / columns) ** 0.5
        if c.normuon_beta2:
            own = (update**2).mean(axis=1 if tall else 0) / max(1, rows / columns)
            squares = c.normuon_beta2 * squares + (1 - c.normuon_beta2) * own
            divided = update / np.sqrt(squares[:, None] if tall else squares)
            update = divided * np.linalg.norm(update) / np.linalg.norm(divided)
        weight = weight * (1 - c.matrix_lr * c.muon_wd) - c.matrix_lr * update
    return weight


def adam_reference(weight, gradients, lr, decay, c):
    first = second = np.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        first = c.beta1 * first + (1 - c.beta1) * gradient
        second = c.beta2 * second + (1 - c.beta2) * gradient**2
        mean, deviation = first / (1 - c.beta1**step), np.sqrt(second / (1 - c.beta2**step))
        weight = weight * (1 - lr * decay) - lr * mean / (deviation + c.adam_eps)
    return weight


def clipped(gradients, limit):
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    return {name: g * min(1, limit / (norm + 1e-6)) for name, g in gradients.items()} if limit else gradients


RECIPES = {
    "classic": dict(),
    "polar": dict(MUON_COEFFICIENTS="polar_express"),
    "rows": dict(MUON_ROW_NORMALIZE=1),
    "normuon": dict(NORMUON_BETA2=0.7),
    "decay": dict(MUON_WD=0.3, ADAM_WD=0.2, EMBED_WD=0.1),
    "rounded": dict(MUON_GRADIENT_DTYPE="bfloat16", GRAD_CLIP_NORM=0.05),
    "clip": dict(GRAD_CLIP_NORM=0.05),
    "no clip in effect": dict(GRAD_CLIP_NORM=1e6),
    "momentum": dict(
        MUON_MOMENTUM=0.6, MUON_MOMENTUM_WARMUP_START=0.1, MUON_MOMENTUM_WARMUP_STEPS=2, BETA1=0.5, BETA2=0.9
    ),
    "record": dict(
        MUON_COEFFICIENTS="polar_express",
        MUON_ROW_NORMALIZE=1,
        MUON_WD=0.095,
        GRAD_CLIP_NORM=0.3,
        ADAM_WD=0.02,
        EMBED_WD=0.085,
        BETA2=0.99,
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_steps_are_those_of_plain_optimizers(recipe):
    plain = dict(MUON_COEFFICIENTS="classic", MUON_ROW_NORMALIZE=0, MUON_WD=0, ADAM_WD=0, EMBED_WD=0, GRAD_CLIP_NORM=0)
    c = config(RECORD_LIKE, **EXACT, **{**plain, **RECIPES[recipe]})
    model = build_model(c, seed=1)
    optimizers = tg.Optimizers(model, c, single_run())
    before = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    history, generator = {name: [] for name in before}, np.random.default_rng(0)
    for step in range(3):
        gradients = {name: generator.normal(size=w.shape) * 0.01 for name, w in before.items()}
        for name, p in model.named_parameters():
            p.grad = torch.from_numpy(gradients[name].copy())
            if name in tg.BANKS and c.muon_gradient_dtype == "bfloat16":
                gradients[name] = p.grad.bfloat16().double().numpy()
        optimizers.step(tg.muon_beta(tg.Progress(step, 0.0), c), 1.0, c.num_layers)
        for name, g in clipped(gradients, c.grad_clip_norm).items():
            history[name].append(g)
    assert all(p.grad is None for p in model.parameters())
    for name, p in model.named_parameters():
        if name in tg.BANKS:
            expected = np.stack(
                [muon_reference(w, [g[i] for g in history[name]], c) for i, w in enumerate(before[name])]
            )
        else:
            lr, decay = (c.tied_embed_lr, c.embed_wd) if name == "embedding" else (c.scalar_lr, c.adam_wd)
            expected = adam_reference(before[name], history[name], lr, decay, c)
        assert not np.allclose(expected, before[name], rtol=1e-4)
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", ["master", "bfloat16"])
def test_momentum_of_type_sgd_adds_up_gradients(dtype):
    """Each direction is that of the reference's sum; while the momentum is constant, also that of type ema."""
    knobs = dict(
        EXACT, MUON_GRADIENT_DTYPE=dtype, MUON_COEFFICIENTS="polar_express", MUON_BACKEND_STEPS=5, MUON_ROW_NORMALIZE=0
    )
    c, ema = (config(RECORD_LIKE, **knobs, MUON_MOMENTUM_TYPE=kind) for kind in ("sgd", "ema"))
    muon, other = (tg.Optimizers(build_model(c, seed=1), x, single_run()).muon for x in (c, ema))
    generator, bank = torch.Generator().manual_seed(0), muon.momentum[0]
    rounded = torch.Tensor.bfloat16 if dtype == "bfloat16" else torch.clone
    total = torch.zeros_like(bank)
    for step, beta in enumerate((0.5, 0.5, 0.9)):
        gradient = rounded(torch.randn(bank.shape, generator=generator)).to(bank.dtype)
        found = muon.direction(gradient, bank, None, beta)
        total = rounded(beta * total + gradient).to(bank.dtype)
        assert torch.equal(bank, total)
        expected = tg.orthogonalize(gradient + beta * total, 5, "polar_express", c.dtype)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        mean = other.direction(gradient, other.momentum[0], None, beta)
        close = (found - mean).norm() < (0.02 if dtype == "bfloat16" else 1e-4) * mean.norm()
        assert close == (step < 2)


def test_embeddings_kept_in_bfloat16_take_bfloat16s_values_and_no_other_weight_does():
    knobs = dict(BIGRAM_VOCAB_SIZE=9, VE_DIM=6, VE_LAYERS="0", TIED_EMBED_LR=1e-6)
    moved = {}
    for dtype in ("master", "bfloat16"):
        c = config(TINY, **EXACT, **knobs, EMBED_DTYPE=dtype)
        model = build_model(c, seed=1)
        optimizers = tg.Optimizers(model, c, single_run())
        for _ in range(2):
            before = model.embedding.detach().clone()
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p.dtype)
            optimizers.step(0.9, 1.0, c.num_layers)
        moved[dtype] = (model.embedding != before).float().mean().item()
        tables = {"embedding", "bigram.table", "value_embeds.table"}
        state = {n: optimizers.adam.state[p] for n, p in model.named_parameters() if n not in tg.BANKS}
        rounded = {
            name
            for name, p in model.named_parameters()
            if name in state and all(torch.equal(t, t.bfloat16().to(t.dtype)) for t in (p, state[name]["exp_avg"]))
        }
        assert rounded & tables == (tables if dtype == "bfloat16" else set())
        assert not any(name.startswith("blocks") for name in rounded)
    assert moved["bfloat16"] < 0.1 < 0.9 < moved["master"]  # small steps round away


def test_the_rates_multiplier_scales_every_step():
    """Half the rate, half the change: for both optimizers, without decay."""
    c, changes = config(RECORD_LIKE, **EXACT, MUON_WD=0, ADAM_WD=0, EMBED_WD=0), {}
    for multiplier in (1.0, 0.5, 0.0):
        model = build_model(c, seed=1)
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.ones_like(p) * 0.01
        tg.Optimizers(model, c, single_run()).step(0.9, multiplier, c.num_layers)
        changes[multiplier] = [p.detach() - b for p, b in zip(model.parameters(), before, strict=True)]
    for full, half, none in zip(*changes.values(), strict=True):
        assert full.abs().max() > 0 and torch.allclose(half, full / 2, rtol=1e-6, atol=1e-9) and not none.any()


def test_the_norm_is_that_of_all_gradients():
    c = config(RECORD_LIKE, **EXACT, GRAD_CLIP_NORM=0.3)
    model = build_model(c)
    gradients = [torch.full_like(p, 0.01 * (i + 1)) for i, p in enumerate(model.parameters())]
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients))
    before, some = [g.clone() for g in gradients], len(gradients) // 2
    tg.Optimizers(model, c, single_run()).clip(gradients[:some], gradients[some:])
    for g, old in zip(gradients, before, strict=True):
        torch.testing.assert_close(g, old * (0.3 / norm), rtol=1e-5, atol=0)


def test_an_unreached_parameter_is_no_obstacle():
    """Skip weights of places that the plain order does not have get no gradient; they must neither stop nor move."""
    c = config(RECORD_LIKE, **EXACT, ADAM_WD=0)
    model, batch = build_model(c), random_batch(c, 2, 8)
    before = model.skip_weights.detach().clone()
    model(*batch, looped=False)[0].mean().backward()
    tg.Optimizers(model, c, single_run()).step(0.9, 1.0, c.num_layers)
    moved = (model.skip_weights != before).any(1)
    assert moved.tolist() == [True] * 3 + [False] * 2


def test_the_first_layers_take_the_step_of_all_and_the_others_none():
    """With the same gradients and no clipping, `trainable_layers` leaves out updates and changes none."""
    c = config(RECORD_LIKE, **EXACT, GRAD_CLIP_NORM=0, MUON_WD=0.3, ADAM_WD=0.2)
    ends, trainable = {}, 2
    start = {name: p.detach().clone() for name, p in build_model(c, seed=1).named_parameters()}
    for layers in (c.num_layers, trainable):
        model, generator = build_model(c, seed=1), torch.Generator().manual_seed(0)
        optimizers = tg.Optimizers(model, c, single_run())
        for name, p in model.named_parameters():
            gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.01
            frozen = name.startswith("blocks.") and int(name.split(".")[1]) >= layers
            p.grad = None if frozen else gradient  # as a backward pass with frozen layers leaves them
        optimizers.step(0.9, 1.0, layers)
        ends[layers] = {name: p.detach() for name, p in model.named_parameters()}
    for name, before in start.items():
        whole, part = ends[c.num_layers][name], ends[trainable][name]
        if name in tg.BANKS:
            trains = torch.arange(len(before)) % c.num_layers < trainable
            assert torch.allclose(part[trains], whole[trains], rtol=1e-12) and not torch.equal(part, whole), name
            assert torch.equal(part[~trains], before[~trains]), name
        else:
            frozen = name.startswith("blocks.") and int(name.split(".")[1]) >= trainable
            assert torch.equal(part, before if frozen else whole) and not torch.equal(whole, before), name


@pytest.mark.parametrize("coefficients", ["classic", "polar_express"])
@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 16, 4), (2, 4, 16), (1, 1, 5)])
def test_newton_schulz_orthogonalizes(shape, coefficients):
    update = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    polynomials = {"classic": CLASSIC, "polar_express": POLAR}[coefficients]
    found = tg.orthogonalize(update, 5, coefficients, torch.float64)
    for one, matrix in zip(found, update, strict=True):
        np.testing.assert_allclose(one.numpy(), newton_schulz(matrix.numpy(), polynomials), rtol=1e-5, atol=1e-5)
    longer = tg.orthogonalize(update, 12, coefficients, torch.float64)
    singular = torch.linalg.svdvals(longer)
    assert singular.min() > 0.6 and singular.max() < 1.3
    assert tg.orthogonalize(update * 1e-6, 5, coefficients, torch.bfloat16).dtype == torch.bfloat16
    assert torch.isfinite(tg.orthogonalize(update * 0, 5, coefficients, torch.bfloat16)).all()


@pytest.mark.parametrize("shape", [(3, 8, 4), (2, 4, 8), (1, 5, 5)])
def test_normuon_equalizes_neurons_and_keeps_each_matrixs_norm(shape):
    """Without a memory every neuron of the longer side moves equally far, and a neuron without an update stays."""
    update = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    axis = -1 if shape[1] >= shape[2] else -2
    update.select(-2 if axis == -1 else -1, 0).zero_()
    squares = update.new_zeros(tg.neuron_shape(update))
    found = tg.equalize_neurons(update, squares, 0.0)
    sizes = found.norm(dim=axis)
    assert not sizes[:, 0].any() and torch.allclose(sizes[:, 1:], sizes[:, 1:2].expand_as(sizes[:, 1:]))
    assert torch.allclose(found.norm(dim=(1, 2)), update.norm(dim=(1, 2))) and squares.numel() == shape[0] * max(
        shape[1:]
    )
    assert not tg.equalize_neurons(update * 0, squares * 0, 0.9).any()


@pytest.mark.parametrize("knobs", [{}, dict(NORMUON_BETA2=0.9)], ids=["plain", "normuon"])
def test_reset_forgets_everything(knobs):
    c = config(RECORD_LIKE, **EXACT, **knobs)

    def run(first):
        model = build_model(c)
        optimizers = tg.Optimizers(model, c, single_run())
        for step in range(2 if first else 1):
            for p in model.parameters():
                size = 0.01 if first and step == 0 else 0.03
                p.grad = torch.full_like(p, size) * (torch.arange(p.numel()) % 7).view(p.shape)
            if first and step == 1:
                model.load_state_dict(build_model(c).state_dict())
                optimizers.reset()
            optimizers.step(0.9, 0.7, c.num_layers)
        return [p.detach() for p in model.parameters()]

    assert all(torch.equal(x, y) for x, y in zip(run(True), run(False), strict=True))


# --------------------------------------------------------------------------------------------------------------- ranks


FITTED = dict(GUIDED_HESSIANS=1, TUNE_STEPS=3, TARGET_BYTES=1, COMPRESSOR="pergroup")
SENSITIVE = dict(ROW_STEPS=0.75, MATRIX_STEPS=0.85, STD_STEPS=0.5)


def jobs_for(data):
    """Training and scoring, exact and in the usual types; banks of 1, 4 and 6 layers, which few ranks divide."""
    record = dict(
        RECORD_LIKE,
        DATA_PATH=str(data),
        TRAIN_SEQ_LEN=16,
        TRAIN_BATCH_TOKENS=384,
        MICRO_BATCH_TOKENS=48,
        ITERATIONS=100,
        MUON_MOMENTUM_WARMUP_STEPS=3,
    )
    tiny = dict(
        TINY, DATA_PATH=str(data), TRAIN_SEQ_LEN=16, TRAIN_BATCH_TOKENS=384, MICRO_BATCH_TOKENS=64, ITERATIONS=100
    )
    poly = dict(
        POLY_LIKE,
        DATA_PATH=str(data),
        TRAIN_SEQ_LEN=16,
        TRAIN_BATCH_TOKENS=384,
        MICRO_BATCH_TOKENS=32,
        ITERATIONS=100,
        GRAD_CLIP_NORM=0,
        SWA_START=1,
    )
    score = dict(tiny, EVAL_STRIDE=5, VAL_BATCH_SIZE=512)
    steps = dict(steps=4)
    exact = dict(COMPUTE_DTYPE="float64")
    return [
        dict(name="record", kind="train", arguments=steps, knobs=dict(record, **exact, GRAD_CLIP_NORM=0)),
        dict(name="clipped", kind="train", arguments=steps, knobs=dict(record, **exact, GRAD_CLIP_NORM=0.05)),
        dict(name="uneven", kind="train", arguments=steps, knobs=dict(tiny, **exact, NUM_LAYERS=4)),
        dict(name="one layer", kind="train", arguments=steps, knobs=dict(tiny, **exact, NUM_LAYERS=1)),
        dict(name="usual", kind="train", arguments=steps, knobs=dict(record, COMPUTE_DTYPE="float32")),
        dict(
            name="rounded",
            kind="train",
            arguments=steps,
            knobs=dict(record, **exact, GRAD_CLIP_NORM=0, MUON_GRADIENT_DTYPE="bfloat16"),
        ),
        dict(name="poly", kind="train", arguments=steps, knobs=dict(poly, **exact)),
        dict(name="depth", kind="depth", arguments=dict(trainable=2), knobs=dict(poly, **exact)),
        dict(name="normuon", kind="depth", arguments=dict(trainable=2), knobs=dict(poly, **exact, NORMUON_BETA2=0.9)),
        dict(
            name="shallow",
            kind="depth",
            arguments=dict(trainable=1),
            knobs=dict(tiny, **exact, NUM_LAYERS=2, MUON_WD=0.1),
        ),
        dict(name="score", kind="score", knobs=dict(score, COMPUTE_DTYPE="float32")),
        dict(name="exact score", kind="score", knobs=dict(score, COMPUTE_DTYPE="float64")),
        dict(name="hessians", kind="calibration", knobs=dict(record, COMPUTE_DTYPE="float64")),
        dict(name="sensitivities", kind="calibration", knobs=dict(record, **SENSITIVE, **exact)),
        dict(name="guided", kind="calibration", knobs=dict(record, **SENSITIVE, **exact, **FITTED)),
    ]


def difference(x, y):
    """Largest difference of two results, over the size of each array."""
    assert set(x) == set(y)
    return max(
        np.abs(x[name] - y[name]).max() / (np.abs(y[name]).max() + 1e-12)
        for name in x
        if x[name].size and name != "losses"
    )


@pytest.fixture(scope="session")
def one_rank(data, tmp_path_factory):
    """A folder with the jobs, and with what one rank makes of them."""

    def build(folder):
        jobs = jobs_for(data)
        (folder / "jobs.json").write_text(json.dumps(jobs))
        run_jobs(jobs, single_run(), folder)

    return built_once(tmp_path_factory, "one_rank", build)


@pytest.mark.parametrize("ranks", [3, 4])  # two have the runs of test_end_to_end.py
def test_any_number_of_ranks_gives_the_same_weights_and_scores(ranks, one_rank, tmp_path):
    done = fork(ROOT / "tests" / "rank_worker.py", {}, one_rank / "jobs.json", tmp_path, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    # The clip's norm is summed in float32 (clipped); the Hessians are kept in float32.
    tolerances = {
        "record": 1e-9,
        "clipped": 1e-5,
        "uneven": 1e-9,
        "one layer": 1e-9,
        "usual": 1e-2,
        "rounded": 2e-2,
        "poly": 1e-9,
        "depth": 1e-9,
        "normuon": 1e-9,
        "shallow": 1e-9,
        "score": 1e-7,
        "exact score": 1e-13,
        "hessians": 1e-4,
        "sensitivities": 1e-4,
        "guided": 1e-4,
    }
    for name, tolerance in tolerances.items():
        alone = dict(np.load(one_rank / f"{name}.0.npz"))
        together = [dict(np.load(tmp_path / f"{name}.{rank}.npz")) for rank in range(ranks)]
        counts = [[r.pop(key, 0) for key in ("disturbed", "moved", "momenta moved")] for r in (alone, *together)]
        for other in together[1:]:
            assert all(np.array_equal(other[key], together[0][key]) for key in alone), f"{name}: ranks differ"
        assert difference(together[0], alone) <= tolerance, name
        if "artifact" in alone:  # integers and bytes are equal
            for key in [key for key in alone if key in ("artifact", "tuned") or key.startswith("codes ")]:
                assert np.array_equal(together[0][key], alone[key]), (name, key)
        if name in ("depth", "normuon", "shallow"):
            assert not any(disturbed for disturbed, *_ in counts), f"{name}: a frozen layer moved"
            assert counts[0][1] > 0 and sum(momenta for *_, momenta in counts[1:]) == counts[0][2] > 0
        if "losses" in alone:  # for the log, kept in float32
            loss_tolerance = 2e-4 if name == "rounded" else 1e-5
            np.testing.assert_allclose(together[0]["losses"], alone["losses"], rtol=loss_tolerance)

"""Quantization: GPTQ against rounding, Hessians against plain products, and the forms in which tensors are stored."""

import ast
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg
from helpers import NEEDS_CUDA, POLY_LIKE, RECORD_LIKE, TINY, build_model, config, examples, single_run


def correlated(count, columns, seed=0, rank=None):
    """Inputs whose channels go together and differ in size, and their mean X^T X, [1, c, c] float32."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or columns, columns, generator=generator) * torch.logspace(0.5, -1, columns)
    x = torch.randn(count, rank or columns, generator=generator) @ mix
    return x, (x.T @ x / count)[None]


def matrix(rows, columns, seed=1):
    return torch.randn(1, rows, columns, generator=torch.Generator().manual_seed(seed))


def weighted_error(weights, codes, scales, hessian):
    error = (weights - codes.float() * scales.float()[..., None]).double()
    return torch.einsum("bri,bij,brj->", error, hessian.double(), error).item()


def nearest(weights, scales, limit):
    return (weights / scales.float()[..., None]).round().clamp(-limit, limit)


# ---------------------------------------------------------------------------------------------------------------- GPTQ


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("shape", [(24, 40), (16, 200), (1, 5)])
def test_gptq_beats_rounding_to_nearest(shape, bits):
    """In the error that matters, of outputs on inputs like the calibration's."""
    for seed in range(3):
        w, (_, hessian) = matrix(*shape, seed), correlated(500, shape[1], seed + 10)
        limit = 2 ** (bits - 1) - 1
        scales = tg.row_scales(w, bits, 3.0 if bits < 6 else 0.0)
        codes = tg.gptq(w, tg.factor_hessian(hessian, 0.01), scales, limit)
        assert codes.dtype == torch.int16 and codes.abs().max() <= limit
        ours, plain = (weighted_error(w, x, scales, hessian) for x in (codes, nearest(w, scales, limit)))
        assert ours <= plain * (1 + 1e-6)
        if shape[1] >= 40 and bits >= 3:
            assert ours < 0.8 * plain


def plain_gptq(w, hessian, scales, limit, damp):
    """Column by column with the inverse over the remaining columns, as in the paper (no Cholesky, no blocks)."""
    w, h = w.astype(np.float64).copy(), hessian.astype(np.float64)
    h = h + damp * np.mean(np.diag(h)) * np.eye(len(h))
    remaining, codes = list(np.argsort(-np.diag(hessian), kind="stable")), np.zeros_like(w)
    while remaining:
        inverse = np.linalg.inv(h[np.ix_(remaining, remaining)])
        j = remaining[0]
        codes[:, j] = np.clip(np.round(w[:, j] / scales), -limit, limit)
        error = (w[:, j] - codes[:, j] * scales) / inverse[0, 0]
        w[:, remaining] -= np.outer(error, inverse[0])
        remaining = remaining[1:]
    return codes


def test_gptq_is_the_papers_algorithm():
    for seed in range(4):
        w, (_, hessian) = matrix(12, 30, seed), correlated(300, 30, seed)
        scales = tg.row_scales(w, 4, 0.0)
        found = tg.gptq(w, tg.factor_hessian(hessian, 0.01), scales, 7)[0].numpy()
        expected = plain_gptq(w[0].numpy(), hessian[0].numpy(), scales[0].float().numpy().astype(np.float64), 7, 0.01)
        assert (found == expected).mean() > 0.995  # rounding of a value between two codes may differ


def test_blocks_do_not_matter():
    w, (_, hessian) = matrix(12, 300), correlated(900, 300)
    scales = tg.row_scales(w, 6, 0.0)
    whole = tg.gptq(w, tg.factor_hessian(hessian, 0.01), scales, 31, block=300)
    for block in (1, 7, 128):
        assert (tg.gptq(w, tg.factor_hessian(hessian, 0.01), scales, 31, block=block) == whole).float().mean() > 0.999


def test_a_batch_is_quantized_like_its_matrices_one_by_one():
    w = torch.cat([matrix(16, 48, seed) for seed in range(5)])
    hessian = torch.cat([correlated(200, 48, seed)[1] for seed in range(5)])
    scales = tg.row_scales(w, 6, 0.0)
    batched = tg.gptq(w, tg.factor_hessian(hessian, 0.01), scales, 31)
    for i in range(5):
        alone = tg.gptq(w[i : i + 1], tg.factor_hessian(hessian[i : i + 1], 0.01), scales[i : i + 1], 31)
        assert torch.equal(batched[i : i + 1], alone)


def test_independent_inputs_make_gptq_round_to_nearest():
    w = matrix(8, 20)
    scales = tg.row_scales(w, 5, 0.0)
    found = tg.gptq(w, tg.factor_hessian(torch.diag_embed(torch.linspace(2, 1, 20))[None], 0.01), scales, 15)
    assert torch.equal(found.float(), nearest(w, scales, 15))


@pytest.mark.parametrize("damp", [0.01, 0.0])
def test_a_hessian_of_rank_one_works(damp):
    w, (_, hessian) = matrix(8, 24), correlated(100, 24, rank=1)
    scales = tg.row_scales(w, 6, 0.0)
    codes = tg.gptq(w, tg.factor_hessian(hessian, damp), scales, 31)
    assert weighted_error(w, codes, scales, hessian) <= weighted_error(w, nearest(w, scales, 31), scales, hessian)


@pytest.mark.parametrize("damp", [0.01, 0.0])
def test_dead_columns_are_rounded_and_disturb_nothing(damp):
    x, _ = correlated(400, 30)
    x[:, [3, 17, 29]] = 0
    hessian, w = (x.T @ x / 400)[None], matrix(8, 30)
    scales = tg.row_scales(w, 6, 0.0)
    codes = tg.gptq(w, tg.factor_hessian(hessian, damp), scales, 31)
    dead = [3, 17, 29]
    assert torch.equal(codes[..., dead].float(), nearest(w, scales, 31)[..., dead])
    assert weighted_error(w, codes, scales, hessian) < weighted_error(w, nearest(w, scales, 31), scales, hessian)
    none = tg.gptq(w, tg.factor_hessian(torch.zeros(1, 30, 30), damp), scales, 31)
    assert torch.equal(none.float(), nearest(w, scales, 31))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_an_error(bad):
    w, (_, hessian) = matrix(4, 8), correlated(50, 8)
    hessian[0, 2, 3] = bad
    with pytest.raises(FloatingPointError, match="not finite"):
        tg.gptq(w, tg.factor_hessian(hessian, 0.01), tg.row_scales(w, 6, 0.0), 31)


def test_the_factor_is_the_inverse_hessians_cholesky():
    _, hessian = correlated(300, 20)
    u = tg.inverse_cholesky(hessian, 0.01)[0].double()
    h = hessian[0].double() + 0.01 * hessian[0].double().diagonal().mean() * torch.eye(20)
    assert torch.equal(u, u.triu())
    assert torch.allclose(u.T @ u @ h, torch.eye(20, dtype=torch.float64), atol=1e-3)


# -------------------------------------------------------------------------------------------------------- stored forms


@examples(max_examples=60)
@given(st.integers(2, 8), st.integers(1, 6), st.integers(1, 40), st.sampled_from([0.0, 3.0, 13.0]), st.integers(0, 99))
def test_codes_stay_within_their_bits(bits, rows, columns, sigmas, seed):
    w, (_, hessian) = matrix(rows, columns, seed), correlated(60, columns, seed)
    limit = 2 ** (bits - 1) - 1
    scales = tg.row_scales(w, bits, sigmas)
    codes = tg.gptq(w, tg.factor_hessian(hessian, 0.01), scales, limit)
    assert scales.dtype == torch.float16 and scales.shape == (1, rows) and (scales > 0).all()
    assert codes.min() >= -limit and codes.max() <= limit


def test_row_scales_are_those_of_the_specification():
    w = matrix(10, 64)[0]
    for bits, sigmas in ((6, 13.0), (7, 14.0), (4, 2.5)):
        expected = sigmas * w.std(dim=1, correction=0) / (2 ** (bits - 1) - 1)
        assert torch.allclose(tg.row_scales(w, bits, sigmas).float(), expected, rtol=1e-3)
    assert torch.allclose(tg.row_scales(w, 8, 0.0).float(), w.abs().amax(1) / 127, rtol=1e-3)
    assert (tg.row_scales(torch.zeros(3, 5), 6, 13.0) > 0).all()  # a row of zeros is no division by zero


def quantized(base, bits=None, **knobs):
    """A model with random weights, its random Hessians, and its stored form."""
    c = config(base, **knobs)
    model = build_model(c)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    head = "embedding" if model.head is None else "head"
    hessians = {
        name: torch.cat([correlated(100, w.size(-1), i)[1] for i in range(w.size(0) if w.dim() == 3 else 1)])
        for name, w in weights.items()
        if name in (*tg.BANKS, head)
    }
    return c, model, weights, tg.quantize(weights, tg.Calibration(hessians), c)


@pytest.mark.parametrize("base", [TINY, RECORD_LIKE, dict(TINY, TIE_EMBEDDINGS=0)], ids=["tiny", "record", "untied"])
def test_every_parameter_is_stored_in_the_form_of_its_role(base):
    c, model, weights, stored = quantized(base, MATRIX_BITS=6, EMBED_BITS=7)
    back = tg.dequantize(stored)
    assert set(stored) == set(back) == set(weights)
    for name, w in weights.items():
        q = stored[name]
        role = "bank" if name in tg.BANKS else "gate" if name.endswith("head_gate") else name
        bits = {"bank": 6, "embedding": 7, "head": 7, "gate": 8}.get(role, 16)
        assert q.bits == bits and q.codes.shape == w.shape and back[name].shape == w.shape
        if bits == 16:
            assert q.codes.dtype == torch.float16 and q.scales is None and torch.equal(back[name], w.half().float())
            continue
        limit = 2 ** (bits - 1) - 1
        assert q.codes.dtype == torch.int8 and q.codes.abs().max() <= limit and q.scales.dtype == torch.float16
        corrected = set(q.extras.get("corrected", torch.empty(0)).tolist())
        for i, matrix in enumerate(tg.as_batch(back[name])):
            grid = tg.as_batch(q.codes)[i].float() * tg.as_batch(q.scales[..., None])[i].float()
            assert torch.equal(matrix, grid) == (i not in corrected)
        if role == "gate":
            assert (back[name] - w).abs().max() <= 0.51 * q.scales.float().max()
        elif name != "head" and not (name == "embedding" and model.head is not None):
            assert torch.corrcoef(torch.stack((back[name].flatten(), w.flatten())))[0, 1] > 0.9


def test_quantizing_what_was_quantized_changes_nothing():
    c, model, weights, stored = quantized(TINY)
    once = tg.dequantize(stored)
    # Rounded to nearest, of values that lie on the grid of another scale or of its own.
    again = tg.quantize(once, tg.Calibration({}), c)
    for name in once:
        if stored[name].bits == 16:
            assert torch.equal(again[name].codes, stored[name].codes)
        else:
            codes = (once[name] / stored[name].scales.float()[..., None]).round().to(torch.int8)
            assert torch.equal(codes, stored[name].codes)


@pytest.mark.parametrize(
    "knob", ["MATRIX_BITS", "EMBED_BITS", "ATTN_CLIP_SIGMAS", "MLP_CLIP_SIGMAS", "EMBED_CLIP_SIGMAS", "GPTQ_DAMP"]
)
def test_each_knob_of_the_quantization_acts_on_its_tensors(knob):
    changed = {
        "MATRIX_BITS": set(tg.BANKS),
        "EMBED_BITS": {"embedding"},
        "ATTN_CLIP_SIGMAS": {"qo_bank", "kv_bank"},
        "MLP_CLIP_SIGMAS": {"up_bank", "down_bank"},
        "EMBED_CLIP_SIGMAS": {"embedding"},
        "GPTQ_DAMP": {*tg.BANKS, "embedding"},
    }[knob]
    value = {"MATRIX_BITS": 4, "EMBED_BITS": 5, "GPTQ_DAMP": 0.5}.get(knob, 4.0)
    before, after = (tg.dequantize(quantized(TINY, **k)[3]) for k in ({}, {knob: value}))
    assert {name for name in before if not torch.equal(before[name], after[name])} == changed


@pytest.mark.parametrize("bits", [6, 8])
def test_gptq_lite_takes_the_best_of_five_quantiles_for_each_row(bits):
    """Against a search that takes NumPy's quantiles, with rows of heavy tails, which want a clip, and of light ones."""
    w = torch.randn(40, 3000, generator=torch.Generator().manual_seed(0))
    w[:20] = w[:20].sign() * w[:20].abs() ** 3
    codes, scales = tg.gptq_lite(w, bits, 0)
    limit, chosen = 2 ** (bits - 1) - 1, set()
    for row, found, scale in zip(w.numpy().astype(np.float64), codes, scales, strict=True):
        errors = []
        for quantile in (0.999, 0.9995, 0.9999, 0.99999, 1):
            s = np.float64(np.float16(np.quantile(np.abs(row), quantile) / limit))
            errors.append(np.square(np.clip(np.round(row / s), -limit, limit) * s - row).mean())
        actual = np.square(found.numpy() * scale.double().item() - row).mean()
        assert actual <= min(errors) * 1.001 and found.abs().max() <= limit
        chosen.add(int(np.argmin(errors)))
    assert len(chosen) >= 3 and codes.dtype == torch.int8 and scales.dtype == torch.float16
    grid = tg.gptq_lite(w, bits, 16)[1].float().log2() * 16
    assert (grid.round() - grid).abs().max() < 0.02
    assert torch.equal(tg.gptq_lite(w[None], bits, 0)[0][0], codes)  # a bank is quantized as its matrices
    assert not tg.gptq_lite(torch.zeros(2, 5), bits, 0)[0].any()


def test_gptq_lite_knows_no_hessian_and_residuals_refine_it():
    c, model, weights, stored = quantized(POLY_LIKE)
    assert c.quantizer == "gptq_lite" and c.rvq_enabled
    without = tg.quantize(weights, tg.Calibration({}), c)
    assert all(torch.equal(stored[name].codes, q.codes) for name, q in without.items())
    hessians = {
        name: torch.eye(w.size(-1)).expand(len(tg.as_batch(w)), -1, -1)
        for name, w in weights.items()
        if name in (*tg.BANKS, "embedding")
    }
    refined = tg.with_residuals(stored, tg.fit_residuals(stored, weights, hessians, c))
    for name in hessians:
        before, after = ((tg.restore(q[name]) - weights[name]).norm() for q in (stored, refined))
        assert after < 0.2 * before
    assert tg.dequantize(tg.unpack(tg.pack(refined, c))[1]).keys() == weights.keys()


def test_tables_are_stored_by_their_size():
    """Above 65,536 elements with MATRIX_BITS and the clip of their class, below in fp16."""
    c, _, weights, stored = quantized(POLY_LIKE, QUANTIZER="uniform", BIGRAM_VOCAB_SIZE=6000, MATRIX_BITS=5)
    assert weights["bigram.table"].numel() == 72_000
    assert {name: q.bits for name, q in stored.items() if "bigram" in name or "value_embeds" in name} == {
        "bigram.table": 5,
        "bigram.projection": 16,
        "bigram.scale": 16,
        "value_embeds.table": 16,
        "value_embeds.projection": 16,
        "value_embeds.scale": 16,
    }
    expected = tg.row_scales(weights["bigram.table"], 5, 12.85)
    assert torch.equal(stored["bigram.table"].scales, expected)
    other = quantized(POLY_LIKE, QUANTIZER="uniform", BIGRAM_VOCAB_SIZE=6000, MATRIX_CLIP_SIGMAS=4)[3]["bigram.table"]
    assert other.bits == 6 and (other.scales < expected).all()
    assert quantized(POLY_LIKE, BIGRAM_VOCAB_SIZE=6000)[3]["bigram.table"].bits == 6  # gptq_lite does it, too


# ------------------------------------------------------------------------------------------------ table of quantizers


def plan(w, hessian, c):
    """The factor of one bank, w."""
    return {"w": tg.factor_hessian(hessian, c.gptq_damp, tg.QUANTIZERS[c.quantizer].natural_order)}


def encoded(name, bits=6, with_factor=True, **knobs):
    """A random bank, its Hessians, and its stored form by one row of the table."""
    c = config(QUANTIZER=name, **knobs)
    w, hessian = torch.cat((matrix(20, 30, 1), matrix(20, 30, 2))), correlated(200, 30)[1].expand(2, -1, -1)
    factors = plan(w, hessian, c) if with_factor else {}
    return w, hessian, tg.QUANTIZERS[name].encode(w, factors.get("w"), bits, 4.0, c)


def test_the_table_has_a_row_for_each_quantizer():
    field = tg.Config.__dataclass_fields__["quantizer"]
    assert tuple(tg.QUANTIZERS) == tuple(tg.QUANTIZER_TRAITS) == field.metadata["choices"]
    for name, quantizer in tg.QUANTIZERS.items():
        assert quantizer.traits == tg.QUANTIZER_TRAITS[name]


@pytest.mark.parametrize("with_factor", [True, False])
@pytest.mark.parametrize("bits, most", [(4, 0.1), (8, 1e-3)])
@pytest.mark.parametrize("name", tg.QUANTIZERS)
def test_each_quantizer_decodes_what_it_encodes(name, bits, most, with_factor):
    w, hessian, q = encoded(name, bits, with_factor, COLUMN_STEPS=0.5 if tg.QUANTIZER_TRAITS[name].column_scales else 0)
    found = tg.quantizer_of(q)
    found.check(q)
    tg.check_stored(q)
    assert q.codes.shape == w.shape and q.scales.shape == w.shape[:-1]
    decoded = found.decode(q)
    assert decoded.dtype == torch.float32 and torch.equal(decoded, tg.restore(q))
    assert (tg.weighted_error(w - decoded, hessian) < most * tg.weighted_error(w, hessian)).all()
    if tg.QUANTIZER_TRAITS[name].uses_hessians and with_factor:
        assert found is tg.QUANTIZERS[name]


@pytest.mark.parametrize(
    "change",
    {
        "float codes": lambda q: q._replace(codes=q.codes.half()),
        "no scales": lambda q: q._replace(scales=None),
        "scales of another type": lambda q: q._replace(scales=q.scales.float()),
        "scales of another shape": lambda q: q._replace(scales=q.scales[:, 1:]),
        "a code of -128": lambda q: q._replace(codes=q.codes.clone().fill_(-128)),
        "one bit": lambda q: q._replace(bits=1),
        "sixteen bits": lambda q: q._replace(bits=16),
        "a vector": lambda q: q._replace(codes=q.codes[0, 0], scales=q.scales[0, 0]),
        "seven states": lambda q: q._replace(states=7),
        "another quantizer's states": lambda q: q._replace(states=0 if q.states else 8),
    }.items(),
    ids=lambda item: item[0],
)
@pytest.mark.parametrize("name", tg.QUANTIZERS)
def test_each_quantizer_refuses_a_form_that_it_does_not_produce(name, change):
    _, _, q = encoded(name)
    with pytest.raises(ValueError):
        tg.QUANTIZERS[name].check(change[1](q))


def test_plain_values_have_no_states_and_no_extras():
    plain = tg.Quantized(torch.zeros(3, 4).half(), None, 16, {})
    tg.check_stored(plain)
    for wrong in (
        plain._replace(states=8),
        plain._replace(bits=8),
        plain._replace(codes=torch.zeros(3, 4)),
        plain._replace(extras={"columns": torch.zeros(1, 4, dtype=torch.int8)}),
    ):
        with pytest.raises(ValueError):
            tg.check_stored(wrong)


def test_no_code_compares_a_quantizers_name():
    """What differs between quantizers is in their rows of the tables."""
    tree = ast.parse(Path(tg.__file__).read_text())
    names, found = set(tg.QUANTIZERS), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            strings = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            attributes = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
            if strings & names or "quantizer" in attributes:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        found += [f"{node.lineno}: match" for _ in (1,) if isinstance(node, ast.Match)]
    assert found == []
    assert any(isinstance(n, ast.Attribute) and n.attr == "quantizer" for n in ast.walk(tree))


# ------------------------------------------------------------------------------------------------------------ Hessians


def make_trainer(base, data, **knobs):
    c = config(base, DATA_PATH=data, COMPUTE_DTYPE="float64", **knobs)
    return tg.Trainer(build_model(c, seed=3), tg.TrainLoader(c, single_run()), c, single_run())


@pytest.mark.parametrize("base", [TINY, RECORD_LIKE, dict(TINY, TIE_EMBEDDINGS=0)], ids=["tiny", "record", "untied"])
def test_hessians_are_the_mean_products_of_every_matrix_inputs(base, data, monkeypatch):
    """Against X^T X of the arguments of F.linear, told apart by the weight that they meet."""
    trainer = make_trainer(base, data, NEFTUNE_ALPHA=5)
    model, c = trainer.model, trainer.config
    found = tg.calibrate(trainer, 7).hessians
    inputs, linear = {}, torch.nn.functional.linear

    def watch(x, weight, bias=None):
        # A view's values name the matrix: no two matrices have the same first row.
        key = tuple(weight.reshape(-1)[:4].tolist())
        flat = x.detach().reshape(-1, x.size(-1))
        inputs[key] = inputs.get(key, 0) + flat.T @ flat
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watch)
    with torch.no_grad():
        for step in (7, 8):
            for micro in range(trainer.layout.micro_steps):
                model(*trainer.loader.batch(step, micro), looped=c.loops)
    tokens = 2 * c.train_batch_tokens
    head = "embedding" if model.head is None else "head"
    assert set(found) == {*tg.BANKS, head}
    for name, hessians in found.items():
        matrices = getattr(model, "qo_bank" if name == "kv_bank" else name).detach()
        if name == "kv_bank":  # in one product with q, whose first row names it
            matrices = matrices[: c.num_layers].repeat(2, 1, 1)
        for i, weight in enumerate(matrices if matrices.dim() == 3 else [matrices]):
            expected = inputs[tuple(weight.reshape(-1)[:4].tolist())] / tokens
            tolerance = 1e-5 * expected.abs().max().item()
            assert torch.allclose(hessians[i].double(), expected, rtol=1e-3, atol=tolerance), (name, i)
            assert torch.allclose(hessians[i], hessians[i].T)


def test_hooks_are_removed(data):
    trainer = make_trainer(TINY, data)
    tg.calibrate(trainer, 0)
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_calibration_reads_other_batches_with_another_start(data):
    trainer = make_trainer(TINY, data)
    first, same, other = (tg.calibrate(trainer, step).hessians["qo_bank"] for step in (0, 0, 5))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_gptq_of_a_trained_model_loses_less_than_rounding(data):
    """On the model's own loss: a coarse grid of 3 bits, calibrated on training batches, scored on validation text."""
    c = config(
        TINY,
        DATA_PATH=data,
        ITERATIONS=40,
        MATRIX_BITS=3,
        EMBED_BITS=8,
        ATTN_CLIP_SIGMAS=3,
        MLP_CLIP_SIGMAS=3,
        TRAIN_LOG_EVERY=0,
        COMPUTE_DTYPE="float32",
    )
    model = tg.new_model(c)
    trainer = tg.Trainer(model, tg.TrainLoader(c, single_run()), c, single_run())
    tg.train(trainer, None)
    evaluator, weights = tg.Evaluator(c, single_run()), {n: p.detach().clone() for n, p in model.named_parameters()}
    hessians = tg.calibrate(trainer, 40).hessians
    ours, plain = (total_error(weights, tg.quantize(weights, tg.Calibration(h), c), hessians) for h in (hessians, {}))
    assert all((ours[name] < plain[name]).all() for name in hessians)  # each matrix of the model
    exact, losses = evaluator(model).bpb, {}
    for name, hessians in (("gptq", tg.calibrate(trainer, 40).hessians), ("nearest", {})):
        with torch.no_grad():
            model.load_state_dict(tg.dequantize(tg.quantize(weights, tg.Calibration(hessians), c)))
        losses[name] = evaluator(model).bpb - exact
    assert 0 < losses["gptq"] < 0.7 * losses["nearest"]


# --------------------------------------------------------------------------------------- LQER, AWQ-lite, RVQ, the grid


def total_error(weights, stored, hessians):
    back = tg.dequantize(stored)
    return {name: tg.weighted_error(tg.as_batch(weights[name] - back[name]), h) for name, h in hessians.items()}


def with_hessians(**knobs):
    """A random model, its Hessians with a strong common direction, and its stored form under these knobs."""
    c = config(RECORD_LIKE, **{"LQER_ENABLED": 0, "MATRIX_BITS": 4, "EMBED_BITS": 5, **knobs})
    weights = {name: p.detach() for name, p in build_model(c).named_parameters()}
    hessians = {
        name: torch.cat([correlated(100, w.size(-1), i)[1] for i in range(w.size(0) if w.dim() == 3 else 1)])
        for name, w in weights.items()
        if name in (*tg.BANKS, "embedding")
    }
    lines = []
    return c, weights, hessians, tg.quantize(weights, tg.Calibration(hessians), c, lines.append), lines


def test_the_weighted_error_is_the_trace():
    _, hessian = correlated(50, 12)
    error = matrix(5, 12)
    expected = torch.trace(error[0].double() @ hessian[0].double() @ error[0].double().T)
    assert torch.allclose(tg.weighted_error(error, hessian), expected[None], rtol=1e-5)


@pytest.mark.parametrize("asymmetric", ["0", "1", "auto"])
@pytest.mark.parametrize("select", ["norm", "gain"])
def test_low_rank_corrections_lower_the_weighted_error(select, asymmetric):
    knobs = dict(LQER_SELECT=select, LQER_ASYM_ENABLED=asymmetric, LQER_TOP_K=4)
    _, weights, hessians, plain, _ = with_hessians()
    c, _, _, corrected, lines = with_hessians(LQER_ENABLED=1, **knobs)
    before, after = (total_error(weights, stored, hessians) for stored in (plain, corrected))
    touched = {(name, i) for name, q in corrected.items() for i in q.extras.get("corrected", torch.empty(0)).tolist()}
    assert len(touched) == len([line for line in lines if "rank:4" in line]) <= 4
    assert touched or select == "gain"
    for name in before:
        for i, (old, new) in enumerate(zip(before[name].tolist(), after[name].tolist(), strict=True)):
            assert new < old if (name, i) in touched else new == old
    if select == "norm":
        norms = {
            (name, i): error.square().sum().item()
            for name in hessians
            for i, error in enumerate(tg.as_batch(weights[name] - tg.restore(plain[name])))
        }
        assert touched == set(sorted(norms, key=norms.get)[-4:])


def test_factors_have_the_levels_and_scales_of_the_specification():
    for asymmetric, left, right in (("1", (-2, 1), (-8, 7)), ("0", (-3, 3), (-3, 3))):
        _, _, _, stored, _ = with_hessians(
            LQER_ENABLED=1,
            LQER_SELECT="norm",
            LQER_ASYM_ENABLED=asymmetric,
            LQER_FACTOR_BITS=3,
            LQER_ASYM_GROUP=8,
            LQER_RANK=3,
        )
        found = [(name, q) for name, q in stored.items() if "corrected" in q.extras]
        assert found
        for _, q in found:
            x, (n, (_, rows, columns)) = q.extras, (len(q.extras["corrected"]), tg.as_batch(q.codes).shape)
            assert x["left"].shape == (n, rows, 3) and x["right"].shape == (n, 3, columns)
            assert x["left"].min() >= left[0] and x["left"].max() <= left[1]
            assert x["right"].min() >= right[0] and x["right"].max() <= right[1]
            assert x["left_scales"].shape == (n, 1 if asymmetric == "1" else rows)
            assert x["right_scales"].shape == (n, 3, columns // 8 if asymmetric == "1" else 1)


def test_gain_keeps_nothing_where_the_bytes_do_more_elsewhere():
    """White errors have no low rank: a correction of a large matrix of them cannot pay."""
    c = config(RECORD_LIKE, LQER_ENABLED=1, LQER_SELECT="gain")
    w = matrix(400, 300)
    factor = tg.factor_hessian(torch.eye(300)[None], 0.01)
    stored = {"up_bank": tg.QUANTIZERS[c.quantizer].encode(w, factor, 6, 0.0, c)}
    lines = []
    tg.correct_errors(stored, {"up_bank": w}, {"up_bank": torch.eye(300)[None]}, c, lines.append)
    assert not stored["up_bank"].extras and "no correction" in lines[0]


def test_a_correction_of_a_low_rank_error_takes_it_away():
    c, (_, hessian) = config(LQER_RANK=2, LQER_FACTOR_BITS=8), correlated(300, 60)
    generator = torch.Generator().manual_seed(3)
    error = torch.randn(40, 2, generator=generator) @ torch.randn(2, 60, generator=generator)
    before = tg.weighted_error(error[None], hessian).item()
    assert tg.fit_correction(error, hessian[0], False, c).error < 1e-3 * before
    assert tg.fit_correction(error, hessian[0], True, c).error < 0.25 * before
    for degenerate in (torch.zeros(60, 60), torch.ones(60, 60)):
        assert math.isfinite(tg.fit_correction(error, degenerate, True, c).error)
    assert tg.fit_correction(torch.zeros(4, 60), hessian[0], False, c).error == 0


@pytest.mark.parametrize("asymmetric", [True, False])
def test_a_correction_by_svd_is_the_rounded_svd(asymmetric):
    """Left factor U S, right factor V^T, scales by the largest magnitude; its error is worse than the fitted one's."""
    c, (_, hessian) = config(LQER_RANK=3, LQER_ASYM_GROUP=15, LQER_FIT="svd"), correlated(300, 60)
    error = torch.randn(40, 60, generator=torch.Generator().manual_seed(3))
    found = tg.fit_correction(error, hessian[0], asymmetric, c)
    u, s, v = torch.linalg.svd(error.double(), full_matrices=False)
    left, right = u[:, :3] * s[:3], v[:3]

    def rounded(x, groups, low, high):
        x = x.reshape(groups)
        scale = (x.abs().amax(-1, keepdim=True) / ((high - low) / 2)).half().double()
        return (x / scale).round().clamp(low, high) * scale

    if asymmetric:
        left, right = rounded(left, (1, -1), -2, 1), rounded(right, (3, 4, 15), -8, 7)
    else:
        left, right = rounded(left, (40, 3), -7, 7), rounded(right, (3, 60), -7, 7)
    product = tg.factor_values(found.left, found.left_scales) @ tg.factor_values(found.right, found.right_scales)
    torch.testing.assert_close(product.double(), left.reshape(40, 3) @ right.reshape(3, 60), rtol=1e-4, atol=1e-5)
    fitted = tg.fit_correction(error, hessian[0], asymmetric, dataclasses.replace(c, lqer_fit="hessian"))
    assert fitted.error < found.error and fitted.bytes == found.bytes > 0


def test_pruning_zeroes_the_smallest_weights_of_each_quantized_matrix():
    c = config(RECORD_LIKE, PRUNE_PCT=0.25)
    weights = {name: p.detach() for name, p in build_model(c).named_parameters()}
    found = tg.pruned(weights, c)
    assert list(found) == list(weights)
    for name, w in weights.items():
        if tg.quantization_bits(name, w.numel(), c)[0] == 16:
            assert torch.equal(found[name], w)
            continue
        for before, after in zip(tg.as_batch(w), tg.as_batch(found[name]), strict=True):
            zeroed = after == 0
            assert zeroed.sum() == round(0.25 * before.numel()) and torch.equal(after[~zeroed], before[~zeroed])
            assert before[zeroed].abs().max() <= before[~zeroed].abs().min()
    one = tg.pruned(weights, dataclasses.replace(c, prune_pct=1e-9))
    assert all(torch.equal(one[name], w) for name, w in weights.items())


def test_salient_columns_are_those_with_most_activation_and_weight():
    c = config(RECORD_LIKE, AWQ_GROUPS=3)
    weights, hessians = (
        {"up_bank": torch.ones(2, 8, 130), "embedding": torch.ones(30, 64)},
        {"up_bank": torch.diag_embed(torch.ones(2, 130)), "embedding": torch.eye(64)[None]},
    )
    hessians["up_bank"][1, 70, 70] = 1e4  # one loud channel, in the second group of the second matrix
    weights["up_bank"][0, :, 128:] = 200  # two columns of large weights, in the third group of the first
    weights["embedding"] *= 3
    salient = tg.salient_columns(weights, hessians, c)
    assert {name: mask.shape for name, mask in salient.items()} == {"up_bank": (2, 130), "embedding": (1, 64)}
    assert salient["embedding"].all()
    columns = [mask.nonzero()[:, 0].tolist() for mask in salient["up_bank"]]
    assert columns == [[128, 129], list(range(64, 128))]


@pytest.mark.parametrize("quantizer", ["uniform", "trellis"])
def test_salient_columns_have_scales_of_eight_bits(quantizer):
    _, weights, hessians, plain, _ = with_hessians(QUANTIZER=quantizer)
    c, _, _, fine, _ = with_hessians(AWQ_GROUPS=5, QUANTIZER=quantizer)
    salient = tg.salient_columns(weights, hessians, c)
    assert sum(-(-row.sum().item() // tg.AWQ_COLUMNS) for mask in salient.values() for row in mask) == 5
    before, after = (total_error(weights, stored, hessians) for stored in (plain, fine))
    for name, q in fine.items():
        assert (name in salient) == ("columns" in q.extras)
        if name in salient:
            assert torch.equal(q.extras["columns"], -2 * (8 - q.bits) * salient[name])
            improved = salient[name].any(1)
            assert (after[name][improved] < 0.8 * before[name][improved]).all()


def test_residuals_refine_the_matrices_where_they_save_most_until_the_bytes_are_spent():
    c, weights, hessians, stored, _ = with_hessians(RVQ_ENABLED=1)
    residuals = tg.fit_residuals(stored, weights, hessians, c)
    matrices = sum(len(h) for h in hessians.values())
    assert len(residuals) == matrices and all(r.saved > 0 for r in residuals)
    worth = [r.saved / r.bytes for r in residuals]
    assert worth == sorted(worth, reverse=True)
    plain, lines = len(tg.pack(stored, c)), []
    sizes, counts = [], []
    for limit in (plain, plain + 2000, plain + 10_000, 10**9):
        data = tg.pack_within(stored, residuals, limit, c, lines.append)
        refined = {
            (name, i)
            for name, q in tg.unpack(data)[1].items()
            for i in q.extras.get("refined", torch.empty(0)).tolist()
        }
        assert len(data) <= limit and f"rvq:{len(refined)} of {matrices}" in lines[-1]
        assert refined <= {(r.name, r.matrix) for r in residuals}
        sizes.append(len(data))
        counts.append(len(refined))
    assert sizes == sorted(sizes) and counts[0] == 0 < counts[1] < counts[2] < counts[3] == matrices
    before = total_error(weights, stored, hessians)
    after = total_error(weights, tg.with_residuals(stored, residuals), hessians)
    assert all((after[name] < 0.2 * before[name]).all() for name in before)


def test_scales_on_the_grid_are_sixteen_to_an_octave():
    w = matrix(200, 64)[0] * torch.logspace(-3, 3, 200)[:, None]
    found, free = (tg.row_scales(w, 6, 13.0, per_octave).float() for per_octave in (16, 0))
    assert ((found.log2() * 16).round() / 16 - found.log2()).abs().max() < 1e-3
    assert (found / free).log2().abs().max() <= 0.5 / 16 + 1e-3


def test_the_bits_of_each_class_have_a_knob():
    for knob, banks in (("ATTN_BITS", ("qo_bank", "kv_bank")), ("MLP_BITS", ("up_bank", "down_bank"))):
        _, _, _, stored, _ = with_hessians(**{knob: 7})
        assert {name: stored[name].bits for name in tg.BANKS} == {n: 7 if n in banks else 4 for n in tg.BANKS}


@pytest.mark.parametrize("natural", [False, True])
def test_column_scales_follow_the_conditional_deviation(natural):
    factor = tg.factor_hessian(correlated(300, 40)[1], 0.01, natural)
    diagonal = factor.inverse_cholesky.diagonal(dim1=-2, dim2=-1)
    u = torch.empty(1, 40).scatter_(1, factor.order, diagonal)  # in natural order
    found = tg.column_exponents(factor, 1.0)
    expected = (u / u.log2().mean().exp2()).log2()
    assert found.dtype == torch.int8 and (found / 2 - expected).abs().max() <= 0.2501
    assert not tg.column_exponents(factor, 0.0).any()
    assert torch.equal(factor.order[0], torch.arange(40)) == natural


@pytest.mark.parametrize("quantizer", ["uniform", "trellis"])
def test_column_scales_lower_the_error_at_equal_bytes(quantizer):
    """Inputs of very different sizes: what a column matters decides how finely it is stored."""
    w, (_, hessian) = matrix(256, 64), correlated(600, 64)
    found = {}
    for power in (0.0, 0.75):
        for offset in (0.0, 1.0):
            c = config(QUANTIZER=quantizer, COLUMN_STEPS=power, COMPRESSOR="pergroup")
            factor = plan(w, hessian, c)["w"]
            q = tg.QUANTIZERS[quantizer].encode(w, factor, 6, 13.0, c, offset)
            size = len(tg.encode_integers(q.codes.numpy(), tg.IntegerBank(q.codes.shape, q.states).trellis))
            found[power, offset] = size, math.log2(tg.weighted_error(w - tg.restore(q), hessian).item())
    (b0, e0), (b1, e1) = found[0.0, 0.0], found[0.0, 1.0]
    bytes_, error = found[0.75, 0.0]
    assert error < e0 + (e1 - e0) * (bytes_ - b0) / (b1 - b0) - 0.3  # octaves of squared error


@pytest.mark.parametrize("quantizer, compressor", [("uniform", "zstd"), ("trellis", "pergroup")])
def test_the_scales_are_fitted_to_the_target(quantizer, compressor):
    c, weights, hessians, stored, _ = with_hessians(
        QUANTIZER=quantizer, COMPRESSOR=compressor, TARGET_BYTES=1, MATRIX_BITS=6, EMBED_BITS=7, COLUMN_STEPS=0.5
    )
    plain, errors = len(tg.pack(stored, c)), []
    for share in (0.8, 1.0, 1.2):
        limit, lines = int(share * plain), []
        data = tg.quantize_within(weights, tg.Calibration(hessians), limit, c, lines.append)
        assert 0.995 * limit <= len(data) <= limit and f"target:{len(data)} bytes of {limit}" in lines[-1]
        errors.append(sum(e.sum().item() for e in total_error(weights, tg.unpack(data)[1], hessians).values()))
    assert errors[0] > errors[1] > errors[2]
    finest = tg.quantize_within(weights, tg.Calibration(hessians), 10**9, c, lines.append)
    assert len(finest) > 1.5 * plain  # as fine as codes of 12 bits allow
    smallest = tg.quantize_within(weights, tg.Calibration(hessians), 100, c, lines.append)
    assert 100 < len(smallest) < 0.7 * plain  # nothing fits: the largest scales, and the run will say that it is over


@pytest.mark.parametrize("quantizer", ["uniform", "trellis"])
def test_scales_are_never_too_small_for_the_codes(quantizer):
    """Rows with outliers and very different column scales: smaller is never worse, because nothing is clipped."""
    w, (_, hessian) = matrix(64, 80), correlated(400, 80)
    w[:, ::7, 3] *= 30
    c, errors = config(QUANTIZER=quantizer, COLUMN_STEPS=0.75, TARGET_BYTES=1), []
    factor = plan(w, hessian, c)["w"]
    for offset in (0.0, -1.0, -2.0, -2.5):
        q = tg.QUANTIZERS[quantizer].encode(w, factor, 8, 14.0, c, offset)
        errors.append(tg.weighted_error(w - tg.restore(q), hessian).item())
        assert (q.codes.abs() == 127).float().mean() < 0.001
    assert errors[0] >= errors[1] >= errors[2] >= 0.95 * errors[3]


@pytest.mark.parametrize("quantizer", ["uniform", "trellis", "gptq_lite"])
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)],
)
def test_weights_of_a_device_are_quantized_packed_and_held_against_what_is_read_back(device, quantizer):
    c, weights, hessians, _, _ = with_hessians(QUANTIZER=quantizer, LQER_ENABLED=1, LQER_SELECT="norm")
    weights, hessians = ({name: x.to(device) for name, x in tensors.items()} for tensors in (weights, hessians))
    stored = tg.quantize(weights, tg.Calibration(hessians), c)
    data = tg.pack(tg.with_residuals(stored, tg.fit_residuals(stored, weights, hessians, c)), c)
    rows = [row for row in tg.size_table(data, tg.unpack(data)[1], weights, hessians) if "relative_error" in row]
    assert rows and all(0 < row["relative_error"] < 0.05 for row in rows)

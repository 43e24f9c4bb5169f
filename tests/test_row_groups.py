"""Compensation of the errors of some output rows in others (GPTQ_ROW_GROUPS)."""

import pytest
import torch

import train_gpt as tg
from helpers import TINY, config

FREE = dict(TINY, SCALE_GRID=0, MLP_CLIP_SIGMAS=12, ATTN_CLIP_SIGMAS=12)
GROUPS = 4


def covariance(generator, batch, size, rank):
    """[batch, size, size], of full rank, with strong correlations."""
    x = torch.randn(batch, size, rank, generator=generator, dtype=torch.float64)
    return x @ x.mT / rank + 0.02 * torch.eye(size, dtype=torch.float64)


def case(**knobs):
    """A config with row groups, and calibration of one bank whose inputs and outputs are both correlated."""
    c = config(dict(FREE, GPTQ_ROW_GROUPS=GROUPS), **knobs)
    generator = torch.Generator().manual_seed(2)
    w = torch.randn(2, 30, 24, generator=generator)
    h, g = covariance(generator, 2, 24, 8).float(), covariance(generator, 2, 30, 8)
    g = (g / g.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]).float()
    rows = g.diagonal(dim1=1, dim2=2).contiguous()
    return c, {"up_bank": w}, tg.Calibration({"up_bank": h}, {"up_bank": rows}, {"up_bank": g})


def cost(weights, stored, calibration):
    """tr(G E H E^T), in float64."""
    error = (weights["up_bank"] - tg.restore(stored["up_bank"])).double()
    g, h = calibration.outputs["up_bank"].double(), calibration.hessians["up_bank"].double()
    return ((g @ error @ h) * error).sum().item()


@pytest.mark.parametrize("rows, groups", [(30, 4), (7, 7), (5, 9), (6, 1)])
def test_each_row_is_in_one_group_of_nearly_equal_size(rows, groups):
    found = tg.row_groups(rows, groups, torch.device("cpu"))
    assert len(found) == min(rows, groups)
    assert sorted(torch.cat(found).tolist()) == list(range(rows))
    assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize("groups", [1, 4, 30])
def test_later_rows_are_where_they_cost_least(groups):
    """Against the conditional optimum, solved in float64 for each group."""
    _, weights, calibration = case()
    w, g = weights["up_bank"], calibration.outputs["up_bank"].double()
    indices = tg.row_groups(30, groups, w.device)
    order = torch.cat(indices)
    u = tg.inverse_cholesky(g[:, order][:, :, order], 0.0)
    seen = []

    def encode(part, rows):
        seen.append((rows, part.clone()))
        return tg.Quantized((part / 0.5).round().to(torch.int16), None, 8, {})

    codes = tg.encode_by_row_groups(w, u, groups, encode, lambda q: q.codes * 0.5)
    error = torch.zeros_like(w, dtype=torch.float64)
    done = torch.zeros(30, dtype=torch.bool)
    for rows, part in seen:
        later = (~done).nonzero().flatten()
        if done.any():
            crossed = g[:, later][:, :, done] @ error[:, done]
            best = -torch.linalg.solve(g[:, later][:, :, later], crossed)
            expected = w.double()[:, later] + best
            place = torch.isin(later, rows)
            assert torch.allclose(part.double(), expected[:, place], atol=1e-4)
        assert torch.equal(codes[:, rows], (part / 0.5).round().to(torch.int16))
        error[:, rows] = 0.5 * codes[:, rows].double() - w[:, rows].double()
        done[rows] = True
    assert done.all() and len(seen) == min(groups, 30)


@pytest.mark.parametrize("quantizer", ["uniform", "trellis"])
def test_compensation_lowers_the_cost(quantizer):
    c, weights, calibration = case(QUANTIZER=quantizer, MLP_BITS=4)
    compensated = tg.quantize(weights, calibration, c)
    independent = tg.quantize(weights, calibration._replace(outputs={}), c)
    tg.check_stored(compensated["up_bank"])
    assert torch.equal(compensated["up_bank"].scales, independent["up_bank"].scales)
    assert cost(weights, compensated, calibration) < 0.6 * cost(weights, independent, calibration)


@pytest.mark.parametrize("quantizer", ["uniform", "trellis"])
def test_more_groups_cost_less(quantizer):
    costs = []
    for groups in (1, 3, 30):
        c, weights, calibration = case(QUANTIZER=quantizer, MLP_BITS=4, GPTQ_ROW_GROUPS=groups)
        costs.append(cost(weights, tg.quantize(weights, calibration, c), calibration))
    assert costs[0] > costs[1] > costs[2]


@pytest.mark.parametrize("quantizer", ["uniform", "trellis"])
def test_uncorrelated_rows_are_not_compensated(quantizer):
    c, weights, calibration = case(QUANTIZER=quantizer)
    diagonal = torch.diag_embed(calibration.rows["up_bank"])
    alone = tg.quantize(weights, calibration._replace(outputs={}), c)["up_bank"]
    grouped = tg.quantize(weights, calibration._replace(outputs={"up_bank": diagonal}), c)["up_bank"]
    assert torch.equal(alone.codes, grouped.codes) and torch.equal(alone.scales, grouped.scales)


def test_without_groups_rows_are_independent():
    c, weights, calibration = case(QUANTIZER="trellis", GPTQ_ROW_GROUPS=0)
    found, alone = (tg.quantize(weights, x, c)["up_bank"] for x in (calibration, calibration._replace(outputs={})))
    assert torch.equal(found.codes, alone.codes)


def test_rows_whose_outputs_have_no_gradient_do_not_break_it():
    c, weights, calibration = case(QUANTIZER="trellis")
    g = calibration.outputs["up_bank"].clone()
    g[0] = 0
    g[1, :5] = 0
    g[1, :, :5] = 0
    q = tg.quantize(weights, calibration._replace(outputs={"up_bank": g}), c)["up_bank"]
    tg.check_stored(q)
    assert tg.restore(q).isfinite().all()


def test_the_bytes_are_met_with_compensation():
    c, weights, calibration = case(QUANTIZER="trellis", TARGET_BYTES=1)
    lines = []
    limit = 1600
    data = tg.quantize_within(weights, calibration, limit, c, lines.append)
    assert limit - 25 <= len(data) <= limit, lines
    independent = tg.quantize_within(weights, calibration._replace(outputs={}), limit, c, lines.append)
    costs = [cost(weights, tg.unpack(x)[1], calibration) for x in (data, independent)]
    assert costs[0] < 0.8 * costs[1]


# -------------------------------------------------------------------------------------------- corrections on top (LQER)


def test_the_weighted_error_is_the_trace_with_both_covariances():
    _, weights, calibration = case()
    e, h, g = weights["up_bank"], calibration.hessians["up_bank"], calibration.outputs["up_bank"]
    found = tg.weighted_error(e, h, g)
    for i in range(len(e)):
        expected = torch.trace(g[i].double() @ e[i].double() @ h[i].double() @ e[i].double().T)
        assert found[i].item() == pytest.approx(expected.item(), rel=1e-4)


def test_a_correction_is_fitted_to_what_the_outputs_feel():
    """Against one that is fitted without the outputs' covariance, in the error that counts."""
    c, weights, calibration = case(LQER_RANK=3, LQER_FACTOR_BITS=8)
    e, h, g = (x[0].double() for x in (weights["up_bank"], *(calibration[k]["up_bank"] for k in (0, 2))))
    aware, blind = (tg.fit_correction(e.float(), h.float(), False, c, x) for x in (g.float(), None))

    def left(correction):
        factors = (correction.left, correction.left_scales), (correction.right, correction.right_scales)
        first, second = (tg.factor_values(*factor).double() for factor in factors)
        return tg.weighted_error(e - first @ second, h, g).item()

    assert aware.error == pytest.approx(left(aware), rel=1e-3)
    assert left(aware) < 0.9 * left(blind) < tg.weighted_error(e, h, g).item()


@pytest.mark.parametrize("limit", [0, 2600])
def test_corrections_on_top_lower_the_cost(limit):
    knobs = dict(QUANTIZER="trellis", MLP_BITS=2, LQER_ENABLED=1, LQER_SELECT="norm", LQER_RANK=8)
    c, weights, calibration = case(**knobs, TARGET_BYTES=int(limit > 0))
    plain = tg.quantize(weights, calibration, config(dict(FREE, GPTQ_ROW_GROUPS=GROUPS), **dict(knobs, LQER_ENABLED=0)))
    if limit:
        corrected = tg.unpack(tg.quantize_within(weights, calibration, limit, c, lambda line: None))[1]
    else:
        corrected = tg.quantize(weights, calibration, c)
    assert corrected["up_bank"].extras["corrected"].tolist() == [0, 1]
    assert cost(weights, corrected, calibration) < cost(weights, plain, calibration)

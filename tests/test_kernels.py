"""Every hand-differentiated kernel against its plain version: values and gradients in float64, rounding in bfloat16."""

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import train_gpt as tg
from helpers import NEEDS_CUDA, RECORD_LIKE, config, documents_from, examples


def normal(*shape, seed=0, dtype=torch.float64, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def compare(fast, plain, inputs, tolerance=1e-10):
    """Values of both, and gradients of a random weighting of all outputs, for each of the inputs."""
    results = []
    for function in (fast, plain):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum((y * normal(*y.shape, seed=50 + i).to(y.dtype)).sum() for i, y in enumerate(outputs))
        results.append([*(y.detach() for y in outputs), *torch.autograd.grad(loss, leaves)])
    for x, y in zip(*results, strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert (x - y).abs().max() <= tolerance * (1 + y.abs().max())
    assert results[1][0].abs().max() > 0 and results[1][-1].abs().max() > 0


def relative_error(x, exact):
    return ((x.double() - exact).norm() / exact.norm()).item()


def rounding_is_no_worse(fast, plain, inputs, slack=1.6, floor=2.0**-9):
    """In bfloat16 the fast version's errors, against float64, are at most the plain version's, with some slack."""

    def run(function, dtype):
        leaves = [x.to(torch.bfloat16).to(dtype).requires_grad_() for x in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [normal(*y.shape, seed=50 + i).to(torch.bfloat16).to(y.dtype) for i, y in enumerate(outputs)]
        loss = sum((y * weight).sum() for y, weight in zip(outputs, weights, strict=True))
        return [*(y.detach() for y in outputs), *torch.autograd.grad(loss, leaves)]

    exact = run(plain, torch.float64)
    for ours, theirs, truth in zip(run(fast, torch.bfloat16), run(plain, torch.bfloat16), exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, truth) <= slack * max(relative_error(theirs, truth), floor)


# ------------------------------------------------------------------------------------------------------------ RMS norm


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4, 8), (4, 1)])
def test_rms_norm(shape):
    for scale in (1.0, 1e-3, 1e3):
        compare(tg.RMSNormCPU.apply, tg.rms_norm_plain, [normal(*shape, scale=scale)], 1e-9)
    assert torch.autograd.gradcheck(tg.RMSNormCPU.apply, normal(*shape).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_of_tiny_and_zero_rows(dtype):
    """The epsilon is float32's, whatever the input's type; a zero row stays zero and its gradient finite."""
    x = normal(6, 16, dtype=dtype, scale=1e-4)
    x[2] = 0
    x = x.requires_grad_()
    y = tg.RMSNormCPU.apply(x)
    y.sum().backward()
    assert torch.isfinite(x.grad).all() and not y[2].any()
    exact = tg.rms_norm_plain(x.detach())
    assert torch.allclose(y.float(), exact.float(), rtol=0.02, atol=1e-6)
    assert y[0].abs().max() > 0.3  # not crushed by a large epsilon


def test_rms_norm_rounds_no_worse_than_the_plain_one():
    rounding_is_no_worse(tg.RMSNormCPU.apply, tg.rms_norm_plain, [normal(64, 256)], slack=3)


def test_rms_norm_of_the_dispatcher_is_the_plain_one():
    x = normal(4, 32)
    assert torch.allclose(tg.rms_norm(x), tg.rms_norm_plain(x), rtol=1e-12)
    assert torch.allclose(tg.rms_norm(x).square().mean(-1), torch.ones(4, dtype=torch.float64))


# ----------------------------------------------------------------------------------------------------------- own value


@pytest.mark.parametrize("heads", [2, 4, 6])
def test_subtract_own_value(heads):
    """Against the plain one, by finite differences, and in the dispatcher; two heads of values."""
    y, v = normal(2, 3, heads, 8), normal(2, 3, 2, 8, seed=1)
    compare(tg.SubtractOwnValueCPU.apply, tg.subtract_own_value_plain, [y, v])
    short = v * 1e-13  # below the least norm
    compare(tg.SubtractOwnValueCPU.apply, tg.subtract_own_value_plain, [y, short])
    assert torch.autograd.gradcheck(tg.SubtractOwnValueCPU.apply, (y.requires_grad_(), v.requires_grad_()))
    assert torch.allclose(tg.subtract_own_value(y, v), tg.subtract_own_value_plain(y, v), rtol=1e-12)
    strength = torch.full((heads,), 0.5, dtype=torch.float64)
    assert torch.equal(tg.subtract_own_value(y, v, strength), tg.subtract_own_value_plain(y, v, strength))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subtract_own_value_of_zero(dtype):
    """A value of zero has no direction: nothing is subtracted, and the gradients stay finite."""
    y, v = normal(1, 3, 4, 8, dtype=dtype).requires_grad_(), normal(1, 3, 2, 8, dtype=dtype, seed=1)
    v[0, 1] = 0
    out = tg.SubtractOwnValueCPU.apply(y, v.requires_grad_())
    out.square().sum().backward()
    assert torch.equal(out[0, 1], y[0, 1]) and not torch.equal(out[0, 0], y[0, 0])
    assert torch.isfinite(y.grad).all() and torch.isfinite(v.grad).all()


def test_subtract_own_value_rounds_no_worse_than_the_plain_one():
    tensors = [normal(2, 16, 4, 32), normal(2, 16, 2, 32, seed=1)]
    rounding_is_no_worse(tg.SubtractOwnValueCPU.apply, tg.subtract_own_value_plain, tensors, slack=3)


# ---------------------------------------------------------------------------------------------------------- activation


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.5, 1.0])
def test_leaky_relu_squared(slope):
    x = normal(4, 33)
    compare(lambda a: tg.LeakyReLUSquaredCPU.apply(a, slope), lambda a: tg.leaky_relu_squared_plain(a, slope), [x])
    assert torch.autograd.gradcheck(lambda a: tg.LeakyReLUSquaredCPU.apply(a, slope), x.requires_grad_())
    rounding_is_no_worse(
        lambda a: tg.LeakyReLUSquaredCPU.apply(a, slope),
        lambda a: tg.leaky_relu_squared_plain(a, slope),
        [normal(64, 64)],
    )


def test_leaky_relu_squared_by_hand():
    x = torch.tensor([-2.0, -1.0, 0.0, 3.0])
    assert tg.leaky_relu_squared(x, 0.5).tolist() == [1.0, 0.25, 0.0, 9.0]
    assert tg.leaky_relu_squared(x, 0.0).tolist() == [0.0, 0.0, 0.0, 9.0]


# ------------------------------------------------------------------------------------------------------- cross entropy


@pytest.mark.parametrize("cap", [0.5, 5.0, 30.0, 80.0, 200.0])
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_softcapped_cross_entropy(cap, scale):
    logits = normal(3, 5, 40, scale=scale)
    targets = torch.randint(40, (3, 5), generator=torch.Generator().manual_seed(1))
    compare(
        lambda x: tg.SoftcappedCrossEntropyCPU.apply(x, targets, cap),
        lambda x: tg.softcapped_cross_entropy_plain(x, targets, cap),
        [logits],
    )


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.3, -2.0)])
def test_both_outputs_carry_their_gradient(weights):
    """gradcheck of the loss through nll alone, through lse alone (which a peer's kernel drops), and through both."""
    targets = torch.tensor([0, 3, 6, 6])

    def loss(x):
        nll, lse = tg.SoftcappedCrossEntropyCPU.apply(x, targets, 30.0)
        return weights[0] * nll + weights[1] * lse

    assert torch.autograd.gradcheck(loss, normal(4, 7, scale=8).requires_grad_())


def test_the_z_loss_trains():
    """d/dx mean(lse^2), worked out by hand in float64: 2 lse softmax(z) (1 - tanh(x/C)^2) / N, in every version."""
    logits, targets, cap = normal(6, 20, scale=20), torch.arange(6), 30.0
    z = cap * torch.tanh(logits / cap)
    lse = torch.logsumexp(z, -1, keepdim=True)
    expected = 2 * lse * torch.softmax(z, -1) * (1 - torch.tanh(logits / cap) ** 2) / 6
    assert expected.abs().max() > 0.1
    functions = (tg.SoftcappedCrossEntropyCPU.apply, tg.softcapped_cross_entropy_plain, tg.softcapped_cross_entropy)
    for function in functions:
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
            x = logits.detach().clone().to(dtype).requires_grad_()
            function(x, targets, cap)[1].square().mean().backward()
            assert (x.grad.double() - expected).abs().max() <= tolerance * expected.abs().max(), (function, dtype)


def test_cross_entropy_is_torchs_on_the_capped_logits():
    logits, targets = normal(9, 11, scale=40), torch.arange(9)
    nll, lse = tg.softcapped_cross_entropy(logits, targets, 30.0)
    capped = 30 * torch.tanh(logits / 30)
    assert torch.allclose(nll, F.cross_entropy(capped, targets, reduction="none"))
    assert torch.allclose(lse, torch.logsumexp(capped, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [30.0, 80.0, 200.0])
@pytest.mark.parametrize("value", [-1e4, 1e4, 0.0])
def test_cross_entropy_of_saturated_logits_is_finite(value, cap, dtype):
    """All logits alike: log V, however large; a vocabulary of 8192 tokens, as the record's."""
    x = torch.full((2, 8192), value, dtype=dtype).requires_grad_()
    nll, lse = tg.SoftcappedCrossEntropyCPU.apply(x, torch.tensor([0, 8191]), cap)
    (nll.sum() + lse.sum()).backward()
    assert torch.allclose(nll, torch.full_like(nll, math.log(8192)), atol=1e-3)
    assert torch.isfinite(lse).all() and torch.isfinite(x.grad).all()


def test_cross_entropy_rounds_no_worse_than_the_plain_one():
    targets = torch.randint(100, (32,), generator=torch.Generator().manual_seed(2))
    rounding_is_no_worse(
        lambda x: tg.SoftcappedCrossEntropyCPU.apply(x, targets, 30.0),
        lambda x: tg.softcapped_cross_entropy_plain(x, targets, 30.0),
        [normal(32, 100, scale=5)],
    )


@pytest.fixture
def set_threads():
    """Sets torch's number of threads, and puts the former one back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_cross_entropy_of_a_row_does_not_depend_on_its_place():
    """Bit for bit, in batches of any length."""
    logits = normal(12000, 3, dtype=torch.float32, scale=3)
    targets = torch.arange(len(logits)) % 3
    together = tg.SoftcappedCrossEntropyCPU.apply(logits, targets, 30.0)
    for first, end in ((0, 10923), (1, 12000), *((n, n + 1 + n % 7) for n in range(60))):
        part = tg.SoftcappedCrossEntropyCPU.apply(logits[first:end], targets[first:end], 30.0)
        assert all(torch.equal(x, y[first:end]) for x, y in zip(part, together, strict=True)), (first, end)


@pytest.mark.parametrize("threads", [2, 3, 5, 7])
def test_whole_vectors_do_not_depend_on_the_threads(threads, set_threads):
    """torch's exp2 rounds otherwise where a thread's part ends within a vector; so does it at the end of a tensor."""
    for count in (5, 100, 32769, 65600, 70208, 70224, 100003, 150001, 200003, 300000, 400009, 500003):
        set_threads(threads)
        x = normal(tg.whole_vectors(count), dtype=torch.float32, scale=3)
        assert len(x) >= count
        shared = torch.exp2(x)
        set_threads(1)
        assert torch.equal(shared, torch.exp2(x)), count


def test_cross_entropy_leaves_its_input_alone():
    x = normal(3, 8, dtype=torch.float32)
    before = x.clone()
    y = x.clone().requires_grad_()
    tg.SoftcappedCrossEntropyCPU.apply(y, torch.tensor([0, 1, 2]), 30.0)[0].sum().backward()
    assert torch.equal(y.detach(), before)


# ----------------------------------------------------------------------------------------------------------- attention


def documents_of(starts, rows, length):
    """[rows, length] document starts, from each row's list of starts."""
    out = torch.zeros(rows, length, dtype=torch.int32)
    for r in range(rows):
        for start in starts[r % len(starts)]:
            out[r, start:] = start
    return out


def attention_naive(q, k, v, documents, window=None):
    """Position by position and head by head."""
    y = torch.empty_like(q)
    for r in range(q.size(0)):
        for t in range(q.size(1)):
            first = max(int(documents[r, t]), t - (t if window is None else window))
            for head in range(q.size(2)):
                g = head * k.size(2) // q.size(2)
                scores = k[r, first : t + 1, g] @ q[r, t, head] / q.size(-1) ** 0.5
                y[r, t, head] = torch.softmax(scores, 0) @ v[r, first : t + 1, g]
    return y


def of_backend(name, documents, window=0):
    """A backend's attention for documents' starts, with the heads of its arguments."""
    backend, batch = tg.attention_backend(name, documents.size(1), window), documents_from(documents)
    return lambda q, k, v: backend(batch, q.size(2), k.size(2))(q, k, v, window > 0)


def backends(documents, window=0):
    return {name: of_backend(name, documents, window) for name in ("sdpa", "blocked")}


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (4, 2), (4, 1), (6, 2)])
@pytest.mark.parametrize("length", [1, 7, 127, 128, 129, 300])
def test_blocked_attention_equals_torchs(length, heads, kv_heads):
    q, k, v = (normal(2, length, n, 8, seed=i) for i, n in enumerate((heads, kv_heads, kv_heads)))
    for starts in ([[0]], [[0, 3, 5, 128, 200], [0, 1, 2, 127, 129]]):
        documents = documents_of([[s for s in row if s < length] for row in starts], 2, length)
        both = backends(documents)
        compare(both["blocked"], both["sdpa"], [q, k, v])


def test_every_backend_equals_the_definition():
    q, k, v = (normal(2, 20, n, 4, seed=i) for i, n in enumerate((4, 2, 2)))
    documents = documents_of([[0, 5, 6, 13], [0, 19]], 2, 20)
    for function in backends(documents).values():
        compare(function, lambda q, k, v: attention_naive(q, k, v, documents), [q, k, v])


@pytest.mark.parametrize("window", [1, 2, 5, 18, 19, 20, 1000])
def test_attention_with_a_window_equals_the_definition(window):
    q, k, v = (normal(2, 20, n, 4, seed=i) for i, n in enumerate((4, 2, 2)))
    documents = documents_of([[0, 5, 6, 13], [0, 19]], 2, 20)
    for function in backends(documents, window).values():
        compare(function, lambda q, k, v: attention_naive(q, k, v, documents, window), [q, k, v])


@pytest.mark.parametrize("window", [1, 15, 16, 17, 100, 127, 128, 129, 250, 298, 299])
def test_blocked_attention_with_a_window_equals_torchs(window):
    """Windows that end before, at and after the end of a block."""
    q, k, v = (normal(2, 300, n, 8, seed=i) for i, n in enumerate((4, 2, 2)))
    documents = documents_of([[0], [0, 3, 130]], 2, 300)
    both = backends(documents, window)
    compare(both["blocked"], both["sdpa"], [q, k, v])


def test_layers_without_a_window_see_all_of_the_document():
    q, k, v = (normal(1, 40, n, 4, seed=i) for i, n in enumerate((2, 1, 1)))
    documents = documents_of([[0]], 1, 40)
    for name in ("sdpa", "blocked"):
        attention = tg.attention_backend(name, 40, 3)(documents_from(documents), 2, 1)
        assert torch.allclose(attention(q, k, v, False), attention_naive(q, k, v, documents))
        assert not torch.allclose(attention(q, k, v, True), attention(q, k, v, False))


def test_blocks_before_a_window_are_not_computed(monkeypatch):
    """A window of 100 tokens costs at most 128 earlier keys for each block of queries, not all of the document."""
    seen = []
    hide = tg.hide_keys
    monkeypatch.setattr(tg, "hide_keys", lambda s, w, window: (seen.append(s.size(-1)), hide(s, w, window)))
    q, k, v = (normal(1, 1024, n, 4, seed=i) for i, n in enumerate((2, 1, 1)))
    of_backend("blocked", documents_of([[0]], 1, 1024), 100)(q, k, v)
    assert seen == [16, 32, 64, 128, 240, 256, 256, 256, 256, 256, 256]


@pytest.mark.parametrize("window", [0, 1, 3])
def test_blocked_attention_passes_gradcheck(window, monkeypatch):
    monkeypatch.setattr(tg, "FIRST_BLOCK", 1)  # several blocks in few positions
    monkeypatch.setattr(tg, "QUERY_BLOCK", 2)
    q, k, v = (normal(1, 7, n, 2, seed=i).requires_grad_() for i, n in enumerate((2, 1, 1)))
    documents = documents_of([[0]] if window else [[0, 4]], 1, 7)
    function = backends(documents, window)["blocked"]
    assert tg.block_widths(4) == [1, 1, 2] and tg.block_widths(5) == [1, 1, 2, 2]
    assert torch.autograd.gradcheck(function, (q, k, v))
    compare(function, backends(documents, window)["sdpa"], [q, k, v])


@examples(max_examples=40)
@given(st.integers(1, 3), st.integers(1, 200), st.sampled_from([(2, 1), (2, 2), (4, 2)]), st.data())
def test_attention_of_random_shapes_and_documents(rows, length, heads, data):
    starts = [sorted({0, *data.draw(st.lists(st.integers(0, length - 1), max_size=6))}) for _ in range(rows)]
    documents = documents_of(starts, rows, length)
    q, k, v = (normal(rows, length, n, 4, seed=i) for i, n in enumerate((heads[0], heads[1], heads[1])))
    both = backends(documents)
    compare(both["blocked"], both["sdpa"], [q, k, v])


def test_blocked_attention_rounds_like_torchs():
    q, k, v = (normal(2, 200, n, 32, seed=i) for i, n in enumerate((4, 2, 2)))
    documents = documents_of([[0, 90], [0, 10, 150]], 2, 200)
    rounding_is_no_worse(of_backend("blocked", documents), of_backend("sdpa", documents), [q, k, v], slack=3)


def test_blocks_end_at_fixed_places():
    ends = list(itertools.accumulate(tg.block_widths(300)))
    assert ends == [16, 32, 64, 128, 256, 384]
    assert tg.block_widths(1) == tg.block_widths(16) == [16] and tg.block_widths(17) == [16, 16]


def test_blocked_attention_computes_documents_and_not_rows():
    """Rows of 512 tokens cost what their documents cost, whatever lies beside them."""
    long_row, short_rows = documents_of([list(range(0, 512, 32))], 1, 512), documents_of([[0]], 16, 32)
    work = [[n * w for n, w in tg.document_blocks(s, 2, 1).shapes] for s in (long_row, short_rows)]
    assert work[0] == work[1] == [16 * 16, 16 * 16]
    one = [n * w for n, w in tg.document_blocks(documents_of([[0, 300]], 1, 512), 2, 1).shapes]
    assert one == [2 * 16, 2 * 16, 2 * 32, 2 * 64, 2 * 128, 128]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_document(bad):
    """And where it begins a block, behind what came before it: 0 * inf is not 0."""
    documents = documents_of([[0, 5, 40], [0, 30, 31]], 2, 60)
    q, k, v = (normal(2, 60, n, 4, seed=i) for i, n in enumerate((2, 1, 1)))
    expected = of_backend("blocked", documents)(q, k, v)
    for x in (q, k, v):
        x[0, 5 + 32 :] = bad  # the second block of the second document, and the whole third
        x[1, 30] = bad
    found = of_backend("blocked", documents)(q, k, v)
    clean = torch.ones(2, 60, dtype=torch.bool)
    clean[0, 5 + 16 :] = clean[1, 30] = False
    assert torch.equal(found[clean], expected[clean]) and not torch.isfinite(found[0, 40:]).any()


def test_who_sees_whom():
    seen = tg.document_mask(torch.tensor([[0, 0, 2, 2]]))[0].tolist()
    assert seen == [
        [True, False, False, False],
        [True, True, False, False],
        [False, False, True, False],
        [False, False, True, True],
    ]
    nearby = tg.document_mask(torch.tensor([[0, 0, 0, 0]]), 1)[0]
    assert torch.equal(nearby, torch.ones(4, 4, dtype=torch.bool).tril().triu(-1))


# -------------------------------------------------------------------------------------------------- rotary and low rank


def tables(length, frequencies):
    """cos and sin as the model hands them out, [length, 1, frequencies], and the angles."""
    positions, frequencies = torch.arange(length, dtype=torch.float64), torch.tensor(frequencies, dtype=torch.float64)
    angles = torch.outer(positions, frequencies)[:, None]
    return angles.cos(), angles.sin(), angles


def test_rotation_turns_pairs_and_passes_the_rest():
    x, (cos, sin, angles) = normal(2, 6, 3, 10), tables(6, [1.0, 0.1])
    for function in (tg.rotate, tg.rotate_plain):
        y = function(x, cos, sin)
        assert torch.equal(y[..., 4:], x[..., 4:])
        as_complex = torch.complex(x[..., :2], x[..., 2:4]) * torch.exp(-1j * angles)
        assert torch.allclose(y[..., :2], as_complex.real) and torch.allclose(y[..., 2:4], as_complex.imag)
        assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("width", [4, 10])
def test_rotation_has_the_plain_ones_gradient(width):
    cos, sin, _ = tables(6, [1.0, 0.1])

    def fast(x):
        return tg.RotateCPU.apply(x, cos.to(x.dtype), sin.to(x.dtype))

    def plain(x):
        return tg.rotate_plain(x, cos.to(x.dtype), sin.to(x.dtype))

    compare(fast, plain, [normal(2, 6, 3, width)])
    assert torch.autograd.gradcheck(fast, normal(1, 6, 2, width).requires_grad_())
    rounding_is_no_worse(fast, plain, [normal(8, 6, 4, width)])


def test_rotated_products_depend_on_the_distance_alone():
    x, y, (cos, sin, _) = normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1), tables(30, [1.0, 0.1, 0.01, 0.001])
    q, k = (tg.rotate(z.expand(1, 30, 1, 8), cos, sin)[0, :, 0] for z in (x, y))
    for distance in (0, 1, 7):
        products = (q[distance:] * k[: 30 - distance]).sum(-1)
        assert torch.allclose(products, products[:1].expand_as(products))


def test_low_rank_maps_each_row_by_its_own_pair():
    x, a, b = normal(3, 4, 6), normal(3, 2, 6, seed=1), normal(3, 5, 2, seed=2)
    y = tg.low_rank(x, (a, b))
    for r in range(3):
        assert torch.allclose(y[r], x[r] @ (b[r] @ a[r]).T)


# ------------------------------------------------------------------------------ attention that takes packed documents


def document_by_document(q, k, v, cu_seqlens, longest, window):
    """What a kernel for sequences of many lengths computes, [N, H, h], one sequence after the other."""
    parts = []
    for begin, end in itertools.pairwise(cu_seqlens.tolist()):
        if begin < end:
            assert end - begin <= longest
            one = torch.zeros(1, end - begin, dtype=torch.int32)
            q1, k1, v1 = (x[None, begin:end] for x in (q, k, v))
            parts.append(tg.attention_sdpa(q1, k1, v1, tg.document_mask(one, window))[0])
    return torch.cat(parts)


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("starts", [[[0], [0, 30]], [[0, 1, 2, 3], [0]], [[0, 49], [0, 25, 26]]])
def test_packed_attention_equals_torchs(starts, window):
    """cu_seqlens and the mask agree: padding, documents of one token, documents that a row cuts."""
    documents = documents_from(documents_of(starts, 3, 50))
    mask = tg.document_mask(documents.starts, window)
    compare(
        lambda q, k, v: tg.attention_packed(q, k, v, documents.cu_seqlens, document_by_document, 50, window),
        lambda q, k, v: tg.attention_sdpa(q, k, v, mask),
        [normal(3, 50, 4, 8), normal(3, 50, 2, 8), normal(3, 50, 2, 8)],
    )


def test_bounds_list_each_document_once_and_nothing_else():
    """A padded list costs programs that do nothing: FlashAttention launches them for every sequence listed."""
    for starts in ([0], [0, 5], [0, 100, 200], list(range(256))):
        found = tg.cu_seqlens_of(documents_of([starts], 8, 256).numpy())
        assert str(found.dtype) == "int32"
        assert found.tolist() == [row * 256 + start for row in range(8) for start in starts] + [2048]


def test_a_backend_is_tried_with_the_models_own_heads_and_window(monkeypatch):
    """A build may lack wide heads or windows. A backend that has no windows is passed over where the model has some."""
    tried = []

    def fault(name, width, window=False):
        tried.append((name, width, window))
        return "no windows" if window and name == "fa3" else ""

    monkeypatch.setattr(tg, "attention_fault", fault)
    on_gpu = dict(device="cuda", compute_dtype="bfloat16", attention="auto", num_heads=2)
    plain = dataclasses.replace(config(RECORD_LIKE), **on_gpu)
    assert tg.choose_attention(plain)[0] == "fa3" and tried == [("fa3", 16, False)]
    tried.clear()
    name, why = tg.choose_attention(dataclasses.replace(plain, window_attn_size=5))
    assert name == "fa2" and "fa3: no windows" in why
    assert tried == [(name, 16, window) for name in ("fa3", "fa2") for window in (False, True)]


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize(
    "name, device",
    [("blocked", "cpu"), *(pytest.param(name, "cuda", marks=NEEDS_CUDA) for name in ("fa3", "fa2", "varlen"))],
)
def test_every_backend_of_the_machine_agrees_with_sdpa(name, device, window):
    """Values and gradients in bfloat16: as a whole no further from float64 than rounding takes SDPA itself, and a half.

    The largest of 800,000 errors would be another one in each kernel. A backend that cannot run here is passed over,
    as ATTENTION=auto does; one whose results are wrong is not.
    """
    fault = tg.attention_fault(name, window=window > 0) if device == "cuda" else ""
    assert not fault.startswith("its results are wrong"), fault
    if fault:
        pytest.skip(f"{name} cannot run here: {fault}")
    starts = documents_of([[0, 17, 300], [0], [0, 511]], 3, 512)
    documents = tg.Documents(starts.to(device), documents_from(starts).cu_seqlens.to(device))
    inputs = [normal(3, 512, heads, 64).to(device) for heads in (8, 4, 4)]
    weights = normal(3, 512, 8, 64, seed=1).to(device)

    def results(backend, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        y = tg.attention_backend(backend, 512, window)(documents, 8, 4)(*leaves, window > 0)
        return [y, *torch.autograd.grad(y, leaves, weights.to(dtype))]

    exact, plain = results("sdpa", torch.float64), results("sdpa", torch.bfloat16)
    for truth, x, y in zip(exact, plain, results(name, torch.bfloat16), strict=True):
        ours, theirs = ((z.double() - truth).norm() / truth.norm() for z in (y, x))
        assert ours <= 1.5 * theirs + 1e-3, (ours, theirs)
        assert y.isfinite().all()


# -------------------------------------------------------------------------------- rows that do not depend on each other


def rows_keep_their_bits(function, x, sizes=(1, 2, 3, 5, 7, 9, 11, 13, 17, 31, 100, 333)):
    """A function of rows gives a row the same bits wherever it stands and however many rows there are."""
    whole = function(x)
    for size in sizes:
        for start in (0, 1, 37, len(x) - size):
            assert torch.equal(function(x[start : start + size].clone()), whole[start : start + size]), (size, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width, out", [(32, 48), (5, 4), (4, 17), (12, 1), (33, 17), (10, 6), (64, 1), (256, 384)])
def test_a_row_of_a_product_does_not_depend_on_other_rows(width, out, dtype):
    x, weight = normal(500, width, dtype=dtype), normal(out, width, seed=1, dtype=dtype)
    rows_keep_their_bits(lambda x: tg.linear(x, weight), x)
    wider = normal(500, width + 3, dtype=dtype)  # a gate reads the first inputs of a wider row
    rows_keep_their_bits(lambda x: tg.linear(x[:, :width], weight), wider)


@pytest.mark.parametrize("shape, width, out", [((2, 30), 5, 4), ((1, 3), 8, 8), ((3, 40), 12, 1), ((2, 64), 16, 6)])
def test_linear_is_torchs(shape, width, out):
    compare(tg.linear, F.linear, [normal(*shape, width), normal(out, width, seed=1)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_element_of_a_sigmoid_does_not_depend_on_its_place(dtype):
    for width in (1, 4, 5, 33):
        rows_keep_their_bits(tg.sigmoid, normal(500, width, dtype=dtype, scale=3))


def test_sigmoid_is_torchs():
    x = torch.cat([normal(70, scale=4), torch.tensor([-1000.0, -90.0, 0.0, 90.0, 1000.0])])
    compare(tg.sigmoid, torch.sigmoid, [x])
    assert torch.autograd.gradcheck(tg.sigmoid, normal(9).requires_grad_())
    extreme = torch.tensor([-1000.0, -90.0, 90.0, 1000.0]).requires_grad_()
    tg.sigmoid(extreme).sum().backward()
    assert torch.isfinite(extreme.grad).all()
    rounding_is_no_worse(tg.sigmoid, torch.sigmoid, [normal(200, scale=3)])


def test_a_token_of_a_low_rank_map_does_not_depend_on_the_length():
    a, b = normal(3, 4, 32, seed=1, dtype=torch.float32), normal(3, 24, 4, seed=2, dtype=torch.float32)
    x = normal(3, 60, 32, dtype=torch.float32)
    whole = tg.low_rank(x, (a, b))
    for length in (1, 2, 3, 5, 9, 15, 16, 17, 33):
        assert torch.equal(tg.low_rank(x[:, :length].clone(), (a, b)), whole[:, :length])

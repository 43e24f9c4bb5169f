"""The Triton kernels: values and gradients, cubins for an H100 built without one, one graph, and a real GPU's answers.

Without a GPU they run under Triton's interpreter, which is chosen by the environment when a kernel is defined. So each
such check is a process of its own: `python tests/test_triton_kernels.py NAME` runs check_NAME of this file. The tests
fork these processes from one that has defined the kernels.
"""

import functools
import itertools
import os
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import NEEDS_CUDA, ForkServer, config, run_command
from helpers import tg as k

needs_triton = pytest.mark.skipif(k.triton is None, reason="triton is not installed")
gpu = [*NEEDS_CUDA, needs_triton]
KINDS = ("tanh", "poly")
CAP = 30.0


@functools.cache
def kernels_server(interpreted):
    """A process that has imported the kernels, for the interpreter or for the compiler, and forks the checks."""
    return ForkServer("helpers", **how_to_run(interpreted))


def how_to_run(interpreted):
    """What a process must have in its environment before it imports the kernels."""
    return dict(TRITON_INTERPRET=str(int(interpreted)), PYTHONWARNINGS="ignore")


def run_check(name, interpreted, **environment):
    """Runs check_<name> of this file in a process; its whole output stands in the failure."""
    done = kernels_server(interpreted).run(__file__, {**os.environ, **how_to_run(interpreted), **environment}, name)
    assert done.returncode == 0, done.stdout + done.stderr


# ----------------------------------------------------------------------------------------------- what checks share


def normal(*shape, seed=0, dtype=torch.float32, scale=1.0, device="cpu"):
    """Normal numbers that every 16-bit type holds exactly."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(torch.bfloat16).to(device, dtype)


def random_targets(*shape, below, device="cpu"):
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(9)).to(device)


def values_and_gradients(function, inputs, dtype=None):
    """Outputs, and each input's gradient of a random weighting of all of them; computed in `dtype`, if one is given."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = sum((y * normal(*y.shape, seed=50 + i, dtype=y.dtype, device=y.device)).sum() for i, y in enumerate(outputs))
    return [*(y.detach() for y in outputs), *torch.autograd.grad(loss, leaves)]


def distance(x, exact):
    """Norm of the difference over the norm; where the exact values are all zero, the norm of the difference."""
    assert x.shape == exact.shape and not x.isnan().any()
    return ((x.double() - exact).norm() / (exact.norm() if exact.any() else 1.0)).item()


def compare(fast, plain, inputs):
    """Against float64: 1e-5 relative where a result is float32; in 16 bits, what the plain version errs too."""
    ours, exact = values_and_gradients(fast, inputs), values_and_gradients(plain, inputs, torch.float64)
    theirs = values_and_gradients(plain, inputs)
    for x, y, truth in zip(ours, theirs, exact, strict=True):
        assert x.dtype == y.dtype
        rounding = max(distance(y, truth), torch.finfo(x.dtype).eps / 4)
        allowed = 1e-5 if x.dtype == torch.float32 else 1.6 * rounding
        assert distance(x, truth) <= allowed, (distance(x, truth), allowed, x.shape)


def compare_cross_entropy(shape, kind, dtype=torch.float32, scale=12.0, device="cpu", cap=CAP):
    logits = normal(*shape, dtype=dtype, scale=scale, device=device)
    targets = random_targets(*shape[:-1], below=shape[-1], device=device)
    compare(
        lambda x: k.softcapped_cross_entropy_triton(x, targets, cap, kind),
        lambda x: k.softcapped_cross_entropy_plain(x, targets, cap, kind),
        [logits],
    )


def z_loss_gradient(logits, function):
    """Gradient of mean(lse^2) alone, with its own small weight as in training."""
    leaf = logits.detach().clone().requires_grad_()
    _, lse = function(leaf)
    (1e-4 * lse.square().mean()).backward()
    return leaf.grad


def compare_z_loss(kind, dtype=torch.float32, device="cpu"):
    logits = normal(7, 1025, dtype=dtype, scale=9.0, device=device)
    targets = random_targets(7, below=1025, device=device)
    ours = z_loss_gradient(logits, lambda x: k.softcapped_cross_entropy_triton(x, targets, CAP, kind))
    exact = z_loss_gradient(logits.double(), lambda x: k.softcapped_cross_entropy_plain(x, targets, CAP, kind))
    assert exact.norm() > 1e-6 and distance(ours, exact) <= (1e-5 if dtype == torch.float32 else 2e-3)


def mlp_inputs(rows, width, hidden, out, dtype=torch.float32, device="cpu"):
    rows = rows if isinstance(rows, tuple) else (rows,)
    return [
        normal(*rows, width, dtype=dtype, device=device),
        normal(hidden, width, seed=1, dtype=dtype, scale=width**-0.5, device=device),
        normal(out, hidden, seed=2, dtype=dtype, scale=hidden**-0.5, device=device),
    ]


def compare_mlp(rows, width, hidden, out, slope=0.5, dtype=torch.float32, device="cpu"):
    inputs = mlp_inputs(rows, width, hidden, out, dtype, device)
    compare(lambda *xs: k.mlp_triton(*xs, slope), lambda *xs: k.mlp_plain(*xs, slope), inputs)
    with torch.no_grad():
        without = k.mlp_triton(*inputs, slope)
    assert torch.equal(without, k.mlp_triton(*(x.requires_grad_() for x in inputs), slope))


def head_output_inputs(tokens, heads, kv_heads, width, own, gated, dtype=torch.float32, device="cpu"):
    """y, and v and gate as slices of one product's rows, as in the model."""
    y = normal(*tokens, heads, width, dtype=dtype, device=device)
    rows = normal(*tokens, 8 + kv_heads * width + heads, seed=1, dtype=dtype, scale=2.0, device=device)
    v, gate = rows[..., 8 : 8 + kv_heads * width].view(*tokens, kv_heads, width), rows[..., -heads:]
    return [y, *([v] if own else []), *([gate] if gated else [])]


def with_options(function, own, gated, *scales):
    """function(y, v or None, gate or None, *scales) as a function of the tensors that there are."""
    return lambda y, *rest: function(y, rest[0] if own else None, rest[-1] if gated else None, *scales)


def compare_head_output(*sizes, own=True, gated=True, scales=(0.5, 1.0), dtype=torch.float32, device="cpu"):
    inputs = head_output_inputs(*sizes, own, gated, dtype, device)
    compare(*(with_options(f, own, gated, *scales) for f in (k.head_output_triton, k.head_output_plain)), inputs)


def query_key_inputs(tokens, heads, kv_heads, width, half, gates, dtype=torch.float32, device="cpu"):
    """q, k, v and gate as slices of one product's rows, the gain in float32; and the rotary tables apart."""
    widths = [heads * width, kv_heads * width, kv_heads * width, *([gates] if gates else [])]
    rows = normal(*tokens, sum(widths), dtype=dtype, scale=1.5, device=device)
    gain = 1 + normal(heads, seed=1, scale=0.5, device=device)
    angles = normal(*tokens, 1, half, seed=2, scale=2.0, device=device)
    return [*rows.split(widths, dim=2), gain], [angles.cos().to(dtype), angles.sin().to(dtype)]


def query_key_whole(q, k_, v, *rest, cos, sin, twice):
    """What `query_key_triton` gives, by `query_key_plain`. rest: gate, where there is one, and gain."""
    gain = rest[-1]
    heads, kv_heads = gain.numel(), k_.size(2) * gain.numel() // q.size(2)
    q, k_, v = (x.unflatten(2, (n, -1)) for x, n in ((q, heads), (k_, kv_heads), (v, kv_heads)))
    return *k.query_key_plain(q, k_, cos.to(q.dtype), sin.to(q.dtype), gain), v, *([v] if twice else []), *rest[:-1]


def compare_query_key(*sizes, twice=True, dtype=torch.float32, device="cpu"):
    inputs, (cos, sin) = query_key_inputs(*sizes, dtype, device)

    def fast(q, k_, v, *rest):
        *gates, gain = rest
        results = k.query_key_triton(q, k_, v, gates[0] if gates else None, cos, sin, gain, twice=twice, added={})
        return tuple(x for x in results if x is not None)

    compare(fast, lambda *xs: query_key_whole(*xs, cos=cos, sin=sin, twice=twice), inputs)


def mend_bfloat16():
    """Triton's interpreter cuts float32 off to get bfloat16, and multiplies bfloat16 matrices as integers.

    Here it rounds to nearest, as GPUs do, and widens the operands of a product.
    """
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding_cast(self, x, to):
        if x.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, x, to)
        return TensorHandle(torch.tensor(x.data).to(torch.bfloat16).view(torch.uint16).numpy(), tl.bfloat16)

    def widen(x):
        if x.dtype != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    InterpreterBuilder.cast_impl = rounding_cast
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widen(a), widen(b), *rest)


# ------------------------------------------------------------------------------------------- under the interpreter


def check_cross_entropy():
    """Each row is a program of its own: few rows say as much as many."""
    mend_bfloat16()
    for kind, rows, vocabulary in itertools.product(KINDS, (1, 3, 17), (1, 7, 1023, 1025, 8192)):
        compare_cross_entropy((rows, vocabulary), kind)
    for kind, dtype in itertools.product(KINDS, (torch.bfloat16, torch.float16)):
        for shape in ((1, 1), (17, 1025), (2, 3, 8192)):
            compare_cross_entropy(shape, kind, dtype)
    for kind in KINDS:
        compare_z_loss(kind)
        compare_z_loss(kind, torch.bfloat16)
        compare_cross_entropy((3, 20000), kind)  # several blocks a row
        compare_cross_entropy((17, 1), kind, scale=0.01)  # lse is the softcap itself


def check_cross_entropy_edges():
    for cap in (5, 200.0):  # exp(200) is no float32; an integer is a cap too
        compare_cross_entropy((5, 20000), "tanh", scale=cap, cap=cap)
    rising = torch.linspace(-60, 60, 20000).repeat(2, 1)
    rising[1] = rising[1].flip(0)  # the maximum lies in the last block, and in the first
    targets = torch.tensor([3, 19999])
    for kind in KINDS:
        compare(
            lambda x, kind=kind: k.softcapped_cross_entropy_triton(x, targets, CAP, kind),
            lambda x, kind=kind: k.softcapped_cross_entropy_plain(x, targets, CAP, kind),
            [rising],
        )
    wide = normal(4, 6, 100, scale=9.0)
    for logits in (wide[..., :77], wide.transpose(0, 1), wide.mT, wide[:, ::2, ::3], wide[0, 0]):
        targets = random_targets(*logits.shape[:-1], below=logits.size(-1))
        compare(
            lambda x, targets=targets: k.softcapped_cross_entropy_triton(x, targets, CAP),
            lambda x, targets=targets: k.softcapped_cross_entropy_plain(x, targets, CAP),
            [logits],
        )
    targets, results = random_targets(8, below=100)[::2], []
    for function in (k.softcapped_cross_entropy_triton, k.softcapped_cross_entropy_plain):
        x = wide[:, 0].clone().requires_grad_()
        nll, lse = function(x, targets, CAP)
        results.append([nll, lse, *torch.autograd.grad(nll.sum() + lse.sum(), x)])  # both are given one expanded number
    assert all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(*results, strict=True))
    for shape in ((0, 5), (2, 0, 5)):
        x = torch.zeros(shape, requires_grad=True)
        nll, lse = k.softcapped_cross_entropy_triton(x, torch.zeros(shape[:-1], dtype=torch.int64), CAP)
        (nll.sum() + lse.sum()).backward()
        assert nll.shape == lse.shape == shape[:-1] and x.grad.shape == shape
    check_extreme_logits()
    x = wide[0].requires_grad_()
    nll, _ = k.softcapped_cross_entropy_triton(x, random_targets(6, below=100), CAP)
    (first,) = torch.autograd.grad(nll.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


def check_extreme_logits(device="cpu"):
    """Infinite and huge logits are capped; one that is not a number makes the row's results NaN, and no other row's."""
    for kind in KINDS:
        x = normal(5, 50, scale=9.0)
        x[0, 3], x[1, 4], x[2, 5], x[3, 6] = torch.inf, -torch.inf, 1e30, torch.nan
        x, targets = x.to(device).requires_grad_(), torch.tensor([3, 4, 1, 2, 50], device=device)
        nll, lse = k.softcapped_cross_entropy_triton(x, targets, CAP, kind)
        (nll[:3].sum() + lse.sum()).backward()
        expected = k.softcapped_cross_entropy_plain(x.detach()[:3], targets[:3], CAP, kind)
        assert torch.allclose(nll[:3], expected[0]) and torch.allclose(lse[:3], expected[1])
        assert nll[3:].isnan().all() and lse.isnan().tolist() == [False, False, False, True, False]
        assert x.grad[[0, 1, 2, 4]].isfinite().all() and x.grad[3].isnan().any()
        assert not x.grad[[0, 1, 2], [3, 4, 5]].any()


def use_descriptors():
    """Gives the MLP's kernels descriptors and the wide tiles, as on an H100, instead of pointers."""
    pointers = k.mlp_launch

    def launch(x):
        _, _, tiles = pointers(x)
        return 2, True, k.WIDE_TILES if x.element_size() == 2 else tiles

    k.mlp_launch = launch


def launches_of(function):
    """Types of the first argument of every launch of the MLP's kernels in a call."""
    kinds, kernels = [], (k.mlp_up_kernel, k.mlp_up_backward_kernel)
    with pytest.MonkeyPatch.context() as patch:
        for kernel in kernels:
            run = kernel.run
            patch.setattr(kernel, "run", lambda *a, run=run, **o: (kinds.append(type(a[0]).__name__), run(*a, **o)))
        function()
    return kinds


def check_mlp():
    mend_bfloat16()
    for size in ((1, 8, 8, 8), (3, 24, 40, 16), (130, 72, 200, 40), (129, 128, 264, 64), ((2, 3, 5), 40, 136, 24)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            compare_mlp(*size, dtype=dtype)
    for slope in (0.0, 0.01, 1.0, 2.0):
        compare_mlp(65, 20, 72, 12, slope)
    compare_mlp(577, 16, 72, 8)  # ten rows of tiles: more than a group
    compare_mlp(1100, 16, 72, 8, dtype=torch.float16)
    compare_mlp((), 16, 72, 8)  # one vector
    for size in ((3, 7, 8, 8), (3, 8, 6, 8), (3, 8, 8, 2), (1, 1, 1, 1)):  # rows of no whole 16 bytes: not by kernels
        compare_mlp(*size)
    for rows in (0, (2, 0)):
        x, up, down = (v.requires_grad_() for v in mlp_inputs(rows, 4, 8, 4))
        y = k.mlp_triton(x, up, down, 0.5)
        y.sum().backward()
        assert y.numel() == 0 and x.grad.shape == x.shape and not up.grad.any() and not down.grad.any()


def check_mlp_float8():
    """The kernel gives the bits of the version without it: the same numbers are rounded, in the same order.

    The interpreter has no e4m3. Tensors of bfloat16 hold the same numbers, and what the kernel has not rounded to e4m3
    is rounded afterwards.
    """
    mend_bfloat16()
    for rows, width, hidden in ((1, 16, 16), (130, 80, 144), (129, 128, 272), (1100, 16, 80)):
        x, up, _ = mlp_inputs(rows, width, hidden, 16, torch.bfloat16)
        x = k.rms_norm_plain(x)
        x_scale, up_scale, square_scale = k.rms_norm_scale(x), k.weight_scale(up), k.hidden_scale(up)
        x8, up8 = k.to_e4m3(x, x_scale), k.to_e4m3(up, up_scale)
        factor = (x_scale * up_scale).reciprocal()
        for scale, bound in ((square_scale, 256), (square_scale * 4096, 448)):
            rounded, square, leaky = k.mlp_up_float8_triton(
                x8.bfloat16(), up8.bfloat16(), factor, scale, 0.5, torch.bfloat16
            )
            product = (x8.double() @ up8.double().mT * factor.double()).float()
            expected = torch.where(product > 0, product, product * 0.5).bfloat16()
            assert distance(leaky, expected.double()) <= 1e-3
            assert torch.equal(square, leaky.square())
            assert torch.equal(rounded.to(torch.float8_e4m3fn).float(), k.to_e4m3(square, scale).float())
            assert rounded.max() <= bound and (bound == 256 or rounded.max() == bound)


def check_mlp_edges():
    x, up, down = mlp_inputs((40, 3), 20, 40, 12)
    for strided in ([x.transpose(0, 1), up.T.contiguous().T[::2], down[:, ::2]], [x[..., :16], up[:, :16], down]):
        compare(lambda *xs: k.mlp_triton(*xs, 0.5), lambda *xs: k.mlp_plain(*xs, 0.5), strided)
    for wanted in itertools.product((False, True), repeat=3):  # frozen weights, as in test-time training, or inputs
        if any(wanted):
            results = []
            for function in (k.mlp_triton, k.mlp_plain):
                leaves = [v.detach().clone().requires_grad_(w) for v, w in zip((x, up, down), wanted, strict=True)]
                function(*leaves, 0.5).sum().backward()  # its gradient is one number, expanded
                results.append([v.grad for v in leaves])
            for ours, theirs, w in zip(*results, wanted, strict=True):
                assert (ours is None) == (theirs is None) == (not w)
                assert not w or torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    for arguments in ((x, up[:, 1:], down, 0.5), (x, up, down[:, 1:], 0.5), (x, up, down, -0.5)):
        with pytest.raises(ValueError):
            k.mlp_triton(*arguments)
    with pytest.raises(ValueError):
        k.softcapped_cross_entropy_triton(x, torch.zeros(40, dtype=torch.int64), CAP)


def check_mlp_described():
    use_descriptors()
    check_mlp()


def check_mlp_edges_described():
    use_descriptors()
    check_mlp_edges()


def check_mlp_launches():
    """Which calls reach the kernels, with which arguments: otherwise the checks above might compare `mlp_plain`."""
    inputs = mlp_inputs(5, 8, 16, 8, torch.bfloat16)

    def trained():
        values_and_gradients(lambda *xs: k.mlp_triton(*xs, 0.5), inputs)

    assert launches_of(trained) == ["Tensor", "Tensor"]
    assert launches_of(lambda: k.mlp_triton(*mlp_inputs(5, 12, 16, 8, torch.bfloat16), 0.5)) == []
    use_descriptors()
    assert launches_of(trained) == ["TensorDescriptor", "TensorDescriptor"]


def check_adapter_step():
    """Three steps against the formula in float64, also of gradients that are parts of larger rows."""
    mend_bfloat16()
    lr, decay, beta2, eps = 0.01, 0.3, 0.9, 1e-10
    for (m, n), dtype in itertools.product(((3, 5), (16, 130), (1, 4100)), (torch.float32, torch.bfloat16)):
        p, square = normal(2, 3, m, n), torch.zeros(2, 3, m, n)
        low = p.to(dtype) if dtype == torch.bfloat16 else None
        exact, variance = p.double(), square.double()
        for step in range(1, 4):
            grad = normal(2, 3, m + 2, n, seed=step, dtype=dtype)[:, :, 1 : m + 1]
            root = torch.tensor([(1 - beta2**step) ** 0.5])
            k.adapter_step_triton(p, square, grad, low, lr, decay, beta2, root, eps)
            variance = beta2 * variance + (1 - beta2) * grad.double() ** 2
            exact = exact * (1 - lr * decay) - lr * grad.double() / (variance.sqrt() / root.double() + eps)
        torch.testing.assert_close(p.double(), exact, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(square.double(), variance, rtol=1e-5, atol=1e-9)
        assert low is None or torch.equal(low, p.to(dtype))


def check_adapters():
    """The kernel's steps are those of torch's AdamW, whatever the number of documents."""
    mend_bfloat16()
    knobs = dict(TTT_BATCH_SIZE=4, TTT_LORA_RANK=3, TTT_WEIGHT_DECAY=0.4, TTT_LORAPLUS_LR_RATIO=3)
    c = config(TTT_MODE="phased", COMPUTE_DTYPE="bfloat16", **knobs)
    both = [k.Adapters(c, 2, torch.device("cpu")) for _ in range(2)]
    both[1].fused = True
    for adapters in both:
        adapters.start(adapters.draw(4, 1))
    for step, documents in enumerate((4, 3, 2)):
        for adapters in both:
            shapes = [x.shape for x in adapters.leaves(documents)]
            gradients = [normal(*shape, seed=10 * step + i, dtype=torch.bfloat16) for i, shape in enumerate(shapes)]
            adapters.step(documents, gradients)
    plain, fused = ([*a.parameters(), *a.squares, *a.copies] for a in both)
    for x, y in zip(plain, fused, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-2 if x.dtype == torch.bfloat16 else 1e-5, atol=1e-6)
    assert not torch.equal(both[0].copies[0], both[0].copies[0].roll(1, 0)) and both[0].copies[1].any()


def check_head_output():
    mend_bfloat16()
    sizes = (((1, 1), 1, 1, 1), ((1, 1), 8, 4, 64), ((2, 37), 4, 4, 16), ((3, 5), 6, 2, 2), ((1, 9), 3, 1, 256))
    for size, (own, gated) in itertools.product(sizes, ((True, True), (True, False), (False, True))):
        for dtype in (torch.float32, torch.bfloat16):
            compare_head_output(*size, own=own, gated=gated, dtype=dtype)
    for scales in ((1.0, 2.0), (1, 1), (3.0, 1.0)):
        compare_head_output((1, 40), 8, 4, 32, scales=scales, dtype=torch.float16)
    y, v, gate = (x.requires_grad_() for x in head_output_inputs((2, 0), 4, 2, 8, True, True))
    leaves = [x.detach().requires_grad_() for x in (y, v, gate)]
    out = k.head_output_triton(*leaves)
    out.sum().backward()
    assert out.shape == (2, 0, 32) and all(x.grad.shape == x.shape for x in leaves)


def check_head_output_edges():
    y, v, gate = head_output_inputs((3, 6), 4, 2, 8, True, True)
    for change in (lambda x: x.transpose(0, 1), lambda x: x.mT.contiguous().mT, lambda x: x[:, ::2]):
        strided = [change(x) for x in (y, v, gate)]
        compare(k.head_output_triton, k.head_output_plain, strided)
    v = v.clone()
    v[0, 0, 0], v[0, 1, 0], v[0, 2, 0] = 0.0, 1e-14, 1e-30  # shorter than the least norm of F.normalize
    compare(
        lambda *xs: k.head_output_triton(y, *xs), lambda *xs: k.head_output_plain(y.to(xs[0].dtype), *xs), [v, gate]
    )
    huge = torch.full_like(gate, -200.0)  # whose exponential is infinite
    assert not k.head_output_triton(y, v, huge).any() and k.head_output_triton(y, v, -huge).any()
    assert torch.equal(k.head_output_triton(y, None, None), y.flatten(2))
    for arguments in ((y, v[:1], gate), (y, v[..., :4], gate), (y[:, :, :3], v, None), (y, None, gate[..., :2])):
        with pytest.raises(ValueError):
            k.head_output_triton(*arguments)


def check_query_key():
    mend_bfloat16()
    sizes = (((1, 1), 1, 1, 2, 1, 0), ((1, 1), 8, 4, 64, 8, 8), ((2, 37), 4, 4, 16, 8, 4), ((3, 5), 6, 2, 32, 4, 0))
    for size, dtype in itertools.product(sizes, (torch.float32, torch.bfloat16)):
        compare_query_key(*size, dtype=dtype)
    compare_query_key((1, 9), 3, 1, 256, 128, 3, twice=False)
    compare_query_key((1, 9), 2, 1, 64, 16, 3, twice=False, dtype=torch.float16)
    (q, k_, v, gate, gain), tables = query_key_inputs((2, 0), 4, 2, 8, 2, 4)
    leaves = [x.detach().requires_grad_() for x in (q, k_, v, gate, gain)]
    outputs = k.query_key_triton(*leaves[:4], *tables, leaves[4], twice=True, added={})
    sum(x.sum() for x in outputs).backward()
    assert outputs[0].shape == (2, 0, 4, 8) and all(x.grad.shape == x.shape for x in leaves)
    assert not leaves[4].grad.any()


def check_query_key_edges():
    (q, k_, v, gate, gain), (cos, sin) = query_key_inputs((3, 6), 4, 2, 8, 2, 4)
    for change in (lambda x: x.transpose(0, 1), lambda x: x.mT.contiguous().mT, lambda x: x[:, ::2], lambda x: x[:1]):
        inputs, tables = [*(change(x) for x in (q, k_, v, gate)), gain], (cos[:, :, 0], sin[:, :, 0])
        tables = [change(x).unsqueeze(2) for x in tables]
        compare(
            lambda *xs, tables=tables: k.query_key_triton(*xs[:4], *tables, xs[4], twice=True, added={}),
            lambda *xs, tables=tables: query_key_whole(*xs, cos=tables[0], sin=tables[1], twice=True),
            inputs,
        )
    # One buffer holds all gradients, so that torch.compile sees their concatenation in it.
    leaves = [x.detach().requires_grad_() for x in (q, k_, v, gate, gain)]
    outputs = k.query_key_triton(*leaves[:4], cos, sin, leaves[4], twice=False, added={})
    assert outputs[3] is None and torch.equal(outputs[2].flatten(2), v) and torch.equal(outputs[4], gate)
    parts = torch.autograd.grad(outputs[0].sum() + outputs[2].sum(), leaves[:4])
    assert len({part.untyped_storage().data_ptr() for part in parts}) == 1
    assert not parts[1].any() and (parts[2] == 1).all() and not parts[3].any()
    for arguments in ((q[..., :-1], k_, v), (q, k_[..., :-1], v), (q, k_, v[..., :8])):
        with pytest.raises(ValueError):
            k.query_key_triton(*arguments, gate, cos, sin, gain, twice=True, added={})
    with pytest.raises(ValueError):
        tables = [torch.zeros(3, 6, 1, 8)] * 2
        k.query_key_triton(q, k_, v, gate, *tables, gain, twice=True, added={})


def check_query_key_sums():
    """What is added to q, k and v, as by adapters and value embeddings, has the gradient of what it is added to."""
    mend_bfloat16()
    (q, k_, v, gate, gain), tables = query_key_inputs((2, 19), 4, 2, 16, 4, 4, torch.bfloat16)
    more = {
        key: normal(*x.shape, seed=i, dtype=x.dtype) for i, (key, x) in enumerate(zip("qkv", (q, k_, v), strict=True))
    }
    for keys in ("q", "kv", "qkv"):
        added = {key: more[key].requires_grad_() for key in keys}
        leaves = {key: x.detach().requires_grad_() for key, x in zip("qkvg", (q, k_, v, gate), strict=True)}
        outputs = k.query_key_triton(*leaves.values(), *tables, gain, twice=True, added=added)
        sums = [leaves[key] + added[key] if key in added else leaves[key] for key in "qkv"]
        expected = k.query_key_triton(*sums, leaves["g"], *tables, gain, twice=True, added={})
        assert all(torch.equal(x, y) for x, y in zip(outputs, expected, strict=True))
        weights = [normal(*x.shape, seed=9 + i, dtype=x.dtype) for i, x in enumerate(outputs)]
        ours, theirs = (
            torch.autograd.grad(list(results), [*leaves.values(), *added.values()], weights)
            for results in (outputs, expected)
        )
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
        assert all(x.is_contiguous() for x in ours[4:])


INTERPRETED = ("adapter_step", "adapters", "cross_entropy", "cross_entropy_edges", "mlp", "mlp_edges")
INTERPRETED += ("mlp_described", "mlp_edges_described", "mlp_launches", "mlp_float8")
INTERPRETED += ("head_output", "head_output_edges", "query_key", "query_key_edges", "query_key_sums")


@needs_triton
@pytest.mark.parametrize("name", INTERPRETED)
def test_under_the_interpreter(name):
    run_check(name, interpreted=True)


# ------------------------------------------------------------------------------- compiled, without a GPU to run it


# By compute capability: what torch says of such a GPU, and KiB of shared memory that a program may have. An A100 has
# more, but sm_86 and sm_89 run the same kernels.
GPUS = {
    80: (dict(major=8, minor=0, multi_processor_count=108), 99),
    89: (dict(major=8, minor=9, multi_processor_count=142), 99),
    90: (dict(major=9, minor=0, multi_processor_count=132), 227),
    100: (dict(major=10, minor=0, multi_processor_count=148), 227),
    120: (dict(major=12, minor=0, multi_processor_count=170), 99),
}


def launch_on(capability, dtype):
    """`mlp_launch` for a tensor of this type on such a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**GPUS[capability][0]))
        return k.mlp_launch(SimpleNamespace(device=torch.device("cuda"), element_size=lambda: dtype.itemsize))


def mlp_kernels_to_compile():
    """As `kernels_to_compile`: every type on an H100 and before, and the record's on other GPUs."""
    types = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    cases = [(capability, torch.bfloat16, 2048, 512) for capability in GPUS]
    cases += [(90, torch.bfloat16, 136, 72), (90, torch.float16, 2048, 512), (90, torch.float32, 136, 72)]
    cases += [(80, torch.bfloat16, 136, 72), (80, torch.float32, 2048, 512)]
    for capability, dtype, hidden, width in cases:
        _, described, tiles = launch_on(capability, dtype)
        constants = dict(tiles, N=hidden, K=width, SLOPE=0.5)
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        rows, columns, inner = (tiles["BLOCK_" + axis] for axis in "MNK")
        for kernel, optional in ((k.mlp_up_kernel, ["leaky"]), (k.mlp_up_backward_kernel, [])):
            names = kernel.arg_names[: kernel.arg_names.index("M")]
            blocks = dict.fromkeys(names, [rows, columns // 2])
            blocks |= dict(x=[rows, inner], grad=[rows, inner], up=[columns, inner], down=[inner, columns])
            kind = types[dtype]
            signature = {name: f"tensordesc<{kind}{blocks[name]}>" if described else f"*{kind}" for name in names}
            yield capability, kernel, {**signature, "M": "i32"}, constants, options
            if capability in (80, 90):  # with descriptors and without
                yield capability, kernel, {**signature, "M": "i64"}, {**constants, **dict.fromkeys(optional)}, options


def attention_kernels_to_compile():
    """As `kernels_to_compile`: the kernels around attention."""
    sizes = ((8, 4, 64, 8, 8), (8, 8, 64, 32, 0), (6, 2, 128, 64, 3), (1, 1, 16, 1, 1))
    cases = [("*bf16", size) for size in sizes] + [("*fp32", size) for size in sizes[1:3]]
    cases += [("*fp16", sizes[0])]  # which takes the room of bf16
    for pointer, (heads, kv_heads, width, half, gates) in cases:
        row, options = (heads + 2 * kv_heads) * width + gates, k.head_tiles(width)
        shared = dict(BLOCK=options.pop("BLOCK"), WIDTH=width, KV_HEADS=kv_heads)
        constants = dict(shared, Q_ROW=row, K_ROW=row, HEADS=heads, HALF=half)
        types = dict.fromkeys(k.query_key_backward_kernel.arg_names, pointer) | dict(tokens="i32", gain="*fp32")
        yield 90, k.query_key_forward_kernel, types | dict(q_out=pointer, k_out=pointer), constants, options
        constants |= dict(GATES=gates) if gates else dict(GATES=0, grad_gate=None, grad_own=None)
        yield 90, k.query_key_backward_kernel, types | dict(grad_gain="*fp32"), constants, options
        constants |= dict.fromkeys(("added_q", "added_k", "added_v"))
        yield 90, k.query_key_backward_kernel, types | dict(grad_gain="*fp32"), constants, options
        constants = dict(shared, V_ROW=row, GATE_ROW=row, GROUP=heads // kv_heads, SCALE=0.5, FACTOR=1.0)
        constants |= {} if gates else dict(gate=None, GATE_ROW=0)
        types = dict.fromkeys(k.head_output_backward_kernel.arg_names, pointer) | dict(rows="i32")
        yield 90, k.head_output_forward_kernel, types | dict(out=pointer), constants, options
        yield 90, k.head_output_backward_kernel, types, constants | ({} if gates else dict(grad_gate=None)), options
        constants |= dict(v=None, V_ROW=0, gate=None, GATE_ROW=0)
        yield 90, k.head_output_forward_kernel, types | dict(out=pointer), constants, options


def float8_kernels_to_compile():
    """As `kernels_to_compile`, for GPUs with FP8."""
    for capability, hidden, width in ((90, 144, 80), *((capability, 2048, 512) for capability in (89, 90, 100, 120))):
        _, described, tiles = launch_on(capability, torch.float8_e4m3fn)
        constants = dict(tiles, N=hidden, K=width, SLOPE=0.5, END=k.E4M3_MAX)
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
        rows, columns, inner = (tiles["BLOCK_" + axis] for axis in "MNK")
        blocks = dict.fromkeys(("rounded", "square", "leaky"), [rows, columns // 2])
        blocks |= dict(x=[rows, inner], up=[columns, inner])
        kinds = dict.fromkeys(("x", "up", "rounded"), "fp8e4nv") | dict.fromkeys(("square", "leaky"), "bf16")
        signature = {
            name: f"tensordesc<{kind}{blocks[name]}>" if described else f"*{kind}" for name, kind in kinds.items()
        }
        signature |= dict(M="i32", up_factor="*fp32", square_scale="*fp32")
        yield capability, k.mlp_up_float8_kernel, signature, constants, options


def kernels_to_compile():
    """(capability, kernel, types of arguments, constants, options) of every kernel: the record's sizes and odd ones."""
    sizes = [("tanh", "bf16", 8192), ("tanh", "fp32", 1025), ("poly", "bf16", 1025), ("poly", "fp32", 8192)]
    for kind, dtype, vocabulary in [*sizes, ("tanh", "fp16", 20000), ("poly", "bf16", 1)]:
        tiles = k.cross_entropy_tiles(vocabulary)
        options, logits = dict(num_warps=tiles.pop("num_warps")), f"*{dtype}"
        constants = dict(tiles, V=vocabulary, CAP=CAP, KIND=kind)
        rows = dict(logits=logits, targets="*i64", lse="*fp32", row_stride="i64" if vocabulary == 1 else "i32")
        yield 90, k.cross_entropy_forward_kernel, dict(rows, nll="*fp32"), constants, options
        gradients = dict(grad_nll="*fp32", grad_lse="*fp32", grad=logits)
        yield 90, k.cross_entropy_backward_kernel, rows | gradients, constants, options
    for grad, low in (("bf16", "bf16"), ("fp32", None)):
        types = dict(p="*fp32", square="*fp32", grad=f"*{grad}", row_step="i64")
        types |= {} if low is None else dict(low=f"*{low}")
        types |= dict.fromkeys(("lr", "decay", "beta2", "eps"), "fp32") | dict(root="*fp32")
        constants = dict(ROW=512 * 96, BLOCK=2048) | (dict(low=None) if low is None else {})
        yield 90, k.adapter_step_kernel, types, constants, dict(num_warps=8)
    yield from mlp_kernels_to_compile()
    yield from attention_kernels_to_compile()
    yield from float8_kernels_to_compile()


def registers_and_stack(cubin):
    """Registers of a thread, and its bytes of local memory: 8 where ptxas reserves some, more where it spills."""
    import triton

    tool = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return int(found[1]), int(found[2])


def check_cubins():
    """Every kernel becomes a cubin, without spills, which finds room in the shared memory of its GPU."""
    assert compiled(kernels_to_compile()) == {name for name in vars(k) if name.endswith("_kernel")}


def check_two_cubins():
    """The first kernel of the list and the first MLP."""
    first = {case[1].__name__: case for case in reversed([*kernels_to_compile()])}
    names = ("cross_entropy_forward_kernel", "mlp_up_kernel")
    assert compiled(first[name] for name in names) == {*names}


def compiled(kernels):
    """Makes a cubin of each of some kernels, checks it, and returns their names."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = set()
    for capability, kernel, types, constants, options in kernels:
        types = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if types[name].startswith("*")}
        binary = triton.compile(
            ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned),
            target=GPUTarget("cuda", capability, 32),
            options=options,
        )
        names.add(kernel.__name__)
        ptx, cubin, shared = binary.asm["ptx"], binary.asm["cubin"], binary.metadata.shared
        registers, stack = registers_and_stack(cubin)
        print(capability, kernel.__name__, *types.values(), *constants.values(), options, shared, registers, stack)
        assert stack <= 8 and shared <= GPUS[capability][1] * 1024
        assert binary.metadata.global_scratch_size == 0  # nobody sets an allocator
        mlp, sixteen_bit = kernel.__name__.startswith("mlp"), "fp32" not in types[kernel.arg_names[0]]
        assert ("wgmma" in ptx) == (mlp and capability == 90 and sixteen_bit)
        assert ("cp.async.bulk.tensor" in ptx) == (mlp and capability >= 90)
        assert ("cp.async.cg.shared.global" in ptx) == (mlp and capability < 90)  # 16 bytes at a time
    return names


def check_mlp_launch():
    """Descriptors from sm_90 on, wide tiles where there is shared memory for them, one program a multiprocessor."""
    for dtype in (torch.bfloat16, torch.float16):
        assert launch_on(90, dtype) == (132, True, k.WIDE_TILES) and launch_on(100, dtype) == (148, True, k.WIDE_TILES)
        assert launch_on(120, dtype) == (340, True, k.SIXTEEN_BIT_TILES)
        assert launch_on(80, dtype) == (216, False, k.SIXTEEN_BIT_TILES)
    assert launch_on(90, torch.float32) == (264, True, k.FLOAT32_TILES)
    assert launch_on(80, torch.float32) == (216, False, k.FLOAT32_TILES)


def compile_and_record(function, inputs, dynamic=(), described=False):
    """The graphs, forward and backward, that torch.compile makes of a loss. Whatever does not fit in one is an error.

    Nothing runs: the graphs are recorded and give zeros. Triton is told of an H100, which only names the target.
    dynamic: tensors whose first size is. described: with tensor descriptors.
    """
    import torch.utils._triton
    import triton
    from triton.backends.compiler import GPUTarget

    torch.utils._triton.has_triton = lambda: True
    torch.utils._triton._device_supports_tma = lambda: described
    triton.runtime.driver.set_active(type("H100", (), {"get_current_target": lambda self: GPUTarget("cuda", 90, 32)})())
    from functorch.compile import (
        make_boxed_func,  # pyright: ignore[reportPrivateImportUsage] # as torch's own pages import it
        min_cut_rematerialization_partition,
    )
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def known(size):
        return size.node.hint if isinstance(size, torch.SymInt) else size

    def zeros_like_it(y):
        return torch.zeros([*map(known, y.shape)], dtype=y.dtype) if isinstance(y, torch.Tensor) else known(y)

    def record(module, inputs):
        results = next(node for node in module.graph.nodes if node.op == "output").args[0]
        graphs.append(module.graph)
        values = [y if y is None else y.meta["val"] for y in results]
        return make_boxed_func(lambda *_: [zeros_like_it(y) for y in values])

    backend = aot_autograd(fw_compiler=record, bw_compiler=record, partition_fn=min_cut_rematerialization_partition)
    inputs = [x.requires_grad_(x.is_floating_point()) for x in inputs]
    for x in dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    torch.compile(function, backend=backend, fullgraph=True)(*inputs).backward()
    assert all(x.grad.shape == x.shape for x in inputs if x.requires_grad)
    return graphs


def kernel_calls(graph):
    """The arguments of each Triton kernel's call."""
    return [node.kwargs for node in graph.nodes if "triton_kernel" in str(node.target)]


def written_by_kernels(graphs):
    """Names of the arguments that each Triton kernel of each graph writes. No two of them may share a buffer."""
    graphs = [kernel_calls(graph) for graph in graphs]
    for call in itertools.chain(*graphs):  # a shared buffer would be copied
        buffers = [call["kwargs"][name] for name in call["tensors_to_clone"]]
        assert len(set(buffers)) == len(buffers)
    return [[sorted(call["tensors_to_clone"]) for call in calls] for calls in graphs]


def check_one_graph(described=False):
    """torch.compile takes MLP and loss, with gradients, into one graph, and sees which buffers each kernel writes."""

    def loss(x, up, down, head, targets):
        nll, lse = k.softcapped_cross_entropy_triton(k.mlp_triton(x, up, down, 0.5) @ head.mT, targets, CAP)
        return nll.mean() + 1e-4 * lse.square().mean()

    inputs = [*mlp_inputs((4, 32), 64, 256, 64, torch.bfloat16), normal(1000, 64, dtype=torch.bfloat16)]
    inputs.append(random_targets(4, 32, below=1000))
    graphs = compile_and_record(loss, inputs, dynamic=(inputs[0], inputs[-1]), described=described)
    written = written_by_kernels(graphs)
    assert written == [[["leaky", "square"], ["lse", "nll"]], [["grad"], ["grad_up"]]], written
    descriptors = [[len(call["tma_descriptor_metadata"]) for call in kernel_calls(graph)] for graph in graphs]
    assert descriptors == ([[4, 0], [0, 4]] if described else [[0, 0], [0, 0]])


def check_one_graph_described():
    use_descriptors()
    check_one_graph(described=True)


def check_one_graph_of_attention():
    """The same of what surrounds attention; and the gradient of the product is the kernel's buffer, not put together.

    Inductor drops a concatenation whose parts are all those of one split, in its order.
    """
    cos, sin = (normal(2, 24, 1, 2, seed=seed, dtype=torch.bfloat16) for seed in (1, 2))
    for own, gates in ((True, [4]), (False, [4]), (True, [])):

        def loss(rows, weight, gain, own=own, gates=gates):
            q, k_, v, *gate = (rows @ weight).split([32, 16, 16, *gates], dim=2)
            added = dict(q=rows[..., :32].tanh(), v=rows[..., :16].exp())  # as adapters and value embeddings do
            gate = gate[0] if gate else None
            q, k_, v, own_v, gate = k.query_key_triton(q, k_, v, gate, cos, sin, gain, twice=own, added=added)
            y = torch.tanh(q) + (k_ * v).repeat_interleave(2, 2)
            return k.head_output_triton(y, own_v, gate).square().mean()

        inputs = [normal(*shape, dtype=torch.bfloat16) for shape in ((2, 24, 40), (40, 64 + sum(gates)))]
        graphs = compile_and_record(loss, [*inputs, normal(4)])
        of_output = ["grad_gate"] * len(gates) + ["grad_v"] * own + ["grad_y"]
        expected = [[["k_out", "q_out"], ["out"]], [of_output, ["added_q", "added_v", "grad", "grad_gain"]]]
        assert written_by_kernels(graphs) == expected, written_by_kernels(graphs)
        (joined,) = (n for n in graphs[1].nodes if n.target is torch.ops.aten.cat.default)
        (split,) = {part.args[0] for part in joined.args[0]}
        assert split.target is torch.ops.aten.split_with_sizes.default and sum(split.args[1]) == 64 + sum(gates)
        assert all(len(part.users) == 1 for part in joined.args[0])
        assert [part.args[1] for part in joined.args[0]] == list(range(3 + len(gates)))
        assert "triton_kernel" in str(split.args[0].args[0].target)


@needs_triton
@pytest.mark.parametrize("name", ["one_graph", "cubins", "one_graph_described", "mlp_launch", "one_graph_of_attention"])
def test_compiled(name, tmp_path):
    run_check(name, interpreted=False, TRITON_CACHE_DIR=str(tmp_path))


def check_without_triton():
    assert k.triton is None and not k.triton_supports(torch.zeros(2))
    assert k.mlp_plain(*mlp_inputs(3, 4, 8, 2), 0.5).shape == (3, 2)
    nll, lse = k.softcapped_cross_entropy_plain(normal(3, 5), torch.tensor([0, 1, 2]), CAP, "poly")
    assert nll.shape == lse.shape == (3,)


def test_without_triton():
    """None in sys.modules makes an import fail as that of a missing module does."""
    run = "import runpy, sys; sys.modules['triton'] = None; sys.argv = sys.argv[1:]; sys.path.insert(0, '{}'); "
    run += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", run.format(os.path.dirname(__file__)), __file__, "without_triton"]
    done = run_command(command, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout


# ------------------------------------------------------------------------------------------------- the plain softcap


def test_plain_softcaps():
    x = torch.linspace(-100, 100, 4001, dtype=torch.float64)
    u = (x / CAP).clamp(-2, 2)
    assert torch.allclose(k.softcap_plain(x, CAP), CAP * torch.tanh(x / CAP))
    assert torch.allclose(k.softcap_plain(x, CAP, "poly"), CAP * (u * (1 - u**2 / 3 + u**4 / 15)).clamp(-1, 1))
    assert k.softcap_plain(x.to(torch.bfloat16), CAP).dtype == torch.float32
    with pytest.raises(ValueError, match="sigmoid"):
        k.softcap_plain(x, CAP, "sigmoid")


# ------------------------------------------------------------------------------------------------------- a real GPU


class TestGPU:
    """What the interpreter cannot see: the compiled kernels' own answers."""

    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("kind", KINDS)
    def test_cross_entropy(self, kind, dtype):
        for shape in ((1, 1), (3, 7), (130, 1023), (3, 1025), (4, 130, 8192), (5, 20000)):
            compare_cross_entropy(shape, kind, dtype, device="cuda")
        compare_z_loss(kind, dtype, device="cuda")
        check_extreme_logits("cuda")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_mlp(self, dtype):
        for size in ((1, 8, 8, 8), (130, 72, 200, 40), ((2, 300), 512, 2048, 512), (3000, 96, 384, 96), (3, 7, 5, 2)):
            compare_mlp(*size, dtype=dtype, device="cuda")
        compare_mlp(65, 24, 72, 16, 0.0, dtype, "cuda")
        compare_mlp(40000, 128, 512, 128, dtype=dtype, device="cuda")  # several tiles a program

    def test_mlp_float8(self):
        """Tensor cores sum in fewer bits than the simulation, and round a few hidden activations otherwise."""
        if torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("needs FP8 tensor cores")
        for rows, width, hidden, out in ((1, 16, 16, 16), (130, 80, 144, 48), ((2, 300), 512, 2048, 512)):
            inputs = mlp_inputs(rows, width, hidden, out, torch.bfloat16, "cuda")
            inputs[0] = k.rms_norm_plain(inputs[0])
            versions = [
                lambda *xs: k.mlp_float8(*xs, 0.5, False),
                lambda *xs: k.mlp_float8(*xs, 0.5, True),
                lambda *xs: k.mlp_float8_triton(*xs, 0.5),
            ]
            simulated, *others = (values_and_gradients(version, inputs) for version in versions)
            for other in others:
                for x, y in zip(other, simulated, strict=True):
                    assert distance(x, y.double()) <= 0.02

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_around_attention(self, dtype):
        for tokens, heads, kv_heads, width, half in (
            ((3, 700), 8, 4, 64, 8),
            ((1, 77), 6, 2, 128, 64),
            ((1, 1), 1, 1, 2, 1),
        ):
            for own, gated in ((True, True), (True, False), (False, True)):
                compare_head_output(tokens, heads, kv_heads, width, own=own, gated=gated, dtype=dtype, device="cuda")
            for gates in (0, heads):
                compare_query_key(tokens, heads, kv_heads, width, half, gates, dtype=dtype, device="cuda")

    def test_more_than_2_to_the_31_logits(self):
        if torch.cuda.mem_get_info()[0] < 16e9:
            pytest.skip("needs 16 GB of free GPU memory")
        rows = 2**31 // 8192 + 3
        logits = torch.zeros(rows, 8192, dtype=torch.bfloat16, device="cuda")
        logits[-3:] = normal(3, 8192, dtype=torch.bfloat16, scale=12.0, device="cuda")
        targets = random_targets(rows, below=8192, device="cuda")
        ours = values_and_gradients(lambda x: k.softcapped_cross_entropy_triton(x, targets, CAP)[0][-3:], [logits])
        exact = values_and_gradients(
            lambda x: k.softcapped_cross_entropy_plain(x, targets[-3:], CAP)[0], [logits[-3:]], torch.float64
        )
        assert distance(ours[0], exact[0]) <= 1e-5 and distance(ours[1][-3:], exact[1]) <= 3e-3

    def test_fullgraph(self):
        """Compiled by Inductor: the same values and gradients, for other numbers of rows and without gradients too."""

        def loss(x, up, down, head, targets):
            nll, lse = k.softcapped_cross_entropy_triton(k.mlp_triton(x, up, down, 0.5) @ head.mT, targets, CAP)
            return nll.mean() + 1e-4 * lse.square().mean()

        compiled = torch.compile(loss, fullgraph=True)
        for rows in ((4, 96), (3, 50), (2, 7)):
            inputs = mlp_inputs(rows, 64, 256, 64, torch.bfloat16, "cuda")
            inputs.append(normal(1000, 64, seed=3, dtype=torch.bfloat16, device="cuda"))
            targets = random_targets(*rows, below=1000, device="cuda")
            for x, y in zip(
                values_and_gradients(lambda *xs, targets=targets: compiled(*xs, targets), inputs),
                values_and_gradients(lambda *xs, targets=targets: loss(*xs, targets), inputs),
                strict=True,
            ):
                assert distance(x, y.double()) <= 1e-2
            with torch.no_grad():
                assert torch.allclose(compiled(*inputs, targets), loss(*inputs, targets), rtol=1e-4)


if __name__ == "__main__":
    globals()[f"check_{sys.argv[1]}"]()

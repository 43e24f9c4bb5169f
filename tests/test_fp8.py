"""FP8 products: rounding to e4m3, scales, gradients, where they are used and where never."""

import dataclasses
import math

import numpy as np
import pytest
import torch

import train_gpt as tg
from helpers import RECORD_LIKE, TINY, build_model, config, random_batch, single_run

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
VALUES = np.unique(E4M3[E4M3.isfinite()].numpy())  # 253 values: two zeros are one, and two codes are NaN


def nearest_e4m3(x: np.ndarray) -> np.ndarray:
    """The nearest e4m3 values, the end of the range beyond it; of two as near, the one with an even last bit."""
    above = np.searchsorted(VALUES, x).clip(1, len(VALUES) - 1)
    low, high = VALUES[above - 1], VALUES[above]
    zero = np.searchsorted(VALUES, 0.0)  # magnitudes count from here, and their last bits with them
    even = np.where((above - 1 - zero) % 2 == 0, low, high)
    nearer = np.where(x - low < high - x, low, high)
    return np.where(x - low == high - x, even, nearer)


def normal(*shape, seed=0, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def fp8_config(base=TINY, **knobs):
    return config(base, **{"FP8_HEAD": 1, "FP8_MLP": 1, **knobs})


# ------------------------------------------------------------------------------------------------ rounding and scales


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_rounding_is_to_the_nearest_e4m3_and_saturates(dtype):
    between = np.concatenate([VALUES, (VALUES[1:] + VALUES[:-1]) / 2, normal(4000, scale=60).numpy(), [448.1, -1e30]])
    x = torch.tensor(between).to(dtype)
    for power in (1.0, 8.0, 2.0**-40):
        found = tg.to_e4m3(x / power, torch.tensor(power))
        assert found.dtype == torch.float8_e4m3fn
        assert np.array_equal(found.double().numpy(), nearest_e4m3(x.double().numpy()))
    special = tg.to_e4m3(torch.tensor([torch.inf, -torch.inf, 465.0, 1e30, torch.nan], dtype=dtype), torch.tensor(1.0))
    assert special[:4].float().tolist() == [448, -448, 448, 448] and special[4:].isnan().all()


def test_a_scale_is_the_power_of_two_that_brings_a_bound_below_the_end():
    for bound in (1e-30, 0.005, 1.0, 1.9999, 2.0, 22.6, 448.0, 1e30):
        scale = tg.e4m3_scale(torch.tensor(bound)).item()
        assert math.frexp(scale)[0] == 0.5 and 128 <= bound * scale < 256, bound
    for bound in (0.0, 1e-45, torch.inf, torch.nan):  # nothing to scale; or nothing that would help
        scale = tg.e4m3_scale(torch.tensor(bound))
        assert scale.isfinite() and scale > 0 and scale.reciprocal() >= torch.finfo(torch.float32).tiny
    weight = normal(6, 32)
    assert tg.weight_scale(weight).shape == () and tg.weight_scale(weight) == tg.e4m3_scale(weight.abs().max())
    assert tg.weight_scale(weight.bfloat16() * 4) * 4 == tg.weight_scale(weight.bfloat16())


def test_the_bounds_hold_where_they_are_reached():
    """One channel alone gives an RMS norm its largest element; an input along a row gives the largest activation."""
    width = 64
    single = tg.rms_norm_plain(torch.eye(width)[:1] * 5)
    assert 127 <= single.max() * tg.rms_norm_scale(single) < 256
    up = normal(10, width)
    rows = up.norm(dim=1)
    along = tg.rms_norm_plain(up[rows.argmax()][None])
    square = tg.leaky_relu_squared_plain(along @ up.mT, 0.5)
    assert 127 <= square.max() * tg.hidden_scale(up) < 256
    assert torch.isclose(square.max(), width * rows.max().square(), rtol=1e-4)


# ------------------------------------------------------------------------------------------------ products, gradients


def product_inputs(dtype):
    x = tg.rms_norm_plain(normal(40, 3, 64)).to(dtype)
    return [x, normal(48, 64, seed=1, dtype=dtype, scale=0.1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_product_is_that_of_the_rounded_inputs_and_its_gradient_that_of_the_inputs_as_they_are(dtype):
    x, w = product_inputs(dtype)
    grad, x_scale = normal(40, 3, 48, seed=2, dtype=dtype), tg.rms_norm_scale(x)
    results = []
    for product in (lambda a, b: tg.float8_linear(a, b, x_scale, False), tg.linear):
        leaves = [v.clone().requires_grad_() for v in (x, w)]
        y = product(*leaves)
        results.append((y, *torch.autograd.grad(y, leaves, grad)))
    (ours, *gradients), (plain, *plain_gradients) = results
    scales = [s.double().item() for s in (x_scale, tg.weight_scale(w))]
    x8, w8 = (torch.tensor(nearest_e4m3((v.double() * s).numpy())) / s for v, s in zip((x, w), scales, strict=True))
    exact = x8 @ w8.mT
    assert ours.dtype == dtype and ours.shape == plain.shape
    assert torch.allclose(ours.double(), exact, rtol=0, atol=2 * torch.finfo(dtype).eps * exact.abs().max().item())
    assert (ours - plain).abs().max() > 1e-3
    for found, expected in zip(gradients, plain_gradients, strict=True):
        assert torch.equal(found, expected)


def test_only_wanted_gradients_are_computed():
    for wanted in ((True, False), (False, True)):
        x, w = (v.requires_grad_(want) for v, want in zip(product_inputs(torch.float32), wanted, strict=True))
        tg.float8_linear(x, w, tg.rms_norm_scale(x), False).sum().backward()
        assert (x.grad is not None, w.grad is not None) == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_torchs_own_fp8_product_gives_what_the_simulation_gives(dtype):
    x, w = product_inputs(dtype)
    try:
        native = tg.float8_linear(x, w, tg.rms_norm_scale(x), True)
    except (NotImplementedError, RuntimeError):
        pytest.skip("this torch has no FP8 product on CPUs")
    simulated = tg.float8_linear(x, w, tg.rms_norm_scale(x), False)
    assert torch.allclose(native, simulated, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_the_mlp_rounds_four_tensors_and_passes_gradients_straight_through():
    x, up, down = tg.rms_norm_plain(normal(50, 32)), normal(64, 32, seed=1), normal(32, 64, seed=2)
    x, up, down = (v.double().requires_grad_() for v in (x, up, down))
    y, grad = tg.mlp_float8(x, up, down, 0.5, False), normal(50, 32, seed=3, dtype=torch.float64)
    found = torch.autograd.grad(y, [x, up, down], grad)

    def rounded(v, scale):
        return torch.tensor(nearest_e4m3((v * scale).detach().numpy())) / scale.double()

    hidden = rounded(x, tg.rms_norm_scale(x)) @ rounded(up, tg.weight_scale(up)).mT
    leaky = torch.where(hidden > 0, hidden, 0.5 * hidden)
    square = rounded(leaky.square(), tg.hidden_scale(up))
    assert torch.allclose(y, square @ rounded(down, tg.weight_scale(down)).mT)
    to_hidden = grad @ down * 2 * leaky * torch.where(hidden > 0, 1.0, 0.5)
    expected = (to_hidden @ up, to_hidden.mT @ x, grad.mT @ leaky.square())
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


# ------------------------------------------------------------------------------------------------ where it is used


@pytest.mark.parametrize("base", [TINY, RECORD_LIKE], ids=["tiny", "record"])
def test_the_forward_uses_it_where_it_is_told_and_nowhere_else(base):
    c = config(base, VOCAB_SIZE=48)
    model, batch = build_model(c, seed=4), random_batch(c, 2, 24)
    call = dict(looped=c.loops)
    with torch.no_grad():
        plain = model(*batch, **call)[0]
        assert torch.equal(plain, model(*batch, **call, fp8_head=False, fp8_mlp=False)[0])
        losses = {
            (head, mlp): model(*batch, **call, fp8_head=head, fp8_mlp=mlp)[0]
            for head in (False, True)
            for mlp in (False, True)
        }
        hidden = model.trunk(batch.ids, batch.documents, **call)
        weights = model.embedding if model.head is None else model.head
        head = weights.to(hidden.dtype)
        logits = tg.float8_linear(hidden, head, tg.rms_norm_scale(hidden), False)
        assert torch.equal(losses[True, False], model.token_losses(logits, batch.targets)[0])
        hidden = model.trunk(batch.ids, batch.documents, **call, fp8_mlp=True)
        assert torch.equal(losses[False, True], model.token_losses(model.head_logits(hidden), batch.targets)[0])
    distances = {key: (value - plain).abs().max().item() for key, value in losses.items()}
    assert distances[False, False] == 0 and all(0 < d < 2 for key, d in distances.items() if any(key)), distances
    assert torch.equal(plain, model(*batch, **call)[0])  # it leaves nothing behind


def test_a_compiled_forward_is_one_graph_with_the_same_losses():
    c = config(RECORD_LIKE, VOCAB_SIZE=48, COMPUTE_DTYPE="float32", ATTENTION="sdpa")
    model, batch = build_model(c, seed=4), random_batch(c, 2, 24)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
    results = []
    for forward in (model, compiled):
        nll, _ = forward(*batch, looped=False, fp8_head=True, fp8_mlp=True)
        results.append([nll, *torch.autograd.grad(nll.sum(), [model.up_bank, model.down_bank, model.embedding])])
    torch._dynamo.reset()
    for eager, graph in zip(*results, strict=True):
        assert torch.allclose(eager, graph, rtol=1e-3, atol=1e-3 * eager.abs().max().item())


def test_training_steps_alone_use_it(data, tmp_path, monkeypatch):
    """In a whole run, with validations, calibration, quantization, sliding windows and test-time training."""
    calls, inside = [], [False]
    forward, step = tg.GPT.forward, tg.Trainer.step

    def watched_forward(self, *batch, fp8_head=False, fp8_mlp=False, **rest):
        calls.append((inside[0], fp8_head, fp8_mlp))
        return forward(self, *batch, fp8_head=fp8_head, fp8_mlp=fp8_mlp, **rest)

    def watched_step(*arguments, **options):
        inside[0] = True
        result = step(*arguments, **options)
        inside[0] = False
        return result

    monkeypatch.setattr(tg.GPT, "forward", watched_forward)
    monkeypatch.setattr(tg.Trainer, "step", watched_step)
    monkeypatch.chdir(tmp_path)
    ttt = dict(TTT_MODE="chunk", TTT_CHUNK_TOKENS=4096)
    knobs = {**TINY, **ttt, "FP8_HEAD": 1, "FP8_MLP": 1, "ITERATIONS": 3, "VAL_LOSS_EVERY": 1, "DATA_PATH": data}
    assert tg.main([], {name: str(value) for name, value in knobs.items()}) == 0
    assert set(calls) == {(True, True, True), (False, False, False)}
    assert sum(call[0] for call in calls) == 9  # three micro-steps each
    (log,) = tmp_path.rglob("*log*.txt")
    assert "fp8: head:1 mlp:1 simulated, which takes longer than without" in log.read_text()


@pytest.mark.parametrize("knob", ["FP8_HEAD", "FP8_MLP"])
def test_each_knob_changes_its_products_alone(knob, data):
    ends = []
    for on in (0, 1):
        c = config(TINY, DATA_PATH=data, **{knob: on})
        run = single_run()
        trainer = tg.Trainer(build_model(c, seed=2), tg.TrainLoader(c, run), c, run)
        trainer.step(tg.Progress(0, 0.0), False)
        ends.append([p.detach().clone() for p in trainer.model.parameters()])
    assert any(not torch.equal(a, b) for a, b in zip(*ends, strict=True))
    assert all(p.isfinite().all() for p in ends[1])


# ------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "knobs, name",
    [
        (dict(VOCAB_SIZE=385, FP8_MLP=0), "VOCAB_SIZE"),
        (dict(MODEL_DIM=40, FP8_HEAD=0), "MODEL_DIM"),
        (dict(MODEL_DIM=40, FP8_MLP=0), "MODEL_DIM"),
        (dict(MLP_MULT=2.1, FP8_HEAD=0), "MLP_MULT"),
    ],
)
def test_sizes_that_the_hardware_does_not_take_are_refused_everywhere(knobs, name):
    with pytest.raises(tg.ConfigError, match=f"^{name}=.* multiple of 16"):
        fp8_config(**knobs)
    config(**{**knobs, "FP8_HEAD": 0, "FP8_MLP": 0})
    fp8_config(**knobs, MODE="eval")  # which has no FP8 products


def test_sizes_of_the_other_product_do_not_matter():
    assert fp8_config(VOCAB_SIZE=385, FP8_HEAD=0).fp8_mlp and fp8_config(MLP_MULT=2.1, FP8_MLP=0).fp8_head


def test_fp8_is_native_from_capability_8_9_on(monkeypatch):
    c = dataclasses.replace(config(), device="cuda", compute_dtype="bfloat16")
    for capability, supported in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        assert tg.float8_supported(c) is supported
    assert not tg.float8_supported(dataclasses.replace(c, compute_dtype="float64"))
    assert not tg.float8_supported(dataclasses.replace(c, device="cpu"))


def test_every_preset_leaves_it_off():
    """Until a GPU has shown that it pays."""
    for preset in tg.PRESETS:
        c = config(dict(PRESET=preset, DEVICE="cpu"))
        assert not c.fp8_head and not c.fp8_mlp

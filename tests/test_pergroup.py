"""The entropy coder of integers: exact round trips, exact probabilities, bounded behaviour on any bytes."""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt as p
from helpers import run_command

TRELLIS4 = (((0, 2), (2, 0), (1, 3), (3, 1)), (0, 0, 1, 1))
TRELLIS8 = (((0, 2), (5, 7), (1, 3), (6, 4), (2, 0), (4, 6), (3, 1), (7, 5)), (0, 1) * 4)
TRELLISES = st.sampled_from([None, TRELLIS4, TRELLIS8])


def draw(shape, spread: float, seed: int, dtype=np.int8) -> np.ndarray:
    """Integers with a scale for each row and each column."""
    rng = np.random.default_rng(seed)
    B, r, c = shape
    scale = spread * np.exp(rng.normal(0, 0.5, (B, 1, c)) + rng.normal(0, 0.3, (B, r, 1)))
    limits = np.iinfo(dtype)
    return np.rint(rng.normal(size=shape) * scale).clip(limits.min, limits.max).astype(dtype)


def embedding_like(r: int = 1024, c: int = 48, seed: int = 0, scale: float = 1, dtype=np.int8) -> np.ndarray:
    """Rows of low rank and noise, some of which are near copies of others."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(r, 6)) @ rng.normal(size=(6, c)) * 3 + rng.normal(size=(r, c)) * 2
    x[r // 2 :] = np.where(rng.random((r - r // 2, 1)) < 0.5, x[rng.integers(0, 20, r - r // 2)], x[r // 2 :])
    limit = np.iinfo(dtype).max
    return np.rint(scale * (x + rng.normal(size=(r, c)) * 0.4)).clip(-limit, limit).astype(dtype)[None]


def same(codes: np.ndarray, trellis=None, hints=None) -> bytes:
    """The bytes, after a check that they give the codes back."""
    data = p.encode_integers(codes, trellis, hints)
    back = p.decode_integers(data, codes.shape, trellis, codes.dtype.type, hints)
    assert back.dtype == codes.dtype and np.array_equal(back, codes)
    return data


@settings(deadline=None, derandomize=True, database=None, max_examples=120)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40)),
    st.floats(0.01, 200),
    st.integers(0, 99),
    TRELLISES,
)
def test_round_trip(shape, spread, seed, trellis):
    same(draw(shape, spread, seed), trellis)


@settings(deadline=None, derandomize=True, database=None, max_examples=80)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    st.floats(0.01, 30_000),
    st.integers(0, 99),
    TRELLISES,
)
def test_round_trip_of_wide_integers(shape, spread, seed, trellis):
    same(draw(shape, spread, seed, np.int16), trellis)


@pytest.mark.parametrize("dtype", [np.int8, np.int16])
@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(shape=st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 5)), data=st.data(), trellis=TRELLISES)
def test_round_trip_of_any_small_array(dtype, shape, data, trellis):
    size, limits = int(np.prod(shape)), np.iinfo(dtype)
    values = data.draw(st.lists(st.integers(limits.min, limits.max), min_size=size, max_size=size))
    same(np.array(values, dtype=dtype).reshape(shape), trellis)


@pytest.mark.parametrize("value", [-128, -1, 0, 126, 127])
def test_constant(value):
    assert len(same(np.full((2, 300, 40), value, dtype=np.int8))) < 1500


def test_extremes_and_uniform_noise():
    rng = np.random.default_rng(1)
    noise = rng.integers(-128, 128, (3, 200, 50), dtype=np.int8)
    assert len(same(noise)) < 1.02 * noise.size
    same(rng.choice(np.array([-128, 127], dtype=np.int8), (1, 700, 20)))
    one = np.zeros((1, 500, 30), dtype=np.int8)
    one[0, 77, 7] = -128
    assert len(same(one)) < 300


def test_wide_extremes_and_outliers():
    rng = np.random.default_rng(1)
    noise = rng.integers(-2047, 2048, (3, 200, 50), dtype=np.int16)
    assert 8 * len(same(noise)) < 1.03 * 12 * noise.size
    same(rng.choice(np.array([-(2**15), 2**15 - 1], dtype=np.int16), (1, 700, 20)))
    one = np.zeros((1, 500, 30), dtype=np.int16)
    one[0, 77, 7] = 2047
    assert len(same(one)) < 300
    tails = np.rint(rng.standard_t(1.5, (2, 300, 60)) * 3).clip(-2047, 2047).astype(np.int16)
    clipped = tails.clip(-127, 127).astype(np.int8)
    assert len(same(tails)) < 1.05 * len(same(clipped))


@pytest.mark.parametrize("trellis", [None, TRELLIS8])
def test_small_integers_cost_the_same_in_either_width(trellis):
    codes = draw((2, 100, 60), 2, 0).clip(-40, 40)
    assert same(codes.astype(np.int16), trellis) == same(codes, trellis)
    wide = embedding_like(dtype=np.int16)
    assert abs(len(same(wide, trellis)) - len(same(wide.astype(np.int8), trellis))) < 20


@pytest.mark.parametrize("doubled", [1, 3, 6])
def test_each_bit_more_costs_a_bit(doubled):
    """Steps of half the size cost one bit more for each integer, up to a standard deviation of 2^9."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 300, 100)) * np.exp(rng.normal(0, 0.3, (2, 1, 100))) * 8
    bits = [8 * len(same(np.rint(x * 2**n).astype(np.int16))) / x.size for n in (0, doubled)]
    assert abs(bits[1] - bits[0] - doubled) < 0.03


@pytest.mark.parametrize("trellis", [None, TRELLIS4, TRELLIS8])
@pytest.mark.parametrize("scale, dtype", [(1, np.int8), (1, np.int16), (64, np.int16)])
def test_prediction_of_a_single_matrix(scale, dtype, trellis):
    codes = embedding_like(scale=scale, dtype=dtype)
    data = same(codes, trellis)
    most = 0.8 if dtype == np.int8 else 0.9
    assert data[0] == 5 and len(data) < most * len(p.encode_integers(codes.reshape(2, -1, codes.shape[2]), trellis))


def test_the_plain_form_is_tried_only_where_it_may_be_shorter(monkeypatch):
    tried = []
    models = p.bank_models
    monkeypatch.setattr(p, "bank_models", lambda *a: tried.append(a[2]) or models(*a))
    assert p.encode_integers(embedding_like())[0] == 5 and tried == [5]
    noise = draw((1, 600, 40), 3, 0)
    tried.clear()
    assert p.encode_integers(noise)[0] == 0 and tried == [5, 0]
    assert abs(8 * len(p.encode_integers(noise)) / p.normal_bits(noise) - 1) < 0.03


def test_a_context_of_the_quantizer_pays():
    rng = np.random.default_rng(0)
    codes, following = np.zeros((4, 500, 60), dtype=np.int8), np.array(TRELLIS8[0])
    state = np.zeros((4, 500), dtype=int)
    for j in range(codes.shape[2]):  # odd states draw from a wider distribution
        codes[..., j] = np.rint(rng.normal(size=state.shape) * np.where(state & 1, 4, 1.5))
        state = following[state, codes[..., j] & 1]
    assert len(same(codes, TRELLIS8)) < 0.97 * len(same(codes))


@pytest.mark.parametrize("spread, dtype", [(3, np.int8), (30, np.int16), (300, np.int16)])
def test_near_the_entropy_of_a_known_source(spread, dtype):
    """Integers of known row and column scales cost at most 1% more than -log2 of their true probabilities."""
    from math import erf, sqrt

    rng = np.random.default_rng(3)
    scale = spread * np.exp2(rng.normal(0, 0.5, (2, 1, 256)) + rng.normal(0, 0.3, (2, 512, 1)))
    codes = np.rint(rng.normal(size=scale.shape) * scale).clip(np.iinfo(dtype).min, np.iinfo(dtype).max)
    cdf = np.vectorize(lambda x: 0.5 * (1 + erf(x / sqrt(2))))
    bits = -np.log2(cdf((codes + 0.5) / scale) - cdf((codes - 0.5) / scale)).sum()
    assert 8 * len(same(codes.astype(dtype))) < 1.01 * bits


def scaled(shape, seed: int = 0):
    """Codes of equally large weights, with the fp16 scales of their rows and exponents of their columns' scales."""
    rng = np.random.default_rng(seed)
    B, r, c = shape
    scales = np.exp2(rng.normal(-4, 0.5, (B, r))).astype(np.float16)
    exponents = np.rint(rng.normal(0, 1.5, (B, c))).astype(np.int8)
    steps = scales.astype(float)[..., None] * 2.0 ** (exponents[:, None] / 2)
    return np.rint(rng.normal(0, 0.3, shape) / steps).clip(-128, 127).astype(np.int8), scales, exponents


def test_stored_scales_tell_the_classes():
    shape = (4, 200, 150)
    codes, scales, exponents = scaled(shape)
    plain = len(same(codes))
    both = len(same(codes, None, p.scale_hints(scales, exponents, shape)))
    rows = len(same(codes, None, p.scale_hints(scales, None, shape)))
    columns = len(same(codes, None, p.scale_hints(None, exponents, shape)))
    classes = 4 * (200 + 150)
    assert both < min(rows, columns) and max(rows, columns) < plain - 40 and both < plain - 2 * classes / 8
    wrong = p.scale_hints(scales[:, ::-1].copy(), exponents[:, ::-1].copy(), shape)
    assert len(same(codes, None, wrong)) < plain + 10  # what does not help is not used


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 30), st.integers(1, 30)),
    st.integers(0, 99),
    st.sampled_from([np.int8, np.int16]),
    TRELLISES,
)
def test_round_trip_with_any_scales(shape, seed, dtype, trellis):
    """Any 16 bits are scales of a file that somebody forged, and any bytes are exponents."""
    rng = np.random.default_rng(seed)
    scales = rng.integers(0, 1 << 16, shape[:2], dtype=np.uint16).view(np.float16)
    exponents = rng.integers(-128, 128, (shape[0], shape[2]), dtype=np.int8)
    same(draw(shape, 5, seed, dtype), trellis, p.scale_hints(scales, exponents, shape))


def test_hints_follow_the_logarithm():
    """Within a hundredth of an octave, in integers: 64 sixteenths of a class for each octave."""
    scales = np.arange(0x0400, 0x7C00, dtype=np.uint16).view(np.float16)[None]
    rows, columns = p.scale_hints(scales, np.arange(-128, 128, dtype=np.int8)[None], (1, scales.size, 256))
    error = rows[0] + 64 * np.log2(scales[0].astype(float))
    assert np.ptp(error) / 64 < 0.04 and rows.dtype == columns.dtype == np.int32
    assert columns[0].tolist() == [-32 * e for e in range(-128, 128)]
    for wrong in (p.scale_hints(scales, None, (2, 3, 4)), p.scale_hints(None, scales[0], (2, 3, 4))):
        assert not wrong[0].any() and not wrong[1].any() and wrong[0].shape == (2, 3) and wrong[1].shape == (2, 4)


def test_many_rows_do_not_take_one_step_each():
    same(np.zeros((1, p.MAX_COLUMNS + 1, 2), dtype=np.int8))


def reference_decode(words: list[int], tables: list[list[int]]) -> list[int]:
    """A range decoder in Python's integers alone: one symbol for each cumulative table of probabilities in 1 / 2^24."""
    low, span, point, at = 0, (1 << 64) - 1, (words[0] << 32) | words[1], 2
    out = []
    for table in tables:
        scale = span >> 24
        symbol = bisect.bisect_right(table, (point - low) % (1 << 64) // scale) - 1
        low, span = (low + scale * table[symbol]) % (1 << 64), scale * (table[symbol + 1] - table[symbol])
        if span < 1 << 32:
            low, span = (low << 32) % (1 << 64), span << 32
            point, at = (point << 32) % (1 << 64) | (words[at] if at < len(words) else 0), at + 1
        out.append(symbol)
    return out


@settings(deadline=None, derandomize=True, database=None, max_examples=60)
@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=256), st.integers(0, 2**32))
def test_constriction_uses_exactly_our_integers(row, seed):
    """Its bytes decode with (n + 1) / 2^24 in integer arithmetic, so no rounding of floats decides a probability."""
    counts = p.ContextModel(0, np.array([row], dtype=np.int64) + 1)
    coder, given_frequencies = p.RangeCoder(), []
    categorical = coder.categorical
    coder.categorical = lambda f, perfect: given_frequencies.append(f) or categorical(f, perfect=perfect)
    table = counts.table(coder, 0)
    frequencies = [int(f) for f in given_frequencies[0]]
    assert frequencies == given_frequencies[0].tolist() and min(frequencies) >= 0
    assert sum(frequencies) == (1 << 24) - len(row)
    symbols = np.random.default_rng(seed).integers(0, len(row), 300).astype(np.int32)
    coder.code(symbols, symbols.size, table)
    words = [int(w) for w in coder.encoder.get_compressed()] + [0, 0]
    cumulative = [0]
    for f in frequencies:
        cumulative.append(cumulative[-1] + f + 1)
    assert cumulative[-1] == 1 << 24
    assert reference_decode(words, [cumulative] * symbols.size) == symbols.tolist()


def decodes_or_refuses(data: bytes, shape, trellis, dtype) -> None:
    """Decoding ends in codes of the right form or in ValueError."""
    with contextlib.suppress(ValueError):
        codes = p.decode_integers(data, shape, trellis, dtype)
        assert codes.shape == tuple(shape) and codes.dtype == dtype


DTYPES = st.sampled_from([np.int8, np.int16])


@settings(deadline=None, derandomize=True, database=None, max_examples=150)
@given(
    st.binary(max_size=200),
    st.tuples(st.integers(1, 3), st.integers(1, 300), st.integers(1, 20)),
    TRELLISES,
    st.sampled_from([b"", b"\0\xf0\x10", b"\0\x80\x7f", b"\5\x80\x7f"]),
    DTYPES,
)
def test_random_bytes(data, shape, trellis, header, dtype):
    decodes_or_refuses(header + data, shape, trellis, dtype)


VALID = {
    (codes.shape, codes.dtype.type): p.encode_integers(codes)
    for codes in (
        draw((2, 60, 30), 3, 0),
        draw((2, 60, 30), 300, 0, np.int16),
        embedding_like(512, 24),
        embedding_like(512, 24, 0, 30, np.int16),
    )
}


@settings(deadline=None, derandomize=True, database=None, max_examples=150)
@given(st.sampled_from(list(VALID)), st.data())
def test_damaged_data(form, data):
    raw = bytearray(VALID[form])
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(raw)))
    decodes_or_refuses(
        bytes(raw[:cut] if data.draw(st.booleans()) else raw) + data.draw(st.binary(max_size=9)), form[0], None, form[1]
    )


def test_forged_shapes_and_surplus_are_refused():
    data = p.encode_integers(draw((1, 30, 30), 3, 0))
    for shape in [(1, 1, 1 << 20), (1 << 20, 1 << 20, 1), (30, 30), (1, -1, 30)]:
        with pytest.raises(ValueError):
            p.decode_integers(data, shape)
    with pytest.raises(ValueError):
        p.decode_integers(data + bytes(range(1, 200)), (1, 30, 30))
    for bad in (b"", b"\0", b"\0\5\5", b"\7\0\1", b"\5\0\1" + bytes(9)):
        with pytest.raises(ValueError):
            p.decode_integers(bad, (1, 30, 30))


CASES = (
    (draw((3, 50, 40), 4, 5), None),
    (draw((2, 64, 64), 2, 6), TRELLIS8),
    (embedding_like(), None),
    (embedding_like(scale=20, dtype=np.int16), TRELLIS4),
)


def digest() -> str:
    return hashlib.sha256(b"".join(p.encode_integers(*case) for case in CASES)).hexdigest()


def test_same_bytes_in_another_process():
    code = "import helpers, test_pergroup as t; print(t.digest())"  # helpers knows where the script is
    other = run_command([sys.executable, "-c", code], cwd=Path(__file__).parent)
    assert other.returncode == 0, other.stderr
    assert other.stdout.strip() == digest()

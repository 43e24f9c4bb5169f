"""bench/pack.py: ideal lengths of integers are consistent with each other and with the coder."""

from __future__ import annotations

import sys

import numpy as np
import pytest

import train_gpt as tg
from helpers import ROOT

sys.path.append(str(ROOT / "bench"))
import pack  # noqa: E402

RNG = np.random.default_rng(0)
SCALE = np.exp2(RNG.normal(0, 0.5, (2, 1, 96)) + RNG.normal(0, 0.2, (2, 128, 1)))
NORMAL = np.rint(RNG.normal(size=(2, 128, 96)) * 3 * SCALE).astype(np.int8)
LOW_RANK = np.rint(RNG.normal(size=(512, 4)) @ RNG.normal(size=(4, 32)) * 4).clip(-127, 127).astype(np.int8)[None]
STATES = {"scaled": 8, "low rank": 0}


@pytest.mark.parametrize("name, codes", [("scaled", NORMAL), ("low rank", LOW_RANK)])
def test_ideal_lengths(name, codes):
    form = tg.IntegerBank(codes.shape, STATES[name])
    data = tg.compress("pergroup", codes.tobytes(), form)
    coder = pack.ideal_coder(codes, form)
    assert 0 <= 8 * len(data) - coder.bits < 100
    assert 0 < coder.symbol_bits < coder.bits
    mixed = pack.mixer_bits(coder) + coder.bits - coder.symbol_bits
    assert pack.oracle_bits(coder) < coder.bits and abs(mixed / coder.bits - 1) < 0.05
    assert (len(coder.passes) > 1) is (name == "low rank")  # of which prediction takes some passes
    assert tg.compress("pergroup", codes.tobytes(), form) == data  # the real coder is back


def test_the_mixture_finds_what_the_coder_does_not_model():
    """Magnitudes that repeat in a row's next integer."""
    rng = np.random.default_rng(1)
    level = np.repeat(np.exp2(rng.choice([-1.0, 2.5], (1, 200, 20))), 10, axis=2)
    codes = np.rint(rng.normal(size=level.shape) * level).clip(-127, 127).astype(np.int8)
    coder = pack.ideal_coder(codes, tg.IntegerBank(codes.shape, 0))
    assert pack.mixer_bits(coder) < 0.97 * coder.symbol_bits

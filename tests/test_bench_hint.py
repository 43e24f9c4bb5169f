"""bench/hint.py: its variants on one artifact, its figures against those of a run, and the file that it writes."""

import json
import sys

import numpy as np
import pytest

from helpers import ROOT, TINY, fork, fork_script, tg

sys.path.append(str(ROOT / "bench"))
import hint  # noqa: E402


def test_a_run_has_its_gain_by_every_variant(data, tmp_path):
    more = dict(HINT_ENABLED=1, HINT_MIN_MATCH=3, HINT_CHUNK_TOKENS=512)
    values = dict(TINY, DATA_PATH=data, ARTIFACT_DIR=tmp_path / "run", COMPUTE_DTYPE="float32", **more)
    done = fork_script(values, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    settings = [f"{name}={value}" for name, value in more.items()] + ["COMPUTE_DTYPE=float32"]
    arguments = ("--data", data, "--most", 20_000, "--out", tmp_path / "hint.md", "--set", *settings)
    done = fork(ROOT / "bench" / "hint.py", {}, tmp_path / "run", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "hint.md").read_text()
    for name in hint.VARIANTS:
        assert f"| {name} | " in text
    s = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert f"| without hints | {s['val_bpb_quantized']:.4f} |" in text
    gain = s["val_bpb_quantized"] - s["val_bpb_hint"]
    assert f"| {hint.DEFAULT} | {gain:.4f} | {s['hint_share']:.1%} |" in text
    assert "Seconds for a million targets, of " in text


def test_hints_of_the_own_document_and_the_fixed_weight():
    tokens = np.array([1, 5, 6, 7, 5, 6, 8, 1, 5, 6, 9, 9], np.uint16)
    c = tg.dataclasses.replace(tg.Config(), hint_min_match=2, hint_chunk_tokens=1)
    documents = tg.document_offsets(tokens)
    both, own = (hint.hints_of(name, tokens, documents, c) for name in (hint.DEFAULT, hint.OWN))
    assert set(np.flatnonzero(both.kinds)) >= {5, 9}
    assert np.flatnonzero(own.kinds).tolist() == [5] and own.tokens[5] == 7
    nll, log_q = np.full(11, 2.0, np.float32), np.full(11, np.log(0.25), np.float32)
    scores = hint.fixed_scores(nll, log_q, tokens, own)
    assert scores[5] == pytest.approx(2 + np.log(0.75 + 0.25 * np.exp(2.625)), rel=1e-6)
    assert (np.delete(scores, 5) == 2).all()
